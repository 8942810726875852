"""The demonstration: a dense-reward rollout of handwritten digits, with its pictures and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastflow as ff

from . import digits
from .report import print_tables, write_report

TITLE = "Dense-reward rollout of handwritten digits"


@dataclass(frozen=True)
class DigitsRollout:
    """What to roll out; calling `run()` does it.

    prompts:   how many prompts (digits 0..9, then 0..9 again, ...), or the digits themselves. group: samples per prompt.
    dynamics:  default ff.FlowSDE(0.7). guidance: CFG scale, 1 for none. shift: of the schedule.
    dense:     "all", a number of evaluations per completion, or None for the final samples alone.
    threads:   CPU threads while it runs; None: as many as torch has now. One by default: the network is so small that a second
               thread gains little, and where other processes share the cores the two wait for each other most of the time.
    The rest is as in `ff.rollout`.
    """

    prompts: int | Sequence[int] = 16
    group: int = 16
    steps: int = 10
    dynamics: Any = None
    guidance: float = 2.0
    shift: float = 3.0
    dense: str | int | None = "all"
    seed: int = 0
    lockstep: str = "exact"
    max_rows: int | None = None
    threads: int | None = 1
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    progress: bool = True

    @property
    def digits(self) -> list[int]:
        """The digit of each prompt."""
        if isinstance(self.prompts, int):
            return [p % digits.PROMPTS for p in range(self.prompts)]
        return list(self.prompts)

    def run(self) -> ff.Trajectory:
        """Loads the model, fits the classifier and rolls out. Raises what `ff.rollout` and `digits.DigitReward` raise."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads or before)
            return self._run()
        finally:
            torch.set_num_threads(before)

    def _run(self) -> ff.Trajectory:
        wanted = self.digits
        reward = digits.DigitReward(wanted)
        module, embeddings = digits.load_model(device=self.device, dtype=self.dtype)
        return ff.rollout(
            ff.models.SD3(module),
            shape=digits.SHAPE,
            sigmas=ff.sigma_schedule(self.steps, shift=self.shift),
            dynamics=self.noise,
            seeds=ff.sample_seeds(self.seed, 0, list(range(len(wanted))), self.group),
            condition=embeddings.condition(wanted),
            guidance=None if self.guidance == 1.0 else ff.CFG(self.guidance),
            negative=None if self.guidance == 1.0 else embeddings.negative(1),
            dense=None if self.dense is None else ff.Completion(evaluations=self.dense),
            decode=digits.decode,
            reward=reward,
            lockstep=self.lockstep,
            max_rows=self.max_rows,
            progress=self.progress,
        )

    @property
    def noise(self) -> Any:
        """The dynamics in use."""
        return ff.FlowSDE(noise_level=0.7) if self.dynamics is None else self.dynamics

    def settings(self) -> dict[str, str]:
        """The settings in words, for the report."""
        every = "all remaining steps" if self.dense == "all" else f"{self.dense} evaluations"
        training = digits.read_record()["training"]
        return {
            "model": f"SD3Transformer2DModel of the digits, trained for {training['steps']:,} steps of {training['batch']}",
            "data": "UCI handwritten digits, 8x8 pixels, 1,437 training images",
            "prompts": ", ".join(str(d) for d in self.digits),
            "samples per prompt": str(self.group),
            "steps": str(self.steps),
            "schedule shift": f"{self.shift:g}",
            "dynamics": repr(self.noise),
            "guidance": "none" if self.guidance == 1.0 else f"CFG, scale {self.guidance:g}",
            "completions": "none: final samples only" if self.dense is None else f"every state, by {every}",
            "lockstep": self.lockstep,
            "rows per network call": "as many as there are" if self.max_rows is None else f"at most {self.max_rows}",
            "network dtype": str(self.dtype).removeprefix("torch."),
            "threads": str(self.threads or torch.get_num_threads()),
            "seed": str(self.seed),
            "reward model": f"logistic regression on RBF features; test accuracy {digits.classifier().test_accuracy:.1%}",
        }


def run_digits(out: str | Path, *, command: str = "fastflow rollout --model digits", **options: Any) -> ff.Trajectory:
    """Rolls out, prints the tables, and writes trajectory.safetensors, pictures and report.html into `out`.

    options: the fields of `DigitsRollout`. command: the command line that the page shows.
    """
    rollout = DigitsRollout(**options)
    trajectory = rollout.run()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "trajectory.safetensors"
    trajectory.save(saved)  # first: a page that cannot be written loses nothing
    paths = write_report(
        trajectory,
        out,
        title=TITLE,
        prompts=digits.prompt_labels(rollout.digits),
        command=command,
        settings=rollout.settings(),
        decode=digits.decode,
        reward_name=digits.DigitReward.name,
    )
    paths["trajectory"] = saved
    print_tables(trajectory, title=TITLE)
    print("\nwritten")
    for path in paths.values():
        print(f"  {path}")
    return trajectory
