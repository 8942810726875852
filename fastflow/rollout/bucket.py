"""One captured call of a width: which rows it reads and writes, their coefficients, noise and prompts are all on the device."""

from __future__ import annotations

from collections.abc import Sequence
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dynamics import At
from ..dynamics.transitions import Table
from ..noise import Noise
from ..ops.launch import Launch
from . import condition as conditioning
from .arena import Arena
from .condition import Shared
from .inputs import CallInputs
from .network import Conditioned
from .plan import Call
from .setup import Setup
from .steps import CallSteps

# Per row of a call: where it is read; its prompt, coefficients, seed and step; where outputs go.
ROW, PROMPT, COEF, SEED, STEP, NEXT, ODE, SCORE, FLAG, MEAN, FIELDS = range(11)
WRITES = ((NEXT, "states"), (ODE, "states"), (SCORE, "scores"), (FLAG, "flags"), (MEAN, "means"))


class Key(NamedTuple):
    """What calls must have in common to share a graph."""

    route: int
    guided: bool
    padded: int
    width: int


def key_of(call: Call) -> Key:
    return Key(call.route, call.guided, call.padded, call.width)


class Coefficients(Table):
    """The main chain's moves, then those of all completions, [n, 16] at one address of the device."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(torch.empty(0), setup.main.score, setup.main.name)
        self.fixed = self._made(setup)

    @staticmethod
    def _made(setup: Setup) -> Tensor:
        dtype = torch.float64 if setup.state_dtype == torch.float64 else torch.float32
        tables = [setup.moves] if setup.completions is None else [setup.moves, setup.completions]
        return torch.cat([table.table(dtype, setup.device) for table in tables])

    def fill(self, setup: Setup) -> None:
        self.fixed.copy_(self._made(setup))

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        return self.fixed


class Shelf:
    """A rollout's numbers for every call, and its conditioning by prompt, where graphs read them."""

    def __init__(self, setup: Setup) -> None:
        self.table = Coefficients(setup)
        self.condition, self.negative = _copied(setup.condition), _copied(setup.negative)
        self.numbers: list[tuple[Tensor, Tensor]] = []

    def fill(self, setup: Setup, arena: Arena, steps: Sequence[CallSteps], seeds: Tensor) -> None:
        self.table.fill(setup)
        _copy(setup.condition, self.condition)
        _copy(setup.negative, self.negative)
        whole = seeds.cpu()
        self.numbers = []
        for call in steps:
            ints, floats = _numbers(setup, arena, call, whole)
            self.numbers.append((ints.to(setup.device), floats.to(setup.device)))


class Bucket:
    """The body of a graph: gather, network, guidance, step, writes."""

    def __init__(self, key: Key, setup: Setup, arena: Arena, shelf: Shelf, backend: str) -> None:
        self.model, self.guidance = setup.models[key.route], setup.guidance[key.route] if key.guided else None
        self.arena, self.shelf, self.backend = arena, shelf, backend
        wide = torch.float64 if setup.state_dtype == torch.float64 else torch.float32
        self.ints = _nowhere(arena, key.padded).to(setup.device)
        self.sigma = torch.ones(key.padded, dtype=torch.float32, device=setup.device)
        self.scale = torch.ones(key.padded, dtype=wide, device=setup.device)

    def load(self, number: int) -> None:
        """The numbers of one call of the plan."""
        ints, floats = self.shelf.numbers[number]
        self.ints.copy_(ints)
        self.sigma.copy_(floats[0])
        self.scale.copy_(floats[1])

    def __call__(self) -> None:
        field, arena, shelf = self.ints, self.arena, self.shelf
        sample = arena.whole["states"].index_select(0, field[ROW])
        condition = conditioning.gather(shelf.condition, field[PROMPT])
        guidance = self.guidance.with_rows(self.scale) if self.guidance is not None else None
        negative = conditioning.gather(shelf.negative, field[PROMPT]) if guidance is not None else None
        conditioned = Conditioned(None, condition, negative, guidance)
        velocity, uncond = conditioned.evaluate(self.model, sample, self.sigma)
        out = {
            "next_sample": torch.empty_like(sample),
            "ode_next": torch.empty_like(sample),
            "log_prob": arena.whole["scores"].new_empty(len(sample)),
            "flags": arena.whole["flags"].new_empty(len(sample)),
        }
        fields = [NEXT, ODE, SCORE, FLAG]
        if len(arena.whole["means"]):
            out["mean"] = torch.empty_like(sample, dtype=arena.whole["means"].dtype)
            fields.append(MEAN)
        noise = Noise(field[SEED], field[STEP], shared=True)
        at = At(self.shelf.table, field[COEF])
        Launch(sample, at, out, noise=noise, guidance=guidance, backend=self.backend)(velocity, uncond)
        kinds = dict(WRITES)
        for written, value in zip(fields, out.values(), strict=True):
            arena.whole[kinds[written]].index_copy_(0, field[written], value)


