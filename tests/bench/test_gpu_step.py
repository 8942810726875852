"""The cases of a GPU, on this CPU: every form agrees with the chain and counts its bytes, and targets are judged."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastflow as ff
from bench import cli, gpu_cli, gpu_gradients, gpu_report, gpu_run, gpu_step, gpu_targets, timing
from bench.gpu_run import Row, measure
from bench.gpu_step import BASE, CLEAN, DENSE, FLAGGED, FORMS, SMALL, Form
from bench.gpu_timing import HostClock
from bench.machine import Gpu
from bench.registry import Mismatch
from bench.timing import Times

CPU, SHAPE = torch.device("cpu"), (2, 4, 8, 8)
GPU = Gpu("Some GPU 1", "580.1", "13.0", "2.11", "3.6", "abc1234", "2026-01-01")


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for every path; nothing here looks at how long they take."""
    monkeypatch.setattr(gpu_run, "calls_for", lambda nbytes, sets: sets)
    monkeypatch.setattr(gpu_run, "sets_for", lambda nbytes, cache: 2)
    monkeypatch.setattr(gpu_run, "LAUNCHED", 2)
    monkeypatch.setattr(timing, "WARM_UP", 1)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_passes_its_check(form: Form, backend: str) -> None:
    data = gpu_step.inputs(form, SHAPE, CPU)
    for slot in data["out"].values():  # which start as nothing that is written
        assert bool((slot.isnan() if slot.is_floating_point() else slot == -1).all())
    with torch.no_grad():
        gpu_step.check(form, data, [backend])


@pytest.mark.parametrize("wrong", [{"guidance": ff.CFG(4.6)}, {"seeds": torch.tensor([3, 4])}])
@pytest.mark.parametrize("form", [BASE, CLEAN, DENSE], ids=lambda form: form.name)
def test_the_check_sees_another_result(form: Form, wrong: dict[str, Any]) -> None:
    data = gpu_step.inputs(form, SHAPE, CPU)
    drawn = ff.Noise(data["seeds"], gpu_step.STEP).sample(SHAPE[1:])
    with torch.no_grad(), pytest.raises(Mismatch, match="of the chain"):
        gpu_step.check(form, {**data, "noise": drawn, **wrong}, ["reference"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_bytes_are_those_of_the_tensors(form: Form) -> None:
    data = gpu_step.inputs(form, SHAPE, CPU)
    read = sum(data[name].nbytes for name in form.reads)
    assert gpu_step.traffic(form, SHAPE) == read + sum(slot.nbytes for slot in data["out"].values())


def test_flags_are_asked_for_where_their_cost_shows() -> None:
    assert gpu_step.traffic(FLAGGED, SHAPE) == gpu_step.traffic(BASE, SHAPE) + 4 * SHAPE[0], "int32 by row"
    where = [shape for shape, forms in gpu_step.PLAN if FLAGGED in forms and BASE in forms]
    assert where == [SMALL, gpu_step.VIDEO]


def test_large_batches_move_enough_to_be_judged() -> None:
    for name in gpu_targets.SHARES:
        form = next(form for form in FORMS if form.name == name)
        assert gpu_step.traffic(form, gpu_step.LARGE) >= gpu_targets.LEAST_BYTES
        assert gpu_step.traffic(form, SMALL) < gpu_targets.LEAST_BYTES


def test_a_form_is_measured_beside_its_baselines() -> None:
    (case,) = gpu_step.cases(CPU, ["reference"], [(SHAPE, [DENSE])], compiled=False)
    ours, eager, copied = measure(case, HostClock(), 2)
    assert (ours.backend, ours.nbytes) == ("reference", gpu_step.traffic(DENSE, SHAPE))
    assert set(ours.ratios) == set(ours.launched_ratios) == {"eager"}
    assert eager.nbytes is None and copied.nbytes == ours.nbytes


@pytest.mark.parametrize("name", gpu_gradients.BENCHMARKS)
def test_gradients_are_measured(name: str, backend: str) -> None:
    (case,) = gpu_gradients.cases(name, CPU, [backend], [SHAPE])
    rows = measure(case, HostClock(), 2)
    fused = [row for row in rows if row.backend == backend]
    assert fused and all(row.nbytes for row in fused)
    assert any(row.ratios for row in fused)


def row(benchmark: str = "step", case: str = BASE.name, shape: tuple[int, ...] = SMALL, **changes: Any) -> Row:
    made = Row(
        benchmark, case, shape, "fused, triton", "triton", Times((7e-6,)), Times((5e-6,)), Times((20e-6,)), 10**8, 0.9,
        {"eager": 13.0, "compile": 1.4}, {"eager": 9.0},
    )  # fmt: skip
    return replace(made, **changes)


def test_targets_of_a_small_batch() -> None:
    found = {
        v.name.removeprefix(f"step, 24x16x64x64, {BASE.name}, fused, triton"): v for v in gpu_targets.verdicts([row()])
    }
    assert {name: v.reached for name, v in found.items()} == {
        " (hot: 5.00 us)": True, ": x eager": True, ": x compile": False, ": with launches, x eager": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"case": CLEAN.name, "shape": gpu_step.LARGE, "nbytes": 10**9, "share_of_copy": 0.93}, [True]),
        ({"case": CLEAN.name, "shape": gpu_step.LARGE, "nbytes": 10**9, "share_of_copy": 0.91}, [False]),
        ({"case": gpu_step.NARROW.name, "shape": gpu_step.LARGE, "nbytes": 10**9, "share_of_copy": 0.81}, [True]),
        ({"case": gpu_step.REPLAY.name, "shape": gpu_step.LARGE, "nbytes": 10**9}, []),
        ({"backend": "torch", "nbytes": None}, []),
        ({"benchmark": "policy", "nbytes": 10**9, "share_of_copy": 0.91}, [True, True, False]),
        ({"benchmark": "log_prob_backward", "way": "backward alone, cuda", "peak": 2 * 24 * 65536}, [True]),
        ({"benchmark": "log_prob_backward", "way": "backward alone, cuda", "peak": 3 * 24 * 65536}, [False]),
    ],
)
def test_targets(changes: dict[str, Any], reached: list[bool]) -> None:
    assert [v.reached for v in gpu_targets.verdicts([row(**changes)])] == reached


