"""`fastflow bench`: hands over to bench/, which lives in the repository and not in the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import fail

HELP = """Runs a benchmark of the repository. Needs a checkout: bench/ is not part of the installed package.

Everything after the name goes to the benchmark; [cyan]fastflow bench NAME --help[/cyan] shows its options.

[bold]Examples[/bold]

  fastflow bench

  fastflow bench step
"""
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [OPTIONS]...", help="Which benchmark, and its options. None: list them.", show_default=False
        ),
    ] = None,
) -> None:
    root = checkout()
    if root is None:
        fail(
            "bench: there is no bench/ beside this installation, because benchmarks are not part of the package; "
            "clone the repository and run it there (`pip install -e .`, or `python -m fastflow bench` in the checkout)"
        )
    raise typer.Exit(subprocess.call([sys.executable, "-m", "bench", *(arguments or [])], cwd=root))


def checkout() -> Path | None:
    """The root of the repository that this package is run from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "bench" / "__main__.py").is_file() and (root / "pyproject.toml").is_file() else None
