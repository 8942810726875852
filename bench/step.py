"""`bench step`: guidance, noise, transition, log-prob and clean prediction in one pass, against the chain it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import fastflow as ff
from tests.tolerance import FLOAT32, NETWORK_DTYPE

from . import baselines
from .registry import Call, Entry, Inputs, Mismatch, Shape, TensorSpec, Variant, compare

STEPS, STEP, SHIFT, NOISE_LEVEL, SCALE = 10, 3, 3.0, 0.7, 4.5  # a middle step of SD3's recipe in flow_grpo
SIZES = tuple((batch, 16, 64, 64) for batch in (4, 8, 16, 32))  # latents of 512 x 512 images
OUTPUTS = ("next_sample", "log_prob", "clean")

EAGER, COMPILED = "eager", "compile"
EAGER_GIVEN, COMPILED_GIVEN = "eager, noise given", "compile, noise given"
FUSED, FUSED_GIVEN = "fused", "fused, noise given"

# How many times quicker than each baseline the cpu backend is to be, at this shape and thread count.
TARGET_AT = ((16, 16, 64, 64), 2)
TARGETS = {FUSED: {EAGER: 10.0, COMPILED: 10.0}, FUSED_GIVEN: {EAGER: 20.0}}


def specs(shape: Shape) -> Mapping[str, TensorSpec]:
    state, network = TensorSpec(shape, torch.float32), TensorSpec(shape, torch.bfloat16)
    return {
        "sample": state,
        "velocity": network,
        "uncond": network,
        "noise": state,
        "next_sample": state,
        "clean": state,
        "log_prob": TensorSpec(shape[:1], torch.float32),
    }


def inputs(shape: Shape) -> dict[str, Any]:
    sigmas = ff.sigma_schedule(STEPS, shift=SHIFT)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {
        name: torch.randn(spec.shape, generator=generator).to(spec.dtype) for name, spec in specs(shape).items()
    }
    scheduler = baselines.Scheduler.of(sigmas)
    made.update(
        out={name: made.pop(name) for name in OUTPUTS},
        seeds=ff.sample_seeds(0, 0, range(shape[0]), 1),
        at=ff.FlowSDE(NOISE_LEVEL).transitions(sigmas).at(STEP),
        guidance=ff.CFG(SCALE),
        scheduler=scheduler,
        timestep=scheduler.timesteps[STEP : STEP + 1],
    )
    return made


def fused(data: Inputs, backend: str, *, given: bool) -> Call:
    """`ff.step` into slots that exist, as in a rollout. The noise is drawn inside, or given."""

    def call() -> ff.StepOutput:
        noise = data["noise"] if given else ff.Noise(data["seeds"], STEP, shared=True)
        return ff.step(
            data["sample"],
            data["velocity"],
            data["at"],
            noise=noise,
            uncond=data["uncond"],
            guidance=data["guidance"],
            out=data["out"],
            backend=backend,
        )

    return call


def chain(data: Inputs, *, given: bool, compiled: bool = False) -> Call:
    """flow_grpo's chain, eager or compiled. The noise is drawn by torch.randn, or given."""
    step = baselines.compiled_step() if compiled else baselines.guided_transition

    def call() -> baselines.Outputs:
        return baselines.chain(
            data["scheduler"],
            data["sample"],
            data["velocity"],
            data["uncond"],
            data["timestep"],
            SCALE,
            NOISE_LEVEL,
            data["noise"] if given else None,
            step,
        )

    return call


def check(data: Inputs, backend: str, timed: Sequence[str]) -> None:
    """The fused step against the chain on these inputs, and drawn noise against the same noise given."""
    wide = {**data, "velocity": data["velocity"].float(), "uncond": data["uncond"].float()}
    expected = chain(wide, given=True)()  # guidance combined in float32, as the fused step does it
    actual = {name: t.clone() for name, t in fused(data, backend, given=True)()._asdict().items() if t is not None}
    for name in OUTPUTS:
        compare(f"{name} of the fused step", actual[name], getattr(expected, name), FLOAT32)
    if FUSED in timed:
        fused(data, backend, given=False)()
        drawn = {name: data["out"][name].clone() for name in OUTPUTS}
        noise = ff.Noise(data["seeds"], STEP).sample(data["sample"].shape[1:])
        again = fused({**data, "noise": noise}, backend, given=True)()._asdict()
        for name in OUTPUTS:
            compare(f"{name} with drawn noise", drawn[name], again[name], 0.0)
    if COMPILED_GIVEN in timed:
        compiled, eager = chain(data, given=True, compiled=True)(), chain(data, given=True)()
        for name in OUTPUTS:
            compare(f"{name} of the compiled chain", getattr(compiled, name), getattr(eager, name), NETWORK_DTYPE)
    if not bool(torch.isfinite(actual["log_prob"]).all()):
        raise Mismatch("log_prob: not finite")


READ, WRITTEN = ("sample", "velocity", "uncond"), OUTPUTS

ENTRY = Entry(
    name="step",
    about="one sampler step, fused and as flow_grpo's chain",
    shapes=SIZES,
    inputs=inputs,
    specs=specs,
    variants=(
        Variant(FUSED, lambda data, backend: fused(data, backend, given=False), READ + WRITTEN, (EAGER, COMPILED)),
        Variant(
            FUSED_GIVEN,
            lambda data, backend: fused(data, backend, given=True),
            (*READ, "noise", *WRITTEN),
            (EAGER, COMPILED, EAGER_GIVEN, COMPILED_GIVEN),
        ),
        Variant(EAGER, lambda data, backend: chain(data, given=False)),
        Variant(COMPILED, lambda data, backend: chain(data, given=False, compiled=True), (), (EAGER,)),
        Variant(EAGER_GIVEN, lambda data, backend: chain(data, given=True)),
        Variant(COMPILED_GIVEN, lambda data, backend: chain(data, given=True, compiled=True), (), (EAGER_GIVEN,)),
    ),
    check=check,
    gate="tests/bench/test_step.py",
    repeats=41,
)
