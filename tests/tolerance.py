"""The only file with numeric bounds. Each says where it comes from; none depends on the machine."""

from __future__ import annotations

import torch
from torch import Tensor

# Noise: float32 Box-Muller against float64 of the same words. One rounding each of r (2.4e-7 at r = 5.77), of the angle
# (2.7e-7) and of the product (2.4e-7), and the polynomials; the numerical contract says 1e-6.
NOISE = 1e-6

# Moments of standard normal draws: five standard errors, which a right generator passes but for one run in two million.
STANDARD_ERRORS = 5.0
# Evenness of n draws: the largest gap between their distribution and an even one times sqrt(n) (Kolmogorov), beyond which true
# draws go once in a thousand.
KOLMOGOROV = 1.95

# The network answers differently for another call width: relative to the largest value (numerical contract, "same results").
REWIDTH = 1e-5

# Tests of adapters: an input that matters moves the velocity by 5 % of its spread, thousands of times REWIDTH.
SHOWS = 0.05

# Signed bias of a result: |sum of errors| / sum of |values|. Half an ulp of float32 would be 6e-8 if every error had one sign.
BIAS = 2e-8

# Gradients stored in a narrow dtype: one rounding of the store (eps / 2), and float32 arithmetic around it.
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-10}


def log_prob_bound(numel: int) -> float:
    """Nats between a float32 log_prob and float64 on the float64 table, mean over `numel` elements (numerical contract, 7)."""
    return 5e-7 + 2e-5 / numel**0.5


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next value of `dtype`, as float64."""
    return values.abs().double().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps


def assert_as_good_as_plain(actual: Tensor, exact: Tensor, plain: Tensor, name: str = "result") -> None:
    """The rule of the field: error against float64 at most twice that of the same float32 arithmetic in plain PyTorch, plus an
    ulp; on the largest and the RMS error, and no signed bias. `exact` is float64."""
    error, allowed = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    floor = ulp(exact, actual.dtype)
    assert error.max() <= 2 * allowed.max() + floor.max(), f"{name}: max {error.max():.3g} > 2 * {allowed.max():.3g}"
    rms, plain_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 2 * plain_rms + floor.square().mean().sqrt(), f"{name}: RMS {rms:.3g} > 2 * {plain_rms:.3g}"
    if actual.dtype == torch.float32:
        bias = (actual.double() - exact).sum().abs() / exact.abs().sum()
        plain_bias = (plain.double() - exact).sum().abs() / exact.abs().sum()
        assert bias <= 2 * plain_bias + BIAS, f"{name}: signed bias {bias:.3g}"


def assert_gradient(actual: Tensor, exact: Tensor, name: str = "gradient") -> None:
    """A stored gradient against float64, relative to its largest entry."""
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((actual.double() - exact).abs() / scale).max()
    assert error <= GRADIENT[actual.dtype], (
        f"{name}: {error:.3g} of the largest entry, allowed {GRADIENT[actual.dtype]:.3g}"
    )


def assert_same_at_another_width(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal but for the width of the network calls."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((actual.double() - expected.double()).abs() / scale).max()
    assert error <= REWIDTH, f"{name}: {error:.3g} of the largest value, allowed {REWIDTH:.3g}"


# Dynamics: closed forms in float64. A few hundred ulp, for values that differ by the cancellation of sigmas near 1.
FLOAT64 = 1e-11
# Dynamics: schedulers that compute in float32: 6e-8 relative, amplified over a chain of steps.
FLOAT32 = 1e-5
# Dynamics: error ratio under halved steps against 2^order, relative, in the asymptotic range.
ORDER_RATIO = 0.1

# Rollouts: log_prob of a chain against the plain loop's float64 mean of float32 residuals, nats, absolute and relative.
LOG_PROB_CHAIN = 1e-5
# Losses: a mean over rows of float32 numbers near 1, beside float64: the bound of log_prob (5e-7) times its advantage, and exp.
LOSS = 2e-5

# Bench: guidance combined in bfloat16 by one compiler and not by another: three roundings (2^-9 each) of the largest value.
NETWORK_DTYPE = 2.0**-7

# Rollouts: log_prob of a replay whose network calls had another width than the rollout's (lockstep "full"), nats. The
# velocities differ by a few ulp of the network's dtype (of bf16: 8e-3), which enters as b * dv * 2 w * residual, averaged.
REPLAY_FULL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Rollouts: peak memory against `plan.memory`, relative. A process counts pages once they are written: when the largest call
# runs, up to three batches of some thirty (the state after it, the completion that opens there, the final block) are blank.
MEMORY = 0.1

# Digits: logistic regression on RBF features is right on 98.9 % of the 360 held-out images; below 97 % something is broken.
CLASSIFIER_ACCURACY = 0.97
# Digits: share of 60 guided ODE samples that the classifier takes for the wanted digit; the trained model reaches 100 %.
SAMPLES_RECOGNISED = 0.85
# Digits: size of the checkpoint, which ships as package data.
CHECKPOINT_BYTES = 1_500_000
