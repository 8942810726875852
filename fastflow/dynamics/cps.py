"""Coefficients-preserving sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Dynamics, Grid, Rows, knob
from .forms import renoise


@dataclass(frozen=True)
class CPS(Dynamics):
    """`(1 - sigma') clean + sigma' cos(theta) eps + sigma' sin(theta) z`, theta = noise_level * pi / 2.

    The amount of noise in the state is right at every step. At sigma' = 0 the step returns the clean prediction.
    Scored by the plain square. A step's noise does not depend on the step's length, so more steps at one `noise_level`
    do not lead to the data distribution: a bias towards too little variance stays.

    `noise_level`: 0 (the Euler step) to 1 (all noise fresh), one number or one per step [T].
    Source: Wang and Yu, "Coefficients-Preserving Sampling" (arXiv 2509.05952), and FlowCPS's `sde_step_with_logprob`.
    """

    score: ClassVar[str] = "square"
    noise_level: float | tuple[float, ...] = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_level", knob("noise_level", self.noise_level, most=1.0))

    def rows(self, grid: Grid) -> Rows:
        theta = grid.per_step("noise_level", self.noise_level) * (math.pi / 2.0)
        return renoise(grid, kept=grid.sigma_next * theta.cos(), std=grid.sigma_next * theta.sin())
