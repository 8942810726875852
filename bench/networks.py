"""Networks of the sizes that people train, with random weights: how long they take does not depend on the values.

Configurations of the transformers and autoencoders of stable-diffusion-3.5-medium and FLUX.1-dev, as published with them, in
the classes of diffusers; the reward is a vision transformer of ViT-B/16's size. The tiny ones have one layer of each part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastflow as ff

# The autoencoder of both families.
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
TINY_VAE = {
    **VAE, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16,
    "down_block_types": VAE["down_block_types"][:2], "up_block_types": VAE["up_block_types"][:2],
}  # fmt: skip


@dataclass(frozen=True)
class Vision:
    """Sizes of the reward."""

    size: int = 224
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12


TINY_VISION = Vision(16, 8, 16, 1, 2)


@dataclass(frozen=True)
class Spec:
    """A family at one size. shape: of one sample's latents; text: tokens of a prompt; scale: of CFG, None without it."""

    name: str
    about: str
    transformer: str  # diffusers' class
    config: dict[str, Any]
    shape: tuple[int, int, int]
    text: int
    shift: float
    scale: float | None
    embedded: float | None = None  # guidance that the network embeds
    kin: str = ""  # the tiny spec of the same family
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    vision: Vision = Vision()
    dtype: torch.dtype = torch.bfloat16


SD35_MEDIUM = Spec(
    "sd3.5-medium-shape",
    "Stable Diffusion 3.5 medium at 512 px: 24 layers of width 1536, CFG, 77 + 128 text tokens as in flow_grpo",
    "SD3Transformer2DModel",
    {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
    shape=(16, 64, 64), text=205, shift=3.0, scale=4.5, kin="sd3-tiny",
)  # fmt: skip
FLUX_DEV = Spec(
    "flux-shape",
    "FLUX.1-dev at 512 px: 19 double and 38 single layers of width 3072, guidance embedded, 512 text tokens",
    "FluxTransformer2DModel",
    {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    shape=(16, 64, 64), text=512, shift=3.0, scale=None, embedded=3.5, kin="flux-tiny",
)  # fmt: skip
TINY: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
}
SPECS = {
    spec.name: spec
    for spec in (
        SD35_MEDIUM,
        FLUX_DEV,
        Spec(
            "sd3-tiny", "one layer of Stable Diffusion 3.5's kind", "SD3Transformer2DModel",
            {
                **SD35_MEDIUM.config, **TINY, "attention_head_dim": 8, "caption_projection_dim": 16, "sample_size": 8,
                "pos_embed_max_size": 8, "dual_attention_layers": (0,),
            },
            shape=(16, 8, 8), text=5, shift=3.0, scale=4.5, kin="sd3-tiny", vae=TINY_VAE, vision=TINY_VISION,
            dtype=torch.float32,
        ),
        Spec(
            "flux-tiny", "one double and one single layer of FLUX.1's kind", "FluxTransformer2DModel",
            {**FLUX_DEV.config, **TINY, "num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
            shape=(16, 8, 8), text=5, shift=3.0, scale=None, embedded=3.5, kin="flux-tiny", vae=TINY_VAE, vision=TINY_VISION,
            dtype=torch.float32,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """What a rollout of a spec takes. condition, negative: one entry per row."""

    spec: Spec
    model: Callable[[Tensor, Tensor, Any], Tensor]
    condition: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    decode: Callable[[Tensor, ff.Info], Tensor]
    reward: Callable[[Tensor, ff.Info], Tensor]
    parameters: int

    @property
    def guidance(self) -> ff.CFG | None:
        return None if self.spec.scale is None else ff.CFG(self.spec.scale)


def build(spec: Spec, rows: int, device: torch.device, compiled: bool = False) -> Network:
    """Everything on the device, in the spec's dtype, from a fixed seed. Needs diffusers."""
    import diffusers

    torch.manual_seed(0)
    with _made_on(device, spec.dtype):
        module = _still(getattr(diffusers, spec.transformer)(**spec.config), device, spec.dtype)
        vae = _still(diffusers.AutoencoderKL(**spec.vae), device, spec.dtype)
        judge = _still(Judge(spec.vision), device, spec.dtype)
    adapter: Any = ff.models.SD3 if spec.transformer.startswith("SD3") else ff.models.Flux
    options = {} if spec.embedded is None else {"guidance_scale": spec.embedded}
    if compiled:
        compile_blocks(module)
    return Network(
        spec,
        adapter(module, **options),
        prompts(spec, rows, device, seed=1),
        prompts(spec, rows, device, seed=2) if spec.scale is not None else None,
        lambda clean, info: vae.decode(clean.to(spec.dtype), return_dict=False)[0],
        lambda images, info: judge(images.to(spec.dtype)).float(),
        sum(p.numel() for p in module.parameters()),
    )


def compile_blocks(module: torch.nn.Module) -> None:
    """Its transformer blocks under torch.compile, whose code they share: a kind of block and width is compiled once, in seconds
    where the whole network takes minutes."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks times widths; beyond the limit a block runs as it is
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(module, name, ()):
            block.compile(dynamic=False)


def prompts(spec: Spec, rows: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """What text encoders would have made, one entry per row."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {
        "encoder_hidden_states": (rows, spec.text, spec.config["joint_attention_dim"]),
        "pooled_projections": (rows, spec.config["pooled_projection_dim"]),
    }
    return {name: torch.randn(size, generator=generator, device=device).to(spec.dtype) for name, size in sizes.items()}


class Layer(nn.Module):
    """Attention and two linear maps, each behind a norm."""

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.heads = v.heads
        self.norms = nn.ModuleList(nn.LayerNorm(v.width) for _ in range(2))
        self.inputs, self.output = nn.Linear(v.width, 3 * v.width), nn.Linear(v.width, v.width)
        self.wide = nn.Sequential(nn.Linear(v.width, 4 * v.width), nn.GELU(), nn.Linear(4 * v.width, v.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, L, width] -> the same."""
        query, key, value = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.inputs(self.norms[0](tokens)).chunk(3, 2)
        )
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.output(seen.transpose(1, 2).flatten(2))
        result: Tensor = tokens + self.wide(self.norms[1](tokens))
        return result


class Judge(nn.Module):
    """A vision transformer that gives an image a number."""

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.size = v.size
        self.patches = nn.Conv2d(3, v.width, v.patch, v.patch)
        self.places = nn.Parameter(torch.randn(1, (v.size // v.patch) ** 2, v.width))
        self.layers = nn.Sequential(*(Layer(v) for _ in range(v.layers)))
        self.head = nn.Linear(v.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[M, 3, H, W] -> [M]."""
        seen = nn.functional.interpolate(images, (self.size, self.size), mode="bilinear")
        tokens = self.patches(seen).flatten(2).transpose(1, 2) + self.places
        scores: Tensor = self.head(self.layers(tokens).mean(1)).flatten()
        return scores


def _still(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return (
        nn.Module.to(module, device=device, dtype=dtype).requires_grad_(False).eval()
    )  # diffusers' own warns of dtypes


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Any:
    """Parameters are made and drawn on the device at once, in the dtype that they stay in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
