"""`Transitions`: the coefficients of a whole schedule, float64 on the host; a float32 table [T, 16] per device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import columns as col
from .at import At, bounded, checked_index
from .schedule import digest

LARGEST_STD = 1.5  # above it a transition forgets its own sample: a schedule that asks for it is wrong


class Table:
    """A float64 table [rows, 16] on the host, with one rounded copy per (device, dtype), uploaded once."""

    def __init__(self, rows: Tensor, score: str, name: str) -> None:
        self._rows, self._score, self._name = rows, score, name
        self._cache: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def score(self) -> str:
        """The score that `ff.step` takes by default: one of "gaussian", "gaussian_no_const", "square"."""
        return self._score

    @property
    def name(self) -> str:
        """The dynamics, as shown in messages."""
        return self._name

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """[rows, 16] of `dtype` on `device`, rounded once from float64. Only the first call for a device copies."""
        key = (torch.device(device), dtype)
        found = self._cache.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self._rows.to(device=key[0], dtype=dtype, copy=True)
            if type(found) is Tensor:  # a fake tensor of a tracer must not outlive its trace
                self._cache[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


class Transitions(Table, col.Columns):
    """T transitions `mean = a*sample + b*velocity`, `next_sample = mean + std*z`, with `clean` and ODE rows. Immutable.

    `a, b, std, p, q, ode_a, ode_b, sigma, sigma_next, history, timestep` are float64 CPU copies [T].
    Made by a dynamics' `transitions(sigmas)`.

    Raises:
        ValueError: a table that no backend can serve (a value that is not finite, std < 0, std above 1.5), in words.
    """

    def __init__(self, rows: Tensor, score: str = "gaussian", name: str = "transitions") -> None:
        if score not in col.SCORES:
            raise ValueError(f"score: wanted one of {', '.join(col.SCORES)}, got {score!r}")
        if rows.ndim != 2 or rows.shape[1] != col.COLUMNS or rows.dtype != torch.float64 or len(rows) == 0:
            raise ValueError(f"rows: wanted float64 [T, {col.COLUMNS}], got {rows.dtype} {list(rows.shape)}")
        with torch.inference_mode(False):
            rows = rows.detach().to("cpu", copy=True)
            derive_score(rows)
            check(rows, name)
        super().__init__(rows, score, name)

    @staticmethod
    def build(columns: dict[int, Tensor], score: str = "gaussian", name: str = "transitions") -> Transitions:
        """From float64 [T] columns, keyed by the constants of `fastflow.dynamics.columns`; missing ones are 0."""
        rows = torch.zeros(len(columns[col.SIGMA]), col.COLUMNS, dtype=torch.float64)
        for column, values in columns.items():
            rows[:, column] = values
        return Transitions(rows, score, name)

    def __len__(self) -> int:
        return self._rows.shape[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transitions) and self._score == other._score and torch.equal(self._rows, other._rows)

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        return f"Transitions({self._name}, steps={len(self)}, score={self._score!r}, hash={self.hash})"

    @property
    def hash(self) -> str:
        """12 hex digits that stand for the float32 table and the score."""
        return digest(self.table(), torch.tensor(col.SCORES.index(self._score)))

    def _column(self, number: int) -> Tensor:
        return self._rows[:, number].clone()

    def at(self, index: int | Tensor) -> At:
        """The coefficients of step `index`: an int tensor [B], or an int (or 0-dim tensor) for the whole batch.

        Raises:
            IndexError: a step outside the schedule, as far as the host can see. A device's is clamped, see `At.fault`.
            TypeError: anything else.
        """
        if not isinstance(index, Tensor):
            return At(self, checked_index("index", index, len(self)))
        clamped = bounded("index", index, len(self))
        return At(self, clamped, ((index, clamped),))

    def where(self, mask: Tensor | Sequence[bool], other: Transitions, score: str | None = None) -> Transitions:
        """These transitions where `mask` (bool [T]) is true, `other`'s elsewhere.

        `score`: needed only if both add noise and their scores differ.
        """
        chosen = torch.as_tensor(mask).to("cpu")
        if chosen.dtype != torch.bool or chosen.shape != (len(self),):
            raise ValueError(f"mask: wanted bool [{len(self)}], one per step, got {chosen.dtype} {list(chosen.shape)}")
        if len(other) != len(self):
            raise ValueError(f"other: wanted {len(self)} steps, as here, got {len(other)}")
        rows = torch.where(chosen[:, None], self._rows, other._rows)
        return Transitions(rows, common_score([self, other], score), f"{self._name} | {other._name}")

    @staticmethod
    def stack(transitions: Sequence[Transitions], score: str | None = None) -> StackedTransitions:
        """Several tables as one, so that every row of a batch may have its own: `.at(i, table=index)`."""
        return StackedTransitions(transitions, score)

    def state_dict(self) -> dict[str, Tensor]:
        """{"table": float64 [T, 16], "score": int64 []} for saving."""
        return {"table": self._rows.clone(), "score": torch.tensor(col.SCORES.index(self._score))}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor], name: str = "saved transitions") -> Transitions:
        """The transitions that `state_dict` saved; `name` as shown in messages."""
        return Transitions(state["table"], col.SCORES[int(state["score"])], name)


class StackedTransitions(Table):
    """K transition tables one below the other, [K * T, 16] with T the longest; made by `Transitions.stack`."""

    def __init__(self, transitions: Sequence[Transitions], score: str | None = None) -> None:
        self._parts = tuple(transitions)
        if not self._parts or not all(isinstance(part, Transitions) for part in self._parts):
            kinds = [type(part).__name__ for part in self._parts]
            raise TypeError(f"transitions: wanted at least one Transitions, got {kinds}")
        self._longest = max(len(part) for part in self._parts)
        self._lengths = torch.tensor([len(part) for part in self._parts])
        self._length_cache: dict[torch.device, Tensor] = {}
        padded = [torch.nn.functional.pad(part._rows, (0, 0, 0, self._longest - len(part))) for part in self._parts]
        super().__init__(
            torch.cat(padded), common_score(self._parts, score), " / ".join(part.name for part in self._parts)
        )

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, table: int) -> Transitions:
        return self._parts[table]

    def __repr__(self) -> str:
        return f"StackedTransitions({', '.join(map(repr, self._parts))})"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_length_cache": {}}

    def at(self, index: int | Tensor, table: int | Tensor) -> At:
        """The coefficients of step `index` of table `table`, each an int or an int tensor [B] on one device.

        Raises: as `Transitions.at`.
        """
        if not isinstance(table, Tensor):
            only = checked_index("table", table, len(self))
            steps = len(self._parts[only])
            if not isinstance(index, Tensor):
                return At(self, only * self._longest + checked_index("index", index, steps))
            step = bounded("index", index, steps)
            return At(self, only * self._longest + step, ((index, step),))
        number = bounded("table", table, len(self))
        if not isinstance(index, Tensor):
            index = torch.full_like(table, checked_index("index", index, self._longest))
        if index.shape != table.shape or index.device != table.device:
            shapes = f"{list(index.shape)} on {index.device} and {list(table.shape)} on {table.device}"
            raise ValueError(f"index, table: wanted one shape and device, got {shapes}")
        step = bounded("index", index, self._lengths_on(index.device)[number])
        return At(self, number * self._longest + step, ((index, step), (table, number)))

    def _lengths_on(self, device: torch.device) -> Tensor:
        found = self._length_cache.get(device)
        if found is None:
            found = self._lengths.to(device)
            if type(found) is Tensor:
                self._length_cache[device] = found
        return found


def derive_score(rows: Tensor) -> None:
    """Fills c0 = -ln(std) - ln(2 pi)/2 and w = 1/(2 std^2); 0 where std == 0."""
    std = rows[:, col.STD]
    noisy, safe = std > 0, torch.where(std > 0, std, 1.0)
    rows[:, col.C0] = torch.where(noisy, -safe.log() - 0.5 * math.log(2.0 * math.pi), 0.0)
    rows[:, col.W] = torch.where(noisy, 0.5 / (safe * safe), 0.0)


def check(rows: Tensor, name: str) -> None:
    """Refuses a table that no backend can serve."""
    for step, row in enumerate(rows.tolist()):
        where = f"{name}, step {step} (sigma {row[col.SIGMA]:.6g} -> {row[col.SIGMA_NEXT]:.6g})"
        if row[col.STD] > 0.0 and row[col.W] > torch.finfo(torch.float32).max:
            raise ValueError(
                f"{where}: std is {row[col.STD]:.6g}, and 1 / (2 std^2) overflows float32; take 0 for no noise"
            )
        for label, value in zip(col.NAMES, row, strict=False):
            if not abs(value) < torch.finfo(torch.float32).max:
                raise ValueError(
                    f"{where}: {label} is {value}, which float32 cannot hold; change the schedule or the noise"
                )
        if row[col.STD] < 0.0:
            raise ValueError(f"{where}: std is {row[col.STD]:.6g}; a standard deviation is at least 0")
        if row[col.STD] > LARGEST_STD:
            raise ValueError(
                f"{where}: std is {row[col.STD]:.6g}, above {LARGEST_STD}; lower the noise, or take shorter steps here"
            )


def common_score(parts: Sequence[Transitions], score: str | None) -> str:
    """The score of the parts that add noise; `score` decides when they differ."""
    if score is not None:
        return score
    scores = {part.score for part in parts if bool((part.std > 0).any())} or {part.score for part in parts}
    if len(scores) > 1:
        raise ValueError(f"score: the dynamics have different ones ({', '.join(sorted(scores))}); name one with score=")
    return scores.pop()
