"""Arguments are checked once, here, before anything is launched or overwritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.base import REDUCTIONS
from ..dynamics.columns import SCORES
from ..guidance import CFG

if TYPE_CHECKING:
    from ..dynamics import At

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    return value


def is_row_contiguous(t: Tensor) -> bool:
    """Whether every row of [B, *] is contiguous, at any row stride."""
    if t.is_contiguous() or t.dim() < 2:
        return t.dim() != 1 or t.is_contiguous()
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def rows(t: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous and memory holds its values, else a copy."""
    return t.resolve_neg() if is_row_contiguous(t) else t.contiguous()


def state(sample: Any) -> Tensor:
    sample = tensor("sample", sample)
    if sample.dtype not in STATE_DTYPES:
        raise TypeError(f"sample: wanted float32, bfloat16, float16 or float64, got {sample.dtype}")
    if sample.dim() < 2:
        raise ValueError(
            f"sample: wanted [B, *] with at least one axis after the batch, got shape {tuple(sample.shape)}"
        )
    return rows(sample)


def like(name: str, value: Any, sample: Tensor, *, kind: str = "float") -> Tensor:
    """A tensor of sample's shape and device. kind: "float", or "bool" for masks."""
    value = tensor(name, value)
    if value.shape != sample.shape:
        raise ValueError(f"{name}: wanted the shape of sample {tuple(sample.shape)}, got {tuple(value.shape)}")
    if value.device != sample.device:
        raise ValueError(f"{name}: wanted the device of sample, {sample.device}, got {value.device}")
    if kind == "bool":
        if value.dtype != torch.bool:
            raise TypeError(f"{name}: wanted dtype bool (True where an element counts), got {value.dtype}")
    elif value.dtype not in STATE_DTYPES:
        raise TypeError(f"{name}: wanted float32, bfloat16, float16 or float64, got {value.dtype}")
    return rows(value)


def coefficients(at: Any, sample: Tensor) -> Tensor:
    """Rows of the table, [1 or B, 16] on sample's device."""
    if not hasattr(at, "rows"):
        raise TypeError(f"at: wanted coefficients from `transitions.at(i)`, got {type(at).__name__}")
    coef: Tensor = at.rows(sample.device, torch.float64 if sample.dtype == torch.float64 else torch.float32)
    if coef.shape[0] not in (1, sample.shape[0]):
        raise ValueError(f"at: wanted one step, or one per row of sample [{sample.shape[0]}], got {coef.shape[0]} rows")
    return coef


def guided(
    velocity: Tensor, uncond: Any, guidance: Any, sample: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, str, tuple[int, int, int]]:
    """(velocity, uncond, scale [1 or B], rescale, token) of the combine."""
    whole = (1, 1, 1)
    if uncond is None and guidance is None:
        return velocity, None, None, "none", whole
    if uncond is None:
        raise ValueError("uncond: wanted the unconditional velocity beside guidance, got None")
    if guidance is None:
        raise ValueError("guidance: wanted ff.CFG(scale) beside uncond, got None")
    if not isinstance(guidance, CFG):
        raise TypeError(f"guidance: wanted ff.CFG(scale, ...), got {type(guidance).__name__}")
    uncond = like("uncond", uncond, velocity)
    if uncond.dtype != velocity.dtype:
        raise TypeError(f"uncond: wanted the dtype of velocity, {velocity.dtype}, got {uncond.dtype}")
    scale = guidance.scale_rows(sample.device, torch.float64 if sample.dtype == torch.float64 else torch.float32)
    if scale.shape[0] not in (1, sample.shape[0]):
        raise ValueError(f"guidance.scale: wanted one number or one per row [{sample.shape[0]}], got {scale.shape[0]}")
    if guidance.dtype == "velocity":
        if guidance.rescale != "none":
            raise ValueError('guidance: wanted rescale="none" beside dtype="velocity", got ' + repr(guidance.rescale))
        wide = scale.to(velocity.dtype).reshape(-1, *[1] * (sample.dim() - 1))
        return uncond + wide * (velocity - uncond), None, None, "none", whole
    token = guidance.token(sample.shape) if guidance.rescale == "token" else whole
    return velocity, uncond, scale, guidance.rescale, token


def per_row(name: str, value: Any, rows: Tensor, of: str) -> Tensor:
    """Floats [B], one per row of `rows` (called `of`), as constants in the dtype of the arithmetic."""
    value = tensor(name, value)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if value.shape != rows.shape[:1] or not value.is_floating_point():
        raise ValueError(
            f"{name}: wanted floats [{rows.shape[0]}], one per row of {of}, got {value.dtype} {tuple(value.shape)}"
        )
    if value.device != rows.device:
        raise ValueError(f"{name}: wanted the device of {of}, {rows.device}, got {value.device}")
    constant: Tensor = value.detach().to(wide).contiguous()
    return constant


def is_number(value: Any) -> bool:
    """A Python number, or numpy's; no bool, and no tensor, whose value may be on a device."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return hasattr(value, "__float__") and not isinstance(value, Tensor)


def clip_range(clip: Any) -> None:
    """Raises ValueError for what is no (below, above) 1."""
    pair = isinstance(clip, (tuple, list)) and len(clip) == 2 and all(is_number(c) for c in clip)
    if not pair or not all(0.0 <= c < float("inf") for c in clip) or clip[0] > 1.0:
        raise ValueError(f"clip: wanted (below, above) 1, each at least 0, such as (1e-4, 1e-4), got {clip!r}")


def scoring(at: At, score: str | None, reduce: str) -> tuple[int, int]:
    """(score, reduce) as indices; the default score is the dynamics' own."""
    if score is None:
        score = at.score
        if score is None:
            raise ValueError("score: these rows come from dynamics with different scores; say which one is wanted")
    if score not in SCORES:
        raise ValueError(f"score: wanted one of {', '.join(SCORES)}, got {score!r}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: wanted one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return SCORES.index(score), REDUCTIONS.index(reduce)


def slot(name: str, given: Any, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = given if isinstance(given, Tensor) else tensor(f"out[{name!r}]", given)
    if value.shape != shape:
        raise ValueError(f"out[{name!r}]: wanted shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != sample.device:
        raise ValueError(f"out[{name!r}]: wanted the device of sample, {sample.device}, got {value.device}")
    wanted = torch.int32 if name == "flags" else None
    if name == "log_prob":
        wanted = torch.float64 if sample.dtype == torch.float64 else torch.float32
    if (wanted is not None and value.dtype != wanted) or (wanted is None and value.dtype not in STATE_DTYPES):
        raise TypeError(f"out[{name!r}]: wanted {wanted or 'a floating dtype'}, got {value.dtype}")
    if not is_row_contiguous(value):
        raise ValueError(f"out[{name!r}]: wanted contiguous rows (any row stride), got strides {value.stride()}")
    return value
