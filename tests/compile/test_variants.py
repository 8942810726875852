"""What is compiled ahead is what rollouts, steps and replays ask for: compared launch by launch, without compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastflow.kernels import config

import fastflow as ff
from fastflow import backends
from fastflow.compile.variants import variants
from tests.compile.launches import Both, asked
from tests.rollout.networks import WIDTH, conditions, transformer

pytest.importorskip("triton", reason="needs triton")
SHAPE = (16, 16, 16)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Every launch that is compiled ahead."""
    with asked(monkeypatch) as found:
        for variant in variants():
            variant.launch(config.DEFAULT)
    return found


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "select", lambda *arguments: Both())


def test_there_are_about_a_hundred(known: set[tuple[str, str]]) -> None:
    labels = [variant.label for variant in variants()]
    assert len(set(labels)) == len(labels)
    assert 80 <= len(known) <= 110
    assert {name for name, _ in known} == {
        "step_kernel", "finish_kernel", "backward_kernel", "token_factor_kernel", "token_backward_kernel",
        "sample_square_kernel", "sample_factor_kernel", "dot_kernel", "pulls_kernel", "policy_kernel", "matching_kernel",
        "means_kernel", "matching_backward_kernel",
    }  # fmt: skip


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"dense": ff.Completion()},
        {"dense": ff.Completion(evaluations=2), "steps": [0, 2]},
        {"dynamics": ff.CPS(0.7), "steps": [1]},
        {"dense": ff.Completion(), "seeds": [1, 2, 3, 4, 5]},
        {"guidance": "clamp"},
    ],
    ids=["dense", "window", "cps", "odd group", "clamp"],
)
def test_rollouts(
    known: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    scale: float,
    arguments: dict[str, Any],
) -> None:
    network = transformer(1, sample_size=16, in_channels=16, out_channels=16, pos_embed_max_size=16)
    given = {"dynamics": ff.FlowSDE(0.7), "seeds": [1, 2, 3]} | arguments
    rescale = given.pop("guidance", "none")
    if rescale == "clamp" and (scale == 1.0 or dtype == F32):
        rescale = "none"
    form: dict[str, Any] = {}
    if scale != 1.0:
        negative = {name: value.to(dtype) for name, value in conditions(1, seed=1, width=WIDTH).items()}
        form = {"guidance": ff.CFG(scale, rescale=rescale), "negative": negative}
    with asked(monkeypatch) as found:
        ff.rollout(
            ff.models.SD3(network.to(dtype), dtype=dtype),
            SHAPE,
            ff.sigma_schedule(4, shift=3.0),
            given.pop("dynamics"),
            torch.tensor(given.pop("seeds")),
            condition={name: value.to(dtype) for name, value in conditions(1, width=WIDTH).items()},
            **form,
            progress=False,
            **given,
        )
    assert found and found <= known, sorted(name for name, _ in found - known)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "velocity"), [(F32, BF16), (F32, F32), (F32, torch.float16), (BF16, BF16)], ids=str)
def test_steps_and_replays(
    known: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    state: torch.dtype,
    velocity: torch.dtype,
    guided: bool,
) -> None:
    x = torch.randn(3, *SHAPE).to(state)
    v = torch.randn(3, *SHAPE).to(velocity)
    form = {"uncond": torch.randn(3, *SHAPE).to(velocity), "guidance": ff.CFG(4.0)} if guided else {}
    at = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4, shift=3.0)).at(1)
    with asked(monkeypatch) as found:
        out = ff.step(x, v, at, noise=ff.Noise([1, 2, 3], 1), **form)
        for uncond_grad in (False, True)[: 1 + guided]:
            leaf = v.clone().requires_grad_()
            ff.log_prob(x, leaf, out.next_sample, at, uncond_grad=uncond_grad, **form).sum().backward()
            score = (out.next_sample, at, out.log_prob, torch.ones(3))
            loss, _ = ff.policy_loss(x, leaf, *score, uncond_grad=uncond_grad, **form)
            loss.backward()
    assert found and found <= known, sorted(name for name, _ in found - known)


@pytest.mark.usefixtures("both")
def test_a_policy_loss_with_a_reference(known: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, given, v, u, ref_v, ref_u = (torch.randn(3, *SHAPE) for _ in range(6))
    leaf, at = v.to(BF16).requires_grad_(), ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4, shift=3.0)).at(1)
    with asked(monkeypatch) as found:
        loss, _ = ff.policy_loss(
            x, leaf, given, at, torch.zeros(3), torch.ones(3), uncond=u.to(BF16), guidance=ff.CFG(4.0),
            ref_velocity=ref_v.to(BF16), ref_uncond=ref_u.to(BF16), kl="gaussian", kl_weight=0.1,
        )  # fmt: skip
        loss.backward()
    assert {name for name, _ in found} == {"step_kernel", "finish_kernel", "backward_kernel", "policy_kernel"}
    assert found <= known, sorted(name for name, _ in found - known)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("networks", [(), ("old",), ("old", "ref")], ids=str)
def test_a_matching_loss(
    known: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, networks: tuple[str, ...]
) -> None:
    clean, v, other = (torch.randn(3, *SHAPE) for _ in range(3))
    form: dict[str, Any] = {f"{name}_velocity": other.to(BF16) for name in networks}
    form |= {"objective": "nft", "advantage": torch.ones(3)} if networks else {}
    leaf = v.to(BF16).requires_grad_()
    with asked(monkeypatch) as found:
        loss, _ = ff.matching_loss(leaf, clean, torch.full((3,), 0.5), ff.Noise([1, 2, 3], 1), beta=0.3, **form)
        loss.backward()
    assert {name for name, _ in found} == {"matching_kernel", "means_kernel", "matching_backward_kernel"}
    assert found <= known, sorted(name for name, _ in found - known)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("objective", ["ppo", "guard"])
def test_one_kernel_for_the_rows_of_every_policy_loss(
    known: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    x, given, v, old = (torch.randn(3, *SHAPE) for _ in range(4))
    at = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4, shift=3.0)).at(torch.tensor([1, 0, 2]))
    with asked(monkeypatch) as found:
        ff.policy_loss(
            x, v, given, at, torch.zeros(3), torch.ones(3), row_weight=torch.ones(3), objective=objective, kl="log_ratio",
            old_mean=old if objective != "ppo" else None, kl_weight=0.5, clip=(1.0, 2.0),
        )  # fmt: skip
    rows = {launch for launch in found if launch[0] == "policy_kernel"}
    assert len(rows) == 1 and rows <= known


def test_what_is_not_common_is_not_compiled_ahead(known: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "select", lambda *arguments: Both())
    x = torch.randn(2, 8, 8)  # a row shorter than a tile
    at = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4, shift=3.0)).at(1)
    with asked(monkeypatch) as found:
        ff.step(x, x, at, noise=ff.Noise([1, 2], 1))
    assert found and not found & known
