"""The row engine: advance the rows that are due in network calls, and let one fused step write each output where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dynamics import At
from ..dynamics import columns as col
from ..guidance import CFG
from ..noise import INITIAL, Noise
from ..ops.step import step
from . import condition as conditioning
from .finish import Decode, Info, Reward, Scores
from .inputs import CallInputs, call_inputs
from .network import Model, evaluate
from .progress import Progress
from .salvage import Salvage, nonfinite_message
from .setup import Setup
from .stats import Clock, Stats
from .trajectory import Trajectory, gains_of


class Engine:
    """One rollout. Buffers are position-major ([M, B, *], [slots, B, *]), so rows of a call are contiguous slices."""

    def __init__(
        self,
        setup: Setup,
        model: Model,
        condition: Any,
        negative: Any,
        decode: Decode | None,
        reward: Reward | None,
        backend: str,
        progress: bool,
    ) -> None:
        self.setup, self.model, self.condition, self.negative = setup, model, condition, negative
        self.decode, self.reward, self.backend = decode, reward, backend
        self.clock = Clock(setup.device)
        self.stats = Stats(widths=setup.plan.main_widths, schedule_hash=setup.main.hash)
        self.scores = Scores((len(setup.chains) + 1) * setup.batch)
        self.progress = Progress(progress, self._units())
        self.level_done = -1  # levels that every main row has passed; -1: no initial state yet
        self.finished = False  # the network's work is done
        self.doing = "starting"

    def run(self, initial: Noise | Tensor | None) -> Trajectory:
        with Salvage(self), self.progress, torch.inference_mode(False), torch.no_grad():
            self._allocate()
            self._start(initial)
            self.level_done = 0
            for inputs in call_inputs(self.setup):
                self._advance(inputs)
            self.store[-1].copy_(self._state(self.setup.length))
            self.level_done, self.finished = self.setup.length, True
            self._check_finite()
            if self.reward is not None:
                self._score(self.reward)
        return self.trajectory()

    def _units(self) -> int:
        rows = (len(self.setup.chains) + 1) * self.setup.batch if self.reward is not None else 0
        chunk = self.setup.max_decode or max(rows, 1)
        return self.setup.plan.network_calls + -(-rows // chunk)

    def _allocate(self) -> None:
        s = self.setup

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, s.batch, *s.shape, dtype=s.state_dtype, device=s.device)

        slots = len(s.chains) + 1
        self.samples = empty(len(s.positions))
        self.store = empty(slots)
        self.scratch = empty(2)
        self.log_probs = torch.empty(len(s.steps), s.batch, dtype=self._score_dtype(), device=s.device)
        self.main_flags = torch.zeros(s.length, s.batch, dtype=torch.int32, device=s.device)
        self.store_flags = torch.zeros(s.length, slots * s.batch, dtype=torch.int32, device=s.device)
        self.seeds = s.seeds.to(s.device)
        self.main_history = empty(2) if bool((s.main.history != 0).any()) else None
        multistep = s.completions is not None and bool((s.completions.history != 0).any())
        self.store_history = empty(slots) if multistep else None

    def _score_dtype(self) -> torch.dtype:
        return torch.float64 if self.setup.state_dtype == torch.float64 else torch.float32

    def _start(self, initial: Noise | Tensor | None) -> None:
        s, first = self.setup, self._state(0)
        if isinstance(initial, Tensor):
            first.copy_(initial)
            return
        source = initial if initial is not None else Noise(s.seeds, shared=True)
        stream = source.stream or INITIAL  # never the draws of step 0
        noise = Noise(source.seeds, source.step, stream, source.offset, shared=True)
        with self.clock.stage("step"):
            first.copy_(noise.sample(s.shape, s.state_dtype, s.device))

    def _state(self, position: int) -> Tensor:
        """The main chain's states [B, *] at a position: stored ones, or one of two spare buffers."""
        if position in self.setup.positions:
            return self.samples[self.setup.positions.index(position)]
        return self.scratch[position % 2]

    def _advance(self, inputs: CallInputs) -> None:
        call = inputs.call
        self.doing = f"step {call.step} (sigma {float(self.setup.main.sigma[call.step]):.4g})"
        (lo, hi), (first, last) = call.main, call.completions
        rows = self.store.flatten(0, 1)[first:last]
        parts = [t for t in (self._state(call.step)[lo:hi], rows) if t.shape[0]]
        padding = call.padded - call.rows
        if padding:
            parts.append(parts[0][:1].expand(padding, *self.setup.shape))
        sample = parts[0] if len(parts) == 1 else torch.cat(parts)
        with self.clock.stage("network"):
            velocity, uncond = self._evaluate(sample, inputs)
        with self.clock.stage("step"):
            if hi > lo:
                self._step_main(inputs, velocity[: hi - lo], None if uncond is None else uncond[: hi - lo])
            if inputs.at is not None:
                mine = slice(hi - lo, call.rows)
                self._step_completions(
                    inputs, inputs.at, rows, velocity[mine], None if uncond is None else uncond[mine]
                )
        self.stats.calls += call.networks
        self.stats.evaluations += call.rows
        self.stats.padding += padding
        if hi == self.setup.batch and hi > lo:
            self.level_done = call.step + 1
        self.progress.advance(call.networks)

    def _evaluate(self, sample: Tensor, inputs: CallInputs) -> tuple[Tensor, Tensor | None]:
        guidance = self.setup.guidance if inputs.call.guided else None
        condition = conditioning.gather(self.condition, inputs.prompts)
        negative = conditioning.gather(self.negative, inputs.prompts) if guidance is not None else None
        velocity, uncond = evaluate(self.model, sample, inputs.sigma, condition, negative, guidance)
        return velocity.detach(), None if uncond is None else uncond.detach()

    def _step_main(self, inputs: CallInputs, velocity: Tensor, uncond: Tensor | None) -> None:
        """One transition of main rows: next state, score, and the first move of the completion that opens here."""
        s, level, (lo, hi) = self.setup, inputs.call.step, inputs.call.main
        out = {"next_sample": self._state(level + 1)[lo:hi], "flags": self.main_flags[level, lo:hi]}
        slot = s.opened_at(level)
        if level in s.steps:
            out["log_prob"] = self.log_probs[s.steps.index(level), lo:hi]
        if slot is not None:
            out["ode_next"] = self.store[slot, lo:hi]
        history = self.main_history if self.main_history is not None else self.store_history
        if self.main_history is not None:
            out["clean"] = self.main_history[level % 2, lo:hi]
        elif self.store_history is not None and slot is not None:
            out["clean"] = self.store_history[slot, lo:hi]
        noise = Noise(self.seeds[lo:hi], level, shared=True) if float(s.main.std[level]) > 0 else None
        step(
            self._state(level)[lo:hi], velocity, s.moves.at(level), noise=noise, uncond=uncond,
            guidance=inputs.main_guidance, out=out, backend=self.backend,
        )  # fmt: skip
        if history is self.main_history and history is not None:
            weight = float(s.main.history[level])
            if weight:
                out["next_sample"].add_(weight * history[(level + 1) % 2, lo:hi])  # alpha= would contract
            if self.store_history is not None and slot is not None:
                self.store_history[slot, lo:hi].copy_(out["clean"])

    def _step_completions(
        self, inputs: CallInputs, at: At, rows: Tensor, velocity: Tensor, uncond: Tensor | None
    ) -> None:
        """One ODE move of open completions, in place."""
        first, last = inputs.call.completions
        out = {"next_sample": rows, "flags": self.store_flags[inputs.call.step, first:last]}
        guidance: CFG | None = inputs.completion_guidance
        if self.store_history is None:
            step(rows, velocity, at, uncond=uncond, guidance=guidance, out=out, backend=self.backend)
            return
        before = self.store_history.flatten(0, 1)[first:last]
        out["clean"] = torch.empty_like(rows)
        step(rows, velocity, at, uncond=uncond, guidance=guidance, out=out, backend=self.backend)
        weight = at.rows(rows.device)[:, col.HISTORY].reshape(-1, *[1] * len(self.setup.shape))
        rows.add_(weight * before)
        before.copy_(out["clean"])

    def _check_finite(self) -> None:
        """Reads the kernels' flags, once: raises for a velocity that was not finite."""
        flagged = bool(self.main_flags.any()) or bool(self.store_flags.any())
        if flagged:
            raise FloatingPointError(nonfinite_message(self.setup, self.main_flags.cpu(), self.store_flags.cpu()))

    def _score(self, reward: Reward) -> None:
        """Decode and reward, slot by slot, in batches of max_decode."""
        s = self.setup
        clean = self.store.flatten(0, 1)
        position = torch.tensor(s.positions_of_slots()).repeat_interleave(s.batch)
        sample_index = torch.arange(s.batch).repeat(len(self.store))
        chunk = s.max_decode or max(clean.shape[0], 1)
        for start in range(0, clean.shape[0], chunk):
            rows = slice(start, min(start + chunk, clean.shape[0]))
            info = Info(s.prompt_index[sample_index[rows]], sample_index[rows], position[rows])
            self.doing = f"decode of rows {rows.start} to {rows.stop - 1}"
            with self.clock.stage("decode"):
                images = clean[rows].clone()  # hooks may write into it
                if self.decode is not None:
                    images = self.decode(images, info)
            if self.decode is not None:
                self.stats.decodes += len(info)
            self.doing = f"reward of rows {rows.start} to {rows.stop - 1}"
            with self.clock.stage("reward"):
                self.scores.add(reward(images, info), info, start)
            self.progress.advance(1)
        self.doing = "waiting for rewards"
        with self.clock.stage("reward"):
            self.scores.settle()

    def trajectory(self) -> Trajectory:
        """What has been computed so far."""
        s = self.setup
        self.stats.seconds = self.clock.read()
        slots = torch.tensor(s.slots)
        known = len([p for p in s.positions if p <= self.level_done])
        scored = len([k for k in s.steps if k < self.level_done])
        clean = rewards = None
        if self.finished:
            whole = list(s.slots) == list(range(len(self.store)))
            clean = (self.store if whole else self.store[slots.to(self.store.device)]).transpose(0, 1)
            rewards = self.scores.table(slots, s.batch)
        return Trajectory(
            samples=self.samples[:known].transpose(0, 1),
            positions=s.positions[:known],
            log_probs=self.log_probs[:scored].T,
            steps=s.steps[:scored],
            seeds=s.seeds,
            prompt_index=s.prompt_index,
            transitions=s.main,
            sigmas=s.sigmas,
            final=self.store[-1] if self.finished else None,
            clean=clean,
            states=s.states,
            rewards=rewards,
            gains=gains_of(rewards),
            stats=self.stats,
        )
