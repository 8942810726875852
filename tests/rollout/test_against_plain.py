"""The engine against the plain loop: same states, log-probabilities and clean predictions.

Where the network sees calls of another width the bound is 1e-5 relative; with one row a call the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fastflow as ff
from tests.rollout import plain
from tests.rollout.compare import SIGMAS, T, compare, dense_rollout, everywhere, expected
from tests.rollout.networks import SHAPE, conditions, seeds_of

PSI = [0.25 + 0.02 * i for i in range(T)]

DYNAMICS = {
    "flow": (ff.FlowSDE(0.7), plain.flow_sde(0.7)),
    "dance": (ff.DanceSDE(0.3), plain.dance_sde(0.3)),
    "cps": (ff.CPS(0.8), plain.cps(0.8)),
    "table": (ff.TableSDE(tuple(PSI)), plain.table_sde(PSI)),
    "ode": (ff.ODE(), plain.euler),
    "dpmpp": (ff.ODE("dpmpp", 2), plain.dpmpp2),
}


@pytest.mark.parametrize("name", DYNAMICS)
def test_each_dynamics_bit_for_bit_with_one_row_a_call(sd3: Any, condition: Any, negative: Any, name: str) -> None:
    dynamics, rule = DYNAMICS[name]
    guidance = ff.CFG(3.5, calls=2)
    traj = dense_rollout(
        sd3, dynamics, seeds_of(1), condition=condition, negative=negative, guidance=guidance, max_rows=1
    )
    compare(traj, expected(sd3, traj, condition, negative, everywhere(3.5), rule), bitwise=True)


def test_ten_steps_take_the_plain_loop_65_evaluations(sd3: Any, condition: Any, sigmas: ff.Sigmas) -> None:
    traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(1), sigmas=sigmas, condition=condition, max_rows=1)
    rows = expected(sd3, traj, condition, sigmas=sigmas.tolist())
    assert {row.evaluations for row in rows} == {65} and traj.stats.evaluations == 55 * 3
    compare(traj, rows, bitwise=True)


@pytest.mark.parametrize("name", DYNAMICS)
def test_each_dynamics_in_wide_calls(sd3: Any, condition: Any, negative: Any, name: str) -> None:
    dynamics, rule = DYNAMICS[name]
    guided = {"condition": condition, "negative": negative, "guidance": ff.CFG(3.5)}
    both = [dense_rollout(sd3, dynamics, seeds_of(2), lockstep=mode, **guided) for mode in ("exact", "full")]
    rows = expected(sd3, both[0], condition, negative, everywhere(3.5), rule)
    for traj in both:
        compare(traj, rows)


@pytest.mark.parametrize("group", [2, 3, 5])
@pytest.mark.parametrize("calls", [1, 2])
def test_groups_and_negatives_of_another_length(sd3: Any, condition: Any, group: int, calls: int) -> None:
    negative = conditions(1, 5 if calls == 1 else 3, seed=2)
    guided = {"condition": condition, "negative": negative, "guidance": ff.CFG(2.5, calls=calls)}
    dense = ff.Completion(2)
    both = [
        dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(group), lockstep=mode, dense=dense, max_rows=7, **guided)
        for mode in ("exact", "full")
    ]
    rows = expected(sd3, both[0], condition, negative, everywhere(2.5), dense=dense)
    for traj in both:
        compare(traj, rows)


LIMITS: dict[str, dict[str, Any]] = {
    "max_rows that does not divide": {"max_rows": 7},
    "full, max_rows that does not divide": {"max_rows": 7, "lockstep": "full"},
    "main_rows below the batch": {"main_rows": 4},
    "main_rows above the batch": {"main_rows": 8},
    "widths": {"widths": (4, 8, 16, 32)},
    "full, widths": {"widths": (4, 8), "lockstep": "full"},
    "everything": {"main_rows": 4, "max_rows": 10, "widths": (4, 8)},
}


@pytest.mark.parametrize("guided", [False, True])
def test_limits_on_calls(sd3: Any, condition: Any, negative: Any, guided: bool) -> None:
    extra = {"negative": negative, "guidance": ff.CFG(3.0)} if guided else {}
    unlimited = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(2), condition=condition, **extra)
    rows = expected(sd3, unlimited, condition, negative, everywhere(3.0) if guided else None)
    for name, limits in LIMITS.items():
        traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(2), condition=condition, **extra, **limits)
        compare(traj, rows, name)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing", ["sigma", "schedule"])
def test_respaced_completions(sd3: Any, condition: Any, sigmas: ff.Sigmas, n: int, spacing: str) -> None:
    dense = ff.Completion(n, spacing=spacing)
    common = {"sigmas": sigmas, "condition": condition, "dense": dense}
    both = [dense_rollout(sd3, ff.CPS(0.7), seeds_of(1), lockstep=mode, **common) for mode in ("exact", "full")]
    rows = expected(sd3, both[0], condition, rule=plain.cps(0.7), dense=dense, sigmas=sigmas.tolist())
    for traj in both:
        compare(traj, rows)


@pytest.mark.parametrize("states", ["all", "window", (0, 3, 5, 6)])
@pytest.mark.parametrize("n", ["all", 1, 2])
def test_windows(sd3: Any, condition: Any, states: Any, n: Any) -> None:
    dense = ff.Completion(n, states=states)
    traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(2), condition=condition, dense=dense, steps=[3, 4])
    assert traj.positions == (3, 4, 5) and traj.steps == (3, 4)
    assert traj.states == ((3, 4, 5) if states == "window" else tuple(range(T + 1)) if states == "all" else states)
    compare(traj, expected(sd3, traj, condition, dense=dense, stochastic=(3, 4)))


def test_window_with_a_gap(sd3: Any, condition: Any) -> None:
    dense = ff.Completion(states="window")
    traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(1), condition=condition, dense=dense, steps=[4, 1])
    assert traj.positions == (1, 2, 4, 5) and traj.steps == (1, 4)
    compare(traj, expected(sd3, traj, condition, stochastic=(1, 4)))


@pytest.mark.parametrize("kind", ["step", "row", "both"])
@pytest.mark.parametrize("n", ["all", 3])
def test_guidance_scale_per_step_row_and_both(sd3: Any, condition: Any, negative: Any, kind: str, n: Any) -> None:
    seeds, dense = torch.arange(3 if kind == "row" else T), ff.Completion(n)
    per_step, per_row = torch.linspace(1.0, 5.0, T), torch.linspace(2.0, 4.0, len(seeds))
    product = per_step[:, None] * per_row
    table = {"step": per_step[:, None].expand_as(product), "row": per_row.expand_as(product), "both": product}[kind]
    value = {"step": per_step[:, None], "row": per_row, "both": product}[kind]

    def scale(row: int, sigma: float) -> float:
        """A completion between two sigmas of the schedule is in the step that starts at the upper one."""
        return float(table[max(i for i in range(T) if SIGMAS[i] >= sigma - 1e-9), row])

    guided = {"condition": condition, "negative": negative, "guidance": ff.CFG(value), "dense": dense, "max_rows": 13}
    both = [dense_rollout(sd3, ff.FlowSDE(0.7), seeds, lockstep=mode, **guided) for mode in ("exact", "full")]
    rows = expected(sd3, both[0], condition, negative, scale, dense=dense)
    for traj in both:
        compare(traj, rows)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("n", ["all", 3])
def test_guidance_interval(sd3: Any, condition: Any, negative: Any, calls: int, n: Any) -> None:
    low, high = 0.5, 0.9
    guidance, dense = ff.CFG(4.0, calls=calls, interval=(low, high)), ff.Completion(n)
    guided = {"condition": condition, "negative": negative, "guidance": guidance, "dense": dense}
    both = [dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(1), lockstep=mode, **guided) for mode in ("exact", "full")]
    rows = expected(sd3, both[0], condition, negative, lambda row, s: 4.0 if low <= s <= high else None, dense=dense)
    for traj in both:
        compare(traj, rows)


@pytest.mark.parametrize("main", ["dpmpp", "flow"])
@pytest.mark.parametrize("completion", ["dpmpp", "euler"])
@pytest.mark.parametrize("n", ["all", 4])
def test_second_order_solver(sd3: Any, condition: Any, main: str, completion: str, n: Any) -> None:
    dense = ff.Completion(n, solver=completion, order=2 if completion == "dpmpp" else 1)
    dynamics, rule = (ff.ODE("dpmpp", 2), plain.dpmpp2) if main == "dpmpp" else DYNAMICS["flow"]
    finish = plain.dpmpp2 if completion == "dpmpp" else plain.euler
    traj = dense_rollout(sd3, dynamics, seeds_of(1), condition=condition, dense=dense)
    compare(traj, expected(sd3, traj, condition, rule=rule, finish=finish, dense=dense))


def test_transitions_mixed_by_where(sd3: Any, condition: Any) -> None:
    sigmas = ff.Sigmas(SIGMAS)
    early = [i < 3 for i in range(T)]
    mixed = ff.FlowSDE(0.7).transitions(sigmas).where(torch.tensor(early), ff.DanceSDE(0.4).transitions(sigmas))

    def rule(s: Sequence[float], i: int) -> plain.Move:
        return plain.flow_sde(0.7)(s, i) if i < 3 else plain.dance_sde(0.4)(s, i)

    for dense in (ff.Completion(), ff.Completion(2)):
        traj = dense_rollout(sd3, mixed, seeds_of(1), condition=condition, dense=dense)
        compare(traj, expected(sd3, traj, condition, rule=rule, dense=dense))
    window = ff.FlowSDE(0.7).transitions(sigmas).where(torch.tensor(early), ff.ODE("dpmpp", 2).transitions(sigmas))
    traj = dense_rollout(sd3, window, seeds_of(1), condition=condition)
    assert traj.steps == (0, 1, 2)
    compare(traj, expected(sd3, traj, condition, stochastic=(0, 1, 2), still=plain.dpmpp2))


def test_initial_states_given_or_shared_by_a_group(sd3: Any, condition: Any) -> None:
    seeds = seeds_of(2)
    given = torch.randn(6, *SHAPE)
    traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds, condition=condition, initial=given)
    assert torch.equal(traj.samples[:, 0], given)
    compare(traj, expected(sd3, traj, condition, initial=given))

    groups = torch.tensor([5, 6, 7]).repeat_interleave(2)
    shared = dense_rollout(sd3, ff.FlowSDE(0.7), seeds, condition=condition, initial=ff.Noise(groups, shared=True))
    start = torch.stack([plain.initial_noise(int(g), SHAPE) for g in groups])
    assert torch.equal(shared.samples[:, 0], start)
    assert not torch.equal(shared.samples[0, 1], shared.samples[1, 1]), "the transitions of a group must differ"
    compare(shared, expected(sd3, shared, condition, initial=start))


def test_rows_take_the_prompts_that_prompt_index_says(sd3: Any, condition: Any, negative: Any) -> None:
    index = torch.tensor([2, 0, 2, 1, 0])
    negatives = conditions(3, seed=5)  # one per prompt
    traj = dense_rollout(
        sd3,
        ff.FlowSDE(0.7),
        torch.arange(5),
        condition=condition,
        negative=negatives,
        guidance=ff.CFG(3.0),
        prompt_index=index,
    )
    assert torch.equal(traj.prompt_index, index)
    compare(traj, expected(sd3, traj, condition, negatives, everywhere(3.0)))


def test_without_dense_only_the_final_state_is_clean(sd3: Any, condition: Any) -> None:
    traj = dense_rollout(sd3, ff.FlowSDE(0.7), seeds_of(1), condition=condition, dense=None)
    assert traj.states == (T,) and traj.clean is not None and traj.clean.shape == (3, 1, *SHAPE)
    compare(traj, expected(sd3, traj, condition))


@pytest.mark.parametrize("steps", [1, 2])
def test_short_schedules(sd3: Any, condition: Any, steps: int) -> None:
    sigmas = ff.sigma_schedule(steps).tolist()
    for n in ("all", 1, 2):
        dense = ff.Completion(n)
        traj = dense_rollout(sd3, ff.DanceSDE(0.3), seeds_of(1), sigmas=sigmas, condition=condition, dense=dense)
        compare(traj, expected(sd3, traj, condition, rule=plain.dance_sde(0.3), sigmas=sigmas, dense=dense))


def test_a_schedule_that_starts_below_noise(sd3: Any, condition: Any) -> None:
    sigmas = [0.8, 0.5, 0.3, 0.1]
    given = torch.randn(3, *SHAPE)
    traj = dense_rollout(sd3, ff.DanceSDE(0.3), seeds_of(1), sigmas=sigmas, condition=condition, initial=given)
    compare(traj, expected(sd3, traj, condition, rule=plain.dance_sde(0.3), sigmas=sigmas, initial=given))
