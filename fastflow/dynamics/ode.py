"""ODE steps: Euler, and DPM-Solver++ of order 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Dynamics, Grid, Rows
from .forms import decay


@dataclass(frozen=True)
class ODE(Dynamics):
    """Steps without noise. `solver="euler"`, or "dpmpp" (DPM-Solver++) with `order` 1 or 2.

    On the flow path DPM-Solver++(1) is Euler (a = 1, b = sigma' - sigma exactly). Order 2 is DPM-Solver++(2M) in its
    midpoint form: it adds `history * clean` of the previous step. Its first and last step, and the one after a step
    from sigma = 1, are of order 1.
    Source: Lu et al., "DPM-Solver++" (arXiv 2211.01095), algorithm 2; diffusers' `dpmsolver++` on flow sigmas.

    Raises:
        ValueError: an unknown solver, or an order that it does not have.
    """

    solver: str = "euler"
    order: int = 1

    def __post_init__(self) -> None:
        if self.solver not in ("euler", "dpmpp"):
            raise ValueError(f'solver: wanted "euler" or "dpmpp", got {self.solver!r}')
        if self.order not in ((1,) if self.solver == "euler" else (1, 2)):
            raise ValueError(f'order: wanted 1 for "euler", 1 or 2 for "dpmpp", got {self.order} for "{self.solver}"')

    def rows(self, grid: Grid) -> Rows:
        euler = Rows(torch.ones_like(grid.sigma), grid.sigma_next - grid.sigma, torch.zeros_like(grid.sigma))
        if self.order == 1:
            return euler
        # x' = (sigma'/sigma) x + k clean + k / (2 r) (clean - previous clean),  r = previous h / h
        shrink, rest = decay(grid)
        weight = torch.zeros_like(grid.sigma)  # k / (2 r)
        for i in range(1, len(grid.sigma) - 1):
            if shrink[i - 1] > 0.0 and shrink[i] > 0.0:
                ratio = shrink[i].log() / shrink[i - 1].log()
                weight[i] = 0.5 * (1.0 - grid.sigma_next[i]) * rest[i] * ratio
        second = weight > 0.0
        clean = (1.0 - grid.sigma_next) * rest + weight
        return Rows(
            a=torch.where(second, grid.sigma_next / grid.sigma + clean, euler.a),
            b=torch.where(second, -clean * grid.sigma, euler.b),
            std=euler.std,
            history=-weight,
        )
