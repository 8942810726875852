"""The registry through pytest-benchmark: `pytest bench`, with its options (--benchmark-save, --benchmark-compare, ...).

Each variant at the entry's first shape, after the entry's check. Not part of the tests: nothing here can fail but the check.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench import registry, run
from bench.registry import Entry, Inputs, Variant
from fastflow import backends

CASES = [pytest.param(entry, v, id=f"{entry.name}-{v.name}") for entry in registry.entries() for v in entry.variants]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def backend() -> str:
    return "reference" if backends.unavailable("cpu") else "cpu"


@cache
def checked_inputs(entry: Entry) -> Inputs:
    """The inputs at the first shape, on which the variants have been found to agree."""
    inputs = entry.inputs(entry.shapes[0])
    entry.check(inputs, backend(), [v.name for v in entry.variants])
    return inputs


@pytest.mark.parametrize(("entry", "variant"), CASES)
def test_variant(benchmark: Any, entry: Entry, variant: Variant) -> None:
    shape = entry.shapes[0]
    call = variant.make(checked_inputs(entry), backend())
    benchmark.group = f"{entry.name}, {run.show(shape)}, {run.threads_in_words(torch.get_num_threads())}, {backend()}"
    benchmark.extra_info["bytes moved"] = entry.bytes_moved(variant, shape)
    benchmark(call)
