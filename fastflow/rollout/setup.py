"""Arguments of a rollout, checked and turned into tables: everything that is known before the first network call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..dynamics import ODE, At, Sigmas, Transitions
from ..dynamics import columns as col
from ..guidance import CFG
from ..noise import Noise, check_seeds
from . import condition as conditioning
from .chains import Chain, Completion, chain_table, open_chains, with_first_moves
from .plan import Call, Limits, Plan, make_plan

ROUNDING_SHARE = 0.02  # of std: most rounding of a stored state that a trained step may see


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


@dataclass(frozen=True, eq=False)
class CallInputs:
    """What a call needs on the device, made before the loop so that the loop copies nothing from the host."""

    call: Call
    prompts: Tensor  # int64 [padded], host
    sigma: Tensor  # float32 [padded], device
    at: At | None  # of the completions
    main_guidance: CFG | None
    completion_guidance: CFG | None


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
    shape = _shape(shape)
    seeds = check_seeds(seeds)
    batch = seeds.shape[0]
    schedule = sigmas if isinstance(sigmas, Sigmas) else Sigmas(sigmas)
    steps = None if steps is None else _ints("steps", steps, "step indices such as (3, 4)")
    main = _transitions(dynamics, schedule, steps)
    trained = _trained(main, steps)
    _check_dtype(state_dtype, main, trained)
    _check_initial(initial, batch, shape, state_dtype, schedule)
    prompts = conditioning.prompts_of(condition, "condition")
    index = _prompt_index(prompt_index, batch, prompts)
    if prompts is not None:
        conditioning.check(condition, prompts, "condition")
        conditioning.check(negative, prompts, "negative", broadcast=True)
    if dense is not None and not isinstance(dense, Completion):
        raise TypeError(f"dense: wanted ff.Completion(...) or None, got {type(dense).__name__}")
    if isinstance(dynamics, Transitions) and dense is not None and dense.evaluations not in ("all", 1):
        dynamics = ODE()
    states = dense.positions(len(main), trained) if dense is not None else (len(main),)
    chains, owner = open_chains(dense or Completion(), states, schedule, main, dynamics)
    guidance = _guidance(guidance, negative, condition, batch, len(main))
    limits = _limits(lockstep, main_rows, max_rows, max_decode, widths, guidance)

    def guided(level: int, chain: Chain | None) -> bool:
        if guidance is None:
            return False
        sigma = main.sigma[level] if chain is None else chain.rows[level - chain.state, col.SIGMA]
        return guidance.on(float(sigma) / max(1.0, float(schedule[0])))

    halves = 2 if guidance is not None and guidance.calls == 1 else 1
    return Setup(
        batch=batch,
        shape=shape,
        device=_device(device, initial, condition, seeds),
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


def call_inputs(setup: Setup) -> list[CallInputs]:
    """The device inputs of every call of the plan."""
    scales = _scale_table(setup)
    repeated = setup.prompt_index.repeat(max(len(setup.chains), 1))
    main_sigma = setup.main.sigma
    inputs = []
    for call in setup.plan.calls:
        (lo, hi), (first, last) = call.main, call.completions
        moves = _moves(setup, call)
        sigma = [main_sigma[call.step].expand(hi - lo)]
        at, completion_guidance = None, None
        if setup.completions is not None and last > first:
            rows = setup.completions.state_dict()["table"][moves]
            sigma.append(rows[:, col.SIGMA])
            same = bool((rows == rows[:1]).all())
            at = setup.completions.at(int(moves[0]) if same else moves.to(setup.device))
            if scales is not None:
                level = (main_sigma[None] >= rows[:, col.SIGMA, None] - 1e-12).sum(1) - 1
                completion_guidance = _scaled(setup.guidance, scales[level, torch.arange(first, last) % setup.batch])
        main_guidance = _scaled(setup.guidance, scales[call.step, lo:hi]) if scales is not None else setup.guidance
        prompts = torch.cat([setup.prompt_index[lo:hi], repeated[first:last]])
        inputs.append(
            CallInputs(
                call=call,
                prompts=_padded(prompts, call.padded),
                sigma=_padded(torch.cat(sigma), call.padded).to(dtype=torch.float32).to(setup.device),
                at=at,
                main_guidance=main_guidance if call.guided else None,
                completion_guidance=(completion_guidance or setup.guidance) if call.guided else None,
            )
        )
    return inputs


def _moves(setup: Setup, call: Call) -> Tensor:
    """Rows of the completions' table for the call's completions."""
    first, last = call.completions
    chain = torch.arange(first, last) // max(setup.batch, 1)
    start = torch.tensor([c.first - c.state for c in setup.chains] or [0])
    return start[chain] + call.step


def _padded(values: Tensor, size: int) -> Tensor:
    """The values, the first one repeated behind them up to `size`: what padding rows are."""
    return torch.cat([values, values[:1].expand(size - values.shape[0])])


def _scaled(guidance: CFG | None, scale: Tensor) -> CFG | None:
    if guidance is None:
        return None
    return replace(guidance, scale=scale[0] if bool((scale == scale[:1]).all()) and len(scale) else scale)


def _scale_table(setup: Setup) -> Tensor | None:
    """Guidance scales float64 [T, B]; None where there is one number for all."""
    if setup.guidance is None or setup.guidance.values.dim() == 0:
        return None
    values = setup.guidance.values
    if values.dim() == 1:
        values = values[:, None] if values.shape[0] == setup.length else values[None]
    return values.expand(setup.length, setup.batch)


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"shape: wanted the sizes of one sample, such as (16, 64, 64), got {shape!r}")
    return sizes


def _ints(name: str, values: Any, wanted: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(v) for v in values)
    except TypeError as error:
        raise TypeError(f"{name}: wanted {wanted}, got {values!r}") from error


def _transitions(dynamics: Any, sigmas: Sigmas, steps: Sequence[int] | None) -> Transitions:
    if isinstance(dynamics, Transitions):
        if steps is not None:
            raise ValueError("steps: wanted None beside ready transitions; give `steps` to dynamics.transitions(...)")
        if len(dynamics) != sigmas.steps:
            raise ValueError(
                f"dynamics: wanted {sigmas.steps} transitions, one per step of sigmas, got {len(dynamics)}"
            )
        return dynamics
    if not hasattr(dynamics, "transitions"):
        raise TypeError(
            f"dynamics: wanted ff.FlowSDE(...), ff.CPS(...), ... or ff.Transitions, got {type(dynamics).__name__}"
        )
    result: Transitions = dynamics.transitions(sigmas, steps=steps)
    return result


def _trained(main: Transitions, steps: Sequence[int] | None) -> tuple[int, ...]:
    if steps is not None:
        return tuple(sorted(steps))
    return tuple(i for i, std in enumerate(main.std.tolist()) if std > 0)


def _check_dtype(dtype: torch.dtype, main: Transitions, trained: tuple[int, ...]) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"state_dtype: wanted float32, bfloat16, float16 or float64, got {dtype}")
    rounding = torch.finfo(dtype).eps / 2  # of a value near 1, the scale of a state
    tight = [i for i in trained if 0 < float(main.std[i]) * ROUNDING_SHARE < rounding]
    if tight:
        worst = min(tight, key=lambda i: float(main.std[i]))
        raise ValueError(
            f"state_dtype: {dtype} rounds a state by up to {rounding:.1e}, above {ROUNDING_SHARE:.0%} of std "
            f"{float(main.std[worst]):.2e} at step {worst}; wanted float32, or steps= without {tight}"
        )


def _check_initial(initial: Any, batch: int, shape: tuple[int, ...], dtype: torch.dtype, sigmas: Sigmas) -> None:
    if isinstance(initial, Tensor):
        if tuple(initial.shape) != (batch, *shape):
            raise ValueError(f"initial: wanted states {(batch, *shape)}, got {tuple(initial.shape)}")
        if not initial.is_floating_point() or torch.promote_types(initial.dtype, dtype) != dtype:
            raise TypeError(
                f"initial: wanted {dtype} (state_dtype) or narrower, got {initial.dtype}; cast it yourself if you mean it"
            )
        if initial.device.type == "cpu" and not bool(torch.isfinite(initial).all()):
            raise ValueError("initial: wanted finite states, got NaN or inf")
        return
    if isinstance(initial, Noise):
        if initial.seeds.shape[0] != batch:
            raise ValueError(f"initial.seeds: wanted one per row, {batch}, got {initial.seeds.shape[0]}")
    elif initial is not None:
        raise TypeError(f"initial: wanted None, ff.Noise(seeds) or the states, got {type(initial).__name__}")
    if float(sigmas[0]) < 1.0 - 1e-4:
        raise ValueError(
            f"initial: wanted the states [B, *], since the schedule starts at sigma {float(sigmas[0]):.4g} and not at noise, "
            f"got {initial}"
        )


def _prompt_index(index: Any, batch: int, prompts: int | None) -> Tensor:
    if index is None:
        if prompts is None:
            return torch.zeros(batch, dtype=torch.int64)
        if prompts == 0 or batch % prompts:
            raise ValueError(
                f"prompt_index: wanted int64 [{batch}], since {batch} rows do not divide among {prompts} prompts, got None"
            )
        return torch.arange(prompts).repeat_interleave(batch // prompts)
    rows: Tensor = torch.as_tensor(index, device="cpu")
    if rows.dtype not in (torch.int64, torch.int32) or rows.shape != (batch,):
        raise ValueError(f"prompt_index: wanted int64 [{batch}], got {rows.dtype} {tuple(rows.shape)}")
    if batch and prompts is not None and (int(rows.min()) < 0 or int(rows.max()) >= prompts):
        raise ValueError(f"prompt_index: wanted 0 to {prompts - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows.to(torch.int64)


def _guidance(guidance: Any, negative: Any, condition: Any, batch: int, length: int) -> CFG | None:
    if guidance is None:
        if negative is not None:
            raise ValueError("guidance: wanted ff.CFG(scale) beside negative, got None")
        return None
    if not isinstance(guidance, CFG):
        raise TypeError(f"guidance: wanted ff.CFG(scale, ...), got {type(guidance).__name__}")
    if condition is not None and negative is None:
        raise ValueError("negative: wanted the unconditional conditioning beside guidance, got None")
    if guidance.calls == 1:
        conditioning.check_pair(negative, condition)
    values = guidance.values
    if values.dim() == 1:
        if batch == length and values.shape[0] == batch:
            raise ValueError(
                f"guidance.scale: [{batch}] could be per step or per row; give [{length}, 1] or [1, {batch}]"
            )
        if values.shape[0] not in (batch, length):
            raise ValueError(
                f"guidance.scale: wanted a number, [{length}] (per step) or [{batch}] (per row), got {tuple(values.shape)}"
            )
    if values.dim() == 2 and (values.shape[0] not in (1, length) or values.shape[1] not in (1, batch)):
        raise ValueError(f"guidance.scale: wanted [{length}, {batch}] (or 1 for either), got {tuple(values.shape)}")
    return guidance


def _limits(
    lockstep: str,
    main_rows: int | None,
    max_rows: int | None,
    max_decode: int | None,
    widths: Any,
    guidance: CFG | None,
) -> Limits:
    if lockstep not in ("exact", "full"):
        raise ValueError(f'lockstep: wanted "exact" or "full", got {lockstep!r}')
    for name, value in (("main_rows", main_rows), ("max_rows", max_rows), ("max_decode", max_decode)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: wanted an int of at least 1, or None, got {value!r}")
    if main_rows is not None and lockstep == "full":
        raise ValueError(
            'main_rows: wanted None beside lockstep="full", whose calls mix main rows and completions, got '
            + str(main_rows)
        )
    if widths is not None:
        widths = _ints("widths", widths, "row counts such as (8, 16)")
        halves = 2 if guidance is not None and guidance.calls == 1 else 1
        if not widths or min(widths) < 1 or any(w % halves for w in widths):
            even = " that are even (unconditional rows share the call)" if halves == 2 else ""
            raise ValueError(f"widths: wanted row counts{even}, got {widths}")
    return Limits(lockstep, main_rows, max_rows, widths)


def _device(device: Any, initial: Any, condition: Any, seeds: Tensor) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(initial, Tensor):
        return initial.device
    found: list[torch.device] = []
    conditioning.tree_map(
        lambda _, v: found.append(v.device) if isinstance(v, Tensor) else None, condition, "condition"
    )
    return found[0] if found else seeds.device
