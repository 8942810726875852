"""The registered operators. Defined with define and impl, whose calls cost less than those of the `custom_op` decorator.

fastflow::step_out           writes given slots, no autograd
fastflow::step               functional, differentiable in sample and velocity
fastflow::log_prob           functional, differentiable in sample, velocity and, where asked, uncond
fastflow::log_prob_backward  its closed form
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.base import StepCall
from . import gradients
from .autograd import differentiable

LIBRARY: Any = torch.library.Library("fastflow", "DEF")

_INPUTS = (
    "Tensor sample, Tensor velocity, Tensor? uncond, Tensor coef, Tensor? scale, Tensor? noise, Tensor? seeds, "
    "Tensor? step, Tensor? given, Tensor? mask, int[] token, int stream, int offset, int score, int reduce, "
    "bool score_rounded, ScalarType next_dtype, str rescale, str product_dtype, str backend"
)
_SLOTS = ("next_sample", "log_prob", "clean", "ode_next", "mean", "flags")
_SLOT_ARGUMENTS = ", ".join(f"Tensor({chr(97 + i)}!)? out_{name}" for i, name in enumerate(_SLOTS))

LIBRARY.define(f"step_out({_INPUTS}, Tensor? rows, {_SLOT_ARGUMENTS}) -> ()")
LIBRARY.define(f"step({_INPUTS}, bool[] want) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "log_prob(Tensor sample, Tensor velocity, Tensor next_sample, Tensor coef, Tensor? uncond, Tensor? scale, Tensor? mask, "
    "int[] token, int score, int reduce, bool uncond_grad, str rescale, str backend) -> Tensor"
)
LIBRARY.define(
    "log_prob_backward(Tensor grad, Tensor sample, Tensor velocity, Tensor next_sample, Tensor coef, Tensor? uncond, "
    "Tensor? scale, Tensor? mask, int[] token, int score, int reduce, bool uncond_grad, str rescale, str backend) "
    "-> (Tensor, Tensor)"
)


def make_call(
    sample: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    coef: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: Tensor | None,
    given: Tensor | None,
    mask: Tensor | None,
    token: Any,
    stream: int,
    offset: int,
    score: int,
    reduce: int,
    score_rounded: bool,
    next_dtype: torch.dtype,
    rescale: str,
    product_dtype: str,
    *slots: Tensor | None,
    rows: Tensor | None = None,
) -> StepCall:
    sources = sample.shape[0]
    batch = sources if rows is None else rows.shape[0]
    numel = sample.numel() // sources if sources else 0
    call = StepCall(
        batch, numel, sample, velocity, uncond, coef, scale, rescale, tuple(token), noise, seeds, step, stream, offset,
        given, mask, score, reduce, score_rounded, product_dtype, next_dtype, *slots,
    )  # fmt: skip
    call.rows = rows
    return call


# Arguments that an implementation can take from anybody; a tensor's subclass wants the dispatcher.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, bool, str, tuple, list, torch.dtype))


def step_out(*arguments: Any) -> None:
    """fastflow::step_out. Where nobody looks on, its implementation itself: the dispatcher converts 27 arguments twice."""
    if not _watched() and _PLAIN.issuperset(map(type, arguments)):
        _step_out(*arguments)
    else:
        torch.ops.fastflow.step_out(*arguments)


def _watched() -> bool:
    """Whether a tracer, a dispatch mode, a transform or a profiler is to see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _step_out(*arguments: Any) -> None:
    *inputs, backend, rows = arguments[:21]
    call = make_call(*inputs, *arguments[21:], rows=rows)
    if call.batch:
        backends.select(backend, call.sample.device, call).step(call)


