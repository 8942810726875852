"""Triton kernels for NVIDIA GPUs; under TRITON_INTERPRET=1 the same kernels on CPU tensors, slowly, for tests."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _env
from .base import TILE, StepCall

if TYPE_CHECKING:
    from ..kernels.config import Config

MIN_TRITON = (3, 2)
MIN_CAPABILITY = (8, 0)
MAX_NUMEL = 2**31 - 2**20  # element indices are int32 within a row
MAX_CHANNELS = 2**14  # a token's channels are folded by one program
ALIGNED = 16  # bytes of a vector load, and elements that row strides are counted in where they allow it
MIN_LOG = 7  # log2 of the fewest lanes that a row takes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SLOTS = ("next_sample", "log_prob", "clean", "ode_next", "mean", "ref_velocity", "old_mean")


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run Triton kernels, in words; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"triton {triton.__version__} is too old: wanted {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer"
    if _env.triton_interpret():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the kernels are checked on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}: wanted 8.0 or newer"
    return None


def refuse(call: StepCall) -> str | None:
    """Why this call cannot be served, naming the constraint and the value found; None if it can."""
    if not (call.sample.is_cuda or _env.triton_interpret()):
        return f"tensors are on {call.sample.device}: wanted a CUDA device (or TRITON_INTERPRET=1)"
    named = [("sample", call.sample), ("velocity", call.velocity)]
    named += [(name, slot) for name in _SLOTS if (slot := getattr(call, name)) is not None]
    for name, t in named:
        if t.dtype not in _FLOATS:
            return f"{name} has dtype {t.dtype}: wanted float32, bfloat16 or float16"
    for name, extra in (("noise", call.noise), ("next_sample", call.given)):
        if extra is not None and extra.dtype not in (*_FLOATS, torch.float64):
            return f"{name} has dtype {extra.dtype}: wanted float32, bfloat16, float16 or float64"
    if call.product_dtype != "float32" and call.velocity.dtype != torch.float32:
        return f'product_dtype="{call.product_dtype}": products are float32 here'
    if call.ref_velocity is not None and (call.ref_uncond is None) != (call.uncond is None):
        return "one of uncond and ref_uncond is given: wanted both or neither"
    for name in ("shift", "drift"):
        if (slot := getattr(call, name)) is not None and not slot.is_contiguous():
            return f"{name} has the stride {slot.stride(0)}: wanted numbers side by side"
    if call.numel > MAX_NUMEL:
        return f"a row has {call.numel} elements: wanted at most {MAX_NUMEL}"
    if call.uncond is not None and call.rescale == "token" and call.token[1] > MAX_CHANNELS:
        return f"a token has {call.token[1]} channels: wanted at most {MAX_CHANNELS}"
    return None


def _row(t: Tensor | None) -> int:
    """Elements from one row to the next; 0 where one row serves all."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _alignment(numel: int, tensors: Sequence[Tensor | None]) -> int:
    """16 where elements, rows and row lengths all begin at multiples of 16, so that loads can be vectors; else 1."""
    bits = numel
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr() | _row(t)
    return 1 if bits % ALIGNED else ALIGNED


@functools.cache
def _device_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


def _config(device: torch.device) -> Config:
    """The launch configuration of a device, by its name; the default where there is no device to ask."""
    from ..kernels import config

    if _env.triton_interpret():
        return config.INTERPRETED
    return config.for_device(_device_name(device.index or 0)) if device.type == "cuda" else config.DEFAULT


