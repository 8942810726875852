"""Benchmarks of the repository: `python -m bench` in a checkout, or `fastflow bench`. Never part of the wheel."""
