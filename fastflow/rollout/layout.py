"""Rows of a rollout: which samples share a row before the first stochastic step, and where completions lie in their store."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows of the main chain by level, and of the completions' store, which holds one block per completed state.

    Samples with one prompt and one initial noise are the same until the first stochastic step: up to there they are one row,
    and so are the completions opened up to there. Dummy rows, which keep ranks in step, stand behind the rank's own rows.
    """

    own: int  # samples
    heads: Tensor  # int64 [H]: the sample that stands for each shared row
    group: Tensor  # int64 [batch]: the shared row of each sample
    own_heads: int
    fork: int  # samples go apart in the step from this level; -1: nothing is shared
    states: tuple[int, ...] = ()  # that the store's blocks complete; the last block is the final state

    @property
    def batch(self) -> int:
        """Rows of a level at which every sample has one, dummies included."""
        return self.group.shape[0]

    def main(self, level: int) -> Tensor:
        """The sample of each main row at this level."""
        return self.heads if level < self.fork else torch.arange(self.batch)

    def main_rows(self, level: int) -> tuple[int, int]:
        """(rows, rank's own rows) of the main chain at this level."""
        return (len(self.heads), self.own_heads) if level < self.fork else (self.batch, self.own)

    def is_shared(self, state: int) -> bool:
        """Whether the completion of this state is one per shared row."""
        return state <= self.fork

    def block_rows(self, block: int) -> tuple[int, int]:
        """(rows, rank's own rows) of a block of the store."""
        return (len(self.heads), self.own_heads) if self.is_shared(self.states[block]) else (self.batch, self.own)

    @property
    def offsets(self) -> list[int]:
        """First row of each block, and the number of rows of all of them."""
        offsets = [0]
        for block in range(len(self.states)):
            offsets.append(offsets[-1] + self.block_rows(block)[0])
        return offsets

    def block(self, number: int) -> slice:
        """The rows of a block."""
        return slice(self.offsets[number], self.offsets[number + 1])

    def own_in(self, first: int, last: int) -> int:
        """How many rows [first, last) of the store are the rank's own."""
        count = 0
        for block, offset in enumerate(self.offsets[:-1]):
            end = offset + self.block_rows(block)[1]
            count += max(min(last, end) - max(first, offset), 0)
        return count

    def own_rows(self) -> Tensor:
        """int64: the rank's own rows of the store, block by block."""
        starts = self.offsets
        return torch.cat([torch.arange(starts[b], starts[b] + self.block_rows(b)[1]) for b in range(len(self.states))])

    def samples(self) -> Tensor:
        """int64 [rows of the store]: the sample of each."""
        everyone = torch.arange(self.batch)
        return torch.cat([self.heads if self.is_shared(state) else everyone for state in self.states])

    def blocks(self) -> Tensor:
        """int64 [rows of the store]: the block of each."""
        counts = torch.tensor([self.block_rows(b)[0] for b in range(len(self.states))])
        return torch.arange(len(self.states)).repeat_interleave(counts)

    def rows_of(self, block: int) -> Tensor:
        """int64 [own]: the row of the store that holds each of the rank's samples, for one block."""
        mine = self.group[: self.own] if self.is_shared(self.states[block]) else torch.arange(self.own)
        return mine + self.offsets[block]


def make_layout(own: int, names: Sequence[Hashable] | None, fork: int, sizes: tuple[int, int] | None = None) -> Layout:
    """names: what each sample starts from, None where nobody can tell. sizes: (samples, shared rows) to fill up with dummies.

    Without equal names nothing is shared.
    """
    first: dict[Hashable, int] = {}  # name -> its shared row
    rows: list[int] = []
    heads: list[int] = []
    for sample, name in enumerate(names if names is not None else range(own)):
        if name not in first:
            first[name] = len(heads)
            heads.append(sample)
        rows.append(first[name])
    batch, shared = sizes if sizes is not None else (own, len(heads))
    if shared >= batch:
        everyone = torch.arange(batch)
        return Layout(own, everyone, everyone, own, -1)
    return Layout(
        own,
        torch.tensor([*heads, *[heads[0] if heads else 0] * (shared - len(heads))], dtype=torch.int64),
        torch.tensor([*rows, *[0] * (batch - own)], dtype=torch.int64),
        len(heads),
        fork,
    )


def starts(initial: Any, prompts: Tensor, scales: Sequence[Tensor]) -> list[Hashable] | None:
    """What each sample of the batch starts from; equal entries are one row until the first stochastic step.

    None where the host cannot tell: states given as a tensor, seeds on another device.
    """
    if not isinstance(initial, Noise) or isinstance(initial.step, Tensor) or initial.seeds.device.type != "cpu":
        return None
    columns = [initial.seeds.tolist(), prompts.tolist()]
    columns += [[tuple(c) for c in scale.T.tolist()] for scale in scales]
    return list(zip(*columns, strict=True))
