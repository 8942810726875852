"""The command line of the trainer."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from .algorithms import ALGORITHMS, DYNAMICS
from .rewards import NAMES

UNITS = ("count", "deviations")  # of ff.ExplorationCalibrator
CHECKPOINT = "checkpoint.pt"  # in --out
QUICK = {
    "algorithm": "dense-grpo",
    "reward": "ink",
    "digits": "0123",
    "chunk": 2,
    "group": 8,
    "steps": 6,
    "updates": 20,
}


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"wanted a whole number, 1 at least, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"wanted a finite number, got {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0.0:
        raise ArgumentTypeError(f"wanted a number above 0, got {text!r}")
    return value


def distinct_digits(text: str) -> list[int]:
    """Digits in a row, each once: 0123."""
    if not text or set(text) - set("0123456789") or len(set(text)) < len(text):
        raise ArgumentTypeError(f"wanted digits from 0 to 9, each once, as in 0123, got {text!r}")
    return [int(digit) for digit in text]


def parse(arguments: list[str] | None, about: str | None = None) -> Namespace:
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/train"))
    add("--quick", action="store_true", help=f"other defaults: {QUICK}")
    add("--resume", action="store_true", help="go on from --out/checkpoint.pt, up to --updates")
    add("--algorithm", choices=ALGORITHMS, default="dense-grpo")
    add("--reward", choices=sorted(NAMES), default="mix")
    add("--ink-target", type=number, default=0.42, help="mean grey level wanted, 0 to 1; the digits have 0.3")
    add("--weights", type=number, nargs="+", help="of the rewards of a mix: margin, ink; 1 each")
    add("--digits", type=distinct_digits, default="0123456789", help="to draw prompts from")
    add("--prompts", type=count, help="digits per update; all by default")
    add("--group", type=count, default=16, help="samples per digit")
    add("--chunk", type=count, default=2, help="digits rolled out together; every process has as many chunks")
    add("--updates", type=count, default=40)
    add("--inner", type=count, default=2, help="optimizer steps per rollout")
    add("--steps", type=count, default=10)
    add("--shift", type=positive, default=3.0)
    add("--dynamics", choices=sorted(DYNAMICS), help="default: cps for tp-grpo, else flow-sde")
    add("--noise-level", type=number, default=0.7)
    add("--noise", choices=("uniform", "calibrated"), default="uniform")
    add("--calibrations", type=count, default=20, help="rollouts that --noise calibrated takes before training")
    add(
        "--calibration-unit",
        choices=UNITS,
        default="deviations",
        help="of what counts as balance: count is DenseGRPO's rule",
    )
    add("--completions", choices=("all", "3"), default="all", help="evaluations per completion")
    add("--window", metavar="A:B", help="the stochastic steps: from A on, before B")
    add("--guidance", type=number, help="scale of CFG; default: 2, for nft 1, which has none")
    add("--rank", type=count, default=8, help="of the LoRA")
    add("--lr", type=positive, default=2e-3)
    add("--weight-decay", type=number, default=1e-4)
    add("--max-norm", type=positive, default=1.0, help="of the gradient")
    add("--clip", type=positive, default=1e-2, help="range of the ratio: wide, since an image has only 64 elements")
    add("--kl-weight", type=number, default=0.01)
    add("--beta", type=positive, default=1.0, help="of nft: how far the implicit policies stand from the old one")
    add(
        "--old-decay", type=number, default=1e-3, help="of nft: at update n the old policy keeps this times n of itself"
    )
    add("--old-decay-most", type=number, default=0.5)
    add("--seed", type=int, default=0)
    add("--save-every", type=count, default=10, help="updates between checkpoints")
    add("--threads", type=count, default=1, help="of a process; another number gives other last bits")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--no-progress", dest="progress", action="store_false")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(arguments)
    if args.prompts is None:
        args.prompts = len(args.digits)
    if args.guidance is None:
        args.guidance = 1.0 if args.algorithm == "nft" else 2.0
    if args.dynamics is None:
        args.dynamics = "cps" if args.algorithm == "tp-grpo" else "flow-sde"
    if args.weights is None:
        args.weights = [1.0] * len(NAMES[args.reward])
    if len(args.weights) != len(NAMES[args.reward]):
        parser.error(f"--weights: wanted one for each of {', '.join(NAMES[args.reward])}, got {args.weights}")
    if args.prompts > len(args.digits) or args.prompts % args.chunk:
        parser.error(
            f"--prompts: wanted a multiple of --chunk {args.chunk}, {len(args.digits)} at most, got {args.prompts}"
        )
    if args.noise == "calibrated" and (args.dynamics == "cps" or args.algorithm == "nft"):
        parser.error("--noise calibrated: wanted an SDE, whose noise it can set")
    if args.algorithm == "nft" and args.guidance != 1.0:
        parser.error(f"--guidance: wanted 1 for nft, which trains the network as it samples, got {args.guidance:g}")
    if args.window is not None and not _is_window(args.window, args.steps):
        parser.error(
            f"--window: wanted A:B with 0 <= A < B <= {args.steps}, the number of steps, as in 1:3, got {args.window!r}"
        )
    if args.resume and not (args.out / CHECKPOINT).is_file():
        parser.error(f"--resume: wanted a checkpoint of an earlier run, got no file {args.out / CHECKPOINT}")
    return args


def _is_window(text: str, steps: int) -> bool:
    start, _, end = text.partition(":")
    whole = all(part.isascii() and part.isdigit() for part in (start, end))
    return whole and 0 <= int(start) < int(end) <= steps


def settings(args: Namespace) -> dict[str, Any]:
    """What a run's numbers depend on; the number of updates is not one of them."""
    left_out = ("out", "resume", "quick", "updates", "save_every", "progress")
    return {name: value for name, value in vars(args).items() if name not in left_out}
