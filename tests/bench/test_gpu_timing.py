"""Recordings, sets of buffers and the measurement of a case, on a clock that the test winds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import gpu_cli, gpu_run, gpu_timing
from bench.gpu_run import COPY, Case, Way
from bench.gpu_timing import CudaClock, HostClock, calls_for, clock_of, in_turn, sets_for
from bench.registry import Mismatch


def test_sets_exceed_the_cache_and_calls_use_each_as_often() -> None:
    cache = 60 << 20
    assert sets_for(1 << 30, cache) == gpu_timing.LEAST_SETS
    small = 25 << 20
    assert sets_for(small, cache) * small >= gpu_timing.PAST_CACHE * cache
    for nbytes in (1, small, 1 << 30):
        sets = min(sets_for(nbytes, cache), 100)
        assert calls_for(nbytes, sets) % sets == 0
        assert calls_for(nbytes, sets) >= sets
    assert calls_for(small, 10) == 130  # which takes a millisecond at 4 TB/s
    assert calls_for(1 << 30, 2) == gpu_timing.LEAST_CALLS


def test_calls_take_turns() -> None:
    called: list[int] = []
    calls = [lambda i=i: called.append(i) for i in range(3)]
    recorded = HostClock().recorded(in_turn(calls, 6))
    assert called == [0, 1, 2], "each set once before it is recorded"
    called.clear()
    recorded()
    assert called == [0, 1, 2, 0, 1, 2]


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    with pytest.raises(ValueError, match="device: 'cuda' needs an NVIDIA GPU"):
        clock_of("cuda")


class Wound(HostClock):
    """Every call on the device takes as long as its set and way say; what a launch adds is one second."""

    def __init__(self, cache: int = 1 << 10) -> None:
        super().__init__(cache)
        self.now = 0.0

    def seconds(self, call: Callable[[], Any]) -> float:
        before = self.now
        call()
        return self.now - before

    def launched(self, call: Callable[[], Any]) -> float:
        return self.seconds(call) + gpu_run.LAUNCHED

    def peak(self, call: Callable[[], Any]) -> int | None:
        call()
        return 123


def case(clock: Wound, check: Callable[[Any], None] = lambda data: None, seen: list[int] | None = None) -> Case:
    def taking(seconds: float) -> Callable[[Any], Callable[[], None]]:
        def make(data: Any) -> Callable[[], None]:
            def call() -> None:
                clock.now += seconds
                if seen is not None:
                    seen.append(data["number"])

            return call

        return make

    def ways() -> Sequence[Way]:
        return [
            Way("ours", taking(2.0), "cpu", 1 << 12, ("eager", "absent"), taking(2.0), peak=True),
            Way("eager", taking(8.0), public=taking(8.0)),
        ]

    return Case("made up", "nothing", (2, 8), lambda number: {"number": number}, 1 << 10, ways, check)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Wound:
    """On which a copy takes a second."""
    made = Wound()

    def copy_on(device: torch.device, nbytes: int) -> Callable[[], None]:
        return lambda: setattr(made, "now", made.now + 1.0)

    monkeypatch.setattr(gpu_run, "copy_on", copy_on)
    return made


def test_a_case_is_read_way_by_way(clock: Wound) -> None:
    seen: list[int] = []
    ours, eager, copied = gpu_run.measure(case(clock, seen=seen), clock, 3)
    assert set(seen) == set(range(gpu_timing.PAST_CACHE)), "all sets are used"
    assert ours.times.seconds == (2.0,) * 3 and eager.times.seconds == (8.0,) * 3
    assert ours.hot is not None and ours.hot.median == 2.0 and eager.hot is None
    assert ours.launched is not None and ours.launched.median == 3.0
    assert ours.ratios == {"eager": 4.0} and ours.launched_ratios == {"eager": 3.0}
    assert (ours.peak, eager.peak) == (123, None)
    assert (copied.way, copied.nbytes, copied.share_of_copy) == (COPY, 1 << 12, 1.0)
    assert (ours.bandwidth, ours.share_of_copy) == ((1 << 12) / 2.0, 0.5)


def test_nothing_is_timed_when_the_check_fails() -> None:
    clock, seen = Wound(), []

    def refuse(data: Any) -> None:
        raise Mismatch("next_sample: off")

    with pytest.raises(Mismatch):
        gpu_run.measure(case(clock, refuse, seen), clock, 3)
    assert not seen


def test_a_copy_moves_what_it_says() -> None:
    copy = gpu_run.copy_on(torch.device("cpu"), 1 << 12)
    target = copy()
    assert 2 * target.nbytes == 1 << 12
    assert bool(target.any()), "zeros may be quicker than numbers"


class Device:
    """What CudaClock asks of torch.cuda, on a clock of its own: a replay takes a second, a wait half a second.

    As in torch, a stream stays current where the end of a capture raises, the allocator's pool open, and drawing captured.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.said, outer = 0.0, list[str](), self
        self.pools: set[int] = set()
        self.drawing_is_captured = False  # of the random generator, until a capture ends well

        class Stream:
            def __init__(self, device: torch.device) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                outer.said.append("wait")

        class Graph:
            def replay(self) -> None:
                outer.now += 1.0

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                outer.drawing_is_captured = True

            def capture_end(self) -> None:
                outer.drawing_is_captured = False

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None:
                outer.now += 0.5

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * float(other.at - self.at)

        self.current: Any = Stream(torch.device("cuda", 0))

        def set_stream(stream: Any) -> None:
            outer.current = stream

        @contextmanager
        def within(stream: Any) -> Iterator[None]:
            before, outer.current = outer.current, stream
            outer.said.append("enter")
            yield
            outer.said.append("leave")
            outer.current = before

        @contextmanager
        def capturing(graph: Any, pool: int, stream: Any, mode: str) -> Iterator[None]:
            assert mode == "thread_local" and not outer.pools, "the allocator takes no second capture"
            outer.pools.add(pool)
            outer.drawing_is_captured = True
            with within(stream):
                try:
                    yield
                except RuntimeError as error:
                    raise RuntimeError("CUDA error: the capture was invalidated") from error
                outer.pools.remove(pool)
                outer.drawing_is_captured = False

        def end(device: int, pool: int) -> None:
            if pool not in outer.pools:
                raise RuntimeError("not recording to this pool")
            outer.pools.remove(pool)

        fakes: dict[str, Any] = {
            "Stream": Stream, "current_stream": lambda device: self.current, "stream": within, "set_stream": set_stream,
            "CUDAGraph": Graph, "graph": capturing, "graph_pool_handle": lambda: 7, "Event": Event,
            "synchronize": lambda device: None, "set_device": lambda device: None, "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60 << 20),
            "reset_peak_memory_stats": lambda device: None, "memory_stats": lambda device: {
                "requested_bytes.all.current": 100, "requested_bytes.all.peak": 350, "allocated_bytes.all.peak": 2 << 20,
            },
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))


