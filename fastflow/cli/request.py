"""What `fastflow rollout` was asked for, checked without torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DIGITS = "digits"
# name on the command line: class in fastflow, and the name of its noise knob (None where it has none)
DYNAMICS: dict[str, tuple[str, str | None]] = {
    "flow-sde": ("FlowSDE", "noise_level"),
    "dance-sde": ("DanceSDE", "eta"),
    "wan-sde": ("WanSDE", None),
    "cps": ("CPS", "noise_level"),
    "flow-ddim": ("FlowDDIM", "eta"),
    "dpm-sde": ("DPMSolverSDE", None),
    "ode": ("ODE", None),
}
DTYPES = ("float32", "bfloat16", "float16")
LOCKSTEPS = ("exact", "full")


@dataclass(frozen=True)
class Request:
    """The options of `fastflow rollout`. `dense`: "all", a number of evaluations, or None; `size`: (height, width)."""

    model: str
    prompts: list[str]
    group: int
    negative: str
    size: tuple[int, int] | None
    embeddings: Path | None
    reward: str | None
    steps: int
    dynamics: str
    noise_level: float | None
    guidance: float | None
    shift: float | None
    dense: str | int | None
    seed: int
    lockstep: str
    max_rows: int | None
    dtype: str
    device: str
    out: Path
    progress: bool

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--dynamics", self.dynamics, tuple(DYNAMICS)),
            ("--lockstep", self.lockstep, LOCKSTEPS),
            ("--dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{option}: wanted one of {', '.join(known)}, got {value!r}")
        if self.noise_level is not None and DYNAMICS[self.dynamics][1] is None:
            raise ValueError(f"--noise-level: {self.dynamics} has no noise knob; leave the option out")
        if self.reward is not None and (self.reward.count(":") != 1 or not all(self.reward.split(":"))):
            raise ValueError(f"--reward: wanted MODULE:FUNCTION, got {self.reward!r}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out: wanted a folder, got the file {self.out}")
        if self.model == DIGITS:
            for option, given in (
                ("--size", self.size),
                ("--embeddings", self.embeddings),
                ("--reward", self.reward),
                ("--negative", self.negative or None),
            ):
                if given is not None:
                    raise ValueError(f"{option}: the digits model brings its own; leave the option out")

    def command(self) -> str:
        """The command line that asks for the same."""
        words = ["fastflow", "rollout"]
        for name, value in asdict(self).items():
            if name == "prompts":
                words += [word for prompt in value for word in ("--prompts", prompt)]
            elif name == "size" and value is not None:
                words += ["--size", f"{value[0]}x{value[1]}"]
            elif name == "dense" and value is None:
                words += ["--dense", "none"]
            elif name not in ("progress", "device") and value not in (None, ""):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def parse_prompts(given: Sequence[str], digits: bool) -> list[str]:
    """Prompts as typed -> one string each: "@FILE" is one a line, and for digits "3,8" is two."""
    prompts: list[str] = []
    for text in given:
        if text.startswith("@"):
            try:
                lines = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise ValueError(f"--prompts: cannot read {text[1:]}: {error.strerror}") from error
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise ValueError(f"--prompts: {text[1:]} holds no prompt")
        else:
            found = [text]
        prompts += [part.strip() for entry in found for part in entry.split(",")] if digits else found
    if digits:
        wrong = [prompt for prompt in prompts if prompt not in tuple("0123456789")]
        if wrong:
            raise ValueError(f"--prompts: the digits model knows 0 to 9, got {', '.join(map(repr, wrong))}")
    return prompts


def parse_dense(text: str) -> str | int | None:
    """ "all", "none" (None) or a number of evaluations."""
    if text in ("all", "none"):
        return "all" if text == "all" else None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--dense: wanted all, none or a number of evaluations from 1 up, got {text!r}")
    return int(text)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "512x768" -> (512, 768)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--size: wanted HEIGHTxWIDTH in pixels, such as 512x768, got {text!r}")
    return int(parts[0]), int(parts[1])
