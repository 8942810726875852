"""`ff.matching_loss`: losses of the forward process (AWM, DiffusionNFT, Diffusion-DPO, CRD, reward-weighted flow matching)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..noise import Noise
from ..ops import checks
from ..ops import matching as _operator  # noqa: F401  (registers it)
from . import matching_objectives as objectives

OBJECTIVES = ("mse", "awm", "nft", "dpo", "crd")


class MatchingRows(NamedTuple):
    """Means over the elements of each row, [B] each; own = velocity - target, old = old_velocity - target.

    square, cross and shift have a gradient in velocity.
    """

    square: Tensor  # own^2
    old_square: Tensor  # old^2
    cross: Tensor  # own old
    plus: Tensor  # |beta own + (1 - beta) old|
    minus: Tensor  # |(1 + beta) old - beta own|
    shift: Tensor  # (velocity - ref_velocity)^2


def noised(clean: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise: [B, *] in clean's dtype, what the network is asked about.

    clean: [B, *]. sigma: [B]. noise: ff.Noise(seeds, step), drawn anew by `matching_rows` and `matching_loss`, so that nobody
    keeps it; or a tensor [B, *]. Raises ValueError naming the argument.
    """
    clean = checks.state(clean)
    checks.per_row("sigma", sigma, clean, "clean")
    drawn = drawn_noise(noise, clean)
    level = sigma.to(drawn.dtype).reshape(-1, *[1] * (clean.dim() - 1))
    return ((1.0 - level) * clean.to(drawn.dtype) + level * drawn).to(clean.dtype)


def drawn_noise(noise: Noise | Tensor, clean: Tensor) -> Tensor:
    """[B, *] in the dtype of the arithmetic: drawn, or as given. Raises ValueError or TypeError naming the argument."""
    dtype = torch.float64 if clean.dtype == torch.float64 else torch.float32
    drawn = noise.sample(clean.shape[1:], dtype, clean.device) if isinstance(noise, Noise) else noise
    return checks.like("noise", drawn, clean).to(dtype)


