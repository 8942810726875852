"""The demonstration as a whole, small, and the scripts in examples/."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastflow as ff
from fastflow.demo.run import DigitsRollout, run_digits

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompts_by_number(demo_packages: None) -> None:
    assert DigitsRollout(prompts=12).digits == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert DigitsRollout(prompts=(7, 7)).digits == [7, 7]


def test_run_writes_everything(demo_packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory = run_digits(tmp_path / "out", prompts=[3, 8], group=2, steps=3, progress=False, command="the command")
    assert trajectory.clean.shape == (4, 4, 1, 8, 8)
    assert trajectory.stats.evaluations == 4 * 6
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"clean.png", "final.png", "report.html", "rewards.png", "trajectory.safetensors"}
    again = ff.Trajectory.load(tmp_path / "out" / "trajectory.safetensors")
    assert torch.equal(again.rewards, trajectory.rewards) and torch.equal(again.samples, trajectory.samples)
    printed = capsys.readouterr().out
    for wanted in ("Where the time went", "Reward by state", "report.html", "network calls"):
        assert wanted in printed
    assert "the command" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_loses_nothing(
    demo_packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastflow.demo import run

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_report", full)
    with pytest.raises(OSError, match="No space left"):
        run.run_digits(tmp_path, prompts=[3], group=2, steps=2, progress=False)
    assert ff.Trajectory.load(tmp_path / "trajectory.safetensors").batch == 2


def test_run_without_completions_or_guidance(demo_packages: None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": [3], "group": 2, "steps": 3, "dense": None, "guidance": 1.0}
    trajectory = run_digits(tmp_path, dynamics=ff.CPS(0.8), lockstep="full", progress=False, **options)
    assert trajectory.rewards.shape == (2, 1) and trajectory.stats.evaluations == 2 * 3
    assert not (tmp_path / "clean.png").exists() and (tmp_path / "report.html").exists()


def test_same_seed_same_trajectory(trajectory: ff.Trajectory) -> None:
    again = DigitsRollout(prompts=[3, 8, 3], group=3, steps=4, progress=False).run()
    assert torch.equal(again.samples, trajectory.samples) and torch.equal(again.rewards, trajectory.rewards)


def test_threads_are_given_back(demo_packages: None) -> None:
    torch.set_num_threads(2)
    DigitsRollout(prompts=[3], group=1, steps=1, progress=False).run()
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="prompts: wanted one or more digits"):
        DigitsRollout(prompts=[12]).run()
    assert torch.get_num_threads() == 2


def test_quickstart(demo_packages: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    printed = capsys.readouterr().out
    assert "19 network calls, 440 row evaluations" in printed
    assert "replayed bit for bit   True" in printed


def test_training_is_reproducible(demo_packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the training script, twice: the same file, and one that loads."""
    from fastflow.demo import digits

    script = example("train_digits_flow")
    files = []
    try:
        for name in ("a", "b"):
            path = tmp_path / f"{name}.safetensors"
            monkeypatch.setattr("sys.argv", ["train", "--steps", "3", "--batch", "32", "--out", str(path)])
            script.main()
            files.append(path.read_bytes())
    finally:
        torch.use_deterministic_algorithms(False)
    assert files[0] == files[1]
    _, embeddings = digits.load_model(tmp_path / "a.safetensors")
    assert embeddings.tokens.shape == (11, 2, 64)
