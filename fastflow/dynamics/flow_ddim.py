"""DDIM with eta on the flow path."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows, knob
from .forms import decay, renoise


@dataclass(frozen=True)
class FlowDDIM(Dynamics):
    """`(1 - sigma') clean + sqrt(sigma'^2 - std^2) eps + std z` with `std = eta sigma' sqrt(1 - e^-2h)`.

    With sigma, 1 - sigma for DDIM's sqrt(1 - abar), sqrt(abar) this is DDIM's std. eta = 1 is `DPMSolverSDE`.

    `eta`: 0 (the Euler step) to 1, one number or one per step [T].
    Source: Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), eq. 12 and 16; DiffusionNFT's `solver.py`.
    """

    eta: float | tuple[float, ...] = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", knob("eta", self.eta, most=1.0))

    def rows(self, grid: Grid) -> Rows:
        shrink, rest = decay(grid)
        fresh = grid.per_step("eta", self.eta) ** 2 * rest * (1.0 + shrink)
        return renoise(
            grid, kept=grid.sigma_next * (1.0 - fresh).clamp(min=0.0).sqrt(), std=grid.sigma_next * fresh.sqrt()
        )
