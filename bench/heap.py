"""The C library's heap, whose habits decide what a chain of fresh tensors costs on a CPU.

Every result of an eager chain is a fresh tensor. glibc may map its memory anew, a page fault for each 4 KB, or hand out what it
kept: at 16x16x64x64 the chain takes five times as long in one case as in the other, and a process drifts between them with
what else it allocates. A named state makes a ratio repeatable.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
STATES: dict[str, tuple[tuple[int, int], ...]] = {
    "default": (),  # glibc's own, which moves its threshold as it goes
    "mapped": (
        (M_MMAP_THRESHOLD, 128 << 10),
    ),  # its documented starting point, held: large blocks are mapped and returned
    "kept": ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, (1 << 31) - 1)),  # nothing is returned
}


def use(state: str) -> None:
    """Puts this process's heap in one of STATES, for good. Raises ValueError where the C library knows no mallopt."""
    if not STATES[state]:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(option, value) for option, value in STATES[state]):
        raise ValueError(f"heap: {state!r} needs glibc's mallopt, which is not to be had here; leave it out")
