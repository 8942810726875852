"""`bench launch`: what a whole eager call costs where the kernel has next to nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastflow as ff
from tests.tolerance import FLOAT32

from .registry import Call, Entry, Inputs, Shape, Variant, compare

STEPS, STEP, NOISE_LEVEL = 10, 3, 0.7
SHAPE = (1, 16)  # one row of four counters: the kernel takes well under a microsecond
TARGET = 25e-6  # seconds of a whole call over its kernel


def inputs(shape: Shape) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    names = ("sample", "velocity", "noise", "stored")
    made: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name in names}
    made.update(
        out={"next_sample": torch.empty(shape), "log_prob": torch.empty(shape[0])},
        seeds=ff.sample_seeds(0, 0, range(shape[0]), 1),
        at=ff.FlowSDE(NOISE_LEVEL).transitions(ff.sigma_schedule(STEPS, shift=3.0)).at(STEP),
    )
    made["drawing"] = ff.Noise(made["seeds"], STEP)
    return made


def _step(noise: str, *, slots: bool) -> Callable[[Inputs, str], Call]:
    def make(data: Inputs, backend: str) -> Call:
        out = data["out"] if slots else None
        return lambda: ff.step(
            data["sample"], data["velocity"], data["at"], noise=data[noise], out=out, backend=backend
        )

    return make


def _score(data: Inputs, backend: str) -> Call:
    return lambda: ff.log_prob(data["sample"], data["velocity"], data["stored"], data["at"], backend=backend)


def check(data: Inputs, backend: str, timed: Sequence[str]) -> None:
    """Against the reference, and a replay against the step's own score."""
    actual, expected = _step("noise", slots=False)(data, backend)(), _step("noise", slots=False)(data, "reference")()
    compare("next_sample", actual.next_sample, expected.next_sample, FLOAT32)
    compare("log_prob", actual.log_prob, expected.log_prob, FLOAT32)
    replayed = _score({**data, "stored": actual.next_sample}, backend)()
    compare("log_prob of a replay", replayed, actual.log_prob, 0.0)


ENTRY = Entry(
    name="launch",
    about="a whole eager call on a tiny row",
    shapes=(SHAPE,),
    inputs=inputs,
    specs=lambda shape: {},  # next to nothing
    variants=(
        Variant("step into slots", _step("drawing", slots=True)),
        Variant("step into slots, noise given", _step("noise", slots=True)),
        Variant("step", _step("drawing", slots=False)),
        Variant("log_prob", _score),
    ),
    check=check,
    gate="tests/ops",
    repeats=401,
    calls=20,  # half a millisecond, which a busy machine seldom interrupts
)
