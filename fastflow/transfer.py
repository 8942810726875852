"""Between the host and a device, without waiting where that is safe."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A copy to a GPU makes nobody wait, but for pinned memory, which is read later than the call
    returns; within a capture, whose replays would read the host's memory again, it raises as torch does."""
    if t.device == device:
        return t
    if torch.compiler.is_compiling():
        return t.to(device)
    staged = device.type == "cuda" and not t.is_pinned() and not torch.cuda.is_current_stream_capturing()
    return t.to(device, non_blocking=staged)
