"""`ff.step`: one transition of a sampler with its log-probability, clean prediction and ODE move, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..dynamics.columns import COLUMNS, STD
from ..guidance import CFG
from ..noise import Noise
from . import checks, gather, library

if TYPE_CHECKING:
    from ..dynamics import At

OUTPUTS = ("next_sample", "log_prob", "clean", "ode_next", "mean", "flags")


class StepOutput(NamedTuple):
    """What `ff.step` was asked for; the other places are None."""

    next_sample: Tensor | None = None  # [B, *], dtype of sample
    log_prob: Tensor | None = None  # [B] float32, nats; [B, *] under reduce="none"
    clean: Tensor | None = None  # [B, *], dtype of sample: predicted x0
    ode_next: Tensor | None = None  # [B, *], dtype of sample: the deterministic move to sigma_next
    mean: Tensor | None = None  # [B, *], float32
    flags: Tensor | None = None  # [B] int32, bit 0: a value of the row is not finite, bit 1: `rows` named none


def step(
    sample: Tensor,
    velocity: Tensor,
    at: At,
    *,
    noise: Noise | Tensor | None = None,
    next_sample: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: CFG | None = None,
    rows: Tensor | None = None,
    want: Sequence[str] | None = None,
    out: Mapping[str, Tensor] | None = None,
    score: str | None = None,
    reduce: str = "mean",
    mask: Tensor | None = None,
    score_rounded: bool = True,
    product_dtype: str = "float32",
    backend: str = "auto",
) -> StepOutput:
    """One affine Gaussian transition, everything it yields in one pass over memory.

        mean = a sample + b velocity       next_sample = mean + std z       clean = p sample + q velocity
        ode_next = ode_a sample + ode_b velocity       log_prob = c0 - w mean((next_sample - mean)^2)

    with a, b, std, ... from `at = transitions.at(i)`. Float32 arithmetic, each product and sum rounded on its own.

    sample:        [B, *] float32, bfloat16, float16 (float64: reference backend), rows contiguous at any row stride.
    velocity:      [B, *] any float dtype: noise - x0 (for DDIM what the network predicts).
    noise:         ff.Noise (drawn in the kernel) or a tensor [B, *]. Not needed where every std is 0.
    next_sample:   a stored transition [B, *]: replay. Excludes noise.
    uncond, guidance: unconditional velocity [B, *] and ff.CFG: combined in front, uncond + scale (velocity - uncond).
    rows:          int64 [B]: row r is made of row rows[r] of sample, velocity and uncond, which have any number of rows, while
                   all else has B: a fork or a resampling without a copy (one is made for a gradient, under torch.compile and
                   for CFG(dtype="velocity")). An index that names no row is a ValueError on a CPU; on a GPU and under
                   torch.compile it is clamped, and bit 1 of flags tells.
    want:          names among next_sample, log_prob, clean, ode_next, mean, flags. Default: next_sample and log_prob; in a
                   replay log_prob; with `out`, its keys.
    out:           tensors to write into, {name: tensor}; no gradient then. next_sample may be `sample` itself.
    score:         "gaussian", "gaussian_no_const" or "square"; default: the dynamics' own. Where std is 0 a Gaussian scores 0.
    reduce:        "mean" over the elements, "sum", or "none" (log_prob [B, *]).
    mask:          bool [B, *]: elements that are scored (the others are stepped all the same).
    score_rounded: score the value as stored (default), or before rounding to the storage dtype.
    product_dtype: "velocity" rounds coefficient * velocity to velocity's dtype, as torch's own expression does (reference).
    backend:       "auto", "reference", "cpu", "triton", "cuda". A named backend runs or raises.

    Differentiable in sample, velocity and uncond (the noise is a constant; log_prob takes next_sample as a constant).
    Raises ValueError or TypeError naming the argument, BackendError where a named backend cannot serve the call.
    Source: DESIGN of this library, "one idea"; every sampler of the field is this map with its own coefficients.
    """
    sample = checks.state(sample)
    velocity = checks.like("velocity", velocity, sample)
    inputs = (sample, velocity, uncond)
    needs_grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    functional = out is None and (needs_grad or torch.compiler.is_compiling())
    lost = None
    if rows is not None:
        rows = gather.index(rows, sample)
        uncond = None if uncond is None else checks.like("uncond", uncond, velocity)
        if functional or (isinstance(guidance, CFG) and guidance.dtype == "velocity"):
            sample, velocity, uncond, lost = gather.copied(rows, sample, velocity, uncond)
            rows = None
    source, sample = sample, gather.shaped(sample, rows)
    coef = checks.coefficients(at, sample)
    velocity, uncond, scale, rescale, token = checks.guided(velocity, uncond, guidance, sample)
    score_index, reduce_index = checks.scoring(at, score, reduce)
    names = wanted(want, out, replay=next_sample is not None)
    if product_dtype not in ("float32", "velocity"):
        raise ValueError(f'product_dtype: wanted "float32" or "velocity", got {product_dtype!r}')
    if mask is not None:
        mask = checks.like("mask", mask, sample, kind="bool")
    explicit = seeds = counter = None
    stream = offset = 0
    if next_sample is not None:
        if noise is not None:
            raise ValueError("noise: wanted None beside next_sample (a replay draws nothing), got both")
        next_sample = checks.like("next_sample", next_sample, sample)
    elif isinstance(noise, Noise):
        if noise.seeds.shape[0] != sample.shape[0]:
            raise ValueError(
                f"noise.seeds: wanted one per row of sample, {sample.shape[0]}, got {noise.seeds.shape[0]}"
            )
        seeds, counter = noise.counters(sample.device)
        stream, offset = noise.stream, noise.offset
    elif noise is not None:
        explicit = checks.like("noise", noise, sample)
    elif ("next_sample" in names or "log_prob" in names) and not _deterministic(at, coef):
        raise ValueError("noise: wanted ff.Noise(seeds, step) or a tensor [B, *], since std is not 0 here, got None")
    backends.check_name(backend)
    arguments = (
        source, velocity, uncond, coef, scale, explicit, seeds, counter, next_sample, mask, token, stream, offset,
        score_index, reduce_index, score_rounded,
    )  # fmt: skip
    if functional:
        asked = [name in names for name in OUTPUTS]
        made = torch.ops.fastflow.step(
            *arguments, sample.dtype, rescale, product_dtype, backend,
            [asked[0] or (needs_grad and asked[1]), *asked[1:]],  # the gradient of a score needs what was scored
        )  # fmt: skip
        kept = [t if w else None for t, w in zip(made, asked, strict=True)]
        kept[5] = gather.with_lost(kept[5], lost)
        return StepOutput(*kept)
    if needs_grad:
        raise ValueError(
            "out: wanted no gradient beside out=, got an input that requires one; use torch.no_grad() or drop out="
        )
    slots = slots_of(names, out or {}, sample, reduce_index)  # nothing to differentiate: past autograd
    if rows is not None and not torch.compiler.is_compiling():
        for name, read in (("sample", source), ("velocity", velocity), ("uncond", uncond)):
            if read is not None and any(slot is not None and gather.share_memory(slot, read) for slot in slots):
                raise ValueError(
                    f"out: wanted memory of its own beside rows=, got some of {name}'s, which other rows may read"
                )
    stored = slots[0].dtype if slots[0] is not None else sample.dtype
    library.step_out(*arguments, stored, rescale, product_dtype, backend, rows, *slots)
    if lost is not None and slots[5] is not None:
        slots[5].add_(2 * lost.to(torch.int32))
    return StepOutput(*slots)


def wanted(want: Sequence[str] | None, out: Mapping[str, Tensor] | None, *, replay: bool) -> tuple[str, ...]:
    if want is None:
        want = tuple(out) if out is not None else ("log_prob",) if replay else ("next_sample", "log_prob")
    elif isinstance(want, str):
        want = (want,)
    for name in (*want, *(out or ())):
        if name not in OUTPUTS:
            raise ValueError(f"want: wanted names among {', '.join(OUTPUTS)}, got {name!r}")
    return tuple(want)


def slots_of(names: Sequence[str], out: Mapping[str, Tensor], sample: Tensor, reduce: int) -> list[Tensor | None]:
    """The given slots, checked, and fresh tensors for wanted outputs that have none."""
    fresh = [name in names and name not in out for name in OUTPUTS]
    made: list[Tensor | None] = [None] * len(OUTPUTS)
    if any(fresh):
        made = library.slots(sample, sample.dtype, reduce, fresh)
    whole = sample.shape
    for name, slot in out.items():
        per_row = name == "flags" or (name == "log_prob" and reduce != 2)
        made[OUTPUTS.index(name)] = checks.slot(name, slot, sample, whole[:1] if per_row else whole)
    return made


def _deterministic(at: At, coef: Tensor) -> bool:
    """Whether every std is known on the host to be 0."""
    if coef.device.type != "cpu":
        return bool((at.std == 0).all())
    return bool((coef[:, STD] == 0).all())


def draw(noise: Noise, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal draws [B, *shape]: a transition from zero with std 1."""
    batch = noise.seeds.shape[0]
    zero = torch.zeros((batch, *shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    coef = torch.zeros((1, COLUMNS), dtype=zero.dtype, device=device)
    coef[:, STD] = 1.0
    result = torch.empty_like(zero, dtype=dtype)
    seeds, counter = noise.counters(device)
    library.step_out(
        zero, zero, None, coef, None, None, seeds, counter, None, None, (1, 1, 1), noise.stream, noise.offset, 0, 0, True,
        dtype, "none", "float32", "auto", None, result, None, None, None, None, None,
    )  # fmt: skip
    return result
