"""What the fused step replaces: the chain that flow_grpo runs per step, re-typed from its formulas, eager and compiled.

Variant: flow_grpo's `sde_step_with_logprob` as of July 2025 (flow_grpo/diffusers_patch/sd3_sde_with_logprob.py) behind the
CFG of its SD3 pipeline. Guidance is combined in the network's dtype; velocity and sample are raised to float32; the index of
the timestep is looked up in the scheduler and the second sigma read with `.item()`; the score keeps its constants. The
clean prediction `sample - sigma * velocity` is added, so that the chain and `ff.step` give the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow import Sigmas


class Outputs(NamedTuple):
    next_sample: Tensor  # [B, *] float32
    log_prob: Tensor  # [B] float32, nats, mean over elements
    clean: Tensor  # [B, *] float32


@dataclass(frozen=True)
class Scheduler:
    """What the chain asks of diffusers' FlowMatchEulerDiscreteScheduler: float32 tables on the host, and the look-up."""

    sigmas: Tensor  # [T + 1]
    timesteps: Tensor  # [T]

    @staticmethod
    def of(sigmas: Sigmas) -> Scheduler:
        return Scheduler(sigmas.float(), sigmas.timesteps.float())

    def index_for_timestep(self, timestep: Tensor) -> int:
        found = (self.timesteps == timestep).nonzero()
        return int(found[1 if len(found) > 1 else 0].item())


class Levels(NamedTuple):
    """Noise levels of one step, float32 [1 or B, 1, ...], and the schedule's second one."""

    sigma: Tensor
    sigma_next: Tensor
    second: float


def look_up(scheduler: Scheduler, timestep: Tensor, rank: int) -> Levels:
    """The levels of timestep [1 or B], to broadcast against states of `rank` axes."""
    index = [scheduler.index_for_timestep(t) for t in timestep]
    per_row = (-1, *[1] * (rank - 1))
    sigma = scheduler.sigmas[index].view(per_row)
    sigma_next = scheduler.sigmas[[i + 1 for i in index]].view(per_row)
    return Levels(sigma, sigma_next, scheduler.sigmas[1].item())


def guide(velocity: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the dtype of the network's output."""
    return uncond + scale * (velocity - uncond)


def transition(sample: Tensor, velocity: Tensor, levels: Levels, noise_level: float, noise: Tensor | None) -> Outputs:
    """The arithmetic of a step. noise: [B, *] float32, or None to draw it from torch's global generator."""
    velocity, sample = velocity.float(), sample.float()
    sigma, sigma_next, second = levels
    dt = sigma_next - sigma
    diffusion = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * noise_level
    drift = diffusion**2 / (2 * sigma)
    mean = sample * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
    std = diffusion * torch.sqrt(-dt)
    if noise is None:
        noise = torch.randn(velocity.shape, dtype=torch.float32, device=velocity.device)
    next_sample = mean + std * noise
    normaliser = torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    log_prob = -((next_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - normaliser
    clean = sample - sigma * velocity
    return Outputs(next_sample, log_prob.mean(dim=tuple(range(1, log_prob.dim()))), clean)


def guided_transition(
    sample: Tensor,
    velocity: Tensor,
    uncond: Tensor,
    levels: Levels,
    scale: float,
    noise_level: float,
    noise: Tensor | None,
) -> Outputs:
    """Guidance and step: what the pipeline computes between two calls of the network."""
    return transition(sample, guide(velocity, uncond, scale), levels, noise_level, noise)


def flow_grpo_step(
    scheduler: Scheduler, velocity: Tensor, timestep: Tensor, sample: Tensor, noise_level: float, noise: Tensor | None
) -> Outputs:
    """The system's step function, after guidance: look-ups and arithmetic. timestep: [1] or [B]."""
    return transition(sample, velocity, look_up(scheduler, timestep, sample.dim()), noise_level, noise)


Step = Callable[..., Outputs]


def chain(
    scheduler: Scheduler,
    sample: Tensor,
    velocity: Tensor,
    uncond: Tensor,
    timestep: Tensor,
    scale: float,
    noise_level: float,
    noise: Tensor | None = None,
    step: Step = guided_transition,
) -> Outputs:
    """Look-ups, guidance and step. `step` is `guided_transition`, eager or compiled."""
    levels = look_up(scheduler, timestep, sample.dim())
    return step(sample, velocity, uncond, levels, scale, noise_level, noise)


def compiled_step() -> Step:
    """`guided_transition` under torch.compile, one graph for fixed shapes: at its best, without the look-ups' graph breaks.

    Forgets what was compiled before: graphs of other shapes and thread counts would add up to torch's recompile limit.
    """
    torch.compiler.reset()
    return torch.compile(guided_transition, dynamic=False, fullgraph=True)
