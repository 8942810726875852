"""Medians, spread, pairs and the order of the rounds, on a clock that the test winds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import run, step, timing
from bench.registry import Entry, Mismatch, Variant
from bench.timing import Times


def test_median_spread_and_ratio_within_rounds() -> None:
    ours, theirs = Times((1.0, 2.0, 4.0, 8.0, 16.0)), Times((3.0, 6.0, 12.0, 24.0, 5.0))
    assert ours.median == 4.0
    assert ours.iqr == 6.0
    assert ours.ratio(theirs) == 3.0
    assert Times((1.0,)).iqr == 0.0


def test_a_round_calls_every_variant_once_in_changing_order() -> None:
    called: list[str] = []

    def clock(call: Callable[[], None]) -> float:
        call()
        return 6.0

    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    times = timing.interleave(calls, 20, clock, per_reading=2)
    warm = 2 * 3 * timing.WARM_UP
    rounds = ["".join(called[i : i + 6]) for i in range(warm, len(called), 6)]
    assert len(rounds) == 20
    assert all(sorted(r) == list("aabbcc") and r[0] == r[1] and r[2] == r[3] for r in rounds)
    assert len(set(rounds)) > 3
    assert all(t.seconds == (3.0,) * 20 for t in times.values())


def test_a_copy_moves_what_it_says() -> None:
    copied = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                copied.append(args[0].nbytes + args[1].nbytes)
            return function(*args, **(kwargs or {}))

    call = timing.copy_of(1 << 20)
    with Watch():
        call()
    assert copied == [1 << 20]


def test_page_faults_are_counted_per_call() -> None:
    def touch() -> None:
        torch.ones(64 << 20, dtype=torch.uint8)  # above the size that any heap keeps

    times = timing.interleave({"fresh": touch, "nothing": lambda: None}, 3, timing.wall)
    assert times["fresh"].faults > times["nothing"].faults


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with timing.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def entry(moves: Callable[[], None], check: Callable[..., None] = lambda *_: None) -> Entry:
    variants = (
        Variant("ours", lambda data, backend: moves, ("sample",), ("theirs",)),
        Variant("theirs", lambda data, backend: moves),
    )
    return Entry(
        "made up", "nothing", ((2, 8),), step.inputs, step.specs, variants, check, gate="tests/bench", repeats=3, calls=2
    )  # fmt: skip


@pytest.mark.parametrize("slow_threads", [1, 2])
def test_one_thread_that_beats_two_is_measured_again(monkeypatch: pytest.MonkeyPatch, slow_threads: int) -> None:
    def clock(call: Callable[[], None]) -> float:
        call()
        return 2.0 if torch.get_num_threads() == slow_threads else 1.0

    monkeypatch.setattr(timing, "wall", clock)
    said: list[str] = []
    results = run.measure(entry(lambda: None), (2, 8), [2], "reference", 3, say=said.append)
    again = [line for line in said if "measuring again" in line]
    assert len(again) == (run.RETRIES if slow_threads == 2 else 0)
    assert all(("because one thread beat 2; it still does" in r.note) == (slow_threads == 2) for r in results)
    assert [r.variant for r in results] == ["ours", "theirs", run.COPY]
    assert results[0].ratios == {"theirs": 1.0}
    assert results[0].times.seconds == ((2.0 if slow_threads == 2 else 1.0) / 2,) * 3  # two calls per reading


def test_nothing_is_timed_when_the_check_fails() -> None:
    calls = []

    def refuse(*_: object) -> None:
        raise Mismatch("next_sample: off")

    with pytest.raises(Mismatch):
        run.measure(entry(lambda: calls.append(1), refuse), (2, 8), [1], "reference", 3)
    assert not calls
