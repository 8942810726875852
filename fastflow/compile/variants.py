"""The calls whose launches are compiled ahead: what rollouts, `ff.step`, `ff.log_prob`, `ff.policy_loss` and
`ff.matching_loss` commonly ask for.

Rows are longer than one tile (2,048 elements) and begin at multiples of 16. Everything else (short rows, masks, sums, float16
states, other mixtures of dtypes) compiles at its first launch, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends import triton_losses as losses
from ..backends.base import PolicyCall, StepCall
from ..dynamics.columns import COLUMNS

if TYPE_CHECKING:
    from ..kernels.config import Config

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCH, NUMEL = 2, 4096
CHANNELS = 64  # of a token: what FLUX and Qwen-Image pack a latent into
# (state, velocity); networks answer in the narrow dtypes, states are float32 unless asked otherwise
PAIRS = ((F32, BF16), (F32, F32), (F32, F16), (BF16, BF16))
_SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}


class Compiled(Protocol):
    """What is compiled together, under one name."""

    @property
    def label(self) -> str: ...

    def launch(self, config: Config) -> None:
        """What the backend launches for it, on Triton's active device."""


@dataclass(frozen=True)
class Variant:
    """One call. source: "seeds", "noise", "given" (a replay) or "none"; outputs: names of StepCall's slots, where "shift"
    brings a reference network's velocity and "drift" the rollout's means.

    gradient: "velocity" or "both" adds the gradient of the outputs in the velocity, or in uncond too.
    """

    state: torch.dtype
    velocity: torch.dtype
    source: str
    outputs: tuple[str, ...]
    guided: bool = False
    rescale: str = "none"
    gradient: str | None = None
    kept: torch.dtype | None = None  # what next_sample is kept in, where it is not the state's dtype

    @property
    def label(self) -> str:
        """One line for tables: dtypes of state and velocity, guidance, source, outputs."""
        guidance = {"none": "cfg", "token": "cfg-token", "clamp": "cfg-clamp"}[self.rescale] if self.guided else "plain"
        words = [
            f"{_SHORT[self.kept or self.state]}/{_SHORT[self.velocity]}",
            guidance,
            self.source,
            "+".join(self.outputs),
        ]
        return " ".join(words) + (f" grad:{self.gradient}" if self.gradient else "")

    def call(self) -> StepCall:
        """The call on CPU tensors, whose contents no compilation looks at."""

        def state(dtype: torch.dtype) -> Tensor:
            return torch.zeros(BATCH, NUMEL, dtype=dtype)

        def row(dtype: torch.dtype) -> Tensor:
            return torch.zeros(BATCH, dtype=dtype)

        kept = self.kept or self.state
        slots: dict[str, Tensor | None] = {
            name: state(kept) for name in self.outputs if name in ("next_sample", "clean", "ode_next")
        }
        slots |= {name: state(F32) for name in self.outputs if name == "mean"}
        slots |= {name: row(F32) for name in self.outputs if name in ("log_prob", "shift", "drift")}
        slots |= {f"grad_{name}": row(F32) for name in self.outputs if name in ("shift", "drift")}
        if "shift" in self.outputs:
            slots["ref_velocity"] = state(self.velocity)
            slots["ref_uncond"] = state(self.velocity) if self.guided else None
        if "drift" in self.outputs:
            slots["old_mean"] = state(F32)
        slots |= {name: row(torch.int32) for name in self.outputs if name == "flags"}
        return StepCall(
            batch=BATCH,
            numel=NUMEL,
            sample=state(self.state),
            velocity=state(self.velocity),
            uncond=state(self.velocity) if self.guided else None,
            coef=torch.zeros(1, COLUMNS),
            scale=torch.ones(1) if self.guided else None,
            rescale=self.rescale,
            token=(NUMEL // CHANNELS, CHANNELS, 1) if self.rescale == "token" else (1, NUMEL, 1),
            noise=state(F32) if self.source == "noise" else None,
            seeds=row(torch.int64) if self.source == "seeds" else None,
            step=torch.zeros(1, dtype=torch.int64) if self.source == "seeds" else None,
            stream=0,
            offset=0,
            given=state(kept) if self.source == "given" else None,
            mask=None,
            score=0,
            reduce=0,
            score_rounded=True,
            product_dtype="float32",
            next_dtype=kept,
            **slots,
        )

    def launch(self, config: Config) -> None:
        call = self.call()
        backend.launch_step(call, config)
        if self.gradient is not None:
            uncond = torch.zeros_like(call.velocity) if self.gradient == "both" else None
            backend.launch_backward(call, torch.ones(BATCH), torch.zeros_like(call.velocity), uncond, config)


@dataclass(frozen=True)
class PolicyRows:
    """The rows of a policy loss: one kernel for every objective and divergence."""

    label: str = "policy rows"

    def launch(self, config: Config) -> None:
        rows = torch.zeros(5, BATCH)
        call = PolicyCall(
            rows[0], None, None, rows[0], rows[0], None, torch.zeros(1, COLUMNS), True, 0.0, 0.0, 0.0, 0.0, 0, 0,
            torch.zeros(8), rows,
        )  # fmt: skip
        losses.launch_policy(call, config)


@dataclass(frozen=True)
class Matching:
    """A matching loss whose noise is drawn, and its gradient. networks: the others, "old" and "ref", that it compares with."""

    networks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join(["f32/bf16 matching seeds", *self.networks, "grad:velocity"])

    def launch(self, config: Config) -> None:
        call = Variant(F32, BF16, "seeds", ()).call()
        call.old_mean = torch.zeros_like(call.velocity) if "old" in self.networks else None
        call.ref_velocity = torch.zeros_like(call.velocity) if "ref" in self.networks else None
        losses.launch_matching(call, 1.0, torch.zeros(6, BATCH), config)
        losses.launch_matching_backward(call, torch.zeros(3, BATCH), torch.zeros_like(call.velocity), config)


def variants() -> Iterator[Compiled]:
    """All of them, in the order of tables. A kernel that two of them launch is compiled once."""
    for state in (F32, BF16, F16):
        yield Variant(F32, F32, "seeds", ("next_sample",), kept=state)  # draws alone: initial noise
    for state, velocity in PAIRS:
        for guided in (False, True):
            yield from _every_pair(state, velocity, guided)
            if state == F32:
                yield from _wide_states(velocity, guided)
    yield from _rescaled(F32, BF16)
    yield PolicyRows()
    for networks in ((), ("old",), ("old", "ref")):
        yield Matching(networks)


def _every_pair(state: torch.dtype, velocity: torch.dtype, guided: bool) -> Iterator[Variant]:
    """Stochastic steps with and without a completion that opens, ODE steps, `ff.step`'s default, replay and its gradient."""
    for source, outputs in (
        ("seeds", ("next_sample", "log_prob", "flags")),
        ("seeds", ("next_sample", "log_prob", "ode_next", "flags")),
        ("none", ("next_sample", "flags")),
        ("seeds", ("next_sample", "log_prob")),
    ):
        yield Variant(state, velocity, source, outputs, guided)
    yield Variant(state, velocity, "given", ("log_prob",), guided, gradient="velocity")
    if guided:
        yield Variant(state, velocity, "given", ("log_prob",), guided, gradient="both")


def _wide_states(velocity: torch.dtype, guided: bool) -> Iterator[Variant]:
    """An ODE step at which a completion opens; noise from a tensor; kept means; the history of multistep solvers."""
    yield Variant(F32, velocity, "none", ("next_sample", "ode_next", "flags"), guided)
    if velocity == F16:
        return
    yield Variant(F32, velocity, "noise", ("next_sample", "log_prob"), guided)
    if velocity == BF16:
        scored = ("next_sample", "log_prob", "mean", "flags")
        yield Variant(F32, velocity, "seeds", scored, guided)
        yield Variant(F32, velocity, "seeds", (*scored, "ode_next"), guided)
        yield Variant(F32, velocity, "none", ("next_sample", "clean", "flags"), guided)
        yield Variant(F32, velocity, "seeds", ("next_sample", "log_prob", "clean", "ode_next", "flags"), guided)
    if velocity == BF16 and guided:  # a policy loss with a KL to a reference network
        yield Variant(F32, velocity, "given", ("log_prob", "shift"), guided, gradient="velocity")


def _rescaled(state: torch.dtype, velocity: torch.dtype) -> Iterator[Variant]:
    for rescale in ("token", "clamp"):
        for source, outputs in (
            ("seeds", ("next_sample", "log_prob", "flags")),
            ("seeds", ("next_sample", "log_prob", "ode_next", "flags")),
            ("none", ("next_sample", "flags")),
        ):
            yield Variant(state, velocity, source, outputs, True, rescale)
        yield Variant(state, velocity, "given", ("log_prob",), True, rescale, gradient="velocity")
