"""Forward-process losses against plain float64 autograd of their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.tolerance import LOSS, assert_gradient

SHAPES = [(4, 112), (4, 3, 1500), (6, 16, 20, 10)]


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    clean, noise = draw(), ff.Noise(torch.arange(shape[0]) + 7, step=5, stream=9)
    velocity = (noise.sample(shape[1:]) - clean + 0.3 * draw()).to(dtype)
    return {
        "clean": clean, "noise": noise, "velocity": velocity, "old_velocity": (velocity.float() + 0.1 * draw()).to(dtype),
        "ref_velocity": (velocity.float() + 0.2 * draw()).to(dtype),
        "sigma": torch.rand(shape[0], generator=generator) * 0.8 + 0.1,
        "advantage": torch.randn(shape[0], generator=generator) * 2, "weight": torch.rand(shape[0], generator=generator) + 0.5,
    }  # fmt: skip


def plain(d: dict[str, Any], objective: str, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient in velocity) by the papers' own words: x_t, x0 of each velocity, in float64."""
    shape = d["clean"].shape
    wide = [1] * (len(shape) - 1)
    noise = d["noise"].sample(shape[1:]).double() if isinstance(d["noise"], ff.Noise) else d["noise"].double()
    clean, sigma = d["clean"].double(), d["sigma"].float().double().reshape(-1, *wide)
    velocity = d["velocity"].double().requires_grad_(True)
    old, ref = d["old_velocity"].double(), d["ref_velocity"].double()
    target, beta = noise - clean, options.get("beta", 1.0)

    def mean(values: Tensor) -> Tensor:
        if mask is None:
            return values.flatten(1).mean(1)
        return torch.where(mask, values, 0.0).flatten(1).sum(1) / mask.flatten(1).sum(1)

    square, old_square = mean((velocity - target) ** 2), mean((old - target) ** 2)
    weight = (
        options["weight"].double() if options.get("weight") is not None else torch.ones(shape[0], dtype=torch.float64)
    )
    advantage = d["advantage"].double()
    if objective == "mse":
        row = weight * square * (advantage if options.get("weighted") else 1.0)
    elif objective == "awm":
        ratio = (weight * (old_square - square)).exp()
        low, high = options.get("clip", (1.0, 1.0))
        row = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    elif objective == "nft":
        x_t = (1 - sigma) * clean + sigma * noise
        most = options.get("advantage_max", 5.0)
        share = (advantage / (2 * most) + 0.5).clamp(0, 1)
        parts = []
        for mixed in (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity):
            error = x_t - sigma * mixed - clean
            size = mean(error.detach().abs()).clamp(min=1e-5)
            parts.append(mean(error**2) / size)
        row = weight * most * (share * parts[0] + (1 - share) * parts[1]) / beta
    elif objective == "crd":
        sizes = [mean((v.detach() - target).abs()) for v in (velocity, old)]
        row = crd(advantage, (weight, square, old_square, *sizes), options)
    else:
        gap = weight * (square - old_square)
        row = -torch.nn.functional.logsigmoid(-0.5 * beta * (gap[0::2] - gap[1::2]))
    loss = row.mean() + (options.get("kl_weight", 0.0) * mean((velocity - ref) ** 2)).mean()
    loss.backward()
    assert velocity.grad is not None
    return loss.detach(), velocity.grad


def crd(advantage: Tensor, rows: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    """Group by group, the mean of the implicit reward differentiated like the rest. rows: weight, the squares, the sizes."""
    beta, most, ids = options.get("beta", 1.0), options.get("advantage_max", 5.0), options["group_ids"]
    weight, square, old_square, size, old_size = rows
    if options.get("normalized", True):
        square, old_square = square / size.clamp(min=1e-5), old_square / old_size.clamp(min=1e-5)
    implicit = weight * (old_square - square)
    reward = (advantage.clamp(-most, most) / most) / 2.0 + 0.5
    each = []
    for row, group in enumerate(ids):
        others = [i for i, one in enumerate(ids) if one == group]
        gap = beta * (implicit[row] - implicit[others].mean()) - (reward[row] - reward[others].mean())
        each.append(gap**2 * most / beta)
    return torch.stack(each)


def ours(
    d: dict[str, Any], objective: str, mask: Tensor | None, backend: str, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    velocity = d["velocity"].clone().requires_grad_(True)
    weighted = options.pop("weighted", objective in ("awm", "nft", "crd"))
    loss, info = ff.matching_loss(
        velocity, d["clean"], d["sigma"], d["noise"], objective=objective, mask=mask, backend=backend,
        advantage=d["advantage"] if weighted else None, old_velocity=d["old_velocity"] if objective != "mse" else None,
        ref_velocity=d["ref_velocity"] if "kl_weight" in options else None, **options,
    )  # fmt: skip
    loss.backward()
    assert velocity.grad is not None
    return loss.detach(), velocity.grad, info


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5])
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("mse", {}),
    "weighted": ("mse", {"weight": WEIGHT, "weighted": True, "kl_weight": 0.3}),
    "awm": ("awm", {"weight": WEIGHT, "kl_weight": 0.1}),
    "awm, clipped": ("awm", {"clip": (0.001, 0.001)}),
    "nft": ("nft", {"beta": 0.7, "kl_weight": 0.1}),
    "nft, beta 1": ("nft", {"advantage_max": 2.0}),
    "dpo": ("dpo", {"beta": 50.0, "weight": WEIGHT}),
    "crd": ("crd", {"group_ids": [7, -2, 7, 7], "weight": WEIGHT, "beta": 0.6, "kl_weight": WEIGHT / 10}),
    "crd, plain errors": ("crd", {"group_ids": [1, 0, 0, 1], "normalized": False, "advantage_max": 1.5}),
}


