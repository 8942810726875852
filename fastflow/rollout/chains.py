"""Completions: the deterministic way from a stored state to its clean sample, as rows of a coefficient table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dynamics import ODE, Sigmas, Transitions, sub_grid
from ..dynamics import columns as col


@dataclass(frozen=True)
class Completion:
    """How a clean sample is predicted from every state (DenseGRPO's ODE_n, arXiv 2601.20218).

    evaluations: "all": on the schedule's own grid, T - i evaluations from state i; or n >= 1: re-spaced to n (never more
                 than "all" takes, and then on the schedule's own grid). 1 is the one-step (Tweedie) prediction. The first
                 evaluation is the main chain's own, so a completion costs one fewer.
    spacing:     of a re-spaced grid: "sigma" (even in sigma; ranks gains better) or "schedule" (even in the schedule's index).
    states:      "all" positions 0..T; "window": those around the stochastic steps; or explicit positions.
    solver, order: as in ff.ODE: ("euler", 1) or ("dpmpp", 2).

    Raises ValueError or TypeError naming the argument.
    """

    evaluations: int | str = "all"
    spacing: str = "sigma"
    states: str | tuple[int, ...] = "all"
    solver: str = "euler"
    order: int = 1

    def __post_init__(self) -> None:
        n = self.evaluations
        if isinstance(n, str):
            if n != "all":
                raise ValueError(f'evaluations: wanted "all" or a number of at least 1, got {n!r}')
        elif isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f'evaluations: wanted "all" or an int, got {type(n).__name__}')
        elif n < 1:
            raise ValueError(f"evaluations: wanted at least 1, got {n}")
        if self.spacing not in ("sigma", "schedule"):
            raise ValueError(f'spacing: wanted "sigma" or "schedule", got {self.spacing!r}')
        if isinstance(self.states, str):
            if self.states not in ("all", "window"):
                raise ValueError(f'states: wanted "all", "window" or a tuple of positions, got {self.states!r}')
        else:
            object.__setattr__(self, "states", tuple(int(s) for s in self.states))
        ODE(solver=self.solver, order=self.order)

    def positions(self, length: int, steps: Sequence[int]) -> tuple[int, ...]:
        """The states that are completed, of a schedule of `length` steps whose `steps` are stochastic."""
        if self.states == "all":
            return tuple(range(length + 1))
        if self.states == "window":
            return tuple(sorted({i for s in steps for i in (s, s + 1)})) or (length,)
        given = [int(p) for p in self.states]
        positions = sorted(set(given))
        if len(positions) != len(given) or not positions or positions[0] < 0 or positions[-1] > length:
            raise ValueError(f"states: wanted distinct positions in 0..{length}, got {self.states}")
        return tuple(positions)


@dataclass(frozen=True, eq=False)
class Chain:
    """One completion for the whole batch. Move 0 is the main chain's evaluation; move j runs at level `state + j`."""

    state: int
    rows: Tensor  # float64 [evaluations, 16]: its ODE moves
    first: int = 0  # of its rows in the table of all chains

    @property
    def evaluations(self) -> int:
        return len(self.rows)

    def is_open(self, level: int) -> bool:
        """Whether it has a move of its own at this level of the main chain."""
        return self.state < level < self.state + self.evaluations


def open_chains(
    dense: Completion, positions: Sequence[int], sigmas: Sigmas, main: Transitions, dynamics: Any
) -> tuple[list[Chain], dict[int, int]]:
    """The chains to run, in order of opening, and for each position the index of its chain (len(chains): the final state).

    A state whose next main step is that same ODE move shares the completion of the next state: nothing is run for it.
    """
    length = len(main)
    wanted = set(positions)
    chains: list[Chain] = []
    shared = _shared_moves(dense, main)
    owner: dict[int, int] = {}
    heads: dict[int, int] = {}  # state that a chain starts from -> index
    for position in positions:
        head = position
        while head < length and shared[head]:
            head += 1
        owner[position] = head
    first = 0
    for head in sorted({owner[p] for p in wanted}):
        if head < length:
            rows = _moves(dense, sigmas, head, main, dynamics)
            heads[head] = len(chains)
            chains.append(Chain(head, rows, first))
            first += len(rows)
    heads[length] = len(chains)
    return chains, {position: heads[head] for position, head in owner.items()}


def _shared_moves(dense: Completion, main: Transitions) -> list[bool]:
    """Per step: the main chain makes the very move that a completion would, which is on the schedule's own grid."""
    length, n = len(main), dense.evaluations
    if n == 1 or dense.order != 1:
        return [False] * length
    same = (main.std == 0) & (main.a == main.ode_a) & (main.b == main.ode_b) & (main.history == 0)
    return [bool(s) and (n == "all" or int(n) >= length - i) for i, s in enumerate(same.tolist())]


def _moves(dense: Completion, sigmas: Sigmas, state: int, main: Transitions, dynamics: Any) -> Tensor:
    left = len(main) - state
    n = left if dense.evaluations == "all" else min(int(dense.evaluations), left)
    table = main.state_dict()["table"]
    if dense.evaluations == 1:  # the clean prediction itself, wherever the schedule ends
        rows = table[state : state + 1].clone()
        rows[:, col.ODE_A], rows[:, col.ODE_B] = rows[:, col.P], rows[:, col.Q]
    elif dense.order != 1:
        rows = _solver_rows(ODE(solver=dense.solver, order=dense.order), sub_grid(sigmas, state, n, dense.spacing))
    elif n == left:
        rows = table[state:].clone()
    else:
        rows = dynamics.transitions(sub_grid(sigmas, state, n, dense.spacing), steps=()).state_dict()["table"]
    rows[:, col.A], rows[:, col.B] = rows[:, col.ODE_A], rows[:, col.ODE_B]
    rows[:, col.STD] = rows[:, col.C0] = rows[:, col.W] = 0.0
    if dense.order == 1:
        rows[:, col.HISTORY] = 0.0
    return rows


def _solver_rows(solver: ODE, grid: Sigmas) -> Tensor:
    rows = solver.transitions(grid).state_dict()["table"]
    rows[:, col.ODE_A], rows[:, col.ODE_B] = rows[:, col.A], rows[:, col.B]
    return rows


def chain_table(chains: Sequence[Chain]) -> Transitions | None:
    """All moves of all chains, one below the other."""
    return Transitions(torch.cat([c.rows for c in chains]), name="completions") if chains else None


def with_first_moves(main: Transitions, chains: Sequence[Chain]) -> Transitions:
    """The main chain's table, its ODE columns holding the first move of the completion that opens at each step."""
    state = main.state_dict()
    for chain in chains:
        state["table"][chain.state, col.ODE_A] = chain.rows[0, col.ODE_A]
        state["table"][chain.state, col.ODE_B] = chain.rows[0, col.ODE_B]
    return Transitions(state["table"], main.score, main.name)
