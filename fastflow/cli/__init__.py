"""The `fastflow` command. Heavy modules are imported inside the commands, so that `--help` stays quick."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script."""
    from .app import app

    app(prog_name="fastflow")
