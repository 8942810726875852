"""Is the trainer's network the rollout's? Their log-probabilities side by side, and why they differ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..guidance import CFG
from ..models.base import CASTS, Adapter
from ..rollout.network import Model
from ..rollout.route import Route
from ..rollout.trajectory import Trajectory
from .replay import Replay, rescore
from .replay import replay as replayed

EXPLAINED = 0.1  # a change that leaves less than this share of the difference explains it


@dataclass(frozen=True)
class Parity:
    """Differences by stored transition; lists are [K].

    steps:       of the schedule. difference: largest |log_prob - rollout's|, nats; mean: their mean.
    ratio:       (lowest, highest) exp(log_prob - rollout's) over samples. past: share of samples with a ratio outside the clip.
    clip:        clip range, 1 -/+ it. schedule_hash: of the transitions.
    rows, width: samples of a network call in the rollout (0: no one number), and here. cause: what is likely behind it.
    """

    steps: tuple[int, ...]
    difference: list[float]
    mean: list[float]
    ratio: list[tuple[float, float]]
    past: list[float]
    clip: float
    schedule_hash: str
    rows: int
    width: int
    cause: str

    @property
    def exact(self) -> bool:
        """Whether every log-probability is the rollout's bit for bit."""
        return all(difference == 0.0 for difference in self.difference)  # NaN is not

    @property
    def ok(self) -> bool:
        """Whether no sample lies outside the clip range before the first update."""
        return all(share == 0.0 for share in self.past)

    def __str__(self) -> str:
        lines = ["step   max |d log_prob|   mean |d log_prob|   ratio                      past clip"]
        for i, step in enumerate(self.steps):
            low, high = self.ratio[i]
            lines.append(
                f"{step:4d}   {self.difference[i]:16.3g}   {self.mean[i]:17.3g}   {low:.9f} to {high:.9f}   {self.past[i]:9.1%}"
            )
        lines.append(
            f"schedule {self.schedule_hash}, {self.rows or 'mixed'} samples a call in the rollout, {self.width} here"
        )
        return "\n".join([*lines, self.cause])


def parity(
    trajectory: Trajectory,
    model: Model | Route,
    *,
    condition: Any = None,
    negative: Any = None,
    guidance: CFG | None = None,
    rows: int | None = None,
    clip: float = 1e-4,
) -> Parity:
    """Compares a rollout's log-probabilities with those of `model` as a trainer calls it, before its first update.

    Arguments: as `ff.replay`, which makes the calls; clip: the trainer's clip range. Where they differ, it tries what usually
    is behind it on the worst step (another call width, timestep cast, order of the halves, guidance in the network's dtype,
    compiled against eager) and says which of them makes the difference vanish. Raises what `ff.replay` raises, and
    ValueError for a trajectory without stored transitions.
    """
    if not 0.0 <= clip < float("inf"):
        raise ValueError(f"clip: wanted a number of at least 0, got {clip}")
    if not trajectory.steps or not len(trajectory):
        raise ValueError(f"trajectory: wanted stored transitions of at least one sample, got {trajectory!r}")
    arguments = {"condition": condition, "negative": negative, "guidance": guidance, "rows": rows}
    again = rescore(trajectory, model, **arguments)
    difference = (again.log_probs.double() - trajectory.log_probs.double()).cpu()
    ratio = difference.exp()
    worst = int(difference.abs().amax(0).nan_to_num(nan=float("inf")).argmax())
    width = rows or trajectory.stats.main_rows or len(trajectory)
    size = float(difference[:, worst].abs().max())
    return Parity(
        steps=trajectory.steps,
        difference=difference.abs().amax(0).tolist(),
        mean=difference.abs().mean(0).tolist(),
        ratio=list(zip(ratio.amin(0).tolist(), ratio.amax(0).tolist(), strict=True)),
        past=(~((ratio - 1.0).abs() <= clip)).double().mean(0).tolist(),  # NaN is past it
        clip=clip,
        schedule_hash=trajectory.transitions.hash,
        rows=trajectory.stats.main_rows,
        width=width,
        cause="equal bit for bit" if size == 0.0 else _cause(trajectory, worst, size, model, arguments),
    )


def _cause(trajectory: Trajectory, k: int, size: float, model: Any, arguments: dict[str, Any]) -> str:
    """The change that makes the difference of transition k smallest, if it explains it."""
    at = f"at step {trajectory.steps[k]} the difference is {size:.3g} nats"
    if not math.isfinite(size):
        return f"the log-probabilities are not finite: {at}; the network's velocities, or the stored states, are not finite"
    found: list[tuple[float, str]] = []
    for words, again in _changes(trajectory, k, model, arguments):
        with torch.no_grad():
            scores = again()
        left = float((scores.double().cpu() - trajectory.log_probs[:, k].double().cpu()).abs().max())
        found.append((left, words))
    if found and min(found)[0] <= size * EXPLAINED:
        left, words = min(found, key=lambda entry: entry[0])
        return f"likely cause: {words} ({at}, and {left:.3g} with that mended)"
    if size <= _rounding(trajectory, k):
        return (
            f"likely cause: rounding of the stored states to {str(trajectory.samples.dtype)[6:]}, after they were scored "
            f"({at}, which that can explain); store float32 states, or score what is stored"
        )
    return (
        f"cause unknown: {at}, and no call width, timestep cast, order of the halves, guidance dtype or compilation explains "
        "it; the weights, the conditioning or the guidance may not be the rollout's, or the network not in its train/eval mode"
    )


def _changes(
    trajectory: Trajectory, k: int, model: Any, arguments: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(what would be wrong, the log-probabilities of transition k with that mended)."""
    guidance, rows = arguments["guidance"], arguments["rows"]

    def with_(model: Any, **other: Any) -> Callable[[], Tensor]:
        return lambda: replayed(trajectory, k, model, **{**arguments, **other}).log_prob()

    here = rows or trajectory.stats.main_rows or len(trajectory)
    for width in {trajectory.stats.main_rows, len(trajectory), 1} - {here, 0}:
        yield f"call width: {here} samples a call here, {width} in the rollout", with_(model, rows=width)
    if guidance is not None and not isinstance(model, Route):
        other = "velocity" if guidance.dtype == "float32" else "float32"
        words = {"velocity": "the network's dtype", "float32": "float32"}
        if guidance.rescale == "none":
            text = f"guidance is combined in {words[guidance.dtype]} here, in {words[other]} in the rollout"
            yield text, with_(model, guidance=replace(guidance, dtype=other))
        if guidance.calls == 1:
            text = "guidance takes one network call here, two in the rollout"
            yield text, with_(model, guidance=replace(guidance, calls=2))
            text = "order of the halves: the rollout had the conditional rows first"
            yield text, lambda: _swapped(trajectory, k, model, arguments)
    for variant, text in _adapters(model):
        yield text, with_(variant)


def _swapped(trajectory: Trajectory, k: int, model: Any, arguments: dict[str, Any]) -> Tensor:
    """Log-probabilities with the conditional rows first in each call."""
    other = {**arguments, "condition": arguments["negative"], "negative": arguments["condition"]}
    again = replayed(trajectory, k, model, **other)
    assert again.uncond is not None
    return Replay(again.sample, again.uncond, again.next_sample, again.at, again.velocity, again.guidance).log_prob()


def _adapters(model: Any) -> Iterator[tuple[Any, str]]:
    """The adapter with another timestep cast, and without compilation."""
    if not isinstance(model, Adapter):
        return
    for cast in CASTS:
        if cast != model.timestep_cast:
            variant = copy.copy(model)
            variant.timestep_cast = cast
            yield variant, f"timestep cast: {model.timestep_cast!r} here, {cast!r} in the rollout"
    original = getattr(model.module, "_orig_mod", None)
    if original is not None:
        variant = copy.copy(model)
        variant.module = original
        yield variant, "the network is compiled here and was not in the rollout"


def _rounding(trajectory: Trajectory, k: int) -> float:
    """Largest change of a mean log-probability if next_sample is rounded once scored: w (2 std e + e^2), e half an ulp."""
    move = trajectory.transition(k)
    if move.sample.dtype in (torch.float32, torch.float64):
        return 0.0
    half = torch.finfo(move.sample.dtype).eps / 2.0
    error = half * float(move.next_sample.float().abs().max())
    std = float(trajectory.transitions.std[trajectory.steps[k]])
    if std == 0.0:
        return error * error
    return (2.0 * std * error + error * error) / (2.0 * std * std)
