"""A rollout written as the papers write it: one sample at a time, one network call per evaluation, nothing reused.

Independent of the engine: of fastflow it uses the noise definition alone. Coefficients are Python floats from the published
formulas, states are float32, and each product and each sum of a step is one torch operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastflow import philox

TRANSITIONS, INITIAL = 0, 1  # noise streams


@dataclass(frozen=True)
class Move:
    """x' = a x + b v + c z + h (previous clean), scored as Gaussian or as a plain square."""

    a: float
    b: float
    c: float = 0.0
    score: str = "gaussian"
    history: float = 0.0


Rule = Callable[[Sequence[float], int], Move]


def euler(sigmas: Sequence[float], i: int) -> Move:
    return Move(1.0, sigmas[i + 1] - sigmas[i])


def reverse_sde(sigma: float, after: float, s: float) -> Move:
    dt = after - sigma
    return Move(1.0 + s**2 * dt / (2.0 * sigma), (1.0 + s**2 * (1.0 - sigma) / (2.0 * sigma)) * dt, s * math.sqrt(-dt))


def flow_sde(level: float) -> Rule:
    """Flow-GRPO: s = level sqrt(sigma / (1 - sigma)), the schedule's second sigma in place of 1."""

    def rule(sigmas: Sequence[float], i: int) -> Move:
        guard = sigmas[1] if sigmas[i] == 1.0 else sigmas[i]
        return reverse_sde(sigmas[i], sigmas[i + 1], level * math.sqrt(sigmas[i] / (1.0 - guard)))

    return rule


def dance_sde(eta: float) -> Rule:
    return lambda sigmas, i: reverse_sde(sigmas[i], sigmas[i + 1], eta)


def table_sde(psi: Sequence[float]) -> Rule:
    return lambda sigmas, i: reverse_sde(sigmas[i], sigmas[i + 1], psi[i])


def cps(level: float) -> Rule:
    """FlowCPS: (1 - sigma') x0 + sqrt(sigma'^2 - rho^2) x1 + rho z, rho = sigma' sin(level pi / 2)."""

    def rule(sigmas: Sequence[float], i: int) -> Move:
        sigma, after = sigmas[i], sigmas[i + 1]
        rho = after * math.sin(level * math.pi / 2.0)
        kept = math.sqrt(max(after**2 - rho**2, 0.0))
        return Move((1.0 - after) + kept, -sigma * (1.0 - after) + (1.0 - sigma) * kept, rho, "square")

    return rule


def dpmpp2(sigmas: Sequence[float], i: int) -> Move:
    """DPM-Solver++(2M), midpoint; Euler in the first and last step and after a step from sigma = 1."""
    if i == 0 or i == len(sigmas) - 2 or sigmas[i - 1] >= 1.0:
        return euler(sigmas, i)
    lam = [math.log(1.0 - s) - math.log(s) for s in sigmas[i - 1 : i + 2]]
    h = lam[2] - lam[1]
    k = (1.0 - sigmas[i + 1]) * (1.0 - math.exp(-h))
    weight = k * 0.5 * h / (lam[1] - lam[0])
    return Move(sigmas[i + 1] / sigmas[i] + k + weight, -(k + weight) * sigmas[i], history=-weight)


def ddim(alphas: Sequence[float], eta: float) -> Rule:
    """DDPO: sigmas are timesteps, v is epsilon."""

    def rule(times: Sequence[float], i: int) -> Move:
        now, after = alphas[int(times[i])], alphas[int(times[i + 1])]
        rho = eta * math.sqrt((1.0 - after) / (1.0 - now) * (1.0 - now / after))
        b = math.sqrt(1.0 - after - rho**2) - math.sqrt(after) * math.sqrt(1.0 - now) / math.sqrt(now)
        return Move(math.sqrt(after) / math.sqrt(now), b, rho)

    return rule


def flow_clean(sigma: float) -> tuple[float, float]:
    return 1.0, -sigma


