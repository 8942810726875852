"""The checkpoint, and what the model draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastflow as ff
from tests.tolerance import CHECKPOINT_BYTES, SAMPLES_RECOGNISED


def velocity(module: Any, embeddings: Any) -> torch.Tensor:
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ff.models.SD3(module)(noise, torch.tensor([1.0, 0.6, 0.1]), embeddings.condition([3, 8, digits_null()]))


def digits_null() -> int:
    from fastflow.demo.digits import NULL

    return NULL


def test_checkpoint_is_small_and_plain(digits: Any, loaded: Any) -> None:
    from diffusers import SD3Transformer2DModel

    from fastflow.demo.digits_model import CHECKPOINT, CONFIG

    module, embeddings = loaded
    assert CHECKPOINT.stat().st_size < CHECKPOINT_BYTES
    assert type(module) is SD3Transformer2DModel and not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in module.parameters())
    assert embeddings.tokens.shape == (11, 2, 64) and embeddings.pooled.shape == (11, 64)
    record = digits.read_record()
    assert {name: record["config"][name] for name in CONFIG} == CONFIG
    assert record["training"]["held_out_loss"] > 0


def test_samples_are_recognised(digits: Any, loaded: Any) -> None:
    """Ten steps of the ODE at shift 3 and guidance 2: the classifier of the real digits knows them."""
    module, embeddings = loaded
    prompts = list(range(10))
    trajectory = ff.rollout(
        ff.models.SD3(module), digits.SHAPE, ff.sigma_schedule(10, shift=3.0), ff.ODE(),
        ff.sample_seeds(0, 0, prompts, 6), condition=embeddings.condition(prompts), guidance=ff.CFG(2.0),
        negative=embeddings.negative(1), decode=digits.decode, reward=digits.DigitReward(prompts), progress=False,
    )  # fmt: skip
    assert (trajectory.rewards[:, -1] > 0).double().mean() > SAMPLES_RECOGNISED
    spread = trajectory.final.unflatten(0, (10, 6)).std(1).mean()
    assert spread > digits.load_digits().test_images.std(0).mean() / 10, "samples of a group differ"


def test_prompts_pick_their_embeddings(loaded: Any) -> None:
    _, embeddings = loaded
    condition = embeddings.condition([3, 3, 8])
    assert torch.equal(condition["encoder_hidden_states"], embeddings.tokens[[3, 3, 8]])
    assert torch.equal(embeddings.negative(2)["pooled_projections"], embeddings.pooled[[10, 10]])
    for wrong in ([11], [-1], [[1]]):
        with pytest.raises(ValueError, match=r"prompts: wanted a list of digits 0\.\.9"):
            embeddings.condition(wrong)


def test_checkpoint_round_trip(digits: Any, loaded: Any, tmp_path: Path) -> None:
    from fastflow.demo.digits_model import CHECKPOINT

    again = tmp_path / "again.safetensors"
    digits.save_checkpoint(*loaded, again, digits.read_record()["training"])
    assert again.read_bytes() == CHECKPOINT.read_bytes(), "float16 to float32 and back loses nothing"


def test_diffusers_folder_round_trip(digits: Any, loaded: Any, tmp_path: Path) -> None:
    digits.save_pretrained(*loaded, tmp_path / "model")
    assert torch.equal(velocity(*digits.load_model(tmp_path / "model")), velocity(*loaded))


def test_a_wrong_file_is_named(digits: Any, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"other.safetensors: wanted 'digits' in its metadata"):
        digits.load_model(tmp_path / "other.safetensors")
    import json

    record = json.dumps({"config": digits.read_record()["config"], "training": {}})
    save_file({"transformer.x": torch.zeros(1)}, str(tmp_path / "half.safetensors"), {"digits": record})
    with pytest.raises(ValueError, match="half.safetensors: tensors missing"):
        digits.load_model(tmp_path / "half.safetensors")


def test_importing_the_demo_loads_none_of_its_packages() -> None:
    code = (
        "import sys, fastflow, fastflow.demo.digits, fastflow.demo.run, fastflow.demo.report;"
        "print([n for n in ('sklearn', 'diffusers', 'matplotlib', 'rich', 'triton') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
