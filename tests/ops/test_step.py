"""`ff.step` against its formulas: values, bits, slots and layouts, on every backend of this process."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from tests.ops.cases import ALL, GUIDANCE, SD3, VECTORS, formulas, inputs
from tests.tolerance import assert_as_good_as_plain, log_prob_bound

FAMILIES = {
    "flow_sde_0_7": ff.FlowSDE(0.7),
    "dance_sde_0_3": ff.DanceSDE(0.3),
    "wan_sde": ff.WanSDE(),
    "cps_0_7": ff.CPS(0.7),
    "flow_ddim_0_7": ff.FlowDDIM(0.7),
    "dpmpp_1_sde": ff.DPMSolverSDE(),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_numbers_in_float64(name: str) -> None:
    given, row = VECTORS["inputs"], VECTORS["rows"][name]
    x, v, z = (torch.full((1, 1), given[n], dtype=torch.float64) for n in ("sample", "velocity", "noise"))
    out = ff.step(x, v, FAMILIES[name].transitions(SD3).at(3), noise=z, want=ALL)
    for output in ("mean", "next_sample", "log_prob"):
        assert float(getattr(out, output)) == pytest.approx(row[output], abs=1e-7), (
            output
        )  # the schedule is float32 there


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("sample", DTYPES)
@pytest.mark.parametrize("guidance", [None, *GUIDANCE])
def test_error_is_that_of_plain_float32(
    backend: str, guidance: str | None, sample: torch.dtype, velocity: torch.dtype
) -> None:
    data = inputs((4, 8, 16, 12), sample, velocity)
    cfg = GUIDANCE[guidance] if guidance else None
    at = ff.FlowSDE(0.7).transitions(SD3).at(torch.tensor([0, 3, 6, 8]))
    out = ff.step(
        data["sample"], data["velocity"], at, noise=data["noise"], want=ALL, backend=backend,
        uncond=data["uncond"] if cfg else None, guidance=cfg,
    )  # fmt: skip
    exact = formulas(data, at, torch.float64, guidance=cfg, next_sample=out.next_sample)
    plain = formulas(data, at, torch.float32, guidance=cfg, next_sample=out.next_sample)
    for name in ("next_sample", "clean", "ode_next", "mean"):
        value = getattr(out, name)
        assert value.dtype == (torch.float32 if name == "mean" else sample)
        assert_as_good_as_plain(value, exact[name], plain[name].to(value.dtype), name)
    scale = 1 + exact["log_prob"].abs()
    assert ((out.log_prob - exact["log_prob"]).abs() <= log_prob_bound(8 * 16 * 12) * scale).all()
    assert not out.flags.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ode_step_is_euler_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    data = inputs((3, 5, 7), dtype, torch.bfloat16)
    tr = ff.FlowSDE(0.7).transitions(SD3, steps=[0])
    out = ff.step(data["sample"], data["velocity"], tr.at(4), want=("next_sample", "log_prob"), backend=backend)
    dt = (SD3[5] - SD3[4]).float()
    euler = (data["sample"].float() + dt * data["velocity"].float()).to(dtype)
    assert torch.equal(out.next_sample, euler)
    assert torch.equal(out.log_prob, torch.zeros(3))
    sde = ff.step(
        data["sample"], data["velocity"], ff.FlowSDE(0.7).transitions(SD3).at(4), noise=data["noise"],
        want=("ode_next",), backend=backend,
    )  # fmt: skip
    assert torch.equal(sde.ode_next, euler)


def test_noise_at_std_zero_is_selected_away(backend: str) -> None:
    data = inputs((2, 9))
    data["noise"][0, 0] = float("inf")
    at = ff.ODE().transitions(SD3).at(2)
    out = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], want=ALL, backend=backend)
    assert torch.equal(out.next_sample, out.mean) and torch.equal(out.log_prob, torch.zeros(2)) and not out.flags.any()


def test_only_what_is_wanted_is_returned(backend: str) -> None:
    data = inputs()
    at = ff.CPS(0.7).transitions(SD3).at(1)
    for name in ALL:
        out = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], want=(name,), backend=backend)
        assert [n for n in ALL if getattr(out, n) is not None] == [name]
    assert ff.step(data["sample"], data["velocity"], at, want=("clean",), backend=backend).clean is not None


def test_slots_are_written_in_place_at_any_row_stride(backend: str) -> None:
    data = inputs((3, 4, 5))
    at = ff.FlowSDE(0.7).transitions(SD3).at(torch.tensor([1, 2, 3]))
    fresh = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], want=ALL, backend=backend)
    buffer = torch.full((3, 6, 4, 5), float("nan"))
    slots = {n: buffer[:, i] for i, n in enumerate(("next_sample", "clean", "ode_next", "mean"))}
    slots["log_prob"] = torch.full((3,), float("nan"))
    slots["flags"] = torch.full((3,), -1, dtype=torch.int32)
    out = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], out=slots, backend=backend)
    for name in ALL:
        assert getattr(out, name) is slots[name]
        assert torch.equal(slots[name], getattr(fresh, name)), name
    assert buffer[:, 4:].isnan().all()
    state = data["sample"].clone()
    ff.step(state, data["velocity"], at, noise=data["noise"], out={"next_sample": state}, backend=backend)
    assert torch.equal(state, fresh.next_sample)


def test_strided_rows_and_other_layouts(backend: str) -> None:
    data = inputs((3, 4, 5))
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    expected = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], want=ALL, backend=backend)
    wide = {k: torch.stack([v, v], 1)[:, 1] for k, v in data.items()}
    crossed = {k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in data.items()}
    for layout in (wide, crossed):
        out = ff.step(layout["sample"], layout["velocity"], at, noise=layout["noise"], want=ALL, backend=backend)
        for name in ALL:
            assert torch.equal(getattr(out, name), getattr(expected, name)), name


@pytest.mark.parametrize("length", [1, 3, 2047, 2048, 2049, 5000])
def test_a_row_does_not_depend_on_the_batch(backend: str, length: int) -> None:
    data = inputs((5, length), velocity=torch.bfloat16)
    at_of = ff.FlowSDE(0.7).transitions(SD3)

    def run(rows: list[int]) -> ff.StepOutput:
        return ff.step(
            data["sample"][rows], data["velocity"][rows], at_of.at(torch.tensor(rows)), want=ALL, backend=backend,
            noise=ff.Noise(rows, step=3), uncond=data["uncond"][rows], guidance=GUIDANCE["clamp"],
        )  # fmt: skip

    whole = run([0, 1, 2, 3, 4])
    for rows in ([0], [4, 2], [1, 2, 3]):
        for name in ALL:
            assert torch.equal(getattr(run(rows), name), getattr(whole, name)[rows]), (name, rows)
    again = run([0, 1, 2, 3, 4])
    assert torch.equal(again.log_prob, whole.log_prob)


def test_empty_batch(backend: str) -> None:
    x = torch.zeros(0, 4, 4)
    out = ff.step(x, x, ff.FlowSDE(0.7).transitions(SD3).at(0), noise=ff.Noise([], step=0), backend=backend)
    assert out.next_sample.shape == (0, 4, 4) and out.log_prob.shape == (0,)


def test_a_value_that_is_not_finite_flags_its_row(backend: str) -> None:
    data = inputs((4, 33))
    data["velocity"][1, 32], data["velocity"][3, 0] = float("nan"), float("inf")
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    out = ff.step(data["sample"], data["velocity"], at, noise=ff.Noise([1, 2, 3, 4], step=0), want=ALL, backend=backend)
    assert out.flags.tolist() == [0, 1, 0, 1]


def test_hosts_that_round_the_product_are_reproduced() -> None:
    """DanceGRPO: a 0-dim float32 coefficient times a bf16 velocity stays bf16 in torch's own expression."""
    data = inputs((2, 64), velocity=torch.bfloat16)
    tr = ff.ODE().transitions(SD3)
    dsigma = (SD3[4] - SD3[3]).float()
    host = (
        data["sample"] + data["velocity"] * dsigma
    )  # scalar second: on CPU torch rounds a leading one to bf16, CUDA does not
    out = ff.step(data["sample"], data["velocity"], tr.at(3), product_dtype="velocity", backend="reference")
    assert torch.equal(out.next_sample, host)
    assert not torch.equal(ff.step(data["sample"], data["velocity"], tr.at(3), backend="reference").next_sample, host)


def test_cfg_in_the_networks_dtype(backend: str) -> None:
    data = inputs((2, 64), velocity=torch.bfloat16)
    tr = ff.ODE().transitions(SD3)
    host = data["uncond"] + 4.5 * (data["velocity"] - data["uncond"])
    expected = ff.step(data["sample"], host, tr.at(3), backend=backend).next_sample
    out = ff.step(
        data["sample"], data["velocity"], tr.at(3), uncond=data["uncond"], guidance=ff.CFG(4.5, dtype="velocity"),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(out.next_sample, expected)


def test_autocast_is_ignored(backend: str) -> None:
    data = inputs((2, 64))
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    expected = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], backend=backend)
    assert torch.equal(out.next_sample, expected.next_sample) and torch.equal(out.log_prob, expected.log_prob)