class _Launch:
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
        self.align = _alignment(call.numel | (inner if by_token and inner > 1 else 0), elements)
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
        return _row(t) // self.align

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.sample.device)

    def factors(
        self, velocity: Tensor, uncond: Tensor | None, totals: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The rescale factors of a pair of velocities, float32 [batch, tokens] or [batch, 1]."""
        from ..kernels import guidance

        call, batch = self.call, self.call.batch
        pair = (velocity, uncond, call.scale, index)
        rows = (self.row(velocity), self.row(uncond), _row(call.scale), velocity.shape[0])
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


def _on_device(t: Tensor) -> Any:
    """Triton launches on the current device; make it the tensors'."""
    return torch.cuda.device(t.device if t.is_cuda else -1)


@functools.cache
def _ready(device: torch.device) -> None:
    """Loads what FASTFLOW_CACHE_DIR holds for the device, before its first launch. Raises CacheError if that is stale."""
    folder = _env.cache_dir()
    if folder is None or _env.triton_interpret():
        return
    from triton.runtime import driver

    from ..compile import cache

    cache.load(folder, f"sm_{driver.active.get_current_target().arch}")


def step(call: StepCall) -> None:
    """Writes every slot of the call that is not None."""
    if call.batch == 0 or call.numel == 0:
        _empty(call)
        return
    with _on_device(call.sample):
        _ready(call.sample.device)
        launch_step(call, _config(call.sample.device))


def _empty(call: StepCall) -> None:
    for slot in (call.log_prob, call.flags, call.shift, call.drift):
        if slot is not None:
            slot.zero_()


def launch_step(call: StepCall, config: Config) -> None:
    """The launches of a step on Triton's active device, cut up by `config`."""
    import triton.language as tl

    from ..kernels import reduce, transition

    elements = [
        call.sample,
        call.velocity,
        call.uncond,
        call.noise,
        call.given,
        call.mask,
        call.next_sample,
        call.clean,
    ]
    elements += [call.ode_next, call.mean, call.log_prob if call.reduce == 2 else None]
    elements += [call.ref_velocity, call.ref_uncond, call.old_mean]
    launch = _Launch(call, config, elements)
    batch, tiles, whole, row = call.batch, launch.tiles, launch.programs == 1, launch.row
    uncond, scale = (call.uncond, call.scale) if launch.guided else (None, None)
    factors = launch.factors(call.velocity, uncond, index=call.rows) if launch.rescale != "none" else None
    shift, drift = call.shift, call.drift
    others, other_rows = launch.others(shift, drift)
    scored = call.log_prob is not None and call.reduce != 2
    summed = not whole and (scored or shift is not None or drift is not None)
    sums = launch.scratch(tiles, batch) if scored and not whole else None
    shifts = shift if shift is None or whole else launch.scratch(tiles, batch)
    drifts = drift if drift is None or whole else launch.scratch(tiles, batch)
    mask = _bytes(call.mask) if call.log_prob is not None or shift is not None or drift is not None else None
    counts = launch.scratch(tiles, batch, dtype=torch.int32) if summed and mask is not None else None
    marks = launch.scratch(tiles, batch, dtype=torch.int32) if call.flags is not None and not whole else None
    noise, seeds, given = call.noise, call.seeds, call.given
    kept = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(call.next_dtype, tl.float32)
    transition.step_kernel[(batch * launch.programs,)](
        call.sample, call.velocity, uncond, call.rows, scale, factors, call.coef, noise, seeds, call.step, given, mask,
        *others, call.next_sample, call.log_prob, call.clean, call.ode_next, call.mean, call.flags, shifts, drifts,
        sums, counts, marks,
        row(call.sample), row(call.velocity), row(uncond), row(noise), row(given), row(mask), *other_rows,
        row(call.next_sample), row(call.clean), row(call.ode_next), row(call.mean),
        row(call.log_prob) if call.reduce == 2 else _row(call.log_prob), _row(call.flags), _row(call.coef), _row(scale),
        _row(seeds), _row(call.step), call.sample.shape[0], call.stream, call.offset,
        0 if factors is None else factors.shape[1], launch.inner, launch.units, batch, launch.programs, call.score,
        RESCALE=launch.rescale, **launch.token, REDUCE=call.reduce, SCORE_ROUNDED=call.score_rounded,
        NEXT=kept, WHOLE=whole, **launch.block,
    )  # fmt: skip
    if summed or marks is not None:
        reduce.finish_kernel[(launch.row_programs,)](
            sums, counts, marks, shifts, drifts, call.coef, call.rows, call.log_prob if scored else None, call.flags, shift,
            drift, _row(call.coef), _row(call.log_prob), _row(call.flags), call.sample.shape[0], batch, tiles, call.numel,
            call.score, REDUCE=call.reduce, **launch.lanes,
        )  # fmt: skip


def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients in velocity and (where wanted) uncond: of log_prob, contracted with `grad`, and through shift and
    drift, contracted with `grad_shift` and `grad_drift`."""
    if call.batch == 0 or call.numel == 0:
        return
    with _on_device(call.sample):
        _ready(call.sample.device)
        launch_backward(call, grad, grad_velocity, grad_uncond, _config(call.sample.device))


def launch_backward(
    call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None, config: Config
) -> None:
    """The launches of a replay's gradient on Triton's active device, cut up by `config`."""
    from ..kernels import log_prob_backward as kernels

    each = call.reduce == 2
    if each:
        grad = grad.reshape(call.batch, call.numel).contiguous()
    elements = [call.sample, call.velocity, call.uncond, call.given, call.mask, grad_velocity, grad_uncond]
    elements += [call.ref_velocity, call.ref_uncond, call.old_mean]
    launch = _Launch(call, config, [*elements, grad if each else None])
    batch, tiles, row = call.batch, launch.tiles, launch.row
    uncond, scale = (call.uncond, call.scale) if launch.guided else (None, None)
    mask, counts = _bytes(call.mask), None
    on_shift, on_drift = (None if t is None else t.contiguous() for t in (call.grad_shift, call.grad_drift))
    means = on_shift is not None or on_drift is not None
    if mask is not None and (call.reduce == 0 or means):
        counts = torch.zeros(batch, dtype=torch.int32, device=call.sample.device)
        kernels.count_kernel[(batch * launch.programs,)](
            mask, counts, row(mask), launch.units, launch.programs, **launch.block
        )
    others, other_rows = launch.others(on_shift, on_drift)
    others += (on_shift, on_drift)
    rows = (row(call.sample), row(call.velocity), row(uncond), row(call.given), row(mask), *other_rows)
    grads, grad_rows = (grad_velocity, grad_uncond), (row(grad_velocity), row(grad_uncond))
    small = (row(grad) if each else _row(grad), _row(call.coef), _row(scale), launch.units, call.score)
    if launch.rescale == "token":
        kernels.token_backward_kernel[(batch * launch.token_programs,)](
            call.sample, call.velocity, uncond, scale, call.coef, call.given, mask, grad, counts, *others, *grads,
            *rows, *grad_rows, *small, launch.tokens, launch.token_programs, launch.inner,
            REDUCE=call.reduce, **launch.tokenwise,
        )  # fmt: skip
        return
    factors = pulled = None
    if launch.rescale == "clamp":
        totals, dots, pulled = launch.scratch(2, batch), launch.scratch(tiles, batch), launch.scratch(2, batch)
        factors = launch.factors(call.velocity, uncond, totals)
        kernels.dot_kernel[(batch * launch.programs,)](
            call.sample, call.velocity, uncond, scale, factors, call.coef, call.given, mask, grad, counts,
            *others, dots,
            *rows, *small, batch, launch.programs, REDUCE=call.reduce, **launch.block,
        )  # fmt: skip
        kernels.pulls_kernel[(launch.row_programs,)](dots, totals, pulled, batch, tiles, **launch.lanes)
    kernels.backward_kernel[(batch * launch.programs,)](
        call.sample, call.velocity, uncond, scale, factors, pulled, call.coef, call.given, mask, grad, counts, *others, *grads,
        *rows, *grad_rows, *small, batch, launch.programs,
        RESCALE=launch.rescale, REDUCE=call.reduce, **launch.block,
    )  # fmt: skip
