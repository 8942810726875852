"""`python -m bench`: list the benchmarks, or run one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

import fastflow as ff
from fastflow import backends
from fastflow.compile.errors import CompileError

from . import (
    gpu_cli,
    heap,
    instructions,
    launch,
    log_prob_backward,
    matching,
    network_rollout,
    networks,
    overhead,
    plot,
    policy,
    registry,
    report,
    rollout,
    run,
    step,
)
from .machine import machine
from .registry import Entry, Mismatch, Shape
from .run import Result

FAILED, USAGE = 1, 2  # exit codes: a check failed; the request cannot be served


class Parser(argparse.ArgumentParser):
    """A bad argument is an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))


def main(argv: Sequence[str] | None = None, began: float | None = None) -> int:
    """Runs the command and returns its exit code. Bad arguments and failed checks print one line on standard error.

    began: of `time.perf_counter()`, from which --seconds count; None: now.
    """
    began = time.perf_counter() if began is None else began
    try:
        arguments = _parser().parse_args(argv)
        arguments.began = began
        if arguments.benchmark == "list":
            list_entries()
        elif arguments.benchmark == "plot":
            for path in plot.draw(arguments.results, arguments.out):
                print(path)
        elif arguments.benchmark == "instructions":
            instructions.run(_console(), arguments)
        else:
            _run(arguments)
    except Mismatch as error:
        return _fail(f"no speed without correctness: {error}", FAILED)
    except ModuleNotFoundError as error:
        return _fail(f"this needs the package {error.name}, which is not installed", USAGE)
    except gpu_cli.Failed as error:
        return _fail(str(error), FAILED)
    except (ValueError, ff.BackendError, CompileError, OSError) as error:
        return _fail(str(error), USAGE)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.benchmark == rollout.ENTRY.name and arguments.model != "digits":
        if arguments.verify:
            run.verify(rollout.ENTRY)
        network_rollout.run(_console(), arguments)
    elif arguments.benchmark == rollout.ENTRY.name and arguments.device != "cpu":
        names = ", ".join(networks.SPECS)
        raise ValueError(
            f"model: wanted one of {names} beside --device {arguments.device}; the digits are timed on a CPU"
        )
    elif getattr(arguments, "device", "cpu") != "cpu":
        gpu_cli.run_op(_console(), arguments)
    else:
        arguments.backend = arguments.backend or "cpu"
        runs = {"step": run_step, "launch": run_launch, "rollout": run_rollout}
        runs.get(arguments.benchmark, run_plain)(arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="fastflow bench",
        description="Benchmarks of this repository: medians over interleaved rounds, and ratios within one run.",
        epilog="No speed is reported unless the results agree first. `fastflow bench NAME --help` shows the options.",
    )
    parser.set_defaults(benchmark="list")
    commands = parser.add_subparsers(metavar="NAME")
    commands.add_parser("list", help="what there is to run").set_defaults(benchmark="list")
    pictures = commands.add_parser("plot", help="pictures of the results that are there")
    pictures.set_defaults(benchmark="plot")
    pictures.add_argument("--results", type=Path, default=plot.RESULTS, metavar="DIR", help="with CSV files")
    pictures.add_argument("--out", type=Path, default=plot.PICTURES, metavar="DIR", help="for PNG files")
    counted = commands.add_parser(
        "instructions", help="what the step's kernels issue for each element, from machine code; needs no GPU"
    )
    counted.set_defaults(benchmark="instructions")
    counted.add_argument("--arch", default="sm_90", help="of a GPU (sm_90)")
    counted.add_argument("--backend", help="triton, cuda, or both by comma (both)")
    counted.add_argument("--results", type=Path, metavar="DIR", help="write a CSV file into DIR")
    for entry in registry.entries():
        added = commands.add_parser(
            entry.name, help=entry.about, description=entry.about[0].upper() + entry.about[1:] + ".",
        )  # fmt: skip
        added.set_defaults(benchmark=entry.name)
        added.add_argument(
            "--backend", help="of ff.step: cpu or reference (cpu); on a GPU triton, cuda or both, by comma (all)"
        )
        added.add_argument(
            "--repeats", type=_count, default=entry.repeats, metavar="N", help=f"rounds (default: {entry.repeats})"
        )
        added.add_argument("--csv", type=Path, metavar="FILE", help="also write the results to FILE")
        added.add_argument("--verify", action="store_true", help=f"first run {entry.gate}")
        words = f"state of the C library's heap: {', '.join(heap.STATES)} (default)"
        added.add_argument("--heap", choices=heap.STATES, default="default", metavar="STATE", help=words)
        if entry is not launch.ENTRY:
            counts = [1, 2] if entry is step.ENTRY else [2]
            words = f"thread counts ({' '.join(map(str, counts))})"
            added.add_argument("--threads", type=_count, nargs="+", default=counts, metavar="N", help=words)
        if entry in (step.ENTRY, policy.ENTRY, matching.ENTRY, log_prob_backward.ENTRY):
            words = f"shapes [B, *] ({' '.join(run.show(shape) for shape in entry.shapes)})"
            added.add_argument("--sizes", type=_shape, nargs="+", default=entry.shapes, metavar="SIZE", help=words)
        if entry is step.ENTRY:
            added.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        if entry is not launch.ENTRY:
            gpu_cli.add_options(added)
        if entry is rollout.ENTRY:
            words = f"samples ({rollout.SHAPE[0]}; of a shape: {network_rollout.ROWS})"
            added.add_argument("--rows", type=_count, metavar="N", help=words)
            network_rollout.add_options(added)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted an int of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"wanted a shape such as 16x16x64x64, got {text!r}")
    return tuple(int(size) for size in sizes)


