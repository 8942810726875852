"""Columns of the coefficient table [T, COLUMNS]: what one transition is, for every backend."""

from __future__ import annotations

A, B, STD, P, Q, ODE_A, ODE_B, SIGMA, SIGMA_NEXT, C0, W, HISTORY, TIMESTEP = range(13)
COLUMNS = 16
SCORES = ("gaussian", "gaussian_no_const", "square")
