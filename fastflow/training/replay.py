"""Replay: the network at stored transitions, called as the rollout called it."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dynamics import At
from ..guidance import CFG
from ..ops.log_prob import log_prob
from ..rollout.condition import gather
from ..rollout.network import Model, evaluate
from ..rollout.route import Route, scale_of
from ..rollout.setup import scale_table
from ..rollout.trajectory import Trajectory
from ..transfer import upload


class Replay(NamedTuple):
    """A stored transition with its velocities: the arguments of `ff.log_prob` and `ff.policy_loss`."""

    sample: Tensor  # [B, *]
    velocity: Tensor  # [B, *], conditional
    next_sample: Tensor  # [B, *]
    at: At
    uncond: Tensor | None  # [B, *]; None where guidance is off
    guidance: CFG | None

    def log_prob(self, **options: Any) -> Tensor:
        """`ff.log_prob` of it, [B]; options as there."""
        return log_prob(
            self.sample, self.velocity, self.next_sample, self.at, uncond=self.uncond, guidance=self.guidance, **options
        )


def replay(
    trajectory: Trajectory,
    k: int,
    model: Model | Route,
    *,
    condition: Any = None,
    negative: Any = None,
    guidance: CFG | None = None,
    rows: int | None = None,
) -> Replay:
    """The k-th stored transition with the velocities of `model`, evaluated as `ff.rollout` does: the same width, order of the
    halves, guidance interval and expert. Gradients flow if the caller's mode has them.

    trajectory: all of it, or a part `traj[index]`. condition, negative: as given to the rollout, one entry per prompt.
    model, guidance: as in the rollout. A scale per row must have this trajectory's rows.
    rows:       samples of a network call; the last call is padded by its first. Default: the rollout's own
                (`traj.stats.main_rows`), else all.

    At unchanged weights `replay(...).log_prob()` equals traj.log_probs[:, k] bit for bit where a call has the same rows in the
    same places as in the rollout. Raises IndexError for k outside, ValueError or TypeError naming the argument.
    """
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows: wanted an int of at least 1, or None, got {rows!r}")
    move = trajectory.transition(k)
    step, batch = trajectory.steps[k], len(trajectory)
    sigma = float(trajectory.sigmas[step])
    share = sigma / scale_of(trajectory.sigmas)
    network, guide = model.at(share, guidance) if isinstance(model, Route) else (model, guidance)
    guide = guide if guide is not None and guide.on(share) else None
    scales = scale_table(guide, len(trajectory.transitions), batch)
    if guide is not None and scales is not None:
        guide = changed(
            guide, scale=scales[step] if bool((scales[step] != scales[step, :1]).any()) else scales[step, 0]
        )
    size = rows or trajectory.stats.main_rows or max(batch, 1)
    velocities, unconds = [], []
    for start in range(0, batch, size):
        count = min(size, batch - start)
        index = torch.full((size,), start)
        index[:count] = torch.arange(start, start + count)
        prompts, places = trajectory.prompt_index.cpu()[index], upload(index, move.sample.device)
        velocity, uncond = evaluate(
            network,
            move.sample[start : start + size] if count == size else move.sample.index_select(0, places),
            torch.full((size,), sigma, dtype=torch.float32, device=move.sample.device),
            gather(condition, prompts),
            gather(negative, prompts) if guide is not None else None,
            guide,
        )
        velocities.append(velocity[:count])
        if uncond is not None:
            unconds.append(uncond[:count])
    if not velocities:  # of no samples
        velocities, unconds = (
            [torch.empty_like(move.sample)],
            [torch.empty_like(move.sample)] if guide is not None else [],
        )
    uncond = torch.cat(unconds) if unconds else None
    return Replay(move.sample, torch.cat(velocities), move.next_sample, move.at, uncond, guide)


def rescore(
    trajectory: Trajectory,
    model: Model | Route,
    *,
    condition: Any = None,
    negative: Any = None,
    guidance: CFG | None = None,
    rows: int | None = None,
    backend: str = "auto",
) -> Trajectory:
    """The trajectory with log_probs [B, K] computed anew by `model`: old log-probabilities at the trainer's own call width, for
    rollouts with `lockstep="full"` or of another engine. Arguments and errors: as `ff.replay`; runs without gradients.
    """
    scores = []
    with torch.no_grad():
        for k in range(len(trajectory.steps)):
            again = replay(trajectory, k, model, condition=condition, negative=negative, guidance=guidance, rows=rows)
            scores.append(again.log_prob(backend=backend))
    table = torch.stack(scores, 1) if scores else trajectory.log_probs
    return changed(trajectory, log_probs=table.to(trajectory.log_probs.device))
