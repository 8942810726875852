"""Values and groups as `group_advantages` is given them: checked, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COMBINE = ("advantages", "rewards")


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of C columns (C = 1 where values are [B]).

    values  float64 [B, C] by name, rising; the name is "" where there is one kind of values. 0 where not valid
    valid   bool [B, C]; ids int64 [B]; weights by name
    flat    whether values are [B]
    """

    values: dict[str, Tensor]
    valid: Tensor
    ids: Tensor
    weights: dict[str, float]
    flat: bool

    @staticmethod
    def read(values: Any, group_ids: Any, weights: Any, combine: str, valid: Any) -> Rows:
        """Raises TypeError or ValueError, naming the argument."""
        if combine not in COMBINE:
            raise ValueError(f"combine: wanted one of {', '.join(COMBINE)}, got {combine!r}")
        named = values if isinstance(values, Mapping) else {"": values}
        if not named:
            raise ValueError("values: wanted numbers or {name: numbers}, got no name")
        if weights is not None and not isinstance(values, Mapping):
            raise ValueError("weights: wanted None, since values have no names, got weights")
        tables = {str(name): numbers(label(str(name)), table) for name, table in named.items()}
        first = next(iter(tables))
        for name, table in tables.items():
            if table.dim() not in (1, 2) or table.shape != tables[first].shape:
                wanted = "[B] or [B, K]" if name == first else f"{list(tables[first].shape)}, as {label(first)}"
                raise ValueError(f"{label(name)}: wanted {wanted}, got {list(table.shape)}")
        shape = tables[first].shape
        counts = flags(valid, shape)
        for name, table in tables.items():
            check_finite(label(name), table, counts)
        flat = len(shape) == 1
        columns = (shape[0], 1) if flat else tuple(shape)
        kept = {name: torch.where(counts, tables[name], 0.0).reshape(columns) for name in sorted(tables)}
        rows = Rows(kept, counts.reshape(columns), group_numbers(group_ids, shape[0]), shares(weights, kept), flat)
        if combine == "rewards":
            rows = Rows({"": rows.weighted()}, rows.valid, rows.ids, {"": 1.0}, flat)
        return rows

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Of all ranks, in their order."""
        first = parts[0]
        values = {name: torch.cat([part.values[name] for part in parts]) for name in first.values}
        valid, ids = (torch.cat([getattr(part, name) for part in parts]) for name in ("valid", "ids"))
        return Rows(values, valid, ids, first.weights, first.flat)

    def weighted(self) -> Tensor:
        """The weighted sum of the values, float64 [B, C]; names in rising order."""
        total = torch.zeros(self.valid.shape, dtype=torch.float64)
        for name, table in self.values.items():
            total += self.weights[name] * table
        return total

    def shaped(self, table: Tensor) -> Tensor:
        """[B, C] (or [G, C]) as the values are: without C where they are [B]."""
        return table[:, 0] if self.flat else table

    def alike(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        columns = "[B]" if self.flat else f"[B, {self.valid.shape[1]}]"
        return {"shape of values": columns, "names": list(self.values), "weights": self.weights}


def label(name: str) -> str:
    return f"values[{name!r}]" if name else "values"


def numbers(name: str, values: Any) -> Tensor:
    """float64 on the host, detached; tensors, arrays and nested lists will do."""
    try:
        exact = None if hasattr(values, "__array__") else torch.float64
        table = torch.as_tensor(values, dtype=exact).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: wanted numbers, got {type(values).__name__}: {error}") from error
    if table.is_complex():
        raise TypeError(f"{name}: wanted real numbers, got {table.dtype}")
    return table.to(torch.float64)


def integers(name: str, values: Any) -> Tensor:
    """int64 [n] on the host."""
    try:
        table = torch.as_tensor(values, device=None if isinstance(values, Tensor) else "cpu").detach().to("cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: wanted integers, got {type(values).__name__}: {error}") from error
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise TypeError(f"{name}: wanted int64, got {table.dtype}")
    return table.to(torch.int64)


def group_numbers(group_ids: Any, batch: int, rows_of: str = "values") -> Tensor:
    ids = integers("group_ids", group_ids)
    if tuple(ids.shape) != (batch,):
        raise ValueError(f"group_ids: wanted int64 [{batch}], one per row of {rows_of}, got {list(ids.shape)}")
    return ids


def flags(valid: Any, shape: torch.Size) -> Tensor:
    """bool of `shape`; given for rows or for each value."""
    if valid is None:
        return torch.ones(shape, dtype=torch.bool)
    try:
        mask = torch.as_tensor(valid).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"valid: wanted bool {list(shape)}, got {type(valid).__name__}: {error}") from error
    if mask.shape not in (shape, shape[:1]) or (mask.numel() and mask.dtype != torch.bool):
        either = " or ".join(dict.fromkeys((str(list(shape[:1])), str(list(shape)))))
        raise ValueError(f"valid: wanted bool {either}, got {mask.dtype} {list(mask.shape)}")
    mask = mask.bool()
    return mask if mask.dim() == len(shape) else mask[:, None].expand(shape)


def check_finite(name: str, table: Tensor, counts: Tensor | None = None) -> None:
    """Raises ValueError with the places of what is not finite."""
    bad = ~torch.isfinite(table)
    wrong = (bad if counts is None else bad & counts).nonzero().tolist()
    if wrong:
        what = "rows" if table.dim() == 1 else "(row, column)"
        places = [place[0] if table.dim() == 1 else tuple(place) for place in wrong[:8]]
        raise ValueError(
            f"{name}: wanted finite numbers, got {table[tuple(wrong[0])].item()} at {what} {places}"
            f"{' ...' if len(wrong) > 8 else ''}; score these too, or leave them out"
        )


def shares(weights: Any, tables: Mapping[str, Tensor]) -> dict[str, float]:
    """The weight of every name."""
    if weights is None:
        return dict.fromkeys(tables, 1.0)
    if not isinstance(weights, Mapping) or {str(name) for name in weights} != set(tables):
        got = sorted(str(name) for name in weights) if isinstance(weights, Mapping) else type(weights).__name__
        raise ValueError(f"weights: wanted one number for each of {sorted(tables)}, got {got}")
    found = {str(name): float(weight) for name, weight in weights.items()}
    for name, weight in found.items():
        if not math.isfinite(weight):
            raise ValueError(f"weights[{name!r}]: wanted a finite number, got {weight}")
    return {name: found[name] for name in tables}


def agree(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, on every rank, where one has other settings."""
    for rank, theirs in enumerate(settings):
        for name, wanted in settings[0].items():
            if theirs[name] != wanted:
                raise ValueError(
                    f"process_group: wanted the same {name} on all ranks, got {theirs[name]} on rank {rank} and {wanted} on "
                    "rank 0"
                )
