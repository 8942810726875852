"""What the tests of Flux and Qwen-Image share: a small latent in two layouts, unpacked [4, H, W] and packed [L, 16]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.models.packing import pack, unpack
from tests.models.pipelines import assert_replays
from tests.tolerance import assert_same_at_another_width

SHAPE, PACKED, SIZE, GRID, WIDTH, PROMPTS, STEPS = (4, 4, 6), (6, 16), (4, 6), (2, 3), 12, 2, 5
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])


def pipelines_latents(pipeline: Any, latents: Tensor, **arguments: Any) -> Tensor:
    """A diffusers pipeline's final latents [N, *SHAPE], from these."""
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        height=8 * SIZE[0], width=8 * SIZE[1], num_inference_steps=STEPS, latents=pack(latents), output_type="latent",
        return_dict=False, **arguments,
    )[0]  # fmt: skip
    return unpack(final, GRID)


def roll(
    model: Any,
    packed: bool,
    sigmas: Any,
    dynamics: Any = None,
    seeds: Any = range(2),
    latents: Any = None,
    **given: Any,
) -> ff.Trajectory:
    """A rollout in the layout; from latents [N, *SHAPE] where these are given, by Euler's ODE where no dynamics is."""
    if latents is not None:
        given["initial"] = pack(latents) if packed else latents
    shape = PACKED if packed else SHAPE
    return ff.rollout(model, shape, sigmas, dynamics or ff.ODE(), seeds, **{"progress": False, **given})


def assert_pipelines_loop(traj: ff.Trajectory, packed: bool, latents: Tensor, final: Tensor) -> None:
    """The rollout's end is the pipeline's, which is neither small nor where it began."""
    assert traj.final is not None and final.std() > 0.5 and (final - latents).std() > 0.5
    assert_same_at_another_width(unpack(traj.final, GRID) if packed else traj.final, final, "final latents")


def assert_log_probs_repeat(model: Any, packed: bool, condition: Any, negative: Any, guidance: ff.CFG) -> None:
    """Dense rollouts of three samples a prompt, replayed in halves."""
    seeds = ff.sample_seeds(5, 0, list(range(PROMPTS)), 3)
    traj = roll(
        model, packed, ff.sigma_schedule(STEPS, shift=3.0), ff.FlowSDE(0.7), seeds, condition=condition, negative=negative,
        guidance=guidance, dense=ff.Completion(3), main_rows=2,
    )  # fmt: skip
    for part in traj.split(2):
        assert_replays(model, part, condition, negative, guidance)


def assert_same_bits_in_both_layouts(adapter: Callable[..., Any], module: Any, condition: Any) -> None:
    """adapter(module, packed=False). Of strided states too."""
    sample, sigma = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.4])
    velocity = adapter(module)(sample, sigma, condition)
    assert velocity.shape == sample.shape
    assert torch.equal(adapter(module, packed=True)(pack(sample), sigma, condition), pack(velocity))
    strided = sample.to(memory_format=torch.channels_last)
    assert torch.equal(adapter(module)(strided, sigma, condition), velocity)
