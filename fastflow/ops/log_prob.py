"""`ff.log_prob`: the log-probability of a stored transition, with a closed-form gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends
from ..guidance import CFG
from . import checks, library  # noqa: F401  (registers the operators)

if TYPE_CHECKING:
    from ..dynamics import At


def log_prob(
    sample: Tensor,
    velocity: Tensor,
    next_sample: Tensor,
    at: At,
    *,
    uncond: Tensor | None = None,
    guidance: CFG | None = None,
    uncond_grad: bool = False,
    score: str | None = None,
    mask: Tensor | None = None,
    reduce: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Log-probability of stored transitions: [B] float32, nats, mean over elements ([B, *] under reduce="none").

    At equal velocities it equals the `log_prob` of the rollout bit for bit: the same kernel scores both.

    sample, next_sample: the stored states [B, *], in the dtype they were stored in; never cast.
    velocity, uncond, guidance: as in `ff.step`. uncond gets a gradient only with uncond_grad=True (flow_grpo detaches it).
    score, mask, reduce, backend: as in `ff.step`.

    The gradient is closed form, d log_prob / d velocity = 2 w b (next_sample - mean) / N, and saves its inputs alone.
    Raises ValueError or TypeError naming the argument, BackendError where a named backend cannot serve the call.
    """
    sample = checks.state(sample)
    velocity = checks.like("velocity", velocity, sample)
    next_sample = checks.like("next_sample", next_sample, sample)
    coef = checks.coefficients(at, sample)
    if isinstance(uncond, Tensor) and not uncond_grad:
        uncond = uncond.detach()
    velocity, uncond, scale, rescale, token = checks.guided(velocity, uncond, guidance, sample)
    score_index, reduce_index = checks.scoring(at, score, reduce)
    if mask is not None:
        mask = checks.like("mask", mask, sample, kind="bool")
    backends.check_name(backend)
    value: Tensor = torch.ops.fastflow.log_prob(
        sample, velocity, next_sample, coef, uncond, scale, mask, token, score_index, reduce_index, uncond_grad, rescale,
        backend,
    )  # fmt: skip
    return value
