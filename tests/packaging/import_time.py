"""Measures what `import fastflow` adds to `import torch`: `make import-time`.

Every run is a process of its own, timed inside; the medians are shown. Bytecode is cached, as in an installed package. On a
busy machine read the processor time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = 11
PROGRAM = """
import time
start = time.perf_counter()
import torch
middle, used = time.perf_counter(), time.process_time()
import fastflow
print(middle - start, time.perf_counter() - middle, time.process_time() - used)
"""


def measure() -> list[float]:
    """Milliseconds: `import torch`; `import fastflow` after it; of that, processor time."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True)
    return [1e3 * float(part) for part in done.stdout.split()]


if __name__ == "__main__":
    measure()  # fills the caches
    runs = [measure() for _ in range(RUNS)]
    base, added, used = (statistics.median(column) for column in zip(*runs, strict=True))
    least = min(run[1] for run in runs)
    print(f"import torch           {base:7.1f} ms")
    print(f"then import fastflow  +{added:7.1f} ms   (least {least:.1f}; processor time {used:.1f})")
    print(f"medians of {RUNS} processes, load average {os.getloadavg()[0]:.1f}")
