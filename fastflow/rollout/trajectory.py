"""What a rollout returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dynamics import At, Sigmas, Transitions
from ..transfer import upload
from .finish import Rewards, where
from .stats import Stats

ROWS = ("samples", "log_probs", "final", "clean", "rewards", "gains", "mean", "images", "seeds", "prompt_index")


class Transition(NamedTuple):
    """A stored transition: what `ff.log_prob` needs."""

    sample: Tensor  # [B, *]
    next_sample: Tensor  # [B, *]
    at: At  # its coefficients
    timestep: Tensor  # float32 [B], as the schedule lists it (1000 * sigma by default)

    @property
    def sigma(self) -> Tensor:
        """float32 [B]: what `model` is called with."""
        sigma = self.at.sigma.to(device=self.sample.device, dtype=torch.float32)
        return sigma.expand(self.sample.shape[0])


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States, log-probabilities, clean predictions and rewards of B samples. Rows are samples everywhere.

    samples   [B, M, *]  states in the rollout's dtype, at `positions` (0: initial noise, T: final)
    log_probs [B, K]     float32, nats, of the stochastic transitions `steps`
    final     [B, *]     the last state
    clean     [B, S, *]  predicted clean sample from each of the `states`
    rewards   [B, S]     of the clean predictions (or {name: [B, S]}); gains [B, S - 1]: reward after minus reward before
    mean      [B, K, *]  float32, of the stochastic transitions (keep=("mean",)); images [B, S, ...] decoded (keep=("images",))
    seeds, prompt_index  int64 [B]
    transitions, sigmas  the schedule of the main chain; stats: what it cost

    A part that was not asked for, or that an interrupted rollout did not reach, is None (log_probs and samples: shorter).
    """

    samples: Tensor
    positions: tuple[int, ...]
    log_probs: Tensor
    steps: tuple[int, ...]
    seeds: Tensor
    prompt_index: Tensor
    transitions: Transitions
    sigmas: Sigmas
    final: Tensor | None = None
    clean: Tensor | None = None
    states: tuple[int, ...] = ()
    rewards: Rewards | None = None
    gains: Rewards | None = None
    mean: Tensor | None = None
    images: Tensor | None = None
    stats: Stats = field(default_factory=Stats)

    def __repr__(self) -> str:
        kept = [
            name for name in ("final", "clean", "rewards", "gains", "mean", "images") if getattr(self, name) is not None
        ]
        return (
            f"Trajectory({self.batch} samples of {tuple(self.samples.shape[2:])} {str(self.samples.dtype)[6:]}, "
            f"{len(self.positions)} states, {len(self.steps)} transitions, {len(self.states)} completed states, "
            f"{', '.join(kept) or 'partial'}; {self.transitions.name}, {self.stats.calls} network calls)"
        )

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def batch(self) -> int:
        return self.samples.shape[0]

    def transition(self, k: int) -> Transition:
        """The k-th stored transition, 0 <= k < K (of step `steps[k]`). Raises IndexError outside."""
        if not -len(self.steps) <= k < len(self.steps):
            raise IndexError(f"k: wanted a stored transition, 0 to {len(self.steps) - 1}, got {k}")
        step = self.steps[k]
        before, after = self.positions.index(step), self.positions.index(step + 1)
        timestep = upload(self.transitions.timestep[step].float(), self.samples.device)
        return Transition(
            self.samples[:, before], self.samples[:, after], self.transitions.at(step), timestep.expand(self.batch)
        )

    def set_rewards(self, rewards: Any) -> Trajectory:
        """A trajectory with these rewards [B, S] (or {name: [B, S]}), kept as float32 on the host, and their gains.

        Tensors, arrays and nested lists will do. Raises ValueError for another shape or a number that is not finite, TypeError
        for what is no number.
        """
        named = rewards if isinstance(rewards, Mapping) else {"": rewards}
        if not named:
            raise ValueError("rewards: wanted [B, S] numbers or {name: [B, S]}, got no name")
        tables = {str(name): self._rewards(str(name), values) for name, values in named.items()}
        kept: Rewards = tables if isinstance(rewards, Mapping) else tables[""]
        return replace(self, rewards=kept, gains=gains_of(kept))

    def _rewards(self, name: str, values: Any) -> Tensor:
        label, wanted = f"rewards[{name!r}]" if name else "rewards", (self.batch, len(self.states))
        try:
            exact = None if hasattr(values, "__array__") else torch.float64
            table = torch.as_tensor(values, dtype=exact, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{label}: wanted {list(wanted)} numbers, got {type(values).__name__}: {error}") from error
        if table.is_complex():
            raise TypeError(f"{label}: wanted real numbers, got {table.dtype}")
        if tuple(table.shape) != wanted:
            raise ValueError(f"{label}: wanted {list(wanted)}, got {tuple(table.shape)}")
        table = table.to(torch.float32, copy=True)
        wrong = (~torch.isfinite(table)).nonzero().tolist()
        if wrong:
            places = where([(row, self.states[column]) for row, column in wrong])
            value = table[wrong[0][0], wrong[0][1]].item()
            raise ValueError(f"{label}: wanted finite numbers, got {value} for {places}; score these too")
        return table

    def _map(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        changed: dict[str, Any] = {}
        for name in ROWS:
            value = getattr(self, name)
            if isinstance(value, dict):
                changed[name] = {k: function(v) for k, v in value.items()}
            elif value is not None:
                changed[name] = function(value)
        return replace(self, **changed)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Trajectory:
        """The chosen samples, always with a batch axis. An int, a slice, or indices or a bool mask [B]."""
        if isinstance(index, slice):
            return self._map(lambda t: t[index])
        rows = torch.as_tensor(index)
        if rows.numel() == 0 and rows.dim() == 1:
            rows = rows.to(torch.int64)  # an empty list has no dtype
        if (
            rows.dim() > 1
            or rows.is_floating_point()
            or (rows.dtype == torch.bool and tuple(rows.shape) != (self.batch,))
        ):
            raise TypeError(
                f"index: wanted an int, a slice, indices or a bool mask [{self.batch}], got {rows.dtype} {tuple(rows.shape)}"
            )
        rows = rows.reshape(-1)
        if rows.dtype != torch.bool and bool(((rows < -self.batch) | (rows >= self.batch)).any()):
            raise IndexError(f"index: wanted -{self.batch} to {self.batch - 1}, got {rows.tolist()}")
        return self._map(lambda t: t[rows.to(t.device)])

    def to(self, device: torch.device | str) -> Trajectory:
        """The trajectory on another device. States are never cast: there is no dtype argument."""
        return self._map(lambda t: t.to(device))

    def split(self, size: int) -> list[Trajectory]:
        """Parts of `size` samples; the last may be shorter."""
        if size < 1:
            raise ValueError(f"size: wanted at least 1, got {size}")
        return [self[i : i + size] for i in range(0, self.batch, size)]

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """One trajectory of all samples; costs are summed (those of parts of one rollout once).

        Raises ValueError unless schedules, positions, states, dtypes and what is known (rewards and their names) agree.
        """
        if not parts:
            raise ValueError("parts: wanted at least one trajectory, got none")
        first = parts[0]
        for i, part in enumerate(parts):
            for name in ("positions", "steps", "states", "transitions"):
                wanted, got = getattr(first, name), getattr(part, name)
                if got != wanted:
                    raise ValueError(f"parts[{i}].{name}: wanted {wanted}, as in the first, got {got}")
            for name in ROWS:
                wanted, got = _kind(getattr(first, name)), _kind(getattr(part, name))
                if got != wanted:
                    raise ValueError(f"parts[{i}].{name}: wanted {wanted}, as in the first, got {got}")

        def joined(name: str) -> Any:
            values = [getattr(p, name) for p in parts]
            if values[0] is None:
                return None
            if isinstance(values[0], dict):
                return {k: torch.cat([v[k] for v in values]) for k in values[0]}
            return torch.cat(values)

        costs = list({id(p.stats): p.stats for p in parts}.values())
        return replace(first, **{name: joined(name) for name in ROWS}, stats=Stats.total(costs))

    def as_dict(self) -> dict[str, Tensor]:
        """Every tensor with the batch on axis 0, for trainers that shuffle and slice dictionaries.

        Beside the fields: timesteps and sigmas float32 [B, K], steps [B, K], positions [B, M], states [B, S]. Named rewards
        become "rewards/name" and "gains/name".
        """
        result: dict[str, Tensor] = {}
        for name in ROWS:
            value = getattr(self, name)
            if isinstance(value, dict):
                result.update({f"{name}/{k}": v for k, v in value.items()})
            elif value is not None:
                result[name] = value
        steps, device = torch.tensor(self.steps, dtype=torch.int64), self.samples.device
        columns = {
            "timesteps": self.transitions.timestep[steps].float(),
            "sigmas": self.transitions.sigma[steps].float(),
            "steps": steps,
            "positions": torch.tensor(self.positions, dtype=torch.int64),
            "states": torch.tensor(self.states, dtype=torch.int64),
        }
        result.update({k: v.to(device).expand(self.batch, -1) for k, v in columns.items()})
        return result

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file. A file that stood there is replaced only once the new one is complete; OSError else."""
        from . import storage

        storage.save(self, path)

    @staticmethod
    def load(path: str | PathLike[str], device: torch.device | str = "cpu") -> Trajectory:
        """Reads what `save` wrote. Raises ValueError for a safetensors file that is not a trajectory."""
        from . import storage

        return storage.load(path, device)


def gains_of(rewards: Rewards | None) -> Rewards | None:
    """Reward after the step minus reward before it, [B, S - 1]."""
    if rewards is None:
        return None
    if isinstance(rewards, dict):
        return {name: values[:, 1:] - values[:, :-1] for name, values in rewards.items()}
    return rewards[:, 1:] - rewards[:, :-1]


def _kind(value: Tensor | dict[str, Tensor] | None) -> str:
    """What two trajectories must agree on in one field, in words."""
    if value is None:
        return "None"
    if isinstance(value, dict):
        return ", ".join(f"{name!r} {_kind(value[name])}" for name in sorted(value))
    return f"{value.dtype} [B, {', '.join(map(str, value.shape[1:]))}]" if value.dim() > 1 else f"{value.dtype} [B]"