def _nowhere(arena: Arena, padded: int) -> Tensor:
    """int64 [FIELDS, padded]: rows that read the first of everything and write what nobody reads."""
    ints = torch.zeros(FIELDS, padded, dtype=torch.int64)
    for field, kind in WRITES:
        ints[field] = arena.trash(kind) if len(arena.whole[kind]) else 0
    return ints


def _numbers(setup: Setup, arena: Arena, steps: CallSteps, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [FIELDS, padded], float64 [2: sigma, scale; padded]) of a call."""
    inputs, call, layout = steps.inputs, steps.inputs.call, setup.layout
    lo, hi = call.main
    main, rest, level = slice(0, hi - lo), slice(hi - lo, call.rows), call.step
    ints = _nowhere(arena, call.padded)
    for place, state in zip((main, rest), steps.states, strict=True):
        ints[ROW, place] = arena.places("states", state)
    ints[PROMPT] = inputs.prompts
    ints[STEP] = level
    samples = layout.main(level)[lo:hi]
    if steps.main is not None:
        ints[COEF, main], ints[SEED, main] = level, seeds[samples]
        out = steps.main.out
        for field, name, kind in (
            (NEXT, "next_sample", "states"), (SCORE, "log_prob", "scores"), (FLAG, "flags", "flags"), (MEAN, "mean", "means"),
        ):  # fmt: skip
            if name in out:
                ints[field, main] = arena.places(kind, out[name])
        if inputs.opened is not None:
            rows, places = (t.cpu() for t in inputs.opened)
            ints[ODE, rows] = arena.places("states", steps.main.buffers.store)[places]
        elif "ode_next" in out:
            ints[ODE, main] = arena.places("states", out["ode_next"])
    if steps.completions is not None and inputs.moves is not None:
        ints[COEF, rest] = setup.length + inputs.moves
        ints[NEXT, rest] = ints[ROW, rest]
        ints[FLAG, rest] = arena.places("flags", steps.completions.flags)
    used = call.rows
    for field in (ROW, COEF, SEED):
        ints[field, used:] = ints[field, 0]  # padding repeats the first row
    return ints, torch.stack([inputs.sigma.double().cpu(), _scales(setup, inputs, samples)])


def _scales(setup: Setup, inputs: CallInputs, samples: Tensor) -> Tensor:
    """Guidance scale of each row, float64 [padded]; 1 without guidance."""
    call = inputs.call
    scales = torch.ones(call.padded, dtype=torch.float64)
    for guidance, place in (
        (inputs.main_guidance, slice(0, len(samples))), (inputs.completion_guidance, slice(len(samples), call.rows)),
    ):  # fmt: skip
        if guidance is not None and place.stop > place.start:
            scales[place] = guidance.values.reshape(-1)
    scales[call.rows :] = scales[:1]
    return scales


def signature(setup: Setup, counts: dict[str, int], backend: str) -> Any:
    """What graphs were captured for: sizes, networks, guidance, and the shapes of the conditioning."""
    guidance = [None if g is None else (g.calls, g.rescale, g.axis, g.dtype) for g in setup.guidance]
    tables = len(setup.main) + (len(setup.completions.table()) if setup.completions is not None else 0)
    sizes = (setup.shape, setup.state_dtype, setup.device, tables, tuple(sorted(counts.items())))
    kind = setup.device.type
    autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    networks = tuple(map(_identity, setup.models))
    shapes = (_shape(setup.condition), _shape(setup.negative))
    return sizes, setup.main.score, networks, guidance, shapes, backend, autocast


def _identity(model: Any) -> Any:
    """What tells networks apart: of an adapter, what it holds and how it casts; adapters of one module are one network."""
    module = getattr(model, "module", model)
    casts = (getattr(model, "dtype", None), getattr(model, "timestep_cast", None))
    return id(module), type(model), casts, getattr(module, "training", None), _addresses(module)


def _addresses(network: Any) -> int:
    """One number for where the weights lie that can be seen from a network: a module's, or those that a function or an object
    holds. A graph reads them there."""
    cells = getattr(network, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]
    held += [network, getattr(network, "__self__", None), *getattr(network, "__dict__", {}).values()]
    modules = [m for m in (getattr(h, "module", h) for h in held) if isinstance(m, torch.nn.Module)]
    weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return hash(tuple(t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) else id(t) for t in weights))


def _shape(tree: Any) -> list[Any]:
    def about(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        return id(value.value) if isinstance(value, Shared) else value

    return [(path, about(value)) for path, value in conditioning.leaves(tree)]


def _copied(tree: Any) -> Any:
    return conditioning.tree_map(lambda path, v: v.clone() if isinstance(v, Tensor) else v, tree, "condition")


def _copy(source: Any, target: Any) -> None:
    for (_, value), (_, place) in zip(conditioning.leaves(source), conditioning.leaves(target), strict=True):
        if isinstance(value, Tensor):
            place.copy_(value)
