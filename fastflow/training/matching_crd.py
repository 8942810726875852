"""What Centered Reward Distillation adds to a matching loss (arXiv 2603.14128; formulas of its first author's trainer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .credit_rows import group_numbers


def share(advantage: Tensor, most: float) -> Tensor:
    """clamp(advantage / (2 most) + 1/2, 0, 1): an advantage as a reward between 0 and 1."""
    return (advantage / (2.0 * most) + 0.5).clamp(0.0, 1.0)


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
