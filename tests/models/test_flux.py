"""`ff.models.Flux` beside FluxPipeline: its loop, its inputs, both layouts of a state, replay, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.models.packing import pack, unpack
from tests.models.packed import (
    GRID,
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

TOKENS = 5


def network(embeds: bool = True) -> Any:
    """A FluxTransformer2DModel of one layer of each kind; `embeds` as FLUX.1-dev does, else as schnell."""
    return lively(
        of_diffusers("FluxTransformer2DModel")(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=embeds, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def conditions(seed: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(PROMPTS, tokens, WIDTH, generator=generator),
        "pooled_projections": torch.randn(PROMPTS, WIDTH, generator=generator),
    }


def adapter(module: Any, packed: bool = False, **options: Any) -> ff.models.Flux:
    scale = 3.5 if module.config.guidance_embeds else None
    return ff.models.Flux(module, **{"size": SIZE if packed else None, "guidance_scale": scale, **options})


def pipelines_own(module: Any, latents: Tensor, true_cfg_scale: float = 1.0) -> tuple[Tensor, Any]:
    """The pipeline's final latents [N, *SHAPE], and its scheduler, as FLUX.1-dev configures it."""
    scheduler = of_diffusers("FlowMatchEulerDiscreteScheduler")(use_dynamic_shifting=True, shift=3.0)
    pipeline = of_diffusers("FluxPipeline")(scheduler, None, None, None, None, None, module)
    (text, pooled), (no_text, no_pooled) = (
        [entry.to(module.dtype) for entry in conditions(seed).values()] for seed in (0, 1)
    )
    final = pipelines_latents(
        pipeline, latents, guidance_scale=3.5, true_cfg_scale=true_cfg_scale, prompt_embeds=text, pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_text, negative_pooled_prompt_embeds=no_pooled,
    )  # fmt: skip
    return final, scheduler


def test_every_input_shows() -> None:
    sample, sigma = torch.randn(PROMPTS, *SHAPE), torch.full((PROMPTS,), 0.8)
    first, second = conditions(), conditions(1)
    others = [{**first, name: second[name]} for name in first]
    for embeds in (False, True):
        module = network(embeds)
        assert_every_input_shows(adapter(module), sample, sigma, first, *others)
    weak, strong = (adapter(module, guidance_scale=scale)(sample, sigma, first) for scale in (1.0, 5.0))
    assert not torch.equal(weak, strong)


@LAYOUTS
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
@pytest.mark.parametrize("embeds", [False, True], ids=["schnell", "dev"])
def test_ode_is_the_pipelines_own_loop(embeds: bool, true_cfg: float, packed: bool) -> None:
    module, latents = network(embeds), torch.randn(PROMPTS, *SHAPE)
    final, scheduler = pipelines_own(module, latents, true_cfg)
    guided = {"guidance": ff.CFG(true_cfg, calls=2), "negative": conditions(1)} if true_cfg > 1.0 else {}
    sigmas = ff.sigmas_from(scheduler)
    traj = roll(adapter(module, packed), packed, sigmas, latents=latents, condition=conditions(), **guided)
    assert_pipelines_loop(traj, packed, latents, final)


@LAYOUTS
@pytest.mark.parametrize("embeds", [False, True], ids=["schnell", "dev"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_call_is_the_pipelines(dtype: torch.dtype, embeds: bool, packed: bool) -> None:
    module, latents = network(embeds).to(dtype), torch.randn(PROMPTS, *SHAPE)
    with recorded(module) as its:
        _, scheduler = pipelines_own(module, latents)
    with recorded(module) as mine:
        roll(adapter(module, packed), packed, ff.sigmas_from(scheduler), latents=latents, condition=conditions())
    assert_same_inputs(mine[0], its[0])
    assert mine[0]["timestep"].dtype == dtype and ("guidance" in mine[0]) == embeds
    assert_same_inputs([call["timestep"] for call in mine], [call["timestep"] for call in its], "timesteps")
    assert len(mine) == STEPS and len({float(call["timestep"][0]) for call in mine}) == STEPS


def test_timestep_casts() -> None:
    """bfloat16 moves 913.3 to 912; DanceGRPO truncates it to 913 and divides in float32."""
    module, sigma = network().bfloat16(), torch.tensor([0.9133, 0.5])
    wanted = {
        "network": (torch.tensor([912.0, 500.0]).bfloat16() / 1000),
        "float32": sigma * 1000.0 / 1000,
        "integer": torch.tensor([913, 500]) / 1000,
    }
    for cast, timestep in wanted.items():
        with recorded(module) as calls:
            adapter(module, timestep_cast=cast)(torch.randn(2, *SHAPE), sigma, conditions())
        assert_same_inputs(calls[0]["timestep"], timestep, cast)
    assert adapter(module).timestep_cast == "network"


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_repeats_the_log_probs(dtype: torch.dtype, packed: bool) -> None:
    model, guidance, negative = adapter(network().to(dtype), packed), ff.CFG(2.0, calls=2), conditions(1, tokens=3)
    assert_log_probs_repeat(model, packed, conditions(), negative, guidance)


def test_packing_is_the_pipelines() -> None:
    latents, pipeline = torch.randn(3, *SHAPE), of_diffusers("FluxPipeline")
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, 3, *SHAPE))
    assert torch.equal(unpack(pack(latents), GRID), latents)
    assert torch.equal(unpack(pack(latents), GRID), pipeline._unpack_latents(pack(latents), 32, 48, 8))


