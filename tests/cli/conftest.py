"""The command line as a function, and small networks on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastflow.cli.app import app
from tests.cli.tiny import WIDTH, pipeline, transformer

Command = Callable[..., Result]


@pytest.fixture
def fastflow(monkeypatch: pytest.MonkeyPatch) -> Command:
    """fastflow("rollout", ...) -> exit_code, stdout, stderr; wide enough that no line is folded."""
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def call(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments], prog_name="fastflow")

    return call


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by StableDiffusion3Pipeline.save_pretrained."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by SD3Transformer2DModel.save_pretrained, with embeddings of two prompts and a negative."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    from fastflow.models.loading import save_embeddings

    folder = tmp_path_factory.mktemp("transformer")
    transformer().save_pretrained(folder)
    torch.manual_seed(1)

    def embeddings(count: int) -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.randn(count, 5, 2 * WIDTH),
            "pooled_projections": torch.randn(count, 2 * WIDTH),
        }

    save_embeddings(folder / "embeddings.safetensors", ["fox", "cat"], embeddings(2), embeddings(1))
    return folder
