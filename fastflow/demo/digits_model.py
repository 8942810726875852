"""The flow model of the digits: a plain `diffusers.SD3Transformer2DModel` with 0.4 M parameters, and its prompt embeddings.

The checkpoint `digits.safetensors` is package data, trained by `examples/train_digits_flow.py`: weights in float16, the
diffusers config and the training record as JSON in the metadata. diffusers is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = 10  # digits 0..9
NULL = 10  # index of the null prompt: the unconditional side of classifier-free guidance
TOKENS = 2  # tokens per prompt
WIDTH = 64  # channels of a token, and of the pooled projection

CHECKPOINT = Path(__file__).with_name("digits.safetensors")
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 2,
    "qk_norm": "rms_norm",
}
METADATA = "digits"  # the only key: safetensors writes several in random order, and the file would differ each time
REBUILT = {"pos_embed.pos_embed"}  # a fixed table that the class computes itself: not stored


@dataclass
class Embeddings:
    """The prompts' embeddings, learned with the model: tokens [11, 2, 64] and pooled [11, 64], the last row the null prompt."""

    tokens: Tensor
    pooled: Tensor

    def condition(self, prompts: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Digits (10: the null prompt) -> encoder_hidden_states [P, 2, 64], pooled_projections [P, 64]."""
        index = torch.as_tensor(prompts, dtype=torch.int64)
        if index.ndim != 1 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= NULL):
            raise ValueError(f"prompts: wanted a list of digits 0..9 (or {NULL}, the null prompt), got {prompts}")
        index = index.to(self.tokens.device)
        return {"encoder_hidden_states": self.tokens[index], "pooled_projections": self.pooled[index]}

    def negative(self, count: int) -> dict[str, Tensor]:
        """The null prompt, `count` times."""
        return self.condition([NULL] * count)

    def to(self, device: torch.device | str) -> Embeddings:
        """The same embeddings on another device."""
        return Embeddings(self.tokens.to(device), self.pooled.to(device))


def build_module(config: Mapping[str, Any] = CONFIG) -> Any:
    """A new SD3Transformer2DModel, weights drawn from torch's global generator."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**config)


def save_checkpoint(module: Any, embeddings: Embeddings, path: str | Path, training: Mapping[str, Any]) -> None:
    """Writes one safetensors file: float16 weights, and in the metadata the diffusers config and the training record."""
    from safetensors.torch import save_file

    tensors = {f"transformer.{k}": v for k, v in module.state_dict().items() if k not in REBUILT}
    tensors |= {"embeddings.tokens": embeddings.tokens, "embeddings.pooled": embeddings.pooled}
    tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tensors.items()}
    config = {k: v for k, v in module.config.items() if not k.startswith("_")}
    record = {"config": config, "training": dict(training)}
    save_file(tensors, str(path), {METADATA: json.dumps(record, sort_keys=True)})


def load_model(
    path: str | Path = CHECKPOINT, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Embeddings]:
    """The trained SD3Transformer2DModel (eval mode, no gradients wanted) and its prompt embeddings in float32.

    `path` is a checkpoint file as `save_checkpoint` writes it, or a folder as `save_pretrained` does.
    Raises ValueError when the file holds other tensors than the model needs.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        from diffusers import SD3Transformer2DModel

        module = SD3Transformer2DModel.from_pretrained(str(path / "transformer"))
        table = load_file(str(path / "embeddings.safetensors"))
    else:
        tensors = {k: v.float() for k, v in load_file(str(path)).items()}
        module = build_module(read_record(path)["config"])
        prefix = "transformer."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        result = module.load_state_dict(weights, strict=False)
        missing = sorted(set(result.missing_keys) - REBUILT)
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{path.name}: tensors missing {missing}, not expected {result.unexpected_keys}; train it again"
            )
        table = {k.removeprefix("embeddings."): v for k, v in tensors.items() if not k.startswith(prefix)}
    module.requires_grad_(False).eval()
    torch.nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of layers to keep in float32, and lists none
    return module, Embeddings(table["tokens"], table["pooled"]).to(device)


def save_pretrained(module: Any, embeddings: Embeddings, folder: str | Path) -> None:
    """Writes the diffusers layout: `transformer/` (for `SD3Transformer2DModel.from_pretrained`) and embeddings.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(str(folder / "transformer"))
    table = {"tokens": embeddings.tokens, "pooled": embeddings.pooled}
    save_file({k: v.detach().cpu().contiguous() for k, v in table.items()}, str(folder / "embeddings.safetensors"))


def read_record(path: str | Path = CHECKPOINT) -> dict[str, Any]:
    """What a checkpoint file says about itself: `config`, as diffusers takes it, and `training`, the settings and losses."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise ValueError(f"{Path(path).name}: wanted {METADATA!r} in its metadata, got {sorted(metadata)}")
    return dict(json.loads(metadata[METADATA]))
