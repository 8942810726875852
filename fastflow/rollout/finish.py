"""Decode and reward: clean samples in bounded batches to images, images to numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rewards = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Info:
    """What the rows of a decode or reward call are; int64 [M] on the host.

    prompt_index: the row's prompt. sample_index: its row in the batch. position: the state that was completed, 0..T.
    """

    prompt_index: Tensor
    sample_index: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.prompt_index)


Decode = Callable[[Tensor, Info], Any]
Reward = Callable[[Any, Info], Any]


class Scores:
    """Rewards [slots * batch] by name, filled as they come; NaN where none came yet."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.values: dict[str, Tensor] = {}
        self.pending: list[tuple[Any, Info, int]] = []

    def add(self, result: Any, info: Info, start: int) -> None:
        """The result of one reward call: [M], {name: [M]}, or a Future of either, which is read in `settle`."""
        if hasattr(result, "result") and not isinstance(result, Tensor):
            self.pending.append((result, info, start))
        else:
            self._enter(result, info, start)

    def _enter(self, result: Any, info: Info, start: int) -> None:
        named = result if isinstance(result, Mapping) else {"": result}
        if not named:
            raise ValueError(f"reward: wanted [{len(info)}] numbers or {{name: [{len(info)}]}}, got no name")
        for name, values in named.items():
            row = _as_rewards(values, len(info), str(name))
            table = self.values.setdefault(str(name), torch.full((self.rows,), float("nan"), dtype=torch.float32))
            table[start : start + len(info)] = row
            wrong = (~torch.isfinite(row)).nonzero().flatten().tolist()
            if wrong:
                where = [(int(info.sample_index[i]), int(info.position[i])) for i in wrong[:8]]
                label = f" {name!r}" if name else ""
                raise ValueError(
                    f"reward{label}: wanted finite numbers, got {row[wrong[0]].item()} for (sample, state) {where}"
                )

    def settle(self) -> None:
        """Reads the Futures, all of them before the first error is raised, and sees that no number is missing."""
        pending, self.pending = self.pending, []
        first: BaseException | None = None
        for future, info, start in pending:
            error = future.exception() if hasattr(future, "exception") else None
            if error is None:
                try:
                    self._enter(future.result(), info, start)
                except (TypeError, ValueError) as wrong:
                    error = wrong
            first = first or error
        if first is not None:
            raise first
        for name, values in self.values.items():
            missing = int(values.isnan().sum())
            if missing:
                label, names = f"reward {name!r}" if name else "reward", sorted(self.values)
                raise ValueError(
                    f"{label}: wanted the same names in every call, got {names}, this one not for {missing} images"
                )

    def table(self, slots: Tensor, batch: int) -> Rewards | None:
        """[B, S] (or {name: [B, S]}) of the states, given the slot of each."""
        tables = {name: v.reshape(-1, batch)[slots].T.contiguous() for name, v in self.values.items()}
        return None if not tables else tables[""] if set(tables) == {""} else tables


def _as_rewards(values: Any, count: int, name: str) -> Tensor:
    label = f"reward {name!r}" if name else "reward"
    if isinstance(values, Tensor):
        tensor = values.detach()
    elif isinstance(values, Sequence) or hasattr(values, "__array__"):
        tensor = torch.as_tensor(values)
    else:
        raise TypeError(
            f"{label}: wanted [{count}] numbers, {{name: [{count}]}} or a Future, got {type(values).__name__}"
        )
    if tensor.shape not in ((count,), (count, 1)):
        raise ValueError(f"{label}: wanted {count} numbers, one per image, got shape {tuple(tensor.shape)}")
    return tensor.reshape(count).to(device="cpu", dtype=torch.float32)
