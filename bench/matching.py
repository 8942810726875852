"""`bench matching`: DiffusionNFT's loss of a training step and its gradient, `ff.matching_loss` against eager autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from tests.tolerance import GRADIENT, LOSS

from . import baselines, gradients
from .gradients import gradient, with_grad
from .registry import Call, Entry, Inputs, Shape, TensorSpec, Variant, compare

FUSED, EAGER = "fused", "eager"
BETA, MOST = 0.5, 5.0  # the mixture of the two velocities; the advantage's bound
READ = ("clean", "velocity", "old_velocity")
TWO_PASSES = (*READ, *(f"{name}_again" for name in READ), "gradient")


def specs(shape: Shape) -> Mapping[str, TensorSpec]:
    """Tensors by name; the *_again ones are read a second time, in the backward. The fused noise is in no memory."""
    state, network = TensorSpec(shape, torch.float32), TensorSpec(shape, torch.bfloat16)
    read = {"clean": state, "velocity": network, "old_velocity": network}
    return {**read, **{f"{name}_again": spec for name, spec in read.items()}, "gradient": network}


def inputs(shape: Shape, device: torch.device | str = "cpu", number: int = 0) -> dict[str, Any]:
    """Velocities near their target at noise levels of a batch; the noise also as the tensor that eager code keeps."""
    generator = torch.Generator(device).manual_seed(number)

    def drawn(size: Shape) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    clean, sigma = drawn(shape), torch.rand(shape[:1], generator=generator, device=device) * 0.8 + 0.1
    counted = ff.Noise(torch.arange(shape[0], device=device) + number, step=number)
    noise = counted.sample(shape[1:], torch.float32, clean.device)
    velocity = (noise - clean + 0.3 * drawn(shape)).to(torch.bfloat16)
    old = (velocity.float() + 0.1 * drawn(shape)).to(torch.bfloat16)
    return {
        "clean": clean, "velocity": velocity.requires_grad_(), "old_velocity": old, "sigma": sigma, "noise": counted,
        "noisy": ff.noised(clean, sigma, noise), "advantage": 2.0 * drawn(shape[:1]),
    }  # fmt: skip


def fused(data: Inputs, backend: str) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        loss, _ = ff.matching_loss(
            data["velocity"], data["clean"], data["sigma"], data["noise"], objective="nft", advantage=data["advantage"],
            old_velocity=data["old_velocity"], beta=BETA, advantage_max=MOST, backend=backend,
        )  # fmt: skip
        return loss.detach(), gradient(loss, data)

    return with_grad(call)


def eager(data: Inputs, backend: str = "") -> Call:
    def call() -> tuple[Tensor, Tensor]:
        loss = baselines.nft_loss(
            data["noisy"],
            data["clean"],
            data["velocity"],
            data["old_velocity"],
            data["sigma"],
            data["advantage"],
            BETA,
            MOST,
        )
        return loss.detach(), gradient(loss, data)

    return with_grad(call)


def check(data: Inputs, backend: str, timed: Sequence[str]) -> None:
    """Loss and gradient against the reference's, and eager autograd's from float32 velocities."""
    (loss, found), (expected, wanted) = fused(data, backend)(), fused(data, "reference")()
    compare(f"loss of {backend}", loss, expected, LOSS)
    compare(f"gradient of {backend}", found, wanted, GRADIENT[wanted.dtype])
    wide = {**data, "velocity": data["velocity"].detach().float().requires_grad_()}
    loss, found = eager(wide | {"old_velocity": data["old_velocity"].float()})()
    compare("loss of eager autograd", loss, expected, LOSS)
    compare("gradient of eager autograd", found, wanted, GRADIENT[wanted.dtype])


ENTRY = Entry(
    name="matching",
    about="a forward-process loss (DiffusionNFT) and its gradient, fused and by eager autograd",
    shapes=(gradients.SHAPE,),
    inputs=inputs,
    specs=specs,
    variants=(
        Variant(FUSED, fused, TWO_PASSES, (EAGER,)),
        Variant(EAGER, eager),
    ),
    check=check,
    gate="tests/training/test_matching.py",
    repeats=41,
)
