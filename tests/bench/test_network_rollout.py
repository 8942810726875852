"""Rollouts of the tiny networks by the code that times the large ones, and the configurations of those."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import network_report, network_rollout, networks
from bench.cli import USAGE, main
from bench.network_rollout import EXACT, FULL, SEQUENTIAL, Setting, Ways
from bench.registry import Mismatch

CPU = torch.device("cpu")
TINY = ("sd3-tiny", "flux-tiny")


@pytest.fixture(autouse=True)
def _needs_diffusers() -> None:
    pytest.importorskip("diffusers")
    torch.set_num_threads(1)


@pytest.fixture(params=TINY)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(networks.build(networks.SPECS[request.param], 2, CPU), CPU, 2, 3, "reference")


@pytest.mark.parametrize(("name", "billions"), [("sd3.5-medium-shape", 2.243), ("flux-shape", 11.901)])
def test_the_large_ones_have_the_published_sizes(name: str, billions: float) -> None:
    import diffusers

    spec = networks.SPECS[name]
    with torch.device("meta"):
        module = getattr(diffusers, spec.transformer)(**spec.config)
        vae = diffusers.AutoencoderKL(**spec.vae)
    assert round(sum(p.numel() for p in module.parameters()) / 1e9, 3) == billions
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 83.8
    assert networks.SPECS[spec.kin].transformer == spec.transformer


def test_the_ways_agree(setting: Setting) -> None:
    network_rollout.check(setting)


def test_the_check_sees_another_result(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Setting.sequential

    def other(self: Setting) -> Any:
        found = loop(self)
        found.clean[0, 1] += 0.01
        return found

    monkeypatch.setattr(Setting, "sequential", other)
    with pytest.raises(Mismatch, match="clean of lockstep exact"):
        network_rollout.check(setting)


@pytest.mark.parametrize(("ends", "rounds"), [(-1.0, 1), (1.9, 1), (2.0, 2), (9.0, 3)])
def test_no_round_begins_that_would_end_too_late(setting: Setting, ends: float, rounds: int) -> None:
    """A round takes a second of the clock, which is read before and after it and between two."""
    readings, kept = iter([0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0]), list[int]()
    ways = network_rollout.measure(
        setting, network_rollout.lockstep_ways(setting, False), 3, ends, lambda w: kept.append(len(w.seconds[FULL])),
        lambda: next(readings),
    )  # fmt: skip
    assert {name: len(seconds) for name, seconds in ways.seconds.items()} == dict.fromkeys(
        (FULL, EXACT, SEQUENTIAL), rounds
    )
    assert (ways.last[FULL].stats.calls, ways.last[EXACT].stats.calls) == (3, 5)
    assert kept == list(range(1, rounds + 1)), "each round is kept as it ends"


def test_what_is_killed_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages before the first round, and each round before the next."""
    loop, made = Setting.sequential, list[int]()

    def stopped(self: Setting) -> Any:
        made.append(self.steps)
        if made.count(network_rollout.STEPS) > 1:
            raise KeyboardInterrupt
        assert self.steps != network_rollout.STEPS or (tmp_path / "stages-sd3-tiny-cpu.csv").exists()
        return loop(self)

    monkeypatch.setattr(Setting, "sequential", stopped)
    options = ["--rows", "2", "--repeats", "3", "--backend", "reference", "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(["rollout", "--model", "sd3-tiny", *options])
    rows = list(csv.DictReader((tmp_path / "rollout-sd3-tiny-cpu.csv").open()))
    assert {row["way"]: row["rounds"] for row in rows} == {FULL: "1", EXACT: "1", SEQUENTIAL: "1"}
    assert (tmp_path / "targets-sd3-tiny-cpu.csv").exists()


def test_every_stage_has_its_time(setting: Setting) -> None:
    parts = network_rollout.split(setting, False)
    stages = [parts[name] for name in ("network", "step", "decode", "reward", "idle")]
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) == pytest.approx(parts["wall"])


def test_the_regime_and_its_target(setting: Setting) -> None:
    ways = Ways({FULL: [1.0, 1.0, 1.0], SEQUENTIAL: [1.2, 1.3, 1.2]}, {}, {FULL: [0.01, 0.03, 0.01]})
    wide, narrow = {8: 1.00, 80: 0.99}, {8: 1.0, 80: 0.7}
    assert network_rollout.saturated(wide) and not network_rollout.saturated(narrow)
    assert [v.reached for v in network_report.judged(setting, ways, True)] == [True, True]
    assert [v.reached for v in network_report.judged(setting, ways, False)] == [True, False]
    assert ways.ratio(FULL, SEQUENTIAL) == 1.2


def test_widths_of_calls_are_timed(setting: Setting) -> None:
    found = network_rollout.row_seconds(setting, 1)
    assert list(found) == [2, 6] and all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "sd3-tiny", "--device", "cuda"], "needs an NVIDIA GPU"),
        (["--device", "cuda"], "model: wanted one of sd3.5-medium-shape, flux-shape"),
        (["--model", "sd4"], "--model: invalid choice: 'sd4'"),
    ],
)
def test_what_is_wrong_takes_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    assert main(["rollout", *options]) == USAGE
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("model", TINY)
def test_the_command_writes_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--rows", "2", "--repeats", "1", "--backend", "reference", "--results", str(tmp_path), "--sha", "abc"]
    assert main(["rollout", "--model", model, *options]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("x sequential", "idle", "engine over network time", "saturated"))
    rows = {row["way"]: row for row in csv.DictReader((tmp_path / f"rollout-{model}-cpu.csv").open())}
    assert {name: row["network calls"] for name, row in rows.items()} == {FULL: "10", EXACT: "19", SEQUENTIAL: "65"}
    assert rows[SEQUENTIAL]["evaluations a sample"] == "65" and rows[FULL]["evaluations a sample"] == "55"
    (stages,) = csv.DictReader((tmp_path / f"stages-{model}-cpu.csv").open())
    assert (stages["git sha"], stages["model"]) == ("abc", model)
    assert (tmp_path / f"targets-{model}-cpu.csv").exists()


def test_compiled_networks_are_compiled_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    network = networks.build(networks.SPECS["flux-tiny"], 1, torch.device("cpu"), compiled=True)
    module = network.model.module  # type: ignore[attr-defined]
    blocks = [*module.transformer_blocks, *module.single_transformer_blocks]
    assert blocks and compiled == [(block, {"dynamic": False}) for block in blocks]
