"""How kernels reach memory: rows, and the two helpers through which every value enters and leaves float32.

Nothing computes in bfloat16 or float16. No argument is specialized on its value (`kernel`), so that a kernel has few
variants, all of which can be compiled ahead of a launch. What vector loads need to know is one constexpr instead:
ALIGN is 16 where every pointer to elements is a multiple of 16 bytes and every row stride and row length one of 16
elements, which are then given in units of 16; otherwise it is 1.
"""

import inspect

import triton
import triton.language as tl


def kernel(function):
    """`triton.jit` for what is launched: arguments are specialized on their type and on being None, not on their value."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=plain)


@triton.jit
def _probe():
    pass


# Triton's interpreter truncates where bfloat16 is rounded, so under it both ways go through the bits.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


@triton.jit
def span(programs, units, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr):
    """What a program has where each of `programs` takes a part of a row, TILES tiles of 2^LOG elements: the row, the number of
    the part, elements of a row, and of the part their indices and which exist."""
    program = tl.program_id(0)
    part = program % programs
    numel = units * ALIGN
    index = part * (TILES << LOG) + tl.arange(0, TILES << LOG)
    return (program // programs).to(tl.int64), part, numel, index, index < numel


@triton.jit
def at_row(pointer, row, stride, ALIGN: tl.constexpr):
    """Where a row begins; `row` is int64, `stride` in units of ALIGN elements."""
    return tl.multiple_of(pointer + row * stride * ALIGN, ALIGN)


@triton.jit
def source_row(rows, row, sources):
    """The row of sample, velocity and uncond that a row is made of: rows[row], the nearest of `sources` where that is none."""
    source = row
    if rows is not None:
        source = tl.minimum(tl.maximum(tl.load(rows + row), 0), sources - 1)
    return source


@triton.jit
def load(pointer, inside):
    """float32 of the values at `pointer` (any float dtype), 0 where not `inside`."""
    value = tl.load(pointer, mask=inside, other=0.0)
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 -> dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
        rounded = tl.where(value != value, bits | 0x400000, rounded) >> 16
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def store(pointer, value, inside):
    """Rounds float32 to the dtype behind `pointer` and stores it where `inside`."""
    tl.store(pointer, narrow(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 -> dtype -> float32: the value that a slot of that dtype keeps."""
    if dtype == tl.float32:
        result = value
    elif INTERPRETED and dtype == tl.bfloat16:
        bits = narrow(value, dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = narrow(value, dtype).to(tl.float32)
    return result
