"""The call plan: counts, widths, and that the network sees exactly what the plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastflow as ff
from tests.rollout.networks import SHAPE, Recorder, RowWise, conditions, seeds_of

SIGMAS = ff.sigma_schedule(10, shift=3.0)


def plan_of(seeds: Any = None, sigmas: Any = SIGMAS, dynamics: Any = None, **arguments: Any) -> ff.Plan:
    seeds = torch.arange(4) if seeds is None else seeds
    return ff.plan(None, SHAPE, sigmas, dynamics or ff.FlowSDE(0.7), seeds, **{"dense": ff.Completion(), **arguments})


@pytest.mark.parametrize(("lockstep", "calls"), [("exact", 19), ("full", 10)])
def test_ten_steps_take_55_evaluations_a_sample(lockstep: str, calls: int) -> None:
    plan = plan_of(lockstep=lockstep)
    assert plan.network_calls == len(plan) == calls
    assert plan.evaluations == 55 * 4
    assert f"{calls} network calls" in str(plan) and "(55 a sample)" in str(plan)


@pytest.mark.parametrize(("n", "evaluations"), [(1, 10), (2, 19), (3, 27), (4, 34), (10, 55), (99, 55)])
def test_respaced_completions_take_few_evaluations(n: int, evaluations: int) -> None:
    for lockstep in ("exact", "full"):
        assert plan_of(dense=ff.Completion(n), lockstep=lockstep).evaluations == evaluations * 4
    assert plan_of(dense=ff.Completion(n), lockstep="full").network_calls == 10
    assert plan_of(dense=ff.Completion(n)).network_calls == (10 if n == 1 else 19)


def test_without_dense_there_is_one_call_a_step() -> None:
    for lockstep in ("exact", "full"):
        assert (plan_of(dense=None, lockstep=lockstep).network_calls, plan_of(dense=None).evaluations) == (10, 40)


def test_states_before_a_window_share_a_completion_and_states_after_it_are_the_chain_itself() -> None:
    both = plan_of(steps=[3, 4]), plan_of(steps=[3, 4], dense=ff.Completion(states="window"))
    # the chain, the completion of state 3 (7 evaluations, the first one shared) and that of state 4 (6)
    assert {plan.evaluations for plan in both} == {4 * (10 + 6 + 5)}


def test_an_ode_chain_is_its_own_completion() -> None:
    assert plan_of(dynamics=ff.ODE()).evaluations == 40


def test_two_guidance_calls_count_twice_and_halves_share_a_width() -> None:
    guided = {"condition": conditions(2), "negative": conditions(1)}
    one, two = plan_of(guidance=ff.CFG(3.0), **guided), plan_of(guidance=ff.CFG(3.0, calls=2), **guided)
    assert (one.network_calls, two.network_calls) == (19, 38)
    assert one.evaluations == two.evaluations == 220
    assert (one.main_widths, two.main_widths) == ((8,), (4,))


def test_main_rows_go_in_calls_of_one_width() -> None:
    plan = plan_of(torch.arange(10), main_rows=4)
    mains = [call for call in plan.calls if call.main[1] > call.main[0]]
    assert plan.main_widths == (4,) and len(mains) == 30
    assert all(call.completions == (0, 0) for call in mains)
    assert [call.main for call in mains[:3]] == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("lockstep", ["exact", "full"])
def test_widths_never_lead_above_max_rows(lockstep: str) -> None:
    plan = plan_of(max_rows=6, widths=(4, 8), lockstep=lockstep)
    assert plan.widths == (4,)
    with pytest.raises(ValueError, match=r"widths.*at most max_rows.*3.*got \(4, 8\)"):
        plan_of(max_rows=3, widths=(4, 8), lockstep=lockstep)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    length, batch = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    calls, low = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([0.0, 0.45]))
    halves = 2 if calls == 1 else 1
    arguments: dict[str, Any] = {"lockstep": draw(st.sampled_from(["exact", "full"]))}
    if calls:
        arguments["guidance"] = ff.CFG(2.0, calls=calls, interval=(low, 0.95 if low else 1.0))
        arguments["negative"] = conditions(1, seed=1)
    evaluations = draw(st.sampled_from(["all", 1, 2, 3]))
    positions = st.lists(st.integers(0, length), min_size=1, unique=True).map(tuple)
    states = draw(st.one_of(st.sampled_from(["all", "window"]), positions))
    arguments["dense"] = draw(st.sampled_from([None, ff.Completion(evaluations, states=states)]))
    arguments["max_rows"] = draw(st.sampled_from([None, halves, 2 * halves, 5, 7, 16]))
    fitting = [w for w in (halves, 4, 6, 14) if arguments["max_rows"] is None or w <= arguments["max_rows"]]
    if draw(st.booleans()) and fitting:
        arguments["widths"] = tuple(draw(st.sets(st.sampled_from(fitting), min_size=1)))
    if draw(st.booleans()):
        arguments["steps"] = sorted(draw(st.sets(st.integers(0, length - 1))))
    if arguments["lockstep"] == "exact" and "widths" not in arguments and draw(st.booleans()):
        most = arguments["max_rows"] // halves if arguments["max_rows"] else 9
        arguments["main_rows"] = draw(st.integers(1, most))
    return {"length": length, "batch": batch, "arguments": arguments}


def wanted_evaluations(length: int, arguments: dict[str, Any]) -> int:
    """Row evaluations of one sample, counted state by state."""
    steps = arguments.get("steps")
    noisy = set(range(length)) if steps is None else set(steps)
    dense: ff.Completion | None = arguments["dense"]
    if dense is None:
        return length
    n = length if dense.evaluations == "all" else int(dense.evaluations)
    left = set()
    for i in dense.positions(length, sorted(noisy)):
        # on the schedule's own grid a completion runs from the next noisy step on: before it the chain makes the same moves
        while i < length and i not in noisy and dense.evaluations != 1 and n >= length - i:
            i += 1
        left.add(length - i)
    return length + sum(min(n, steps) - 1 for steps in left if steps)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_the_network_sees_the_plan_and_every_row_once(configuration: dict[str, Any]) -> None:
    length, batch, arguments = configuration["length"], configuration["batch"], configuration["arguments"]
    network = Recorder(RowWise())
    common = {"condition": conditions(batch), **arguments}
    call = (SHAPE, ff.sigma_schedule(length), ff.DanceSDE(0.3), torch.arange(batch))
    plan = ff.plan(network, *call, **common)
    assert not network.rows, "a plan calls nothing"
    assert ff.plan(network, *call, **common) == plan

    traj = ff.rollout(network, *call, progress=False, **common)
    assert network.rows == [c.width for c in plan.calls for _ in range(c.networks)]
    assert (traj.stats.calls, traj.stats.evaluations) == (plan.network_calls, plan.evaluations)
    assert traj.stats.padding == sum(c.padded - c.rows for c in plan.calls)
    assert traj.stats.widths == plan.main_widths
    assert plan.evaluations == batch * wanted_evaluations(length, arguments)
    limit, widths = arguments["max_rows"], arguments.get("widths")
    assert all(limit is None or rows <= limit for rows in network.rows)
    assert all(widths is None or rows in widths for rows in network.rows)

    # padding and unconditional rows repeat a state of their call; no state comes twice otherwise
    assert len({row.numpy().tobytes() for call in network.samples for row in call}) == plan.evaluations
    for level in range(length):
        mains = sorted(c.main for c in plan.calls if c.step == level and c.main != (0, 0))
        assert [r for lo, hi in mains for r in range(lo, hi)] == list(range(batch))


def test_main_rows_see_one_width_whatever_runs_beside_them() -> None:
    network = Recorder(RowWise())
    ff.rollout(
        network, SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(5), condition=conditions(), dense=ff.Completion(), main_rows=4,
        progress=False,
    )  # fmt: skip
    plan = plan_of(seeds_of(5), condition=conditions(), main_rows=4)
    for call, rows in zip(plan.calls, network.rows, strict=True):
        if call.main != (0, 0):
            assert rows == 4
