"""`ff.policy_loss`: the clipped policy gradient of stored transitions and its kin, in one pass forward and one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends
from ..guidance import CFG
from ..ops import checks
from ..ops import policy as _operator  # noqa: F401  (registers it)
from ..transfer import upload

if TYPE_CHECKING:
    from ..dynamics import At

OBJECTIVES = ("ppo", "guard", "guard_ratio", "dppo")
KLS = ("gaussian", "flow_grpo", "mean", "velocity", "log_ratio")
INFO = ("rows", "ratio_mean", "ratio_max", "ratio_min", "clip_fraction", "approx_kl", "kl")


def policy_loss(
    sample: Tensor,
    velocity: Tensor,
    next_sample: Tensor,
    at: At,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: tuple[float, float] = (1e-4, 1e-4),
    uncond: Tensor | None = None,
    guidance: CFG | None = None,
    uncond_grad: bool = False,
    ref_velocity: Tensor | None = None,
    ref_uncond: Tensor | None = None,
    kl: str | None = None,
    kl_weight: float = 0.0,
    row_weight: Tensor | None = None,
    old_mean: Tensor | None = None,
    mask: Tensor | None = None,
    objective: str = "ppo",
    divergence: float = 1e-5,
    score: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): the mean over rows of the clipped surrogate, plus kl_weight times the KL to a reference network.

        ratio = exp(log_prob - old_log_prob)      row = max(-advantage ratio, -advantage clamp(ratio, 1 - clip[0], 1 + clip[1]))

    sample, velocity, next_sample, at, uncond, guidance, mask, score: as in `ff.log_prob`, whose bits these are.
    old_log_prob:  [B], of the rollout. advantage: [B]; constants, like sample and next_sample.
    uncond_grad:   whether uncond gets a gradient too (flow_grpo detaches it).
    ref_velocity, ref_uncond: [B, *] of the reference network, guided as velocity is; constants. For all kl but "log_ratio".
    kl:            "gaussian": the true KL of the two transitions, mean over elements of (b (v - v_ref))^2 / (2 std^2);
                   "flow_grpo": the same without the step in std, as flow_grpo's SD3 (times sigma - sigma_next);
                   "mean": (b (v - v_ref))^2 (Flow-Factory x-based); "velocity": (v - v_ref)^2 (v-based, AWM, DiffusionNFT);
                   "log_ratio": (log_prob - old_log_prob)^2 / 2 (MixGRPO).
    row_weight:    [B], or [] for all: multiplies each row's surrogate, not its KL (`ff.noise_aware_weight(at)` of TempFlow).
    old_mean:      [B, *], of the rollout (keep=("mean",)); needed by "guard", "guard_ratio" and "dppo".
    objective:     "ppo"; "guard_ratio": ratio = exp((log_prob - old_log_prob + drift) std), with drift the mean of
                   (mean - old_mean)^2 / (2 std^2) (GRPO-Guard's normalised ratio); "guard": that, each row over
                   sigma - sigma_next (its gradient re-weighting); "dppo": Flow-DPPO, no clip, but a row whose ratio has left 1
                   in the advantage's direction with a drift above `divergence` gives nothing. "guard" and kl "flow_grpo" are
                   meant for flow: std and sigma - sigma_next are each row's (the authors' code takes their means over the
                   batch, the same for one step), and under `ff.DDIM` sigma counts timesteps.
    backend:       as in `ff.step`.

    Rows with std 0 under a Gaussian score have weight 0 and leave the mean. Under "square" they count; their Gaussian terms (kl
    "gaussian" and "flow_grpo", the drift) are 0, since no Gaussian is there, and "guard" multiplies by 1 for std.
    loss: float32, a scalar; 0 if no row counts (ratio_max is -inf then, ratio_min inf).
    info: detached tensors on the device, read by none: ratio_mean, ratio_max, ratio_min, clip_fraction, approx_kl (half the
    mean square of the log-ratio), kl, rows (that count), and [B]: log_prob, ratio, kl_row.
    The backward saves the inputs alone and writes one gradient in velocity's dtype (two with uncond_grad).
    Raises ValueError or TypeError naming the argument, BackendError where a named backend cannot serve the call.
    Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (2510.22319), Flow-DPPO, TempFlow-GRPO (2508.04324), in the forms of
    their authors' code.
    """
    sample = checks.state(sample)
    velocity = checks.like("velocity", velocity, sample)
    next_sample = checks.like("next_sample", next_sample, sample)
    coef = checks.coefficients(at, sample)
    _check(clip, kl, kl_weight, objective, ref_velocity, ref_uncond, uncond, old_mean, divergence)
    if isinstance(uncond, Tensor) and not uncond_grad:
        uncond = uncond.detach()
    velocity, uncond, scale, rescale, token = checks.guided(velocity, uncond, guidance, sample)
    score_index, _ = checks.scoring(at, score, "mean")
    old_log_prob = checks.per_row("old_log_prob", old_log_prob, sample, "sample")
    advantage = checks.per_row("advantage", advantage, sample, "sample")
    if isinstance(row_weight, Tensor) and row_weight.dim() == 0:
        row_weight = upload(row_weight, sample.device).expand(sample.shape[0])
    weight = None if row_weight is None else checks.per_row("row_weight", row_weight, sample, "sample")
    backends.check_name(backend)
    if ref_velocity is not None and kl in (None, "log_ratio"):
        ref_velocity = ref_uncond = None
    if ref_velocity is not None:
        ref_velocity = checks.like("ref_velocity", ref_velocity, sample).detach()
        if ref_uncond is not None:
            ref_uncond = checks.like("ref_uncond", ref_uncond, sample).detach()
            if ref_uncond.dtype != ref_velocity.dtype:
                wanted = f"the dtype of ref_velocity, {ref_velocity.dtype}"
                raise TypeError(f"ref_uncond: wanted {wanted}, got {ref_uncond.dtype}")
        if guidance is not None and guidance.dtype == "velocity":
            ref_velocity, ref_uncond, *_ = checks.guided(ref_velocity, ref_uncond, guidance, sample)
    drifts = objective != "ppo"
    old_mean = checks.like("old_mean", old_mean, sample).detach() if drifts else None
    mask = None if mask is None else checks.like("mask", mask, sample, kind="bool")
    info, rows, log_prob = torch.ops.fastflow.policy(
        sample.detach(), velocity, next_sample.detach(), coef, uncond, scale, ref_velocity, ref_uncond, old_mean, mask, token,
        score_index, uncond_grad, rescale, backend, old_log_prob, advantage, weight, 1.0 - clip[0], 1.0 + clip[1],
        float(kl_weight), float(divergence), OBJECTIVES.index(objective), KLS.index(kl) + 1 if kl is not None else 0,
    )  # fmt: skip
    told = info.detach().unbind()
    named: dict[str, Tensor] = dict(zip(INFO, told[1:], strict=True))
    named.update(log_prob=log_prob, ratio=rows[0])
    if kl is None:
        named.pop("kl")
    else:
        named["kl_row"] = rows[1]
    return info[0], named


