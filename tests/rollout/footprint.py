"""Bytes that rollouts of large latents really take, in a process of its own: `python -m tests.rollout.footprint`.

Reads the names of cases, line by line, and answers each with JSON: what `ff.plan` predicts, what the network takes inside, and
by how much the process grew.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from bench import gpu_timing
from tests.rollout.networks import transformer

SHAPE = (4, 96, 96)  # 144 KiB in float32
BATCH, PROMPTS, STEPS = 24, 3, 10
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def conditions(prompts: int, device: str) -> dict[str, Tensor]:
    """64 KiB a prompt."""
    generator = torch.Generator().manual_seed(prompts)
    return {
        "encoder_hidden_states": torch.randn(prompts, 16, 1024, generator=generator).to(device),
        "pooled_projections": torch.randn(prompts, 16, generator=generator).to(device),
    }


def guided(calls: int) -> dict[str, Any]:
    return {"guidance": ff.CFG(3.0, calls=calls), "negative": 1}


def decode(clean: Tensor, info: ff.Info) -> Tensor:
    return clean[:, :1, ::8, ::8].clone()


def brightness(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


def shared() -> ff.Noise:
    return ff.Noise(torch.arange(PROMPTS).repeat_interleave(BATCH // PROMPTS), shared=True)


dense = ff.Completion()
dpmpp = {"solver": "dpmpp", "order": 2}
CASES: dict[str, dict[str, Any]] = {
    "final alone": {},
    "dense": {"dense": dense},
    "dense in full lockstep": {"dense": dense, "lockstep": "full"},
    "guidance in one call": {"dense": dense, **guided(1)},
    "guidance in two calls": {"dense": dense, **guided(2)},
    "guidance in full lockstep": {"dense": dense, "lockstep": "full", "widths": (48, 240, 480), **guided(1)},
    "max_rows": {"dense": dense, "max_rows": 16, **guided(1)},
    "means": {"dense": dense, "keep": ("mean", "clean"), "max_rows": 16},
    "window": {"dense": ff.Completion(states="window"), "steps": [2, 3]},
    "steps apart": {"dense": ff.Completion(2, states="window"), "steps": [1, 4, 7], "main_rows": 8},
    "shared prefix": {"dense": dense, "steps": [2, 3], "initial": shared, "max_rows": 16},
    "images at once": {"dense": dense, "reward": brightness, "max_rows": 16},
    "images in batches": {"dense": dense, "decode": decode, "reward": brightness, "max_decode": 96, "max_rows": 16, "keep": ()},
    "solver": {"dynamics": ff.ODE(**dpmpp), "dense": ff.Completion(**dpmpp), "max_rows": 16},
    "solver of completions": {"dense": ff.Completion(**dpmpp), "initial": shared, "max_rows": 16},
    "bfloat16": {"dense": dense, "dynamics": ff.CPS(0.7), "steps": [0, 1], "state_dtype": torch.bfloat16},
    "float64": {"dense": ff.Completion(1), "state_dtype": torch.float64, "backend": "reference", "max_rows": 4},
    "on the host": {"dense": dense, "keep": ("mean", "clean"), "store": "cpu", "max_rows": 16},
}  # fmt: skip


def measure(name: str, device: str = "cpu") -> dict[str, int]:
    """predicted: by the plan, with the network's own bytes where these make the fullest moment. measured: growth."""
    meter = _process if device == "cpu" else _gpu
    module = transformer(
        patch_size=32, sample_size=96, joint_attention_dim=1024, caption_projection_dim=16, pooled_projection_dim=16
    )
    model = ff.models.SD3(module.to(device))
    arguments = {"dynamics": ff.FlowSDE(0.7), "condition": conditions(PROMPTS, device), **CASES[name]}
    if "initial" in arguments:
        arguments["initial"] = arguments["initial"]()
    if "negative" in arguments:
        arguments["negative"] = conditions(1, device)
    call = (model, SHAPE, ff.sigma_schedule(STEPS, shift=3.0), arguments.pop("dynamics"), torch.arange(BATCH))
    plan = ff.plan(*call, **arguments)
    memory = plan.memory
    assert memory is not None
    widest = max(call.width for call in plan.calls)
    state = arguments.get("state_dtype", torch.float32)
    _network(meter, model, 1, state, device)  # once, so that what is made at first use is there
    inside = _network(meter, model, widest, state, device)
    grown = meter(lambda: ff.rollout(*call, progress=False, **arguments))
    moments = max(memory.start, memory.call, memory.score, memory.end)
    predicted = memory.peak - moments + max(moments, memory.call + inside)
    return {"plan": memory.peak, "inside": inside, "predicted": predicted, "measured": grown, "host": memory.host}


def _network(meter: Callable[[Callable[[], Any]], int], model: Any, rows: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that a call of the network takes beside its inputs and its velocity."""
    sample, sigma = torch.ones(rows, *SHAPE, dtype=dtype, device=device), torch.full((rows,), 0.5, device=device)
    condition = ff.gather(conditions(1, device), torch.zeros(rows, dtype=torch.int64))
    with torch.no_grad():
        velocity = rows * sample[0].numel() * 4
        return max(meter(lambda: model(sample, sigma, condition)) - velocity, 0)


def _process(function: Callable[[], Any]) -> int:
    """By how much the resident set grew at most."""
    gc.collect()
    before = _status("VmRSS")
    RESET.write_text("5")  # the peak starts anew
    kept = function()
    grown = _status("VmHWM") - before
    del kept
    return grown


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _gpu(function: Callable[[], Any]) -> int:
    """By how much the bytes in use on the device grew at most."""
    gc.collect()
    return gpu_timing.requested(function)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(measure(line.strip())) + "\n")
        sys.stdout.flush()
