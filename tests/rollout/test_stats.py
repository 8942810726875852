"""What a rollout says about its cost, and the bar that shows it running."""

from __future__ import annotations

import io
import os
import pty
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout.networks import SHAPE, RowWise, conditions, seeds_of

SIGMAS = ff.sigma_schedule(4, shift=3.0)
NAP = 0.01


def roll(network: Any = None, **changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {"dense": ff.Completion(), "progress": False, **changes}
    return ff.rollout(
        network or RowWise(), SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(2), condition=conditions(), **arguments
    )


def mean(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


def test_seconds_by_stage_cover_the_wall_time() -> None:
    """Sleeps are lower bounds of their stage, whatever the machine does."""

    def network(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        time.sleep(NAP)
        return RowWise()(sample, sigma, condition)

    def decode(clean: Tensor, info: ff.Info) -> Tensor:
        time.sleep(2 * NAP)
        return clean

    def reward(images: Tensor, info: ff.Info) -> Tensor:
        time.sleep(3 * NAP)
        return mean(images, info)

    began = time.perf_counter()
    traj = roll(network, decode=decode, reward=reward, max_decode=10)
    wall = time.perf_counter() - began
    seconds = traj.stats.seconds
    assert set(seconds) == {"network", "step", "decode", "reward", "other"}
    assert seconds["network"] >= traj.stats.calls * NAP and traj.stats.calls == 7
    assert seconds["decode"] >= 3 * 2 * NAP and seconds["reward"] >= 3 * 3 * NAP
    assert min(seconds.values()) >= 0.0
    inside = (7 + 6 + 9) * NAP
    assert inside <= sum(seconds.values()) <= wall


def test_waiting_for_futures_is_reward_time() -> None:
    class Slow:
        def result(self) -> Tensor:
            time.sleep(5 * NAP)
            return torch.zeros(30)

    assert roll(reward=lambda images, info: Slow()).stats.seconds["reward"] >= 5 * NAP


def test_counts() -> None:
    guided = {"guidance": ff.CFG(2.0, calls=2), "negative": conditions(1, seed=1), "main_rows": 4}
    stats = roll(decode=lambda clean, info: clean, reward=mean, **guided).stats
    assert stats.evaluations == 6 * (4 + 6)
    assert stats.calls == 2 * (4 * 2 + 3)
    assert stats.padding == 4 * 2, "the second main call of a level holds two rows"
    assert stats.decodes == 30 and stats.widths == (4,)


def test_the_hash_stands_for_the_transitions() -> None:
    stats = roll().stats
    assert stats.schedule_hash == ff.FlowSDE(0.7).transitions(SIGMAS).hash
    assert roll(dense=None, lockstep="full").stats.schedule_hash == stats.schedule_hash
    assert roll(steps=[1]).stats.schedule_hash != stats.schedule_hash
    assert stats.as_dict()["schedule_hash"] == stats.schedule_hash


def run_on_a_terminal(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """What a rollout writes to stderr when that is a terminal."""
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.setenv("COLUMNS", "100")
            try:
                roll(**changes)
                stream.write("END")
                stream.flush()
            finally:
                monkeypatch.undo()
            text = b""
            while b"END" not in text:
                text += os.read(master, 4096)
    finally:
        os.close(master)
    return text.decode(errors="replace")


def test_a_bar_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run_on_a_terminal(monkeypatch, progress=True, reward=mean, max_decode=10)
    assert "rollout" in shown
    assert "10/10" in shown, "seven network calls and three reward batches, all of them done"


def test_no_bar_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_on_a_terminal(monkeypatch, progress=False).strip() == "END"
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    roll(progress=True)
    assert file.getvalue() == ""


def test_the_bar_leaves_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        if float(sigma[0]) < 0.8:
            raise ZeroDivisionError
        return RowWise()(sample, sigma, condition)

    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setenv("TERM", "xterm")
            with pytest.raises(ff.RolloutError):
                roll(network, progress=True)
            monkeypatch.undo()
            stream.write("END")
            stream.flush()
            text = b""
            while b"END" not in text:
                text += os.read(master, 4096)
    finally:
        os.close(master)
    assert text.count(b"\x1b[?25l") == text.count(b"\x1b[?25h") > 0, "the cursor is shown again"
