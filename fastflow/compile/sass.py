"""Machine code as nvdisasm prints it: how many instructions the shortest way through a kernel or its longest loop takes.

A kernel that serves several calls branches on what a call wants. Which way a call goes is told by what it must read and
write: the global accesses of 64 bits and more, and the shared stores of 128 and of 8. Ways on which narrower elements are read
or written (the ends of rows) are other calls'. Taken together: the fewest instructions of any way with just the accesses given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Accesses = Mapping[str, int]  # {"LDG.64": 4, "STG.128": 2, "STS.128": 1, "STS.8": 0}

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_ACCESS = re.compile(r"^(LDG|STG|STS)\b(?:.*?\.(U8|S8|U16|S16|64|128|256)\b)?")


@dataclass(frozen=True)
class Instruction:
    """predicate: "P0", "!P0", or "" for one that always counts."""

    predicate: str
    operation: str
    operands: str

    @property
    def access(self) -> str | None:
        """ "LDG.128" and its like; None for what tells no call from another: scalars of a row, and of shared memory."""
        found = _ACCESS.match(self.operation)
        if found is None:
            return None
        bits = (found[2] or "32").strip("US")
        plain = bits == "32" if found[1] != "STS" else bits not in ("8", "128")
        return None if plain else f"{found[1]}.{bits}"

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        found = re.search(r"\.L_x_\d+", self.operands) if self.operation.startswith("BRA") else None
        return found[0] if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        always = not self.predicate and re.match(r"!?U?P\d", self.operands) is None
        return not (always and re.match(r"(BRA|EXIT|RET|BRX|KILL)\b", self.operation))


@dataclass(frozen=True)
class Code:
    """One function. labels: name -> number of the instruction that it stands before."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

    @classmethod
    def read(cls, text: str) -> Code:
        """The function in a part of a disassembly."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif found := _LINE.match(line):
                instructions.append(Instruction(found[1] or "", found[2], found[3].strip()))
        return cls(tuple(instructions), labels)

    def longest_loop(self) -> range | None:
        """The instructions of the longest loop; None where there is none."""
        found = [
            range(start, number + 1)
            for number, one in enumerate(self.instructions)
            if one.target is not None and (start := self.labels[one.target]) < number
        ]
        return max(found, key=len, default=None)

    def fewest(self, accesses: Accesses | None = None, within: range | None = None) -> int | None:
        """Instructions of the shortest way from the first to the last of `within`, or from the start to an exit, without going
        back; one that its predicate skips is issued and counted.

        accesses: just these, where given. An access under a predicate may be one of them or not: compilers turn two ways into
        @P0 and @!P0. None where no way has them.
        """
        span = within or range(len(self.instructions))
        names = sorted(accesses or {})
        wanted = tuple((accesses or {})[name] for name in names)
        reached: dict[int, dict[tuple[int, ...], int]] = {span.start: {(0,) * len(names): 0}}
        best: int | None = None
        for number in span:
            one = self.instructions[number]
            here: dict[tuple[int, ...], int] = {}
            for counts, length in reached.pop(number, {}).items():
                for new in _counted(one, counts, names, wanted) if accesses is not None else (counts,):
                    here[new] = min(length + 1, here.get(new, length + 1))
            ends = number == span[-1] if within else one.operation == "EXIT"
            if ends and wanted in here:
                best = min(here[wanted], best or here[wanted])
            for follower in self._followers(number):
                ahead = reached.setdefault(follower, {})
                for counts, length in here.items():
                    ahead[counts] = min(length, ahead.get(counts, length))
        return best

    def _followers(self, number: int) -> Iterator[int]:
        one = self.instructions[number]
        if one.target is not None and self.labels[one.target] > number:
            yield self.labels[one.target]
        if one.goes_on:
            yield number + 1


def _counted(
    one: Instruction, counts: tuple[int, ...], names: list[str], wanted: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """The counts after an instruction; none where no call that is meant gets there."""
    if one.access is None:
        yield counts
        return
    if one.predicate:
        yield counts
    if one.access in names:
        place = names.index(one.access)
        if counts[place] < wanted[place]:
            yield (*counts[:place], counts[place] + 1, *counts[place + 1 :])
