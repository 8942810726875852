"""What every dynamics shares: reading its schedule, windows, and the rows that follow from (a, b, std)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import columns as col
from .schedule import Sigmas, as_float64, as_sigmas
from .transitions import Transitions

NEAR_ONE = 1e-4  # a sigma this close to 1 counts as 1
ROUNDING = 1e-6  # a float32 schedule may start this much above 1


class Rows(NamedTuple):
    """Columns of one family, float64 [T]. The defaults (None) are those of a flow model under Euler."""

    a: Tensor
    b: Tensor
    std: Tensor
    history: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    ode_a: Tensor | None = None
    ode_b: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A checked schedule: `sigmas` [T + 1], `timesteps` [T], and `full` [F + 1], the schedule that it is a part of.

    `still`: no step is stochastic, so a noise knob has no say.
    """

    sigmas: Tensor
    timesteps: Tensor
    full: Tensor
    still: bool = False

    @property
    def sigma(self) -> Tensor:
        return self.sigmas[:-1]

    @property
    def sigma_next(self) -> Tensor:
        return self.sigmas[1:]

    @property
    def guarded(self) -> Tensor:
        """sigma [T], with the full schedule's second one in place of 1 (Flow-GRPO's `sigma_max`)."""
        return torch.where((self.sigma - 1.0).abs() <= NEAR_ONE, self.full[1], self.sigma)

    def per_step(self, name: str, value: float | tuple[float, ...]) -> Tensor:
        """A knob as float64 [T]: one number, one per step, or one per step of the full schedule (picked by sigma)."""
        if not isinstance(value, tuple):
            return torch.full_like(self.sigma, value)
        values, steps = torch.tensor(value, dtype=torch.float64), len(self.sigma)
        if len(values) == steps:
            return values
        same = self.sigma[:, None] == self.full[None, :-1]
        if len(values) == len(self.full) - 1 and bool(same.any(1).all()):
            return values[same.long().argmax(1)]
        if self.still:
            return torch.zeros_like(self.sigma)
        raise ValueError(f"{name}: wanted one number or {steps} of them, one per step, got {len(values)}")


class Dynamics(ABC):
    """A family of transitions. A subclass is a frozen dataclass of knobs with one float64 function, `rows`."""

    score: ClassVar[str] = "gaussian"

    @abstractmethod
    def rows(self, grid: Grid) -> Rows:
        """The coefficients of every step of `grid`."""

    def transitions(
        self,
        sigmas: Sigmas | Tensor | Sequence[float],
        steps: Iterable[int] | None = None,
        *,
        full: Sigmas | Tensor | Sequence[float] | None = None,
    ) -> Transitions:
        """The coefficients of a schedule.

        Args:
            sigmas: [T + 1], falling; flow sigmas in [0, 1] (`DDIM`: integer timesteps).
            steps: the steps that stay stochastic; the others become ODE steps (std 0, the ODE's a and b). None: all.
            full: the schedule that `sigmas` is a part of. Default: what `sub_grid` noted, else `sigmas` itself.

        Raises:
            TypeError, ValueError: a schedule, window or knob that does not fit, or a table that no backend can serve.
        """
        grid = self.grid(sigmas, full)
        stochastic = window(steps, len(grid.sigma))
        grid = replace(grid, still=not bool(stochastic.any()))
        rows = self.rows(grid)
        ode_a = torch.ones_like(grid.sigma) if rows.ode_a is None else rows.ode_a
        ode_b = grid.sigma_next - grid.sigma if rows.ode_b is None else rows.ode_b
        history = torch.zeros_like(grid.sigma) if rows.history is None else rows.history
        std = torch.where(stochastic, rows.std, 0.0)
        still = (std == 0.0) & (
            history == 0.0
        )  # every one-step rule without noise is the ODE step; make it so bit for bit
        return Transitions.build(
            {
                col.A: torch.where(still, ode_a, rows.a),
                col.B: torch.where(still, ode_b, rows.b),
                col.STD: std,
                col.P: torch.ones_like(grid.sigma) if rows.p is None else rows.p,
                col.Q: -grid.sigma if rows.q is None else rows.q,
                col.ODE_A: ode_a,
                col.ODE_B: ode_b,
                col.SIGMA: grid.sigma,
                col.SIGMA_NEXT: grid.sigma_next,
                col.HISTORY: history,
                col.TIMESTEP: grid.timesteps,
            },
            self.score,
            repr(self),
        )

    def grid(
        self, sigmas: Sigmas | Tensor | Sequence[float], full: Sigmas | Tensor | Sequence[float] | None = None
    ) -> Grid:
        """Checks a schedule of flow sigmas: strictly falling, within [0, 1]."""
        given = as_sigmas(sigmas)
        whole = given.full if full is None and given.full is not None else given if full is None else as_sigmas(full)
        for name, values in (("sigmas", given[:]), ("full", whole[:])):
            if values[0] > 1.0 + ROUNDING:
                kind = type(self).__name__
                raise ValueError(f"{name}: {kind} wanted flow sigmas within [0, 1], got {values[0]:.9g} at the start")
            flat = (values[1:] >= values[:-1]).nonzero().flatten().tolist()
            if flat:
                raise ValueError(
                    f"{name}: wanted strictly falling values, got {values[flat[0]]:.9g} twice, from index {flat[0]} on"
                )
        if given[0] > whole[0] or given[-1] < whole[-1]:
            raise ValueError(
                f"full: wanted the schedule that sigmas is a part of, got {whole[0]:.6g} .. {whole[-1]:.6g}"
            )
        return Grid(given[:], given.timesteps, whole[:])


def window(steps: Iterable[int] | None, count: int) -> Tensor:
    """bool [count], true at the stochastic steps."""
    if steps is None:
        return torch.ones(count, dtype=torch.bool)
    chosen = [int(step) for step in steps]
    outside = [step for step in chosen if not 0 <= step < count]
    if outside:
        raise ValueError(f"steps: wanted indices from 0 to {count - 1}, got {outside}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"steps: wanted every index once, got {chosen}")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return mask


def knob(name: str, value: float | Sequence[float] | Tensor, most: float = float("inf")) -> float | tuple[float, ...]:
    """A noise knob as a float or a tuple of floats, each in [0, most]."""
    values = as_float64(name, value)
    if values.ndim > 1 or values.numel() == 0:
        raise ValueError(f"{name}: wanted one number or one per step, got shape {list(values.shape)}")
    if not bool(((values >= 0.0) & (values <= most) & torch.isfinite(values)).all()):
        bound = "finite and at least 0" if most == float("inf") else f"from 0 to {most:g}"
        raise ValueError(f"{name}: wanted values {bound}, got {values.tolist()}")
    return float(values) if values.ndim == 0 else tuple(values.tolist())
