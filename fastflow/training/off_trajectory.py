"""`ff.off_trajectory`: states beside the straight path, where a step of the network's own has led, and the way back (SOAR)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import philox
from ..noise import Noise
from ..ops import checks
from .matching import drawn_noise, noised

LEVELS = 1 << 31  # turned in the noise's stream, it gives a stream for the levels


class OffTrajectory(NamedTuple):
    """N points of each row, those of a row together: point n of row b is at b * N + n."""

    sample: Tensor  # [B * N, *], dtype of clean: what the network is asked about
    sigma: Tensor  # [B * N] float32 (float64 for float64)
    target: Tensor  # [B * N, *] float32 (float64 for float64): (sample - clean) / sigma


def off_trajectory(
    clean: Tensor,
    sigma: Tensor,
    noise: Noise | Tensor,
    velocity: Tensor,
    sigma_next: Tensor,
    levels: int | Tensor = 6,
    *,
    reach: float | None = None,
) -> OffTrajectory:
    """SOAR's points: one Euler step of the network off the path, noised again towards the same noise, with their targets.

        stepped = noised(clean, sigma, noise) + (sigma_next - sigma) velocity
        sample  = stepped + (level - sigma_next) / (1 - sigma_next) (noise - stepped)        target = (sample - clean) / level

    The velocity that goes from `sample` to `clean` in a straight line: noise - clean where `velocity` was.

    clean:      [B, *]. sigma: [B] in (0, 1]. noise: as given to `ff.noised`.
    velocity:   [B, *] of the network at (noised(clean, sigma, noise), sigma), guided (`ff.CFG(4.5).combine`); a constant.
    sigma_next: [B] in (0, sigma): a step of the sampler further, SOAR's of 40.
    levels:     how many are drawn for each row, evenly between sigma_next and 1, by the seeds and step of `noise` (ff.Noise)
                in a stream of their own; or the levels, floats [B, N] between sigma_next and 1.
    reach:      drawn levels end at min(reach * sigma, 1) instead.

    A row's points do not depend on the other rows of the call. No gradient. The loss is
    `ff.matching_loss(model(points.sample, points.sigma, ...), points.sample, points.sigma, target=points.target)`.
    Raises ValueError or TypeError naming the argument; values that are on a GPU are not looked at.
    Source: SOAR (arXiv 2604.12617) and its authors' code: one ODE path, 6 points, levels up to 1 (their code reads its option
    of 1.5 for `reach` and leaves it unused).
    """
    clean = checks.state(clean).detach()
    now, after = (
        checks.per_row("sigma", sigma, clean, "clean"),
        checks.per_row("sigma_next", sigma_next, clean, "clean"),
    )
    if clean.device.type == "cpu" and not bool(((after > 0.0) & (after < now) & (now <= 1.0)).all()):
        raise ValueError(
            f"sigma_next: wanted 0 < sigma_next < sigma <= 1, got {sigma_next.tolist()} from {sigma.tolist()}"
        )
    table = _levels(levels, noise, now, after, reach)
    drawn = drawn_noise(noise, clean).detach()
    ones = [1] * (clean.dim() - 1)
    slope = checks.like("velocity", velocity, clean).detach().to(drawn.dtype)
    stepped = noised(clean, sigma, drawn).to(drawn.dtype) + (after - now).reshape(-1, *ones) * slope
    back = ((table - after[:, None]) / (1.0 - after[:, None])).reshape(*table.shape, *ones)
    sample = (stepped[:, None] + back * (drawn - stepped)[:, None]).to(clean.dtype)
    target = (sample.to(drawn.dtype) - clean.to(drawn.dtype)[:, None]) / table.reshape(*table.shape, *ones)
    return OffTrajectory(sample.flatten(0, 1), table.flatten(), target.flatten(0, 1))


def _levels(levels: int | Tensor, noise: Noise | Tensor, now: Tensor, after: Tensor, reach: float | None) -> Tensor:
    """[B, N], as given or drawn."""
    if isinstance(levels, Tensor):
        if (
            levels.dim() != 2
            or len(levels) != len(now)
            or not levels.is_floating_point()
            or levels.device != now.device
        ):
            shown = f"{levels.dtype} {tuple(levels.shape)} on {levels.device}"
            raise ValueError(f"levels: wanted a number of them, or floats [{len(now)}, N] on {now.device}, got {shown}")
        table = levels.detach().to(now.dtype)
        if now.device.type == "cpu" and not bool(((table >= after[:, None]) & (table <= 1.0)).all()):
            raise ValueError(f"levels: wanted sigma_next <= levels <= 1, got {levels.tolist()} from {after.tolist()}")
        return table
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise ValueError(f"levels: wanted at least 1 of them, or floats [{len(now)}, N], got {levels!r}")
    if not isinstance(noise, Noise):
        raise ValueError(
            "levels: wanted floats [B, N] beside noise that is a tensor: ff.Noise alone has seeds to draw them by"
        )
    if reach is not None and not reach >= 1.0:
        raise ValueError(f"reach: wanted at least 1, or None, got {reach}")
    if len(noise.seeds) != len(now):
        raise ValueError(f"noise.seeds: wanted one per row of clean, {len(now)}, got {len(noise.seeds)}")
    seeds, step = noise.counters(now.device)
    place = philox.uniform(seeds, step, levels, stream=noise.stream ^ LEVELS)
    end = torch.ones_like(now) if reach is None else (reach * now).clamp(max=1.0)
    low, high = after.double()[:, None], end.double()[:, None]
    return (low + place * (high - low)).to(now.dtype)
