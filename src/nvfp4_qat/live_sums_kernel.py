# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernel of `live_sums`: checksums of many tensors in one launch.

A row of the table, four int64, is a *span*: the address of its first word, how many words it has, the position of the
first one, and the index of the sum that they belong to. ``PROGRAMS`` programs share a span, each works through
``STEPS`` tiles of ``WORDS`` words. What they add up is the same in any order.
"""

import triton
import triton.language as tl

START = tl.constexpr(0x3C6EF372)
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x2C1B3C6D)
THIRD = tl.constexpr(0x297A2D39)
EIGHT = tl.constexpr(0x01010101_01010101)


@triton.jit
def _mixed(words, position):
    """What words at some positions add to a sum; `live_sums.mixed` is its definition."""
    x = (position.to(tl.int32) + START) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    first = x ^ ((x >> 13) & 0x7FFFF)
    second = first * THIRD
    second = second ^ ((second >> 16) & 0xFFFF)
    low = words.to(tl.int32) + first
    high = (words >> 32).to(tl.int32) + second
    return low.to(tl.int64) * high.to(tl.int64)


@triton.jit
def sums_kernel(
    table_ptr, out_ptr, TYPE: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Add what each span has to its sum; a word is of ``TYPE``, int64 or uint8."""
    program = tl.program_id(0)
    row_ptr = table_ptr + (program // PROGRAMS).to(tl.int64) * 4
    start = (program % PROGRAMS) * (WORDS * STEPS)
    count = tl.load(row_ptr + 1).to(tl.int32)
    if start < count:
        words_ptr = tl.load(row_ptr).to(tl.pointer_type(TYPE))
        position = tl.load(row_ptr + 2)
        total = tl.zeros([WORDS], dtype=tl.int64)
        for step in range(STEPS):
            at = start + step * WORDS + tl.arange(0, WORDS)
            words = tl.load(words_ptr + at, mask=at < count, other=0).to(tl.int64)
            if TYPE == tl.uint8:
                words *= EIGHT
            total += tl.where(at < count, _mixed(words, position + at), 0)
        tl.atomic_add(out_ptr + tl.load(row_ptr + 3), tl.sum(total, axis=0), sem="relaxed")
