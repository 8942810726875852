"""CUDA kernels for NVIDIA GPUs: fastflow._cuda, fed with addresses, row strides, sizes and a stream.

A call neither waits for the GPU nor allocates, but for the partial sums of a matching loss and of rows longer than 8,192
elements, and the factors of a rescaled guidance, which torch's allocator provides. All of it may be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import _env
from ..errors import BackendError
from . import addresses
from . import policy_rows as plain
from .addresses import numbers, tensors
from .base import TILE, PolicyCall, StepCall

MIN_CAPABILITY = (8, 0)
MAX_CHANNELS = 2 * TILE  # a token's channels are folded in shared memory
WHOLE = 4 * TILE  # a row of up to this many elements needs no scratch


@functools.cache
def _module() -> ModuleType:
    """The module that `fastflow compile` left in FASTFLOW_CACHE_DIR, else the installed one."""
    folder = _env.cache_dir()
    if folder is not None:
        from ..compile import module

        found = module.load(folder)
        if found is not None:
            return found
    return importlib.import_module("fastflow._cuda")


def module_path() -> Path | None:
    """The file of the module that would be loaded; None where there is none."""
    try:
        origin = _module().__file__
    except ImportError:
        return None
    return None if origin is None else Path(origin)


def _build_record() -> str:
    """Why there is no compiled module, as the build recorded it."""
    path = Path(__file__).resolve().parent.parent / "_build.json"
    try:
        record = json.loads(path.read_text())["cuda"]
    except (OSError, ValueError, KeyError):
        return "it was not built; run `FASTFLOW_CUDA=1 pip install .` with nvcc"
    return str(record.get("reason") or "it was built, but the file is missing; install again")


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run the kernels, in words; None if it can."""
    try:
        _module()
    except ModuleNotFoundError:
        return f"the compiled module fastflow._cuda is absent: {_build_record()}"
    except ImportError as error:
        return f"the compiled module fastflow._cuda does not load: {error}"
    except BackendError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels for CUDA"
    reasons = []
    for device in _one_of_each():
        reason = _unfit(device)
        if reason is None:
            return None
        reasons.append(reason)
    return reasons[0]


def _one_of_each() -> list[int]:
    """A GPU of each compute capability, the current one first: asking the driver opens a context, which takes GPU memory."""
    current = torch.cuda.current_device()
    found = {torch.cuda.get_device_capability(current): current}
    for device in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_capability(device), device)
    return list(found.values())


@functools.cache
def _unfit(device: int) -> str | None:
    """Why a GPU of this machine cannot run the kernels; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    has = f"GPU {device} has compute capability {capability[0]}.{capability[1]}"
    if capability < MIN_CAPABILITY:
        return f"{has}: wanted 8.0 or newer"
    reason = _module().refusal(device)
    if reason is not None:
        return (
            f"fastflow._cuda was compiled for {_module().architectures()}, and {has}: {reason}; FASTFLOW_CUDA_ARCHS names "
            "others when it is installed"
        )
    return None


def refuse(call: StepCall) -> str | None:
    """Why this call cannot be served, naming the constraint and the value found; None if it can."""
    if call.sample.device.type != "cuda":
        return f"it serves tensors on a CUDA device, and sample is on {call.sample.device}"
    return _unfit(call.sample.device.index) or refuse_values(call)


def refuse_values(call: StepCall) -> str | None:
    """As `refuse`, wherever the tensors are."""
    reason = addresses.refuse_values(call)
    if reason is not None:
        return reason
    if call.rescale == "token" and call.scale is not None and call.token[1] > MAX_CHANNELS:
        return f"it rescales tokens of up to {MAX_CHANNELS} channels, and these have {call.token[1]}"
    return None


def _stream(device: torch.device) -> tuple[int, int]:
    """A device's index and the stream that is current on it."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _scratch(call: StepCall, backward: bool) -> Tensor | None:
    """Memory for partial sums; the allocator keeps it for this stream until the kernels are through."""
    rescaled = call.rescale != "none" and call.uncond is not None and call.scale is not None and call.numel > 0
    pair = (call.grad_shift, call.grad_drift) if backward else (call.shift, call.drift)
    means = pair[0] is not None or pair[1] is not None
    if not (backward or rescaled or means or call.numel > WHOLE):
        return None
    clamp = rescaled and call.rescale == "clamp"
    groups = 0 if not rescaled else 1 if clamp else call.token[0] * call.token[2]
    return _floats(_module().scratch_words(backward, call.batch, call.numel, groups, clamp, means), call)


def _floats(words: int, call: StepCall) -> Tensor:
    return torch.empty(words, dtype=torch.float32, device=call.sample.device)


def _numbers(call: StepCall, scratch: Tensor | None, beta: float = 0.0) -> tuple[float, ...]:
    where = 0 if scratch is None else scratch.data_ptr()
    return (*numbers(call, beta), where, *_stream(call.sample.device))


def step(call: StepCall) -> None:
    """Writes every slot of the call that is not None, on the current stream."""
    scratch = _scratch(call, False)
    _module().step(tensors(call, outputs=True), _numbers(call, scratch))


def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients in velocity and (where wanted) uncond: of log_prob, contracted with `grad`, and through shift and
    drift, where the call has gradients in them."""
    scratch = _scratch(call, True)
    grads = (grad, call.grad_shift, call.grad_drift, grad_velocity, grad_uncond)
    _module().log_prob_backward(tensors(call, grads=grads), _numbers(call, scratch))


def matching(call: StepCall, beta: float, means: Tensor) -> None:
    """Fills means [6, B]."""
    if call.numel == 0:
        means.zero_()
        return
    scratch = _floats(_module().matching_words(call.batch, call.numel), call)
    _module().matching(tensors(call, means=(means, None)), _numbers(call, scratch, beta))


def matching_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor) -> None:
    """Writes the gradient in velocity. grad [3, B]: of the loss in the first, third and last mean."""
    if call.numel == 0:
        return
    scratch = None if call.mask is None else _scratch(call, True)
    made = (None, None, None, grad_velocity, None)
    _module().matching_backward(tensors(call, grads=made, means=(None, grad)), _numbers(call, scratch))


def policy_rows(call: PolicyCall) -> None:
    """Fills `info` and `rows` with one launch; in float64 with those of plain torch."""
    if call.log_prob.dtype != torch.float32:
        return plain.policy_rows(call)
    named, values = addresses.policy(call)
    _module().policy_rows(named, (*values, *_stream(call.log_prob.device)))
