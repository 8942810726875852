"""Rollouts of the engine beside those of the plain loop, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from tests.rollout import plain
from tests.rollout.networks import SHAPE, rows_of
from tests.tolerance import LOG_PROB_CHAIN, assert_same_at_another_width

T = 6
SIGMAS = ff.sigma_schedule(T, shift=3.0).tolist()
Scale = Callable[[int, float], "float | None"]


def expected(
    model: Any,
    traj: ff.Trajectory,
    condition: Any,
    negative: Any = None,
    scale: Scale | None = None,
    rule: plain.Rule | None = None,
    initial: Tensor | None = None,
    dense: ff.Completion | None = None,
    **fields: Any,
) -> list[plain.Row]:
    """Every sample by the plain loop; scale(row, sigma) is None where guidance is off."""
    result = []
    for b, (seed, prompt) in enumerate(zip(traj.seeds.tolist(), traj.prompt_index.tolist(), strict=True)):
        index = torch.tensor([prompt])
        mine, theirs = rows_of(condition, index), rows_of(negative, index)

        def velocity(x: Tensor, sigma: float, b: int = b, mine: Any = mine, theirs: Any = theirs) -> Tensor:
            level = torch.tensor([sigma], dtype=torch.float64).float()
            cond, strength = model(x, level, mine), scale(b, sigma) if scale is not None else None
            return cond if strength is None else plain.guided(cond, model(x, level, theirs), strength)

        start = initial[b] if initial is not None else plain.initial_noise(seed, SHAPE)
        loop = plain.Plain(velocity, **{"sigmas": SIGMAS, "rule": rule or plain.flow_sde(0.7), **fields})
        n = None if dense is None or dense.evaluations == "all" else int(dense.evaluations)
        spacing = dense.spacing if dense is not None else "sigma"
        result.append(loop.run(start, seed, traj.states, n, spacing))
    return result


def compare(traj: ff.Trajectory, rows: Sequence[plain.Row], label: str = "rollout", *, bitwise: bool = False) -> None:
    """All stored states, all clean predictions and the final state; log_probs of the stored steps."""
    states = torch.stack([torch.stack([row.states[p] for p in traj.positions]) for row in rows])
    clean = torch.stack([torch.stack([row.clean[s] for s in traj.states]) for row in rows])
    final = torch.stack([row.states[-1] for row in rows])
    scores = torch.tensor([[row.log_probs[k] for k in traj.steps] for row in rows])
    assert traj.clean is not None and traj.final is not None
    for name, actual, wanted in (
        ("samples", traj.samples, states),
        ("clean", traj.clean, clean),
        ("final", traj.final, final),
    ):
        if bitwise:
            assert torch.equal(actual, wanted), f"{label}, {name}: largest difference {(actual - wanted).abs().max()}"
        else:
            assert_same_at_another_width(actual, wanted, f"{label}, {name}")
    assert traj.log_probs.shape == scores.shape
    assert torch.allclose(traj.log_probs, scores, rtol=LOG_PROB_CHAIN, atol=LOG_PROB_CHAIN), (
        label,
        traj.log_probs - scores,
    )


def dense_rollout(model: Any, dynamics: Any, seeds: Tensor, **changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {"dense": ff.Completion(), "sigmas": SIGMAS, "progress": False, **changes}
    return ff.rollout(model, SHAPE, arguments.pop("sigmas"), dynamics, seeds, **arguments)


def everywhere(strength: float) -> Scale:
    return lambda row, sigma: strength
