"""Gradients of the operators, attached as `torch.library.register_autograd` does, without its search for default arguments.

Ours have none, and the search, quadratic in the number of arguments, takes longer than the rest of a small call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable(
    library: Any, name: str, context: Callable[[Any, tuple[Any, ...], Any], None], backward: Backward
) -> None:
    """Makes `name` of the library differentiable: context(ctx, inputs, output) saves what backward(ctx, *grads) needs."""
    op = getattr(torch.ops.fastflow, name).default

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, *arguments: Any
        ) -> Any:  # the keyset comes last: positions in ctx are those of the operator
            *inputs, keyset = arguments
            output = below(keyset, inputs)
            context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    def call(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return Differentiable.apply(*inputs, keyset)  # type: ignore[no-untyped-call]
        return below(keyset, inputs)

    library.impl(name, call, "Autograd", with_keyset=True)
