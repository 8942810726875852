"""A step of a loop: all but the velocities is checked and laid out before the loop, so that inside it little is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .. import backends
from ..guidance import CFG
from ..noise import Noise
from . import checks
from .library import step_out
from .step import slots_of, wanted

if TYPE_CHECKING:
    from ..dynamics import At


class Launch:
    """`ff.step(sample, velocity, at, noise=noise, uncond=uncond, guidance=guidance, out=out)`, ready to be called many times.

    `sample` is read and `out` written where they lie at each call; seeds, step and coefficients are on the device, so a
    captured graph repeats it. No gradient. Raises what `ff.step` raises; for the velocities, at the call.
    """

    def __init__(
        self,
        sample: Tensor,
        at: At,
        out: Mapping[str, Tensor],
        *,
        noise: Noise | None = None,
        guidance: CFG | None = None,
        backend: str = "auto",
    ) -> None:
        self.sample, self.guidance, self.backend = checks.state(sample), guidance, backend
        self.coef = checks.coefficients(at, self.sample)
        self.score, self.reduce = checks.scoring(at, None, "mean")
        self.slots = slots_of(wanted(None, out, replay=False), out, self.sample, self.reduce)
        self.stored = self.slots[0].dtype if self.slots[0] is not None else self.sample.dtype
        self.seeds: Tensor | None = None
        self.counter: Tensor | None = None
        self.stream = self.offset = 0
        if noise is not None:
            self.seeds, self.counter = noise.counters(self.sample.device)
            self.stream, self.offset = noise.stream, noise.offset
        if guidance is not None:
            guidance.scale_rows(self.coef.device, self.coef.dtype)  # uploaded now, not at the first call
        backends.check_name(backend)

    def __call__(self, velocity: Tensor, uncond: Tensor | None = None) -> None:
        """Writes the outputs. velocity, uncond: [B, *] of any float dtype."""
        velocity = checks.like("velocity", velocity, self.sample)
        velocity, uncond, scale, rescale, token = checks.guided(velocity, uncond, self.guidance, self.sample)
        step_out(
            self.sample, velocity, uncond, self.coef, scale, None, self.seeds, self.counter, None, None, token, self.stream,
            self.offset, self.score, self.reduce, True, self.stored, rescale, "float32", self.backend, None,
            *self.slots,
        )  # fmt: skip