def test_files_name_device_and_commit(tmp_path: Path) -> None:
    rows = [row()]
    gpu_report.write_rows(rows, GPU, tmp_path / "new" / "step.csv")
    gpu_report.write_verdicts(gpu_targets.verdicts(rows), GPU, tmp_path / "targets.csv")
    (read,) = csv.DictReader((tmp_path / "new" / "step.csv").open())
    assert (read["device"], read["driver"], read["git sha"], read["triton"]) == (
        "Some GPU 1",
        "580.1",
        "abc1234",
        "3.6",
    )
    assert (read["median us"], read["hot us"], read["with launch us"]) == ("7.00", "5.00", "20.00")
    assert (read["x eager"], read["x compile"], read["with launch x eager"]) == ("13.00", "1.40", "9.00")
    assert {v["reached"] for v in csv.DictReader((tmp_path / "targets.csv").open())} == {"yes", "no"}
    assert GPU.slug == "some-gpu-1"


def test_one_failed_case_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(form: Form, data: Any, backends: Any) -> None:
        if form is BASE:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu_step, "check", fails)
    cases = gpu_step.cases(CPU, ["reference"], [(SHAPE, [BASE, CLEAN])], compiled=False)
    rows, failures = gpu_cli.run_cases(Console(quiet=True), cases, HostClock(), 1)
    assert {r.case for r in rows} == {CLEAN.name}
    assert failures == [f"step, 2x4x8x8, {BASE.name}: operation not permitted when stream is capturing"]


def test_no_case_begins_when_the_time_is_over(tmp_path: Path) -> None:
    kept: list[int] = []
    cases = gpu_step.cases(CPU, ["reference"], [(SHAPE, [BASE, CLEAN])], compiled=False)
    rows, failures = gpu_cli.run_cases(
        Console(quiet=True), cases, HostClock(), 1, lambda rows: kept.append(len(rows)), 0.0
    )
    assert not rows and not kept
    assert failures[0] == f"step, 2x4x8x8, {BASE.name}: no time left" and len(failures) == 2


def test_backends_are_chosen() -> None:
    assert gpu_cli.chosen("reference,cpu", CPU) == ["reference", "cpu"]
    with pytest.raises(ValueError, match="backend: wanted"):
        gpu_cli.chosen("reference,gpu", CPU)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    for name in ("step", "policy", "matching", "log_prob_backward"):
        assert cli.main([name, "--device", "cuda"]) == cli.USAGE
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step", "policy", "matching", "log_prob_backward"])
def test_the_command_on_a_device(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_cli, "clock_of", lambda device: HostClock())
    monkeypatch.setattr(gpu_step, "FORMS", (BASE, gpu_step.REPLAY))
    options = ["--device", "cuda", "--sizes", "2x4x8x8", "--backend", "reference,cpu", "--repeats", "1", "--sha", "abc"]
    more = ["--no-compile"] if name == "step" else []
    assert cli.main([name, *options, *more, "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "GB/s" in out and "of copy" in out and "L2" in out
    rows = list(csv.DictReader((tmp_path / f"{name}-cpu.csv").open()))
    assert {row["backend"] for row in rows} == {"reference", "cpu", "torch"}
    assert {(row["benchmark"], row["git sha"], row["shape"]) for row in rows} == {(name, "abc", "2x4x8x8")}
    assert all(float(row["median us"]) > 0 for row in rows)
    assert (tmp_path / f"targets-{name}-cpu.csv").exists()


def test_a_case_without_figures_fails_the_command(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cli, "clock_of", lambda device: HostClock())
    options = ["--device", "cuda", "--sizes", "2x4x8x8", "--backend", "reference", "--seconds", "0"]
    assert cli.main(["policy", *options]) == cli.FAILED
    assert "no figures of 1: policy, 2x4x8x8" in capsys.readouterr().err
