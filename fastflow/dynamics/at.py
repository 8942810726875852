"""`At`: the coefficients of one step for a batch. A table and an index; nothing is copied per step."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transfer import upload
from . import columns as col

if TYPE_CHECKING:
    from .transitions import Table


class At(col.Columns):
    """Coefficients of one step, made by `Transitions.at`. Immutable.

    `batch`: None if one row serves the whole batch, else B.
    `a, b, std, ...`: float64, 0-dim for a host index, else of the index's shape and on its device.
    """

    __slots__ = ("_clamped", "_index", "_source")

    def __init__(self, source: Table, index: int | Tensor, clamped: tuple[tuple[Tensor, Tensor], ...] = ()) -> None:
        self._source, self._index, self._clamped = source, index, clamped

    @property
    def score(self) -> str:
        """The dynamics' own score: "gaussian", "gaussian_no_const" or "square"."""
        return self._source.score

    @property
    def name(self) -> str:
        """The dynamics, as shown in messages."""
        return self._source.name

    @property
    def batch(self) -> int | None:
        return self._index.shape[0] if isinstance(self._index, Tensor) and self._index.ndim == 1 else None

    @property
    def fault(self) -> Tensor | None:
        """bool [B] ([1] for a 0-dim index): where an index on a device left the schedule and was clamped, or None."""
        if not self._clamped or (self._clamped[0][0].device.type == "cpu" and not torch.compiler.is_compiling()):
            return None
        faults = [(given != used).reshape(-1) for given, used in self._clamped]
        return faults[0] if len(faults) == 1 else faults[0] | faults[1]

    def rows(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[1, 16] for one host index (a view of the device's table), [B, 16] for a tensor (gathered on the device)."""
        table = self._source.table(dtype, device)
        if isinstance(self._index, Tensor):
            return table.index_select(0, upload(self._index.reshape(-1), table.device))
        return table[self._index : self._index + 1]

    def __repr__(self) -> str:
        return f"At({self.name}, index={self._index})"

    def _column(self, number: int) -> Tensor:
        if not isinstance(self._index, Tensor):
            return self._source.table(torch.float64)[self._index, number].clone()
        return self._source.table(torch.float64, self._index.device)[:, number][self._index]


def checked_index(name: str, index: Any, size: int) -> int:
    """A host index in [0, size); negative ones count from the end, as in a list."""
    if isinstance(index, bool):
        raise TypeError(f"{name}: wanted an int or an int tensor, got {index}")
    if not isinstance(index, (int, torch.SymInt)):
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"{name}: wanted an int or an int tensor, got {type(index).__name__}") from None
    if not -size <= index < size:
        raise IndexError(f"{name}: wanted 0 to {size - 1}, got {index}")
    return int(index) if index >= 0 else int(index + size)


def bounded(name: str, index: Tensor, size: int | Tensor) -> Tensor:
    """A tensor index as int64, clamped to [0, size); out of range raises if the host holds it (and no tracer runs)."""
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or index.ndim > 1:
        raise TypeError(f"{name}: wanted an int64 tensor, [B] or 0-dim, got {index.dtype} {list(index.shape)}")
    index = index.long()
    clamped = index.clamp(min=0)
    clamped = torch.minimum(clamped, size - 1) if isinstance(size, Tensor) else clamped.clamp(max=size - 1)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(index, clamped):
        wrong = (index != clamped).reshape(-1).nonzero().flatten().tolist()
        limit = size if isinstance(size, int) else "the length of each row's table"
        raise IndexError(f"{name}: rows {wrong} hold {index.reshape(-1)[wrong].tolist()}, outside [0, {limit})")
    return clamped
