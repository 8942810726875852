"""What an H200-class GPU is to reach, and what was found: shares of the copy in the same run, microseconds, ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import gpu_step as step
from .gpu_report import Verdict
from .gpu_run import Row
from .log_prob_backward import BACKWARD
from .run import show

LEAST_BYTES = 256e6  # of a call whose bandwidth is judged
SHARES = {
    step.CLEAN.name: 0.92, step.NARROW.name: 0.80, step.NARROW_GIVEN.name: 0.92, step.NARROW_REPLAY.name: 0.92,
}  # fmt: skip
MICROSECONDS = {step.BASE.name: 8.0, step.DENSE.name: 11.0}  # at step.SMALL
EAGER = {step.BASE.name: 12.0, step.DENSE.name: 10.0}
LAUNCHED = 10.0
COMPILED = {step.BASE.name: 1.5, step.CLEAN.name: 1.5, step.DENSE.name: 1.5, step.GIVEN.name: 1.0}
GRADIENT_SHARE, POLICY_EAGER, MEMORY_SLACK = 0.90, 5.0, 1.01
LOOP = " in its loop"  # what is counted of a CUDA kernel
NETWORK_OVERHEAD, SEQUENTIAL, SEQUENTIAL_SATURATED = 0.02, 1.25, 1.18


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of whatever was measured."""
    return [verdict for row in rows if row.nbytes and row.backend != "torch" for verdict in _of(row)]


def _of(row: Row) -> Iterator[Verdict]:
    where = f"{row.benchmark}, {show(row.shape)}, {row.case}, {row.way}"
    large, moved = (row.nbytes or 0) >= LEAST_BYTES, row.share_of_copy or 0.0
    if row.benchmark == "step":
        yield from _step(row, where, large, moved)
    if row.benchmark == "log_prob_backward" and row.way.startswith(BACKWARD):
        if large:
            yield Verdict(f"{where}: of copy", moved, GRADIENT_SHARE, "")
        if row.peak is not None:
            gradient = 2.0 * _numel(row.shape)  # bf16
            yield Verdict(f"{where}: peak memory over the gradient's own", row.peak / gradient, MEMORY_SLACK, "", False)
    if row.benchmark == "policy" and large:
        yield Verdict(f"{where}: of copy", moved, GRADIENT_SHARE, "")
        for base, found in row.ratios.items():
            yield Verdict(f"{where}: x {base}", found, POLICY_EAGER, "x")


def _step(row: Row, where: str, large: bool, moved: float) -> Iterator[Verdict]:
    if large and row.case in SHARES:
        issued = (
            ""
            if row.instructions is None
            else f" ({row.instructions:.1f} instructions an element{LOOP if row.backend == 'cuda' else ''})"
        )
        yield Verdict(f"{where}{issued}: of copy", moved, SHARES[row.case], "")
    if row.shape != step.SMALL:
        return
    if row.case in MICROSECONDS:
        hot = f" (hot: {row.hot.median * 1e6:.2f} us)" if row.hot is not None else ""
        yield Verdict(f"{where}{hot}", row.times.median * 1e6, MICROSECONDS[row.case], " us", False)
    if row.case in EAGER and step.EAGER in row.ratios:
        yield Verdict(f"{where}: x eager", row.ratios[step.EAGER], EAGER[row.case], "x")
    if row.case in COMPILED and step.COMPILED in row.ratios:
        yield Verdict(f"{where}: x compile", row.ratios[step.COMPILED], COMPILED[row.case], "x")
    if row.case in EAGER and step.EAGER in row.launched_ratios:
        yield Verdict(f"{where}: with launches, x eager", row.launched_ratios[step.EAGER], LAUNCHED, "x")


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
