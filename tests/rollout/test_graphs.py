"""Captured calls against the same rollout without: every bit, from static buffers and numbers that lie on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout import networks
from tests.rollout.networks import SHAPE, RowWise, conditions, seeds_of
from tests.rollout.tape import Tape

LENGTH = 6
SIGMAS = ff.sigma_schedule(LENGTH, shift=3.0)
NEGATIVE = conditions(1, seed=1)


def mean(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


def roll(model: Any, graphs: Any, **changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {
        "sigmas": SIGMAS, "dynamics": ff.FlowSDE(0.7), "seeds": seeds_of(2), "condition": conditions(),
        "negative": NEGATIVE, "guidance": ff.CFG(3.0), "dense": ff.Completion(), "reward": mean, "progress": False,
        **changes,
    }  # fmt: skip
    if arguments["guidance"] is None:
        arguments["negative"] = None
    return ff.rollout(model, SHAPE, graphs=graphs, **arguments)


def assert_equal(captured: ff.Trajectory, eager: ff.Trajectory) -> None:
    a, b = captured.as_dict(), eager.as_dict()
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.equal(a[name], value), name


CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "full": {"lockstep": "full"},
    "few widths": {"lockstep": "full", "widths": "auto"},
    "main rows": {"main_rows": 4, "max_rows": 20},
    "no guidance": {"guidance": None},
    "two calls": {"guidance": ff.CFG(3.0, calls=2), "negative": conditions(3, 3, seed=2)},
    "interval": {"guidance": ff.CFG(3.0, interval=(0.3, 0.9))},
    "scales by step": {"guidance": ff.CFG([[1.0 + i] for i in range(LENGTH)])},
    "scales by row": {"guidance": ff.CFG([[1.0, 2.0, 3.0, 4.0, 5.0, 6.5]], rescale="token", axis=1)},
    "window": {"steps": (2, 4)},
    "re-spaced": {"dense": ff.Completion(2)},
    "one step": {"dense": ff.Completion(1)},
    "states alone": {"dense": None, "reward": None},
    "means": {"keep": ("clean", "mean"), "steps": (0, 3)},
    "square score": {"dynamics": ff.CPS(0.5)},
    "shared noise": {"initial": ff.Noise([7, 7, 8, 8, 9, 9], shared=True), "steps": (2, 3)},
    "shared noise, no prefix": {"initial": ff.Noise([7, 7, 8, 8, 9, 9], shared=True)},
    "float64": {"state_dtype": torch.float64},
    "integer timesteps": {
        "sigmas": ff.Sigmas([900.0, 600.0, 300.0, 0.0]), "dynamics": ff.DDIM(torch.linspace(0.999, 0.01, 1000).tolist()),
        "initial": torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1)),
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_captured_calls_give_the_same_bits(sd3: ff.models.SD3, changes: dict[str, Any]) -> None:
    graphs = ff.Graphs(Tape())
    model = RowWise() if "sigmas" in changes else sd3  # SD3 knows no integer timesteps
    captured, eager = roll(model, graphs, **changes), roll(model, False, **changes)
    assert graphs.reason is None
    assert_equal(captured, eager)
    assert captured.stats.graphs == f"widths {', '.join(map(str, graphs.captured))}" and eager.stats.graphs == "off"
    assert (captured.stats.calls, captured.stats.evaluations) == (eager.stats.calls, eager.stats.evaluations)


def test_each_width_is_captured_once_and_replayed_in_later_rollouts(sd3: ff.models.SD3) -> None:
    tape = Tape()
    graphs = ff.Graphs(tape)
    plan = ff.plan(
        sd3, SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(2), condition=conditions(), negative=NEGATIVE, guidance=ff.CFG(3.0),
        dense=ff.Completion(), widths="auto",
    )  # fmt: skip
    first = roll(sd3, graphs, widths="auto")
    kept = {name: value.clone() for name, value in first.as_dict().items()}
    assert graphs.captured == plan.widths and tape.captures == len(plan.widths) <= 4

    changes: dict[str, Any] = {
        "seeds": torch.arange(6) + 100, "condition": conditions(seed=5), "prompt_index": [2, 0, 1, 1, 0, 2],
        "sigmas": ff.sigma_schedule(LENGTH, shift=1.7), "widths": "auto", "guidance": ff.CFG(5.0), "dynamics": ff.DanceSDE(0.3),
    }  # fmt: skip
    assert_equal(roll(sd3, graphs, **changes), roll(sd3, False, **changes))
    assert tape.captures == len(plan.widths), "other seeds, prompts, sigmas, scales and dynamics are data"
    for name, value in first.as_dict().items():
        assert torch.equal(value, kept[name]), f"{name} of the first rollout was overwritten"

    roll(sd3, graphs, widths="auto", seeds=seeds_of(1))
    assert tape.captures > len(plan.widths), "another batch is captured anew"


def test_another_backend_or_autocast_is_captured_anew_and_another_adapter_of_the_module_is_not(
    sd3: ff.models.SD3,
) -> None:
    tape = Tape()
    graphs = ff.Graphs(tape)
    roll(sd3, graphs, backend="cpu")
    captures = tape.captures
    roll(ff.models.SD3(sd3.module), graphs, backend="cpu")
    assert tape.captures == captures, "an adapter made anew around the same module"
    assert_equal(roll(sd3, graphs, backend="reference"), roll(sd3, False, backend="reference"))
    assert tape.captures == 2 * captures
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured, eager = roll(sd3, graphs, backend="reference"), roll(sd3, False, backend="reference")
    assert_equal(captured, eager)
    assert tape.captures == 3 * captures
    roll(ff.models.SD3(sd3.module, timestep_cast="integer"), graphs, backend="reference")
    assert tape.captures == 4 * captures


def test_one_rollout_at_a_time(sd3: ff.models.SD3) -> None:
    graphs = ff.Graphs(Tape())

    def nested(images: Tensor, info: ff.Info) -> Tensor:
        roll(sd3, graphs)
        return mean(images, info)

    with pytest.raises(
        ff.RolloutError, match="graphs: this ff.Graphs serves another rollout at the moment; give each thread"
    ):
        roll(sd3, graphs, reward=nested)
    assert_equal(roll(sd3, graphs), roll(sd3, False))


def test_weights_may_change_in_place_between_rollouts() -> None:
    module = networks.transformer()
    model, tape = ff.models.SD3(module), Tape()
    graphs = ff.Graphs(tape)
    roll(model, graphs)
    captures = tape.captures
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
    assert_equal(roll(model, graphs), roll(model, False))
    assert tape.captures == captures


def test_experts_have_graphs_of_their_own(sd3: ff.models.SD3) -> None:
    low = ff.models.SD3(networks.transformer(2))
    route = ff.Route([(1.0, 0.8, sd3, ff.CFG(4.0)), (0.8, 0.0, low, None)])
    arguments: dict[str, Any] = {
        "condition": conditions(),
        "negative": NEGATIVE,
        "dense": ff.Completion(3),
        "progress": False,
    }
    common = (route, SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(2))
    graphs = ff.Graphs(Tape())
    assert_equal(ff.rollout(*common, graphs=graphs, **arguments), ff.rollout(*common, **arguments))
    assert graphs.reason is None


class Counting:
    """A network that puts a Python number of its own into each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        self.calls += 1
        return RowWise()(sample, sigma, condition) + 0.01 * self.calls


