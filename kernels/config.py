"""Launch configurations: data, chosen by the caller, never searched for at run time. No result depends on them."""

from dataclasses import dataclass

TILE = 2048  # elements of one partial sum: part of the numerical contract, not a tuning knob


@dataclass(frozen=True)
class Config:
    """How one launch is cut up.

    block: elements of a row that one program handles, TILE times a power of two.
    num_warps: warps of 32 threads that share a program.
    """

    block: int = TILE
    num_warps: int = 4

    def __post_init__(self) -> None:
        tiles = self.block // TILE
        if tiles < 1 or self.block % TILE or tiles & (tiles - 1):
            raise ValueError(f"block: wanted {TILE} times a power of two, got {self.block}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps: wanted a power of two from 1 to 32, got {self.num_warps}")


DEFAULT = Config()
INTERPRETED = Config(block=32 * TILE)  # the interpreter's cost is per program
