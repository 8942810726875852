"""`fastflow rollout` on networks as diffusers saves them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fastflow as ff
from fastflow.demo import digits
from fastflow.models.loading import load, load_embeddings
from tests.cli.tiny import transformer

SHORT = ("--steps", 4, "--group", 3, "--no-progress", "--device", "cpu")


def test_pipeline(fastflow, saved_pipeline: Path, tmp_path: Path) -> None:
    result = fastflow(
        "rollout", "-m", saved_pipeline, "-p", "a red fox", "-p", "a cat", *SHORT, "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"trajectory.safetensors", "summary.json", "final.png", "clean.png"}
    trajectory = ff.Trajectory.load(tmp_path / "run" / "trajectory.safetensors")
    assert trajectory.samples.shape == (6, 5, 4, 8, 8)
    assert trajectory.prompt_index.tolist() == [0, 0, 0, 1, 1, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["row_evaluations"] == 6 * (4 + 4 * 3 // 2)
    assert summary["network_calls"] == 4 + 3
    assert summary["prompts"] == ["a red fox", "a cat"]
    assert "10 a sample" in result.stdout


def test_pictures_have_a_row_per_prompt(fastflow, saved_pipeline: Path, tmp_path: Path) -> None:
    from PIL import Image

    assert fastflow("rollout", "-m", saved_pipeline, "-p", "x", "-p", "y", *SHORT, "--out", tmp_path).exit_code == 0
    side, gap = 16, 2
    assert Image.open(tmp_path / "final.png").size == (3 * (side + gap) - gap, 2 * (side + gap) - gap)
    assert Image.open(tmp_path / "clean.png").size == (5 * (side + gap) - gap, 2 * (side + gap) - gap)


def test_it_is_the_rollout_of_the_library(fastflow, saved_transformer: Path, tmp_path: Path) -> None:
    options = (
        "--guidance",
        2,
        "--shift",
        2,
        "--seed",
        5,
        "--dynamics",
        "cps",
        "--noise-level",
        0.5,
        "--lockstep",
        "full",
    )
    assert fastflow("rollout", "-m", saved_transformer, *options, *SHORT, "--out", tmp_path).exit_code == 0
    ours = ff.Trajectory.load(tmp_path / "trajectory.safetensors")
    prompts, condition, negative = load_embeddings(saved_transformer / "embeddings.safetensors")
    wanted = ff.rollout(
        ff.models.SD3(transformer().eval()),
        (4, 8, 8),
        ff.sigma_schedule(4, shift=2.0),
        ff.CPS(0.5),
        ff.sample_seeds(5, 0, [0, 1], 3),
        condition=condition,
        prompt_index=torch.tensor([0, 0, 0, 1, 1, 1]),
        guidance=ff.CFG(2.0),
        negative=negative,
        dense=ff.Completion(),
        lockstep="full",
        progress=False,
    )
    assert prompts == ["fox", "cat"]
    for name in ("samples", "log_probs", "final", "clean", "seeds"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name)), name


def test_the_pipeline_keeps_its_own_schedule(fastflow, saved_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert fastflow("rollout", "-m", saved_pipeline, "-p", "x", *SHORT, "--out", tmp_path).exit_code == 0
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(saved_pipeline, subfolder="scheduler")
    scheduler.set_timesteps(4)
    ours = ff.Trajectory.load(tmp_path / "trajectory.safetensors").sigmas
    assert ours.tolist() == ff.sigmas_from(scheduler).tolist()
    assert ours.tolist() != ff.sigma_schedule(4, shift=3.0).tolist()


def test_prompts_are_chosen_from_the_embeddings(fastflow, saved_transformer: Path, tmp_path: Path) -> None:
    run = ("rollout", "-m", saved_transformer, "--dense", "none", "--guidance", 1, *SHORT)
    assert fastflow(*run, "-p", "cat", "--out", tmp_path).exit_code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["prompts"], summary["samples"], summary["row_evaluations"]) == (["cat"], 3, 12)


def test_reward_of_ones_own(fastflow, saved_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brightness.py").write_text("def mean(images, info):\n    return images.mean(dim=(1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    run = ("rollout", "-m", saved_pipeline, "-p", "x", *SHORT, "--dense", "2", "--out", "run")
    result = fastflow(*run, "--reward", "brightness:mean")
    assert result.exit_code == 0, result.output
    assert "mean by state" in result.stdout
    rewards = json.loads(Path("run/summary.json").read_text())["rewards"]["reward"]
    trajectory = ff.Trajectory.load("run/trajectory.safetensors")
    assert rewards == trajectory.rewards.mean(0).tolist()
    assert len(rewards) == 5

    missing = fastflow(*run, "--reward", "brightness:sum")
    assert (missing.exit_code, "brightness has no function sum" in missing.stderr) == (2, True)
    nowhere = fastflow(*run, "--reward", "darkness:mean")
    assert (nowhere.exit_code, "there is no module darkness" in nowhere.stderr) == (2, True)


def test_a_reward_that_fails_keeps_what_was_computed(
    fastflow, saved_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("def mean(images, info):\n    return images.mean(dim=(1, 2, 3)) / 0\n")
    monkeypatch.chdir(tmp_path)
    result = fastflow(
        "rollout", "-m", saved_pipeline, "-p", "x", *SHORT, "--out", "run", "--reward", "broken_reward:mean"
    )
    assert result.exit_code == 1
    assert "what was computed is in run/partial.safetensors" in result.stderr
    assert ff.Trajectory.load("run/partial.safetensors").samples.shape[0] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "dog"), "holds 'fox', 'cat'; not 'dog'"),
        (("--size", "7x8"), "size: wanted height and width as multiples of 2, got 7x8"),
        (("--device", "tpu9"), "--device: wanted auto, cpu or cuda"),
        (("--noise-level", "-1"), "noise_level"),
        (("--embeddings", "missing.safetensors"), "needs its prompts in missing.safetensors"),
    ],
)
def test_a_mistake_is_one_line(
    fastflow, saved_transformer: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = fastflow("rollout", "-m", saved_transformer, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [("missing/deep/folder", "there is no folder missing/deep/folder"), ("./missing", "there is no folder ./missing")],
)
def test_a_model_that_is_not_there(fastflow, model: str, words: str) -> None:
    result = fastflow("rollout", "--model", model, "--prompts", "x")
    assert (result.exit_code, words in result.stderr) == (2, True)


def test_a_folder_of_something_else(fastflow, tmp_path: Path) -> None:
    result = fastflow("rollout", "--model", tmp_path, "--prompts", "x")
    assert "holds neither model_index.json (StableDiffusion3Pipeline) nor config.json" in result.stderr
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    result = fastflow("rollout", "--model", tmp_path, "--prompts", "x")
    assert "wanted a StableDiffusion3Pipeline or a SD3Transformer2DModel, got a FluxTransformer2DModel" in result.stderr
    assert result.exit_code == 2


def test_an_interrupted_rollout_keeps_what_was_computed(
    fastflow, saved_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopped.py").write_text("def reward(images, info):\n    raise KeyboardInterrupt\n")
    monkeypatch.chdir(tmp_path)
    result = fastflow("rollout", "-m", saved_pipeline, "-p", "x", *SHORT, "--out", "run", "--reward", "stopped:reward")
    assert result.exit_code == 1
    assert "interrupted" in result.stderr
    assert "run/partial.safetensors" in result.stderr
    assert ff.Trajectory.load("run/partial.safetensors").samples.shape == (3, 5, 4, 8, 8)


def test_a_folder_that_cannot_be_written_is_said_first(fastflow, saved_transformer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = fastflow("rollout", "-m", saved_transformer, *SHORT, "--out", tmp_path / "file" / "run")
    assert (result.exit_code, "--out: cannot write into" in result.stderr) == (2, True)


def test_a_hub_id_that_cannot_be_had(fastflow, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", refuse)
    result = fastflow("rollout", "--model", "nobody/nothing", "--prompts", "x")
    words = "nobody/nothing is no folder here, and as a hub id it cannot be had: no such repository"
    assert (result.exit_code, words in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("model", "missing", "extra"),
    [("pipeline", "transformers", "diffusers"), ("pipeline", "diffusers", "diffusers"), ("digits", "sklearn", "demo")],
)
def test_a_missing_package_names_the_extra(
    fastflow,
    saved_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    missing: str,
    extra: str,
) -> None:
    digits.classifier.cache_clear()
    digits.load_digits.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    source = ("digits", "-p", "3") if model == "digits" else (saved_pipeline, "-p", "x")
    result = fastflow("rollout", "--model", *source, *SHORT, "--out", tmp_path)
    assert result.exit_code == 2
    assert f'needs the package {missing}, which is not installed; pip install "fastflow[{extra}]"' in result.stderr


def test_guidance_needs_a_negative(saved_transformer: Path, tmp_path: Path) -> None:
    from fastflow.models.loading import save_embeddings

    prompts, condition, _ = load_embeddings(saved_transformer / "embeddings.safetensors")
    save_embeddings(tmp_path / "bare.safetensors", prompts, condition)
    with pytest.raises(ValueError, match="holds no negative_encoder_hidden_states"):
        load(saved_transformer, [], negative="", embeddings=tmp_path / "bare.safetensors")
    loaded = load(saved_transformer, [], embeddings=tmp_path / "bare.safetensors")
    assert loaded.negative is None
    assert loaded.prompts == ["fox", "cat"]


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(2, 3, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="wanted encoder_hidden_states and pooled_projections .* got tokens"):
        load_embeddings(tmp_path / "a.safetensors")
    tensors = {"encoder_hidden_states": torch.zeros(2, 3, 4), "pooled_projections": torch.zeros(3, 4)}
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="wanted one entry for each of 2 prompts"):
        load_embeddings(tmp_path / "b.safetensors")


def test_digits(fastflow, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run = (
        "rollout",
        "--model",
        "digits",
        "--prompts",
        "3,8",
        "--steps",
        3,
        "--group",
        2,
        "--dense",
        "all",
        "--no-progress",
    )
    result = fastflow(*run, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    trajectory = ff.Trajectory.load(tmp_path / "trajectory.safetensors")
    assert trajectory.samples.shape == (4, 4, 1, 8, 8)
    assert trajectory.rewards.shape == (4, 4)
    report = " ".join(
        (tmp_path / "report.html").read_text().replace("\\\n", " ").split()
    )  # its folded command, in one line
    assert "--model digits --prompts 3 --prompts 8" in report
