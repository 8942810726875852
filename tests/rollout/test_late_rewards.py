"""Rewards that come later than the call: None, Futures of threads and processes, numbers on a device; and what is left when
one of them fails."""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.rollout.finish import Scores
from tests.rewards.judging import dying, scores
from tests.rewards.rollouts import BATCH, STATES, assert_equal_rewards, local, roll

MISSING = "(sample, state) [(0, 2), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2)]"


def mean(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


def assert_all_but_state_2(partial: ff.Trajectory) -> None:
    """Nothing else is lost, and `set_rewards` makes the rest whole."""
    whole = roll(local)
    for name in ("samples", "log_probs", "final", "clean"):
        assert torch.equal(getattr(partial, name), getattr(whole, name)), name
    assert isinstance(partial.rewards, dict) and isinstance(whole.rewards, dict) and partial.clean is not None
    with pytest.raises(ValueError, match=re.escape(f"wanted finite numbers, got nan for {MISSING}; score these too")):
        partial.set_rewards(partial.rewards)
    repaired = {}
    for name, values in partial.rewards.items():
        missing = values.isnan()
        assert missing.nonzero().tolist() == [[b, 2] for b in range(BATCH)]
        repaired[name] = values.clone()
        repaired[name][missing] = torch.tensor(scores(partial.clean[missing].numpy())[name])
    assert_equal_rewards(partial.set_rewards(repaired), whole)


def test_none_leaves_the_rewards_to_the_host() -> None:
    asked: list[tuple[Tensor, ff.Info]] = []

    def reward(images: Tensor, info: ff.Info) -> None:
        asked.append((images, info))

    traj, whole = roll(reward), roll(mean)
    assert traj.rewards is None and traj.gains is None and len(asked) == STATES
    rewards = torch.empty(BATCH, STATES)
    for images, info in asked:
        rewards[info.sample_index, info.position] = mean(images, info)
    later = traj.set_rewards(rewards)
    assert torch.equal(later.rewards, whole.rewards) and torch.equal(later.gains, whole.gains)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["numbers", "named", "future"])
def test_none_for_some_and_numbers_for_others(form: str) -> None:
    def reward(images: Tensor, info: ff.Info) -> Any:
        if int(info.position[0]) == 2:
            return None
        if form == "future":
            future: Future[Any] = Future()
            future.set_result(mean(images, info))
            return future
        return mean(images, info) if form == "numbers" else {"a": mean(images, info)}

    wanted = "reward: wanted numbers in every call, or None in every call and traj.set_rewards(R) later, got None for "
    with pytest.raises(ff.RolloutError, match=re.escape(wanted + MISSING)) as caught:
        roll(reward)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_futures_of_processes(pool: ProcessPoolExecutor) -> None:
    assert_equal_rewards(roll(lambda images, info: pool.submit(scores, images.numpy())), roll(local))


def test_a_future_for_each_name() -> None:
    """Two judges with a pool each, and one that answers at once."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        def reward(images: Tensor, info: ff.Info) -> dict[str, Any]:
            return {
                "mean": first.submit(lambda: scores(images.numpy())["mean"]),
                "edges": second.submit(lambda: scores(images.numpy())["edges"]),
                "place": info.position,
            }

        traj = roll(reward)
    assert isinstance(traj.rewards, dict) and set(traj.rewards) == {"mean", "edges", "place"}
    assert all(torch.equal(traj.rewards[name], values) for name, values in roll(local).rewards.items())  # type: ignore[union-attr]


def test_a_process_that_dies() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def reward(images: Tensor, info: ff.Info) -> Any:
            if int(info.position[0]) != 2:
                return local(images, info)
            return pool.submit(dying, images.numpy(), True)

        with pytest.raises(ff.RolloutError, match=re.escape(f"reward for {MISSING}: BrokenProcessPool: ")) as caught:
            roll(reward)
    assert "without rewards of 6 of 24 images" in str(caught.value) and ".partial.set_rewards(R)" in str(caught.value)
    assert_all_but_state_2(caught.value.partial)


TROUBLE: dict[str, tuple[Any, str]] = {
    "cancelled": (Future.cancel, "CancelledError"),
    "raises": (lambda future: future.set_exception(ConnectionError("away")), "ConnectionError: away"),
    "exits": (lambda future: future.set_exception(SystemExit(3)), "SystemExit: 3"),
}


@pytest.mark.parametrize(("trouble", "message"), TROUBLE.values(), ids=TROUBLE)
def test_a_future_in_trouble_names_its_rows(trouble: Any, message: str) -> None:
    def reward(images: Tensor, info: ff.Info) -> Any:
        future: Future[Any] = Future()
        if int(info.position[0]) == 2:
            trouble(future)
        else:
            future.set_result(local(images, info))
        return future

    with pytest.raises(
        ff.RolloutError, match=re.escape(f"waiting for rewards: RuntimeError: reward for {MISSING}: {message}")
    ) as caught:
        roll(reward)
    assert_all_but_state_2(caught.value.partial)


class Handle:
    """A future of another kind: all it has is a result."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        if self.value is None:
            raise TimeoutError("no answer in 60 s")
        return self.value


