"""The chain that the step is timed against computes the same thing, and the bytes are counted right."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from bench import baselines, step
from bench.registry import Mismatch
from tests.tolerance import FLOAT32

SHAPE = (2, 4, 8, 8)


@pytest.fixture
def data() -> dict:
    return step.inputs(SHAPE)


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("rows", [1, 2])
def test_the_chain_is_the_step(backend: str, index: int, rows: int) -> None:
    sigmas = ff.sigma_schedule(10, shift=3.0)
    sample, velocity, noise = (torch.randn(SHAPE) for _ in range(3))
    scheduler = baselines.Scheduler.of(sigmas)
    expected = baselines.flow_grpo_step(
        scheduler, velocity, scheduler.timesteps[index].expand(rows), sample, step.NOISE_LEVEL, noise
    )
    at = ff.FlowSDE(step.NOISE_LEVEL).transitions(sigmas).at(index)
    actual = ff.step(sample, velocity, at, noise=noise, want=step.OUTPUTS, backend=backend)
    for name in step.OUTPUTS:
        wanted = getattr(expected, name)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(getattr(actual, name), wanted, atol=FLOAT32 * scale, rtol=0)


def test_the_chain_guides_in_the_dtype_of_the_network(data: dict, backend: str) -> None:
    expected = step.chain(data, given=True)()
    actual = ff.step(
        data["sample"],
        data["velocity"],
        data["at"],
        noise=data["noise"],
        uncond=data["uncond"],
        guidance=ff.CFG(step.SCALE, dtype="velocity"),
        want=step.OUTPUTS,
        backend=backend,
    )
    for name in step.OUTPUTS:
        wanted = getattr(expected, name)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(getattr(actual, name), wanted, atol=FLOAT32 * scale, rtol=0)


def test_the_check_passes(data: dict, backend: str) -> None:
    step.check(data, backend, (step.FUSED, step.EAGER))


@pytest.mark.parametrize("wrong", [{"guidance": ff.CFG(4.6)}, {"timestep": torch.tensor([1000.0])}])
def test_the_check_sees_another_result(data: dict, wrong: dict) -> None:
    with pytest.raises(Mismatch, match="of the fused step: off by"):
        step.check({**data, **wrong}, "reference", (step.FUSED,))


def test_bytes_are_those_of_the_tensors() -> None:
    rows, elements = 16, 16 * 16 * 64 * 64
    fused, given = step.ENTRY.variant(step.FUSED), step.ENTRY.variant(step.FUSED_GIVEN)
    read, written = 4 + 2 + 2, 4 + 4  # float32 sample, two bfloat16 velocities; next_sample and clean in float32
    assert step.ENTRY.bytes_moved(fused, (rows, 16, 64, 64)) == elements * (read + written) + 4 * rows
    assert step.ENTRY.bytes_moved(given, (rows, 16, 64, 64)) == elements * (read + written + 4) + 4 * rows


def test_bytes_are_counted_for_what_the_call_is_given(data: dict) -> None:
    specs = step.specs(SHAPE)
    for name, spec in specs.items():
        tensor = data["out"][name] if name in step.OUTPUTS else data[name]
        assert spec.nbytes == tensor.nbytes, name
