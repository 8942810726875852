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


@dataclass(frozen=True)
class _Recordings:
    """One way, ready to be read."""

    cold: Call
    hot: Call | None
    launched: Call | None
    peak: int | None


def measure(
    case: Case, clock: Clock, repeats: int, failed: Callable[[Way, RuntimeError], None] | None = None
) -> list[Row]:
    """Raises Mismatch before anything is timed.

    failed: told of a way that cannot be recorded, which is then left out; without it the error is raised.
    """
    torch.compiler.reset()  # graphs of earlier cases would add up to torch's recompile limit
    with torch.no_grad():
        sets = [case.inputs(number) for number in range(sets_for(case.moved, clock.cache))]
        case.check(sets[0])
        ways = case.ways()
        count = calls_for(case.moved, len(sets))
        ready: dict[Way, _Recordings] = {}
        for way in ways:
            try:
                ready[way] = _record(way, sets, count, clock, case.moved < LAUNCHES_SHOW)
            except RuntimeError as error:
                if failed is None:
                    raise
                failed(way, error)
        copied = max((way.nbytes or 0 for way in ways), default=0)
        copy = clock.recorded(in_turn([copy_on(clock.device, copied) for _ in sets], count))
        recorded = {**{way.name: made.cold for way, made in ready.items()}, COPY: copy}
        hot = {way.name: made.hot for way, made in ready.items() if made.hot is not None}
        launched = {way.name: made.launched for way, made in ready.items() if made.launched is not None}
        peaks = {way.name: made.peak for way, made in ready.items()}
        times = _read(recorded, repeats, clock.seconds, count)
        cached = _read(hot, repeats, clock.seconds, count)
        whole = _read(launched, repeats, clock.launched, LAUNCHED)
    speed = copied / times[COPY].median
    rows = [_row(case, way, times, cached, whole, peaks, speed) for way in ready]
    return [
        *rows,
        Row(case.benchmark, case.name, case.shape, COPY, "torch", times[COPY], nbytes=copied, share_of_copy=1.0),
    ]


def _record(way: Way, sets: Sequence[Inputs], count: int, clock: Clock, launches: bool) -> _Recordings:
    """Every call is made once at least, so that one which fails does so here."""
    calls = [way.make(data) for data in sets]
    cold = clock.recorded(in_turn(calls, count))
    hot = clock.recorded(in_turn(calls[:1], count)) if way.nbytes is not None else None
    public = [way.public(data) for data in sets] if way.public is not None and launches else []
    for call in public:
        call()
    launched = _all(in_turn(public, LAUNCHED)) if public else None
    return _Recordings(cold, hot, launched, clock.peak(calls[0]) if way.peak else None)


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
    own = torch.Generator(device)  # a capture that failed may have left torch's own of no use
    source = torch.randint(0, 1 << 30, (max(nbytes // 8, 1),), generator=own, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