def list_entries() -> None:
    """One row per benchmark."""
    made = report.plain_table()
    for name in ("name", "what it times", "shapes", "variants", "gate"):
        made.add_column(name, no_wrap=name in ("name", "shapes", "variants"))
    for entry in registry.entries():
        shapes, variants = (run.show(s) for s in entry.shapes), (v.name for v in entry.variants)
        made.add_row(f"[bold]{entry.name}[/bold]", entry.about, "\n".join(shapes), "\n".join(variants), entry.gate)
        made.add_section()
    _console().print(made)


def run_step(arguments: argparse.Namespace) -> None:
    """The fused step against the chain, at each size."""
    left_out = (step.COMPILED, step.COMPILED_GIVEN) if arguments.no_compile else ()
    results = _measure(step.ENTRY, arguments.sizes, arguments.threads, arguments, left_out)
    _report(step.ENTRY, results, arguments)
    _targets(results, step.TARGETS, *step.TARGET_AT)


def run_plain(arguments: argparse.Namespace) -> None:
    """An entry that needs no more than its variants."""
    entry = registry.entry(arguments.benchmark)
    results = _measure(entry, arguments.sizes, arguments.threads, arguments)
    _report(entry, results, arguments)
    if entry is policy.ENTRY:
        _targets(results, policy.TARGETS, *policy.TARGET_AT)


def run_launch(arguments: argparse.Namespace) -> None:
    """The overhead of whole calls."""
    results = _measure(launch.ENTRY, launch.ENTRY.shapes, [1], arguments)
    _report(launch.ENTRY, results, arguments, unit="us")
    for r in results:
        _verdict(r.times.median <= launch.TARGET, f"{r.variant}: {r.times.median * 1e6:.1f} us", "at most 25 us")


def run_rollout(arguments: argparse.Namespace) -> None:
    """The dense rollout, and where its time goes."""
    shape = (arguments.rows or rollout.SHAPE[0], *rollout.SHAPE[1:])
    results = _measure(rollout.ENTRY, [shape], arguments.threads, arguments)
    _report(rollout.ENTRY, results, arguments)
    _console().print(rollout.costs(shape, arguments.backend, max(arguments.threads)))
    _console().print()
    beside = overhead.measure(arguments.backend, max(arguments.threads))
    _console().print(overhead.table(beside))
    _console().print()
    _targets(results, rollout.TARGETS, rollout.SHAPE, 2)
    for r in beside:
        _verdict(r.share <= overhead.TARGET, f"{r.kind}: {r.share:.1%} over the network's time", "at most 5 %")


def _measure(
    entry: Entry,
    shapes: Sequence[Shape],
    threads: Sequence[int],
    arguments: argparse.Namespace,
    left_out: Sequence[str] = (),
) -> list[Result]:
    backends.check_name(arguments.backend)
    heap.use(arguments.heap)
    report.heading(_console(), machine(arguments.heap))
    variants = [v.name for v in entry.variants if v.name not in left_out]
    results: list[Result] = []
    with Console(stderr=True).status("") as status:
        if arguments.verify:
            status.update(f"running {entry.gate}")
            run.verify(entry)
        for shape in shapes:
            results += run.measure(entry, shape, threads, arguments.backend, arguments.repeats, variants, status.update)
    return results


def _report(entry: Entry, results: Sequence[Result], arguments: argparse.Namespace, unit: str = "ms") -> None:
    console = _console()
    console.print()
    console.print(report.table(results, f"{entry.name}, backend {results[0].backend}", unit))
    console.print()
    for note in report.notes(results):
        console.print(f"[yellow]{note}[/yellow]", highlight=False)
    if arguments.csv is not None:
        report.write_csv(results, machine(arguments.heap), arguments.csv)
        console.print(f"[dim]written to {arguments.csv}[/dim]", highlight=False)


def _targets(results: Sequence[Result], targets: Mapping[str, Mapping[str, float]], shape: Shape, threads: int) -> None:
    for r in results:
        if (r.shape, r.threads) == (shape, threads):
            for base, wanted in targets.get(r.variant, {}).items():
                if base in r.ratios:
                    found = f"{run.show(shape)}, {run.threads_in_words(threads)}, {r.variant}: {r.ratios[base]:.1f} x {base}"
                    _verdict(r.ratios[base] >= wanted, found, f"at least {wanted:.0f} x")


def _verdict(reached: bool, found: str, wanted: str) -> None:
    report.verdict(_console(), reached, found, wanted)


def _fail(message: str, code: int) -> int:
    text = escape(" ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(f"[red]fastflow bench:[/red] {text}", highlight=False)
    return code
