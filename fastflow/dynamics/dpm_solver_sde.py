"""SDE-DPM-Solver++ of first order."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows
from .forms import decay


@dataclass(frozen=True)
class DPMSolverSDE(Dynamics):
    """`(sigma'/sigma) e^-h x + (1 - sigma')(1 - e^-2h) clean + sigma' sqrt(1 - e^-2h) z`. No knobs.

    Exact noise: the state keeps the right amount of it. From sigma = 1 and into sigma' = 0 in closed form (e^-h = 0).
    Source: Lu et al., "DPM-Solver++" (arXiv 2211.01095), SDE-DPM-Solver++(1), with alpha = 1 - sigma; diffusers'
    `sde-dpmsolver++` on flow sigmas and MixGRPO's `dpm_step`.
    """

    def rows(self, grid: Grid) -> Rows:
        shrink, rest = decay(grid)
        fresh = rest * (1.0 + shrink)
        clean = (1.0 - grid.sigma_next) * fresh
        return Rows(
            a=grid.sigma_next / grid.sigma * shrink + clean,
            b=-clean * grid.sigma,
            std=grid.sigma_next * fresh.sqrt(),
        )
