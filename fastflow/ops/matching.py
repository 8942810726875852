"""The operator of `ff.matching_loss`: six means of each row in one pass, and their closed-form gradient in another.

With own = velocity - target, old = old_velocity - target and target = noise - clean (or given), the means over elements are

    own^2,  old^2,  own old,  |beta own + (1 - beta) old|,  |(1 + beta) old - beta own|,  (velocity - ref_velocity)^2

fastflow::matching           [6, B], differentiable in velocity through the first, third and last
fastflow::matching_backward  from the inputs alone: noise that was drawn is drawn again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import matching as plain
from ..backends.base import StepCall
from ..errors import BackendError
from .autograd import differentiable
from .library import LIBRARY

MEANS = ("square", "old_square", "cross", "plus", "minus", "shift")
_INPUTS = (
    "Tensor velocity, Tensor clean, Tensor? old_velocity, Tensor? ref_velocity, Tensor? target, Tensor? noise, Tensor? seeds, "
    "Tensor? step, Tensor? mask, int stream, int offset, str backend"
)
INPUTS = 12
LIBRARY.define(f"matching({_INPUTS}, float beta) -> Tensor")
LIBRARY.define(f"matching_backward(Tensor grad, {_INPUTS}) -> Tensor")


def _call(
    velocity: Tensor, clean: Tensor, old_velocity: Tensor | None, ref_velocity: Tensor | None, target: Tensor | None,
    noise: Tensor | None, seeds: Tensor | None, step: Tensor | None, mask: Tensor | None, stream: int, offset: int,
    backend: str,
) -> StepCall:  # fmt: skip
    batch = clean.shape[0]
    dtype = torch.float64 if clean.dtype == torch.float64 else torch.float32
    coef = clean.new_empty((1, 16), dtype=dtype)  # read by none
    return StepCall(
        batch, clean.numel() // batch if batch else 0, clean, velocity, None, coef, None, "none", (1, 1, 1), noise, seeds, step,
        stream, offset, target, mask, 0, 0, True, "float32", clean.dtype, ref_velocity=ref_velocity, old_mean=old_velocity,
    )  # fmt: skip


def _module(backend: str, call: StepCall) -> Any:
    """The functions that serve this call: the backend's own, else plain torch; a named backend without them raises."""
    chosen = backends.select(backend, call.sample.device, call)
    if hasattr(chosen, "matching"):
        return chosen
    if backend not in ("auto", "reference"):
        raise BackendError(f'backend="{backend}" has no matching loss; use backend="auto"')
    return plain


def _matching(*arguments: Any) -> Tensor:
    inputs, beta = arguments[:INPUTS], arguments[INPUTS]
    means = _fake(*arguments)
    call = _call(*inputs)
    if call.batch:
        _module(inputs[-1], call).matching(call, beta, means)
    return means


def _fake(*arguments: Any) -> Tensor:
    clean = arguments[1]
    dtype = torch.float64 if clean.dtype == torch.float64 else torch.float32
    made: Tensor = clean.new_empty((6, clean.shape[0]), dtype=dtype)
    return made


def _backward(grad: Tensor, *inputs: Any) -> Tensor:
    made, call = _backward_fake(grad, *inputs), _call(*inputs)
    if call.batch:
        _module(inputs[-1], call).matching_backward(call, grad.contiguous(), made)
    return made


def _backward_fake(grad: Tensor, *inputs: Any) -> Tensor:
    velocity = inputs[0]
    return torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:INPUTS]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    on = torch.stack([grad[0], grad[2], grad[5]])
    in_velocity = torch.ops.fastflow.matching_backward(on, *ctx.saved_tensors, *ctx.options)
    return (in_velocity, *(None,) * INPUTS)


for _name, _implementation, _stand_in in (
    ("matching", _matching, _fake),
    ("matching_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastflow::{_name}", _stand_in, lib=LIBRARY)
differentiable(LIBRARY, "matching", _context, _gradient)
