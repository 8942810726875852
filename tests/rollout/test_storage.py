"""Trajectories on disk: the same bits back, and a file that stood there survives a failed save."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastflow as ff
from tests.rollout.networks import SHAPE
from tests.rollout.test_trajectory import SIGMAS, assert_same, make, plain_reward

KINDS: dict[str, dict[str, Any]] = {
    "named rewards": {},
    "one reward": {"reward": plain_reward},
    "no reward": {"reward": None},
    "window": {"steps": [2, 3], "dense": ff.Completion(2, states="window")},
    "final alone": {"dense": None, "steps": []},
    "bfloat16": {"dynamics": ff.CPS(0.7), "steps": [0], "state_dtype": torch.bfloat16},
    "a part of a schedule": {
        "sigmas": ff.sub_grid(SIGMAS, 1, 3), "dynamics": ff.DanceSDE(0.3), "initial": torch.ones(6, *SHAPE)
    },
    "no rows": {"seeds": torch.zeros(0, dtype=torch.int64)},
}  # fmt: skip


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    traj = make(**changes)
    traj.save(tmp_path / "t.safetensors")
    loaded = ff.Trajectory.load(tmp_path / "t.safetensors")
    assert_same(loaded, traj)
    assert loaded.stats == traj.stats
    assert loaded.transitions.name == traj.transitions.name
    assert (loaded.sigmas.full is None) == (traj.sigmas.full is None)
    if traj.sigmas.full is not None:
        assert loaded.sigmas.full is not None and torch.equal(loaded.sigmas.full, traj.sigmas.full)
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_part_and_a_joined_trajectory_round_trip(tmp_path: Path) -> None:
    traj = make()
    for part in (traj[[4, 1]], ff.Trajectory.cat([traj[3:], traj[:3]])):
        part.save(str(tmp_path / "part"))
        assert_same(ff.Trajectory.load(str(tmp_path / "part")), part)


def test_save_replaces_and_obeys_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "t"
    make().save(path)
    second = make(seeds=torch.arange(6))
    second.save(path)
    assert_same(ff.Trajectory.load(path), second)
    (tmp_path / "ordinary").write_text("")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


FULL_DISK = """
import resource, signal, sys
import torch
from fastflow import Trajectory

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trajectory = Trajectory.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    trajectory.save(sys.argv[2])
except OSError as error:
    sys.stdout.write(str(error))
"""


def save_on_a_full_disk(source: Path, target: Path) -> str:
    """A process whose files may have 4 KB; returns the error's words."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    root = str(Path(ff.__file__).parents[1])
    command = [sys.executable, "-c", FULL_DISK, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=True)
    return done.stdout


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    make().save(tmp_path / "new")
    make(seeds=torch.arange(6)).save(tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    message = save_on_a_full_disk(tmp_path / "new", tmp_path / "old")
    assert "path: could not write" in message and f"MB to {tmp_path / 'old'}" in message
    assert "what stood there is unchanged" in message
    assert (tmp_path / "old").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    assert "nothing was left behind" in save_on_a_full_disk(tmp_path / "new", tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traj = make()
    traj.save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        traj.save(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("place", ["missing/t", "."])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="path: (could not write .* MB to|wanted a file to write or replace, got) "):
        make().save(tmp_path / place)
    assert os.listdir(tmp_path) == []


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, str(tmp_path / "weights"))
    with pytest.raises(
        ValueError, match=r"path: wanted a fastflow\.trajectory\.1 file, got .*weights with format None"
    ):
        ff.Trajectory.load(tmp_path / "weights")
    save_file({"weight": torch.ones(3)}, str(tmp_path / "weights"), {"format": "pt"})
    with pytest.raises(ValueError, match=r"with format 'pt'"):
        ff.Trajectory.load(tmp_path / "weights")
    (tmp_path / "text").write_text("no tensors here, only a few words of text")
    with pytest.raises(ValueError, match=r"path: wanted a whole fastflow\.trajectory\.1 file, got .*text"):
        ff.Trajectory.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="absent"):
        ff.Trajectory.load(tmp_path / "absent")


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    make().save(tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"path: wanted a whole fastflow\.trajectory\.1 file"):
        ff.Trajectory.load(tmp_path / "t")


def test_a_link_stays_and_only_files_are_replaced(tmp_path: Path) -> None:
    link, real = tmp_path / "latest", tmp_path / "run7.safetensors"
    link.symlink_to(real)
    trajectory = make()
    trajectory.save(link)
    assert link.is_symlink() and real.is_file()
    assert_same(ff.Trajectory.load(link), trajectory)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="path: wanted a file to write or replace, got .*pipe"):
        trajectory.save(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="path: wanted a .* file, got .*, which is no file"):
        ff.Trajectory.load(tmp_path)
