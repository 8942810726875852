"""Captured calls: gather, network, guidance, step and writes of one width as one graph, replayed with other rows each time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import condition as conditioning
from .arena import Arena
from .bucket import Bucket, Key, Shelf, key_of, signature
from .buffers import Buffers
from .cuda_graphs import CudaGraphs
from .setup import Setup
from .steps import CallSteps


class Capturer(Protocol):
    """What records a function's work on the device."""

    def refuse(self, device: torch.device) -> str | None:
        """Why nothing can be captured there; None if it can."""

    def capture(self, body: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Runs `body` as often as it needs, records its work on the tensors that it meets, and returns what repeats it."""


class Graphs:
    """Graphs that outlive a rollout: `graphs=ff.Graphs()` in every rollout of a shape captures each width once.

    A rollout of other sizes, another network, backend, autocast, guidance or conditioning shape drops what was captured before.
    So does a module whose weights lie elsewhere than they did (moved to the host and back, or loaded anew); they may change in
    place (an optimizer's step). What a module decides in Python is frozen in the capture: one Graphs for each LoRA adapter that
    is switched on. Serves one rollout at a time, of one thread.

    reason: why the last rollout, or a part of it, was not captured; None if all was. captured: widths that were, so far.
    """

    def __init__(self, capturer: Capturer | None = None) -> None:
        self.capturer: Capturer = capturer if capturer is not None else CudaGraphs()
        self.reason: str | None = None
        self.lock = threading.Lock()  # held while a rollout runs
        self.arena: Arena | None = None
        self.shelf: Shelf | None = None
        self.signature: Any = None
        self.models: tuple[Any, ...] = ()  # kept, so that no other network gets the same identity
        self.buckets: dict[Key, tuple[Bucket, Callable[[], None]]] = {}
        self.failed: dict[Key, str] = {}  # what could not be captured is not tried again

    @property
    def captured(self) -> tuple[int, ...]:
        """Distinct widths with a graph, rising."""
        return tuple(sorted({key.width for key in self.buckets}))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Context of one rollout. Raises RuntimeError while there is another."""
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("graphs: this ff.Graphs serves another rollout at the moment; give each thread its own")
        try:
            yield
        finally:
            self.lock.release()

    def open(self, setup: Setup, backend: str) -> Arena | None:
        """The memory of a rollout's states; None, with `reason`, where it is not captured."""
        self.reason = self._refuse(setup)
        if self.reason is not None:
            return None
        counts = Buffers(setup, torch.device("meta")).counts
        now = signature(setup, counts, backend)
        if self.arena is None or now != self.signature:
            self.buckets, self.failed = {}, {}
            self.shelf = self.arena = None  # their memory goes before the next one's comes
            self.arena, self.signature, self.models = Arena(setup, counts), now, setup.models
        self.arena.clear()
        return self.arena

    def _refuse(self, setup: Setup) -> str | None:
        if setup.grad:
            return "grad=True: a graph holds no autograd"
        if setup.ranks is not None:
            return "align=: ranks vote before each network call, on the host"
        tables = [setup.main] if setup.completions is None else [setup.main, setup.completions]
        if any(bool((table.history != 0).any()) for table in tables):
            return "multistep solvers keep history that a graph does not carry"
        for tree, name in ((setup.condition, "condition"), (setup.negative, "negative")):
            for path, leaf in conditioning.leaves(tree, name):
                if isinstance(leaf, list):
                    return f"{path}: lists are gathered on the host"
                if isinstance(leaf, Tensor) and leaf.device != setup.device:
                    return f"{path} is on {leaf.device} and gathered there, and this rollout is on {setup.device}"
        return self.capturer.refuse(setup.device)

    def shelve(self, setup: Setup, steps: Sequence[CallSteps], seeds: Tensor) -> None:
        """Puts this rollout's per-call numbers and conditioning where the graphs read them."""
        assert self.arena is not None
        if self.shelf is None:
            self.shelf = Shelf(setup)
        self.shelf.fill(setup, self.arena, steps, seeds)

    def run(self, number: int, setup: Setup, backend: str) -> bool:
        """Replays call `number` of the plan, capturing its width first if that is new. False if it cannot be captured."""
        if self.reason is not None or self.arena is None or self.shelf is None:
            return False
        key = key_of(setup.plan.calls[number])
        if key in self.failed:
            self.reason = self.failed[key]
            return False
        if key not in self.buckets:
            bucket = Bucket(key, setup, self.arena, self.shelf, backend)
            try:
                self.buckets[key] = (bucket, self.capturer.capture(bucket, setup.device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.reason = self.failed[key] = (
                    f"width {key.width} could not be captured: {str(error).splitlines()[0]}"
                )
                return False
        bucket, replay = self.buckets[key]
        bucket.load(number)
        replay()
        return True


def graphs_of(graphs: bool | Graphs) -> Graphs | None:
    """The argument of `ff.rollout`."""
    if isinstance(graphs, Graphs):
        return graphs
    return Graphs() if graphs else None
