"""Loads a network, its prompts and its decoder from disk or a hub, for the command line and for scripts.

What is read:

- a folder written by `StableDiffusion3Pipeline.save_pretrained` (it holds model_index.json), or the hub id of such
  a pipeline;
- a folder written by `SD3Transformer2DModel.save_pretrained` (config.json, or transformer/config.json) beside an
  embeddings.safetensors as `save_embeddings` writes it: the prompts then are those of that file.

diffusers (and transformers, for a pipeline) are imported by the functions that need them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIPELINE, TRANSFORMER = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
EMBEDDINGS = "embeddings.safetensors"
_TENSORS = ("encoder_hidden_states", "pooled_projections")


@dataclass
class Loaded:
    """What `ff.rollout` needs of a network.

    module:     the diffusers transformer, in eval mode, its gradients off.
    prompts:    P prompts, in the order of the conditions.
    condition:  encoder_hidden_states [P, L, D] and pooled_projections [P, E].
    negative:   the same for the unconditional side, [P, ...]; None without one.
    shape:      of one sample, (channels, height, width), in latent pixels.
    scheduler:  the pipeline's own scheduler, not yet set to a number of steps; None for a bare transformer.
    decode:     clean [M, C, H, W], info -> images float32 [M, 3, 8H, 8W] in 0..1; None for a bare transformer.
    """

    module: Any
    prompts: list[str]
    condition: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    shape: tuple[int, int, int]
    scheduler: Any = None
    decode: Callable[[Tensor, Any], Tensor] | None = None


def load(
    source: str | Path,
    prompts: Sequence[str],
    *,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
    embeddings: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Loads `source`, a folder or a hub id as the module says, and encodes `prompts`.

    Args:
        negative: the negative prompt of a pipeline ("" for none in words); None leaves the unconditional side out.
        size: (height, width) of an image in pixels (for a bare transformer: of a latent). Default: what the network was
            trained at.
        embeddings: the prompts of a bare transformer; default: embeddings.safetensors in its folder.

    Raises:
        ValueError: the folder holds something else, a prompt is not in the embeddings, or the size does not divide.
        FileNotFoundError: no such folder. OSError: a hub id that cannot be had.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(f"model: there is no folder {source}, and a hub id has the form owner/name")
        try:
            return _pipeline(str(source), prompts, negative, size, dtype, device)
        except OSError as error:
            reason = str(error).removesuffix(" Please check out the root cause in the stacktrace above.")
            raise OSError(f"model: {source} is no folder here, and as a hub id it cannot be had: {reason}") from error
    kind = class_of(folder)
    if kind == PIPELINE:
        return _pipeline(str(folder), prompts, negative, size, dtype, device)
    if kind == TRANSFORMER:
        return _transformer(folder, prompts, negative is not None, size, embeddings, dtype, device)
    raise ValueError(f"model: wanted a {PIPELINE} or a {TRANSFORMER}, got a {kind} in {folder}")


def class_of(folder: Path) -> str:
    """The diffusers class that `folder` was saved by."""
    for name in ("model_index.json", "config.json", "transformer/config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("_class_name")
            return str(found if found is not None else f"class that {name} does not name")
    raise ValueError(f"model: {folder} holds neither model_index.json ({PIPELINE}) nor config.json ({TRANSFORMER})")


def save_embeddings(
    path: str | Path, prompts: Sequence[str], condition: dict[str, Tensor], negative: dict[str, Tensor] | None = None
) -> None:
    """Writes the prompts of a bare transformer.

    `condition`: encoder_hidden_states [P, L, D] and pooled_projections [P, E], one entry per prompt; `negative`: the
    same with one entry ([1, ...]) or P. They are stored under these names, the negative ones with "negative_" in front;
    the prompts are a JSON list under "prompts" in the metadata.
    """
    from safetensors.torch import save_file

    tensors = {name: condition[name] for name in _TENSORS}
    tensors |= {f"negative_{name}": negative[name] for name in _TENSORS} if negative is not None else {}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(path), {"format": "pt", "prompts": json.dumps(list(prompts))})


def load_embeddings(path: str | Path) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor] | None]:
    """What `save_embeddings` wrote: prompts, condition, negative (one entry per prompt)."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        names = json.loads((file.metadata() or {}).get("prompts", "null"))
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"embeddings: wanted {' and '.join(_TENSORS)} in {path}, got {', '.join(sorted(tensors))}")
    condition = {name: tensors[name] for name in _TENSORS}
    count = len(condition[_TENSORS[0]])
    prompts = [str(i) for i in range(count)] if names is None else [str(name) for name in names]
    if any(len(tensor) != len(prompts) for tensor in condition.values()):
        lengths = {name: len(tensor) for name, tensor in condition.items()}
        raise ValueError(f"embeddings: wanted one entry for each of {len(prompts)} prompts in {path}, got {lengths}")
    if f"negative_{_TENSORS[0]}" not in tensors:
        return prompts, condition, None
    negative = {name: tensors[f"negative_{name}"] for name in _TENSORS}
    return (
        prompts,
        condition,
        {name: tensor.expand(len(prompts), *tensor.shape[1:]) for name, tensor in negative.items()},
    )


