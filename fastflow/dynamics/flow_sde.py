"""Flow-GRPO's SDE."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows, knob
from .forms import reverse_sde


@dataclass(frozen=True)
class FlowSDE(Dynamics):
    """Reverse SDE with diffusion `noise_level * sqrt(sigma / (1 - sigma))`.

    A step that starts at sigma = 1 (within 1e-4) takes 1 - sigma from the second sigma of the full schedule, so the std
    of the schedule's own first step is `noise_level`. The last step adds noise like the others.

    `noise_level`: >= 0, one number or one per step [T]; 0 is the Euler step.
    Source: Liu et al., "Flow-GRPO" (arXiv 2505.05470), section 4.2, and its `sde_step_with_logprob`.
    """

    noise_level: float | tuple[float, ...] = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_level", knob("noise_level", self.noise_level))

    def rows(self, grid: Grid) -> Rows:
        level = grid.per_step("noise_level", self.noise_level)
        return reverse_sde(grid, level * (grid.sigma / (1.0 - grid.guarded)).sqrt())
