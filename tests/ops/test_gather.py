"""`ff.step(rows=...)`: rows made of other rows, as a fork or a resampling makes them, without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.ops.cases import ALL, GUIDANCE, SD3, inputs

FORK = torch.tensor([0, 0, 0, 2, 2, 1])
AT = ff.FlowSDE(0.7).transitions(SD3).at(3)
NOISE = ff.Noise(range(len(FORK)), step=3)
SCALES = {**GUIDANCE, "by row": ff.CFG(torch.linspace(1.0, 6.0, len(FORK))), None: None}


def fork(data: dict[str, Tensor], index: Tensor | None, cfg: ff.CFG | None, **options: Any) -> ff.StepOutput:
    names = ("sample", "velocity", "uncond")
    given = {name: data[name] if index is not None else data[name][FORK] for name in names}
    given["uncond"] = given["uncond"] if cfg is not None else None
    return ff.step(at=AT, noise=NOISE, guidance=cfg, rows=index, **given, **options)


@pytest.mark.parametrize("guidance", SCALES)
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16])
def test_it_is_the_step_of_the_gathered_rows(backend: str, guidance: str | None, velocity: torch.dtype) -> None:
    data = inputs((3, 8, 16, 12), torch.float32, velocity)
    options: dict[str, Any] = {"want": ALL, "backend": backend}
    expected, found = fork(data, None, SCALES[guidance], **options), fork(data, FORK, SCALES[guidance], **options)
    for name in ALL:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len({float(x) for x in found.log_prob}) == len(FORK)


def test_everything_but_the_sources_has_a_row_for_each(backend: str) -> None:
    data = inputs((3, 5, 7))
    at = ff.FlowSDE(0.7).transitions(SD3).at(torch.tensor([1, 2, 3, 4, 5, 6]))
    torch.manual_seed(0)
    noise, mask = torch.randn(6, 5, 7), torch.rand(6, 5, 7) > 0.3
    slot = torch.empty(6, 2, 5, 7)
    out = {"next_sample": slot[:, 1], "log_prob": torch.empty(6)}
    ff.step(data["sample"], data["velocity"], at, noise=noise, mask=mask, rows=FORK, out=out, backend=backend)
    expected = ff.step(data["sample"][FORK], data["velocity"][FORK], at, noise=noise, mask=mask, backend=backend)
    assert torch.equal(out["next_sample"], expected.next_sample) and torch.equal(out["log_prob"], expected.log_prob)
    replayed = ff.step(
        data["sample"], data["velocity"], at, next_sample=slot[:, 1], mask=mask, rows=FORK, backend=backend
    )
    assert torch.equal(replayed.log_prob, expected.log_prob)


def test_gradients_reach_the_sources(backend: str) -> None:
    data = inputs((3, 5, 7))
    for name in ("sample", "velocity", "uncond"):
        data[name] = data[name].detach().requires_grad_()
    grads = []
    for index in (FORK, None):
        out = fork(data, index, GUIDANCE["clamp"], want=("next_sample", "clean"), backend=backend)
        loss = (out.next_sample * torch.arange(6.0).reshape(6, 1, 1)).sum() + out.clean.square().sum()
        grads.append(torch.autograd.grad(loss, [data[name] for name in ("sample", "velocity", "uncond")]))
    for found, expected in zip(*grads, strict=True):
        assert found.shape == (3, 5, 7) and torch.equal(found, expected)


def test_guidance_in_the_networks_dtype(backend: str) -> None:
    data, cfg = inputs((3, 5, 7), velocity=torch.bfloat16), ff.CFG(SCALES["by row"].scale, dtype="velocity")
    found, expected = (fork(data, index, cfg, want=ALL, backend=backend) for index in (FORK, None))
    assert torch.equal(found.next_sample, expected.next_sample)


def test_no_rows_of_some() -> None:
    data = inputs((3, 5, 7))
    out = ff.step(data["sample"], data["velocity"], AT, noise=ff.Noise([]), rows=FORK[:0])
    assert out.next_sample.shape == (0, 5, 7) and out.log_prob.shape == (0,)


def test_uncond_has_the_rows_of_the_velocity(backend: str) -> None:
    data = inputs((3, 5, 7))
    data["velocity"] = data["velocity"].requires_grad_()
    data["uncond"] = torch.zeros(6, 5, 7)
    with pytest.raises(ValueError, match=r"uncond: wanted the shape of sample \(3, 5, 7\), got \(6, 5, 7\)"):
        fork(data, FORK, ff.CFG(2.0), backend=backend)


def test_an_index_that_only_the_device_knows_is_clamped_and_flagged_in_a_graph_too() -> None:
    data = inputs((3, 5, 7))

    def step(index: Tensor) -> ff.StepOutput:
        return ff.step(data["sample"], data["velocity"], AT, noise=data["noise"][FORK], rows=index, want=ALL)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    found, near = compiled(torch.tensor([0, -1, 2, 1, 3, 7])), step(torch.tensor([0, 0, 2, 1, 2, 2]))
    assert found.flags.tolist() == [0, 2, 0, 0, 2, 2] and near.flags.tolist() == [0] * 6
    for name in ALL[:-1]:
        assert torch.equal(getattr(found, name), getattr(near, name)), name


@pytest.mark.parametrize("name", ["sample", "velocity", "uncond"])
def test_no_slot_lies_where_other_rows_are_read(backend: str, name: str) -> None:
    data = inputs((3, 5, 7))
    buffer = torch.zeros(9, 2, 5, 7)
    buffer[:3, 0] = data[name]
    data[name] = buffer[:3, 0]
    options: dict[str, Any] = {"backend": backend, "guidance": ff.CFG(2.0), "uncond": data["uncond"], "rows": FORK[:3]}
    call = (data["sample"], data["velocity"], AT)
    for slot in (buffer[:3, 0], buffer[2:5, 0], buffer[0:1, 0].expand(3, 5, 7)):
        with pytest.raises(ValueError, match=f"out: wanted memory of its own beside rows=, got some of {name}'s"):
            ff.step(*call, out={"clean": slot}, **options)
    for slot in (buffer[:3, 1], buffer[3:6, 0]):  # the rows of the two take turns; they follow each other
        ff.step(*call, out={"clean": slot}, **options)


def test_empty_rows_share_no_memory(backend: str) -> None:
    none, index = torch.zeros(3, 0), torch.tensor([0, 2, 2, 1])
    out = ff.step(none, none, AT, noise=torch.zeros(4, 0), rows=index, backend=backend)
    assert out.next_sample.shape == (4, 0)
    out = ff.step(none[:0], none[:0], AT, noise=none[:0], rows=index[:0], backend=backend)
    assert out.next_sample.shape == (0, 0)


def test_under_compile() -> None:
    data = inputs((3, 5, 7))

    def step(index: Tensor) -> Tensor:
        return fork(data, index, None, want=("next_sample",)).next_sample

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(FORK), step(FORK))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0, 1], TypeError, "rows: wanted a tensor, got list"),
        (torch.tensor([0.0]), ValueError, r"rows: wanted int64 \[B\], a row of sample each, got torch.float32 \(1,\)"),
        (torch.tensor([[0]]), ValueError, r"rows: wanted int64 \[B\]"),
        (torch.tensor([0, 3]), ValueError, "rows: wanted 0 to 2, got 3"),
        (torch.tensor([-1, 2]), ValueError, "rows: wanted 0 to 2, got -1"),
        (torch.tensor([0], device="meta"), ValueError, "rows: wanted the device of sample, cpu, got meta"),
    ],
)
def test_bad_indices_are_named(index: Any, error: type[Exception], words: str) -> None:
    data = inputs((3, 5, 7))
    with pytest.raises(error, match=words):
        ff.step(data["sample"], data["velocity"], AT, want=("clean",), rows=index)


def test_what_goes_with_it_is_named() -> None:
    data = inputs((3, 5, 7))
    with pytest.raises(ValueError, match="rows: wanted none, as sample has no rows, got 1"):
        ff.step(data["sample"][:0], data["velocity"][:0], AT, want=("clean",), rows=FORK[:1])
    with pytest.raises(ValueError, match=r"noise.seeds: wanted one per row of sample, 6, got 3"):
        ff.step(data["sample"], data["velocity"], AT, noise=ff.Noise([1, 2, 3]), rows=FORK)
    with pytest.raises(ValueError, match="out: wanted memory of its own beside rows="):
        ff.step(data["sample"], data["velocity"], AT, rows=FORK[3:], out={"clean": data["sample"]})
