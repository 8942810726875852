"""The call plan: which rows go through the network together. A pure function of sizes, known before the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .chains import Chain

Range = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One evaluation of the network.

    step:        level of the main chain at which it runs.
    main:        [start, stop) of the batch: rows of the main chain.
    completions: [start, stop) of the completions, chain-major (chain * batch + sample).
    guided:      whether the unconditional network runs too.
    padded:      sample rows with padding.
    width:       rows that the network sees at a time: padded, doubled where both halves share a call.
    networks:    network calls: 2 where the halves go one after the other.
    """

    step: int
    main: Range
    completions: Range
    guided: bool
    padded: int
    width: int
    networks: int

    @property
    def rows(self) -> int:
        """Row evaluations: sample rows without padding."""
        return self.main[1] - self.main[0] + self.completions[1] - self.completions[0]


@dataclass(frozen=True)
class Plan:
    """All calls of a rollout, in order. The same arguments give the same plan on every machine."""

    calls: tuple[Call, ...]
    batch: int

    @property
    def network_calls(self) -> int:
        return sum(call.networks for call in self.calls)

    @property
    def evaluations(self) -> int:
        """Row evaluations of the whole batch, padding and unconditional rows not counted."""
        return sum(call.rows for call in self.calls)

    @property
    def widths(self) -> tuple[int, ...]:
        """Distinct widths, rising: what a compiled network is compiled for."""
        return tuple(sorted({call.width for call in self.calls}))

    @property
    def main_widths(self) -> tuple[int, ...]:
        """Distinct widths of the calls that carry main rows: what a trainer replays."""
        return tuple(sorted({call.width for call in self.calls if call.main[1] > call.main[0]}))

    def __len__(self) -> int:
        return len(self.calls)

    def __str__(self) -> str:
        per_sample = self.evaluations / max(self.batch, 1)
        return (
            f"{self.network_calls} network calls, {self.evaluations} row evaluations ({per_sample:g} a sample), "
            f"widths {', '.join(map(str, self.widths))}"
        )


class Limits(NamedTuple):
    """Sizes that shape the calls, in rows: see `ff.rollout`."""

    lockstep: str = "exact"
    main_rows: int | None = None
    max_rows: int | None = None
    widths: tuple[int, ...] | None = None


def make_plan(
    batch: int,
    length: int,
    chains: Sequence[Chain],
    guided: Callable[[int, Chain | None], bool],
    halves: int,
    limits: Limits,
) -> Plan:
    """The plan of `length` levels. guided(level, chain; None: the main chain). halves: 2 if cond and uncond share a call."""
    calls: list[Call] = []
    main_rows = main_call_rows(batch, halves if any(guided(s, None) for s in range(length)) else 1, limits)
    for level in range(length):
        main_guided = guided(level, None)
        runs: list[tuple[bool, Range, Range]] = []
        for chain_range in _open_runs(level, chains, guided):
            on, first, last = chain_range
            runs.append((on, (0, 0), (first * batch, last * batch)))
        if limits.lockstep == "exact":
            for start in range(0, batch, main_rows):
                main = (start, min(start + main_rows, batch))
                calls.append(_call(level, main, (0, 0), main_guided, main_rows, halves, limits))
        elif runs and runs[0][0] == main_guided:
            runs[0] = (main_guided, (0, batch), runs[0][2])
        else:
            runs.insert(0, (main_guided, (0, batch), (0, 0)))
        for on, main, completions in runs:
            calls.extend(_chunks(level, on, main, completions, halves, limits))
    return Plan(tuple(calls), batch)


def main_call_rows(batch: int, halves: int, limits: Limits) -> int:
    """Main rows of a call under lockstep "exact"."""
    cap = capacity(halves, limits)
    if limits.main_rows is not None:
        if limits.main_rows < 1 or (cap is not None and limits.main_rows > cap):
            raise ValueError(
                f"main_rows: wanted 1 to {cap if cap is not None else 'any number'} rows (max_rows and widths count "
                f"unconditional rows too), got {limits.main_rows}"
            )
        if limits.widths is not None and limits.main_rows * halves not in limits.widths:
            raise ValueError(
                f"main_rows: wanted main_rows * {halves} among widths {limits.widths}, so that a replay sees the same "
                f"width, got {limits.main_rows}"
            )
        return limits.main_rows
    rows = max(batch, 1) if cap is None else max(min(batch, cap), 1)
    if limits.widths is None:
        return rows
    return next(w for w in sorted(limits.widths) if w >= rows * halves) // halves


def capacity(halves: int, limits: Limits) -> int | None:
    """Sample rows that fit one call; None if there is no limit."""
    most = limits.max_rows
    if limits.widths is not None:
        fitting = [w for w in limits.widths if most is None or w <= most]
        if not fitting:
            raise ValueError(f"widths: wanted one of at most max_rows = {most} rows, got {limits.widths}")
        most = max(fitting)
    if most is None:
        return None
    if most < halves:
        raise ValueError(f"max_rows: wanted at least {halves} rows (one sample and its unconditional row), got {most}")
    return most // halves


def _open_runs(
    level: int, chains: Sequence[Chain], guided: Callable[[int, Chain | None], bool]
) -> list[tuple[bool, int, int]]:
    """(guided, first chain, last + 1) of neighbouring chains with a move at this level and equal guidance."""
    runs: list[tuple[bool, int, int]] = []
    for index, chain in enumerate(chains):
        if not chain.is_open(level):
            continue
        on = guided(level, chain)
        if runs and runs[-1][2] == index and runs[-1][0] == on:
            runs[-1] = (on, runs[-1][1], index + 1)
        else:
            runs.append((on, index, index + 1))
    return runs


def _chunks(level: int, on: bool, main: Range, completions: Range, halves: int, limits: Limits) -> list[Call]:
    """Main rows, then completions, cut to the capacity of a call."""
    cap = capacity(halves if on else 1, limits)
    total = main[1] - main[0] + completions[1] - completions[0]
    step = total if cap is None else cap
    calls = []
    for start in range(0, total, max(step, 1)):
        stop, inner = min(start + step, total), main[1] - main[0]
        m = (main[0] + min(start, inner), main[0] + min(stop, inner))
        c = (completions[0] + max(start - inner, 0), completions[0] + max(stop - inner, 0))
        calls.append(_call(level, m if m[1] > m[0] else (0, 0), c if c[1] > c[0] else (0, 0), on, 0, halves, limits))
    return calls


def _call(level: int, main: Range, completions: Range, on: bool, least: int, halves: int, limits: Limits) -> Call:
    factor = halves if on else 1
    rows = max(main[1] - main[0] + completions[1] - completions[0], least)
    if limits.widths is not None:
        rows = next(w for w in sorted(limits.widths) if w >= rows * factor and w % factor == 0) // factor
    return Call(level, main, completions, on, rows, rows * factor, 2 if on and halves == 1 else 1)
