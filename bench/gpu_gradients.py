"""The gradient of a log-probability and the losses on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import log_prob_backward, matching, policy
from .gpu_run import Case, Way
from .registry import Entry, Shape

SHAPES = (
    (512, 16, 64, 64),
    (24, 16, 64, 64),
)  # one that moves 470 MB at least, by which it is judged; a flow_grpo batch
EAGER = "eager"
BENCHMARKS: dict[str, Any] = {"log_prob_backward": log_prob_backward, "policy": policy, "matching": matching}


def cases(
    benchmark: str, device: torch.device, backends: Sequence[str], shapes: Sequence[Shape] = SHAPES
) -> Iterator[Case]:
    module = BENCHMARKS[benchmark]
    for shape in shapes:
        yield _case(module, shape, device, backends)


def _case(module: Any, shape: Shape, device: torch.device, backends: Sequence[str]) -> Case:
    entry: Entry = module.ENTRY

    def against_all(data: Any) -> None:
        for backend in backends:
            module.check(data, backend, ())

    return Case(
        entry.name,
        "fp32 states, bf16 velocities",
        shape,
        lambda number: module.inputs(shape, device, number),
        sum(spec.nbytes for name, spec in entry.specs(shape).items() if not name.endswith("_again")),
        lambda: ways(entry, shape, backends),
        against_all,
    )


def ways(entry: Entry, shape: Shape, backends: Sequence[str]) -> list[Way]:
    made = []
    for v in entry.variants:
        if not v.touches:
            made.append(Way(v.name, lambda data, v=v: v.make(data, ""), public=lambda data, v=v: v.make(data, "")))  # type: ignore[misc]
            continue
        for backend in backends:

            def call(data: Any, v: Any = v, backend: str = backend) -> Any:
                return v.make(data, backend)

            made.append(
                Way(
                    f"{v.name}, {backend}", call, backend, entry.bytes_moved(v, shape), v.against,
                    call if v.against else None, peak=True,
                )  # fmt: skip
            )  # fmt: skip
    return made