def test_both_layouts_give_the_same_bits() -> None:
    assert_same_bits_in_both_layouts(adapter, network(), conditions())


def test_wrap_finds_the_adapter() -> None:
    model = ff.models.wrap(network(), guidance_scale=3.5, size=SIZE)
    assert type(model) is ff.models.Flux and model.size == SIZE
    with pytest.raises(TypeError, match=r"got FluxTransformer2DModel \(ff\.models\.Flux takes that\)"):
        ff.models.SD3(network())


@LAYOUTS
def test_nothing_is_read_on_the_host(packed: bool) -> None:
    shape = PACKED if packed else SHAPE
    assert_reads_no_value(lambda module: adapter(module, packed), network(), shape, conditions())


def test_messages() -> None:
    module, sigma, condition = network(), torch.ones(2), conditions()
    model, packed = adapter(module), adapter(module, packed=True)
    wanted = r"sample: wanted latents \[N, 4, H, W\] or packed \[N, L, 16\]"
    for shape in ((2, 16), (2, 3, 4, 6), (2, 6, 15), (2, 4, 1, 4, 6)):
        with pytest.raises(ValueError, match=rf"{wanted}, got \({', '.join(map(str, shape))}\)"):
            packed(torch.zeros(shape), sigma, condition)
    with pytest.raises(ValueError, match=r"sample: wanted latents \[N, 4, H, W\], H and W even, got \(2, 4, 5, 6\)"):
        model(torch.zeros(2, 4, 5, 6), sigma, condition)
    with pytest.raises(ValueError, match=r"sample: wanted latents \[N, 6, 16\] for size=\(4, 6\), got \(2, 8, 16\)"):
        packed(torch.zeros(2, 8, 16), sigma, condition)
    with pytest.raises(ValueError, match=r"sample: wanted latents .* of size=\(4, 6\), got \(2, 4, 6, 4\)"):
        packed(torch.zeros(2, 4, 6, 4), sigma, condition)
    with pytest.raises(
        ValueError, match=r"size: wanted \(H, W\) .* packed states \[N, L, 16\], got None; ff\.models\.Flux\(mod"
    ):
        model(torch.zeros(2, *PACKED), sigma, condition)
    for size in ((4, 5), (4,), (0, 4), (4.0, 4.0), 8):
        with pytest.raises(ValueError, match=r"size: wanted \(H, W\) of the latents, even integers above 0, got"):
            adapter(module, size=size)
    for scale in (None, float("nan")):
        with pytest.raises(ValueError, match=rf"guidance_scale: wanted a number, since .* embeds it, got {scale}"):
            adapter(module, guidance_scale=scale)
    with pytest.raises(ValueError, match=r"guidance_scale: wanted none, .* got 3\.5; .*guidance=ff\.CFG\(3\.5\)"):
        adapter(network(False), guidance_scale=3.5)
    with pytest.raises(ValueError, match=r"condition: wanted tensors .*, got \['encoder_hidden_states'\]"):
        model(torch.zeros(2, *SHAPE), sigma, {"encoder_hidden_states": condition["encoder_hidden_states"]})
    with pytest.raises(
        ValueError, match=r"condition: wanted only encoder_hidden_states, pooled_projections, got img_ids too"
    ):
        model(torch.zeros(2, *SHAPE), sigma, {**condition, "img_ids": torch.zeros(2, 6, 3)})
