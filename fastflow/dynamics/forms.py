"""The two forms that stochastic flow steps take, and the decay factor of exponential integrators. All float64 [T]."""

from __future__ import annotations

from torch import Tensor

from .base import Grid, Rows


def reverse_sde(grid: Grid, diffusion: Tensor) -> Rows:
    """An Euler-Maruyama step of the reverse SDE `dx = (v + s^2/(2 sigma) (x + (1 - sigma) v)) dt + s dw`, diffusion s.

    On the path x = (1 - sigma) x0 + sigma eps the score is -(x + (1 - sigma) v) / sigma, so the marginals are those of
    the ODE for every s. Source: Liu et al., "Flow-GRPO" (arXiv 2505.05470), eq. 9; Song et al. (ICLR 2021).
    """
    dt = grid.sigma_next - grid.sigma
    half = diffusion**2 / (2.0 * grid.sigma)
    return Rows(a=1.0 + half * dt, b=(1.0 + half * (1.0 - grid.sigma)) * dt, std=diffusion * (-dt).sqrt())


def renoise(grid: Grid, kept: Tensor, std: Tensor) -> Rows:
    """`(1 - sigma') clean + kept * eps + std * z`, clean and eps as x and v predict them, kept^2 + std^2 = sigma'^2."""
    alpha = 1.0 - grid.sigma_next
    return Rows(a=alpha + kept, b=kept * (1.0 - grid.sigma) - alpha * grid.sigma, std=std)


def decay(grid: Grid) -> tuple[Tensor, Tensor]:
    """e^-h = (1 - sigma) sigma' / (sigma (1 - sigma')) and 1 - e^-h, where h is the rise of log((1 - sigma) / sigma).

    Regular at both ends: 0 from sigma = 1 and 0 into sigma' = 0, without infinite logarithms.
    """
    scale = grid.sigma * (1.0 - grid.sigma_next)
    return (1.0 - grid.sigma) * grid.sigma_next / scale, (grid.sigma - grid.sigma_next) / scale
