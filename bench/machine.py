"""What a figure was measured on."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastflow import doctor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    device: str
    cpu_model: str
    isa: str
    torch: str
    git_sha: str
    date: str
    heap: str  # state of the C library's heap, see heap.py


def machine(heap: str = "default") -> Machine:
    """This machine and this checkout, now."""
    return Machine(
        device="cpu",
        cpu_model=doctor.cpu_model(),
        isa=doctor.instructions() or torch.backends.cpu.get_cpu_capability().lower(),
        torch=torch.__version__,
        git_sha=_git_sha(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        heap=heap,
    )


def _git_sha() -> str:
    """The commit, with a + where tracked files differ from it; "unknown" outside a checkout."""
    try:
        sha = _git("rev-parse", "--short", "HEAD")
        return sha + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()
