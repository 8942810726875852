"""Runs a case on a device: sets of buffers, check, recordings of every way of doing the work, interleaved readings, a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import timing
from .gpu_timing import Clock, calls_for, in_turn, sets_for
from .registry import Call, Inputs, Shape
from .timing import Times

COPY = "copy"
LAUNCHED = 50  # plain calls in a reading with launches
LAUNCHES_SHOW = 128 << 20  # bytes of a call: beyond, launching takes no time beside it, and 50 calls take long


@dataclass(frozen=True)
class Way:
    """One way of doing a case's work.

    make:    inputs of one set -> the call that is recorded.
    nbytes:  what it must read and write, each tensor once; None for a baseline.
    against: names of the baselines that it is compared with.
    public:  inputs -> the call as a user makes it, read with its launches; None: not read. `peak`: whether to read the memory
             that the recorded call takes.
    instructions: what it issues for each element, where that is known.
    """

    name: str
    make: Callable[[Inputs], Call]
    backend: str = "torch"
    nbytes: int | None = None
    against: tuple[str, ...] = ()
    public: Callable[[Inputs], Call] | None = None
    peak: bool = False
    instructions: float | None = None


@dataclass(frozen=True)
class Case:
    """Work at one shape. inputs: number of a set -> its tensors; moved: bytes of a set; check: raises Mismatch."""

    benchmark: str
    name: str
    shape: Shape
    inputs: Callable[[int], Inputs]
    moved: int
    ways: Callable[[], Sequence[Way]]
    check: Callable[[Inputs], None]


@dataclass(frozen=True)
class Row:
    """One way at one case. Times are of one call; ratios: how many times quicker than each baseline."""

    benchmark: str
    case: str
    shape: Shape
    way: str
    backend: str
    times: Times
    hot: Times | None = None
    launched: Times | None = None
    nbytes: int | None = None
    share_of_copy: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    launched_ratios: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    instructions: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second."""
        return None if self.nbytes is None else self.nbytes / self.times.median


def measure(case: Case, clock: Clock, repeats: int) -> list[Row]:
    """Raises Mismatch before anything is timed."""
    torch.compiler.reset()  # graphs of earlier cases would add up to torch's recompile limit
    with torch.no_grad():
        sets = [case.inputs(number) for number in range(sets_for(case.moved, clock.cache))]
        case.check(sets[0])
        ways = case.ways()
        count = calls_for(case.moved, len(sets))
        recorded, hot, launched = {}, {}, {}
        for way in ways:
            calls = [way.make(data) for data in sets]
            recorded[way.name] = clock.recorded(in_turn(calls, count))
            if way.nbytes is not None:
                hot[way.name] = clock.recorded(in_turn(calls[:1], count))
            if way.public is not None and case.moved < LAUNCHES_SHOW:
                launched[way.name] = _all(in_turn([way.public(data) for data in sets], LAUNCHED))
        copied = max((way.nbytes or 0 for way in ways), default=0)
        recorded[COPY] = clock.recorded(in_turn([copy_on(clock.device, copied) for _ in sets], count))
        times = _read(recorded, repeats, clock.seconds, count)
        cached = _read(hot, repeats, clock.seconds, count)
        whole = _read(launched, repeats, clock.launched, LAUNCHED)
        peaks = {way.name: clock.peak(way.make(sets[0])) for way in ways if way.peak}
    speed = copied / times[COPY].median
    rows = [_row(case, way, times, cached, whole, peaks, speed) for way in ways]
    return [
        *rows,
        Row(case.benchmark, case.name, case.shape, COPY, "torch", times[COPY], nbytes=copied, share_of_copy=1.0),
    ]


def _row(
    case: Case, way: Way, times: dict[str, Times], cached: dict[str, Times], whole: dict[str, Times],
    peaks: dict[str, int | None], speed: float,
) -> Row:  # fmt: skip
    ours = times[way.name]
    row = Row(
        case.benchmark, case.name, case.shape, way.name, way.backend, ours, cached.get(way.name), whole.get(way.name)
    )
    return replace(
        row,
        nbytes=way.nbytes,
        share_of_copy=None if way.nbytes is None else way.nbytes / ours.median / speed,
        ratios={base: ours.ratio(times[base]) for base in way.against if base in times},
        launched_ratios={
            base: whole[way.name].ratio(whole[base]) for base in way.against if base in whole and way.name in whole
        },
        peak=peaks.get(way.name),
        instructions=way.instructions,
    )


def _read(calls: dict[str, Call], repeats: int, clock: timing.Clock, count: int) -> dict[str, Times]:
    found = timing.interleave(calls, repeats, clock)
    return {name: Times(tuple(s / count for s in t.seconds), t.faults) for name, t in found.items()}


def _all(calls: Sequence[Call]) -> Call:
    def one_after_the_other() -> Any:
        for call in calls:
            call()

    return one_after_the_other


def copy_on(device: torch.device, nbytes: int) -> Call:
    """A copy on the device that moves `nbytes`, half of them read; of random numbers, since a chip may do zeros faster."""
    source = torch.randint(0, 1 << 30, (max(nbytes // 8, 1),), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