@dataclass
class Row:
    """One sample: `states` [T + 1, *], `log_probs` [T], `clean` by state, and how often the network was asked."""

    states: list[Tensor] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    clean: dict[int, Tensor] = field(default_factory=dict)
    evaluations: int = 0


@dataclass
class Plain:
    """velocity(x [1, *], sigma) is the (guided) network for one prompt. `rule` moves the main chain, `finish` completions."""

    velocity: Callable[[Tensor, float], Tensor]
    sigmas: Sequence[float]
    rule: Rule
    finish: Rule = euler
    clean_of: Callable[[float], tuple[float, float]] = flow_clean
    stochastic: Sequence[int] | None = None
    still: Rule = euler  # the moves outside `stochastic`

    def run(
        self, initial: Tensor, seed: int, states: Sequence[int] = (), n: int | None = None, spacing: str = "sigma"
    ) -> Row:
        row, x = Row(), initial.float()[None]
        row.states.append(x[0])
        before = None
        for i in range(len(self.sigmas) - 1):
            inside = self.stochastic is None or i in self.stochastic
            move = (self.rule if inside else self.still)(self.sigmas, i)
            v = self._ask(x, self.sigmas[i], row)
            z = philox.normal(torch.tensor([seed]), torch.tensor([i]), x.numel(), stream=TRANSITIONS).reshape(x.shape)
            mean = self._mean(x, v, move, before)
            after = mean + _f(move.c) * z if move.c > 0 else mean
            row.log_probs.append(_score(after, mean, move))
            before = self._clean(x, v, self.sigmas[i])
            x = after
            row.states.append(x[0])
        for i in states:
            row.clean[i] = self._complete(row.states[i][None], i, n, spacing, row)[0]
        return row

    def _complete(self, x: Tensor, i: int, n: int | None, spacing: str, row: Row) -> Tensor:
        """From state i to the clean sample: on the schedule's own grid, or in n evaluations."""
        grid = respaced(self.sigmas, i, n, spacing)
        before = None
        for j in range(len(grid) - 1):
            v = self._ask(x, grid[j], row)
            clean = self._clean(x, v, grid[j])
            if n == 1:
                return clean
            x, before = self._mean(x, v, self.finish(grid, j), before), clean
        return x

    def _ask(self, x: Tensor, sigma: float, row: Row) -> Tensor:
        row.evaluations += 1
        return self.velocity(x, sigma).float()

    def _mean(self, x: Tensor, v: Tensor, move: Move, before: Tensor | None) -> Tensor:
        mean = _f(move.a) * x + _f(move.b) * v
        return mean if before is None or move.history == 0.0 else mean + _f(move.history) * before

    def _clean(self, x: Tensor, v: Tensor, sigma: float) -> Tensor:
        p, q = self.clean_of(sigma)
        return _f(p) * x + _f(q) * v


def respaced(sigmas: Sequence[float], i: int, n: int | None, spacing: str) -> list[float]:
    left = len(sigmas) - 1 - i
    if n is None or n >= left:
        return list(sigmas[i:])
    if spacing == "sigma":
        return [sigmas[i] + (sigmas[-1] - sigmas[i]) * k / n for k in range(n + 1)]
    places = [i + left * k / n for k in range(n + 1)]
    low = [min(int(p), len(sigmas) - 2) for p in places]
    return [sigmas[j] + (sigmas[j + 1] - sigmas[j]) * (p - j) for p, j in zip(places, low, strict=True)]


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    return philox.normal(torch.tensor([seed]), torch.tensor([0]), math.prod(shape), stream=INITIAL).reshape(
        tuple(shape)
    )


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond.float() + _f(scale) * (cond.float() - uncond.float())


def _f(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).float()


def _score(after: Tensor, mean: Tensor, move: Move) -> float:
    r = (after - mean).double()
    if move.score == "square":
        return -r.square().mean().item()
    if move.c == 0.0:
        return 0.0
    return (-r.square() / (2.0 * move.c**2) - math.log(move.c) - 0.5 * math.log(2.0 * math.pi)).mean().item()
