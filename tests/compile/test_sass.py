"""Instructions on the shortest way through machine code, by what the way reads and writes."""

from __future__ import annotations

import pytest

from fastflow.compile.sass import Code


def code(*lines: str) -> Code:
    """Lines as nvdisasm prints them: labels as they are, instructions behind their addresses."""
    return Code.read(
        "\n".join(
            line if line.startswith(".L") else f"        /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)
        )
    )


BRANCHES = code(
    "ISETP.NE P0, R1, RZ",
    "@P0 BRA `(.L_x_1)",
    "LDG.E.64 R2, desc[UR4][R4.64]",
    "FADD R2, R2, R3",
    "FADD R2, R2, R3",
    "BRA `(.L_x_2)",
    ".L_x_1:",
    "LDG.E.U16 R2, desc[UR4][R4.64]",
    ".L_x_2:",
    "LDG.E R9, desc[UR4][R8.64]",
    "STG.E.64 desc[UR4][R6.64], R2",
    "EXIT",
    "BRA `(.L_x_2)",
)


def test_the_way_is_told_by_its_accesses() -> None:
    assert BRANCHES.fewest() == 6
    assert BRANCHES.fewest({"LDG.64": 1, "STG.64": 1}) == 9
    assert BRANCHES.fewest({"LDG.16": 1, "STG.64": 1}) == 6
    assert BRANCHES.fewest({"LDG.64": 2, "STG.64": 1}) is None
    assert BRANCHES.fewest({"STG.64": 1}) is None, "both ways read elements"


def test_an_access_under_a_predicate_may_be_the_calls_or_not() -> None:
    both = code("@P0 LDG.E.128 R4, desc[UR4][R2.64]", "@!P0 LDG.E.64 R4, desc[UR4][R2.64]", "STS.128 [R0], R4", "EXIT")
    assert both.fewest({"LDG.128": 1, "STS.128": 1}) == both.fewest({"LDG.64": 1, "STS.128": 1}) == 4
    assert both.fewest({"LDG.128": 1}) is None, "what it writes to shared memory is not optional"


def test_a_loop_is_counted_once_with_its_branch() -> None:
    looped = code(
        "MOV R1, R2", ".L_x_5:", "LDG.E.64 R2, desc[UR4][R4.64]", "FADD R2, R2, R3", "@P1 BRA `(.L_x_5)", "EXIT"
    )
    loop = looped.longest_loop()
    assert loop == range(1, 4)
    assert looped.fewest({"LDG.64": 1}, loop) == 3
    assert looped.fewest() == 5


@pytest.mark.parametrize(
    ("line", "goes_on"),
    [("EXIT", False), ("@P0 EXIT", True), ("EXIT P1", True), ("BRA `(.L_x_1)", False), ("@!P2 BRA `(.L_x_1)", True),
     ("BRA P0, `(.L_x_1)", True), ("RET.REL.NODEC R4 `(x)", False), ("BRA.U UP0, `(.L_x_1)", True), ("FADD R1, R1, R2", True)],
)  # fmt: skip
def test_what_ends_a_way(line: str, goes_on: bool) -> None:
    assert code(line).instructions[0].goes_on is goes_on


def test_no_loop() -> None:
    assert code("FADD R1, R1, R2", "EXIT").longest_loop() is None
