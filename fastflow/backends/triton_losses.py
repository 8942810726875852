"""The Triton backend's losses: what `ff.policy_loss` makes of its rows."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch

from . import policy_rows as plain
from .base import PolicyCall
from .triton_launch import chosen_config, on_device, ready, stride

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

    batch = len(call.log_prob)
    scratch = call.log_prob.new_empty((batch, 8), dtype=torch.float64)
    policy.policy_kernel[(1,)](
        call.log_prob, call.shift, call.drift, call.old_log_prob, call.advantage, call.weight, call.coef, call.info, call.rows,
        scratch, stride(call.coef), batch, int(call.gaussian), call.objective, call.kl,
        *map(_bits, (call.below, call.above, call.kl_weight, call.divergence)),
        LANES=LANES, UNROLL=config.unroll, num_warps=LANES // 32, enable_fp_fusion=False,
    )  # fmt: skip