def test_anything_with_a_result() -> None:
    assert_equal_rewards(roll(lambda images, info: Handle(local(images, info))), roll(local))

    def reward(images: Tensor, info: ff.Info) -> Handle:
        return Handle(None if int(info.position[0]) == 2 else local(images, info))

    with pytest.raises(
        ff.RolloutError, match=re.escape(f"reward for {MISSING}: TimeoutError: no answer in 60 s")
    ) as caught:
        roll(reward)
    assert_all_but_state_2(caught.value.partial)


def test_one_name_of_several_fails() -> None:
    def reward(images: Tensor, info: ff.Info) -> dict[str, Any]:
        found = local(images, info)
        return {"mean": found["mean"], "edges": Handle(None if int(info.position[0]) == 2 else found["edges"])}

    with pytest.raises(ff.RolloutError, match=re.escape(f"reward 'edges' for {MISSING}: TimeoutError")) as caught:
        roll(reward)
    rewards, wanted = caught.value.partial.rewards, roll(local).rewards
    assert torch.equal(rewards["mean"], wanted["mean"])  # type: ignore[index]
    assert rewards["edges"].isnan().nonzero().tolist() == [[b, 2] for b in range(BATCH)]


def test_several_failures_are_counted() -> None:
    with pytest.raises(
        ff.RolloutError, match=r"RuntimeError: reward for .*\(5, 0\)\]: TimeoutError: .*; 3 more reward calls failed"
    ):
        roll(lambda images, info: Handle(None))


def test_a_reward_that_raises_keeps_the_futures_of_the_others() -> None:
    """They are still computed when it raises: the error waits for them."""
    raised = threading.Event()

    def later(images: Tensor, info: ff.Info) -> dict[str, Tensor]:
        assert raised.wait(20.0)
        return local(images, info)

    with ThreadPoolExecutor(2) as pool:

        def reward(images: Tensor, info: ff.Info) -> Any:
            if int(info.position[0]) == 3:
                raised.set()
                raise ConnectionError("the judge is away")
            return pool.submit(later, images, info)

        with pytest.raises(
            ff.RolloutError, match=r"reward of rows 18 to 23: ConnectionError: .*6 of 24 images"
        ) as caught:
            roll(reward)
    rewards, wanted = caught.value.partial.rewards, roll(local).rewards
    for name, values in rewards.items():
        assert torch.equal(values[:, :3], wanted[name][:, :3]) and values[:, 3].isnan().all()  # type: ignore[index]


def test_ctrl_c_while_waiting_keeps_the_rewards_that_are_there() -> None:
    class Interrupting(Handle):
        def result(self) -> Any:
            raise KeyboardInterrupt

    later: list[Future[Any]] = []

    def reward(images: Tensor, info: ff.Info) -> Any:
        position = int(info.position[0])
        if position == 1:
            return Interrupting(None)
        later.append(Future())
        if position != 2:
            later[-1].set_result(local(images, info))
        return later[-1]

    with pytest.raises(KeyboardInterrupt, match=r"without rewards of 12 of 24 images") as caught:
        roll(reward)
    rewards, wanted = caught.value.partial.rewards, roll(local).rewards  # type: ignore[attr-defined]
    for name, values in rewards.items():
        assert torch.equal(values[:, [0, 3]], wanted[name][:, [0, 3]]) and values[:, [1, 2]].isnan().all()  # type: ignore[index]
    assert later[1].cancelled() and not later[2].cancelled()


def test_out_of_memory_in_a_future_names_the_knob() -> None:
    future: Future[Any] = Future()
    future.set_exception(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ff.RolloutError, match=r"waiting for rewards: lower max_decode"):
        roll(lambda images, info: future)


def test_numbers_on_a_device_are_not_read_by_the_call_that_brings_them() -> None:
    """A meta tensor cannot be read: it fails at the end, with every other call made."""
    calls: list[int] = []

    def reward(images: Tensor, info: ff.Info) -> dict[str, Tensor]:
        calls.append(int(info.position[0]))
        return {name: values.to("meta") if calls[-1] == 2 else values for name, values in local(images, info).items()}

    with pytest.raises(ff.RolloutError, match="waiting for rewards: .*meta") as caught:
        roll(reward)
    assert calls == [0, 1, 2, 3]
    assert_all_but_state_2(caught.value.partial)


