"""Trains a LoRA on the digits model against a reward of its images, with Flow-GRPO, DenseGRPO, TP-GRPO or DiffusionNFT.

    python examples/train_digits.py --quick --out out/quick
    python examples/train_digits.py --algorithm dense-grpo --noise calibrated --completions 3 --reward mix --out out/dense
    torchrun --nproc-per-node 2 examples/train_digits.py --quick --out out/two     # the same weights as one process
    accelerate launch --multi_gpu --num_processes 2 examples/train_digits.py --quick --out out/two                # the same
    python examples/train_digits.py --out out/dense --resume ...                   # goes on from out/dense/checkpoint.pt

What a trainer needs of fastflow is here and in digits_training/objectives.py: roll out, credit, replay, loss. Writes log.csv,
tensorboard/, checkpoint.pt, curves.png, samples.png and report.html into --out, and with --noise calibrated calibration.csv and
calibration.png. A resumed run has the bits of one that ran
through: all noise is a function of --seed, the update, the digit and the copy, so that there is no random state to keep.

On CPUs too accelerate needs --multi_gpu to start several processes: `accelerate launch --cpu --num_processes 2` starts one.
What is printed says how many there are.
"""

from __future__ import annotations

import random
import sys
import time
from argparse import Namespace
from typing import Any

import torch
from digits_training import algorithms, record, report
from digits_training.network import Network
from digits_training.objectives import Forward, Part, Policy
from digits_training.options import CHECKPOINT, parse, settings
from digits_training.ranks import Gradient, NotFiniteError, Ranks
from digits_training.rewards import NAMES, Rewards, weighted

import fastflow as ff
from fastflow.demo import digits

PICTURES, CALIBRATION = 1 << 40, -1  # epochs of the seeds that no update has