def _transformer(
    folder: Path,
    wanted: Sequence[str],
    guided: bool,
    size: tuple[int, int] | None,
    embeddings: str | Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Loaded:
    from diffusers import SD3Transformer2DModel

    file = Path(embeddings) if embeddings is not None else folder / EMBEDDINGS
    if not file.is_file():
        raise FileNotFoundError(
            f"embeddings: {folder} is a bare {TRANSFORMER}, which needs its prompts in {file}; "
            "fastflow.models.loading.save_embeddings writes them"
        )
    names, condition, negative = load_embeddings(file)
    unknown = [prompt for prompt in wanted if prompt not in names]
    if unknown:
        raise ValueError(f"prompts: {file.name} holds {_some(names)}; not {', '.join(map(repr, unknown))}")
    if guided and negative is None:
        raise ValueError(
            f"negative: {file.name} holds no negative_{_TENSORS[0]} and negative_{_TENSORS[1]}, which guidance needs"
        )
    chosen = list(wanted) or names
    index = torch.tensor([names.index(prompt) for prompt in chosen])
    subfolder = None if (folder / "config.json").is_file() else "transformer"
    module = SD3Transformer2DModel.from_pretrained(str(folder), subfolder=subfolder, **_typed(dtype))

    def place(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[index].to(device=device, dtype=dtype) for name, tensor in tensors.items()}

    side = int(module.config.sample_size)
    return Loaded(
        module=_ready(module, device),
        prompts=chosen,
        condition=place(condition),
        negative=place(negative) if guided and negative is not None else None,
        shape=_shape(module, size or (side, side), 1),
    )


def _pipeline(
    source: str,
    prompts: Sequence[str],
    negative: str | None,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Loaded:
    import transformers  # noqa: F401 (diffusers' own error for its absence is no ModuleNotFoundError)
    from diffusers import StableDiffusion3Pipeline

    if not prompts:
        raise ValueError("prompts: wanted at least one prompt, got none")
    pipeline = StableDiffusion3Pipeline.from_pretrained(source, **_typed(dtype), **_left_out(source))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    with torch.no_grad():
        tokens, negative_tokens, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            negative_prompt=negative,
            do_classifier_free_guidance=negative is not None,
            device=torch.device(device),
        )
    scale = int(pipeline.vae_scale_factor)
    side = int(pipeline.default_sample_size) * scale
    vae = _ready(pipeline.vae, device)

    @torch.no_grad()
    def decode(clean: Tensor, info: Any = None) -> Tensor:
        latents = clean.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0.0, 1.0)

    return Loaded(
        module=_ready(pipeline.transformer, device),
        prompts=list(prompts),
        condition=dict(zip(_TENSORS, (tokens, pooled), strict=True)),
        negative=None if negative is None else dict(zip(_TENSORS, (negative_tokens, negative_pooled), strict=True)),
        shape=_shape(pipeline.transformer, size or (side, side), scale),
        scheduler=pipeline.scheduler,
        decode=decode,
    )


def _typed(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype argument of diffusers' from_pretrained, which 0.42 renamed."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


def _left_out(source: str) -> dict[str, None]:
    """Components that a saved pipeline does without (an SD3 without its T5), which diffusers wants passed as None."""
    index = Path(source) / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return {name: None for name, kind in parts.items() if isinstance(kind, list) and kind[0] is None}


def _ready(module: Any, device: torch.device | str) -> Any:
    return module.requires_grad_(False).eval().to(device)


def _shape(module: Any, size: tuple[int, int], scale: int) -> tuple[int, int, int]:
    multiple = scale * int(module.config.patch_size)
    if any(side < multiple or side % multiple for side in size):
        raise ValueError(f"size: wanted height and width as multiples of {multiple}, got {size[0]}x{size[1]}")
    return int(module.config.in_channels), size[0] // scale, size[1] // scale


def _some(names: Sequence[str], shown: int = 8) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + rest
