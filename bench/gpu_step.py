"""The step on a GPU: dtypes, kinds of noise and outputs, each beside a copy of as many bytes and the chain that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from tests.tolerance import FLOAT32, NETWORK_DTYPE

from . import baselines
from .gpu_run import Case, Way
from .registry import Call, Inputs, Shape, TensorSpec, compare
from .step import NOISE_LEVEL, SCALE, SHIFT, STEP, STEPS

F32, BF16 = torch.float32, torch.bfloat16
EAGER, COMPILED = "eager", "compile"
FUSED = "fused"
Instructions = Mapping[tuple[str, str], float]  # (backend, name of a form) -> what it issues for each element


@dataclass(frozen=True)
class Form:
    """One kind of call: dtype of the states, where the noise comes from, and what is written."""

    name: str
    sample: torch.dtype
    noise: str  # "counter", "given", or "replay": next_sample is given
    outputs: tuple[str, ...]
    chain: baselines.Step | None = None  # that gives the same outputs

    @property
    def reads(self) -> tuple[str, ...]:
        more = {"counter": (), "given": ("noise",), "replay": ("stored",)}[self.noise]
        return ("sample", "velocity", "uncond", *more)


SCORED, SEEN = ("next_sample", "log_prob"), ("next_sample", "log_prob", "clean")
BASE = Form("fp32, counter noise: next_sample, log_prob", F32, "counter", SCORED, baselines.moved)
FLAGGED = Form(
    "fp32, counter noise: + flags", F32, "counter", (*SCORED, "flags")
)  # as rollouts ask: finite or not, by row
CLEAN = Form("fp32, counter noise: + clean", F32, "counter", SEEN, baselines.guided_transition)
DENSE = Form("fp32, counter noise: + clean, ode_next", F32, "counter", (*SEEN, "ode_next"), baselines.dense)
GIVEN = Form("fp32, noise given: + clean", F32, "given", SEEN, baselines.guided_transition)
REPLAY = Form("fp32, replay: log_prob", F32, "replay", ("log_prob",))
NARROW = Form("bf16, counter noise: + clean", BF16, "counter", SEEN)
NARROW_GIVEN = Form("bf16, noise given: + clean", BF16, "given", SEEN)
NARROW_REPLAY = Form("bf16, replay: log_prob", BF16, "replay", ("log_prob",))
FORMS = (BASE, FLAGGED, CLEAN, DENSE, GIVEN, REPLAY, NARROW, NARROW_GIVEN, NARROW_REPLAY)

SMALL, LARGE = (
    (24, 16, 64, 64),
    (512, 16, 64, 64),
)  # SD3.5 at 512 px: a flow_grpo batch, and one that moves 335 to 940 MB
VIDEO = (16, 16, 21, 60, 104)  # Wan 2.1 at 480p: rows of two million elements
PLAN: tuple[tuple[Shape, tuple[Form, ...]], ...] = (
    (SMALL, FORMS),
    (LARGE, tuple(form for form in FORMS if form is not FLAGGED)),
    (VIDEO, (BASE, FLAGGED, REPLAY)),
)


def specs(form: Form, shape: Shape) -> dict[str, TensorSpec]:
    """What the call must read and write."""
    state = TensorSpec(shape, form.sample)
    rows = {"log_prob": TensorSpec(shape[:1], F32), "flags": TensorSpec(shape[:1], torch.int32)}
    given = {"velocity": BF16, "uncond": BF16, "noise": F32, "sample": form.sample, "stored": form.sample}
    read = {name: TensorSpec(shape, given[name]) for name in form.reads}
    return {**read, **{name: rows.get(name, state) for name in form.outputs}}


def traffic(form: Form, shape: Shape) -> int:
    return sum(spec.nbytes for spec in specs(form, shape).values())


def inputs(form: Form, shape: Shape, device: torch.device, number: int = 0) -> dict[str, Any]:
    """The tensors of set `number`, outputs full of what no step writes, and settings that are already on the device."""
    generator = torch.Generator(device).manual_seed(number)
    made: dict[str, Any] = {"out": {}}
    for name, spec in specs(form, shape).items():
        if name in form.outputs:
            made["out"][name] = torch.full(spec.shape, unwritten(spec.dtype), dtype=spec.dtype, device=device)
        else:
            made[name] = torch.randn(spec.shape, generator=generator, device=device).to(spec.dtype)
    sigmas = ff.sigma_schedule(STEPS, shift=SHIFT)
    scheduler = baselines.Scheduler.of(sigmas, device)
    timestep = scheduler.timesteps[STEP : STEP + 1]
    made.update(
        seeds=ff.sample_seeds(0, number, range(shape[0]), 1).to(device),
        counter=torch.tensor([STEP], device=device),
        at=ff.FlowSDE(NOISE_LEVEL).transitions(sigmas).at(STEP),
        guidance=ff.CFG(SCALE),
        scheduler=scheduler,
        timestep=timestep,
        levels=baselines.look_up(scheduler, timestep, len(shape)),
    )
    return made


def unwritten(dtype: torch.dtype) -> float:
    """What an output is full of before it is written."""
    return torch.nan if dtype.is_floating_point else -1


def fused(form: Form, data: Inputs, backend: str) -> Call:
    """`ff.step` into slots that exist; seeds, counter and coefficients lie on the device, as in a rollout."""

    def call() -> ff.StepOutput:
        noise = given = None
        if form.noise == "counter":
            noise = ff.Noise(data["seeds"], data["counter"], shared=True)
        elif form.noise == "given":
            noise = data["noise"]
        else:
            given = data["stored"]
        return ff.step(
            data["sample"], data["velocity"], data["at"], noise=noise, next_sample=given, uncond=data["uncond"],
            guidance=data["guidance"], out=data["out"], backend=backend,
        )  # fmt: skip

    return call


def chain(form: Form, data: Inputs, step: baselines.Step) -> Call:
    """The arithmetic of flow_grpo's chain, its look-ups made before: what a graph can hold of it."""
    noise = data["noise"] if form.noise == "given" else None
    return lambda: step(
        data["sample"], data["velocity"], data["uncond"], data["levels"], SCALE, NOISE_LEVEL, noise,
    )  # fmt: skip


