"""Networks for rollouts: a real SD3 transformer of few layers, one whose rows never touch each other, and a recorder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff

SHAPE = (4, 8, 8)
PROMPTS = 3
TOKENS, WIDTH = 5, 16

Velocity = Callable[[Tensor, Tensor, Any], Tensor]


def transformer(layers: int = 1, **changes: Any) -> Any:
    """An SD3Transformer2DModel with random weights, large enough that prompt, sigma and state all show in its velocity."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: this is one of its networks")
    torch.manual_seed(7)
    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": SHAPE[0],
        "out_channels": SHAPE[0],
        "num_layers": layers,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "pos_embed_max_size": 8,
    }
    module = diffusers.SD3Transformer2DModel(**{**config, **changes}).requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.mul_(1.5)
    return module


def conditions(prompts: int = PROMPTS, tokens: int = TOKENS, *, seed: int = 0, width: int = WIDTH) -> dict[str, Tensor]:
    """One entry per prompt, as SD3 wants them."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "encoder_hidden_states": torch.randn(prompts, tokens, width, generator=generator),
        "pooled_projections": torch.randn(prompts, width, generator=generator),
    }


def rows_of(condition: Any, index: Tensor) -> Any:
    """The entries of prompts `index`: what a trainer gathers before it replays."""
    if condition is None:
        return None

    def rows(entry: Any) -> Any:
        if isinstance(entry, list):
            return [entry[i if len(entry) > 1 else 0] for i in index.tolist()]
        return entry.expand(len(index), *entry.shape[1:]) if len(entry) == 1 else entry[index]

    return {name: rows(entry) for name, entry in condition.items()}


class RowWise:
    """Products and sums of a row's own values: the same bits whatever other rows the call has. velocity in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __call__(self, sample: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        pooled = condition["pooled_projections"][:, : SHAPE[0], None, None]
        level = sigma[:, None, None, None]
        velocity = sample * (0.4 + level) - sample.flip(-1) * 0.3 + pooled * (1.5 - level)
        return velocity.to(self.dtype)


class Recorder:
    """Passes calls on and keeps what the network saw: rows, sigma and the first pooled value (which names the prompt)."""

    def __init__(self, model: Velocity) -> None:
        self.model = model
        self.rows: list[int] = []
        self.sigmas: list[Tensor] = []
        self.prompts: list[Tensor] = []
        self.samples: list[Tensor] = []

    def __call__(self, sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        self.rows.append(sample.shape[0])
        self.sigmas.append(sigma.clone())
        self.prompts.append(condition["pooled_projections"][:, 0].clone())
        self.samples.append(sample.clone())
        return self.model(sample, sigma, condition)


def seeds_of(group: int, prompts: int = PROMPTS) -> Tensor:
    return ff.sample_seeds(11, 0, list(range(prompts)), group)
