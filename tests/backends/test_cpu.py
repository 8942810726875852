"""The compiled CPU backend gives the bits of the reference, with every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastflow import philox
from fastflow.backends import cpu, reference
from fastflow.dynamics.columns import STD
from tests.backends.calls import FLOATS, assert_same, call, explicit, forked, guided, replay, rows, run, same, table

LENGTHS = (1, 7, 112, 2047, 2048, 2049, 65536)
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0])
COUNTERS = [(0, 0, 0), (7, 1, 4), (3, 2, 2**34 - 8), (2**32 - 1, 2**32 - 1, 2**61)]  # step, stream, offset


@pytest.mark.parametrize(("step", "stream", "offset"), COUNTERS)
@pytest.mark.parametrize("numel", [1, 7, 112, 2049])
def test_noise_bits(isa: str, numel: int, step: int, stream: int, offset: int) -> None:
    zero, coef = torch.zeros(len(SEEDS), numel), torch.zeros(1, 16)
    coef[:, STD] = 1.0
    counters = torch.tensor([step])
    base = call(
        len(SEEDS),
        numel,
        sample=zero,
        velocity=zero,
        coef=coef,
        seeds=SEEDS,
        step=counters,
        stream=stream,
        offset=offset,
    )
    expected = philox.normal(SEEDS, counters, numel, stream=stream, offset=offset)
    assert torch.equal(run(cpu, base)["next_sample"], expected)


@pytest.mark.parametrize("numel", LENGTHS)
def test_row_lengths(isa: str, numel: int) -> None:
    base = call(2, numel, coef=table(2))
    assert_same(run(cpu, base), run(reference, base))


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
@pytest.mark.parametrize(("batch", "numel"), [(6, 112), (3, 2500), (5, 9000)])
def test_rows_through_an_index(isa: str, batch: int, numel: int, rescale: str) -> None:
    base = forked(batch, numel, rescale=rescale, token=(numel // 4, 4, 1))
    assert_same(run(cpu, base), run(reference, base))


def test_an_index_that_names_no_row_is_clamped_and_flagged() -> None:
    base = forked(5, 300)
    found, index = run(reference, base), base.rows.clamp(0, 3)  # type: ignore[union-attr]
    gathered = replace(base, rows=None, **{n: getattr(base, n)[index] for n in ("sample", "velocity", "uncond")})
    expected = {**run(reference, gathered), "flags": torch.tensor([2, 0, 0, 0, 2], dtype=torch.int32)}
    assert_same(found, expected)


@pytest.mark.parametrize("sample", FLOATS)
@pytest.mark.parametrize("velocity", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_dtypes(isa: str, sample: torch.dtype, velocity: torch.dtype, stored: torch.dtype) -> None:
    base = guided(2, 2049, velocity, next_dtype=stored)
    base = explicit(replace(base, sample=rows(2, 2049, sample)), rows(2, 2049, velocity))
    assert_same(run(cpu, base, dtype=sample), run(reference, base, dtype=sample))


@pytest.mark.parametrize("token", [(40, 64, 1), (9, 37, 1), (1, 4, 700), (3, 5, 33), (1, 3000, 1), (2, 1, 9)])
@pytest.mark.parametrize("rescale", ["token", "clamp"])
def test_rescale(isa: str, rescale: str, token: tuple[int, int, int]) -> None:
    base = guided(3, token[0] * token[1] * token[2], rescale=rescale, token=token)
    base.velocity[1, : token[1]], base.uncond[1, : token[1]] = 0.0, 0.0  # type: ignore[index]  # a token without a norm
    assert_same(run(cpu, base), run(reference, base))


@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("score", [0, 1, 2])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_scores(isa: str, score: int, reduce: int, rounded: bool, masked: bool) -> None:
    base = call(3, 2100, coef=table(3, dead=(1,)), score=score, reduce=reduce, score_rounded=rounded)
    base.next_dtype = torch.bfloat16
    if masked:
        base.mask = torch.rand(3, 2100) < 0.6
        base.mask[2] = False
    for given_call in (base, replay(base, rows(3, 2100, torch.float16))):
        assert_same(run(cpu, given_call), run(reference, given_call))


def test_without_noise(isa: str) -> None:
    base = replace(call(2, 600), seeds=None, step=None)
    assert_same(run(cpu, base), run(reference, base))


def test_std_zero_is_selected(isa: str) -> None:
    """Infinite noise on a deterministic row does not reach it."""
    base = explicit(call(2, 300, coef=table(2, dead=(0,))), torch.full((2, 300), torch.inf))
    result = run(cpu, base)
    assert torch.equal(result["next_sample"][0], result["mean"][0])
    assert result["log_prob"][0] == 0 and result["flags"].tolist() == [0, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 2050, 4098])
def test_flags(isa: str, value: float, where: int) -> None:
    base = call(3, 4099)
    base.velocity[1, where] = value
    result = run(cpu, base)
    assert result["flags"].tolist() == [0, 1, 0]
    assert_same(result, run(reference, base))


def test_only_what_is_asked_for_is_written(isa: str) -> None:
    base = call(2, 2050)
    expected = run(reference, base)
    for name in ("next_sample", "log_prob", "clean", "ode_next", "mean", "flags"):
        slot = torch.zeros_like(expected[name])
        cpu.step(replace(base, **{name: slot}))
        assert same(slot, expected[name]), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place(isa: str, dtype: torch.dtype) -> None:
    base = replace(call(2, 5000), sample=rows(2, 5000, dtype), next_dtype=dtype)
    expected = run(reference, base)
    clean = torch.empty(2, 5000)
    cpu.step(replace(base, next_sample=base.sample, clean=clean))
    assert torch.equal(base.sample, expected["next_sample"]) and torch.equal(clean, expected["clean"])


@pytest.mark.parametrize("gap", [2, 13])
def test_strided_rows(isa: str, gap: int) -> None:
    base = call(3, 2500, gap=gap, mask=torch.rand(3, 2500 + gap)[:, :2500] < 0.5)
    assert_same(run(cpu, base, torch.float16, gap), run(reference, base, torch.float16))


@pytest.mark.parametrize("gap", [0, 13])
def test_large_outputs_go_past_the_cache(isa: str, gap: int) -> None:
    """4 MB of float32 outputs and more are streamed where a row is aligned (gap 0), stored as ever where it is not."""
    base = call(5, 65536 + 16, gap=gap)
    assert 4 * base.batch * base.numel * 4 >= 4 << 20
    assert_same(run(cpu, base, gap=gap), run(reference, base, gap=gap))
    state = base.sample.clone()
    apart = run(cpu, replace(base, sample=state), gap=gap)
    others = {name: rows(5, base.numel) for name in ("clean", "ode_next", "mean")}
    cpu.step(replace(base, sample=state, next_sample=state, **others))
    assert same(state, apart["next_sample"])


@pytest.mark.parametrize("numel", [1, 37, 511, 2049])
def test_nothing_beside_a_row_is_written(isa: str, numel: int) -> None:
    base = call(3, numel)
    wide = [torch.full((3, numel + 64), torch.nan, dtype=dtype) for dtype in FLOATS]
    next_sample, clean, mean = (slot[:, 32:-32] for slot in wide)
    cpu.step(replace(base, next_sample=next_sample, clean=clean, mean=mean))
    for slot in wide:
        assert slot[:, :32].isnan().all() and slot[:, -32:].isnan().all() and slot[:, 32:-32].isfinite().all()


def test_rows_of_coefficients_scales_and_steps(isa: str) -> None:
    base = guided(4, 700, coef=table(4), step=torch.tensor([5, 0, 2**32 - 1, 9]))
    assert_same(run(cpu, base), run(reference, base))
    one = replace(base, coef=base.coef[:1], scale=base.scale[:1], step=base.step[:1])  # type: ignore[index]
    assert_same(run(cpu, one), run(reference, one))


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_threads_and_batch_change_no_bit(isa: str, rescale: str) -> None:
    numel = 9 * 16 * 300
    base = guided(4, numel, rescale=rescale, token=(9 * 300, 16, 1), mask=torch.rand(4, numel) < 0.9)
    expected = run(cpu, base)
    torch.set_num_threads(1)
    assert_same(run(cpu, base), expected)
    for row in range(4):
        alone = slice(row, row + 1)
        fields = {
            name: getattr(base, name)[alone] for name in ("sample", "velocity", "uncond", "scale", "seeds", "mask")
        }
        result = run(cpu, replace(base, batch=1, **fields))
        assert_same(result, {name: value[alone] for name, value in expected.items()})


def test_empty() -> None:
    cpu.step(replace(call(0, 64), log_prob=torch.empty(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_stores(isa: str, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow and every value of the narrow type, against torch."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    ties = values.double() + (values.double().roll(-1) - values.double()) / 2
    values = torch.cat([values, ties.float(), torch.nextafter(ties.float(), torch.tensor(torch.inf)), values * 3])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, 3.4e38, 65519.9, 65520.0, 1e-45, -1e-45])])[None]
    coef = torch.zeros(1, 16)
    coef[0, :2] = 1.0
    zero = torch.zeros_like(values)
    slot = torch.empty_like(values, dtype=dtype)
    cpu.step(replace(call(1, values.shape[1], sample=values, velocity=zero, coef=coef), mean=slot))
    assert torch.equal(slot.float(), (values + 0.0).to(dtype).float())
    back = torch.empty_like(values)
    cpu.step(replace(call(1, values.shape[1], sample=slot, velocity=zero, coef=coef), mean=back))
    assert torch.equal(back, slot.float() + 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_stored_with_the_same_bits(module: Any, dtype: torch.dtype) -> None:
    patterns = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -1, 0x7F801000], dtype=torch.int64)
    values = patterns.to(torch.int32).view(torch.float32)[None].repeat(1, 5)
    coef, found = torch.zeros(1, 16), []
    before = module.isa()
    for name in module.isas():
        module.set_isa(name)
        slot = torch.zeros_like(values, dtype=dtype)
        cpu.step(replace(replay(call(1, 30, sample=values, velocity=values, coef=coef), values), next_sample=slot))
        assert slot.isnan().all()
        found.append(slot.view(torch.int16).tolist())
    module.set_isa(before)
    assert all(bits == found[0] for bits in found)


@pytest.mark.parametrize("rescale", [None, "none", "token", "clamp"])
@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_backward(isa: str, rescale: str | None, reduce: int, dtype: torch.dtype) -> None:
    token = (41, 64, 1) if reduce else (1, 41, 64)
    numel, mask = 41 * 64, torch.rand(4, 41 * 64) < 0.7
    mask[3] = False
    fields = {"coef": table(4, dead=(1,)), "mask": mask, "reduce": reduce, "token": token}
    base = call(4, numel, **fields) if rescale is None else guided(4, numel, dtype, rescale=rescale, **fields)
    base = replay(base, rows(4, numel, dtype))
    grad = torch.randn(4, numel) if reduce == 2 else torch.randn(4)

    def gradients(backend: Any) -> list[torch.Tensor]:
        slots = [torch.full_like(t, torch.nan) for t in (base.velocity, base.uncond) if t is not None]
        backend.log_prob_backward(base, grad, slots[0], slots[1] if len(slots) == 2 else None)
        return slots

    for actual, expected in zip(gradients(cpu), gradients(reference), strict=True):
        assert torch.equal(actual, expected)
        assert not actual[[1, 3]].any()


def test_refusals_name_the_value() -> None:
    assert cpu.refuse(call()) is None
    assert "velocity" in str(cpu.refuse(call(product_dtype="velocity")))
    assert "noise is torch.float64" in str(cpu.refuse(call(noise=torch.zeros(3, 112, dtype=torch.float64))))
    assert "meta" in str(cpu.refuse(call(sample=torch.empty(3, 112, device="meta"))))


def test_unknown_instruction_set(module: Any) -> None:
    with pytest.raises(ValueError, match="mmx"):
        module.set_isa("mmx")
