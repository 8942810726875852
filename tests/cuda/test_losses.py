"""`ff.policy_loss` and `ff.matching_loss` on backend cuda: the reference's losses and gradients, by kernels alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.backends import cuda, matching, policy_rows
from tests.cuda.conftest import GPU
from tests.tolerance import LOSS, assert_gradient
from tests.training import test_matching, test_policy

MATCHING = {name: test_matching.CASES[name] for name in ("weighted", "awm, clipped", "nft", "dpo")}
POLICY = {
    "ppo": {"clip": (1e-4, 1e-4)},
    "guard": {"clip": (0.5, 0.5), "kl": "gaussian", "kl_weight": 0.2, "objective": "guard"},
    "dppo": {"objective": "dppo", "kl": "velocity", "kl_weight": 0.04},
}


@pytest.fixture(params=["emulated", *GPU])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which backend="cuda" runs: the emulator's, or a GPU. What plain torch would do instead fails."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        monkeypatch.setattr(cuda, "unavailable", lambda: None)
        monkeypatch.setattr(cuda, "refuse", cuda.refuse_values)
    return "cuda" if request.param == "gpu" else "cpu"


@pytest.fixture
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("plain torch")

    for module, name in ((policy_rows, "policy_rows"), (matching, "matching"), (matching, "matching_backward")):
        monkeypatch.setattr(module, name, fails)


def moved(values: dict[str, Any], place: str) -> dict[str, Any]:
    return {name: v.to(place) if isinstance(v, Tensor) else v for name, v in values.items()}


def policy(place: str, backend: str, options: dict[str, Any], masked: bool) -> dict[str, Any]:
    mask = torch.rand(4, 3, 1500, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    d = moved(test_policy.data((4, 3, 1500), torch.bfloat16) | {"mask": mask}, place)
    return test_policy.ours(d, ff.CFG(3.0), d["mask"], backend, **options)


def matched(place: str, backend: str, objective: str, options: dict[str, Any], masked: bool) -> tuple[Tensor, Tensor]:
    mask = torch.rand(4, 3, 1500, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    d = moved(test_matching.data((4, 3, 1500), torch.bfloat16) | {"mask": mask}, place)
    return test_matching.ours(d, objective, d["mask"], backend, **moved(options, place))[:2]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY)
def test_policy_loss(place: str, options: dict[str, Any], masked: bool, request: pytest.FixtureRequest) -> None:
    wanted = policy("cpu", "reference", options, masked)
    request.getfixturevalue("_only_kernels")
    found = policy(place, "cuda", options, masked)
    assert abs(float(found["loss"]) - float(wanted["loss"])) <= LOSS * max(1.0, abs(float(wanted["loss"])))
    assert_gradient(found["velocity"].cpu(), wanted["velocity"].double())
    assert torch.equal(found["info"]["log_prob"].cpu(), wanted["info"]["log_prob"])
    if place == "cpu":
        assert torch.equal(found["loss"], wanted["loss"]) and torch.equal(found["velocity"], wanted["velocity"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("objective", "options"), MATCHING.values(), ids=MATCHING)
def test_matching_loss(
    place: str, objective: str, options: dict[str, Any], masked: bool, request: pytest.FixtureRequest
) -> None:
    wanted = matched("cpu", "reference", objective, options, masked)
    request.getfixturevalue("_only_kernels")
    found = matched(place, "cuda", objective, options, masked)
    assert abs(float(found[0]) - float(wanted[0])) <= LOSS * max(1.0, abs(float(wanted[0])))
    assert_gradient(found[1].cpu(), wanted[1].double())
    if place == "cpu":
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
