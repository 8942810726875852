"""The compiled CPU backend: fastflow._cpu, fed with addresses, row strides and sizes."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import addresses
from . import policy_rows as plain
from .addresses import numbers, refuse_values, tensors
from .base import PolicyCall, StepCall


@functools.cache
def _module() -> ModuleType:
    return importlib.import_module("fastflow._cpu")


def _build_record() -> str:
    """Why there is no compiled module, as the build recorded it."""
    path = Path(__file__).resolve().parent.parent / "_build.json"
    try:
        record = json.loads(path.read_text())["cpu"]
    except (OSError, ValueError, KeyError):
        return "it was not built; run `python setup.py build_ext --inplace` or `pip install .` with a C++17 compiler"
    return str(record.get("reason") or "it was built, but the file is missing; install again")


@functools.cache
def unavailable() -> str | None:
    try:
        _module()
    except ModuleNotFoundError:
        return f"the compiled module fastflow._cpu is absent: {_build_record()}"
    except ImportError as error:
        return f"the compiled module fastflow._cpu does not load: {error}"
    return None


def refuse(call: StepCall) -> str | None:
    if call.sample.device.type != "cpu":
        return f"it serves tensors on the CPU, and sample is on {call.sample.device}"
    return refuse_values(call)


def _numbers(call: StepCall, beta: float = 0.0) -> tuple[float, ...]:
    return (*numbers(call, beta), torch.get_num_threads())


def step(call: StepCall) -> None:
    _module().step(tensors(call, outputs=True), _numbers(call))


def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
    grads = (grad, call.grad_shift, call.grad_drift, grad_velocity, grad_uncond)
    _module().log_prob_backward(tensors(call, grads=grads), _numbers(call))


def matching(call: StepCall, beta: float, means: Tensor) -> None:
    _module().matching(tensors(call, means=(means, None)), _numbers(call, beta))


def matching_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor) -> None:
    made = (None, None, None, grad_velocity, None)
    _module().matching_backward(tensors(call, grads=made, means=(None, grad)), _numbers(call))


def policy_rows(call: PolicyCall) -> None:
    if call.log_prob.dtype != torch.float32:
        return plain.policy_rows(call)
    _module().policy_rows(*addresses.policy(call))


def instruction_set() -> str:
    """What the kernels run with on this machine: "avx512", "avx2" or "baseline". Raises ImportError without the module."""
    return str(_module().isa())
