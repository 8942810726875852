"""Counter noise: known answers, moments, independence, and what keys it."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from fastflow import philox
from tests.tolerance import NOISE, STANDARD_ERRORS

# Random123 known-answer vectors of philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == output


def test_box_muller_is_within_the_contract_of_float64() -> None:
    low = torch.arange(1 << 14) << 8  # the smallest uniforms, where r is largest
    for w0 in (low, torch.randint(1 << 32, (1 << 14,)), (1 << 32) - 1 - low):
        w1 = torch.randint(1 << 32, w0.shape)
        for z, exact in zip(philox.box_muller(w0, w1), philox.box_muller64(w0, w1), strict=True):
            assert (z.double() - exact).abs().max() <= NOISE
            assert z.abs().max() <= 5.77


def test_box_muller_ends() -> None:
    """u = 1 gives 0, never a NaN; the four quadrants' edges give the axes' signs."""
    w1 = torch.tensor([0, 1 << 29, 1 << 30, 1 << 31, 3 << 30, (1 << 32) - 1])
    cos, sin = philox.box_muller(torch.full_like(w1, 0xFFFFFFFF), w1)
    assert torch.equal(cos.abs(), torch.zeros(6)) and torch.equal(sin.abs(), torch.zeros(6))
    cos, sin = philox.box_muller(torch.zeros_like(w1), w1)
    exact_cos, exact_sin = philox.box_muller64(torch.zeros_like(w1), w1)
    assert (cos.double() - exact_cos).abs().max() <= NOISE and (sin.double() - exact_sin).abs().max() <= NOISE


def test_moments_and_independence() -> None:
    n = 1 << 18
    z = torch.cat([ff.Noise([7, -8], step=s).sample((n // 4,)) for s in range(2)]).double()
    count = z.numel()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(z.pow(power).mean() - moment) < STANDARD_ERRORS * (variance / count) ** 0.5
    for lag in (1, 2, 3, 4, 8, 2048):
        products = z[:, :-lag] * z[:, lag:]
        assert abs(products.mean()) < STANDARD_ERRORS / products.numel() ** 0.5
    across = torch.corrcoef(z)
    off = across - torch.eye(len(z))
    assert off.abs().max() < STANDARD_ERRORS / z.shape[1] ** 0.5


def test_even_draws_are_the_words() -> None:
    """Of the counters, in the order of the elements."""
    seeds, step = torch.tensor([5, -7]), torch.tensor([3, 4])
    drawn = philox.uniform(seeds, step, 6, stream=2)
    for row, (seed, at) in enumerate(zip(seeds.tolist(), step.tolist(), strict=True)):
        key = tuple(torch.tensor([word]) for word in (seed & philox.MASK32, (seed >> 32) & philox.MASK32))
        counters = [tuple(torch.tensor([word]) for word in (q, 0, at, 2)) for q in (0, 1)]
        words = [int(word) for counter in counters for word in philox.philox4x32(counter, key)]
        assert drawn[row].tolist() == [((word >> 8) + 1) / 2**24 for word in words[:6]]
    assert drawn.dtype == torch.float64
    many = philox.uniform(torch.arange(50), torch.tensor([0]), 4000)
    assert float(many.min()) > 0.0 and float(many.max()) <= 1.0
    assert abs(float(many.mean()) - 0.5) < STANDARD_ERRORS * (1 / 12 / many.numel()) ** 0.5


def test_bits_depend_on_seed_step_stream_and_element_alone(backend: str) -> None:
    sigmas = ff.sigma_schedule(4, shift=3.0)
    at, shape = ff.FlowSDE(0.7).transitions(sigmas).at(1), (3, 5, 37)
    x = v = torch.zeros(shape)
    seeds = torch.tensor([3, -(1 << 63), (1 << 63) - 1])

    def bits(rows: list[int], **noise: int) -> torch.Tensor:
        chosen = ff.Noise(seeds[rows], **{"step": 2, **noise})
        return ff.step(x[rows], v[rows], at, noise=chosen, backend=backend).next_sample

    whole = bits([0, 1, 2])
    assert torch.equal(bits([2, 0]), whole[[2, 0]])
    assert torch.equal(bits([1]), whole[[1]])
    for other in ({"step": 3}, {"stream": 1}, {"offset": 4}):
        assert not (bits([0], **other) == whole[[0]]).any()
    exact = philox.normal(seeds, torch.tensor([2]), 5 * 37).reshape(shape) * at.rows("cpu")[0, 2]
    assert torch.equal(whole, exact)
    per_row = ff.step(x, v, at, noise=ff.Noise(seeds, torch.tensor([2, 5, 2])), backend=backend).next_sample
    assert torch.equal(per_row[[0, 2]], whole[[0, 2]]) and not (per_row[1] == whole[1]).any()


def test_offset_cuts_a_sample_into_shards(backend: str) -> None:
    tr = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4, shift=3.0))
    x = torch.zeros(2, 64)
    whole = ff.step(x, x, tr.at(0), noise=ff.Noise([1, 2], step=0), backend=backend).next_sample
    parts = [
        ff.step(
            x[:, cut], x[:, cut], tr.at(0), noise=ff.Noise([1, 2], step=0, offset=cut.start), backend=backend
        ).next_sample
        for cut in (slice(0, 24), slice(24, 64))
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_sample_seeds_are_a_hash_of_all_four() -> None:
    seeds = ff.sample_seeds(1, 2, [10, 11], 3)
    assert seeds.dtype == torch.int64 and seeds.shape == (6,)
    assert torch.equal(seeds[3:], ff.sample_seeds(1, 2, [11], 3))  # prompt-major, global ids: any rank, any split
    every = torch.cat([ff.sample_seeds(b, e, list(range(20)), 5) for b in range(3) for e in range(3)])
    assert len(set(every.tolist())) == len(every)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ff.Noise([1, 2, 1]), ValueError, r"seeds: wanted distinct seeds, got 1 at rows \[0, 2\].*shared=True"),
        (lambda: ff.Noise(torch.tensor([1.0])), TypeError, "seeds: wanted dtype int64, got torch.float32"),
        (lambda: ff.Noise(torch.tensor([[1]])), ValueError, r"seeds: wanted int64 \[B\], got shape \(1, 1\)"),
        (lambda: ff.Noise(5), TypeError, "seeds: wanted an int64 tensor"),
        (lambda: ff.Noise([1 << 64]), ValueError, "seeds: wanted 64-bit integers, got 18446744073709551616"),
        (lambda: ff.Noise([1], step=-1), ValueError, r"step: wanted 0 <= step < 2\*\*32"),
        (lambda: ff.Noise([1], step=1.5), TypeError, "step: wanted an int, got float"),
        (lambda: ff.Noise([1, 2], step=torch.tensor([1, 2, 3])), ValueError, r"step: wanted an int or int64 \[2\]"),
        (lambda: ff.Noise([1], stream=1 << 32), ValueError, "stream: wanted 0 <= stream"),
        (lambda: ff.Noise([1], offset=6), ValueError, "offset: wanted a multiple of 4.*got 6"),
        (lambda: ff.sample_seeds(0, 0, [1, 1], 2), ValueError, "prompt_ids: wanted distinct ids, got 1 repeated"),
        (lambda: ff.sample_seeds(0, 0, [1], 0), ValueError, "copies: wanted at least 1, got 0"),
        (lambda: ff.sample_seeds(0.5, 0, [1], 1), TypeError, "base: wanted an int, got float"),
    ],
)
def test_bad_noise_is_named(make, error: type[Exception], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        make()


def test_shared_seeds_draw_equal_noise() -> None:
    z = ff.Noise([4, 4], shared=True).sample((8,))
    assert torch.equal(z[0], z[1])
