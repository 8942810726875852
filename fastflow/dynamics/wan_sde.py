"""The SDE of Flow-GRPO's Wan pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows
from .forms import reverse_sde


@dataclass(frozen=True)
class WanSDE(Dynamics):
    """Reverse SDE with diffusion `last + (second - last) * sigma`, by the second and last sigma of the full schedule.

    Source: Flow-GRPO's `wan_pipeline_with_logprob`.
    """

    def rows(self, grid: Grid) -> Rows:
        second, last = grid.full[1], grid.full[-1]
        return reverse_sde(grid, last + (second - last) * grid.sigma)
