"""Columns of the coefficient table [T, COLUMNS]: what one transition is, for every backend."""

from __future__ import annotations

from torch import Tensor

A, B, STD, P, Q, ODE_A, ODE_B, SIGMA, SIGMA_NEXT, C0, W, HISTORY, TIMESTEP = range(13)
NAMES = ("a", "b", "std", "p", "q", "ode_a", "ode_b", "sigma", "sigma_next", "c0", "w", "history", "timestep")
COLUMNS = 16
SCORES = ("gaussian", "gaussian_no_const", "square")


class Columns:
    """The columns by name, for a class that has `_column(number)`."""

    __slots__ = ()

    def _column(self, number: int) -> Tensor:
        raise NotImplementedError

    @property
    def a(self) -> Tensor:
        """Weight of sample in mean."""
        return self._column(A)

    @property
    def b(self) -> Tensor:
        """Weight of velocity in mean."""
        return self._column(B)

    @property
    def std(self) -> Tensor:
        """True standard deviation of the transition."""
        return self._column(STD)

    @property
    def p(self) -> Tensor:
        """Weight of sample in clean."""
        return self._column(P)

    @property
    def q(self) -> Tensor:
        """Weight of velocity in clean."""
        return self._column(Q)

    @property
    def ode_a(self) -> Tensor:
        """Weight of sample in ode_next."""
        return self._column(ODE_A)

    @property
    def ode_b(self) -> Tensor:
        """Weight of velocity in ode_next."""
        return self._column(ODE_B)

    @property
    def sigma(self) -> Tensor:
        """Noise level of sample (`DDIM`: its timestep)."""
        return self._column(SIGMA)

    @property
    def sigma_next(self) -> Tensor:
        """Noise level of next_sample (`DDIM`: its timestep)."""
        return self._column(SIGMA_NEXT)

    @property
    def history(self) -> Tensor:
        """Weight of the previous step's clean in mean (multistep ODE solvers, else 0)."""
        return self._column(HISTORY)

    @property
    def timestep(self) -> Tensor:
        """What the network is given for sigma."""
        return self._column(TIMESTEP)
