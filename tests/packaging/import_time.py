"""Measures what `import fastflow` adds to `import torch`: `make import-time`.

Every run is a process of its own, timed inside; the median is shown.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = 11
PROGRAM = (
    "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import fastflow; "
    "c = time.perf_counter(); print(b - a, c - b)"
)


def measure(runs: int = RUNS) -> tuple[list[float], list[float]]:
    """Milliseconds of `import torch`, and of the `import fastflow` that follows it, one per run."""
    times = []
    for _ in range(runs):
        output = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
        times.append([1e3 * float(part) for part in output.split()])
    return [run[0] for run in times], [run[1] for run in times]


if __name__ == "__main__":
    measure(1)  # fills the caches of bytecode and disk
    base, added = measure()
    print(f"import torch           {statistics.median(base):7.1f} ms   (median of {RUNS} processes)")
    print(
        f"then import fastflow  +{statistics.median(added):7.1f} ms   (least {min(added):.1f}, most {max(added):.1f})"
    )
