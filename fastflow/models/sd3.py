"""Stable Diffusion 3 and 3.5: `diffusers.SD3Transformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SD3:
    """A held SD3Transformer2DModel as a flow model; also the training forward, with the same casts.

    Conventions: latents [N, 16, H, W] unpacked; timestep = 1000 * sigma in float32; velocity = noise - x0; two-way CFG.

    condition: {"encoder_hidden_states": [N, L, D], "pooled_projections": [N, P]}.
    module:    the transformer (called as it is; no isinstance test, so a wrapper of it serves as well).
    config:    its config if the wrapper hides it; default: module.config where there is one.
    dtype:     what latents and embeddings are cast to; default: the dtype of the module's first floating parameter.
    """

    def __init__(self, module: Any, config: Any = None, dtype: torch.dtype | None = None) -> None:
        if not callable(module):
            raise TypeError(
                f"module: wanted an SD3Transformer2DModel (or a wrapper of one), got {type(module).__name__}"
            )
        self.module = module
        self.config = config if config is not None else getattr(module, "config", None)
        self.dtype = dtype if dtype is not None else _first_dtype(module)

    def __call__(self, sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """velocity [N, C, H, W] in the network's dtype. Raises ValueError or TypeError naming what the condition lacks."""
        self._check(sample, condition)
        result = self.module(
            hidden_states=sample.to(self.dtype),
            timestep=sigma.to(torch.float32) * 1000.0,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            pooled_projections=condition["pooled_projections"].to(self.dtype),
            return_dict=False,
        )
        velocity: Tensor = result[0]
        return velocity

    def _check(self, sample: Tensor, condition: Any) -> None:
        names = ("encoder_hidden_states", "pooled_projections")
        missing = [n for n in names if not isinstance(condition, dict) or not isinstance(condition.get(n), Tensor)]
        if missing:
            got = sorted(condition) if isinstance(condition, dict) else type(condition).__name__
            raise ValueError(f"condition: wanted tensors {', '.join(names)}, got {got}")
        channels = getattr(self.config, "in_channels", None)
        if sample.dim() != 4 or (channels is not None and sample.shape[1] != channels):
            raise ValueError(f"sample: wanted latents [N, {channels or 'C'}, H, W], got {tuple(sample.shape)}")


def _first_dtype(module: Any) -> torch.dtype:
    for parameter in getattr(module, "parameters", list)():
        if parameter.is_floating_point():
            dtype: torch.dtype = parameter.dtype
            return dtype
    return torch.float32
