"""Classifier-free guidance as data: how a conditional and an unconditional velocity are combined."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends.base import RESCALES

EDGE = 1e-6  # float32 sigmas this close to a bound are on it


@dataclass(frozen=True, eq=False)
class CFG:
    """guided = uncond + scale * (velocity - uncond), in float32, then the rescale.

    scale:    float; float32 [B], one per row; in a rollout also [T], one per step (rows of several steps: [T, B]).
    rescale:  "none"; "token": times |velocity| / |guided|, norms over `axis` (Qwen-Image's true CFG); "clamp": the same over
              the whole sample, only where it shrinks (Z-Image's cfg_normalization).
    axis:     the channel axis of a token in `sample` [B, *], for "token".
    calls:    1: both halves in one network call, unconditional rows first; 2: two calls (conditions of different length).
    interval: (low, high) of sigma in which guidance is on (integer timesteps: of a thousandth of them); outside, only the
              conditional network runs.
    dtype:    "float32", or "velocity": combine in the network's dtype, as hosts do that guide before their sampler.

    Raises ValueError for an unknown rescale or dtype, calls other than 1 or 2, and an empty interval.
    """

    scale: float | Tensor | Sequence[float]
    rescale: str = "none"
    axis: int = -1
    calls: int = 1
    interval: tuple[float, float] = (0.0, 1.0)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.rescale not in RESCALES:
            raise ValueError(f"rescale: wanted one of {', '.join(RESCALES)}, got {self.rescale!r}")
        if self.dtype not in ("float32", "velocity"):
            raise ValueError(f'dtype: wanted "float32" or "velocity", got {self.dtype!r}')
        if self.calls not in (1, 2):
            raise ValueError(f"calls: wanted 1 or 2, got {self.calls!r}")
        low, high = self.interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"interval: wanted 0 <= low < high <= 1 in sigma, got {self.interval}")
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        plain = isinstance(self.scale, (int, float))  # torch.compile reads numbers, and not in every version tensors
        finite = math.isfinite(float(self.scale)) if plain else bool(torch.isfinite(scale).all())  # type: ignore[arg-type]
        if scale.dim() > 2 or not finite:
            raise ValueError(
                f"scale: wanted finite numbers, scalar, [B], [T] or [T, B], got {self.scale} of shape {tuple(scale.shape)}"
            )
        object.__setattr__(self, "_tables", {})
        object.__setattr__(self, "_values", scale)

    @property
    def values(self) -> Tensor:
        """The scale as a float64 CPU tensor."""
        return self._values  # type: ignore[attr-defined,no-any-return]

    def on(self, sigma: float) -> bool:
        """Whether guidance is on at this sigma, an integer timestep in thousandths. The interval is closed; a sigma within
        1e-6 of a bound is on it, since float32 holds few decimals exactly.
        """
        return self.interval[0] - EDGE <= sigma <= self.interval[1] + EDGE

    def scale_rows(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The scale as [1] or [B] on the device, uploaded once."""
        tables: dict[Any, Tensor] = self._tables  # type: ignore[attr-defined]
        key = (device, dtype)
        if key not in tables:
            tables[key] = self.values.reshape(-1).to(device=device, dtype=dtype)
        return tables[key]

    def with_rows(self, scale: Tensor) -> CFG:
        """This guidance with its scales read from a tensor [B] on the device at every launch, as a captured graph needs it."""
        guidance = copy.copy(self)
        object.__setattr__(guidance, "_tables", {(scale.device, scale.dtype): scale})
        return guidance

    def combine(self, velocity: Tensor, uncond: Tensor) -> Tensor:
        """The guided velocity [B, *] as `ff.step` forms it inside, for a reference's KL or a step of one's own: float32, or
        float64 for float64, or the network's dtype with dtype="velocity". Plain torch, so that a gradient passes.

        velocity, uncond: [B, *] of one dtype, as `ff.evaluate` gives them. Raises ValueError or TypeError naming the argument.
        """
        from .ops.combine import combined  # ops imports this module

        return combined(velocity, uncond, self)

    def token(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """A row of `sample` of shape [B, *] seen as (outer, channels, inner) around `axis`."""
        rank = len(shape)
        axis = self.axis + rank if self.axis < 0 else self.axis
        if not 1 <= axis < rank:
            raise ValueError(f"axis: wanted an axis of sample {tuple(shape)} after the batch, got {self.axis}")
        outer = inner = 1
        for size in shape[1:axis]:
            outer *= size
        for size in shape[axis + 1 :]:
            inner *= size
        return outer, shape[axis], inner

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}