def matching_rows(
    velocity: Tensor,
    clean: Tensor,
    noise: Noise | Tensor | None = None,
    *,
    old_velocity: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    target: Tensor | None = None,
    beta: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> MatchingRows:
    """The rows' means that forward-process losses are made of, in one pass over memory; the gradient takes one more.

    velocity:      [B, *] of the policy at (noised(clean, sigma, noise), sigma). clean: [B, *].
    noise:         as given to `ff.noised`; the target is noise - clean. Or target: [B, *] itself (SOAR's (z' - z0) / s').
    old_velocity:  [B, *] of the policy that sampled, or of a reference; ref_velocity: of a reference. Constants; absent: 0.
    beta:          mixes the two in `plus` and `minus` (DiffusionNFT). mask: bool [B, *], elements that count.

    Raises ValueError or TypeError naming the argument, BackendError for a named backend that has no such kernel.
    """
    clean = checks.state(clean)
    velocity = checks.like("velocity", velocity, clean)
    others = [
        None if t is None else checks.like(name, t, clean).detach()
        for name, t in (("old_velocity", old_velocity), ("ref_velocity", ref_velocity), ("target", target))
    ]
    if (noise is None) == (target is None):
        raise ValueError("noise, target: wanted one of the two, got " + ("neither" if noise is None else "both"))
    mask = None if mask is None else checks.like("mask", mask, clean, kind="bool")
    backends.check_name(backend)
    seeds = counter = explicit = None
    stream = offset = 0
    if isinstance(noise, Noise):
        if noise.seeds.shape[0] != clean.shape[0]:
            raise ValueError(f"noise.seeds: wanted one per row of clean, {clean.shape[0]}, got {noise.seeds.shape[0]}")
        seeds, counter = noise.counters(clean.device)
        stream, offset = noise.stream, noise.offset
    elif noise is not None:
        explicit = checks.like("noise", noise, clean).detach()
    means = torch.ops.fastflow.matching(
        velocity, clean.detach(), *others, explicit, seeds, counter, mask, stream, offset, backend, float(beta)
    )
    return MatchingRows(*means.unbind())


def matching_loss(
    velocity: Tensor,
    clean: Tensor,
    sigma: Tensor,
    noise: Noise | Tensor | None = None,
    *,
    objective: str = "mse",
    advantage: Tensor | None = None,
    old_velocity: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    clip: tuple[float, float] = (1.0, 1.0),
    beta: float = 1.0,
    advantage_max: float = 5.0,
    group_ids: Tensor | Sequence[int] | None = None,
    normalized: bool = True,
    kl_weight: float | Tensor = 0.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info) of a forward-process objective: no trajectory, no log-probability of a sampler, any solver for the samples.

    velocity, clean, noise, target, mask, backend: as in `ff.matching_rows`. sigma: [B], of velocity.
    objective: "mse":  mean of weight * square (times advantage where given): supervised, SOAR, reward-weighted regression.
               "awm":  log_prob = -weight * square, ratio to old_velocity's, the clipped surrogate of `advantage` (AWM, clip 1).
               "nft":  DiffusionNFT: with v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v, whose x0 errors are
                       sigma times theirs: advantage_max * mean(r L+ / beta + (1 - r) L- / beta), with L = mean(error^2) /
                       mean|error| (its divisor a constant, at least 1e-5) and
                       r = clamp(advantage / (2 advantage_max) + 1/2, 0, 1).
               "dpo":  rows 2i win over rows 2i + 1; old_velocity is the reference's: -log sigmoid of
                       -beta / 2 ((square - old_square) of the winner - that of the loser) (Diffusion-DPO, beta including T).
               "crd":  Centered Reward Distillation: a row's implicit reward is weight (old_square / |old| - square / |own|),
                       each mean |error| a constant, at least 1e-5 (normalized=False: 1, and a pass over old_velocity less). R,
                       its deviation from the mean of its group, is drawn to A, that of the r of "nft":
                       advantage_max / beta * mean((beta R - A)^2).
                       old_velocity is of the moving reference, which need not be the policy that sampled.
    weight:    [B], of the squares (AWM: 1, sigma, sigma^2, ...). advantage: [B].
    group_ids: for "crd": integers [B], equal for rows of one prompt, whose group is whole in the call; read on the host.
    kl_weight: of (velocity - ref_velocity)^2: a number, or [B] (`ff.adaptive_kl_weight`) (AWM, DiffusionNFT, CRD). CRD's
               reference is guided: `ff.CFG(4.5).combine(ref_velocity, ref_uncond)`.

    info: detached, on the device: square [B], kl (unweighted), and ratio [B], clip_fraction for "awm", margin [B / 2] for
    "dpo", implicit [B] for "crd". Raises ValueError or TypeError naming the argument.
    Sources, in the forms of their authors' code: AWM (arXiv 2509.25050), DiffusionNFT (2509.16117), Diffusion-DPO
    (2311.12908), CRD (2603.14128; its trainer in Flow-Factory, by the paper's first author, with its default even centring).
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: wanted one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective != "mse" and old_velocity is None:
        raise ValueError(
            f"old_velocity: wanted the sampling policy's (dpo, crd: the reference's) for objective={objective!r}, got None"
        )
    if objective in ("awm", "nft", "crd") and advantage is None:
        raise ValueError(f"advantage: wanted [B] for objective={objective!r}, got None")
    if objective == "crd" and group_ids is None:
        raise ValueError("group_ids: wanted integers [B] for objective='crd', got None")
    if ref_velocity is None and (isinstance(kl_weight, Tensor) or kl_weight):
        got = "a tensor" if isinstance(kl_weight, Tensor) else kl_weight
        raise ValueError(f"ref_velocity: wanted the reference's beside kl_weight={got}, got None")
    for name, number in (("beta", beta), ("advantage_max", advantage_max)):
        if not checks.is_number(number) or not 0.0 < number < float("inf"):
            raise ValueError(f"{name}: wanted a number above 0, got {number!r}")
    checks.clip_range(clip)
    if objective == "dpo" and len(clean) % 2:
        raise ValueError(f"clean: wanted pairs of rows (winner, loser) for objective='dpo', got {len(clean)} rows")
    level = checks.per_row("sigma", sigma, clean, "clean")
    rows = matching_rows(
        velocity, clean, noise, old_velocity=old_velocity, ref_velocity=ref_velocity, target=target, mask=mask, backend=backend,
        beta=beta if objective == "nft" else 1.0,
    )  # fmt: skip
    scale = 1.0 if weight is None else checks.per_row("weight", weight, clean, "clean")
    gain = None if advantage is None else checks.per_row("advantage", advantage, clean, "clean")
    if objective == "mse":
        each, told = objectives.mse(rows, scale, gain)
    elif objective == "dpo":
        each, told = objectives.dpo(rows, scale, beta)
    else:
        assert gain is not None and old_velocity is not None
        if objective == "awm":
            each, told = objectives.awm(rows, scale, gain, clip)
        elif objective == "nft":
            each, told = objectives.nft(rows, scale, level, gain, beta, advantage_max)
        else:
            groups, old_size = objectives.Groups(group_ids, len(clean), clean.device), None
            if normalized:
                with torch.no_grad():
                    old_size = matching_rows(old_velocity, clean, noise, target=target, mask=mask, backend=backend).plus
            each, told = objectives.crd(rows, scale, old_size, gain, groups, beta, advantage_max)
    info = {"square": rows.square.detach(), **told}
    loss = each.mean() if each.numel() else rows.square.sum()
    if ref_velocity is not None:
        strength = (
            checks.per_row("kl_weight", kl_weight, clean, "clean") if isinstance(kl_weight, Tensor) else kl_weight
        )
        pull = strength * rows.shift
        loss = loss + (pull.mean() if pull.numel() else pull.sum())
        info["kl"] = rows.shift.detach().mean() if pull.numel() else rows.shift.detach().sum()
    return loss, info
