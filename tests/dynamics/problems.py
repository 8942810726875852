"""Data distributions whose velocity E[eps - x0 | x] has a closed form, and chains that run on them. Float64, 1-D."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow.dynamics import Transitions


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(center, spread^2), so x at sigma ~ N((1 - sigma) center, (1 - sigma)^2 spread^2 + sigma^2)."""

    center: float = 0.7
    spread: float = 0.5

    def mean(self, sigma: float) -> float:
        return (1.0 - sigma) * self.center

    def variance(self, sigma: float) -> float:
        return (1.0 - sigma) ** 2 * self.spread**2 + sigma**2

    def affine(self, sigma: float) -> tuple[float, float]:
        """velocity = c x + d."""
        c = (sigma - (1.0 - sigma) * self.spread**2) / self.variance(sigma)
        return c, -self.center - c * self.mean(sigma)

    def ode(self, x: float, sigma: float, sigma_next: float) -> float:
        """The ODE's exact move: it keeps the standardised position."""
        place = (x - self.mean(sigma)) / math.sqrt(self.variance(sigma))
        return self.mean(sigma_next) + math.sqrt(self.variance(sigma_next)) * place


@dataclass(frozen=True)
class Mixture:
    """x0 ~ weights[0] N(centers[0], spread^2) + weights[1] N(centers[1], spread^2)."""

    centers: tuple[float, float] = (-1.0, 1.5)
    weights: tuple[float, float] = (0.35, 0.65)
    spread: float = 0.3

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """c x + d of either component (they share c), weighed by the odds that x came from it."""
        one, two = (Gaussian(center, self.spread) for center in self.centers)
        near, far, variance = one.mean(sigma), two.mean(sigma), one.variance(sigma)
        odds = math.log(self.weights[1] / self.weights[0]) + (near**2 - far**2) / (2.0 * variance)
        share = torch.sigmoid(x * ((far - near) / variance) + odds)
        (c, d_one), (_, d_two) = one.affine(sigma), two.affine(sigma)
        return c * x + d_one + (d_two - d_one) * share

    @property
    def moments(self) -> tuple[float, float, float]:
        """Mean, variance, and fourth central moment."""
        centers, weights = torch.tensor(self.centers).double(), torch.tensor(self.weights).double()
        mean = (weights * centers).sum()
        off, var = centers - mean, self.spread**2
        variance = (weights * (off**2 + var)).sum()
        fourth = (weights * (off**4 + 6.0 * off**2 * var + 3.0 * var**2)).sum()
        return float(mean), float(variance), float(fourth)


def final_moments(tr: Transitions, data: Gaussian) -> tuple[float, float]:
    """Mean and variance after all transitions, exactly: with an affine velocity each is an affine Gaussian map."""
    mean, variance = data.mean(float(tr.sigma[0])), data.variance(float(tr.sigma[0]))
    for a, b, std, sigma in zip(tr.a.tolist(), tr.b.tolist(), tr.std.tolist(), tr.sigma.tolist(), strict=True):
        c, d = data.affine(sigma)
        mean, variance = (a + b * c) * mean + b * d, (a + b * c) ** 2 * variance + std**2
    return mean, variance


def final_position(tr: Transitions, data: Gaussian, x: float) -> float:
    """Where a chain without noise ends, multistep history included."""
    columns = (tr.a, tr.b, tr.p, tr.q, tr.history, tr.sigma)
    clean = 0.0
    for a, b, p, q, history, sigma in zip(*(column.tolist() for column in columns), strict=True):
        c, d = data.affine(sigma)
        v = c * x + d
        x, clean = a * x + b * v + history * clean, p * x + q * v
    return x


def sample(tr: Transitions, data: Mixture, count: int, seed: int) -> Tensor:
    """`count` chains from N(0, 1) at sigma = 1 to the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    for a, b, std, sigma in zip(tr.a.tolist(), tr.b.tolist(), tr.std.tolist(), tr.sigma.tolist(), strict=True):
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        x = a * x + b * data.velocity(x, sigma) + std * noise
    return x
