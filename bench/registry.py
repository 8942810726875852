"""What a benchmark is: inputs, the bytes it must move, what is compared, and the check without which no speed is reported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Inputs = Mapping[str, Any]
Call = Callable[[], Any]

MODULES = ("step", "launch", "log_prob_backward", "policy", "matching", "rollout")  # of bench/, each with its ENTRY


class Mismatch(Exception):
    """A variant and the reference disagree: there is no speed to report."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a call reads or writes once."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Variant:
    """One way of doing the work.

    make:    (inputs, backend) -> the call to time. Compiling and loading happen in it or in the call's warm-up.
    touches: names of the specs that it must read or write once; empty for a baseline.
    against: the baselines that it is compared with.
    """

    name: str
    make: Callable[[Inputs, str], Call]
    touches: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A benchmark.

    shapes:    the shapes it runs at by default; the first is the quickest.
    inputs:    shape -> tensors and settings by name.
    specs:     shape -> the tensors that count as traffic, by name.
    variants:  what is timed, in interleaved rounds.
    check:     (inputs, backend, names of the variants to be timed) -> None. Raises Mismatch; runs before any timing.
    gate:      the pytest file (or folder) that must be green for a speed to count; `--verify` runs it.
    repeats:   rounds by default.
    calls:     calls per reading of the clock, for calls of microseconds.
    """

    name: str
    about: str
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape], Inputs]
    specs: Callable[[Shape], Mapping[str, TensorSpec]]
    variants: tuple[Variant, ...]
    check: Callable[[Inputs, str, Sequence[str]], None]
    gate: str
    repeats: int
    calls: int = 1

    def bytes_moved(self, variant: Variant, shape: Shape) -> int:
        """Bytes that the variant must read and write at this shape, each tensor once."""
        specs = self.specs(shape)
        return sum(specs[name].nbytes for name in variant.touches)

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)


def entry(name: str) -> Entry:
    """The benchmark of that name. Raises ValueError."""
    if name not in MODULES:
        raise ValueError(f"benchmark: wanted one of {', '.join(MODULES)}, got {name!r}")
    found: Entry = importlib.import_module(f"bench.{name}").ENTRY
    return found


def entries() -> list[Entry]:
    return [entry(name) for name in MODULES]


def compare(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    """Raises Mismatch where a difference exceeds `bound` times the largest expected value (0: where a bit differs)."""
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    error = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    if actual.shape != expected.shape or not error <= bound * scale:
        raise Mismatch(f"{name}: off by {error:.3g} where the largest value is {scale:.3g}; allowed {bound:.1g} of it")