@pytest.mark.parametrize(("objective", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_objectives(backend: str, objective: str, options: dict[str, Any], masked: bool) -> None:
    d = data((4, 3, 1500))
    mask = torch.rand(4, 3, 1500, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    loss, gradient, _ = ours(d, objective, mask, backend, **options)
    wanted, exact = plain(d, objective, mask, **options)
    assert abs(float(loss - wanted)) <= LOSS * max(1.0, abs(float(wanted)))
    assert_gradient(gradient, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    d = data(shape, dtype)
    loss, gradient, _ = ours(d, "nft", None, backend, beta=0.7, kl_weight=0.1)
    wanted, exact = plain(d, "nft", None, beta=0.7, kl_weight=0.1)
    assert abs(float(loss - wanted)) <= LOSS * max(1.0, abs(float(wanted)))
    assert_gradient(gradient, exact)


def test_backends_give_the_same_bits() -> None:
    d = data((4, 3, 1500), torch.bfloat16)
    first, second = (ours(d, "nft", None, name, beta=0.7, kl_weight=0.1) for name in ("reference", "cpu"))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_drawn_noise_is_the_noise_of_noised(backend: str) -> None:
    """The target is drawn again inside, and is what x_t was made of."""
    d = data((4, 3, 1500))
    given = {**d, "noise": d["noise"].sample((3, 1500))}
    drawn, explicit = ours(d, "mse", None, backend), ours(given, "mse", None, backend)
    assert torch.equal(drawn[0], explicit[0]) and torch.equal(drawn[1], explicit[1])
    x_t = ff.noised(d["clean"], d["sigma"], d["noise"])
    level = d["sigma"].reshape(-1, 1, 1)
    assert torch.equal(x_t, (1.0 - level) * d["clean"] + level * given["noise"])
    perfect = given["noise"] - d["clean"]
    assert float(ff.matching_loss(perfect, d["clean"], d["sigma"], d["noise"], backend=backend)[0]) == 0.0


def test_a_target_of_its_own(backend: str) -> None:
    d = data((4, 3, 1500))
    target = d["noise"].sample((3, 1500)) - d["clean"]
    own = ff.matching_rows(d["velocity"], d["clean"], target=target, backend=backend)
    drawn = ff.matching_rows(d["velocity"], d["clean"], d["noise"], backend=backend)
    assert torch.equal(own.square, drawn.square)
    assert float(own.old_square.abs().max()) == float(own.shift.abs().max()) == 0.0


def test_rows_do_not_depend_on_the_batch(backend: str) -> None:
    d = data((4, 3, 1500))
    whole = ff.matching_rows(d["velocity"], d["clean"], d["noise"], old_velocity=d["old_velocity"], backend=backend)
    for row in range(4):
        alone = ff.matching_rows(
            d["velocity"][row : row + 1], d["clean"][row : row + 1], ff.Noise([row + 7], 5, stream=9),
            old_velocity=d["old_velocity"][row : row + 1], backend=backend,
        )  # fmt: skip
        for name, value in whole._asdict().items():
            assert torch.equal(getattr(alone, name), value[row : row + 1]), name


def test_on_policy_the_ratio_is_one(backend: str) -> None:
    d = data((4, 112))
    d["old_velocity"] = d["velocity"]
    loss, _, info = ours(d, "awm", None, backend)
    assert bool((info["ratio"] == 1.0).all()) and float(info["clip_fraction"]) == 0.0
    assert float(loss) == pytest.approx(-float(d["advantage"].mean()), rel=LOSS)


def test_gradcheck_and_opcheck() -> None:
    d = {k: v.double() if isinstance(v, Tensor) else v for k, v in data((2, 24)).items()}

    def rows(velocity: Tensor) -> Tensor:
        found = ff.matching_rows(
            velocity,
            d["clean"],
            d["noise"],
            old_velocity=d["old_velocity"],
            ref_velocity=d["ref_velocity"],
            backend="reference",
        )
        return found.square + 2.0 * found.cross + 3.0 * found.shift

    assert torch.autograd.gradcheck(rows, (d["velocity"].clone().requires_grad_(True),))
    s = data((2, 24))
    seeds, step = s["noise"].counters(torch.device("cpu"))
    velocity = s["velocity"].clone().requires_grad_(True)
    arguments = (
        velocity,
        s["clean"],
        s["old_velocity"],
        s["ref_velocity"],
        None,
        None,
        seeds,
        step,
        None,
        9,
        0,
        "auto",
        0.7,
    )
    torch.library.opcheck(torch.ops.fastflow.matching.default, arguments)


CRD = {"objective": "crd", "old_velocity": torch.zeros(3, 8), "advantage": torch.zeros(3), "group_ids": [0, 0, 1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft"}, "objective: wanted one of mse, awm, nft, dpo, crd, got 'sft'"),
        ({"objective": "awm"}, "old_velocity: wanted the sampling policy's"),
        (
            {"objective": "nft", "old_velocity": torch.zeros(3, 8)},
            r"advantage: wanted \[B\] for objective='nft', got None",
        ),
        ({"objective": "crd"}, "old_velocity: wanted the sampling policy's"),
        ({**CRD, "advantage": None}, r"advantage: wanted \[B\] for objective='crd', got None"),
        ({**CRD, "group_ids": None}, r"group_ids: wanted integers \[B\] for objective='crd', got None"),
        ({**CRD, "group_ids": [0, 1]}, r"group_ids: wanted int64 \[3\], one per row of clean, got \[2\]"),
        ({"kl_weight": torch.ones(3)}, "ref_velocity: wanted the reference's beside kl_weight=a tensor, got None"),
        (
            {"kl_weight": torch.ones(2), "ref_velocity": torch.zeros(3, 8)},
            r"kl_weight: wanted floats \[3\], one per row of clean",
        ),
        ({"objective": "dpo", "old_velocity": torch.zeros(3, 8)}, "clean: wanted pairs of rows .*, got 3 rows"),
        ({"kl_weight": 0.1}, "ref_velocity: wanted the reference's beside kl_weight=0.1, got None"),
        ({"beta": 0.0}, "beta: wanted a number above 0, got 0.0"),
        ({"beta": float("inf")}, "beta: wanted a number above 0, got inf"),
        ({"advantage_max": 0.0}, "advantage_max: wanted a number above 0, got 0.0"),
        ({"advantage_max": "a"}, "advantage_max: wanted a number above 0, got 'a'"),
        ({"clip": (-1.0, -5.0)}, "clip: wanted"),
        ({"sigma": torch.ones(2)}, r"sigma: wanted floats \[3\], one per row of clean"),
        ({"noise": None}, "noise, target: wanted one of the two, got neither"),
        ({"target": torch.zeros(3, 8)}, "noise, target: wanted one of the two, got both"),
        ({"noise": ff.Noise([1, 2])}, "noise.seeds: wanted one per row of clean, 3, got 2"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "velocity": torch.zeros(3, 8), "clean": torch.zeros(3, 8), "sigma": torch.ones(3), "noise": ff.Noise([1, 2, 3]),
        **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ff.matching_loss(**arguments)


def test_a_named_backend_without_the_kernel_says_so() -> None:
    with pytest.raises(ff.BackendError):
        ff.matching_rows(torch.zeros(1, 8), torch.zeros(1, 8), ff.Noise([1]), backend="cuda")


def test_float64_states_are_made_of_float64_noise() -> None:
    clean, noise = torch.randn(2, 9, dtype=torch.float64), ff.Noise([1, 2])
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    drawn, level = noise.sample((9,), torch.float64), sigma[:, None]
    assert torch.equal(ff.noised(clean, sigma, noise), (1.0 - level) * clean + level * drawn)
    rows = ff.matching_rows(drawn - clean, clean, noise)
    assert bool((rows.square == 0.0).all())
