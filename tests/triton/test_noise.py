"""The kernels' noise has the bits of `philox.normal`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastflow import philox
from tests.triton.calls import make_call, run


@pytest.mark.parametrize("numel", [1, 112, 2049, 5000])
@pytest.mark.parametrize(("stream", "offset"), [(0, 0), (5, 4 * (2**32 - 7)), (2**32 - 1, 2**40)])
def test_bits_of_the_definition(numel: int, stream: int, offset: int) -> None:
    call = make_call(numel=numel)
    call.coef.zero_()
    call.coef[:, 2] = 1.0  # next_sample = noise
    call = dataclasses.replace(call, stream=stream, offset=offset)
    z = philox.normal(call.seeds, call.step, numel, stream=stream, offset=offset)
    assert torch.equal(run(call).next_sample.cpu(), z)


def test_a_step_per_row() -> None:
    call = make_call(batch=3, numel=300)
    call.coef.zero_()
    call.coef[:, 2] = 1.0
    steps = torch.tensor([0, 7, 2**31])
    call = dataclasses.replace(call, step=steps)
    assert torch.equal(run(call).next_sample.cpu(), philox.normal(call.seeds, steps, 300))


def test_an_offset_continues_the_row() -> None:
    call = make_call(numel=4096)
    call.coef.zero_()
    call.coef[:, 2] = 1.0
    whole = run(call).next_sample.cpu()
    half = dataclasses.replace(
        call, numel=2048, offset=2048, sample=call.sample[:, 2048:], velocity=call.velocity[:, 2048:]
    )
    assert torch.equal(run(half).next_sample.cpu(), whole[:, 2048:])
