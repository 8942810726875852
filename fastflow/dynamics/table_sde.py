"""DenseGRPO's calibrated SDE."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows, knob
from .forms import reverse_sde


@dataclass(frozen=True)
class TableSDE(Dynamics):
    """Reverse SDE with a diffusion of its own at every step, `psi` [T] (any sequence or tensor of numbers >= 0).

    For a part of a schedule, `psi` may be as long as the full schedule: the values at equal sigmas are taken.
    Source: "DenseGRPO" (arXiv 2601.20218), sigma_t = psi(t), which absorbs sqrt(sigma / (1 - sigma)).
    """

    psi: tuple[float, ...]

    def __post_init__(self) -> None:
        values = knob("psi", self.psi)
        object.__setattr__(self, "psi", values if isinstance(values, tuple) else (values,))

    def rows(self, grid: Grid) -> Rows:
        return reverse_sde(grid, grid.per_step("psi", self.psi))
