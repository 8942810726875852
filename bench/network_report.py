"""Rollouts of networks of real size as tables, CSV files and targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from . import gpu_report, gpu_targets
from .gpu_report import DEVICE, Verdict, write, write_verdicts
from .machine import Gpu
from .report import plain_table

if TYPE_CHECKING:
    from .network_rollout import Setting, Ways

COLUMNS = (
    *DEVICE, "model", "compiled", "samples", "steps", "backend", "way", "rounds", "seconds", "least", "most", "network calls",
    "evaluations a sample", "x sequential", "over network", "regime", "graphs",
)  # fmt: skip
STAGES = ("network", "step", "decode", "reward", "idle", "wall")
SPLIT = (*DEVICE, "model", "compiled", "samples", "steps", "backend", "way", *(f"{stage} s" for stage in STAGES))


@dataclass(frozen=True)
class Report:
    """Where the results of one network go: the console, and CSV files in a folder if there is one, which are replaced.

    regime: seconds per sample by the width of a call, and whether they say `saturated`.
    """

    console: Console
    about: Gpu
    setting: Setting
    folder: Path | None
    compiled: bool
    regime: Mapping[int, float]
    saturated: bool

    def keep_ways(self, ways: Ways) -> None:
        """Files of each way of rolling and of the targets."""
        self._write("rollout", COLUMNS, self._rows(ways))
        if self.folder is not None:
            write_verdicts(judged(self.setting, ways, self.saturated), self.about, self._path("targets"))

    def tell_ways(self, ways: Ways) -> None:
        """The same as a table."""
        self.console.print(_table(self._rows(ways), self.regime, self._word))
        self.console.print()
        gpu_report.tell(self.console, judged(self.setting, ways, self.saturated))
        self._name_files("rollout", "targets")

    def keep_splits(self, splits: Mapping[str, Mapping[str, float]]) -> None:
        """A file of the seconds by stage of each way."""
        self._write("stages", SPLIT, [(name, *(f"{parts[s]:.5f}" for s in STAGES)) for name, parts in splits.items()])

    def tell_splits(self, splits: Mapping[str, Mapping[str, float]]) -> None:
        """The same as a table."""
        self.console.print(_split_table(splits))
        self._name_files("stages")
        self.console.print()

    @property
    def _word(self) -> str:
        return "saturated" if self.saturated else "not saturated"

    def _rows(self, ways: Ways) -> list[Sequence[str]]:
        return [_row(self.setting, ways, name, self._word) for name in ways.seconds]

    def _name_files(self, *kinds: str) -> None:
        if self.folder is not None:
            names = ", ".join(str(self._path(kind)) for kind in kinds)
            self.console.print(f"[dim]written to {names}[/dim]", highlight=False)

    def _write(self, kind: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.folder is None:
            return
        setting = self.setting
        spec, state = setting.network.spec, "yes" if self.compiled else "no"
        own = (spec.name, state, str(setting.rows), str(setting.steps), setting.backend)
        write(self._path(kind), columns, self.about, [(*own, *row) for row in rows])

    def _path(self, kind: str) -> Path:
        assert self.folder is not None
        model = self.setting.network.spec.name + ("-compiled" if self.compiled else "")
        return self.folder / f"{kind}-{model}-{self.about.slug}.csv"


def judged(setting: Setting, ways: Ways, saturated: bool) -> list[Verdict]:
    """The engine beside its network, and lockstep against the loop."""
    from .network_rollout import FULL, SEQUENTIAL

    name = setting.network.spec.name
    found = [
        Verdict(
            f"{name}, {way}: engine over network time",
            statistics.median(shares),
            gpu_targets.NETWORK_OVERHEAD,
            "",
            False,
        )  # fmt: skip
        for way, shares in ways.overheads.items()
    ]
    wanted = gpu_targets.SEQUENTIAL_SATURATED if saturated else gpu_targets.SEQUENTIAL
    regime = "saturated" if saturated else "not saturated"
    best = ways.ratio(FULL, SEQUENTIAL)
    return [*found, Verdict(f"{name}, {setting.rows} samples ({regime}): {FULL} x sequential", best, wanted, "x")]


def _row(setting: Setting, ways: Ways, name: str, regime: str) -> Sequence[str]:
    from .network_rollout import SEQUENTIAL

    seconds, stats = ways.seconds[name], ways.last[name].stats if name in ways.last else None
    steps = setting.steps
    calls = stats.calls if stats is not None else steps + steps * (steps + 1) // 2
    evaluations = stats.evaluations / setting.rows if stats is not None else calls
    over = f"{statistics.median(ways.overheads[name]):.4f}" if name in ways.overheads else ""
    ratio = "" if name == SEQUENTIAL else f"{ways.ratio(name, SEQUENTIAL):.3f}"
    return (
        name, str(len(seconds)), f"{ways.median(name):.4f}", f"{min(seconds):.4f}", f"{max(seconds):.4f}", str(calls),
        f"{evaluations:g}", ratio, over, regime, stats.graphs if stats is not None else "",
    )  # fmt: skip


def _table(rows: Sequence[Sequence[str]], regime: Mapping[int, float], word: str) -> Table:
    per_row = ", ".join(f"{seconds * 1e3:.3f} ms a sample in calls of {rows}" for rows, seconds in regime.items())
    made = plain_table(f"dense rollouts; the network is {word}: {per_row}")
    names = ("", "rounds", "seconds", "least", "most", "calls", "evaluations a sample", "x sequential", "over network")
    for name in names:
        made.add_column(name, justify="right" if name else "left")
    for row in rows:
        made.add_row(*row[: len(names)])
    return made


def _split_table(splits: Mapping[str, Mapping[str, float]]) -> Table:
    made = plain_table(
        "a dense rollout with decode and reward by stage, seconds (share of the wall); a graph holds network and step"
    )
    for name in ("", *STAGES):
        made.add_column(name, justify="right" if name else "left")
    for name, parts in splits.items():
        made.add_row(name, *(f"{parts[s]:.4g} ({parts[s] / parts['wall']:.1%})" for s in STAGES))
    return made