def test_a_wrong_shape_on_a_device_is_refused_at_once() -> None:
    with pytest.raises(
        ff.RolloutError, match=r"reward of rows 0 to 5: ValueError: reward: wanted 6 numbers, .* got shape \(2,\)"
    ):
        roll(lambda images, info: torch.zeros(2, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", ["tensor", "list"])
def test_numbers_on_a_gpu_are_kept_without_waiting(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last call is made; only then are they read."""
    buffer = torch.empty(BATCH, device="cuda")

    def reward(images: Tensor, info: ff.Info) -> Any:
        numbers = mean(images, info).cuda()
        torch.cuda.set_sync_debug_mode("error")
        buffer.copy_(numbers)  # one buffer for all calls, as a captured graph has
        return buffer if form == "tensor" else list(buffer.unbind())

    def decode(clean: Tensor, info: ff.Info) -> Tensor:
        torch.cuda.set_sync_debug_mode("default")
        return clean

    def settle(scores: Scores, of: Callable[[Scores], None] = Scores.settle) -> None:
        torch.cuda.set_sync_debug_mode("default")
        of(scores)

    monkeypatch.setattr(Scores, "settle", settle)
    try:
        traj = roll(reward, decode=decode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(traj.rewards, roll(mean).rewards)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_default_dtype_of_the_host_rounds_nothing(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        traj = roll(lambda images, info: [0.1] * BATCH, device="cpu")
        later = traj.set_rewards([[0.1] * STATES] * BATCH)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(traj.rewards, torch.full((BATCH, STATES), 0.1))  # type: ignore[arg-type]
    assert torch.equal(later.rewards, torch.full((BATCH, STATES), 0.1))  # type: ignore[arg-type]


def test_set_rewards_takes_what_a_host_has() -> None:
    traj, table = roll(lambda images, info: None), np.random.default_rng(0).random((BATCH, STATES))
    wanted = torch.from_numpy(table).float()
    forms = (
        table,
        table.tolist(),
        torch.from_numpy(table),
        wanted.clone().requires_grad_(),
        table.astype(np.float32)[:, ::1],
    )
    for form in forms:
        found = traj.set_rewards(form).rewards
        assert isinstance(found, Tensor) and torch.equal(found, wanted)
        assert found.dtype == torch.float32 and not found.requires_grad
    named = traj.set_rewards({"a": table, "b": wanted})
    assert isinstance(named.rewards, dict) and torch.equal(named.rewards["a"], wanted)
    before = wanted.clone()
    wanted.zero_()
    assert torch.equal(named.rewards["b"], before), "a later write of the host changes nothing"


def test_set_rewards_refuses_what_is_none() -> None:
    traj = roll(lambda images, info: None)
    table = torch.zeros(BATCH, STATES)
    table[3, 2] = float("inf")
    for rewards, kind, message in (
        (table, ValueError, r"rewards: wanted finite numbers, got inf for \(sample, state\) \[\(3, 2\)\]"),
        ({"a": table}, ValueError, r"rewards\['a'\]: wanted finite numbers, got inf"),
        (table[:, 1:], ValueError, r"rewards: wanted \[6, 4\], got \(6, 3\)"),
        ({}, ValueError, r"rewards: wanted .*, got no name"),
        (None, TypeError, r"rewards: wanted \[6, 4\] numbers, got NoneType"),
        ("good", TypeError, r"rewards: wanted \[6, 4\] numbers, got str"),
        ([["good"] * STATES] * BATCH, TypeError, r"rewards: wanted \[6, 4\] numbers, got list"),
        (
            torch.zeros(BATCH, STATES, dtype=torch.complex64),
            TypeError,
            "rewards: wanted real numbers, got torch.complex64",
        ),
    ):
        with pytest.raises(kind, match=message):
            traj.set_rewards(rewards)


COMPLEX = torch.zeros(BATCH, dtype=torch.complex64)


@pytest.mark.parametrize(
    "values", ["words", b"bytes", COMPLEX, [object()] * BATCH, [torch.zeros(()), torch.zeros(2)] * 3]
)
def test_what_is_no_number_is_refused_in_words(values: Any) -> None:
    with pytest.raises(
        ff.RolloutError, match=r"TypeError: reward: wanted \[6\] numbers, \{name: \[6\]\}, a Future or None, got"
    ):
        roll(lambda images, info: values)