def test_a_number_of_the_host_is_caught() -> None:
    """The comparison above sees a value that a capture froze: were a step's index a Python number, it would fail like this."""
    captured, eager = roll(Counting(), ff.Graphs(Tape())), roll(Counting(), False)
    assert not torch.equal(captured.samples, eager.samples)


def test_a_step_index_that_is_a_number_fails(sd3: ff.models.SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflow.rollout import bucket

    real = bucket.Noise
    monkeypatch.setattr(bucket, "Noise", lambda seeds, step, shared: real(seeds, 0, shared=shared))
    captured = roll(sd3, ff.Graphs(Tape()))
    assert not torch.equal(captured.samples, roll(sd3, False).samples)


def test_a_read_from_the_device_ends_the_capture_with_a_reason() -> None:
    def curious(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return RowWise()(sample, sigma, condition) * (1.0 if float(sigma[0]) > 0.5 else 0.9)

    graphs = ff.Graphs(Tape())
    captured = roll(curious, graphs)
    assert_equal(captured, roll(curious, False))
    assert graphs.reason is not None and "reads from the device" in captured.stats.graphs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grad": True}, "grad=True: a graph holds no autograd"),
        ({"dense": ff.Completion(3, solver="dpmpp", order=2)}, "multistep solvers keep history"),
        (
            {"condition": {**conditions(), "texts": [[1], [2, 3], [4]]}, "guidance": None},
            "condition['texts']: lists are gathered on the host",
        ),
    ],
)
def test_what_is_not_captured_says_why(changes: dict[str, Any], reason: str) -> None:
    captured = roll(RowWise(), ff.Graphs(Tape()), **changes)
    assert reason in captured.stats.graphs
    assert_equal(captured, roll(RowWise(), False, **changes))


