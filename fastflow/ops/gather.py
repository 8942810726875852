"""`ff.step(rows=...)`: rows of sample, velocity and uncond through an index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks


def index(given: Any, sample: Tensor) -> Tensor:
    """int64 [B] of rows of sample. Where they lie on a CPU each must name one; elsewhere kernels clamp and flag them."""
    given = checks.tensor("rows", given)
    if given.dtype not in (torch.int64, torch.int32) or given.dim() != 1:
        raise ValueError(f"rows: wanted int64 [B], a row of sample each, got {given.dtype} {tuple(given.shape)}")
    if given.device != sample.device:
        raise ValueError(f"rows: wanted the device of sample, {sample.device}, got {given.device}")
    sources = sample.shape[0]
    if sources == 0 and given.shape[0]:
        raise ValueError(f"rows: wanted none, as sample has no rows, got {given.shape[0]}")
    if given.shape[0] and _on_host(given):
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= sources:
            raise ValueError(f"rows: wanted 0 to {sources - 1}, got {low if low < 0 else high}")
    whole: Tensor = given.long().contiguous()
    return whole


def _on_host(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def shaped(sample: Tensor, rows: Tensor | None) -> Tensor:
    """A tensor of the shape, dtype and device of sample[rows], whose values nobody reads."""
    return sample if rows is None else sample.new_empty(()).expand(rows.shape[0], *sample.shape[1:])


def copied(
    rows: Tensor, sample: Tensor, velocity: Tensor, uncond: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample, velocity, uncond) at the rows, and where an index that only the device knows named none and was clamped."""
    lost = None
    if not _on_host(rows):
        near = rows.clamp(0, max(sample.shape[0] - 1, 0))
        rows, lost = near, near != rows
    return (
        sample.index_select(0, rows),
        velocity.index_select(0, rows),
        None if uncond is None else uncond.index_select(0, rows),
        lost,
    )


def with_lost(flags: Tensor | None, lost: Tensor | None) -> Tensor | None:
    """The flags with bit 1 where `lost`."""
    return flags if flags is None or lost is None else flags + 2 * lost.to(torch.int32)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a row of `a` and one of `b` (contiguous each, at any stride) have an element in common."""
    if not a.numel() or not b.numel():
        return False
    (from_a, pitch_a, row_a), (from_b, pitch_b, row_b) = _extent(a), _extent(b)
    end_a, end_b = from_a + (len(a) - 1) * pitch_a + row_a, from_b + (len(b) - 1) * pitch_b + row_b
    if end_a <= from_b or end_b <= from_a:
        return False
    pitch = pitch_b if len(a) == 1 else pitch_a
    if pitch == 0 or len(a) == len(b) == 1 or (len(b) > 1 and pitch != pitch_b):
        return True
    gap = (from_b - from_a) % pitch  # rows of the two take turns
    return gap < row_a or pitch - gap < row_b


def _extent(t: Tensor) -> tuple[int, int, int]:
    """Address, bytes from row to row, bytes of a row."""
    return t.data_ptr(), t.stride(0) * t.element_size(), t.numel() // len(t) * t.element_size()
