"""How the commands speak: one console, one form of error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

USAGE = 2  # exit code: the request cannot be served as it stands
FAILED = 1  # exit code: it was served, and something broke on the way


def console() -> Console:
    """Standard output. Made on each call, so that it follows a redirected stream."""
    return Console(soft_wrap=True)


def fail(message: str, code: int = USAGE) -> NoReturn:
    """Prints one line on standard error and leaves with `code`."""
    Console(stderr=True, soft_wrap=True).print(f"[red]fastflow:[/red] {_escape(message)}", highlight=False)
    raise typer.Exit(code)


def _escape(message: str) -> str:
    from rich.markup import escape

    return escape(" ".join(message.split()))
