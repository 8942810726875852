"""docs/matching.md: its code runs and gives gradients, and every call of its table exists with those arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.training.test_credit_steps import roll

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "matching.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| ([^|]+) \| (.*) \|$", TEXT, re.M)[2:]


def network(scale: Tensor) -> Any:
    """A velocity that depends on its parameter, on sigma and on the prompt."""

    def velocity(sample: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        wide = [-1, *[1] * (sample.dim() - 1)]
        return scale * sample * sigma.reshape(wide) + condition["encoder_hidden_states"].reshape(wide)

    return velocity


def names(weight: Tensor) -> dict[str, Any]:
    """What the page takes as given. The conditioning is README.md's: an entry per prompt, and one for the negative."""
    traj = roll()
    prompts = int(traj.prompt_index.max()) + 1
    assert 1 < prompts < len(traj)  # neither is an entry per row
    sigma = torch.linspace(0.3, 0.9, len(traj))
    return {
        "ff": ff, "torch": torch, "traj": traj, "update": 3, "sigma": sigma, "sigma_next": sigma - 0.1,
        "model": network(weight), "moving": network(weight.detach() + 0.1), "reference": network(weight.detach() - 0.2),
        "condition": {"encoder_hidden_states": torch.arange(float(prompts))},
        "negative": {"encoder_hidden_states": torch.zeros(1)},
        "reward": torch.arange(float(len(traj))),
    }  # fmt: skip


def test_the_code_runs() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    known = names(weight)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/matching.md", "exec"), known)
        (gradient,) = torch.autograd.grad(known["loss"], weight, retain_graph=True)
        assert bool(torch.isfinite(gradient)) and float(gradient) != 0.0
    assert known["info"]["implicit"].shape == (len(known["traj"]),)
    assert len(known["points"].sample) == 6 * len(known["traj"])


@pytest.mark.parametrize(("system", "row"), TABLE)
def test_a_call_of_the_table(system: str, row: str) -> None:
    clean = torch.randn(4, 6)
    noise = ff.Noise([1, 2, 3, 4])
    other = lambda: torch.randn(4, 6)  # noqa: E731
    known = {
        "matching_loss": ff.matching_loss, "off_trajectory": ff.off_trajectory, "clean": clean, "noise": noise,
        "v": other(), "old": other(), "ref": other(), "sigma": torch.full((4,), 0.5), "sigma_next": torch.full((4,), 0.4),
        "A": torch.randn(4), "r": torch.rand(4), "w": torch.rand(4), "ids": [0, 0, 1, 1], "k": 0.1, "b": 10.0,
    }  # fmt: skip
    call, *others = re.findall(r"`([^`]+)`", row)
    found = eval(call, known)
    for option in others:
        known |= {"points": found, "ff": ff}
        found = eval(option.replace("...", "points.sample, points.sample, points.sigma"), known)
    assert bool(torch.isfinite(found[0]))
