"""`bench step | log_prob_backward | policy | matching --device cuda`: every case on the device, its targets, and CSV files."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from fastflow import backends

from . import gpu_gradients, gpu_report, gpu_step, gpu_targets, instructions, run
from .gpu_run import Case, Row, Way, measure
from .gpu_timing import Clock, clock_of
from .machine import gpu
from .registry import Mismatch, entry

FAST = ("triton", "cuda")  # the backends that a GPU has
ROUNDS = 21


class Failed(Exception):
    """Some cases gave no figures; the others have been reported and written."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, or cuda: every case on an NVIDIA GPU (cpu)"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="on a GPU: write CSV files into DIR")
    words = "on a GPU: begin no new case or round after so long, of the whole process (170)"
    parser.add_argument("--seconds", type=float, default=170.0, help=words)
    parser.add_argument("--sha", metavar="SHA", help="on a GPU: the commit, for a tree without its repository")


def run_cases(
    console: Console,
    cases: Iterable[Case],
    clock: Clock,
    repeats: int,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    seconds: float = math.inf,
    began: float | None = None,
) -> tuple[list[Row], list[str]]:
    """Rows of every case that could be measured, printed and kept as they come, and one line for each case, or way of ours
    in one, that could not.

    No new case begins `seconds` after `began` (now).
    """
    rows: list[Row] = []
    failures: list[str] = []
    began = time.perf_counter() if began is None else began
    for case in cases:
        where = f"{case.benchmark}, {run.show(case.shape)}, {case.name}"
        if time.perf_counter() - began > seconds:
            failures.append(f"{where}: no time left")
            continue

        def failed(way: Way, error: RuntimeError, where: str = where) -> None:
            line = f"{where}, {way.name}: {_first_line(error)}"
            console.print(f"[red]no figures[/red]  {escape(line)}", highlight=False)
            if way.nbytes is not None:  # one of ours, no baseline
                failures.append(line)

        try:
            found = measure(case, clock, repeats, failed)
        except (Mismatch, RuntimeError) as error:  # one case must not take the others' figures with it
            failures.append(f"{where}: {_first_line(error)}")
            console.print(f"[red]no figures[/red]  {escape(failures[-1])}", highlight=False)
            continue
        rows += found
        keep(rows)
        console.print(gpu_report.table(found))
        console.print()
    return rows, failures


def run_op(console: Console, arguments: argparse.Namespace) -> None:
    """All cases of a benchmark. Raises ValueError without a GPU, Failed at the end where a case gave no figures."""
    clock = clock_of(arguments.device)
    if arguments.verify:
        run.verify(entry(arguments.benchmark))
    names = chosen(arguments.backend, clock.device)
    device = torch.device(clock.device)
    about = gpu(device, arguments.sha)
    gpu_report.heading(console, about, clock.cache)
    if arguments.benchmark == "step":
        plan = (
            None if arguments.sizes == entry("step").shapes else [(shape, gpu_step.FORMS) for shape in arguments.sizes]
        )
        cases = gpu_step.cases(
            device, names, plan or gpu_step.PLAN, not arguments.no_compile, issued(console, device, names)
        )
    else:
        sizes = gpu_gradients.SHAPES if arguments.sizes == entry(arguments.benchmark).shapes else arguments.sizes
        cases = gpu_gradients.cases(arguments.benchmark, device, names, sizes)

    def keep(rows: list[Row]) -> None:
        if arguments.results is not None:
            judged = gpu_targets.verdicts(rows)
            gpu_report.write_rows(rows, about, arguments.results / f"{arguments.benchmark}-{about.slug}.csv")
            gpu_report.write_verdicts(
                judged, about, arguments.results / f"targets-{arguments.benchmark}-{about.slug}.csv"
            )

    repeats = min(arguments.repeats, ROUNDS)
    rows, failures = run_cases(console, cases, clock, repeats, keep, arguments.seconds, arguments.began)
    gpu_report.tell(console, gpu_targets.verdicts(rows))
    if arguments.results is not None and rows:
        console.print(f"[dim]written to {arguments.results}[/dim]", highlight=False)
    if failures:
        raise Failed(f"no figures of {len(failures)}: {'; '.join(failures)}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def issued(console: Console, device: torch.device, names: Sequence[str]) -> gpu_step.Instructions:
    """What the step issues for each element on a device; what cannot be counted is said and left out."""
    if device.type != "cuda":
        return {}
    found = {}
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    for name in names:
        try:
            for each in instructions.count(arch, [name], device=torch.cuda.get_device_name(device)):
                found[name, each.form.name] = each.instructions
        except (ValueError, RuntimeError, OSError) as error:
            console.print(f"[yellow]no instructions are counted for {name}: {error}[/yellow]", highlight=False)
    return found


def chosen(text: str | None, device: torch.device) -> list[str]:
    """The backends to measure: those named, by comma; else all that run on the device. Raises ValueError or BackendError."""
    if text is None:
        candidates = FAST if device.type == "cuda" else ("cpu",)
        names = [name for name in candidates if backends.unavailable(name) is None]
        if not names:
            reasons = "; ".join(f"{name}: {backends.unavailable(name)}" for name in candidates)
            raise ValueError(f"backend: none runs on {device} ({reasons})")
        return names
    names = text.split(",")
    for name in names:
        backends.require(name)
    return names