def test_a_gpu_warms_up_beside_and_records_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    clock = CudaClock("cuda")
    assert (clock.cache, clock.device) == (60 << 20, torch.device("cuda", 0))
    calls = [lambda i=i: device.said.append(str(i)) for i in range(2)]
    recorded = clock.recorded(in_turn(calls, 4))
    warm = [str(i) for _ in range(gpu_timing.WARM_UP) for i in range(2)]
    assert device.said == ["wait", "enter", *warm, "leave", "wait", "enter", "0", "1", "0", "1", "leave"]
    device.said.clear()
    assert clock.seconds(recorded) == 1.0
    assert not device.said, "a replay calls nothing"
    assert clock.peak(recorded) == 250


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    clock, current, runs = CudaClock(), device.current, list[int]()

    def waits() -> None:
        runs.append(1)
        if len(runs) > gpu_timing.WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        clock.recorded([waits])
    assert device.current is current and not device.pools and not device.drawing_is_captured
    assert clock.seconds(clock.recorded([lambda: None])) == 1.0, "the next one is recorded"


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_a_way_that_fails_leaves_the_others(name: str, clock: Wound) -> None:
    made, told = case(clock), list[str]()

    def ways() -> Sequence[Way]:
        return [replace(way, make=_refuse) if way.name == name else way for way in made.ways()]

    broken = replace(made, ways=ways)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        gpu_run.measure(broken, clock, 2)
    rows = gpu_run.measure(broken, clock, 2, lambda way, error: told.append(f"{way.name}: {error}"))
    assert [row.way for row in rows] == [{"ours": "eager", "eager": "ours"}[name], COPY]
    assert told == [f"{name}: cannot be recorded\nand more"] and not rows[0].ratios
    found, failures = gpu_cli.run_cases(Console(quiet=True), [broken], clock, 2)
    assert [row.way for row in found] == [row.way for row in rows]
    assert failures == (["made up, 2x8, nothing, ours: cannot be recorded"] if name == "ours" else [])


def _refuse(data: Any) -> Any:
    raise RuntimeError("cannot be recorded\nand more")


def test_results_of_a_recording_stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    results: list[weakref.ref[torch.Tensor]] = []

    def call() -> torch.Tensor:
        made = torch.zeros(2)
        results.append(weakref.ref(made))
        return made

    recorded = CudaClock().recorded(in_turn([call, lambda: call()], 4))
    assert [ref() is not None for ref in results[-4:]] == [False, False, True, True], "one for each set"
    del recorded
    assert all(ref() is None for ref in results)
