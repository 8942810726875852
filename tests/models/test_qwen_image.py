"""`ff.models.QwenImage` beside QwenImagePipeline: its loop with true CFG, its inputs, masks, layouts, replay, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.models.packed import (
    LAYOUTS,
    PACKED,
    PROMPTS,
    SHAPE,
    SIZE,
    STEPS,
    WIDTH,
    assert_log_probs_repeat,
    assert_pipelines_loop,
    assert_same_bits_in_both_layouts,
    pipelines_latents,
    roll,
)
from tests.models.pipelines import (
    assert_every_input_shows,
    assert_reads_no_value,
    assert_same_inputs,
    lively,
    of_diffusers,
    recorded,
)

TOKENS = 6
TRUE_CFG = ff.CFG(4.0, rescale="token", calls=2)


def network() -> Any:
    return lively(
        of_diffusers("QwenImageTransformer2DModel")(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def conditions(seed: int = 0, tokens: int = TOKENS, masked: bool = True) -> dict[str, Tensor]:
    """Prompts padded to the longest; the first is shorter by two tokens."""
    text = torch.randn(PROMPTS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    if not masked:
        return {"encoder_hidden_states": text}
    mask = torch.ones(PROMPTS, tokens, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"encoder_hidden_states": text * mask[..., None], "encoder_hidden_states_mask": mask}


NEGATIVE = conditions(1, tokens=3, masked=False)


def adapter(module: Any, packed: bool = False, **options: Any) -> ff.models.QwenImage:
    return ff.models.QwenImage(module, **{"size": SIZE if packed else None, **options})


def pipelines_own(module: Any, latents: Tensor, true_cfg_scale: float) -> tuple[Tensor, Any]:
    """The pipeline's final latents [N, *SHAPE], and its scheduler, as Qwen-Image configures it."""
    scheduler = of_diffusers("FlowMatchEulerDiscreteScheduler")(use_dynamic_shifting=True, shift_terminal=0.02)
    pipeline = of_diffusers("QwenImagePipeline")(scheduler, None, None, None, module)
    condition = conditions()
    final = pipelines_latents(
        pipeline, latents, true_cfg_scale=true_cfg_scale,
        prompt_embeds=condition["encoder_hidden_states"].to(module.dtype),
        prompt_embeds_mask=condition["encoder_hidden_states_mask"],
        negative_prompt_embeds=NEGATIVE["encoder_hidden_states"].to(module.dtype),
        negative_prompt_embeds_mask=torch.ones(NEGATIVE["encoder_hidden_states"].shape[:2], dtype=torch.int64),
    )  # fmt: skip
    return final, scheduler


def test_every_input_shows() -> None:
    sample, sigma, first = torch.randn(PROMPTS, *SHAPE), torch.full((PROMPTS,), 0.8), conditions()
    assert_every_input_shows(adapter(network()), sample, sigma, first, conditions(1))
    unmasked = {"encoder_hidden_states": first["encoder_hidden_states"]}
    velocity, other = (adapter(network())(sample, sigma, condition) for condition in (first, unmasked))
    if not adapter(network()).needs_lengths:
        assert not torch.equal(velocity[0], other[0]), "padding is attended to"


