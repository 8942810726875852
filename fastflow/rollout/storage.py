"""Trajectories as safetensors files: tensors as they are, the rest as JSON in the header."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dynamics import Sigmas, Transitions
from .stats import Stats

if TYPE_CHECKING:
    from .trajectory import Trajectory

FORMAT = "fastflow.trajectory.1"


def save(trajectory: Trajectory, path: str | PathLike[str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .trajectory import ROWS

    tensors: dict[str, Tensor] = {f"transitions/{k}": v for k, v in trajectory.transitions.state_dict().items()}
    sigmas = trajectory.sigmas
    tensors["sigmas"], tensors["timesteps"] = sigmas.as_subclass(Tensor), sigmas.timesteps
    if sigmas.full is not None:
        tensors["full/sigmas"], tensors["full/timesteps"] = sigmas.full.as_subclass(Tensor), sigmas.full.timesteps
    for name in ROWS:
        value = getattr(trajectory, name)
        named = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        tensors.update({k: v for k, v in named.items() if v is not None})
    header = {
        "positions": trajectory.positions,
        "steps": trajectory.steps,
        "states": trajectory.states,
        "name": trajectory.transitions.name,
        "stats": trajectory.stats.as_dict(),
    }
    packed = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    target = Path(path).resolve()  # a link stays, and the file that it names is replaced
    if target.exists() and not target.is_file():
        raise OSError(f"path: wanted a file to write or replace, got {target}, which is no regular file")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # the umask's; safetensors makes files that only their owner can read
        save_file(packed, temporary, {"format": FORMAT, "trajectory": json.dumps(header)})
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        size = sum(t.numel() * t.element_size() for t in packed.values())
        kept = "what stood there is unchanged" if target.exists() else "nothing was left behind"
        raise OSError(f"path: could not write {size / 1e6:.1f} MB to {target} ({error}); {kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: str | PathLike[str], device: torch.device | str) -> Trajectory:
    from safetensors import SafetensorError, safe_open

    from .trajectory import ROWS, Trajectory

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: wanted a {FORMAT} file, got {path}, which is no file")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"path: wanted a {FORMAT} file, got {path} with format {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: wanted a whole {FORMAT} file, got {path} ({error})") from error
    header = json.loads(metadata["trajectory"])
    fields: dict[str, Any] = {}
    for name in ROWS:
        named = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
        fields[name] = named or tensors.get(name)
    table = {k.split("/", 1)[1]: v.cpu() for k, v in tensors.items() if k.startswith("transitions/")}
    full = Sigmas(tensors["full/sigmas"].cpu(), tensors["full/timesteps"].cpu()) if "full/sigmas" in tensors else None
    return Trajectory(
        **fields,
        positions=tuple(header["positions"]),
        steps=tuple(header["steps"]),
        states=tuple(header["states"]),
        transitions=Transitions.from_state_dict(table, header["name"]),
        sigmas=Sigmas(tensors["sigmas"].cpu(), tensors["timesteps"].cpu(), full),
        stats=Stats.from_dict(header["stats"]),
    )
