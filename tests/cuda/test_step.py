"""A CUDA step gives the bits of the reference and of the cpu backend, whatever the layout, the batch and the launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastflow import philox
from fastflow.backends import cpu, reference
from fastflow.backends.base import StepCall
from fastflow.dynamics.columns import STD
from tests.backends.calls import (
    FLOATS,
    OUTPUTS,
    assert_same,
    call,
    explicit,
    forked,
    guided,
    replay,
    rows,
    run,
    same,
    table,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = (1, 4, 112, 255, 257, 513, 1025, 2047, 2048, 2049, 8192, 8193, 70_000)
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0])
COUNTERS = [(0, 0, 0), (7, 1, 4), (3, 2, 2**34 - 8), (2**32 - 1, 2**32 - 1, 2**61)]  # step, stream, offset
TOKENS = [(40, 64, 1), (9, 37, 1), (1, 4, 700), (3, 5, 33), (1, 3000, 1), (2, 1, 9), (2, 16, 500), (1, 2048, 3)]


def check(device: Any, base: StepCall, **layout: Any) -> dict[str, torch.Tensor]:
    """Every output by the device; the same as the reference's and the cpu backend's."""
    found = run(device, base, **layout)
    assert_same(found, run(reference, base, **layout))
    if cpu.unavailable() is None:
        assert_same(found, run(cpu, base, **layout))
    return found


@pytest.mark.parametrize(("step", "stream", "offset"), COUNTERS)
@pytest.mark.parametrize("numel", [1, 7, 112, 2049])
def test_noise_bits(device: Any, numel: int, step: int, stream: int, offset: int) -> None:
    zero, coef, counters = torch.zeros(len(SEEDS), numel), torch.zeros(1, 16), torch.tensor([step])
    coef[:, STD] = 1.0
    drawn = {"seeds": SEEDS, "step": counters, "stream": stream, "offset": offset}
    base = call(len(SEEDS), numel, sample=zero, velocity=zero, coef=coef, **drawn)
    expected = philox.normal(SEEDS, counters, numel, stream=stream, offset=offset)
    assert torch.equal(run(device, base)["next_sample"], expected)


@pytest.mark.parametrize("form", ["counters", "masked", "replay", "clamp"])
@pytest.mark.parametrize("numel", LENGTHS)
def test_row_lengths(device: Any, numel: int, form: str) -> None:
    batch = 2 if numel > 1000 else 11  # blocks of short rows that are not full
    if form == "clamp":
        check(device, guided(batch, numel, rescale="clamp"))
        return
    base = call(batch, numel, coef=table(batch))
    if form != "counters":
        base.mask = torch.rand(batch, numel) < 0.6
    check(device, replay(base, rows(batch, numel, F16)) if form == "replay" else base)


def test_a_row_whose_tiles_are_added_in_rounds(device: Any) -> None:
    """2,048 tiles are staged at a time."""
    numel = 2048 * 2048 + 5000
    base = replay(call(1, numel, mask=torch.rand(1, numel) < 0.6), rows(1, numel))
    base.velocity[0, -1] = torch.inf
    base.mask[0, -1] = False  # type: ignore[index]
    slots = []
    for backend in (device, reference):
        slots.append((torch.empty(1), torch.full((1,), 9, dtype=torch.int32)))
        backend.step(replace(base, log_prob=slots[-1][0], flags=slots[-1][1]))
    assert torch.equal(slots[0][0], slots[1][0]) and slots[0][0].isfinite().all()
    assert torch.equal(slots[0][1], slots[1][1]) and slots[0][1].item() == 1


@pytest.mark.parametrize("sample", FLOATS)
@pytest.mark.parametrize("velocity", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_dtypes(device: Any, sample: torch.dtype, velocity: torch.dtype, stored: torch.dtype) -> None:
    base = replace(guided(2, 2304, velocity, next_dtype=stored), sample=rows(2, 2304, sample))
    check(device, base, dtype=sample)
    check(device, explicit(base, rows(2, 2304, velocity)), dtype=sample)
    plain = replace(base, uncond=None, scale=None)
    check(device, plain, dtype=velocity)
    check(device, explicit(plain, rows(2, 2304, stored)), dtype=velocity)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("rescale", ["token", "clamp"])
def test_rescale(device: Any, rescale: str, token: tuple[int, int, int]) -> None:
    base = guided(3, token[0] * token[1] * token[2], rescale=rescale, token=token)
    base.velocity[1, : token[1]], base.uncond[1, : token[1]] = 0.0, 0.0  # type: ignore[index]  # a token without a norm
    check(device, base)


@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("score", [0, 1, 2])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("numel", [300, 2100, 9000])
def test_scores(device: Any, numel: int, score: int, reduce: int, rounded: bool) -> None:
    base = call(3, numel, coef=table(3, dead=(1,)), score=score, reduce=reduce, score_rounded=rounded)
    base.next_dtype = BF16
    check(device, base)
    base.mask = torch.rand(3, numel) < 0.6
    base.mask[2] = False
    check(device, base)
    check(device, replay(base, rows(3, numel, F16)))


@pytest.mark.parametrize("numel", [100, 2500])
def test_without_noise(device: Any, numel: int) -> None:
    check(device, replace(call(2, numel), seeds=None, step=None))


def test_std_zero_is_selected(device: Any) -> None:
    """Infinite noise on a deterministic row does not reach it."""
    result = check(device, explicit(call(2, 300, coef=table(2, dead=(0,))), torch.full((2, 300), torch.inf)))
    assert torch.equal(result["next_sample"][0], result["mean"][0])
    assert result["log_prob"][0] == 0 and result["flags"].tolist() == [0, 1]


def test_a_negative_zero_stays_one_where_std_is_zero(device: Any) -> None:
    coef, zero = table(2, dead=(0, 1)), torch.zeros(2, 2304)
    coef[:, :2] = -1.0
    assert check(device, call(2, 2304, sample=zero, velocity=zero, coef=coef))["next_sample"].signbit().all()


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
@pytest.mark.parametrize(("batch", "numel"), [(6, 112), (3, 2500), (5, 9000)])
def test_rows_through_an_index(device: Any, batch: int, numel: int, rescale: str) -> None:
    base = forked(batch, numel, rescale=rescale, token=(numel // 4, 4, 1))
    assert_same(run(device, base), run(reference, base))


@pytest.mark.parametrize("rescale", [None, "none", "token", "clamp"])
@pytest.mark.parametrize("numel", [112, 2052, 9000])
@pytest.mark.parametrize("masked", [False, True])
def test_row_means_against_a_reference(device: Any, numel: int, rescale: str | None, masked: bool) -> None:
    """shift and drift beside every other output, and alone."""
    base = call(3, numel) if rescale is None else guided(3, numel, rescale=rescale, token=(numel // 4, 4, 1))
    if masked:
        base.mask = torch.rand(3, numel) < 0.6
        base.mask[2] = False
    base = replace(replay(base, rows(3, numel)), coef=table(3, dead=(1,)), reduce=int(masked))
    base.ref_velocity, base.old_mean = rows(3, numel, base.velocity.dtype), rows(3, numel)
    base.ref_uncond = None if rescale is None else rows(3, numel, BF16)

    def means(backend: Any, names: tuple[str, ...]) -> list[torch.Tensor]:
        slots = {name: torch.full((3,), torch.nan) for name in names}
        backend.step(replace(base, **slots))
        return list(slots.values())

    for names in (("shift", "drift", "log_prob"), ("shift", "log_prob"), ("drift", "log_prob"), ("shift",), ("drift",)):
        for actual, expected in zip(means(device, names), means(reference, names), strict=True):
            assert same(actual, expected), names
    filled = replace(base, shift=torch.empty(3), drift=torch.empty(3))
    check(device, filled)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("numel", "where"), [(200, 199), (4099, 0), (4099, 2050), (4099, 4098), (9001, 9000)])
@pytest.mark.parametrize("form", ["counters", "noise", "given"])
def test_flags(device: Any, form: str, numel: int, where: int, value: float) -> None:
    base = call(3, numel)
    if form == "noise":
        base = explicit(base, rows(3, numel))
    elif form == "given":
        base = replay(base, rows(3, numel))
    base.velocity[1, where] = value
    assert check(device, base)["flags"].tolist() == [0, 1, 0]


def test_flags_of_a_given_sample(device: Any) -> None:
    base = replay(call(3, 5000), rows(3, 5000))
    base.given[2, 4999] = torch.nan  # type: ignore[index]
    assert check(device, base)["flags"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("numel", [300, 2050, 9000])
def test_only_what_is_asked_for_is_written(device: Any, numel: int) -> None:
    base = call(2, numel, mask=torch.rand(2, numel) < 0.5)
    expected = run(reference, base)
    for name in OUTPUTS:
        slot = torch.zeros_like(expected[name])
        device.step(replace(base, **{name: slot}))
        assert same(slot, expected[name]), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place(device: Any, dtype: torch.dtype) -> None:
    base = replace(call(2, 5000), sample=rows(2, 5000, dtype), next_dtype=dtype)
    expected = run(reference, base)
    clean = torch.empty(2, 5000)
    device.step(replace(base, next_sample=base.sample, clean=clean))
    assert torch.equal(base.sample, expected["next_sample"]) and torch.equal(clean, expected["clean"])


@pytest.mark.parametrize("gap", [2, 8, 13])
@pytest.mark.parametrize("numel", [130, 2500, 9000])
def test_strided_rows(device: Any, numel: int, gap: int) -> None:
    base = call(3, numel, gap=gap, mask=torch.rand(3, numel + gap)[:, :numel] < 0.5)
    check(device, base, dtype=F16, gap=gap)
    check(device, replace(base, reduce=2))


def test_one_odd_tensor_among_aligned_ones(device: Any) -> None:
    base = guided(2, 4096)
    check(device, replace(base, mask=torch.rand(2, 4097)[:, 1:] < 0.5))
    check(device, replace(base, uncond=rows(2, 4096, BF16, gap=3)))
    check(device, base, gap=2)


@pytest.mark.parametrize("numel", [1, 37, 511, 2049, 8195])
def test_nothing_beside_a_row_is_written(device: Any, numel: int) -> None:
    base = call(3, numel)
    wide = [torch.full((3, numel + 64), torch.nan, dtype=dtype) for dtype in FLOATS]
    next_sample, clean, mean = (slot[:, 32:-32] for slot in wide)
    device.step(replace(base, next_sample=next_sample, clean=clean, mean=mean))
    for slot in wide:
        assert slot[:, :32].isnan().all() and slot[:, -32:].isnan().all() and slot[:, 32:-32].isfinite().all()


def test_rows_of_coefficients_scales_and_steps(device: Any) -> None:
    base = guided(4, 700, coef=table(4), step=torch.tensor([5, 0, 2**32 - 1, 9]))
    check(device, base)
    check(device, replace(base, coef=base.coef[:1], scale=base.scale[:1], step=base.step[:1]))  # type: ignore[index]


def test_sample_shared_by_all_rows(device: Any) -> None:
    check(device, replace(call(3, 300), sample=rows(1, 300).expand(3, -1)))


@pytest.mark.parametrize("numel", [100, 700, 9 * 16 * 100])
@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_a_row_does_not_depend_on_the_others(device: Any, rescale: str, numel: int) -> None:
    base = guided(5, numel, rescale=rescale, token=(numel // 4, 4, 1), mask=torch.rand(5, numel) < 0.9)
    expected = run(device, base)
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        names = ("sample", "velocity", "uncond", "scale", "seeds", "mask")
        alone = replace(base, batch=part.stop - part.start, **{name: getattr(base, name)[part] for name in names})
        assert_same(run(device, alone), {name: value[part] for name, value in expected.items()})


@pytest.mark.parametrize("numel", [112, 2048, 9000])
def test_replay_has_the_bits_of_the_rollout(device: Any, numel: int) -> None:
    base = guided(3, numel, next_dtype=BF16)
    rolled = run(device, base)
    again = run(device, replay(base, rolled["next_sample"]))
    assert_same(again, rolled)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_of_stores(device: Any, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow and every value of the narrow type, against torch."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    ties = values.double() + (values.double().roll(-1) - values.double()) / 2
    values = torch.cat([values, ties.float(), torch.nextafter(ties.float(), torch.tensor(torch.inf)), values * 3])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, 3.4e38, 65519.9, 65520.0, 1e-45, -1e-45])])[None]
    coef, zero = torch.zeros(1, 16), torch.zeros_like(values)
    coef[0, :2] = 1.0
    slot = torch.empty_like(values, dtype=dtype)
    device.step(replace(call(1, values.shape[1], sample=values, velocity=zero, coef=coef), mean=slot))
    assert torch.equal(slot.float(), (values + 0.0).to(dtype).float())
    back = torch.empty_like(values)
    device.step(replace(call(1, values.shape[1], sample=slot, velocity=zero, coef=coef), mean=back))
    assert torch.equal(back, slot.float() + 0.0)


def test_no_rows_and_no_elements(device: Any) -> None:
    device.step(replace(call(0, 64), log_prob=torch.empty(0)))
    empty = replace(call(2, 0), log_prob=torch.full((2,), 7.0), flags=torch.full((2,), 7, dtype=torch.int32))
    device.step(empty)
    assert empty.log_prob.tolist() == [0.0, 0.0] and empty.flags.tolist() == [0, 0]  # type: ignore[union-attr]
