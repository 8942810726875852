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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import Sigmas


class Outputs(NamedTuple):
    next_sample: Tensor  # [B, *] float32
    log_prob: Tensor  # [B] float32, nats, mean over elements
    clean: Tensor  # [B, *] float32


class Moved(NamedTuple):
    """What flow_grpo's own function returns: no clean prediction."""

    next_sample: Tensor
    log_prob: Tensor


class Dense(NamedTuple):
    """With the Euler step that a completion takes from here."""

    next_sample: Tensor
    log_prob: Tensor
    clean: Tensor
    ode_next: Tensor


@dataclass(frozen=True)
class Scheduler:
    """What the chain asks of diffusers' FlowMatchEulerDiscreteScheduler: float32 tables and the look-up."""

    sigmas: Tensor  # [T + 1]
    timesteps: Tensor  # [T]

    @staticmethod
    def of(sigmas: Sigmas, device: torch.device | str = "cpu") -> Scheduler:
        """flow_grpo moves both tables to the sample's device, so each look-up on a GPU waits for it."""
        return Scheduler(sigmas.float().to(device), sigmas.timesteps.float().to(device))

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


def moments(
    sample: Tensor, velocity: Tensor, levels: Levels, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, std, sample, velocity): of the transition, and its inputs in float32."""
    velocity, sample = velocity.float(), sample.float()
    sigma, sigma_next, second = levels
    dt = sigma_next - sigma
    diffusion = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * noise_level
    drift = diffusion**2 / (2 * sigma)
    mean = sample * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
    return mean, diffusion * torch.sqrt(-dt), sample, velocity


def score(next_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B] nats, mean over elements."""
    normaliser = torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    log_prob = -((next_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - normaliser
    return log_prob.mean(dim=tuple(range(1, log_prob.dim())))


def transition(sample: Tensor, velocity: Tensor, levels: Levels, noise_level: float, noise: Tensor | None) -> Outputs:
    """The arithmetic of a step. noise: [B, *] float32, or None to draw it from torch's global generator."""
    mean, std, sample, velocity = moments(sample, velocity, levels, noise_level)
    next_sample = drawn(mean, std, noise)
    log_prob = score(next_sample, mean, std)
    return Outputs(next_sample, log_prob, sample - levels.sigma * velocity)


def drawn(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """The next sample."""
    return mean + std * (torch.randn(mean.shape, dtype=torch.float32, device=mean.device) if noise is None else noise)


def moved(
    sample: Tensor, velocity: Tensor, uncond: Tensor, levels: Levels, scale: float, noise_level: float, noise: Tensor | None
) -> Moved:  # fmt: skip
    """Guidance and step without the clean prediction."""
    mean, std, _, _ = moments(sample, guide(velocity, uncond, scale), levels, noise_level)
    next_sample = drawn(mean, std, noise)
    return Moved(next_sample, score(next_sample, mean, std))


def dense(
    sample: Tensor, velocity: Tensor, uncond: Tensor, levels: Levels, scale: float, noise_level: float, noise: Tensor | None
) -> Dense:  # fmt: skip
    """Guidance and step with the clean prediction and a completion's Euler step."""
    guided = guide(velocity, uncond, scale)
    out = transition(sample, guided, levels, noise_level, noise)
    return Dense(*out, sample.float() + (levels.sigma_next - levels.sigma) * guided.float())


def replay(
    sample: Tensor, velocity: Tensor, uncond: Tensor, next_sample: Tensor, levels: Levels, scale: float, noise_level: float
) -> Tensor:  # fmt: skip
    """The log-probability of a stored transition, as in training: the unconditional velocity is a constant. [B]."""
    mean, std, _, _ = moments(sample, guide(velocity, uncond.detach(), scale), levels, noise_level)
    return score(next_sample.float(), mean, std)


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate of flow_grpo's training loop, mean over rows."""
    ratio = torch.exp(log_prob - old_log_prob)
    plain, clipped = -advantage * ratio, -advantage * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    return torch.mean(torch.maximum(plain, clipped))


def nft_loss(
    noisy: Tensor, clean: Tensor, velocity: Tensor, old: Tensor, sigma: Tensor, advantage: Tensor, beta: float, most: float
) -> Tensor:  # fmt: skip
    """DiffusionNFT's loss (arXiv 2509.16117) as its authors' code has it: the clean samples of two mixed velocities."""
    level = sigma.view(-1, *[1] * (clean.dim() - 1))
    axes = tuple(range(1, clean.dim()))
    share = (advantage / most / 2.0 + 0.5).clamp(0, 1)
    losses = []
    for mixed in (beta * velocity + (1 - beta) * old, (1.0 + beta) * old - beta * velocity):
        predicted = noisy - level * mixed
        with torch.no_grad():
            size = torch.abs(predicted - clean).mean(dim=axes, keepdim=True).clip(min=1e-5)
        losses.append(((predicted - clean) ** 2 / size).mean(dim=axes))
    return torch.mean((share * losses[0] / beta + (1.0 - share) * losses[1] / beta) * most)


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


Step = Callable[..., Any]


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
) -> Any:
    """Look-ups, guidance and step. `step`: `guided_transition`, `moved` or `dense`, eager or compiled."""
    levels = look_up(scheduler, timestep, sample.dim())
    return step(sample, velocity, uncond, levels, scale, noise_level, noise)


def compiled_step(step: Step = guided_transition) -> Step:
    """A step under torch.compile, one graph for fixed shapes: at its best, without the look-ups' graph breaks.

    Forgets what was compiled before: graphs of other shapes and thread counts would add up to torch's recompile limit.
    """
    torch.compiler.reset()
    return torch.compile(step, dynamic=False, fullgraph=True)
