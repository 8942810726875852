"""SOAR's points against a plain transcription of its formula, element by element in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.tolerance import FLOAT64, KOLMOGOROV, LOSS, assert_as_good_as_plain

B, N, SHAPE = 3, 4, (2, 5, 3)
SEEDS = [11, 12, 13]


def data(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    clean, velocity = (torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.9, 0.4, 1.0], dtype=torch.float64)
    table = {"clean": clean, "velocity": velocity, "sigma": sigma, "sigma_next": sigma - 0.1}
    return {**{name: t.to(dtype) for name, t in table.items()}, "noise": ff.Noise(SEEDS, step=2, stream=3)}


def transcribed(d: dict[str, Any], levels: list[list[float]]) -> tuple[Tensor, Tensor]:
    """(sample, target) [B * N, *] by the words of the paper, a number at a time."""
    noise = d["noise"].sample(SHAPE, torch.float64) if isinstance(d["noise"], ff.Noise) else d["noise"]
    rows = [t.reshape(B, -1).tolist() for t in (d["clean"], noise, d["velocity"])]
    samples, targets = [], []
    for b in range(B):
        s0, s1 = float(d["sigma"][b]), float(d["sigma_next"][b])
        for level in levels[b]:
            alpha = (level - s1) / (1.0 - s1)
            point = []
            for z_0, z_1, v in zip(*(row[b] for row in rows), strict=True):
                z_hat = (1.0 - s0) * z_0 + s0 * z_1 + (s1 - s0) * v
                point.append((1.0 - alpha) * z_hat + alpha * z_1)
            samples.append(point)
            targets.append([(z - z_0) / level for z, z_0 in zip(point, rows[0][b], strict=True)])
    return tuple(torch.tensor(t, dtype=torch.float64).reshape(-1, *SHAPE) for t in (samples, targets))  # type: ignore[return-value]


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("reach", [None, 1.5])
def test_the_formula(given: bool, reach: float | None) -> None:
    d = data()
    if given:
        d["noise"] = torch.randn(B, *SHAPE, dtype=torch.float64)
        levels: Any = d["sigma_next"][:, None] + torch.tensor([0.0, 0.01, 0.05, 0.1], dtype=torch.float64)
    else:
        levels = N
    points = ff.off_trajectory(**d, levels=levels, reach=reach)
    assert points.sample.shape == points.target.shape == (B * N, *SHAPE) and points.sigma.shape == (B * N,)
    sample, target = transcribed(d, points.sigma.reshape(B, N).tolist())
    assert float((points.sample - sample).abs().max()) <= FLOAT64
    assert float((points.target - target).abs().max()) <= FLOAT64
    if given:
        assert torch.equal(points.sigma, levels.flatten())


def test_on_the_straight_path_the_target_is_noise_minus_clean() -> None:
    d = data()
    straight = d["noise"].sample(SHAPE, torch.float64) - d["clean"]
    points = ff.off_trajectory(**{**d, "velocity": straight}, levels=N)
    assert float((points.target - straight.repeat_interleave(N, 0)).abs().max()) <= FLOAT64
    on_path = ff.noised(d["clean"].repeat_interleave(N, 0), points.sigma, _repeated(d["noise"]))
    assert float((points.sample - on_path).abs().max()) <= FLOAT64


def _repeated(noise: ff.Noise) -> Tensor:
    return noise.sample(SHAPE, torch.float64).repeat_interleave(N, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states(dtype: torch.dtype) -> None:
    """The target is that of the state as it is stored."""
    d = data(dtype)
    d["sigma"], d["sigma_next"] = d["sigma"].float(), d["sigma_next"].float()
    d["noise"], drawn = d["noise"].sample(SHAPE), ff.off_trajectory(**d, levels=N)
    points = ff.off_trajectory(**d, levels=drawn.sigma.reshape(B, N))
    assert all(map(torch.equal, points, drawn))
    assert (points.sample.dtype, points.sigma.dtype, points.target.dtype) == (dtype, torch.float32, torch.float32)
    clean, level = d["clean"].repeat_interleave(N, 0), points.sigma.reshape(-1, 1, 1, 1)
    exact = (points.sample.double() - clean.double()) / level.double()
    assert_as_good_as_plain(points.target, exact, (points.sample.float() - clean.float()) / level)
    if dtype == torch.float32:
        z_0, z_1, v, s0, s1 = (
            t.repeat_interleave(N, 0).reshape(B * N, *([1] * 3 if t.dim() == 1 else SHAPE))
            for t in (d["clean"], d["noise"], d["velocity"], d["sigma"], d["sigma_next"])
        )
        alpha = (level - s1) / (1.0 - s1)
        plain = (1.0 - alpha) * ((1.0 - s0) * z_0 + s0 * z_1 + (s1 - s0) * v) + alpha * z_1
        exact, _ = transcribed(d, points.sigma.reshape(B, N).tolist())
        assert_as_good_as_plain(points.sample, exact, plain)


def test_a_row_does_not_depend_on_the_batch() -> None:
    d = data(torch.float32)
    whole = ff.off_trajectory(**d, levels=5)
    for b in range(B):
        row = {name: t[b : b + 1] for name, t in d.items() if isinstance(t, Tensor)}
        alone = ff.off_trajectory(**row, noise=ff.Noise(SEEDS[b : b + 1], step=2, stream=3), levels=5)
        for name, value in whole._asdict().items():
            assert torch.equal(getattr(alone, name), value[5 * b : 5 * b + 5]), name
    more = ff.off_trajectory(**d, levels=7)  # the first five of seven
    assert torch.equal(more.sigma.reshape(B, 7)[:, :5], whole.sigma.reshape(B, 5))
    other = ff.off_trajectory(**{**d, "noise": ff.Noise(SEEDS, step=3, stream=3)}, levels=5)
    assert not bool((other.sigma == whole.sigma).any())


@pytest.mark.parametrize("reach", [None, 1.5])
def test_levels_are_even_and_within_their_bounds(reach: float | None) -> None:
    d = data(torch.float32)
    table = ff.off_trajectory(**d, levels=4000, reach=reach).sigma.reshape(B, -1)
    low, high = d["sigma_next"][:, None], torch.ones(B, 1)
    if reach is not None:
        high = (reach * d["sigma"]).clamp(max=1.0)[:, None]
    assert bool(((low <= table) & (table <= high)).all())
    place = ((table - low).double() / (high - low)).sort(1).values
    even = (torch.arange(4000) + 0.5) / 4000
    assert float((place - even).abs().max()) < KOLMOGOROV / 4000**0.5


def test_it_feeds_matching_loss(backend: str) -> None:
    d = data(torch.float32)
    points = ff.off_trajectory(**d, levels=N)
    velocity = torch.randn(points.sample.shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    loss, _ = ff.matching_loss(velocity, points.sample, points.sigma, target=points.target, backend=backend)
    plain = (velocity.double() - points.target.double()).square().mean()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=LOSS)
    assert loss.requires_grad
    perfect, _ = ff.matching_loss(points.target, points.sample, points.sigma, target=points.target, backend=backend)
    assert float(perfect) == 0.0


def test_no_gradient() -> None:
    d = data(torch.float32)
    d["velocity"].requires_grad_(True)
    d["clean"].requires_grad_(True)
    assert not any(t.requires_grad for t in ff.off_trajectory(**d))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sigma_next": torch.tensor([0.8, 0.0, 0.9])}, ValueError, "sigma_next: wanted 0 < sigma_next < sigma <= 1"),
        ({"sigma_next": torch.tensor([0.8, 0.5, 0.9])}, ValueError, "sigma_next: wanted 0 < sigma_next < sigma <= 1"),
        ({"sigma": torch.ones(2)}, ValueError, r"sigma: wanted floats \[3\], one per row of clean"),
        ({"levels": 0}, ValueError, r"levels: wanted at least 1 of them, or floats \[3, N\], got 0"),
        ({"levels": torch.ones(3)}, ValueError, r"levels: wanted a number of them, or floats \[3, N\] on cpu"),
        ({"levels": torch.full((3, 1), 0.5)}, ValueError, "levels: wanted sigma_next <= levels <= 1"),
        (
            {"noise": torch.zeros(B, *SHAPE)},
            ValueError,
            r"levels: wanted floats \[B, N\] beside noise that is a tensor",
        ),
        ({"noise": ff.Noise([1, 2])}, ValueError, "noise.seeds: wanted one per row of clean, 3, got 2"),
        ({"reach": 0.9}, ValueError, "reach: wanted at least 1, or None, got 0.9"),
        ({"velocity": torch.zeros(B, 2)}, ValueError, "velocity: wanted the shape of sample"),
        ({"clean": torch.zeros(B, *SHAPE).int()}, TypeError, "sample: wanted float32"),
    ],
)
def test_messages(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.off_trajectory(**{**data(torch.float32), **changes})