def whole_chain(form: Form, data: Inputs, step: baselines.Step) -> Call:
    """The chain as flow_grpo runs it, look-ups included, which wait for the GPU."""
    noise = data["noise"] if form.noise == "given" else None
    return lambda: baselines.chain(
        data["scheduler"], data["sample"], data["velocity"], data["uncond"], data["timestep"], SCALE, NOISE_LEVEL, noise, step
    )  # fmt: skip


def check(form: Form, data: Inputs, backends: Sequence[str]) -> None:
    """Every backend against the reference on these inputs, and drawn noise against flow_grpo's chain on the same noise."""
    expected = {name: t.clone() for name, t in _outputs(form, data, "reference").items()}
    bound = FLOAT32 if form.sample == F32 else NETWORK_DTYPE
    for backend in backends:
        for slot in data["out"].values():
            slot.fill_(unwritten(slot.dtype))
        for name, actual in _outputs(form, data, backend).items():
            allowed = {"log_prob": FLOAT32, "flags": 0.0}.get(name, bound)
            compare(f"{name} of {backend}, {form.name}", actual, expected[name], allowed)
    if form.chain is not None:
        noise = data.get("noise")
        if noise is None:
            noise = ff.Noise(data["seeds"], STEP, shared=True).sample(
                data["sample"].shape[1:], device=data["sample"].device
            )
        wide = {**data, "velocity": data["velocity"].float(), "uncond": data["uncond"].float(), "noise": noise}
        plain = chain(replace(form, noise="given"), wide, form.chain)()
        for name, value in expected.items():
            compare(f"{name} of the chain, {form.name}", getattr(plain, name), value, FLOAT32)


def _outputs(form: Form, data: Inputs, backend: str) -> dict[str, Tensor]:
    fused(form, data, backend)()
    out: dict[str, Tensor] = data["out"]
    return out


def ways(
    form: Form, shape: Shape, backends: Sequence[str], compiled: bool, instructions: Instructions | None = None
) -> list[Way]:
    bases = ((EAGER, COMPILED) if compiled else (EAGER,)) if form.chain is not None else ()

    def ours(backend: str) -> Callable[[Inputs], Call]:
        return lambda data: fused(form, data, backend)

    made = [
        Way(
            f"{FUSED}, {name}",
            ours(name),
            name,
            traffic(form, shape),
            bases,
            ours(name) if bases else None,
            instructions=(instructions or {}).get((name, form.name)),
        )
        for name in backends
    ]
    if form.chain is not None:
        made.append(_baseline(EAGER, form, form.chain))
        if compiled:
            made.append(_baseline(COMPILED, form, torch.compile(form.chain, dynamic=False, fullgraph=True)))
    return made


def _baseline(name: str, form: Form, step: baselines.Step) -> Way:
    return Way(name, lambda d: chain(form, d, step), public=lambda d: whole_chain(form, d, step))


def cases(
    device: torch.device,
    backends: Sequence[str],
    plan: Sequence[tuple[Shape, Sequence[Form]]] = PLAN,
    compiled: bool = True,
    instructions: Instructions | None = None,
) -> Iterator[Case]:
    for shape, forms in plan:
        for form in forms:
            worth = shape == SMALL or form in (CLEAN, GIVEN)  # compiling takes longer than everything else
            yield _case(form, shape, device, backends, compiled and worth, instructions)


def _case(
    form: Form,
    shape: Shape,
    device: torch.device,
    backends: Sequence[str],
    compiled: bool,
    instructions: Instructions | None,
) -> Case:
    return Case(
        "step",
        form.name,
        shape,
        lambda number: inputs(form, shape, device, number),
        traffic(form, shape),
        lambda: ways(form, shape, backends, compiled, instructions),
        lambda data: check(form, data, backends),
    )
