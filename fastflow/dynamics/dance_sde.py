"""DanceGRPO's SDE."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dynamics, Grid, Rows, knob
from .forms import reverse_sde


@dataclass(frozen=True)
class DanceSDE(Dynamics):
    """Reverse SDE with the constant diffusion `eta`.

    DanceGRPO writes the drift with the score -(x - (1 - sigma) clean) / sigma^2; as x - (1 - sigma) clean = sigma eps,
    it is the same drift. Its last decoded image is `clean` of the last step, which is not trained.

    `eta`: >= 0, one number or one per step [T].
    Source: Xue et al., "DanceGRPO" (arXiv 2505.07818), and its `flux_step`.
    """

    eta: float | tuple[float, ...] = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", knob("eta", self.eta))

    def rows(self, grid: Grid) -> Rows:
        return reverse_sde(grid, grid.per_step("eta", self.eta))
