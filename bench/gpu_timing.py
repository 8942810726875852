"""How time is taken on a GPU: CUDA graphs of many calls over rotating buffers, read with events; and calls as they are made.

A call of some microseconds cannot be timed alone: its launch takes as long. So a graph holds many calls, in turn over several
sets of buffers that together exceed the L2 cache several times, and a reading is one replay over the number of its calls. The
same graph over one set alone gives the hot figure. A reading with launches is the wall time of plain calls, first launch to
last result.

A clock records calls (`recorded`), reads a recording (`seconds`), plain calls (`launched`) and memory (`peak`). `CudaClock` is
the one for a GPU; `HostClock` does the same on a CPU, where a recording is a loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastflow.rollout.cuda_graphs import settle

from .timing import Call

WARM_UP = 3  # runs of each call before it is recorded: libraries load, compilers compile, tables are uploaded
PAST_CACHE = 4  # the sets of buffers are this many times the L2 cache
LEAST_SETS = 2
TRAFFIC, MOST_CALLS, LEAST_CALLS = 8 << 30, 128, 8  # bytes that a recording moves, and bounds on its calls


class Clock(Protocol):
    """What times recordings on one device."""

    device: torch.device
    cache: int  # bytes of the last cache before memory

    def recorded(self, calls: Sequence[Call]) -> Call:
        """What repeats the calls in order, without their launches. What each call returned last is kept alive."""

    def seconds(self, call: Call) -> float:
        """Of the device, from before the call to after it."""

    def launched(self, call: Call) -> float:
        """Wall time until the device has done what the call asked of it."""

    def peak(self, call: Call) -> int | None:
        """Bytes of memory that the call took at its fullest moment, beside what was there; None where nobody counts."""


class CudaClock:
    """CUDA graphs and events."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        named = torch.device(device)
        self.device = torch.device("cuda", torch.cuda.current_device() if named.index is None else named.index)
        torch.cuda.set_device(self.device)
        self.cache = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        self.side = torch.cuda.Stream(self.device)  # libraries keep workspaces for each stream that they see

    def recorded(self, calls: Sequence[Call]) -> Call:
        """Raises what a call raised; whatever happens, the stream that was current is so again."""
        kept: dict[int, Any] = {}  # the results, so that each set writes to memory of its own
        count = _distinct(calls)
        before = torch.cuda.current_stream(self.device)
        self.side.wait_stream(before)
        with torch.cuda.stream(self.side):
            for call in [*calls[:count]] * WARM_UP:
                call()
        before.wait_stream(self.side)
        graph, pool, cause = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), None
        try:
            with torch.cuda.graph(graph, pool, self.side, "thread_local"):
                try:
                    for number, call in enumerate(calls):
                        kept[number % count] = call()
                except RuntimeError as error:
                    cause = error
                    raise
        except RuntimeError as error:
            settle(self.device, pool)
            raise (error if cause is None else cause) from None  # the end of a broken capture has words of its own
        finally:
            cause = None  # or the error would hold this frame, and the frame the error
            torch.cuda.set_stream(before)  # torch leaves this undone where the end of the capture raises
        return lambda: (graph.replay(), kept)

    def seconds(self, call: Call) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def launched(self, call: Call) -> float:
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def peak(self, call: Call) -> int | None:
        return requested(call, self.device)


class HostClock:
    """The same on a CPU: what records is a loop, and the wall clock reads it."""

    def __init__(self, cache: int = 1 << 16, wall: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.cache, self.wall = torch.device("cpu"), cache, wall

    def recorded(self, calls: Sequence[Call]) -> Call:
        def loop() -> None:
            for call in calls:
                call()

        for call in calls[: _distinct(calls)]:
            call()
        return loop

    def seconds(self, call: Call) -> float:
        began = self.wall()
        call()
        return self.wall() - began

    launched = seconds

    def peak(self, call: Call) -> int | None:
        call()
        return None


def requested(call: Call, device: torch.device | str | None = None) -> int:
    """Bytes that a call asks a GPU's allocator for at its fullest moment, beside what was there.

    What is called allocated counts whole blocks, of which one tensor's may be a MiB too large.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before)


def clock_of(device: str) -> Clock:
    """Raises ValueError for a device that is not there."""
    if device == "cpu":
        return HostClock()
    if not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} needs an NVIDIA GPU, and torch {torch.__version__} sees none")
    return CudaClock(device)


def sets_for(nbytes: int, cache: int) -> int:
    """How many sets of buffers of `nbytes` exceed the cache PAST_CACHE times."""
    return max(LEAST_SETS, math.ceil(PAST_CACHE * cache / max(nbytes, 1)))


def calls_for(nbytes: int, sets: int) -> int:
    """Calls of a recording: a multiple of the sets, so that each is used as often."""
    wanted = min(max(TRAFFIC // max(nbytes, 1), LEAST_CALLS), MOST_CALLS)
    return sets * max(1, round(wanted / sets))


def in_turn(calls: Sequence[Call], count: int) -> list[Call]:
    """`count` calls, one after the other from the given ones, again and again."""
    return [calls[number % len(calls)] for number in range(count)]


def _distinct(calls: Sequence[Call]) -> int:
    return len({id(call) for call in calls})
