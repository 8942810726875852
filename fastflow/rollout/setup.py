"""The layout of a rollout: everything that is known before the first network call, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dynamics import ODE, Sigmas, Transitions
from ..dynamics import columns as col
from ..guidance import CFG
from ..noise import Noise, check_seeds
from . import arguments
from . import condition as conditioning
from .chains import Chain, Completion, chain_table, open_chains, with_first_moves
from .plan import Plan, make_plan


@dataclass(frozen=True, eq=False)
class Setup:
    """A rollout's tables. Slots are completions in order of opening; the last slot is the final state."""

    batch: int
    shape: tuple[int, ...]
    device: torch.device
    state_dtype: torch.dtype
    seeds: Tensor
    prompt_index: Tensor
    sigmas: Sigmas
    main: Transitions
    moves: Transitions  # main, its ODE columns holding the first move of each completion
    steps: tuple[int, ...]  # trained
    positions: tuple[int, ...]  # stored states
    states: tuple[int, ...]  # completed states
    chains: tuple[Chain, ...]
    slots: tuple[int, ...]  # slot of each completed state
    completions: Transitions | None
    guidance: CFG | None
    plan: Plan
    max_decode: int | None

    @property
    def length(self) -> int:
        return len(self.main)

    def opened_at(self, level: int) -> int | None:
        """The slot of the completion that opens at this level."""
        return next((slot for slot, chain in enumerate(self.chains) if chain.state == level), None)

    def positions_of_slots(self) -> list[int]:
        """The state that each slot completes."""
        return [*(chain.state for chain in self.chains), self.length]


def prepare(
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    dynamics: Any,
    seeds: Tensor | Sequence[int],
    *,
    initial: Noise | Tensor | None = None,
    condition: Any = None,
    prompt_index: Tensor | Sequence[int] | None = None,
    guidance: CFG | None = None,
    negative: Any = None,
    steps: Sequence[int] | None = None,
    dense: Completion | None = None,
    state_dtype: torch.dtype = torch.float32,
    lockstep: str = "exact",
    main_rows: int | None = None,
    max_rows: int | None = None,
    max_decode: int | None = None,
    widths: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Setup:
    """Checks the arguments of `ff.rollout` and lays out the rollout. Raises ValueError or TypeError naming the argument."""
    shape = arguments.sizes(shape)
    seeds = check_seeds(seeds)
    batch = seeds.shape[0]
    schedule = sigmas if isinstance(sigmas, Sigmas) else Sigmas(sigmas)
    steps = None if steps is None else arguments.ints("steps", steps, "step indices such as (3, 4)")
    main = arguments.transitions_of(dynamics, schedule, steps)
    trained = arguments.trained_steps(main, steps)
    arguments.check_dtype(state_dtype, main, trained)
    arguments.check_initial(initial, batch, shape, state_dtype, schedule)
    prompts = conditioning.prompts_of(condition, "condition")
    index = arguments.prompts_of_rows(prompt_index, batch, prompts)
    if prompts is not None:
        conditioning.check(condition, prompts, "condition")
        conditioning.check(negative, prompts, "negative", broadcast=True)
    if dense is not None and not isinstance(dense, Completion):
        raise TypeError(f"dense: wanted ff.Completion(...) or None, got {type(dense).__name__}")
    if isinstance(dynamics, Transitions) and dense is not None and dense.evaluations not in ("all", 1):
        dynamics = ODE()
    states = dense.positions(len(main), trained) if dense is not None else (len(main),)
    chains, owner = open_chains(dense or Completion(), states, schedule, main, dynamics)
    guidance = arguments.check_guidance(guidance, negative, condition, batch, len(main))
    limits = arguments.limits_of(lockstep, main_rows, max_rows, max_decode, widths, guidance)

    def guided(level: int, chain: Chain | None) -> bool:
        if guidance is None:
            return False
        sigma = main.sigma[level] if chain is None else chain.rows[level - chain.state, col.SIGMA]
        return guidance.on(float(sigma) / max(1.0, float(schedule[0])))

    halves = 2 if guidance is not None and guidance.calls == 1 else 1
    return Setup(
        batch=batch,
        shape=shape,
        device=arguments.device_of(device, initial, condition, seeds),
        state_dtype=state_dtype,
        seeds=seeds,
        prompt_index=index,
        sigmas=schedule,
        main=main,
        moves=with_first_moves(main, chains),
        steps=trained,
        positions=tuple(sorted({p for s in trained for p in (s, s + 1)})) or (len(main),),
        states=states,
        chains=tuple(chains),
        slots=tuple(owner[s] for s in states),
        completions=chain_table(chains),
        guidance=guidance,
        plan=make_plan(batch, len(main), chains, guided, halves, limits),
        max_decode=max_decode,
    )