class Trainer:
    """The network, what changes it, and one update of it."""

    def __init__(self, args: Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.device = torch.device(args.device, ranks.local) if args.device == "cuda" else torch.device(args.device)
        self.network = Network(args, self.device)
        self.objective = Forward(args, self.network) if args.algorithm == "nft" else Policy(args, self.network)
        trained = self.network.trained.values()
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
        self.gradient = Gradient(trained, ranks)
        self.sigmas = ff.sigma_schedule(args.steps, shift=args.shift)
        self.weights = dict(zip(NAMES[args.reward], args.weights, strict=True))
        self.noise = algorithms.noise(args)
        start = self.noise if args.noise == "calibrated" else 0.0
        self.calibrator = ff.ExplorationCalibrator(start, self.sigmas, unit=args.calibration_unit)

    def chunks(self, update: int) -> list[list[int]]:
        """This process's share of the update's digits. A chunk is rolled out and replayed by itself, with the same bits on any
        process; a digit's group stays together."""
        args = self.args
        chosen = random.Random(f"{args.seed}, {update}").sample(args.digits, args.prompts)
        every = [chosen[i : i + args.chunk] for i in range(0, len(chosen), args.chunk)]
        return every[self.ranks.rank :: self.ranks.size]

    def roll(self, chunk: list[int], epoch: int, **options: Any) -> ff.Trajectory:
        """Samples a chunk; `options` are those of `ff.rollout`."""
        args = self.args
        given = {"dense": algorithms.completion(args), "reward": Rewards(NAMES[args.reward], chunk, args.ink_target)}
        return ff.rollout(
            self.network.model,
            shape=digits.SHAPE,
            sigmas=self.sigmas,
            seeds=ff.sample_seeds(args.seed, epoch, chunk, args.group),
            decode=digits.decode,
            progress=False,
            device=self.device,
            **self.network.conditions(chunk),
            **given | options,
        )

    def calibrate(self) -> None:
        """DenseGRPO's noise by step, found before training and then left alone."""
        for epoch in range(CALIBRATION, CALIBRATION - self.args.calibrations, -1):
            noise = self.calibrator.dynamics
            trials = [self.roll(chunk, epoch, dynamics=noise, dense=ff.Completion()) for chunk in self.chunks(epoch)]
            gains = torch.cat([weighted(ff.step_gains(trial), self.weights) for trial in trials])
            self.calibrator.update(gains, range(self.args.steps), self.ranks.group)

    @property
    def training_noise(self) -> Any:
        """The dynamics of the rollouts that are trained on."""
        return self.calibrator.dynamics if self.args.noise == "calibrated" else self.noise

    def batch(self, number: int) -> list[Part]:
        """Rolls out and credits this process's chunks of an update."""
        parts = []
        for chunk in self.chunks(number):
            with self.network.as_it_samples():
                trajectory = self.roll(chunk, number, dynamics=self.training_noise, steps=algorithms.window(self.args))
            advantages, info = algorithms.advantages(self.args, trajectory, self.weights)
            parts.append(Part(chunk, trajectory, advantages.to(self.device), info))
            self.objective.prepare(parts[-1])
        return parts

    def update(self, number: int) -> dict[str, float]:
        """Rolls out, credits, and makes `--inner` optimizer steps; the numbers of log.csv."""
        began = time.perf_counter()
        parts = self.batch(number)
        rewards = torch.cat([weighted(algorithms.final(part.trajectory), self.weights) for part in parts])
        evaluations = sum(part.trajectory.stats.evaluations for part in parts)
        silent = sum(part.info.zero_share * len(part.trajectory) for part in parts)
        mine = [len(rewards), float(rewards.sum()), float(rewards.square().sum()), evaluations, silent]
        count, total, squares, evaluations, silent = self.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        row = {
            "update": number,
            "reward_mean": total / count,
            "reward_std": max(squares / count - (total / count) ** 2, 0.0) ** 0.5,
            "evaluations": evaluations,
            "zero_share": silent / count,
        }
        for inner in range(self.args.inner):
            row |= self.step(parts, inner, f"update {number}, optimizer step {inner}")
        self.network.follow(min(self.args.old_decay * number, self.args.old_decay_most))
        return row | {"seconds": time.perf_counter() - began}

    def step(self, parts: list[Part], inner: int, place: str) -> dict[str, float]:
        """One optimizer step over all chunks. A loss is the mean over a chunk's samples, and chunks are of one size.
        place: what an error calls this step."""
        sums, largest = torch.zeros(2, dtype=torch.float64), -torch.inf
        for part in parts:
            columns = part.advantages.shape[1]
            share = 1.0 / (columns * len(parts) * self.ranks.size)
            for k in range(columns):
                loss, info = self.objective.loss(part, k, inner)
                (share * loss).backward()
                sums += share * torch.tensor([float(info.get("clip_fraction", torch.nan)), float(info["kl"])])
                largest = max(largest, float(info.get("ratio_max", largest)))
            self.gradient.add()
        norm = self.gradient.finish(self.args.max_norm, place)
        self.optimizer.step()
        self.gradient.clear()
        clipped, kl = self.ranks.sum(sums).tolist()
        ratio = torch.nan if clipped != clipped else self.ranks.largest(largest)  # no ratios without transitions
        return {"ratio_max": ratio, "clip_fraction": clipped, "kl": kl, "grad_norm": norm}

    def parity(self, number: int) -> ff.Parity:
        """Whether training repeats the rollout: its ratios are 1 before the first step."""
        chunk = self.chunks(number)[0]
        steps = algorithms.window(self.args)
        trajectory = self.roll(chunk, number, dynamics=self.training_noise, dense=None, steps=steps)
        found = ff.parity(trajectory, self.network.model, clip=self.args.clip, **self.network.conditions(chunk))
        if not found.ok:
            raise RuntimeError(f"the ratio is not 1 before the first update\n{found}")
        return found

    def pictures(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(images uint8 [P, C, 1, 8, 8], {reward: [P * C]}) of the ODE, always from the same noise."""
        chosen = self.args.digits
        scorer = Rewards(NAMES["mix"], chosen, self.args.ink_target)
        trajectory = self.roll(chosen, PICTURES, dynamics=ff.ODE(), dense=None, reward=scorer)
        return report.pictures(trajectory.final, len(chosen)), algorithms.final(trajectory)

    def state(self, done: int) -> dict[str, Any]:
        """All that the next update depends on."""
        state = {"done": done, "settings": settings(self.args), **self.network.state()}
        return state | {"optimizer": self.optimizer.state_dict(), "calibrator": self.calibrator.state_dict()}

    def load(self, state: dict[str, Any]) -> int:
        """Goes on from a checkpoint; returns the updates that are done."""
        self.network.load(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.calibrator.load_state_dict(state["calibrator"])
        return int(state["done"])


def main(arguments: list[str] | None = None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    args = parse(arguments, __doc__)
    torch.set_num_threads(args.threads)
    ranks = Ranks()
    if args.prompts % (args.chunk * ranks.size):
        sys.exit(
            f"--prompts: wanted a multiple of --chunk {args.chunk} times {ranks.size} processes, got {args.prompts}"
        )
    checkpoint = args.out / CHECKPOINT
    trainer, start = Trainer(args, ranks), 0
    if args.resume:
        start = trainer.load(record.load(checkpoint, settings(args)))
    elif args.noise == "calibrated":
        trainer.calibrate()
    found = "none: no transition is stored" if args.algorithm == "nft" else trainer.parity(start)
    log = None
    if ranks.first:
        args.out.mkdir(parents=True, exist_ok=True)
        log = record.Log(args.out, keep=start)
        print(f"processes: {ranks.size}\nratios before the first update:\n{found}")
        if args.noise == "calibrated":
            trainer.calibrator.write_log(args.out / "calibration.csv")
            trainer.calibrator.plot(args.out / report.CALIBRATION)
            print(trainer.calibrator)
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  reward {task.fields[reward]}"),
    )
    shown = args.progress and ranks.first
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("training", total=args.updates, completed=start, reward="")
        for number in range(start, args.updates):
            try:
                row = trainer.update(number)
            except NotFiniteError as error:
                if log is not None:
                    log.close()
                sys.exit(str(error))
            if log is not None:
                log.add(row)
                if (number + 1) % args.save_every == 0 or number + 1 == args.updates:
                    record.save(checkpoint, trainer.state(number + 1))
            progress.update(task, advance=1, reward=f"{row['reward_mean']:.3f}")
    if log is not None:
        log.close()
        finish(trainer, log)
    ranks.close()


def finish(trainer: Trainer, log: record.Log) -> None:
    """Pictures and rewards with and without the LoRA, and the page."""
    args = trainer.args
    with trainer.network.as_it_came():
        before = trainer.pictures()
    after = trainer.pictures()
    page = report.write(
        args.out,
        log.rows,
        prompts=args.digits,
        before=before,
        after=after,
        reward=f"reward ({args.reward})",
        command="python examples/train_digits.py " + " ".join(sys.argv[1:]),
        settings=settings(args),
        distance=trainer.objective.distance,
        calibrated=args.noise == "calibrated",
    )
    print(f"reward {log.rows[0]['reward_mean']:.3f} at the first update, {log.rows[-1]['reward_mean']:.3f} at the last")
    for name in before[1]:
        print(f"{name} of the ODE's samples: {before[1][name].mean():.3f} before, {after[1][name].mean():.3f} after")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
