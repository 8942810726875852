"""DDIM on a variance-preserving model (Stable Diffusion 1.x and kin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Dynamics, Grid, Rows, knob
from .schedule import Sigmas, as_float64, as_sigmas


@dataclass(frozen=True)
class DDIM(Dynamics):
    """`sqrt(abar') clean + sqrt(1 - abar' - std^2) eps + std z`, std^2 = eta^2 (1 - abar')/(1 - abar) (1 - abar/abar').

    Here `velocity` is what the network predicts, and `sigmas` are integer timesteps [T + 1], as `sigmas_from` reads
    them from a DDIMScheduler: the last one is a timestep too (clamped to 0), so the last step has noise, as in DDPO.

    `alphas_cumprod`: [N_train], in [0, 1] (the scheduler's). `eta`: 0 to 1, one number or one per step [T].
    `prediction`: "epsilon", "sample" or "v_prediction".
    Source: Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), eq. 12 and 16; Black et al., "DDPO"
    (arXiv 2305.13301), `ddim_step_with_logprob`.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    eta: float | tuple[float, ...] = 1.0
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        values = as_float64("alphas_cumprod", self.alphas_cumprod)
        if values.ndim != 1 or not bool(((values >= 0.0) & (values <= 1.0)).all()):
            raise ValueError(f"alphas_cumprod: wanted [N_train] values in [0, 1], got shape {list(values.shape)}")
        if self.prediction not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f'prediction: wanted "epsilon", "sample" or "v_prediction", got {self.prediction!r}')
        object.__setattr__(self, "alphas_cumprod", tuple(values.tolist()))
        object.__setattr__(self, "eta", knob("eta", self.eta, most=1.0))

    def rows(self, grid: Grid) -> Rows:
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        now, after = table[grid.sigma.long()], table[grid.sigma_next.long()]
        alpha, sigma = now.sqrt(), (1.0 - now).sqrt()
        variance = (1.0 - after) / (1.0 - now) * (1.0 - now / after)
        std = grid.per_step("eta", self.eta) * variance.clamp(min=0.0).sqrt()
        if self.prediction == "epsilon":  # clean = p x + q v, eps = s x + r v
            p, q, s, r = 1.0 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha)
        elif self.prediction == "sample":
            p, q, s, r = torch.zeros_like(alpha), torch.ones_like(alpha), 1.0 / sigma, -alpha / sigma
        else:
            p, q, s, r = alpha, -sigma, sigma, alpha
        kept, still = (1.0 - after - std**2).clamp(min=0.0).sqrt(), (1.0 - after).sqrt()
        return Rows(
            a=after.sqrt() * p + kept * s,
            b=after.sqrt() * q + kept * r,
            std=std,
            p=p,
            q=q,
            ode_a=after.sqrt() * p + still * s,
            ode_b=after.sqrt() * q + still * r,
        )

    def grid(
        self, sigmas: Sigmas | Tensor | Sequence[float], full: Sigmas | Tensor | Sequence[float] | None = None
    ) -> Grid:
        """Checks a schedule of integer timesteps: falling, the last two possibly equal, within the training range."""
        given = as_sigmas(sigmas)
        whole = as_sigmas(full) if full is not None else given.full if given.full is not None else given
        values = given[:]
        if not torch.equal(values, values.round()) or values[0] >= len(self.alphas_cumprod):
            count = len(self.alphas_cumprod)
            raise ValueError(f"sigmas: DDIM wanted integers below {count} (see ff.sigmas_from), got {values.tolist()}")
        if bool((values[1:-1] >= values[:-2]).any()):
            raise ValueError(
                f"sigmas: DDIM wanted falling timesteps (the last two may be equal), got {values.tolist()}"
            )
        return Grid(values, given.timesteps if isinstance(sigmas, Sigmas) else values[:-1], whole[:])
