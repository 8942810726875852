"""What launches of Triton kernels share: the geometry of a call, its configuration, the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _env
from .base import TILE, StepCall

if TYPE_CHECKING:
    from ..kernels.config import Config

ALIGNED = 16  # bytes of a vector load, and elements that row strides are counted in where they allow it
MIN_LOG = 7  # log2 of the fewest lanes that a row takes


def stride(t: Tensor | None) -> int:
    """Elements from one row to the next; 0 where one row serves all."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def alignment(numel: int, tensors: Sequence[Tensor | None]) -> int:
    """16 where elements, rows and row lengths all begin at multiples of 16, so that loads can be vectors; else 1."""
    bits = numel
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr() | stride(t)
    return 1 if bits % ALIGNED else ALIGNED


@functools.cache
def _device_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


def chosen_config(device: torch.device) -> Config:
    """The launch configuration of a device, by its name; the default where there is no device to ask."""
    from ..kernels import config

    if _env.triton_interpret():
        return config.INTERPRETED
    return config.for_device(_device_name(device.index or 0)) if device.type == "cuda" else config.DEFAULT


class Launch:
    """The geometry of one call, and its kernels' common arguments. `elements`: every tensor read or written in full."""

    def __init__(self, call: StepCall, chosen: Config, elements: Sequence[Tensor | None]) -> None:
        self.call = call
        self.tiles = -(-call.numel // TILE)
        # a block never exceeds the row by more than padding to a power of two of tiles
        self.block_tiles = min(chosen.block // TILE, 1 << (self.tiles - 1).bit_length())
        self.programs = -(-self.tiles // self.block_tiles)
        # rows shorter than a tile take fewer lanes, and a warp for every 512
        self.log_tile = min(max((call.numel - 1).bit_length(), MIN_LOG), TILE.bit_length() - 1)
        self.guided = call.uncond is not None and call.scale is not None
        self.rescale = call.rescale if self.guided else "none"
        warps = min(chosen.num_warps, max(1, (self.block_tiles << self.log_tile) // 512))
        outer, channels, inner = call.token
        by_token = self.rescale == "token"
        self.align = alignment(call.numel | (inner if by_token and inner > 1 else 0), elements)
        self.units = call.numel // self.align
        options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
        self.block = {"TILES": self.block_tiles, "LOG": self.log_tile, "ALIGN": self.align, **options}
        self.tokens = outer * inner
        self.inner = inner // self.align if by_token and inner > 1 else 0
        self.token = {"CHANNELS": channels if by_token else 0, "LAST": by_token and inner == 1}
        log_channels = max(channels - 1, 0).bit_length()
        self.block_tokens = max(1, min(chosen.block >> log_channels, 1 << max(self.tokens - 1, 0).bit_length()))
        self.token_programs = -(-self.tokens // self.block_tokens)
        options["num_warps"] = min(chosen.token_warps, max(1, (self.block_tokens << log_channels) // 512))
        self.tokenwise = {
            "TOKENS": self.block_tokens,
            "LOG": log_channels,
            **self.token,
            "ALIGN": self.align,
            **options,
        }
        self.lanes = {"LANES": chosen.lanes, "UNROLL": chosen.unroll, "num_warps": 1, "enable_fp_fusion": False}
        self.row_programs = -(-call.batch // chosen.lanes)

    def row(self, t: Tensor | None) -> int:
        """Row stride of a tensor of elements, in units."""
        return stride(t) // self.align

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.sample.device)

    def counts(self) -> Tensor | None:
        """How many elements of each row the mask keeps, int32 [batch]; None without a mask."""
        from ..kernels import log_prob_backward

        mask = as_bytes(self.call.mask)
        if mask is None:
            return None
        counts = torch.zeros(self.call.batch, dtype=torch.int32, device=mask.device)
        log_prob_backward.count_kernel[(self.call.batch * self.programs,)](
            mask, counts, self.row(mask), self.units, self.programs, **self.block
        )
        return counts

    def factors(
        self, velocity: Tensor, uncond: Tensor | None, totals: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The rescale factors of a pair of velocities, float32 [batch, tokens] or [batch, 1]."""
        from ..kernels import guidance

        call, batch = self.call, self.call.batch
        pair = (velocity, uncond, call.scale, index)
        rows = (self.row(velocity), self.row(uncond), stride(call.scale), velocity.shape[0])
        if call.rescale == "token":
            factors = self.scratch(batch, self.tokens)
            guidance.token_factor_kernel[(batch * self.token_programs,)](
                *pair, factors, *rows, self.tokens, self.token_programs, self.inner, **self.tokenwise
            )  # fmt: skip
            return factors
        squares, guided_squares = self.scratch(self.tiles, batch), self.scratch(self.tiles, batch)
        guidance.sample_square_kernel[(batch * self.programs,)](
            *pair, squares, guided_squares, *rows, self.units, batch, self.programs, **self.block
        )  # fmt: skip
        factors = self.scratch(batch, 1)
        guidance.sample_factor_kernel[(self.row_programs,)](
            squares, guided_squares, factors, totals, batch, self.tiles, **self.lanes
        )
        return factors

    def others(self, shift: Tensor | None, drift: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """(ref_velocity, ref_uncond, its factors, old_mean) where they are wanted, else None; and three row strides."""
        if shift is None and drift is None:
            return (None, None, None, None), (0, 0, 0)
        call = self.call
        velocity = None if shift is None else call.ref_velocity
        uncond = call.ref_uncond if shift is not None and self.guided else None
        factors = None if velocity is None or self.rescale == "none" else self.factors(velocity, uncond)
        old_mean = None if drift is None else call.old_mean
        return (velocity, uncond, factors, old_mean), (self.row(velocity), self.row(uncond), self.row(old_mean))


def on_device(t: Tensor) -> Any:
    """Triton launches on the current device; make it the tensors'."""
    return torch.cuda.device(t.device if t.is_cuda else -1)


@functools.cache
def ready(device: torch.device) -> None:
    """Loads what FASTFLOW_CACHE_DIR holds for the device, before its first launch. Raises CacheError if that is stale."""
    folder = _env.cache_dir()
    if folder is None or _env.triton_interpret():
        return
    from triton.runtime import driver

    from ..compile import cache

    cache.load(folder, f"sm_{driver.active.get_current_target().arch}")
