"""On a GPU: nothing in the loop waits for it, and CUDA graphs give the bits of the same calls made one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow import backends
from fastflow.rollout.engine import Engine
from tests.rollout import networks
from tests.rollout.networks import SHAPE, RowWise, conditions, seeds_of
from tests.rollout.test_graphs import CASES, SIGMAS, assert_equal, mean
from tests.tolerance import assert_same_at_another_width

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "full": {"lockstep": "full"},
    "few widths": {"lockstep": "full", "widths": "auto"},
    "max rows": {"main_rows": 4, "max_rows": 20},
    "scales by row": CASES["scales by row"],
    "re-spaced": {"dense": ff.Completion(2)},
    "window": {"steps": (2, 4)},
    "shared noise": CASES["shared noise"],
    "on the host": {"store": "cpu", "keep": ("clean", "mean")},
    "states alone": {"dense": None, "reward": None},
}


@pytest.fixture(scope="module")
def model() -> ff.models.SD3:
    return ff.models.SD3(networks.transformer().cuda())


def on_gpu(tree: Any) -> Any:
    return {name: value.cuda() for name, value in tree.items()} if isinstance(tree, dict) else tree


def roll(model: Any, graphs: Any = False, **changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {
        "sigmas": SIGMAS, "dynamics": ff.FlowSDE(0.7), "seeds": seeds_of(2), "condition": conditions(),
        "negative": conditions(1, seed=1), "guidance": ff.CFG(3.0), "dense": ff.Completion(), "reward": mean, **changes,
    }  # fmt: skip
    if arguments["guidance"] is None:
        arguments["negative"] = None
    for name in ("condition", "negative", "initial"):
        value = arguments.get(name)
        arguments[name] = value.cuda() if isinstance(value, Tensor) else on_gpu(value)
    return ff.rollout(model, SHAPE, graphs=graphs, progress=False, device="cuda", **arguments)


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """torch raises where an operation makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Guard:
    """While it is on, every call of the loop, network and step and writes, raises where it waits. calls: made so."""

    def __init__(self) -> None:
        self.on, self.calls = False, 0


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    made, advance = Guard(), Engine._advance

    def without_waiting(self: Engine, *arguments: Any) -> None:
        with refusing_to_wait() if made.on else nullcontext():
            advance(self, *arguments)
        made.calls += made.on

    monkeypatch.setattr(Engine, "_advance", without_waiting)
    return made


def test_the_guard_sees_a_wait() -> None:
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), refusing_to_wait():
        value.item()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_nothing_in_the_loop_waits(model: ff.models.SD3, guard: Guard, changes: dict[str, Any]) -> None:
    roll(model, **changes)  # libraries load, kernels compile
    guard.on = True
    assert roll(model, **changes).stats.calls == guard.calls


@pytest.mark.parametrize("changes", [{}, {"lockstep": "full", "widths": "auto"}], ids=["exact", "few widths"])
def test_replayed_graphs_wait_for_nothing(model: ff.models.SD3, guard: Guard, changes: dict[str, Any]) -> None:
    graphs = ff.Graphs()
    roll(model, graphs, **changes)
    guard.on = True
    assert roll(model, graphs, **changes).stats.calls == guard.calls
    assert graphs.reason is None


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_graphs_give_the_same_bits(model: ff.models.SD3, changes: dict[str, Any]) -> None:
    graphs, network = ff.Graphs(), RowWise() if "sigmas" in changes else model  # SD3 knows no integer timesteps
    first, eager = roll(network, graphs, **changes), roll(network, **changes)
    assert graphs.reason is None
    assert_equal(first, eager)
    assert_equal(roll(network, graphs, **changes), eager)
    roll(network, graphs, **{**changes, "seeds": seeds_of(2) + 1})
    assert_equal(first, eager)  # which keeps its values when later rollouts use the graphs' memory


def test_graphs_are_captured_again_for_another_batch(model: ff.models.SD3) -> None:
    graphs = ff.Graphs()
    for copies in (2, 3, 2):
        changes = {"seeds": seeds_of(copies)}
        assert_equal(roll(model, graphs, **changes), roll(model, **changes))
        assert graphs.reason is None and graphs.captured


def test_graphs_are_captured_again_for_weights_elsewhere() -> None:
    graphs, module = ff.Graphs(), networks.transformer().cuda()
    first = roll(ff.models.SD3(module), graphs)
    module.cpu()
    torch.empty(1 << 26, device="cuda").fill_(float("nan"))
    assert_equal(roll(ff.models.SD3(module.cuda()), graphs), first)
    assert graphs.reason is None


def test_a_network_that_waits_leaves_the_stream_and_the_graphs_of_others(model: ff.models.SD3) -> None:
    def curious(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return RowWise()(sample, sigma, condition) * (1.0 if float(sigma[0]) > 0.5 else 0.9)

    before, graphs = torch.cuda.current_stream(), ff.Graphs()
    captured = roll(curious, graphs)
    assert torch.cuda.current_stream() == before
    assert graphs.reason is not None and "synchroniz" in graphs.reason
    assert_equal(captured, roll(curious))
    assert_equal(roll(model, graphs), roll(model))
    assert graphs.reason is None


def test_a_capture_that_fails_leaves_the_stream_and_the_reason(model: ff.models.SD3) -> None:
    def reading(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return RowWise()(sample, sigma, condition)

    before, graphs = torch.cuda.current_stream(), ff.Graphs()
    assert_equal(roll(reading, graphs), roll(reading))
    assert torch.cuda.current_stream() == before
    assert torch.rand(4, device="cuda").isfinite().all(), "the generator draws"
    assert graphs.reason is not None and "captur" in graphs.reason and "previous error" not in graphs.reason
    assert_equal(roll(model, graphs), roll(model))
    assert graphs.reason is None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_give_the_same_states(model: ff.models.SD3, name: str) -> None:
    reason = backends.unavailable(name)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    expected, actual = roll(model, backend="reference"), roll(model, backend=name)
    for part in ("samples", "log_probs", "clean", "rewards"):
        assert_same_at_another_width(getattr(actual, part), getattr(expected, part), part)
