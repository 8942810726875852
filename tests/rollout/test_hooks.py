"""Decode and reward: what they are given, in which portions, and what may come back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout.networks import SHAPE, RowWise, conditions

SIGMAS = ff.sigma_schedule(4, shift=3.0)
INDEX = torch.tensor([2, 0, 1])


def roll(**changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {"dense": ff.Completion(), "progress": False, **changes}
    return ff.rollout(
        RowWise(),
        SHAPE,
        SIGMAS,
        ff.FlowSDE(0.7),
        torch.tensor([7, 8, 9]),
        condition=conditions(),
        prompt_index=INDEX,
        **arguments,
    )


def mean(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


class Hooks:
    """Keeps what decode and reward were given; images are twice as wide as clean samples."""

    def __init__(self) -> None:
        self.clean: list[Tensor] = []
        self.infos: list[ff.Info] = []
        self.images: list[Tensor] = []

    def decode(self, clean: Tensor, info: ff.Info) -> Tensor:
        self.clean.append(clean.clone())
        self.infos.append(info)
        return torch.cat([clean, clean], -1)

    def reward(self, images: Tensor, info: ff.Info) -> Tensor:
        self.images.append(images.clone())
        assert info is self.infos[-1]
        return images[:, 1, 2, 3]


@pytest.mark.parametrize("max_decode", [None, 1, 4, 100])
def test_hooks_see_every_clean_sample_once_in_bounded_portions(max_decode: int | None) -> None:
    hooks = Hooks()
    traj = roll(decode=hooks.decode, reward=hooks.reward, max_decode=max_decode)
    sizes = [len(clean) for clean in hooks.clean]
    assert sum(sizes) == 15 and max(sizes) <= (max_decode or 15)
    assert len(sizes) == -(-15 // (max_decode or 15)), "no more portions than needed"
    assert traj.stats.decodes == 15
    seen = set()
    for clean, info, images in zip(hooks.clean, hooks.infos, hooks.images, strict=True):
        assert len(info) == len(clean) and images.shape == (len(clean), *SHAPE[:2], 2 * SHAPE[2])
        for name in ("prompt_index", "sample_index", "position"):
            values = getattr(info, name)
            assert values.dtype == torch.int64 and values.device.type == "cpu" and values.shape == (len(clean),)
        assert torch.equal(info.prompt_index, INDEX[info.sample_index])
        for x, sample, position in zip(clean, info.sample_index.tolist(), info.position.tolist(), strict=True):
            assert traj.clean is not None and torch.equal(x, traj.clean[sample, position])
            seen.add((sample, position))
    assert seen == {(b, i) for b in range(3) for i in range(5)}
    assert traj.clean is not None and torch.equal(traj.rewards, traj.clean[:, :, 1, 2, 3])  # type: ignore[arg-type]


def test_shared_completions_are_decoded_once() -> None:
    hooks = Hooks()
    traj = roll(decode=hooks.decode, reward=hooks.reward, steps=[2])
    assert traj.stats.decodes == 6 and traj.states == (0, 1, 2, 3, 4)
    assert traj.rewards.shape == (3, 5)  # type: ignore[union-attr]
    assert torch.equal(traj.rewards[:, :3], traj.rewards[:, 2:3].expand(3, 3))  # type: ignore[index]
    assert torch.equal(traj.gains[:, [0, 1, 3]], torch.zeros(3, 3))  # type: ignore[index]


def test_without_decode_the_reward_gets_clean_samples() -> None:
    shapes = []

    def reward(images: Tensor, info: ff.Info) -> Tensor:
        shapes.append(tuple(images.shape))
        return mean(images, info)

    traj = roll(reward=reward, dense=None)
    assert shapes == [(3, *SHAPE)] and traj.stats.decodes == 0
    assert traj.rewards.shape == (3, 1) and traj.gains.shape == (3, 0)  # type: ignore[union-attr]


def test_hooks_may_write_into_what_they_are_given() -> None:
    def spoil(images: Tensor, info: ff.Info) -> Tensor:
        return images.zero_().flatten(1).mean(1)

    wanted, traj = roll(reward=mean), roll(reward=spoil)
    assert torch.equal(traj.clean, wanted.clean) and torch.equal(traj.final, wanted.final)  # type: ignore[arg-type]
    traj = roll(reward=mean, decode=lambda clean, info: clean.div_(2.0))
    assert torch.equal(traj.clean, wanted.clean)  # type: ignore[arg-type]


def test_hooks_run_without_gradients() -> None:
    def reward(images: Tensor, info: ff.Info) -> Tensor:
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return mean(images, info)

    with torch.inference_mode():
        roll(reward=reward)
    weight = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        traj = roll(reward=lambda images, info: (mean(images, info) * weight).detach().requires_grad_())
    assert not traj.rewards.requires_grad  # type: ignore[union-attr]


FORMS: dict[str, Any] = {
    "tensor": lambda m: m,
    "column": lambda m: m[:, None],
    "float64": lambda m: m.double(),
    "list": lambda m: m.tolist(),
    "tuple": lambda m: tuple(m.tolist()),
    "numpy": lambda m: m.numpy().astype(np.float64),
    "scalars": lambda m: list(m.unbind()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_a_reward(form: Any) -> None:
    traj = roll(reward=lambda images, info: form(mean(images, info)), max_decode=4)
    wanted = roll(reward=mean).rewards
    assert isinstance(traj.rewards, Tensor) and traj.rewards.dtype == torch.float32
    assert torch.equal(traj.rewards, wanted)  # type: ignore[arg-type]


def test_whole_numbers_and_truth_values_are_rewards() -> None:
    for dtype in (torch.int64, torch.bool):
        traj = roll(reward=lambda images, info, d=dtype: (info.position > 2).to(d))
        assert traj.rewards.tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]] * 3  # type: ignore[union-attr]
        assert traj.gains.tolist() == [[0.0, 0.0, 1.0, 0.0]] * 3  # type: ignore[union-attr]


def test_named_rewards() -> None:
    traj = roll(reward=lambda images, info: {"mean": mean(images, info), "place": info.position.float()}, max_decode=4)
    assert isinstance(traj.rewards, dict) and set(traj.rewards) == {"mean", "place"}
    assert traj.rewards["place"].tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 3
    assert torch.equal(traj.rewards["mean"], roll(reward=mean).rewards)  # type: ignore[arg-type]


@pytest.mark.parametrize("named", [False, True])
def test_futures_are_read_at_the_end(named: bool) -> None:
    """Every reward is asked for before the first one is waited for."""
    asked: list[int] = []
    all_asked = threading.Event()

    def later(images: Tensor, info: ff.Info) -> Any:
        assert all_asked.wait(20.0), "the engine waited for one reward before it asked for the next"
        return {"mean": mean(images, info)} if named else mean(images, info)

    with ThreadPoolExecutor(4) as pool:

        def reward(images: Tensor, info: ff.Info) -> Any:
            asked.append(len(info))
            if len(asked) == 4:
                all_asked.set()
            return pool.submit(later, images, info)

        traj = roll(reward=reward, max_decode=4)
    wanted = roll(reward=mean).rewards
    assert torch.equal(traj.rewards["mean"] if named else traj.rewards, wanted)  # type: ignore[arg-type, index]
    assert asked == [4, 4, 4, 3]


def test_some_futures_and_some_numbers() -> None:
    with ThreadPoolExecutor(1) as pool:

        def reward(images: Tensor, info: ff.Info) -> Any:
            return pool.submit(mean, images, info) if int(info.position[0]) % 2 else mean(images, info)

        assert torch.equal(roll(reward=reward, max_decode=3).rewards, roll(reward=mean).rewards)  # type: ignore[arg-type]
