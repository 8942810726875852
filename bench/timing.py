"""How time is taken: interleaved rounds, medians and their spread, and a copy of as many bytes beside them.

A round calls every variant once, in an order drawn anew (from a fixed seed), so that drift of the machine, and what the call
before has left in the caches, fall on all alike; a ratio is the median of the ratios within rounds. Page faults are counted,
because they decide what a chain of fresh tensors costs on a CPU: the C library's heap gives large blocks back to the system
and fetches them again, or keeps them, depending on what the process did before.

Calls are timed by a clock, a function from a call to its seconds. `wall` is the one for a CPU.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]

WARM_UP = 3  # readings of each variant that are not kept


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, round by round, and its page faults per call (median)."""

    seconds: tuple[float, ...]
    faults: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def ratio(self, other: Times) -> float:
        """How many times quicker this is than `other`: the median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def wall(call: Call) -> float:
    """Seconds on the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], repeats: int, clock: Clock, per_reading: int = 1) -> dict[str, Times]:
    """Times of every call over `repeats` rounds, after a warm-up. `per_reading`: calls in a row per reading of the clock."""
    names = list(calls)
    timed = {name: _in_a_row(call, per_reading) for name, call in calls.items()}
    for name in names:
        for _ in range(WARM_UP):
            timed[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(names, len(names)):
            before = page_faults()
            seconds[name].append(clock(timed[name]) / per_reading)
            faults[name].append((page_faults() - before) / per_reading)
    return {name: Times(tuple(seconds[name]), statistics.median(faults[name])) for name in names}


def _in_a_row(call: Call, count: int) -> Call:
    if count == 1:
        return call

    def several() -> None:
        for _ in range(count):
            call()

    return several


def copy_of(nbytes: int) -> Call:
    """A copy that moves `nbytes`: half of them read, half written."""
    source = torch.zeros(max(nbytes // 8, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def load_average() -> float:
    """Runnable processes over the last minute."""
    return os.getloadavg()[0]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and with it the cpu backend, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
