"""NVIDIA architectures by name, and what a multiprocessor of each holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
PTX = ("compute_80", "compute_120")  # embedded in any case, for GPUs that no machine code is for
_REGISTERS = 65536  # of a multiprocessor, in four quarters; a warp takes them by 256
_RESERVED = 1024  # bytes of shared memory that every block costs beside its own


@dataclass(frozen=True)
class Target:
    """An architecture: `number` is what Triton calls it, `name` what nvcc does ("sm_90a": features of that one alone).

    threads, blocks, shared: the most that a multiprocessor holds; shared in bytes. Source: CUDA C++ Programming Guide,
    technical specifications per compute capability.
    """

    name: str
    threads: int
    blocks: int
    shared: int

    @property
    def number(self) -> int:
        return int(re.sub(r"\D", "", self.name))

    @property
    def plain(self) -> str:
        """The name without its letter."""
        return f"sm_{self.number}"

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """Share of a multiprocessor's warps that blocks of `warps` warps fill, by registers a thread and shared bytes."""
        most = self.threads // 32
        by_registers = most
        if registers:
            by_registers = 4 * (_REGISTERS // 4 // (-(-registers * 32 // 256) * 256))
        by_shared = self.shared // (_RESERVED + -(-shared // 128) * 128)
        blocks = min(self.blocks, most // warps, by_registers // warps, by_shared)
        return blocks * warps / most


_KIB = 1024
_LIMITS = {
    80: (2048, 32, 164 * _KIB),
    86: (1536, 16, 100 * _KIB),
    87: (1536, 16, 164 * _KIB),
    89: (1536, 24, 100 * _KIB),
    90: (2048, 32, 228 * _KIB),
    100: (2048, 32, 228 * _KIB),
    103: (2048, 32, 228 * _KIB),
    120: (1536, 24, 100 * _KIB),
    121: (1536, 24, 100 * _KIB),
}


def find(name: str) -> Target:
    """The target of that name. Raises ValueError for one that is not known."""
    match = re.fullmatch(r"sm_(\d+)([af]?)", name)
    number = int(match[1]) if match else 0
    lettered = match is not None and match[2] != ""
    if number not in _LIMITS or (lettered and number < 90) or (match and match[2] == "f" and number < 100):
        known = ", ".join(f"sm_{n}" for n in _LIMITS)
        raise ValueError(
            f"--arch: wanted names among {known}, or sm_90a and its like from sm_90 on, got {name!r}; "
            f"{', '.join(DEFAULT)} is the default"
        )
    return Target(name, *_LIMITS[number])


def find_all(names: list[str]) -> list[Target]:
    """The targets of those names, each once, in their order."""
    return [find(name) for name in dict.fromkeys(names)]
