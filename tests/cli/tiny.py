"""Networks of a few thousand weights, saved as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WIDTH = 16


def transformer(**changes: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**{**config, **changes})


def pipeline() -> Any:
    """A StableDiffusion3Pipeline with random weights: two CLIP encoders, no T5, images of 16x16 from latents of 8x8."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=600,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tokenizer() -> Any:
    """A CLIP tokenizer that spells: every letter is a token."""
    import tempfile

    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
