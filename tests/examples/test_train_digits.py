"""`examples/train_digits.py` as it is used: the quick run, a run that goes on after a stop, two processes, every algorithm."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerance import STANDARD_ERRORS, assert_same_at_another_width

for needed in ("diffusers", "peft", "sklearn", "matplotlib"):
    pytest.importorskip(
        needed, reason=f"needs {needed}: the example trains a LoRA of a diffusers network and draws a report"
    )

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_digits.py"
SMALL = ["--digits", "01", "--chunk", "1", "--group", "4", "--steps", "4", "--updates", "1", "--no-progress"]
THREE = ["--quick", "--updates", "3", "--no-progress"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}
HEAD = ["update", "reward_mean", "reward_std", "ratio_max", "clip_fraction", "evaluations", "seconds"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The script's `main`, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_digits

    return lambda out, *arguments: train_digits.main([*arguments, "--out", str(out)])


def command(*arguments: str) -> str:
    """Runs the script in a process of its own and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "package"), [("peft", "peft"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named_with_what_installs_it(module: str, package: str) -> None:
    without = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SCRIPT.parent), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", without], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"not installed: {package}; " in done.stderr
    assert 'pip install ".[demo,train]"' in done.stderr
    assert "Traceback" not in done.stderr
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    offered = [line for line in extras.splitlines() if line.startswith(("demo =", "train ="))]
    assert len(offered) == 2
    assert f'"{package}>=' in "".join(offered)


def log(out: Path) -> list[dict[str, float]]:
    with (out / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def leaves(value: Any) -> list[Any]:
    """All tensors and numbers of nested dicts and lists, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, (list, tuple)) else [value]


def test_the_quick_run_raises_the_reward_by_more_than_its_noise(tmp_path: Path) -> None:
    printed = command(str(SCRIPT), "--quick", "--out", str(tmp_path), "--no-progress")
    assert "equal bit for bit" in printed  # ratios before the first update are exactly 1
    with (tmp_path / "log.csv").open() as file:
        assert file.readline().strip().split(",")[: len(HEAD)] == HEAD
    rows = log(tmp_path)
    assert [row["update"] for row in rows] == list(range(20))
    samples, steps, each = 32, 6, 5
    assert {row["evaluations"] for row in rows} == {samples * steps * (steps + 1) / 2}
    assert all(row["ratio_max"] > 1.0 for row in rows)  # after the first of two optimizer steps
    first, last = rows[:each], rows[-each:]

    def mean(part: list[dict[str, float]]) -> float:
        return sum(row["reward_mean"] for row in part) / each

    variance = sum(row["reward_std"] ** 2 for row in first + last) / (each * each * samples)
    assert mean(last) - mean(first) > STANDARD_ERRORS * math.sqrt(variance)
    for name in ("checkpoint.pt", "curves.png", "samples.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert "processes: 1\n" in command(str(SCRIPT), *THREE, "--out", str(out))
    return out


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_get_the_weights_of_one(tmp_path: Path, alone: Path, launcher: str) -> None:
    module, *options = LAUNCHERS[launcher]
    pytest.importorskip(module, reason=f"needs {launcher}, to start two processes")
    assert "processes: 2\n" in command("-m", module, *options, str(SCRIPT), *THREE, "--out", str(tmp_path))
    one, two = checkpoint(alone), checkpoint(tmp_path)
    assert one["done"] == two["done"] == 3
    second = {name: weights for name, weights in one["lora"].items() if "lora_B" in name}
    idle = [name for name, weights in second.items() if not weights.any()]  # B starts at 0
    assert all("transformer_blocks.2" in name for name in idle)  # the last block drops what it makes of the prompt
    assert len(idle) < len(second)
    for name, weights in one["lora"].items():
        assert_same_at_another_width(two["lora"][name], weights, name)
    for a, b in zip(log(alone), log(tmp_path), strict=True):
        assert a["reward_mean"] == b["reward_mean"]
        assert a["evaluations"] == b["evaluations"]


@pytest.mark.parametrize("algorithm", ["dense-grpo", "nft"])
def test_a_resumed_run_has_the_bits_of_one_that_ran_through(
    tmp_path: Path, train: Callable[..., None], algorithm: str
) -> None:
    arguments = [*SMALL, "--algorithm", algorithm, "--old-decay", "0.3"]
    if algorithm == "dense-grpo":
        arguments += ["--noise", "calibrated", "--calibrations", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *arguments, "--updates", "4")
    train(parts, *arguments, "--updates", "3", "--save-every", "2")
    torch.manual_seed(1)
    train(parts, *arguments, "--updates", "4", "--resume")
    one, other = leaves(checkpoint(whole)), leaves(checkpoint(parts))
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for a, b in zip(log(whole), log(parts), strict=True):
        del a["seconds"], b["seconds"]
        assert repr(a) == repr(b)
    with pytest.raises(ValueError, match="wanted the settings of checkpoint.pt, {'lr': 0.002}"):
        train(parts, *arguments, "--resume", "--lr", "0.1")


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        (["--algorithm", "flow-grpo", "--reward", "mix"], 8 * 4),
        (["--algorithm", "dense-grpo", "--completions", "3", "--reward", "margin", "--noise", "calibrated"], 8 * 9),
        (["--algorithm", "tp-grpo", "--window", "1:3", "--reward", "ink"], 8 * 7),
        (["--algorithm", "nft", "--reward", "ink"], 8 * 4),
    ],
    ids=["flow-grpo", "dense-grpo", "tp-grpo", "nft"],
)
def test_every_algorithm_trains(
    tmp_path: Path, train: Callable[..., None], options: list[str], evaluations: int
) -> None:
    train(tmp_path, *SMALL, *options, "--calibrations", "1")
    (row,) = log(tmp_path)
    assert row["evaluations"] == evaluations
    assert row["kl"] > 0.0  # of the second optimizer step: the first has moved the network away from the reference
    assert math.isnan(row["ratio_max"]) if "nft" in options else row["ratio_max"] > 1.0
    page = re.sub('base64,[^"]*', "", (tmp_path / "report.html").read_text())
    assert ("velocity MSE to the network as it came" in page) == ("nft" in options)
    assert ("KL" in page) == ("nft" not in options)
    calibrated = "calibrated" in options
    assert ("<h2>Calibration</h2>" in page) == calibrated
    assert page.count("<img ") == (3 if calibrated else 2)
    assert all((tmp_path / name).is_file() == calibrated for name in ("calibration.csv", "calibration.png"))


@pytest.mark.parametrize(("options", "unit"), [([], "deviations"), (["--calibration-unit", "count"], "count")])
def test_the_calibration_has_the_unit_asked_for(
    tmp_path: Path, train: Callable[..., None], options: list[str], unit: str
) -> None:
    train(tmp_path, *SMALL, "--noise", "calibrated", "--calibrations", "1", *options)
    assert checkpoint(tmp_path)["calibrator"]["unit"] == unit


def test_what_cannot_be_is_refused(
    tmp_path: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--digits", "012", "--chunk", "2"], "--prompts: wanted a multiple of --chunk 2, 3 at most, got 3"),
        (["--reward", "mix", "--weights", "1"], "--weights: wanted one for each of margin, ink"),
        (["--algorithm", "nft", "--guidance", "2"], "--guidance: wanted 1 for nft"),
        (["--dynamics", "cps", "--noise", "calibrated"], "--noise calibrated: wanted an SDE"),
        (["--digits", "abc"], "argument --digits: wanted digits from 0 to 9, each once, as in 0123, got 'abc'"),
        (["--digits", "11"], "got '11'"),
        (["--digits", ""], "got ''"),
        (["--window", "abc"], "--window: wanted A:B with 0 <= A < B <= 10, the number of steps, as in 1:3, got 'abc'"),
        (["--window", "3:3"], "got '3:3'"),
        (["--window", "3:11"], "got '3:11'"),
        (["--lr", "nan"], "argument --lr: wanted a finite number, got 'nan'"),
        (["--max-norm", "0"], "argument --max-norm: wanted a number above 0, got '0'"),
        (["--guidance", "two"], "argument --guidance: wanted a finite number, got 'two'"),
        (["--resume"], f"--resume: wanted a checkpoint of an earlier run, got no file {tmp_path / 'checkpoint.pt'}"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path, *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["prompts", "group", "chunk", "updates", "inner", "steps", "calibrations", "rank", "save-every", "threads"],
)
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_count_is_one_at_least(
    tmp_path: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, f"--{option}", value)
    assert f"argument --{option}: wanted a whole number, 1 at least, got {value!r}" in capsys.readouterr().err


def test_a_guidance_of_zero_is_one(tmp_path: Path, train: Callable[..., None]) -> None:
    train(tmp_path, *SMALL, "--guidance", "0")
    assert checkpoint(tmp_path)["settings"]["guidance"] == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, train: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match="^update 0, optimizer step 1: wanted a finite gradient norm, got (nan|inf);"):
        train(tmp_path, *SMALL, "--lr", "1e30")
    assert log(tmp_path) == []  # the update is not one


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_get_no_gradient_that_is_not_finite(train: Callable[..., None], value: float) -> None:
    from digits_training.ranks import Gradient, NotFiniteError, Ranks

    parameter = torch.nn.Parameter(torch.zeros(3))
    gradient = Gradient([parameter], Ranks())
    parameter.grad = torch.tensor([1.0, value, 0.0])
    gradient.add()
    with pytest.raises(NotFiniteError, match=f"there: wanted a finite gradient norm, got {value}"):
        gradient.finish(1.0, "there")
    assert parameter.grad is None
