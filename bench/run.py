"""Runs an entry of the registry: check, interleaved pairs, a copy beside them, and a second try where threads did not help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import timing
from .machine import ROOT
from .registry import Entry, Inputs, Mismatch, Shape, Variant
from .timing import Times

COPY = "copy"
RETRIES = 3  # of a measurement in which one thread beat several


@dataclass(frozen=True)
class Result:
    """One variant at one shape and thread count."""

    variant: str
    shape: Shape
    threads: int
    backend: str
    times: Times
    load: float  # average, when the rounds ended
    bandwidth: float | None = None  # bytes a second
    share_of_copy: float | None = None  # of the bandwidth of a copy in the same rounds
    ratios: dict[str, float] = field(default_factory=dict)  # how many times quicker than each baseline
    note: str = ""


@dataclass(frozen=True)
class Readings:
    """Times by variant, and how many times quicker a variant is than a baseline, by (variant, baseline)."""

    times: dict[str, Times]
    ratios: dict[tuple[str, str], float]


def verify(entry: Entry) -> None:
    """Runs the entry's pytest gate. Raises Mismatch where it is not green."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", entry.gate]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        raise Mismatch(f"{entry.gate} is not green: {' '.join(last)}")


def measure(
    entry: Entry,
    shape: Shape,
    threads: Sequence[int],
    backend: str,
    repeats: int,
    variants: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Times the entry's variants (default: all) at one shape for each thread count. Raises Mismatch before any timing.

    Where the first variant that moves counted bytes is slower on several threads than on one, which it never is on an idle
    machine, its thread count is measured again.
    """
    chosen = [v for v in entry.variants if variants is None or v.name in variants]
    inputs = entry.inputs(shape)
    scaling = next((v for v in chosen if v.touches), None)
    alone: Times | None = None
    results: list[Result] = []
    with torch.no_grad():
        for count in sorted({1, *threads} if scaling else {*threads}):
            with timing.threads(count):
                if count not in threads:
                    alone = _rounds(entry, [scaling], inputs, shape, backend, repeats).times[scaling.name]
                    continue
                say(f"{entry.name}: {show(shape)}, {threads_in_words(count)}")
                entry.check(inputs, backend, [v.name for v in chosen])
                readings, note = _tried(entry, chosen, inputs, shape, count, backend, repeats, alone, say)
                alone = readings.times[scaling.name] if scaling and count == 1 else alone
                results += _results(entry, chosen, shape, count, backend, readings, note)
    return results


def _tried(
    entry: Entry,
    chosen: Sequence[Variant],
    inputs: Inputs,
    shape: Shape,
    threads: int,
    backend: str,
    repeats: int,
    alone: Times | None,
    say: Callable[[str], None],
) -> tuple[Readings, str]:
    """Readings, taken again while one thread beats several; and a note where it did."""
    readings, tries = _rounds(entry, chosen, inputs, shape, backend, repeats), 1
    while (beaten := _beaten(chosen, readings.times, alone)) and tries <= RETRIES:
        say(f"{entry.name}: {show(shape)}, one thread beat {threads}, measuring again")
        readings, tries = _rounds(entry, chosen, inputs, shape, backend, repeats), tries + 1
    if tries == 1:
        return readings, ""
    outcome = "; it still does: the machine is busy" if beaten else ""
    return readings, f"measured {tries} times, because one thread beat {threads}{outcome}"


def _beaten(chosen: Sequence[Variant], times: Mapping[str, Times], alone: Times | None) -> bool:
    scaling = next((v.name for v in chosen if v.touches), None)
    return alone is not None and scaling is not None and times[scaling].median > alone.median


def _rounds(
    entry: Entry, chosen: Sequence[Variant], inputs: Inputs, shape: Shape, backend: str, repeats: int
) -> Readings:
    """Every variant beside each of its baselines, pair by pair; the first that counts bytes also beside a copy of them.

    The times shown are those of a variant's first pair.
    """
    calls = {v.name: v.make(inputs, backend) for v in chosen}
    pairs = [(v.name, base) for v in chosen for base in v.against if base in calls]
    counted = next((v for v in chosen if v.touches), None)
    if counted is not None:
        calls[COPY] = timing.copy_of(entry.bytes_moved(counted, shape))
        pairs.append((counted.name, COPY))
    alone = [(name,) for name in calls if not any(name in pair for pair in pairs)]
    times: dict[str, Times] = {}
    ratios: dict[tuple[str, str], float] = {}
    for group in (*pairs, *alone):
        found = timing.interleave({name: calls[name] for name in group}, repeats, timing.wall, entry.calls)
        times = {**found, **times}
        if len(group) == 2:
            ratios[group] = found[group[0]].ratio(found[group[1]])
    return Readings(times, ratios)


def _results(
    entry: Entry,
    chosen: Sequence[Variant],
    shape: Shape,
    threads: int,
    backend: str,
    readings: Readings,
    note: str,
) -> list[Result]:
    load, times = timing.load_average(), readings.times
    copied = next((entry.bytes_moved(v, shape) for v in chosen if v.touches), 0)
    copy_speed = copied / times[COPY].median if copied else None
    results = []
    for v in chosen:
        speed = entry.bytes_moved(v, shape) / times[v.name].median if v.touches else None
        share = speed / copy_speed if speed and copy_speed else None
        ratios = {base: readings.ratios[v.name, base] for base in v.against if base in times}
        results.append(Result(v.name, shape, threads, backend, times[v.name], load, speed, share, ratios, note))
    if copy_speed is not None:
        results.append(Result(COPY, shape, threads, "torch", times[COPY], load, copy_speed, 1.0, {}, note))
    return results


def show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def threads_in_words(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
