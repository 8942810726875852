"""Decode and reward: clean samples in bounded batches to images, images to numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transfer import upload
from .finish import Decode, Info, Reward, Rewards, Scores
from .setup import Setup

if TYPE_CHECKING:
    from .engine import Engine


class Scoring:
    """Rows of the store, block by block, in batches of max_decode; each shared row once."""

    def __init__(self, setup: Setup, decode: Decode | None, reward: Reward | None) -> None:
        self.setup, self.decode, self.reward = setup, decode, reward
        layout = setup.layout
        self.rows = layout.own_rows()  # of the store
        self.samples, self.blocks = layout.samples()[self.rows], layout.blocks()[self.rows]
        self.scores = Scores(len(self.rows))
        self.batch = setup.max_decode or max(len(self.rows), 1)
        self.chunks = -(-len(self.rows) // self.batch) if reward is not None else 0
        self.images: Tensor | None = None
        self.done = reward is None  # nothing more looks at the clean samples

    def run(self, store: Tensor, engine: Engine) -> None:
        if self.reward is None:
            return
        whole = len(self.rows) == len(store)
        for start in range(0, len(self.rows), self.batch):
            part = slice(start, min(start + self.batch, len(self.rows)))
            # hooks may write into it
            clean = store[part].clone() if whole else store[upload(self.rows[part], store.device)]
            state = torch.tensor(self.setup.layout.states)[self.blocks[part]]
            info = Info(self.setup.prompt_index[self.samples[part]], self.samples[part], state)
            engine.doing = f"decode of rows {part.start} to {part.stop - 1}"
            images: Any = clean
            if self.decode is not None:
                with engine.clock.stage("decode"):
                    images = self.decode(clean, info)
                engine.stats.decodes += len(info)
                self._keep(images, part)
            engine.doing = f"reward of rows {part.start} to {part.stop - 1}"
            with engine.clock.stage("reward"):
                self.scores.add(self.reward(images, info), info, start)
            del clean, images  # gone before the next batch is made
            engine.progress.advance(1)
        engine.doing = "waiting for rewards"
        with engine.clock.stage("reward"):
            self.scores.settle()
        self.done = True

    def _keep(self, images: Any, part: slice) -> None:
        if "images" not in self.setup.keep:
            return
        count = part.stop - part.start
        if not isinstance(images, Tensor) or images.shape[:1] != (count,):
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f'decode: wanted a tensor [{count}, ...] under keep=("images",), got {got}')
        host = self.setup.host
        if self.images is None:
            pinned = host.type == "cpu" and images.device.type == "cuda"
            size = (len(self.rows), *images.shape[1:])
            unknown = float("nan") if images.is_floating_point() else 0  # where decode has not come to yet
            self.images = torch.full(size, unknown, dtype=images.dtype, device=host, pin_memory=pinned)
        if images.shape[1:] != self.images.shape[1:] or images.dtype != self.images.dtype:
            raise ValueError(
                f"decode: wanted images of one size and dtype, {tuple(self.images.shape[1:])} {self.images.dtype}, got "
                f"{tuple(images.shape[1:])} {images.dtype}"
            )
        self.images[part].copy_(images, non_blocking=True)

    @property
    def names(self) -> list[str]:
        """Of the rewards that came."""
        return list(self.scores.values)

    def name(self, everyone: Iterable[Sequence[str]]) -> None:
        """Empty rewards of these names, where there is no sample to have any."""
        if self.reward is not None and not len(self.rows):
            self.scores.values = {name: torch.empty(0) for names in everyone for name in names}

    def results(self) -> tuple[Rewards | None, Tensor | None]:
        """(rewards [own, S] or named ones, images [own, S, ...] where kept)."""
        setup, layout = self.setup, self.setup.layout
        place = torch.full((layout.offsets[-1],), 0).index_put_((self.rows,), torch.arange(len(self.rows)))
        index = torch.stack([place[layout.rows_of(b)] for b in setup.slots], 1)
        images = self.images[index.to(self.images.device)] if self.images is not None else None
        return self.scores.table(index), images
