"""Counter noise: what a sample's seed, the step and a stream number draw, whatever the batch, the rank or the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .transfer import upload

# Streams keep draws for different purposes apart under one seed.
TRANSITION, INITIAL, BRANCH = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normal noise of a batch, drawn inside the kernel: Philox4x32-10 keyed by each row's 64-bit seed.

    seeds:  int64 [B], or a sequence of B ints. Equal seeds draw equal noise and are an error unless `shared=True`.
            (Seeds already on a GPU are not checked: that would wait for it.)
    step:   int, or int64 [B] (a step per row, read on the device). Counter word 2.
    stream: keeps draws for different purposes apart: 0 transitions, 1 initial noise, 2 and up branches. Counter word 3.
    offset: index of a row's first element in the full sample, for packed shards; a multiple of 4.

    Element e of a row takes word pair e % 4 of counter (e / 4 low, e / 4 high, step, stream). Bits are the same on every
    backend (Salmon et al., SC 2011; Box-Muller with the polynomials of `fastflow.philox`); |z| <= 5.77.

    Raises TypeError for seeds that are not integers, ValueError for a wrong shape, a negative or too large step, stream or
    offset, an offset that is not a multiple of 4, and repeated seeds.
    """

    seeds: Tensor
    step: int | Tensor = 0
    stream: int = 0
    offset: int = 0
    shared: bool = False

    def __init__(
        self,
        seeds: Tensor | Sequence[int],
        step: int | Tensor = 0,
        stream: int = 0,
        offset: int = 0,
        shared: bool = False,
    ) -> None:
        seeds = check_seeds(seeds, shared=shared)
        if isinstance(step, Tensor):
            if step.dtype not in (torch.int64, torch.int32) or step.shape not in ((), (1,), seeds.shape):
                raise ValueError(
                    f"step: wanted an int or int64 [{seeds.shape[0]}], got {step.dtype} {tuple(step.shape)}"
                )
        else:
            _check_word("step", step)
        _check_word("stream", stream)
        if not 0 <= offset < 1 << 62 or offset % 4:
            raise ValueError(f"offset: wanted a multiple of 4, at least 0 (noise comes in fours), got {offset}")
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "stream", stream)
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "shared", shared)

    def counters(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(seeds int64 [B], step int64 [1 or B]) on the device."""
        if isinstance(self.step, Tensor):
            step = upload(self.step, device)
            step = step if step.dtype == torch.int64 and step.dim() == 1 else step.long().reshape(-1)
        else:
            step = torch.full((1,), self.step, dtype=torch.int64, device=device)
        return upload(self.seeds, device), step

    def sample(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """The draws as a tensor [B, *shape]: what `ff.step(..., noise=this)` uses inside."""
        from .ops.step import draw  # the kernels draw; ops imports this module

        return draw(self, tuple(shape), dtype, torch.device(device) if device is not None else self.seeds.device)


def _check_word(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{name}: wanted 0 <= {name} < 2**32 (one counter word), got {value}")


def check_seeds(seeds: Any, *, shared: bool = False, batch: int | None = None) -> Tensor:
    """Seeds as int64 [B]. Raises TypeError or ValueError in the words of `Noise`; equal seeds only with shared=True."""
    if not isinstance(seeds, Tensor):
        if not isinstance(seeds, Sequence) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            raise TypeError(f"seeds: wanted an int64 tensor [B] or a sequence of ints, got {type(seeds).__name__}")
        bad = [s for s in seeds if not -(1 << 63) <= s < 1 << 63]
        if bad:
            raise ValueError(f"seeds: wanted 64-bit integers, got {bad[0]}")
        seeds = torch.tensor(list(seeds), dtype=torch.int64)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds: wanted dtype int64, got {seeds.dtype}; use ff.sample_seeds or .to(torch.int64)")
    if seeds.dim() != 1 or (batch is not None and seeds.shape[0] != batch):
        wanted = "[B]" if batch is None else f"[{batch}], one per row"
        raise ValueError(f"seeds: wanted int64 {wanted}, got shape {tuple(seeds.shape)}")
    if not shared and seeds.device.type == "cpu":
        values = seeds.tolist()
        if len(set(values)) != len(values):
            twice = next(s for i, s in enumerate(values) if s in values[:i])
            raise ValueError(
                f"seeds: wanted distinct seeds, got {twice} at rows {[i for i, s in enumerate(values) if s == twice]}: these "
                "rows would draw the same noise; make them with ff.sample_seeds, or say Noise(..., shared=True)"
            )
    rows: Tensor = seeds
    return rows


def sample_seeds(base: int, epoch: int, prompt_ids: Sequence[int] | Tensor, copies: int) -> Tensor:
    """Seeds int64 [len(prompt_ids) * copies], prompt-major: row p * copies + c is copy c of prompt_ids[p].

    Each is the first 8 bytes of BLAKE2b over (base, epoch, prompt id, copy), so a sample keeps its noise for any world size
    and batch split, and two prompts, epochs or copies never share it by accident. `prompt_ids` are global: the index of the
    prompt in the data set, not in the batch of a rank.

    Raises TypeError for entries that are not integers, ValueError for copies < 1, ids outside 64 bits, or a repeated id.
    """
    ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids)
    numbers = {"base": base, "epoch": epoch, "copies": copies, **{f"prompt_ids[{i}]": v for i, v in enumerate(ids)}}
    for name, value in numbers.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")
        if not -(1 << 63) <= int(value) < 1 << 63:
            raise ValueError(f"{name}: wanted a 64-bit integer, got {value}")
    if copies < 1:
        raise ValueError(f"copies: wanted at least 1, got {copies}")
    if len(set(ids)) != len(ids):
        raise ValueError(
            f"prompt_ids: wanted distinct ids, got {len(ids) - len(set(ids))} repeated; raise `copies` instead"
        )

    def seed(prompt: int, copy: int) -> int:
        words = b"".join(int(v).to_bytes(8, "little", signed=True) for v in (base, epoch, prompt, copy))
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)

    return torch.tensor([seed(p, c) for p in ids for c in range(copies)], dtype=torch.int64)
