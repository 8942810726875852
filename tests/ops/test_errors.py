"""Bad input is refused before anything is launched or overwritten, in words that name the argument, the wish and the find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastflow as ff
from tests.ops.cases import SD3, inputs

TR = ff.FlowSDE(0.7).transitions(SD3)
D = inputs((2, 3, 4))
X, V, Z = D["sample"], D["velocity"], D["noise"]
STACKED = ff.Transitions.stack([TR, ff.CPS(0.7).transitions(SD3)], score="gaussian")


def step(**changes: Any) -> Any:
    named = {"sample": X, "velocity": V, "at": TR.at(3), "noise": Z, **changes}
    return ff.step(named.pop("sample"), named.pop("velocity"), named.pop("at"), **named)


def log_prob(**changes: Any) -> Any:
    named = {"sample": X, "velocity": V, "next_sample": Z, "at": TR.at(3), **changes}
    positional = [named.pop(n) for n in ("sample", "velocity", "next_sample", "at")]
    return ff.log_prob(*positional, **named)


SHARED = [
    ({"sample": [1.0]}, TypeError, "sample: wanted a tensor, got list"),
    ({"sample": X.int()}, TypeError, "sample: wanted float32, bfloat16, float16 or float64, got torch.int32"),
    ({"sample": X[0, 0]}, ValueError, r"sample: wanted \[B, \*\] .* got shape \(4,\)"),
    ({"velocity": V[:1]}, ValueError, r"velocity: wanted the shape of sample \(2, 3, 4\), got \(1, 3, 4\)"),
    ({"velocity": V.to("meta")}, ValueError, "velocity: wanted the device of sample, cpu, got meta"),
    ({"velocity": V.long()}, TypeError, "velocity: wanted float32.*got torch.int64"),
    ({"at": 3}, TypeError, r"at: wanted coefficients from `transitions.at\(i\)`, got int"),
    (
        {"at": TR.at(torch.tensor([1, 2, 3]))},
        ValueError,
        r"at: wanted one step, or one per row of sample \[2\], got 3 rows",
    ),
    ({"uncond": V}, ValueError, r"guidance: wanted ff.CFG\(scale\) beside uncond, got None"),
    ({"guidance": ff.CFG(2.0)}, ValueError, "uncond: wanted the unconditional velocity beside guidance, got None"),
    ({"uncond": V, "guidance": 2.0}, TypeError, r"guidance: wanted ff.CFG\(scale, ...\), got float"),
    (
        {"uncond": V.bfloat16(), "guidance": ff.CFG(2.0)},
        TypeError,
        "uncond: wanted the dtype of velocity, torch.float32",
    ),
    ({"uncond": V, "guidance": ff.CFG([1.0, 2.0, 3.0])}, ValueError, r"guidance.scale: .* one per row \[2\], got 3"),
    ({"uncond": V, "guidance": ff.CFG(2.0, rescale="token", axis=5)}, ValueError, "axis: wanted an axis of sample"),
    ({"score": "normal"}, ValueError, "score: wanted one of gaussian, gaussian_no_const, square, got 'normal'"),
    ({"reduce": "max"}, ValueError, "reduce: wanted one of mean, sum, none, got 'max'"),
    ({"mask": torch.ones(2, 3, 4)}, TypeError, "mask: wanted dtype bool .* got torch.float32"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask: wanted the shape of sample .* got \(2, 3\)"),
    ({"backend": "tpu"}, ValueError, "backend: wanted \"auto\" or one of reference, cpu, triton, cuda, got 'tpu'"),
    ({"backend": "cuda"}, ff.BackendError, 'backend="cuda" cannot run here: .*fastflow doctor'),
]


@pytest.mark.parametrize("call", [step, log_prob])
@pytest.mark.parametrize(("changes", "error", "words"), SHARED)
def test_bad_arguments_are_named(call: Any, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(**changes)


SLOT = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"noise": None}, ValueError, r"noise: wanted ff.Noise\(seeds, step\) or a tensor .* got None"),
        ({"noise": Z[:, :2]}, ValueError, r"noise: wanted the shape of sample \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"noise": ff.Noise([1])}, ValueError, "noise.seeds: wanted one per row of sample, 2, got 1"),
        ({"next_sample": Z}, ValueError, "noise: wanted None beside next_sample"),
        ({"want": ("prev_sample",)}, ValueError, "want: wanted names among next_sample, .* got 'prev_sample'"),
        ({"product_dtype": "half"}, ValueError, "product_dtype: wanted"),
        ({"out": {"latents": SLOT}}, ValueError, "want: wanted names among .* got 'latents'"),
        ({"out": {"clean": SLOT[:1]}}, ValueError, r"out\['clean'\]: wanted shape \(2, 3, 4\), got \(1, 3, 4\)"),
        ({"out": {"clean": SLOT.int()}}, TypeError, r"out\['clean'\]: wanted a floating dtype, got torch.int32"),
        ({"out": {"log_prob": torch.zeros(2).half()}}, TypeError, r"out\['log_prob'\]: wanted torch.float32"),
        ({"out": {"log_prob": torch.zeros(2, 2)[:, 0]}}, ValueError, r"out\['log_prob'\]: wanted contiguous"),
        ({"out": {"mean": torch.zeros(2, 4, 3).transpose(1, 2)}}, ValueError, "contiguous rows"),
        ({"out": {"clean": SLOT}, "velocity": V.clone().requires_grad_()}, ValueError, "out: wanted no gradient"),
        ({"uncond": V, "guidance": ff.CFG(2.0, "token", dtype="velocity")}, ValueError, 'rescale="none" beside dtype'),
    ],
)
def test_bad_steps_are_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    before = SLOT.clone()
    with pytest.raises(error, match=words):
        step(**changes)
    assert torch.equal(SLOT, before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ff.CFG(2.0, rescale="norm"), "rescale: wanted one of none, token, clamp, got 'norm'"),
        (lambda: ff.CFG(2.0, calls=3), "calls: wanted 1 or 2, got 3"),
        (lambda: ff.CFG(2.0, interval=(0.8, 0.2)), "interval: wanted 0 <= low < high <= 1"),
        (lambda: ff.CFG(float("nan")), "scale: wanted finite numbers"),
        (lambda: ff.CFG(2.0, dtype="bf16"), 'dtype: wanted "float32" or "velocity"'),
    ],
)
def test_bad_guidance_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_mixed_scores_need_a_choice() -> None:
    with pytest.raises(ValueError, match="score: the dynamics have different ones"):
        ff.Transitions.stack([TR, ff.CPS(0.7).transitions(SD3)])
    assert step(at=STACKED.at(3, table=torch.tensor([0, 1]))).log_prob.shape == (2,)


def test_an_index_outside_the_schedule_is_named() -> None:
    with pytest.raises(IndexError, match=r"index: wanted 0 to 9, got 10"):
        TR.at(10)
    with pytest.raises(IndexError, match=r"index: rows \[1\] hold \[12\], outside \[0, 10\)"):
        TR.at(torch.tensor([0, 12]))


def test_a_named_backend_runs_or_raises() -> None:
    doubles = {"sample": X.double(), "velocity": V.double(), "noise": Z.double()}
    with pytest.raises(ff.BackendError, match='backend="cpu"'):
        step(backend="cpu", **doubles)
    assert step(backend="auto", **doubles).log_prob.dtype == torch.float64
