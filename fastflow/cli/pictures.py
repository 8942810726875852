"""Pictures of a rollout: the final images, and the clean prediction from every state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST = 8  # rows and columns of a picture
BATCH = 4  # images decoded at a time

Decode = Callable[[Tensor, Any], Tensor]


def write_pictures(trajectory: Any, decode: Decode, prompts: int, group: int, out: Path) -> list[str]:
    """Writes final.png and, if there are clean predictions, clean.png; returns the names of the files.

    final.png: a row per prompt, a column per sample, at most 8 of each. clean.png: a row per prompt (its first sample),
    a column per state.
    """
    rows, columns = min(prompts, MOST), min(group, MOST)
    chosen = torch.arange(prompts * group).reshape(prompts, group)[:rows, :columns]
    written = []
    if trajectory.final is not None:
        save_grid(_decoded(trajectory.final[chosen.flatten()], decode), columns, out / "final.png")
        written.append("final.png")
    if trajectory.clean is not None:
        states = trajectory.clean.shape[1]
        kept = torch.linspace(0, states - 1, min(states, MOST + 4)).round().long()
        clean = trajectory.clean[chosen[:, 0]][:, kept].flatten(0, 1)
        save_grid(_decoded(clean, decode), len(kept), out / "clean.png")
        written.append("clean.png")
    return written


def save_grid(images: Tensor, columns: int, path: Path, gap: int = 2) -> None:
    """Images [M, 3, H, W] in 0..1, row by row, as one PNG."""
    from PIL import Image

    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    pixels = (sheet * 255.0).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


def _decoded(clean: Tensor, decode: Decode) -> Tensor:
    return torch.cat([decode(part, None).cpu() for part in clean.split(BATCH)])
