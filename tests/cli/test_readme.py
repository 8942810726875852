"""The commands that README.md, docs/gpu.md and `--help` show are commands."""

from __future__ import annotations

import re
import shlex

import pytest

from fastflow.cli import rollout as rollout_command
from fastflow.cli import run as run_module
from fastflow.cli.request import Request
from tests.packaging.repository import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ON_GPUS = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def lines(text: str, start: str) -> list[str]:
    """The lines that begin with `start`, without their comments."""
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip().startswith(start)]


ROLLOUTS = lines(README, "fastflow rollout") + lines(rollout_command.HELP, "fastflow rollout")


def test_there_are_examples() -> None:
    assert len(lines(README, "fastflow rollout")) >= 1
    assert len(lines(rollout_command.HELP, "fastflow rollout")) >= 3


@pytest.mark.parametrize("line", ROLLOUTS)
def test_an_example_is_understood(fastflow, monkeypatch: pytest.MonkeyPatch, tmp_path, line: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    monkeypatch.chdir(tmp_path)
    requests: list[Request] = []
    monkeypatch.setattr(run_module, "run", requests.append)
    result = fastflow(*shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert len(requests) == 1


@pytest.mark.parametrize("target", sorted({line.split()[1] for line in lines(README + ON_GPUS, "make ")}))
def test_a_make_target_is_there(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:.*## ", MAKEFILE, re.M)
