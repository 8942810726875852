"""Runs an entry of the registry: check, interleaved rounds, a copy beside them, and a second try where threads did not help."""

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
                    alone = _rounds(entry, [scaling], inputs, shape, backend, repeats)[scaling.name]
                    continue
                say(f"{entry.name}: {show(shape)}, {threads_in_words(count)}")
                entry.check(inputs, backend, [v.name for v in chosen])
                times, note = _tried(entry, chosen, inputs, shape, count, backend, repeats, alone, say)
                alone = times[scaling.name] if scaling and count == 1 else alone
                results += _results(entry, chosen, shape, count, backend, times, note)
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
) -> tuple[dict[str, Times], str]:
    """Times by variant, measured again while one thread beats several; and a note where it did."""
    times, tries = _rounds(entry, chosen, inputs, shape, backend, repeats), 1
    while (beaten := _beaten(chosen, times, alone)) and tries <= RETRIES:
        say(f"{entry.name}: {show(shape)}, one thread beat {threads}, measuring again")
        times, tries = _rounds(entry, chosen, inputs, shape, backend, repeats), tries + 1
    if tries == 1:
        return times, ""
    outcome = "; it still does: the machine is busy" if beaten else ""
    return times, f"measured {tries} times, because one thread beat {threads}{outcome}"


def _beaten(chosen: Sequence[Variant], times: Mapping[str, Times], alone: Times | None) -> bool:
    scaling = next((v.name for v in chosen if v.touches), None)
    return alone is not None and scaling is not None and times[scaling].median > alone.median


def _rounds(
    entry: Entry, chosen: Sequence[Variant], inputs: Inputs, shape: Shape, backend: str, repeats: int
) -> dict[str, Times]:
    """Times by variant, and those of a copy of the bytes of the first variant that counts them."""
    calls = {v.name: v.make(inputs, backend) for v in chosen}
    moved = next((entry.bytes_moved(v, shape) for v in chosen if v.touches), 0)
    if moved:
        calls[COPY] = timing.copy_of(moved)
    return timing.interleave(calls, repeats, timing.wall, entry.calls)


def _results(
    entry: Entry,
    chosen: Sequence[Variant],
    shape: Shape,
    threads: int,
    backend: str,
    times: Mapping[str, Times],
    note: str,
) -> list[Result]:
    load = timing.load_average()
    copied = next((entry.bytes_moved(v, shape) for v in chosen if v.touches), 0)
    copy_speed = copied / times[COPY].median if copied else None
    results = []
    for v in chosen:
        speed = entry.bytes_moved(v, shape) / times[v.name].median if v.touches else None
        share = speed / copy_speed if speed and copy_speed else None
        ratios = {base: times[v.name].ratio(times[base]) for base in v.against if base in times}
        results.append(Result(v.name, shape, threads, backend, times[v.name], load, speed, share, ratios, note))
    if copy_speed is not None:
        results.append(Result(COPY, shape, threads, "torch", times[COPY], load, copy_speed, 1.0, {}, note))
    return results


def show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def threads_in_words(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
