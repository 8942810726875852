"""A call as the compiled modules take it: addresses, row strides and numbers, in the order of csrc/reader.h."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import RESCALES, PolicyCall, StepCall

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OTHER = 0  # int64, int32 and bool tensors, whose dtype the kernels know from their role
FLOAT_TENSORS = (
    "sample", "velocity", "uncond", "noise", "given", "ref_velocity", "ref_uncond", "old_mean", "next_sample", "clean",
    "ode_next", "mean",
)  # fmt: skip
NO_OUTPUTS, NO_GRADS, NO_MEANS = (None,) * 8, (None,) * 5, (None,) * 2
_outputs = operator.attrgetter("next_sample", "log_prob", "clean", "ode_next", "mean", "flags", "shift", "drift")
Spec = tuple[int, int, int] | None  # address, row stride in elements, dtype


def refuse_values(call: StepCall) -> str | None:
    """What neither module computes, wherever the tensors are."""
    if call.product_dtype != "float32" and call.velocity.dtype != torch.float32:
        return (
            f'it forms products in float32, and product_dtype is "{call.product_dtype}"; only the reference rounds them'
        )
    for name in FLOAT_TENSORS:
        tensor = getattr(call, name)
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"it computes in float32 from float32, bfloat16 or float16, and {name} is {tensor.dtype}"
    if call.coef.dtype != torch.float32:
        return f"it takes float32 coefficients, and coef is {call.coef.dtype}"
    return None


def rows(t: Tensor | None) -> Spec:
    return None if t is None else (t.data_ptr(), t.stride(0), DTYPES.get(t.dtype, OTHER))


def broadcast(t: Tensor | None) -> Spec:
    """As `rows`; one row serves the whole batch."""
    return None if t is None else (t.data_ptr(), 0 if t.shape[0] == 1 else t.stride(0), OTHER)


def tensors(
    call: StepCall,
    *,
    outputs: bool = False,
    grads: Sequence[Tensor | None] | None = None,
    means: Sequence[Tensor | None] | None = None,
) -> tuple[Spec, ...]:
    """grads: grad, grad_shift, grad_drift, grad_velocity, grad_uncond; means: means, grad_means of a matching loss."""
    return (
        rows(call.sample),
        rows(call.velocity),
        None if call.scale is None else rows(call.uncond),
        broadcast(call.coef),
        broadcast(call.scale),
        rows(call.noise),
        None if call.step is None else rows(call.seeds),
        broadcast(call.step),
        rows(call.given),
        rows(call.mask),
        rows(call.ref_velocity),
        None if call.scale is None else rows(call.ref_uncond),
        rows(call.old_mean),
        rows(call.rows),
        *(map(rows, _outputs(call)) if outputs else NO_OUTPUTS),
        *(NO_GRADS if grads is None else map(rows, grads)),
        *(NO_MEANS if means is None else map(rows, means)),
    )


def numbers(call: StepCall, beta: float = 0.0) -> tuple[float, ...]:
    return (
        call.batch,
        call.numel,
        call.sample.shape[0],
        RESCALES.index(call.rescale),
        *call.token,
        call.stream & 0xFFFFFFFF,
        call.offset,
        call.score,
        call.reduce,
        call.score_rounded,
        DTYPES.get(call.next_dtype, OTHER),
        beta,
    )


def policy(call: PolicyCall) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A policy loss: addresses, 0 where a tensor is absent, and numbers."""
    named = (
        call.log_prob, call.shift, call.drift, call.old_log_prob, call.advantage, call.weight, call.coef, call.info, call.rows,
    )  # fmt: skip
    stride = 0 if call.coef.shape[0] == 1 else call.coef.stride(0)
    return tuple(0 if t is None else t.data_ptr() for t in named), (
        len(call.log_prob), stride, call.gaussian, call.below, call.above, call.kl_weight, call.divergence, call.objective,
        call.kl,
    )  # fmt: skip
