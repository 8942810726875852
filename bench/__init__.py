"""Benchmarks of the repository: `python -m bench` in a checkout, or `fastflow bench`. Never part of the wheel."""

import time

BEGAN = time.perf_counter()  # of `python -m bench`: before torch is imported