def test_without_a_gpu_true_falls_back(sd3: ff.models.SD3) -> None:
    captured = roll(sd3, True)
    assert captured.stats.graphs == "CUDA graphs need a CUDA device, and this rollout is on cpu"
    assert_equal(captured, roll(sd3, False))


def test_a_network_that_cannot_be_captured_runs_as_it_is(sd3: ff.models.SD3) -> None:
    tape = Tape(fails="operation not permitted when stream is capturing\nmore lines")
    captured = roll(sd3, ff.Graphs(tape))
    assert captured.stats.graphs == "width 12 could not be captured: operation not permitted when stream is capturing"
    assert_equal(captured, roll(sd3, False))


def test_what_could_not_be_captured_is_not_tried_again(sd3: ff.models.SD3) -> None:
    tape = Tape(fails="no")
    graphs = ff.Graphs(tape)
    for _ in range(2):
        assert roll(sd3, graphs).stats.graphs == "width 12 could not be captured: no"
    assert tape.attempts == 1
    tape.fails = None
    roll(sd3, graphs, seeds=seeds_of(3))
    assert graphs.reason is None and tape.captures > 0, "another batch is tried"


@pytest.mark.parametrize("kind", ["adapter", "function"])
def test_weights_that_lie_elsewhere_are_captured_again(kind: str) -> None:
    module, tape = networks.transformer(), Tape()
    graphs, adapter = ff.Graphs(tape), ff.models.SD3(module)
    network = adapter if kind == "adapter" else lambda *arguments: adapter(*arguments)
    roll(network, graphs)
    once = tape.captures
    with torch.no_grad():
        next(iter(module.parameters())).mul_(1.01)
    roll(network, graphs)
    assert tape.captures == once, "an optimizer's step changes no address"
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    assert_equal(roll(network, graphs), roll(network, False))
    assert tape.captures == 2 * once


def test_a_failing_rollout_keeps_what_was_computed(sd3: ff.models.SD3) -> None:
    def reward(images: Tensor, info: ff.Info) -> Tensor:
        raise ZeroDivisionError("no reward")

    with pytest.raises(ff.RolloutError) as caught:
        roll(sd3, ff.Graphs(Tape()), reward=reward)
    eager = roll(sd3, False)
    assert torch.equal(caught.value.partial.clean, eager.clean)  # type: ignore[arg-type]
    assert torch.equal(caught.value.partial.samples, eager.samples)


def test_a_velocity_that_is_not_finite_is_found() -> None:
    def broken(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        velocity = RowWise()(sample, sigma, condition)
        late = (sigma < 0.7)[:, None, None, None]
        return torch.where(late, torch.full_like(velocity, float("nan")), velocity)

    with pytest.raises(ff.RolloutError) as eager:
        roll(broken, False)
    with pytest.raises(ff.RolloutError) as captured:
        roll(broken, ff.Graphs(Tape()))
    assert str(captured.value) == str(eager.value)


def test_messages() -> None:
    with pytest.raises(TypeError, match=r"graphs: wanted True, False or ff.Graphs\(\), got str"):
        roll(RowWise(), "yes")
