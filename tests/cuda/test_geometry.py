"""Where blocks, threads, rows and groups are, for sizes beyond 2^31 that no test can run."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.backends import reference
from tests.backends.calls import assert_same, call, guided, run

TILE, THREADS = 2048, 256
FIELDS = ("row", "tile", "tiles", "lane", "team", "slot", "general_row", "general_tile")


@pytest.fixture(scope="module")
def library(emulator: Any) -> ctypes.CDLL:
    found = ctypes.CDLL(emulator.__file__)
    wide = ctypes.c_int64
    found.fastflow_blocks.argtypes, found.fastflow_blocks.restype = (wide, wide), wide
    found.fastflow_quotient.argtypes, found.fastflow_quotient.restype = (wide, wide), wide
    found.fastflow_offset.argtypes, found.fastflow_offset.restype = (wide, wide, wide, ctypes.c_int), wide
    found.fastflow_place.argtypes = (wide, wide, ctypes.c_uint32, ctypes.c_int, ctypes.POINTER(wide))
    found.fastflow_place.restype = None
    return found


def place(library: ctypes.CDLL, batch: int, numel: int, block: int, thread: int) -> dict[str, int]:
    out = (ctypes.c_int64 * len(FIELDS))()
    library.fastflow_place(batch, numel, block, thread, out)
    return dict(zip(FIELDS, out, strict=True))


@pytest.mark.parametrize(
    ("batch", "numel"), [(1, 1), (19, 112), (5, 300), (7, 1000), (3, 8192), (2, 8193), (3, 70_000)]
)
def test_every_element_has_one_thread(library: ctypes.CDLL, batch: int, numel: int) -> None:
    seen = torch.zeros(batch, numel, dtype=torch.int32)
    for block, thread in itertools.product(range(library.fastflow_blocks(batch, numel)), range(THREADS)):
        at = place(library, batch, numel, block, thread)
        if at["row"] < batch:
            for tile, half in itertools.product(range(at["tiles"]), range(2)):
                first = (at["tile"] + tile) * TILE + 4 * (half * at["team"] + at["lane"])
                seen[at["row"], first : first + 4] += 1
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize(
    ("batch", "blocks"), [(24, 768), (197, 197 * 32), (198, 99 * 32), (395, 395 * 16), (396, 99 * 32)]
)
def test_blocks_take_more_tiles_where_there_are_many(library: ctypes.CDLL, batch: int, blocks: int) -> None:
    assert library.fastflow_blocks(batch, 32 * TILE) == blocks


@pytest.mark.parametrize(
    ("batch", "numel"), [(2_000_000, 16 * 21 * 60 * 104), (1, 2**40), (3, 2**31 + 5), (2**33, 112)]
)
def test_more_than_two_to_the_31_elements(library: ctypes.CDLL, batch: int, numel: int) -> None:
    blocks = library.fastflow_blocks(batch, numel)
    assert blocks < 2**31 and batch * numel > 2**31
    last = place(library, batch, numel, blocks - 1, THREADS - 1)
    assert last["row"] == batch - 1
    assert (last["tile"] + last["tiles"]) * TILE >= numel > (last["tile"] + last["tiles"] - 1) * TILE
    for block in (0, 1, blocks // 3, blocks - 2):
        at = place(library, batch, numel, block, 0)
        tiles = -(-numel // TILE)
        spans = -(-tiles // at["tiles"]) if tiles > 4 else 1
        assert at["row"] == block // spans * (THREADS // at["team"]), block
        assert at["tile"] == block % spans * at["tiles"] and (at["row"], at["tile"]) == (
            at["general_row"],
            at["general_tile"],
        )


def test_offsets_are_64_bits_wide(library: ctypes.CDLL) -> None:
    assert library.fastflow_offset(2**31 + 3, 5, 2**33, 0) == ((2**31 + 3) * 5 + 2**33) * 4
    assert library.fastflow_offset(2**40, 2**20, 7, 1) == (2**60 + 7) * 2


@settings(max_examples=300, deadline=None)
@given(n=st.one_of(st.integers(0, 2**31), st.integers(0, 2**62 - 1)), divisor=st.integers(1, 2**45))
def test_quotients(library: ctypes.CDLL, n: int, divisor: int) -> None:
    for value in (n, n // divisor * divisor, max(n // divisor * divisor - 1, 0)):
        assert library.fastflow_quotient(value, divisor) == value // divisor


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 64, 1000, 2**30 - 1, 2**31 - 1, 2**31, 2**31 + 1])
def test_quotients_at_the_edges(library: ctypes.CDLL, divisor: int) -> None:
    for n in (0, 1, divisor - 1, divisor, divisor + 1, 2**31 - 1, 2**31, 2**32, 2**40 - 1, 2**62 - 1):
        assert library.fastflow_quotient(n, divisor) == n // divisor


@pytest.mark.parametrize("numel", [112, 9000])
def test_rows_that_are_more_than_two_to_the_31_elements_apart(emulated: Any, numel: int) -> None:
    """Pages of a large tensor that nobody touches take no memory."""
    apart = torch.empty(2**31 + 16 + numel, dtype=torch.bfloat16).as_strided((2, numel), (2**31 + 16, 1))
    base = guided(2, numel, rescale="clamp")
    expected = run(reference, base)
    found = run(emulated, replace(base, velocity=apart.copy_(base.velocity)))
    assert_same(found, expected)
    slot = apart
    emulated.step(replace(base, next_sample=slot))
    assert torch.equal(slot, expected["next_sample"].to(torch.bfloat16))


def test_an_offset_beyond_32_bits_continues_the_row(emulated: Any) -> None:
    whole = call(2, 4096, offset=2**35)
    half = replace(
        whole, numel=2048, offset=2**35 + 2048, sample=whole.sample[:, 2048:], velocity=whole.velocity[:, 2048:]
    )
    assert torch.equal(run(emulated, half)["next_sample"], run(emulated, whole)["next_sample"][:, 2048:])
