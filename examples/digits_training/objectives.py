"""The losses of a chunk, part by part: of stored transitions, or of the forward process."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import fastflow as ff

from .network import Network

RENOISED = 3  # the stream of DiffusionNFT's noise: the rollout has drawn from others


@dataclass
class Part:
    """A chunk of an update: its digits, its samples and the advantages [B, K] of its parts."""

    chunk: list[int]
    trajectory: ff.Trajectory
    advantages: Tensor
    info: ff.GroupInfo
    kept: list[Any] = field(default_factory=list)  # of the networks that do not change during the update


class Policy:
    """Flow-GRPO, DenseGRPO and TP-GRPO: the clipped policy gradient of every stored transition."""

    distance = "KL"  # info["kl"], from the network as it came

    def __init__(self, args: Namespace, network: Network) -> None:
        self.args, self.network = args, network

    def prepare(self, part: Part) -> None:
        """Keeps the stored transitions with the reference's velocities, for the KL."""
        conditions = self.network.conditions(part.chunk)
        with self.network.as_it_came():
            for k in range(len(part.trajectory.steps)):
                part.kept.append(ff.replay(part.trajectory, k, self.network.model, **conditions))

    def loss(self, part: Part, k: int, inner: int) -> tuple[Tensor, dict[str, Tensor]]:
        trajectory, reference, args = part.trajectory, part.kept[k], self.args
        again = ff.replay(trajectory, k, self.network.model, **self.network.conditions(part.chunk))
        return ff.policy_loss(
            again.sample,
            again.velocity,
            again.next_sample,
            again.at,
            trajectory.log_probs[:, k],
            part.advantages[:, k],
            clip=(args.clip, args.clip),
            uncond=again.uncond,
            guidance=again.guidance,
            ref_velocity=reference.velocity,
            ref_uncond=reference.uncond,
            kl="gaussian",
            kl_weight=args.kl_weight,
        )


class Forward:
    """DiffusionNFT: the finished samples noised again to every level of the schedule; no transition is stored."""

    distance = (
        "velocity MSE"  # info["kl"], from the network as it came: a squared difference, no divergence of distributions
    )

    def __init__(self, args: Namespace, network: Network) -> None:
        self.args, self.network = args, network

    def prepare(self, part: Part) -> None:
        """Nothing: noise and levels are drawn anew in every optimizer step."""

    def loss(self, part: Part, k: int, inner: int) -> tuple[Tensor, dict[str, Tensor]]:
        trajectory, network = part.trajectory, self.network
        clean, levels = trajectory.final, trajectory.sigmas[:-1]
        sigma = levels[k].float().expand(len(clean)).to(clean.device)
        noise = ff.Noise(trajectory.seeds, step=inner * len(levels) + k, stream=RENOISED)
        noised = ff.noised(clean, sigma, noise)
        condition = ff.gather(network.embeddings.condition(part.chunk), trajectory.prompt_index)
        with network.as_it_samples():
            old = network.model(noised, sigma, condition)
        with network.as_it_came():
            reference = network.model(noised, sigma, condition)
        return ff.matching_loss(
            network.model(noised, sigma, condition),
            clean,
            sigma,
            noise,
            objective="nft",
            advantage=part.advantages[:, k],
            old_velocity=old,
            ref_velocity=reference,
            beta=self.args.beta,
            kl_weight=self.args.kl_weight,
        )
