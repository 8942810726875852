"""One process or several: what is summed over them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The processes that torchrun started, by itself or for `accelerate launch --multi_gpu`, or this one alone."""

    def __init__(self) -> None:
        self.launched = dist.is_available() and dist.is_torchelastic_launched()
        if self.launched:
            dist.init_process_group("gloo")
        self.rank = dist.get_rank() if self.launched else 0
        self.size = dist.get_world_size() if self.launched else 1
        self.group = dist.group.WORLD if self.launched else None
        self.local = dist.get_node_local_rank() if self.launched else 0

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """float64, over all processes, on the host."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        if self.launched:
            dist.all_reduce(total)
        return total

    def largest(self, value: float) -> float:
        """The largest of the processes' numbers."""
        table = torch.tensor(value, dtype=torch.float64)
        if self.launched:
            dist.all_reduce(table, dist.ReduceOp.MAX)
        return float(table)

    def close(self) -> None:
        if self.launched:
            dist.barrier()
            dist.destroy_process_group()


class NotFiniteError(ArithmeticError):
    """Training has come to numbers that are none."""


class Gradient:
    """The gradient of the global batch. Chunks are summed in float64 and rounded once, so that it does not matter which process
    had which chunk."""

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        self.total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)

    def add(self) -> None:
        """Moves what backward left in the parameters into the sum."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.total += torch.cat([part.flatten() for part in parts]).to("cpu", torch.float64)
        self.clear()

    def finish(self, largest: float, place: str) -> float:
        """Sums over the processes and gives the parameters their gradients; returns the norm before clipping.

        Raises NotFiniteError, on all processes and with the parameters as they were, for a norm that is NaN or infinite.
        """
        total = self.ranks.sum(self.total)
        norm = float(total.norm())
        if not math.isfinite(norm):
            raise NotFiniteError(f"{place}: wanted a finite gradient norm, got {norm}; a lower --lr may help")
        total *= min(1.0, largest / max(norm, 1e-30))
        parts = total.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device, parameter.dtype)
        self.total.zero_()
        return norm

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
