"""Stands where CUDA graphs stand, on the CPU: records each operation with the tensors and numbers it met, and repeats them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero")


class Recording(TorchDispatchMode):
    """Operations in order: (function, arguments, keyword arguments, results that are no view of an argument)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(HOST_READS):
            raise RuntimeError(f"{func} reads from the device while its work is recorded")
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [
            t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        self.operations.append((func, args, kwargs or {}, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.operations:
            again = func(*args, **kwargs)
            if fresh:
                results = [t for t in tree_leaves(again) if isinstance(t, Tensor)]
                for kept, new in zip(fresh, results, strict=True):
                    kept.copy_(new)


class Tape:
    """A capturer. `attempts` and `captures` count; `fails`: raise as a device does that cannot capture."""

    def __init__(self, fails: str | None = None) -> None:
        self.attempts, self.captures, self.fails = 0, 0, fails

    def refuse(self, device: torch.device) -> str | None:
        return None

    def capture(self, body: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.attempts += 1
        if self.fails is not None:
            raise RuntimeError(self.fails)
        self.captures += 1
        body()  # as a warm-up does
        recording = Recording()
        with recording:
            body()
        return recording.replay
