"""The CUDA backend on CPU tensors: through the emulator, or on a GPU with copies there and back."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastflow.backends import cuda
from fastflow.backends.base import PolicyCall, StepCall


class OnGpu:
    """Backend cuda for calls on CPU tensors. Strides and offsets are kept, and what lies between rows is copied too."""

    def __init__(self) -> None:
        self.moved: list[tuple[Tensor, Tensor]] = []
        self.known: dict[int, Tensor] = {}

    def move(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            flat = torch.as_strided(t, (storage.nbytes() // t.element_size(),), (1,), 0)
            self.known[storage.data_ptr()] = flat.cuda()
            self.moved.append((flat, self.known[storage.data_ptr()]))
        there = self.known[storage.data_ptr()]
        return torch.as_strided(there, t.shape, t.stride(), t.storage_offset())

    def all(self, call: Any) -> Any:
        values = {f.name: getattr(call, f.name) for f in fields(call)}
        return replace(call, **{name: self.move(t) for name, t in values.items() if isinstance(t, Tensor)})

    def call(self, call: StepCall) -> StepCall:
        moved: StepCall = self.all(call)
        assert cuda.refuse(moved) is None
        return moved

    def back(self) -> None:
        for here, there in self.moved:
            here.copy_(there)

    @staticmethod
    def step(call: StepCall) -> None:
        gpu = OnGpu()
        cuda.step(gpu.call(call))
        gpu.back()

    @staticmethod
    def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
        gpu = OnGpu()
        moved = gpu.call(call)
        slots: Any = (gpu.move(grad), gpu.move(grad_velocity), gpu.move(grad_uncond))
        cuda.log_prob_backward(moved, *slots)
        gpu.back()

    @staticmethod
    def matching(call: StepCall, beta: float, means: Tensor) -> None:
        gpu = OnGpu()
        moved, slots = gpu.call(call), gpu.move(means)
        assert slots is not None
        cuda.matching(moved, beta, slots)
        gpu.back()

    @staticmethod
    def matching_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor) -> None:
        gpu = OnGpu()
        moved = gpu.call(call)
        slots: Any = (gpu.move(grad), gpu.move(grad_velocity))
        cuda.matching_backward(moved, *slots)
        gpu.back()

    @staticmethod
    def policy_rows(call: PolicyCall) -> None:
        gpu = OnGpu()
        cuda.policy_rows(gpu.all(call))
        gpu.back()
