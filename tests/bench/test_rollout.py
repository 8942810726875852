"""The sequential loop that the rollout is timed against gives the rollout's results, at 65 evaluations a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import rollout
from bench.cli import main
from bench.registry import Mismatch
from fastflow.demo import digits_model

SHAPE = (3, 1, 8, 8)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits network with random weights: nothing here depends on what it has learnt."""
    pytest.importorskip("diffusers")
    torch.set_num_threads(1)  # which is quicker for a network as small as this
    module = digits_model.build_module().requires_grad_(False).eval()
    width = digits_model.WIDTH
    embeddings = digits_model.Embeddings(torch.randn(11, digits_model.TOKENS, width), torch.randn(11, width))
    monkeypatch.setattr(digits_model, "load_model", lambda: (module, embeddings))


@pytest.fixture
def data() -> dict[str, Any]:
    return rollout.inputs(SHAPE)


def test_lockstep_gives_what_the_loop_gives(data: dict[str, Any], backend: str) -> None:
    with torch.no_grad():
        rollout.check(data, backend, (rollout.EXACT, rollout.FULL))


def test_the_check_sees_another_result(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = rollout.lockstep("full")({**data, "seeds": data["seeds"] + 1}, "reference")
    monkeypatch.setattr(rollout, "lockstep", lambda kind: lambda *_: wrong)
    with torch.no_grad(), pytest.raises(Mismatch, match="samples of lockstep full"):
        rollout.check(data, "reference", (rollout.FULL,))


def test_evaluations_are_counted(data: dict[str, Any]) -> None:
    with torch.no_grad():
        loop = rollout.sequential(data, "reference")()
        exact = rollout.lockstep("exact")(data, "reference")().stats
        full = rollout.lockstep("full")(data, "reference")().stats
    assert loop.evaluations == 10 + 55
    assert (exact.calls, full.calls) == (10 + 9, 10)
    assert exact.evaluations == full.evaluations == 55 * SHAPE[0]


def test_the_command_says_where_the_time_goes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["rollout", "--rows", "2", "--repeats", "1", "--backend", "reference", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("x sequential", "network calls", "evaluations a sample", "65", "55", "19"))
