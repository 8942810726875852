"""The guided velocity by itself, in the arithmetic of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference
from ..backends.base import StepCall
from ..guidance import CFG
from . import checks


def combined(velocity: Tensor, uncond: Tensor, guidance: CFG) -> Tensor:
    """[B, *]; see `CFG.combine`."""
    sample = checks.like("velocity", velocity, checks.tensor("velocity", velocity))
    v, u, scale, rescale, token = checks.guided(sample, uncond, guidance, sample)
    if u is None or scale is None:
        return v
    batch = len(v)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    numel = v.numel() // max(batch, 1)
    call = StepCall(
        batch, numel, v, v, u, scale[:, None], scale, rescale, token, None, None, None, 0, 0, None, None, 0, 0, True,
        "float32", wide,
    )  # fmt: skip
    guided, _ = reference.combine(v.reshape(batch, numel).to(wide), u.reshape(batch, numel).to(wide), scale, call)
    return guided.reshape(v.shape)
