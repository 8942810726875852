"""The only module that reads the environment."""

from __future__ import annotations

import os


def triton_interpret() -> bool:
    """TRITON_INTERPRET=1: Triton runs its kernels in Python on the CPU (read by Triton itself at import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