def _check(
    clip: tuple[float, float], kl: str | None, kl_weight: float, objective: str, ref_velocity: Tensor | None,
    ref_uncond: Tensor | None, uncond: Tensor | None, old_mean: Tensor | None, divergence: float,
) -> None:  # fmt: skip
    checks.clip_range(clip)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: wanted one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if kl is not None and kl not in KLS:
        raise ValueError(f"kl: wanted None or one of {', '.join(KLS)}, got {kl!r}")
    if not checks.is_number(kl_weight) or not 0.0 <= kl_weight < float("inf"):
        raise ValueError(f"kl_weight: wanted a number of at least 0, got {kl_weight!r}")
    if kl_weight and kl is None:
        raise ValueError(f"kl: wanted the name of one beside kl_weight={kl_weight}, got None ({', '.join(KLS)})")
    if kl not in (None, "log_ratio") and ref_velocity is None:
        raise ValueError(f"ref_velocity: wanted the reference network's velocity for kl={kl!r}, got None")
    if ref_velocity is not None and kl not in (None, "log_ratio") and (ref_uncond is None) != (uncond is None):
        given, wanted = ("None", "a tensor") if ref_uncond is None else ("a tensor", "None")
        raise ValueError(f"ref_uncond: wanted {wanted}, as uncond is, got {given}")
    if objective != "ppo" and old_mean is None:
        raise ValueError(
            f'old_mean: wanted the rollout\'s means for objective={objective!r} (keep=("mean",)), got None'
        )
    if not checks.is_number(divergence) or not divergence >= 0.0:
        raise ValueError(f"divergence: wanted at least 0, got {divergence}")