def told(call: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call as every version of diffusers has them: 0.35 and 0.36 pass a mask of ones, which others leave out,
    and the number of tokens of each row, of which the network reads the largest.
    """
    mask, lengths = call.get("encoder_hidden_states_mask"), call.get("txt_seq_lens")
    if mask is not None and bool(mask.all()):
        del call["encoder_hidden_states_mask"]
    return {**call, "txt_seq_lens": max(lengths)} if lengths is not None else call


def test_ode_is_the_pipelines_own_loop_with_true_cfg() -> None:
    """The rescale is over tokens, so states are packed."""
    module, latents = network(), torch.randn(PROMPTS, *SHAPE)
    final, scheduler = pipelines_own(module, latents, 4.0)
    model, sigmas = adapter(module, packed=True), ff.sigmas_from(scheduler)
    traj = roll(model, True, sigmas, latents=latents, condition=conditions(), negative=NEGATIVE, guidance=TRUE_CFG)
    assert_pipelines_loop(traj, True, latents, final)


@LAYOUTS
def test_ode_is_the_pipelines_own_loop(packed: bool) -> None:
    module, latents = network(), torch.randn(PROMPTS, *SHAPE)
    final, scheduler = pipelines_own(module, latents, 1.0)
    sigmas = ff.sigmas_from(scheduler)
    traj = roll(adapter(module, packed), packed, sigmas, latents=latents, condition=conditions())
    assert_pipelines_loop(traj, packed, latents, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_calls_are_the_pipelines(dtype: torch.dtype) -> None:
    """The pipeline's conditional call goes first, the rollout's unconditional one."""
    module, latents = network().to(dtype), torch.randn(PROMPTS, *SHAPE)
    with recorded(module) as its:
        _, scheduler = pipelines_own(module, latents, 4.0)
    sigmas, given = ff.sigmas_from(scheduler), {"latents": latents, "condition": conditions()}
    with recorded(module) as mine:
        roll(adapter(module, packed=True), True, sigmas, guidance=TRUE_CFG, negative=NEGATIVE, **given)
    assert len(mine) == len(its) == 2 * STEPS
    assert_same_inputs(told(mine[1]), told(its[0]), "conditional call")
    assert_same_inputs(told(mine[0]), told(its[1]), "unconditional call")
    assert mine[1]["timestep"].dtype == dtype and mine[1]["encoder_hidden_states_mask"].dtype == torch.int64
    assert_same_inputs([call["timestep"] for call in mine], [call["timestep"] for call in its], "timesteps")
    with recorded(module) as mine:
        roll(adapter(module), False, sigmas, **given)
    assert_same_inputs(told(mine[0]), told(its[0]), "conditional call of an unpacked state")


@pytest.mark.parametrize(
    "packed, guidance", [(True, TRUE_CFG), (False, ff.CFG(4.0, calls=2))], ids=["packed", "unpacked"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_repeats_the_log_probs(dtype: torch.dtype, packed: bool, guidance: ff.CFG) -> None:
    assert_log_probs_repeat(adapter(network().to(dtype), packed), packed, conditions(), NEGATIVE, guidance)


def test_both_layouts_give_the_same_bits() -> None:
    assert_same_bits_in_both_layouts(adapter, network(), conditions())


def test_shapes_in_the_condition_are_those_of_the_sample() -> None:
    model, sample, sigma = adapter(network()), torch.randn(2, *SHAPE), torch.tensor([0.9, 0.4])
    velocity = model(sample, sigma, conditions())
    for shapes in ([[(1, 2, 3)]] * 2, [(1, 2, 3)] * 2, torch.tensor([[1, 2, 3]] * 2)):
        assert torch.equal(model(sample, sigma, {**conditions(), "img_shapes": shapes}), velocity)
    wanted = r"condition\['img_shapes'\]: wanted \[\(1, 2, 3\)\] in every row, the grid of sample, got"
    for shapes, got in (
        ([[(1, 2, 3)], [(1, 3, 2)]], r"\[\(1, 2, 3\)\], \[\(1, 3, 2\)\]; one size in a call"),
        ([[(1, 3, 2)]] * 2, r"\[\(1, 3, 2\)\]; one size"),
        ([[(1, 2, 3), (1, 2, 3)]] * 2, r"\[\(1, 2, 3\), \(1, 2, 3\)\]; one size"),
        (torch.tensor([[1, 2, 3], [1, 3, 2]]), r"\[1, 2, 3\], \[1, 3, 2\]; one size"),
    ):
        with pytest.raises(ValueError, match=f"{wanted} {got}"):
            model(sample, sigma, {**conditions(), "img_shapes": shapes})


@LAYOUTS
def test_nothing_is_read_on_the_host(packed: bool) -> None:
    shape = PACKED if packed else SHAPE
    assert_reads_no_value(lambda module: adapter(module, packed), network(), shape, conditions())


def test_messages() -> None:
    module, sigma, condition = network(), torch.ones(2), conditions()
    model, packed = adapter(module), adapter(module, packed=True)
    wanted = r"sample: wanted latents \[N, 4, H, W\] or packed \[N, L, 16\]"
    for shape in ((2, 16, 4, 6), (2, 4, 1, 4, 6), (2, 6, 4)):
        with pytest.raises(ValueError, match=rf"{wanted}, got \({', '.join(map(str, shape))}\)"):
            model(torch.zeros(shape), sigma, condition)
    with pytest.raises(ValueError, match=r"sample: wanted .* H and W even, got \(2, 4, 4, 5\)"):
        model(torch.zeros(2, 4, 4, 5), sigma, condition)
    with pytest.raises(ValueError, match=r"sample: wanted latents \[N, 6, 16\] for size=\(4, 6\), got \(2, 4, 16\)"):
        packed(torch.zeros(2, 4, 16), sigma, condition)
    with pytest.raises(ValueError, match=r"size: wanted \(H, W\) .* got None; ff\.models\.QwenImage\(module, size="):
        model(torch.zeros(2, *PACKED), sigma, condition)
    with pytest.raises(ValueError, match=r"guidance_scale: wanted none, .* got 4\.0; .*ff\.CFG\(4\.0\)"):
        adapter(module, guidance_scale=4.0)
    with pytest.raises(ValueError, match=r"condition: wanted tensors encoder_hidden_states, got \['prompt_embeds'\]"):
        model(torch.zeros(2, *SHAPE), sigma, {"prompt_embeds": condition["encoder_hidden_states"]})
    with pytest.raises(ValueError, match=r"condition: wanted only encoder_hidden_states, .* got txt_seq_lens too"):
        model(torch.zeros(2, *SHAPE), sigma, {**condition, "txt_seq_lens": [4, 6]})
