"""What a capture leaves behind, with stand-ins for torch.cuda: streams, memory pools, and a capture that fails."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fastflow.rollout.cuda_graphs import CudaGraphs

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, device: torch.device = DEVICE) -> None:
        self.device, self.waited = device, 0

    def wait_stream(self, other: Any) -> None:
        self.waited += 1


class Cuda:
    """torch.cuda as captures meet it. A handle whose graphs are gone is refused, as its allocator does."""

    def __init__(self) -> None:
        self.current, self.capturing, self.mode, self.handles = Stream(), False, 0, 0
        self.drawing_is_captured = False  # of the random generator, until a capture ends well
        self.users: dict[int, int] = {}
        self.ended: list[Any] = []
        self.released: list[Any] = []
        self.log: list[str] = []

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def set_mode(self, mode: Any) -> None:
        self.mode = mode


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    state = Cuda()

    class Graph:
        """begun; replays: how often."""

        def __init__(self) -> None:
            self.pool: Any = None
            self.replays = 0

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            assert state.users.get(pool, 1) > 0, "use_count > 0"
            state.users[pool] = state.users.get(pool, 0) + 1
            self.pool, state.capturing, state.drawing_is_captured = pool, True, True
            state.log.append(capture_error_mode)

        def capture_end(self) -> None:
            if not state.capturing:
                raise RuntimeError("operation failed due to a previous error during capture")
            state.capturing = state.drawing_is_captured = False

        def replay(self) -> None:
            self.replays += 1

        def __del__(self) -> None:
            if self.pool is not None:
                state.users[self.pool] -= 1

    fakes: dict[str, Any] = {
        "Stream": Stream, "CUDAGraph": Graph, "current_stream": lambda: state.current, "stream": state.stream,
        "graph_pool_handle": state.handle, "device": lambda device: nullcontext(), "synchronize": lambda: None,
        "empty_cache": lambda: None, "get_sync_debug_mode": lambda: state.mode, "set_sync_debug_mode": state.set_mode,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: state.ended.append((device, pool)), raising=False
    )
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: state.released.append(pool), raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    return state


def body_on(cuda: Cuda, seen: list[tuple[Stream, bool, Any]]) -> Callable[[], None]:
    return lambda: seen.append((cuda.current, cuda.capturing, cuda.mode))


def test_warm_up_and_capture_share_a_stream_of_their_own(cuda: Cuda) -> None:
    before, graphs, seen = cuda.current, CudaGraphs(), []
    for _ in range(2):
        graphs.capture(body_on(cuda, seen), DEVICE)
    assert {id(stream) for stream, *_ in seen} == {id(graphs.stream)} != {id(before)}
    assert [(capturing, mode) for _, capturing, mode in seen[:3]] == [(False, 0), (False, "error"), (True, 0)]
    assert cuda.current is before and cuda.mode == 0 and cuda.log == ["thread_local"] * 2


def test_graphs_share_a_pool_while_there_are_any(cuda: Cuda) -> None:
    graphs = CudaGraphs()
    kept = [graphs.capture(lambda: None, DEVICE) for _ in range(3)]
    assert cuda.handles == 1 and cuda.users == {1: 3}
    kept.clear()
    gc.collect()
    assert cuda.users == {1: 0}
    again = graphs.capture(lambda: None, DEVICE)
    assert cuda.handles == 2 and cuda.users == {1: 0, 2: 1}
    again()


def test_another_device_has_another_stream(cuda: Cuda) -> None:
    graphs = CudaGraphs()
    graphs.capture(lambda: None, DEVICE)
    first, cuda.current = graphs.stream, Stream(torch.device("cuda", 1))
    kept = graphs.stream
    graphs.capture(lambda: None, torch.device("cuda", 1))
    assert graphs.stream is not first and kept is first


def test_what_waits_is_found_before_the_capture(cuda: Cuda) -> None:
    def body() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    before = cuda.current
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaGraphs().capture(body, DEVICE)
    assert cuda.current is before and cuda.mode == 0 and not cuda.log and not cuda.users
    assert before.waited == 1, "for what was begun"


def test_other_threads_may_wait_meanwhile(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    seen: list[Any] = []
    CudaGraphs().capture(body_on(cuda, seen), DEVICE)
    assert [mode for *_, mode in seen] == [0, 0, 0]


@pytest.mark.parametrize("where", ["in the body", "at its end"])
def test_a_capture_that_fails_leaves_nothing_on(cuda: Cuda, where: str) -> None:
    def body() -> None:
        if cuda.capturing:
            cuda.capturing = False  # as the driver does
            if where == "in the body":
                raise RuntimeError("operation not permitted when stream is capturing")

    before, graphs = cuda.current, CudaGraphs()
    words = "not permitted" if where == "in the body" else "previous error during capture"
    with pytest.raises(RuntimeError, match=words):
        graphs.capture(body, DEVICE)
    assert cuda.current is before and cuda.ended == [(0, 1)] and cuda.released == [1] and not graphs.live
    assert not cuda.capturing and not cuda.drawing_is_captured
    handles = cuda.handles
    graphs.capture(lambda: None, DEVICE)
    assert cuda.handles == handles + 1, "torch takes no handle again whose graphs are all gone"
