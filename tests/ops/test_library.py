"""The registered operators under opcheck, gradcheck and torch.compile(fullgraph=True)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastflow as ff
from fastflow.ops import library
from tests.ops.cases import ALL, GUIDANCE, SD3, inputs

TRANSITIONS = ff.FlowSDE(0.7).transitions(SD3)


def step_arguments(backend: str, **changes: Any) -> list[Any]:
    data = inputs((2, 4, 6), velocity=torch.bfloat16)
    named = {
        "sample": data["sample"], "velocity": data["velocity"], "uncond": data["uncond"],
        "coef": TRANSITIONS.at(3).rows("cpu"), "scale": torch.tensor([3.0]), "noise": None,
        "seeds": torch.tensor([1, 2]), "step": torch.tensor([3]), "given": None, "mask": data["mask"], "token": [4, 6, 1],
        "stream": 0, "offset": 0, "score": 0, "reduce": 0, "score_rounded": True, "next_dtype": torch.float32,
        "rescale": "none", "product_dtype": "float32", "backend": backend,
    }  # fmt: skip
    return list({**named, **changes}.values())


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_opcheck_step(backend: str, rescale: str) -> None:
    opcheck(torch.ops.fastflow.step, (*step_arguments(backend, rescale=rescale), [True] * 6))


def test_opcheck_step_with_gradients(backend: str) -> None:
    data = inputs((2, 4, 6))
    v, x = data["velocity"].requires_grad_(), data["sample"].requires_grad_()
    arguments = step_arguments(backend, sample=x, velocity=v, uncond=None, scale=None)
    opcheck(torch.ops.fastflow.step, (*arguments, [True, True, True, True, True, False]))


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 1])], ids=["own rows", "gathered"])
def test_opcheck_step_out(backend: str, rows: torch.Tensor | None) -> None:
    x = torch.zeros(2, 4, 6)
    slots = [torch.empty_like(x), torch.empty(2), None, torch.empty_like(x), None, torch.zeros(2, dtype=torch.int32)]
    opcheck(torch.ops.fastflow.step_out, (*step_arguments(backend), rows, *slots))


@pytest.mark.parametrize("uncond_grad", [False, True])
def test_opcheck_log_prob(backend: str, uncond_grad: bool) -> None:
    data = inputs((2, 4, 6))
    v, u = data["velocity"].requires_grad_(), data["uncond"].requires_grad_(uncond_grad)
    arguments = (
        data["sample"], v, data["noise"], TRANSITIONS.at(3).rows("cpu"), u, torch.tensor([3.0]), data["mask"], [1, 1, 1],
        0, 0, uncond_grad, "none", backend,
    )  # fmt: skip
    opcheck(torch.ops.fastflow.log_prob, arguments)
    opcheck(torch.ops.fastflow.log_prob_backward, (torch.randn(2), *(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)))  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("guidance", [None, *GUIDANCE])
@pytest.mark.parametrize("reduce", ["mean", "sum", "none"])
def test_gradcheck_log_prob(guidance: str | None, reduce: str) -> None:
    data = {k: v.double() if v.is_floating_point() else v for k, v in inputs((2, 3, 4)).items()}
    at, cfg = TRANSITIONS.at(torch.tensor([2, 6])), GUIDANCE[guidance] if guidance else None
    x, v, u = (data[n].requires_grad_() for n in ("sample", "velocity", "uncond"))

    def score(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return ff.log_prob(
            x, v, data["noise"], at, uncond=u if cfg else None, guidance=cfg, uncond_grad=True, reduce=reduce,
            mask=data["mask"],
        )  # fmt: skip

    assert torch.autograd.gradcheck(score, (x, v, u) if cfg else (x, v, u.detach()))


@pytest.mark.parametrize("guidance", [None, *GUIDANCE])
def test_gradcheck_step(guidance: str | None) -> None:
    """The reparametrised draw, the clean prediction, the ODE move and the mean, in sample, velocity and uncond."""
    data = {k: v.double() if v.is_floating_point() else v for k, v in inputs((2, 3, 4)).items()}
    at, cfg = TRANSITIONS.at(torch.tensor([2, 6])), GUIDANCE[guidance] if guidance else None
    x, v, u = (data[n].requires_grad_() for n in ("sample", "velocity", "uncond"))

    def outputs(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ff.step(
            x, v, at, noise=ff.Noise([1, 2], step=3), uncond=u if cfg else None, guidance=cfg,
            want=("next_sample", "clean", "ode_next", "mean"),
        )  # fmt: skip
        return out.next_sample, out.clean, out.ode_next, out.mean

    assert torch.autograd.gradcheck(outputs, (x, v, u) if cfg else (x, v, u.detach()))


def test_the_score_of_a_draw_takes_the_draw_as_a_constant(backend: str) -> None:
    data = inputs((2, 30))
    x, v = data["sample"].requires_grad_(), data["velocity"].requires_grad_()
    drawn = ff.step(x, v, TRANSITIONS.at(3), noise=data["noise"], want=("log_prob",), backend=backend)
    first = torch.autograd.grad(drawn.log_prob.sum(), (x, v))
    stored = ff.step(x.detach(), v.detach(), TRANSITIONS.at(3), noise=data["noise"], backend=backend).next_sample
    replay = ff.log_prob(x, v, stored, TRANSITIONS.at(3), backend=backend)
    second = torch.autograd.grad(replay.sum(), (x, v))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_whole_graph(backend: str) -> None:
    data = inputs((2, 4, 6))
    at = TRANSITIONS.at(3)
    seeds = torch.tensor([1, 2])

    def both(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ff.step(
            x, v, at, noise=ff.Noise(seeds, 3, shared=True), uncond=u, guidance=ff.CFG(3.0), want=ALL, backend=backend
        )
        lp = ff.log_prob(x, v * 1.0, out.next_sample.detach(), at, uncond=u, guidance=ff.CFG(3.0), backend=backend)
        return out.next_sample, out.log_prob, out.clean, out.ode_next, out.mean, lp

    arguments = (data["sample"], data["velocity"].requires_grad_(), data["uncond"])
    expected = both(*arguments)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(compiled, expected, strict=True):
        assert torch.equal(a, b)
    (g,) = torch.autograd.grad(expected[-1].sum(), arguments[1])
    (h,) = torch.autograd.grad(compiled[-1].sum(), arguments[1])
    assert torch.equal(g, h)


def test_compiled_writes_into_slots(backend: str) -> None:
    data = inputs((2, 4, 6))
    at = TRANSITIONS.at(3)

    def write(x: torch.Tensor, v: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ff.step(x, v, at, noise=data["noise"], out={"next_sample": slot}, backend=backend)
        return slot + 1.0

    slot, other = torch.zeros(2, 4, 6), torch.zeros(2, 4, 6)
    with torch.no_grad():
        expected = write(data["sample"], data["velocity"], slot)
        compiled = torch.compile(write, fullgraph=True, backend="aot_eager")(data["sample"], data["velocity"], other)
    assert torch.equal(compiled, expected) and torch.equal(slot, other)


class Seen(TorchDispatchMode):
    """Names of the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whoever_looks_on_sees_the_operator_and_nobody_pays_for_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, velocity = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    at, noise = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4)).at(1), torch.randn(2, 3, 5)

    def call(velocity: Any = velocity) -> Tensor:
        return ff.step(sample, velocity, at, noise=noise).next_sample  # type: ignore[return-value]

    expected = call()
    with Seen() as seen:
        assert torch.equal(call(), expected)
    assert "fastflow.step_out.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert "fastflow::step_out" in {event.name for event in profile.events()}

    class Named(Tensor):
        pass

    calls: list[Any] = []
    monkeypatch.setattr(library, "_step_out", lambda *arguments: calls.append(arguments))
    call()
    assert len(calls) == 1, "nobody looks on"
    call(velocity.as_subclass(Named))
    torch.func.vmap(lambda t: (call(), t)[1])(velocity)
    traced = torch.jit.trace(call, (velocity,), check_trace=False)
    assert len(calls) == 1, "a tensor of another class, a transform, a tracer"
    assert "fastflow::step_out" in str(traced.graph)


def test_values_that_memory_holds_with_the_other_sign(backend: str) -> None:
    sample, noise, turned = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch._neg_view(torch.randn(2, 3, 5))
    found, expected = (
        ff.step(sample, v, TRANSITIONS.at(1), noise=noise, backend=backend).next_sample
        for v in (turned, turned.resolve_neg())
    )
    assert turned.is_neg() and torch.equal(found, expected)
