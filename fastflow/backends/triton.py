"""Triton kernels for NVIDIA GPUs; under TRITON_INTERPRET=1 the same kernels on CPU tensors, slowly, for tests."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _env
from .base import StepCall
from .triton_launch import Launch, as_bytes, chosen_config, on_device, ready, stride
from .triton_losses import matching as matching
from .triton_losses import matching_backward as matching_backward
from .triton_losses import policy_rows as policy_rows

if TYPE_CHECKING:
    from ..kernels.config import Config

MIN_TRITON = (3, 2)
MIN_CAPABILITY = (8, 0)
MAX_NUMEL = 2**31 - 2**20  # element indices are int32 within a row
MAX_CHANNELS = 2**14  # a token's channels are folded by one program
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
    found = [_unfit(device) for device in range(torch.cuda.device_count())]
    return found[0] if found and None not in found else None


@functools.cache
def _unfit(device: int) -> str | None:
    """Why a GPU of this machine cannot run the kernels; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"GPU {device} has compute capability {capability[0]}.{capability[1]}: wanted 8.0 or newer"
    return None


def refuse(call: StepCall) -> str | None:
    """Why this call cannot be served, naming the constraint and the value found; None if it can."""
    if not (call.sample.is_cuda or _env.triton_interpret()):
        return f"tensors are on {call.sample.device}: wanted a CUDA device (or TRITON_INTERPRET=1)"
    if call.sample.is_cuda and (unfit := _unfit(call.sample.device.index)) is not None:
        return unfit
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


def step(call: StepCall) -> None:
    """Writes every slot of the call that is not None."""
    if call.batch == 0 or call.numel == 0:
        _empty(call)
        return
    with on_device(call.sample):
        ready(call.sample.device)
        launch_step(call, chosen_config(call.sample.device))


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
    launch = Launch(call, config, elements)
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
    mask = as_bytes(call.mask) if call.log_prob is not None or shift is not None or drift is not None else None
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
        row(call.log_prob) if call.reduce == 2 else stride(call.log_prob), stride(call.flags), stride(call.coef), stride(scale),
        stride(seeds), stride(call.step), call.sample.shape[0], call.stream, call.offset,
        0 if factors is None else factors.shape[1], launch.inner, launch.units, batch, launch.programs, call.score,
        RESCALE=launch.rescale, **launch.token, REDUCE=call.reduce, SCORE_ROUNDED=call.score_rounded,
        NEXT=kept, WHOLE=whole, **launch.block,
    )  # fmt: skip
    if summed or marks is not None:
        reduce.finish_kernel[(launch.row_programs,)](
            sums, counts, marks, shifts, drifts, call.coef, call.rows, call.log_prob if scored else None, call.flags, shift,
            drift, stride(call.coef), stride(call.log_prob), stride(call.flags), call.sample.shape[0], batch, tiles, call.numel,
            call.score, REDUCE=call.reduce, **launch.lanes,
        )  # fmt: skip


def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients in velocity and (where wanted) uncond: of log_prob, contracted with `grad`, and through shift and
    drift, contracted with `grad_shift` and `grad_drift`."""
    if call.batch == 0 or call.numel == 0:
        return
    with on_device(call.sample):
        ready(call.sample.device)
        launch_backward(call, grad, grad_velocity, grad_uncond, chosen_config(call.sample.device))


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
    launch = Launch(call, config, [*elements, grad if each else None])
    batch, tiles, row = call.batch, launch.tiles, launch.row
    uncond, scale = (call.uncond, call.scale) if launch.guided else (None, None)
    mask = as_bytes(call.mask)
    on_shift, on_drift = (None if t is None else t.contiguous() for t in (call.grad_shift, call.grad_drift))
    means = on_shift is not None or on_drift is not None
    counts = launch.counts() if call.reduce == 0 or means else None
    others, other_rows = launch.others(on_shift, on_drift)
    others += (on_shift, on_drift)
    rows = (row(call.sample), row(call.velocity), row(uncond), row(call.given), row(mask), *other_rows)
    grads, grad_rows = (grad_velocity, grad_uncond), (row(grad_velocity), row(grad_uncond))
    small = (row(grad) if each else stride(grad), stride(call.coef), stride(scale), launch.units, call.score)
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
