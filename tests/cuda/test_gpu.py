"""Backend cuda on an NVIDIA GPU: streams, graphs, allocations, sizes, and the public functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastflow as ff
from bench import gpu_timing
from fastflow import backends
from fastflow.backends import cuda, reference
from fastflow.backends.base import StepCall
from fastflow.dynamics.columns import STD
from tests.backends.calls import OUTPUTS, assert_same, call, guided, rows, run
from tests.cuda.backends import OnGpu
from tests.cuda.test_losses import moved as moved_to
from tests.training import test_matching, test_policy

REASON = cuda.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"backend cuda: {REASON}")]
AT = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(10, shift=3.0)).at(4)
GIB = 2**30


def moved(base: StepCall) -> tuple[StepCall, dict[str, torch.Tensor]]:
    """The call on the GPU, and fresh slots for its outputs there."""
    there, like = OnGpu().call(base), {"device": "cuda"}
    shape = (base.batch, base.numel)
    slots = {name: torch.full(shape, torch.nan, **like) for name in ("next_sample", "clean", "ode_next", "mean")}
    slots["log_prob"] = torch.full(shape[:1], torch.nan, **like)
    slots["flags"] = torch.full(shape[:1], 9, dtype=torch.int32, **like)
    return replace(there, **slots), slots


def here(slots: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: slots[name].cpu() for name in OUTPUTS}


FORMS = {
    "short rows": lambda: call(9, 112),
    "whole rows": lambda: guided(3, 8192),
    "long rows": lambda: guided(3, 70_000, mask=torch.rand(3, 70_000) < 0.5),
    "clamp": lambda: guided(3, 70_000, rescale="clamp"),
    "token": lambda: guided(3, 6400, rescale="token", token=(100, 64, 1)),
}
EACH = pytest.mark.parametrize("form", FORMS)


@EACH
def test_a_graph_replays_on_new_values(form: str) -> None:
    """Seeds, step, coefficients and inputs are read when the graph runs, not when it is captured."""
    base, other = FORMS[form](), FORMS[form]()
    other.seeds, other.step = other.seeds + 1000, torch.tensor([8])  # type: ignore[operator]
    there, slots = moved(base)
    cuda.step(there)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.step(there)
    for values in (base, other):
        for name in ("sample", "velocity", "uncond", "scale", "coef", "seeds", "step", "mask"):
            if getattr(values, name) is not None:
                getattr(there, name).copy_(getattr(values, name))
        for slot in slots.values():
            slot.fill_(7)
        graph.replay()
        assert_same(here(slots), run(reference, values))


@EACH
def test_nothing_waits_for_the_gpu(form: str) -> None:
    base = FORMS[form]()
    there, slots = moved(base)
    cuda.step(there)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.step(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(here(slots), run(reference, base))


@EACH
def test_the_current_stream(form: str) -> None:
    """Inputs that a stream writes late are read late; scratch of one call is not given to the next too early."""
    base = FORMS[form]()
    there, slots = moved(base)
    cuda.step(there)
    expected = here(slots)
    late = {name: getattr(there, name).clone() for name in ("sample", "velocity")}
    for name in late:
        getattr(there, name).zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, values in late.items():
            getattr(there, name).copy_(values)
        for _ in range(20):
            cuda.step(there)
    torch.cuda.synchronize()
    assert_same(here(slots), expected)


@pytest.mark.parametrize(("numel", "allocations"), [(112, 0), (8192, 0), (8193, 1)])
def test_allocations(numel: int, allocations: int) -> None:
    there, _ = moved(guided(4, numel))

    def count() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    before = count()
    cuda.step(there)
    assert count() - before == allocations


@EACH
def test_same_call_same_bits(form: str) -> None:
    there, slots = moved(FORMS[form]())
    cuda.step(there)
    first = here(slots)
    for _ in range(50):
        cuda.step(there)
    assert_same(here(slots), first)


def test_noise_over_all_magnitudes() -> None:
    """2^24 radii are possible; the root of the kernels is the IEEE root on those that 2^25 draws meet."""
    batch, numel = 512, 2**16
    zero, coef = torch.zeros(1, numel).expand(batch, -1), torch.zeros(1, 16)
    coef[:, STD] = 1.0
    base = call(batch, numel, sample=zero, velocity=zero, coef=coef)
    expected, slot = torch.empty(batch, numel), torch.empty(batch, numel)
    other: Any = backends.load("cpu" if backends.unavailable("cpu") is None else "reference")
    other.step(replace(base, next_sample=expected))
    OnGpu.step(replace(base, next_sample=slot))
    assert torch.equal(slot, expected)


def on_cpu(base: StepCall) -> StepCall:
    """The call on the CPU, without slots."""
    names = ("sample", "velocity", "coef", "step", "seeds")
    return replace(
        base, **{name: getattr(base, name).cpu() for name in names}, next_sample=None, log_prob=None, flags=None
    )


def free() -> float:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB


ROOM = pytest.mark.skipif(REASON is None and free() < 20, reason="needs 20 GiB of free GPU memory")


@ROOM
@pytest.mark.parametrize("numel", [65536, 8192, 112])
def test_more_than_two_to_the_31_elements(numel: int) -> None:
    """The last rows are those of a call of their own."""
    batch, like = 2**31 // numel + 33, {"device": "cuda", "dtype": torch.bfloat16}
    sample, velocity = torch.empty(batch, numel, **like).normal_(), torch.empty(batch, numel, **like).normal_()
    base = call(1, numel)
    there = replace(
        base, batch=batch, sample=sample, velocity=velocity, coef=base.coef.cuda(), step=base.step.cuda(),  # type: ignore[union-attr]
        seeds=torch.arange(batch, device="cuda"), next_dtype=torch.bfloat16, next_sample=torch.zeros_like(sample),
        log_prob=torch.zeros(batch, device="cuda"), flags=torch.full((batch,), 9, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    cuda.step(there)
    for part in (slice(0, 5), slice(batch // 2, batch // 2 + 5), slice(batch - 5, batch)):
        names = ("sample", "velocity", "seeds")
        alone = replace(there, batch=5, **{name: getattr(there, name)[part].clone() for name in names})
        outputs = ("next_sample", "log_prob", "flags")
        expected = run(reference, on_cpu(alone))
        for name in outputs:
            assert torch.equal(getattr(there, name)[part].cpu(), expected[name]), name
    assert not there.flags.any()  # type: ignore[union-attr]


@ROOM
def test_one_row_of_more_than_two_to_the_31_elements() -> None:
    """Its end is that of a row that starts there, by the offset of its noise."""
    numel, last = 2**31 + 3 * 2048 + 8, 2**31 - 4096
    like = {"device": "cuda", "dtype": torch.bfloat16}
    sample, velocity = torch.empty(1, numel, **like).normal_(), torch.empty(1, numel, **like).normal_()
    base = OnGpu().call(call(1, numel, sample=torch.empty(1, 1), velocity=torch.empty(1, 1)))
    score = torch.full((1,), torch.nan, device="cuda")
    whole = replace(
        base, sample=sample, velocity=velocity, next_dtype=torch.bfloat16, next_sample=torch.zeros_like(sample)
    )
    cuda.step(replace(whole, log_prob=score))
    end = replace(
        whole, numel=numel - last, offset=last, sample=sample[:, last:].clone(), velocity=velocity[:, last:].clone()
    )
    slot = torch.zeros(1, numel - last, **like)
    cuda.step(replace(end, next_sample=slot))
    assert torch.equal(whole.next_sample[:, last:], slot)  # type: ignore[index]
    assert score.isfinite().all()


def inputs() -> tuple[torch.Tensor, ...]:
    return tuple(rows(2, 240).reshape(2, 4, 10, 6).cuda() for _ in range(3))


def test_auto_takes_it() -> None:
    x, v, _ = inputs()
    base = replace(call(2, 240), sample=x.reshape(2, -1), velocity=v.reshape(2, -1))
    assert backends.select("auto", torch.device("cuda"), base) is cuda


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_public_step_and_its_replay(rescale: str) -> None:
    x, v, u = inputs()
    cfg, seeds = ff.CFG(4.5, rescale=rescale, axis=1), torch.tensor([5, 6])
    out = ff.step(x, v, AT, noise=ff.Noise(seeds.cuda(), step=4), uncond=u, guidance=cfg, backend="cuda")
    expected = ff.step(
        x.cpu(), v.cpu(), AT, noise=ff.Noise(seeds, step=4), uncond=u.cpu(), guidance=cfg, backend="reference"
    )
    assert torch.equal(out.next_sample.cpu(), expected.next_sample)
    assert torch.equal(out.log_prob.cpu(), expected.log_prob)
    again = ff.log_prob(x, v, out.next_sample, AT, uncond=u, guidance=cfg, backend="cuda")
    assert torch.equal(again, out.log_prob)


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_gradient_of_public_log_prob(rescale: str) -> None:
    x, v, u = inputs()
    found = {}
    for name, device in (("cuda", "cuda"), ("reference", "cpu")):
        leaves = [t.detach().to(device).requires_grad_() for t in (v, u)]
        lp = ff.log_prob(
            x.to(device), leaves[0], x.to(device) * 0.9, AT, uncond=leaves[1], uncond_grad=True,
            guidance=ff.CFG(4.5, rescale=rescale, axis=1), backend=name,
        )  # fmt: skip
        lp.sum().backward()
        found[name] = [leaf.grad.cpu() for leaf in leaves]
    assert torch.equal(found["cuda"][0], found["reference"][0])
    assert torch.equal(found["cuda"][1], found["reference"][1])


def test_peak_memory_of_the_gradient() -> None:
    """Nothing as large as the rows is allocated beside the gradient itself."""
    x, v = (torch.randn(4, 2**20, device="cuda") for _ in range(2))
    v.requires_grad_()
    lp = ff.log_prob(x, v, x * 0.9, AT, backend="cuda").sum()
    assert gpu_timing.requested(lp.backward) < 1.01 * v.numel() * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    base = call(3, 9000)
    there, slots = moved(base)
    other = {name: t.to("cuda:1") for name, t in slots.items()}
    values = {name: getattr(there, name).to("cuda:1") for name in ("sample", "velocity", "coef", "seeds", "step")}
    cuda.step(replace(there, **values, **other))
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize("cuda:1")
    assert_same(here(other), run(reference, base))


def both_losses(d: dict[str, Any], m: dict[str, Any]) -> list[torch.Tensor]:
    """`ff.policy_loss`, `ff.matching_loss` and their gradients, masked."""
    velocity, other = d["velocity"].detach().requires_grad_(), m["velocity"].detach().requires_grad_()
    loss, _ = ff.policy_loss(
        d["sample"], velocity, d["next_sample"], d["at"], d["old_log_prob"], d["advantage"], clip=(0.5, 0.5), mask=d["mask"],
        old_mean=d["old_mean"], objective="guard", ref_velocity=d["ref_velocity"], kl="gaussian", kl_weight=0.1,
        backend="cuda",
    )  # fmt: skip
    matching, _ = ff.matching_loss(
        other, m["clean"], m["sigma"], ff.Noise(m["seeds"], m["step"]), objective="nft", advantage=m["advantage"],
        old_velocity=m["old_velocity"], ref_velocity=m["ref_velocity"], kl_weight=0.1, mask=d["mask"], backend="cuda",
    )  # fmt: skip
    return [loss.detach(), matching.detach(), *torch.autograd.grad(loss + matching, (velocity, other))]


def loss_inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    d, m = test_policy.data((4, 3, 1500), torch.bfloat16), test_matching.data((4, 3, 1500), torch.bfloat16)
    d["at"] = test_policy.TABLE.at(test_policy.STEPS.cuda())
    d["mask"] = torch.rand(4, 3, 1500, generator=torch.Generator().manual_seed(1)) < 0.6
    m |= {"seeds": torch.arange(4), "step": torch.tensor([5])}
    return moved_to(d, "cuda"), moved_to({name: v for name, v in m.items() if name != "noise"}, "cuda")


def test_losses_wait_for_nothing() -> None:
    d, m = loss_inputs()
    both_losses(d, m)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_losses(d, m)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_losses_replays_on_new_values() -> None:
    """Seeds, step, velocities and advantages are read when the graph runs."""
    d, m = loss_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_losses(d, m)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = both_losses(d, m)
    for change in range(2):
        m["seeds"].add_(1000 * change)
        m["step"].add_(change)
        d["advantage"].neg_()
        d["velocity"].mul_(0.5)
        graph.replay()
        found = [t.clone() for t in slots]
        for actual, expected in zip(found, both_losses(d, m), strict=True):
            assert torch.equal(actual, expected)


def test_same_losses_same_bits() -> None:
    d, m = loss_inputs()
    first = both_losses(d, m)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(both_losses(d, m), first, strict=True))
