"""The objectives of `ff.matching_loss`, from the means of its rows: the loss of each row (of each pair under dpo), and what is
told of it. `scale` [B] (or 1) weighs the squares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .credit_rows import group_numbers

if TYPE_CHECKING:
    from .matching import MatchingRows

Loss = tuple[Tensor, dict[str, Tensor]]
LEAST = 1e-5  # of a mean |error| that divides


def share(advantage: Tensor, most: float) -> Tensor:
    """clamp(advantage / (2 most) + 1/2, 0, 1): an advantage as a reward between 0 and 1."""
    return (advantage / (2.0 * most) + 0.5).clamp(0.0, 1.0)


def mse(rows: MatchingRows, scale: Tensor | float, advantage: Tensor | None) -> Loss:
    return scale * rows.square * (1.0 if advantage is None else advantage), {}


def awm(rows: MatchingRows, scale: Tensor | float, advantage: Tensor, clip: tuple[float, float]) -> Loss:
    ratio = (scale * (rows.old_square - rows.square)).exp()
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    each = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    outside = (ratio < low) | (ratio > high)
    return each, {"ratio": ratio.detach(), "clip_fraction": outside.float().sum() / max(len(outside), 1)}


def nft(rows: MatchingRows, scale: Tensor | float, sigma: Tensor, advantage: Tensor, beta: float, most: float) -> Loss:
    """Squares of the errors of v+ and v- from the three products of own and old, so that one pass serves both."""
    plus = beta * beta * rows.square + 2.0 * beta * (1.0 - beta) * rows.cross + (1.0 - beta) ** 2 * rows.old_square
    minus = (1.0 + beta) ** 2 * rows.old_square - 2.0 * beta * (1.0 + beta) * rows.cross + beta * beta * rows.square
    losses = [
        sigma * sigma * square / (sigma * size.detach()).clamp(min=LEAST)
        for square, size in ((plus, rows.plus), (minus, rows.minus))
    ]
    positive = share(advantage, most)
    return most * (positive * losses[0] + (1.0 - positive) * losses[1]) / beta * scale, {}


def dpo(rows: MatchingRows, scale: Tensor | float, beta: float) -> Loss:
    gap = scale * (rows.square - rows.old_square)
    margin = -0.5 * beta * (gap[0::2] - gap[1::2])
    return -torch.nn.functional.logsigmoid(margin), {"margin": margin.detach()}


def crd(
    rows: MatchingRows, scale: Tensor | float, old_size: Tensor | None, advantage: Tensor, groups: Groups, beta: float,
    most: float,
) -> Loss:  # fmt: skip
    """old_size: [B], the old network's mean |error|; None: squares are not divided by mean |error|."""
    square, old_square = rows.square, rows.old_square
    if old_size is not None:
        square, old_square = square / rows.plus.detach().clamp(min=LEAST), old_square / old_size.clamp(min=LEAST)
    implicit = scale * (old_square - square)
    gap = beta * groups.centered(implicit) - groups.centered(share(advantage, most))
    return (most / beta) * gap.square(), {"implicit": implicit.detach()}


class Groups:
    """Rows of one prompt, found once for a call. group_ids: integers [B], as `ff.group_advantages` takes them."""

    def __init__(self, group_ids: Any, batch: int, device: torch.device) -> None:
        ids = group_numbers(group_ids, batch, "clean")
        groups, members = torch.unique(ids, return_inverse=True)
        held: Tensor = members[None] == torch.arange(len(groups))[:, None]  # [G, B]
        self.members, self.held = members.to(device), held.to(device)

    def centered(self, values: Tensor) -> Tensor:
        """[B]: each value less the mean of its group, which is a constant: the loss's gradient in it is 0."""
        held = torch.where(self.held, values.detach(), 0.0).sum(1)
        return values - (held / self.held.sum(1))[self.members]


def adaptive_kl_weight(
    advantage: Tensor, most: float = 0.1, *, least: float = 1e-4, advantage_max: float = 5.0
) -> Tensor:
    """CRD's KL strength by row, [B], for `ff.matching_loss(kl_weight=...)`: least + (most - least) r, most at the best reward,
    with r = clamp(advantage / (2 advantage_max) + 1/2, 0, 1).

    advantage: floats [B]. Raises ValueError for an advantage_max that is not above 0.
    Source: CRD (arXiv 2603.14128), its first author's trainer and its defaults.
    """
    if not advantage_max > 0.0:
        raise ValueError(f"advantage_max: wanted a number above 0, got {advantage_max}")
    return least + (most - least) * share(advantage, advantage_max)
