"""`ff.rollout` and `ff.plan`: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..guidance import CFG
from ..noise import Noise
from .chains import Completion
from .engine import Engine
from .finish import Decode, Reward
from .network import Model
from .plan import Plan
from .setup import prepare
from .trajectory import Trajectory


def rollout(
    model: Model,
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
    decode: Decode | None = None,
    reward: Reward | None = None,
    state_dtype: torch.dtype = torch.float32,
    lockstep: str = "exact",
    main_rows: int | None = None,
    max_rows: int | None = None,
    max_decode: int | None = None,
    widths: Sequence[int] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Trajectory:
    """Samples B trajectories: states, log-probabilities and, with `dense`, a clean prediction and a reward from every state.

    model:        model(sample [N, *], sigma [N] float32, condition) -> velocity [N, *]; it gets the state in `state_dtype`.
    shape:        of one sample, without the batch.
    sigmas:       [T + 1], from ff.sigma_schedule or ff.sigmas_from(scheduler); for ff.DDIM its integer timesteps.
    dynamics:     ff.FlowSDE(...), ff.CPS(...), ff.ODE(), ...; or ff.Transitions (a mix made with `where`).
    seeds:        int64 [B], distinct: ff.sample_seeds(...). They key all noise, so a sample is the same in any batch or rank.
    initial:      None: noise of `seeds`; ff.Noise(group_seeds, shared=True): noise that a group shares; or the states [B, *].
    condition:    pytree with one entry per prompt (tensors [P, ...], lists of P); ff.Shared(x) passes x as it is.
    prompt_index: int64 [B], the prompt of each row. Default: B / P rows of each prompt, prompt-major.
    guidance:     ff.CFG; negative: pytree like condition, per prompt or one for all.
    steps:        indices of the stochastic steps, the others are ODE steps. Default: all.
    dense:        ff.Completion(...): complete states to clean samples. None: the final state alone.
    decode:       decode(clean [M, *], info) -> images; reward(images, info) -> [M], {name: [M]} or a Future of either.
    state_dtype:  of the stored states. One that is too narrow for a trained step (rounding above 2 % of its std) is refused.
    lockstep:     "exact": main rows go in calls of `main_rows` rows (default: all that fit), which a trainer can repeat bit for
                  bit, completions in others: T + (T - 1) calls. "full": all rows of a level together, T calls.
    max_rows:     most rows of a network call, unconditional rows included. widths: the only widths that calls may have.
    max_decode:   most clean samples of a decode and reward call.
    progress:     a bar on stderr if it is a terminal.
    device:       default: that of `initial`, else of the conditioning's first tensor, else of `seeds`.
    backend:      of the step kernels, as in ff.step.

    A state whose next step is the ODE step that its completion would take shares the completion of the state after it.
    Raises ValueError or TypeError naming the argument before the first call; afterwards RolloutError with `.partial` (a model
    that fails or returns NaN, a reward that fails, Ctrl-C). Source: DenseGRPO, arXiv 2601.20218; lockstep is this library's.
    """
    for name, value in (("model", model), ("decode", decode), ("reward", reward)):
        if not callable(value) and (value is not None or name == "model"):
            raise TypeError(f"{name}: wanted a function, got {type(value).__name__}")
    if decode is not None and reward is None:
        raise ValueError(
            "reward: wanted reward(images, info) beside decode, got None, so nothing would look at the images"
        )
    backends.require(backend)
    setup = prepare(
        shape, sigmas, dynamics, seeds, initial=initial, condition=condition, prompt_index=prompt_index,
        guidance=guidance, negative=negative, steps=steps, dense=dense, state_dtype=state_dtype, lockstep=lockstep,
        main_rows=main_rows, max_rows=max_rows, max_decode=max_decode, widths=widths, device=device,
    )  # fmt: skip
    engine = Engine(setup, model, condition, negative, decode, reward, backend, progress)
    return engine.run(initial)


def plan(
    model: Model | None,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    dynamics: Any,
    seeds: Tensor | Sequence[int],
    *,
    decode: Decode | None = None,
    reward: Reward | None = None,
    progress: bool = True,
    backend: str = "auto",
    **arguments: Any,
) -> Plan:
    """The network calls that `ff.rollout` with the same arguments will make. Calls nothing; reads no tensor on a device.
    `model`, `decode`, `reward`, `progress` and `backend` are taken so that one dictionary of arguments serves both; they change
    nothing here.

    `print(plan)` says how many calls, row evaluations and widths; `plan.calls` lists them. Raises what `ff.rollout` raises
    for the other arguments.
    """
    return prepare(shape, sigmas, dynamics, seeds, **arguments).plan