def slots(sample: Tensor, next_dtype: torch.dtype, reduce: int, want: Any) -> list[Tensor | None]:
    """Fresh tensors for the wanted outputs; every other place is None."""
    score = torch.float64 if sample.dtype == torch.float64 else torch.float32

    def state(dtype: torch.dtype) -> Tensor:
        return torch.empty_like(sample, dtype=dtype, memory_format=torch.contiguous_format)

    def row(dtype: torch.dtype) -> Tensor:
        return sample.new_empty(sample.shape[:1], dtype=dtype)

    return [
        state(next_dtype) if want[0] else None,
        (state(score) if reduce == 2 else row(score)) if want[1] else None,
        state(sample.dtype) if want[2] else None,
        state(next_dtype) if want[3] else None,
        state(score) if want[4] else None,
        row(torch.int32) if want[5] else None,
    ]


def _filled(made: list[Tensor | None], sample: Tensor) -> tuple[Tensor, ...]:
    return tuple(sample.new_empty(0) if slot is None else slot for slot in made)


def _step(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, want = arguments[:20], arguments[20]
    made = slots(arguments[0], inputs[16], inputs[14], want)
    _step_out(*inputs, None, *made)
    return _filled(made, arguments[0])


def _step_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _filled(slots(arguments[0], arguments[16], arguments[14], arguments[20]), arguments[0])


def _replay_call(
    sample: Tensor, velocity: Tensor, next_sample: Tensor, coef: Tensor, uncond: Tensor | None, scale: Tensor | None,
    mask: Tensor | None, token: Any, score: int, reduce: int, rescale: str, slot: Tensor | None,
) -> StepCall:  # fmt: skip
    return make_call(
        sample, velocity, uncond, coef, scale, None, None, None, next_sample, mask, token, 0, 0, score, reduce, True,
        next_sample.dtype, rescale, "float32", None, slot,
    )  # fmt: skip


def _log_prob(
    sample: Tensor, velocity: Tensor, next_sample: Tensor, coef: Tensor, uncond: Tensor | None, scale: Tensor | None,
    mask: Tensor | None, token: Any, score: int, reduce: int, uncond_grad: bool, rescale: str, backend: str,
) -> Tensor:  # fmt: skip
    result = _log_prob_fake(
        sample, velocity, next_sample, coef, uncond, scale, mask, token, score, reduce, uncond_grad, rescale, backend
    )
    call = _replay_call(sample, velocity, next_sample, coef, uncond, scale, mask, token, score, reduce, rescale, result)
    if call.batch:
        backends.select(backend, sample.device, call).step(call)
    return result


def _log_prob_fake(sample: Tensor, *rest: Any) -> Tensor:
    shape = sample.shape if rest[8] == 2 else sample.shape[:1]
    return sample.new_empty(shape, dtype=torch.float64 if sample.dtype == torch.float64 else torch.float32)


def _log_prob_backward(
    grad: Tensor, sample: Tensor, velocity: Tensor, next_sample: Tensor, coef: Tensor, uncond: Tensor | None,
    scale: Tensor | None, mask: Tensor | None, token: Any, score: int, reduce: int, uncond_grad: bool, rescale: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    in_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    asked = uncond is not None and uncond_grad
    in_uncond = torch.empty_like(in_velocity) if asked else None
    call = _replay_call(sample, velocity, next_sample, coef, uncond, scale, mask, token, score, reduce, rescale, None)
    if call.batch:
        backends.select(backend, sample.device, call).log_prob_backward(call, grad.contiguous(), in_velocity, in_uncond)
    return in_velocity, velocity.new_empty(0) if in_uncond is None else in_uncond


def _log_prob_backward_fake(grad: Tensor, sample: Tensor, velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    in_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    asked = rest[2] is not None and rest[8]
    return in_velocity, torch.empty_like(in_velocity) if asked else velocity.new_empty(0)


for _name, _implementation, _fake in (
    ("step_out", _step_out, lambda *arguments: None),
    ("step", _step, _step_fake),
    ("log_prob", _log_prob, _log_prob_fake),
    ("log_prob_backward", _log_prob_backward, _log_prob_backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastflow::{_name}", _fake, lib=LIBRARY)

differentiable(LIBRARY, "step", gradients.step_context, gradients.step_backward)
differentiable(LIBRARY, "log_prob", gradients.log_prob_context, gradients.log_prob_backward)
