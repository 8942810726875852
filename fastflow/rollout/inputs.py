"""What each call needs on the device, made before the loop so that the loop copies nothing from the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dynamics import At
from ..dynamics import columns as col
from ..guidance import CFG
from .plan import Call
from .setup import Setup


@dataclass(frozen=True, eq=False)
class CallInputs:
    """The inputs of one call; padding repeats its first row."""

    call: Call
    prompts: Tensor  # int64 [padded], host
    sigma: Tensor  # float32 [padded], device
    at: At | None  # of the completions
    main_guidance: CFG | None
    completion_guidance: CFG | None


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
