"""`fastflow compile`: kernels compiled ahead of time, on a machine that needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .output import FAILED, console, fail

HELP = """Compiles the kernels for GPU architectures, without a GPU, and says what each takes.

With FASTFLOW_CACHE_DIR=DIR, a machine with one of these GPUs starts without compiling. It leaves with 1 if a kernel spills.

Beside code for the targets alone, the CUDA module always holds PTX of compute_80 and compute_120, for other GPUs.

[bold]Examples[/bold]

  fastflow compile --out kernels

  fastflow compile --arch sm_90 --backend triton --out kernels --json > report.json

  FASTFLOW_CACHE_DIR=kernels python train.py
"""
BACKENDS = ("cuda", "triton")
WIDTH = 120  # of the table, also where the terminal is narrower
SEVERAL = ("--arch", "--backend")  # options that take several words: `--arch sm_80 sm_90`


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder that is written; what it holds of other targets stays.")],
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="Targets: sm_80 sm_89 sm_90 sm_100 sm_120, unless said.", show_default=False),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="cuda, triton, or both, unless said.", show_default=False)
    ] = None,
    only: Annotated[str, typer.Option("--only", help="Triton: variants whose name has this in it.")] = "",
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes at a time; a core each, unless said.")
    ] = None,
    sass: Annotated[
        bool,
        typer.Option("--sass/--no-sass", help="Look at machine code too, for load widths; a third of Triton's time."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print every variant as JSON.")] = False,
) -> None:
    from ..compile import nvcc_aot, report, targets

    chosen = list(dict.fromkeys(backend or BACKENDS))
    try:
        wanted = targets.find_all(arch or list(targets.DEFAULT))
        unknown = [name for name in chosen if name not in BACKENDS]
        if unknown:
            raise ValueError(f"--backend: wanted cuda or triton, got {', '.join(map(repr, unknown))}")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: wanted a folder, got the file {out}")
        entries = _compile(chosen, wanted, out, only, jobs, sass)
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(report.rows(entries), indent=2))
    else:
        screen = console()
        screen.width = max(WIDTH, screen.width)
        screen.print(report.table(entries), highlight=False)
        screen.print(f"\n{len(entries)} kernels in {out}; FASTFLOW_CACHE_DIR={out} finds them", highlight=False)
        if "cuda" in chosen:
            screen.print(f"the CUDA module holds {nvcc_aot.contents(wanted)}", highlight=False)
    spilling = report.spilling(entries)
    if spilling:
        fail(f"{len(spilling)} kernels spill registers: {'; '.join(spilling)}", FAILED)


def _compile(
    chosen: list[str], wanted: list[Any], out: Path, only: str, jobs: int | None, sass: bool
) -> list[dict[str, Any]]:
    """Both halves at a time: nvcc is one process, and Triton's are one an architecture."""
    from ..compile import nvcc_aot, triton_aot

    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "triton": lambda: triton_aot.build(wanted, out, only, jobs, sass),
        "cuda": lambda: nvcc_aot.build(wanted, out, sass),
    }
    with ThreadPoolExecutor(1 if jobs == 1 else 2) as pool:
        halves = [pool.submit(work[name]) for name in sorted(chosen, reverse=True)]
        return [entry for half in halves for entry in half.result()]


def spread(arguments: list[str]) -> list[str]:
    """`--arch sm_80 sm_90` -> `--arch sm_80 --arch sm_90`, as the parser takes options."""
    words: list[str] = []
    option = None
    for word in arguments:
        if word.startswith("-"):
            option = word if word in SEVERAL else None
        elif option is not None and words[-1] != option:
            words.append(option)
        words.append(word)
    return words


class Command(typer.core.TyperCommand):
    """A command some of whose options take several words."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        return super().parse_args(context, spread(arguments))
