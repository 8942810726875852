"""What records a network call and its step on a CUDA device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class CudaGraphs:
    """CUDA graphs, all in one memory pool: they never run at the same time.

    Warm-up and capture share a stream of their own, so that what libraries keep for a stream lies outside the pool.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None
        self.live: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def refuse(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and this rollout is on {device}"
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            return "autocast keeps a cache of weights that a graph would outlive; use torch.autocast(..., cache_enabled=False)"
        return None

    def capture(self, body: Callable[[], None], device: torch.device) -> Callable[[], None]:
        with torch.cuda.device(device):
            graph = self._capture(body)

        def on_device() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return on_device

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        before = torch.cuda.current_stream()
        if self.stream is None or self.stream.device != before.device:
            self.stream = torch.cuda.Stream()
        if not self.live:  # torch takes no handle again whose graphs are all gone
            self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(before)
        try:
            with torch.cuda.stream(self.stream):
                body()  # libraries choose algorithms and allocate their workspaces
                with _refusing_to_wait():
                    body()
        finally:
            before.wait_stream(self.stream)  # what was begun reads memory that is freed next
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):  # torch.cuda.graph would not leave it after a capture that fails
            try:
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                body()
                graph.capture_end()
                self.live.add(graph)
            finally:
                if graph not in self.live:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    settle(self.stream.device, self.pool)
        return graph


def settle(device: torch.device, pool: Any) -> None:
    """Ends what torch may leave on after a capture into `pool` that failed."""
    for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # the second one before torch 2.8
        end = getattr(torch._C, name, None)
        if end is not None:
            with suppress(RuntimeError):  # allocations no longer go there
                end(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
            break
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.Stream(device)):
        graph = torch.cuda.CUDAGraph()  # the random generator counts itself captured until a capture ends well
        graph.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """What makes the host wait raises here, with better words than in a capture and nothing to clean up. The switch is the
    process's, so that it is left alone where another thread may be waiting for the device."""
    if threading.active_count() > 1:
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
