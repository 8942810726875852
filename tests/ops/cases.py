"""Inputs of a step, and the step's formulas written down a second time, in float64 and in plain float32 PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastflow as ff

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
SD3 = ff.Sigmas(VECTORS["sigmas_sd3_shift3_T10"])
ALL = ("next_sample", "log_prob", "clean", "ode_next", "mean", "flags")
GUIDANCE = {
    "none": ff.CFG(4.5),
    "token": ff.CFG(4.0, rescale="token", axis=1),
    "token_last": ff.CFG(4.0, rescale="token"),
    "clamp": ff.CFG(4.0, rescale="clamp"),
}


def inputs(
    shape: tuple[int, ...] = (3, 4, 6, 5),
    sample: torch.dtype = torch.float32,
    velocity: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)

    return {
        "sample": draw(sample),
        "velocity": draw(velocity),
        "uncond": draw(velocity),
        "noise": draw(torch.float32),
        "mask": torch.rand(shape, generator=make) > 0.3,
    }


def column(at: Any, name: str, like: Tensor) -> Tensor:
    """A float64 coefficient, shaped to broadcast against [B, *]."""
    value = getattr(at, name)
    return value.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def guided(velocity: Tensor, uncond: Tensor | None, guidance: ff.CFG | None) -> Tensor:
    if uncond is None or guidance is None:
        return velocity
    scale = guidance.values.to(velocity.dtype).reshape(-1, *[1] * (velocity.dim() - 1))
    result = uncond + scale * (velocity - uncond)
    if guidance.rescale == "token":
        result = result * velocity.norm(dim=guidance.axis, keepdim=True) / result.norm(dim=guidance.axis, keepdim=True)
    if guidance.rescale == "clamp":
        dims = tuple(range(1, velocity.dim()))
        norm, own = velocity.square().sum(dims, keepdim=True).sqrt(), result.square().sum(dims, keepdim=True).sqrt()
        result = torch.where(own > norm, result * norm / own, result)
    return result


def formulas(
    data: dict[str, Tensor],
    at: Any,
    dtype: torch.dtype,
    *,
    guidance: ff.CFG | None = None,
    next_sample: Tensor | None = None,
    score: str = "gaussian",
    reduce: str = "mean",
    masked: bool = False,
) -> dict[str, Tensor]:
    """All outputs in `dtype` arithmetic, by torch's own norms, means and operation order. next_sample: what is scored."""
    x, v = data["sample"].to(dtype), data["velocity"].to(dtype)
    v = guided(v, data["uncond"].to(dtype) if guidance is not None else None, guidance)
    col = {n: column(at, n, x) for n in ("a", "b", "std", "p", "q", "ode_a", "ode_b")}
    mean = x * col["a"] + v * col["b"]
    result = {
        "mean": mean,
        "clean": x * col["p"] + v * col["q"],
        "ode_next": x * col["ode_a"] + v * col["ode_b"],
        "next_sample": mean + col["std"] * data["noise"].to(dtype),
    }
    scored = result["next_sample"] if next_sample is None else next_sample.to(dtype)
    square = (scored - mean).square()
    value = -square if score == "square" else -square / (2 * col["std"].square())
    if score == "gaussian":
        value = value - col["std"].log() - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)).to(dtype)
    weight = data["mask"].to(dtype) if masked else torch.ones_like(value)
    value = value * weight
    if reduce != "none":
        value = value.flatten(1).sum(1)
        if reduce == "mean":
            value = value / weight.flatten(1).sum(1)
    result["log_prob"] = value
    return result
