"""The Triton backend's losses: what `ff.policy_loss` makes of its rows, and the row means of `ff.matching_loss`."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import policy_rows as plain
from .base import PolicyCall, StepCall
from .triton_launch import Launch, as_bytes, chosen_config, on_device, ready, stride

if TYPE_CHECKING:
    from ..kernels.config import Config

LANES = 128  # rows that the policy kernel computes at a time, one a thread


def policy_rows(call: PolicyCall) -> None:
    """Fills `info` and `rows` in one launch."""
    if call.log_prob.dtype != torch.float32 or len(call.log_prob) == 0:
        return plain.policy_rows(call)
    with on_device(call.log_prob):
        ready(call.log_prob.device)
        launch_policy(call, chosen_config(call.log_prob.device))


def _bits(value: float) -> int:
    """The bits of a float64, as int64."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def launch_policy(call: PolicyCall, config: Config) -> None:
    """The launch of a policy loss's rows on Triton's active device."""
    from ..kernels import policy

    batch, optional = len(call.log_prob), (call.shift, call.drift, call.weight)
    shift, drift, weight = (call.log_prob if t is None else t for t in optional)
    has = sum((t is not None) << bit for bit, t in enumerate(optional))
    scratch = call.log_prob.new_empty((batch, 8), dtype=torch.float64)
    policy.policy_kernel[(1,)](
        call.log_prob, shift, drift, call.old_log_prob, call.advantage, weight, call.coef, call.info, call.rows, scratch,
        stride(call.coef), batch, has, int(call.gaussian), call.objective, call.kl,
        *map(_bits, (call.below, call.above, call.kl_weight, call.divergence)),
        LANES=LANES, UNROLL=config.unroll, num_warps=LANES // 32, enable_fp_fusion=False,
    )  # fmt: skip


def matching(call: StepCall, beta: float, means: Tensor) -> None:
    """Fills means [6, B]; see fastflow/ops/matching.py for what they are."""
    if call.batch == 0 or call.numel == 0:
        means.zero_()
        return
    with on_device(call.sample):
        ready(call.sample.device)
        launch_matching(call, beta, means, chosen_config(call.sample.device))


def _inputs(call: StepCall) -> tuple[Tensor | None, ...]:
    """The tensors of elements that a matching loss reads."""
    drawn = call.noise if call.given is None else None
    return (call.velocity, call.sample, call.old_mean, call.ref_velocity, call.given, drawn)


def _arguments(call: StepCall, launch: Launch) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The tensors that both passes begin with, and their row strides."""
    read, mask = _inputs(call), as_bytes(call.mask)
    strides = (*map(launch.row, read), stride(call.seeds), stride(call.step), launch.row(mask))
    return (*read, call.seeds, call.step, mask), strides


def launch_matching(call: StepCall, beta: float, means: Tensor, config: Config) -> None:
    """The launches of a matching loss's means on Triton's active device, cut up by `config`."""
    from ..kernels import matching as kernels

    launch = Launch(call, config, [*_inputs(call), call.mask])
    batch, tiles, whole = call.batch, launch.tiles, launch.programs == 1
    tensors, strides = _arguments(call, launch)
    sums = means if whole else launch.scratch(tiles, 6 * batch)
    counts = launch.scratch(tiles, batch, dtype=torch.int32) if call.mask is not None and not whole else None
    kernels.matching_kernel[(batch * launch.programs,)](
        *tensors, sums, counts, *strides, call.stream, call.offset, beta, launch.units, batch, launch.programs,
        WHOLE=whole, **launch.block,
    )  # fmt: skip
    if not whole:
        programs = -(-6 * batch // config.lanes)
        kernels.means_kernel[(programs,)](sums, counts, means, batch, tiles, call.numel, **launch.lanes)


def matching_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor) -> None:
    """Writes the gradient in velocity of the first, third and last mean, contracted with grad [3, B]."""
    if call.batch == 0 or call.numel == 0:
        return
    with on_device(call.sample):
        ready(call.sample.device)
        launch_matching_backward(call, grad, grad_velocity, chosen_config(call.sample.device))


def launch_matching_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, config: Config) -> None:
    """The launches of a matching loss's gradient on Triton's active device, cut up by `config`."""
    from ..kernels import matching as kernels

    launch = Launch(call, config, [*_inputs(call), call.mask, grad_velocity])
    tensors, strides = _arguments(call, launch)
    kernels.matching_backward_kernel[(call.batch * launch.programs,)](
        *tensors, grad, launch.counts(), grad_velocity, *strides, launch.row(grad_velocity), call.stream, call.offset,
        launch.units, call.batch, launch.programs, **launch.block,
    )  # fmt: skip
