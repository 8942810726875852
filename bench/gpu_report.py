"""Rows of a device's benchmarks as tables and as CSV files, and which targets they reach."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .gpu_run import COPY, Row
from .machine import Gpu
from .report import plain_table, verdict
from .run import show

DEVICE = ("device", "driver", "cuda", "torch", "triton", "git sha", "date")
COLUMNS = (
    *DEVICE, "benchmark", "case", "shape", "variant", "backend", "median us", "iqr us", "hot us", "with launch us", "MB",
    "GB/s", "share of copy", "x eager", "x compile", "with launch x eager", "extra memory MB",
    "instructions an element",
)  # fmt: skip
VERDICTS = (*DEVICE, "target", "found", "wanted", "reached")


@dataclass(frozen=True)
class Verdict:
    """What was found beside what is wanted. at_least: else at most."""

    name: str
    found: float
    wanted: float
    unit: str  # of both, as printed behind the number
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


def heading(console: Console, gpu: Gpu, cache: int) -> None:
    console.print(
        f"[bold]{gpu.device}[/bold] (L2 {cache / 2**20:.0f} MiB, driver {gpu.driver or 'none'}, CUDA {gpu.cuda or 'none'}), "
        f"torch {gpu.torch}, triton {gpu.triton or 'none'}, {gpu.git_sha}, {gpu.date}",
        highlight=False,
    )


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case."""
    first = rows[0]
    made = plain_table(f"{first.benchmark}, {show(first.shape)}, {first.case}")
    names = (
        "us",
        "IQR",
        "hot us",
        "with launch",
        "MB",
        "GB/s",
        "of copy",
        "x eager",
        "x compile",
        "launch x eager",
        "MB more",
        "instr/element",
    )
    made.add_column("", no_wrap=True)
    for name in names:
        made.add_column(name, justify="right")
    for row in rows:
        style = "dim" if row.way == COPY else "bold" if row.nbytes else None
        made.add_row(row.way, *_cells(row), style=style)
    return made


def _cells(row: Row) -> list[str]:
    us, mb = (lambda t: "" if t is None else f"{t.median * 1e6:.2f}"), 1e-6

    def ratio(of: dict[str, float], base: str) -> str:
        found = [value for name, value in of.items() if name.startswith(base)]
        return f"{found[0]:.2f}" if found else ""

    return [
        us(row.times), f"{row.times.iqr * 1e6:.2f}", us(row.hot), us(row.launched),
        "" if row.nbytes is None else f"{row.nbytes * mb:.1f}",
        "" if row.bandwidth is None else f"{row.bandwidth * 1e-9:.0f}",
        "" if row.share_of_copy is None else f"{row.share_of_copy:.3f}",
        ratio(row.ratios, "eager"), ratio(row.ratios, "compile"), ratio(row.launched_ratios, "eager"),
        "" if row.peak is None else f"{row.peak * mb:.2f}",
        "" if row.instructions is None else f"{row.instructions:.1f}",
    ]  # fmt: skip


def write_rows(rows: Iterable[Row], gpu: Gpu, path: Path) -> None:
    """In place of what was at `path`."""
    own = ((r.benchmark, r.case, show(r.shape), r.way, r.backend, *_cells(r)) for r in rows)
    write(path, COLUMNS, gpu, own)


def write_verdicts(verdicts: Iterable[Verdict], gpu: Gpu, path: Path) -> None:
    own = ((v.name, f"{v.found:.4g}{v.unit}", _wanted(v), "yes" if v.reached else "no") for v in verdicts)
    write(path, VERDICTS, gpu, own)


def write(path: Path, columns: Sequence[str], gpu: Gpu, rows: Iterable[Sequence[str]]) -> None:
    """A CSV file whose rows begin with the device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows((*astuple(gpu), *row) for row in rows)


def tell(console: Console, verdicts: Iterable[Verdict]) -> None:
    for v in verdicts:
        verdict(console, v.reached, f"{v.name}: {v.found:.4g}{v.unit}", _wanted(v))


def _wanted(v: Verdict) -> str:
    return f"{'at least' if v.at_least else 'at most'} {v.wanted:g}{v.unit}"
