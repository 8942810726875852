"""Every output of a step has the bits of the reference, whatever the layout, the batch and the launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastflow.backends import reference, triton
from tests.triton.calls import DEVICE, SLOTS, assert_same, check, copy, expected, make_call, run, still

# the interpreter is numpy, which remarks on what the inputs of these tests are meant to do
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RESCALES = {
    "none": {"rescale": "none"},
    "channels first": {"rescale": "token", "token": (1, 12, 50)},
    "channels last": {"rescale": "token", "token": (50, 12, 1)},
    "channels between": {"rescale": "token", "token": (5, 12, 10)},
    "one channel": {"rescale": "token", "token": (600, 1, 1)},
    "clamp": {"rescale": "clamp"},
}


@pytest.mark.parametrize("numel", [1, 112, 2049, 5000])
def test_tails(numel: int) -> None:
    check(make_call(numel=numel))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guided", [{}, {"guided": True, "rescale": "clamp"}])
@pytest.mark.usefixtures("small_blocks")
def test_rows_of_several_programs(guided: dict[str, object], masked: bool) -> None:
    check(make_call(numel=5000, masked=masked, **guided))


@pytest.mark.usefixtures("small_blocks")
def test_a_sum_over_several_programs() -> None:
    check(make_call(numel=5000, masked=True, reduce=1))
    check(make_call(numel=5000, reduce=2))


def test_a_long_row_in_its_blocks() -> None:
    check(make_call(batch=1, numel=2 * 65536 + 2052))


@pytest.mark.parametrize("kept", [F32, BF16, F16])
@pytest.mark.parametrize("velocity", [F32, BF16, F16])
@pytest.mark.parametrize("sample", [F32, BF16, F16])
def test_dtypes(sample: torch.dtype, velocity: torch.dtype, kept: torch.dtype) -> None:
    check(make_call(source="noise", sample=sample, velocity=velocity, kept=kept, guided=True))


@pytest.mark.parametrize("noise", [BF16, F16, torch.float64])
def test_dtypes_of_noise_and_of_the_given_sample(noise: torch.dtype) -> None:
    call = make_call(source="noise")
    check(dataclasses.replace(call, noise=call.noise.to(noise)))
    check(make_call(source="given", kept=noise) if noise != torch.float64 else make_call(source="given"))


@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", RESCALES)
def test_guidance(form: str, masked: bool, reduce: int) -> None:
    check(make_call(numel=600, source="noise", guided=True, masked=masked, reduce=reduce, **RESCALES[form]))


@pytest.mark.parametrize("form", ["channels last", "clamp"])
def test_a_guided_velocity_of_zero_is_not_rescaled(form: str) -> None:
    call = make_call(numel=600, source="noise", guided=True, **RESCALES[form])
    call.velocity[0] = 0.0
    call.uncond[0] = 0.0
    result = check(call)
    assert not result.flags.any()


@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("score", [0, 1, 2])
@pytest.mark.parametrize("score_rounded", [False, True])
def test_scores(score: int, reduce: int, score_rounded: bool) -> None:
    call = make_call(3, kept=BF16, score=score, reduce=reduce, score_rounded=score_rounded, masked=True)
    still(call.coef, 1)
    call.mask[2] = False
    check(call)


@pytest.mark.parametrize("source", ["seeds", "noise", "given", "none"])
def test_one_table_row_for_all(source: str) -> None:
    check(make_call(3, source=source, rows=1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("numel", "form"), [*((600, form) for form in RESCALES), (5000, "none"), (5000, "clamp")])
def test_rows_through_an_index(numel: int, form: str) -> None:
    sources = make_call(3, numel, guided=True, seed=1)
    gathered = {name: getattr(sources, name) for name in ("sample", "velocity", "uncond")}
    call = dataclasses.replace(make_call(5, numel, guided=True, **RESCALES[form]), **gathered)
    call.rows = torch.tensor([-1, 2, 0, 2, 3])
    assert check(call).flags.tolist() == [2, 0, 0, 0, 2]


@NOT_FINITE
def test_std_zero_selects_the_mean() -> None:
    call = make_call(source="noise")
    still(call.coef, 0)
    call.noise[0] = float("inf")
    result = check(call)
    assert torch.equal(result.next_sample[0], result.mean[0])
    assert float(result.log_prob[0]) == 0.0 and not result.flags.any()


@NOT_FINITE
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("numel", [300, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_flagged(bad: float, numel: int) -> None:
    call = make_call(3, numel)
    call.velocity[1, -1] = bad
    assert check(call).flags.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kept", [F32, BF16])
@pytest.mark.parametrize("form", ["none", "channels first", "clamp"])
def test_replay_has_the_bits_of_the_rollout(form: str, kept: torch.dtype) -> None:
    call = make_call(numel=600, guided=True, kept=kept, **RESCALES[form])
    rolled = run(call)
    replay = dataclasses.replace(call, seeds=None, step=None, given=rolled.next_sample.cpu())
    assert torch.equal(run(replay).log_prob, rolled.log_prob)
    assert torch.equal(run(replay).next_sample, rolled.next_sample)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_does_not_depend_on_the_others() -> None:
    call = make_call(5, 2500, guided=True, rescale="clamp", masked=True)
    whole = run(call)
    for rows in (slice(0, 2), slice(2, 5)):
        fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
        names = ("sample", "velocity", "uncond", "coef", "scale", "seeds", "mask")
        part = dataclasses.replace(call, batch=rows.stop - rows.start, **{n: fields[n][rows] for n in names})
        assert_same(run(part), whole, rows)


def test_bits_do_not_depend_on_the_launch(launched_with: Callable[..., None]) -> None:
    from fastflow.kernels import config

    call = make_call(1, 9000, guided=True, rescale="token", token=(90, 100, 1))
    results = []
    for block, warps in ((1, 4), (2, 8), (8, 4)):
        launched_with(block=block * config.TILE, num_warps=warps)
        results.append(run(call))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_small_on_a_device_with_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflow.kernels import config

    monkeypatch.setattr(config, "_own", lambda device: config.Config(block=8 * config.TILE, num_warps=8))
    assert config.for_device("NVIDIA H200") == config.Config(block=config.TILE, num_warps=8)
    assert config.INTERPRETED.block == config.TILE


def test_rows_with_strides() -> None:
    call = make_call(3, 301, guided=True, masked=True)
    wanted = expected(call)
    actual = copy(call, DEVICE)
    trajectory = {name: torch.zeros(3, 4, *getattr(actual, name).shape[1:]).to(getattr(actual, name)) for name in SLOTS}
    for name, buffer in trajectory.items():
        setattr(actual, name, buffer[:, 2])
    for name in ("sample", "velocity", "uncond", "mask"):
        t = getattr(actual, name)
        setattr(actual, name, torch.stack([t, torch.zeros_like(t)], 1)[:, 0])
    triton.step(actual)
    assert_same(actual, wanted)
    for buffer in trajectory.values():
        assert not buffer[:, [0, 1, 3]].any()


def test_sample_shared_by_all_rows() -> None:
    call = make_call(3, 300)
    check(dataclasses.replace(call, sample=call.sample[:1].expand(3, -1)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_in_place(dtype: torch.dtype) -> None:
    call = make_call(numel=2500, sample=dtype, velocity=BF16, kept=dtype)
    wanted = expected(call)
    actual = copy(call, DEVICE)
    actual.next_sample = actual.sample
    triton.step(actual)
    assert_same(actual, wanted)


def test_only_what_is_wanted() -> None:
    call = make_call(numel=2500, masked=True)
    wanted = expected(call)
    for name in SLOTS:
        actual = copy(call, DEVICE)
        for other in SLOTS:
            if other != name:
                setattr(actual, other, None)
        triton.step(actual)
        assert torch.equal(getattr(actual, name).cpu(), getattr(wanted, name)), name


@NOT_FINITE
def test_rounding_to_storage() -> None:
    """Ties, subnormals, overflow and infinities round as torch rounds them."""
    bits = torch.arange(0, 1 << 16, 7, dtype=torch.int32) << 16
    values = torch.cat([(bits + low).view(F32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    for kept in (BF16, F16):
        call = make_call(1, values.numel(), source="none", kept=kept)
        call.coef.zero_()
        call.coef[:, 0] = 1.0
        call = dataclasses.replace(call, sample=values[None], velocity=torch.zeros_like(values)[None])
        got, wanted = run(call).next_sample.cpu()[0], values.to(kept)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_no_rows_and_no_elements() -> None:
    triton.step(copy(make_call(0, 300), DEVICE))
    result = run(make_call(2, 0, source="none"))
    assert result.log_prob.tolist() == [0.0, 0.0] and result.flags.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": torch.zeros(2, 300, dtype=torch.float64)}, "sample has dtype torch.float64"),
        ({"noise": torch.zeros(2, 300, dtype=torch.int32)}, "noise has dtype torch.int32"),
        ({"product_dtype": "velocity", "velocity": torch.zeros(2, 300, dtype=BF16)}, "product_dtype"),
        ({"numel": 2**31}, "2147483648 elements"),
        ({"rescale": "token", "token": (1, 2**15, 1)}, "32768 channels"),
    ],
)
def test_refusals_name_the_constraint(change: dict[str, object], words: str) -> None:
    call = copy(make_call(guided=True), DEVICE)
    moved = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in change.items()}
    assert words in str(triton.refuse(dataclasses.replace(call, **moved)))


def test_velocity_products_are_served_where_they_are_float32() -> None:
    call = dataclasses.replace(make_call(), product_dtype="velocity")
    assert_same(run(call), expected(call))
    assert reference.refuse(call) is None
