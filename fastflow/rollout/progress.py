"""A progress bar on stderr, only where a person can see it."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Counts network calls and reward batches. Does nothing unless asked and stderr is a terminal."""

    def __init__(self, wanted: bool, total: int) -> None:
        self.total = total
        self.bar: Any = None
        self.wanted = wanted and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self.wanted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("rollout"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("calls"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("rollout", total=self.total)
            self.bar.start()
        return self

    def advance(self, calls: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, calls)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
