# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernels for many tensors at once (amax, quantize, compare, dequantize); `multi` builds their tables.

The arithmetic is that of `kernels`; here is how a program finds its work. `multi` cuts the tensors, flat lists of
blocks of 16, into *spans*: at most a fixed number of blocks that lie in one item (a part with one global scale). Each
span has a row of four int64 in a table on the device:

==========  =================  =================  ============================  ========================================
kernel      0                  1                  2                             3
==========  =================  =================  ============================  ========================================
amax        address of values  unused             unused                        blocks in the span, and above bit 32 the
quantize,   address of values  address of codes   address of block scales       item's index in ``g`` or in the amaxes
compare
dequantize  offset of codes    offset of scales   8 · first block + which out   (the same)
==========  =================  =================  ============================  ========================================

``PROGRAMS`` programs share a span. Each works through ``STEPS`` tiles of ``BLOCKS`` blocks and loads the next tile
before it computes on the present one; those behind the end of a short span read their row and stop. Addresses are
64-bit, offsets in a span 32-bit. Words are as in `kernels`: an int32 or int64 that holds two values.

The dequantize kernel gets the addresses of its results as arguments, because FSDP allocates them anew for each use; the
offsets of what it reads count from the start of the gathered bytes.

The atomic maximum is spared where the number there is not smaller, which nearly all programs see: else the thousands of
programs of one tensor would queue up at its one number. A stale reading costs an atomic and nothing else.
"""

import triton
import triton.language as tl

from .kernels import _dequantize, _magnitude, _quantize, _to_bf16, _unpair


@triton.jit
def _share(table_ptr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The row of this program's span, its first block in the span, the blocks of the span, and the item's index."""
    program = tl.program_id(0)
    row_ptr = table_ptr + (program // PROGRAMS).to(tl.int64) * 4
    last = tl.load(row_ptr + 3)
    return row_ptr, (program % PROGRAMS) * (BLOCKS * STEPS), last.to(tl.int32), (last >> 32).to(tl.int32)


@triton.jit
def _at(address, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A pointer from an address. The alignment must be promised on the pointer: it does not survive the conversion."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGNMENT)


@triton.jit
def _words_at(address, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        pointer = _at(address, tl.int64, 16)
    else:
        pointer = _at(address, tl.int32, 16)
    return pointer


@triton.jit
def _load_words(w_ptr, start, count, BLOCKS: tl.constexpr):
    """The words of a tile ``[BLOCKS, 8]``, zeros behind the end of the span."""
    block = start + tl.arange(0, BLOCKS)[:, None]
    return tl.load(w_ptr + (block * 8 + tl.arange(0, 8)[None, :]), mask=block < count, other=0)


@triton.jit
def _load_codes(codes_ptr, scale_ptr, start, count, BLOCKS: tl.constexpr):
    """Eight codes an int32, ``[2 · BLOCKS]``, and the E4M3 byte of each as int32."""
    half = start * 2 + tl.arange(0, 2 * BLOCKS)
    inside = half < count * 2
    byte = tl.load(scale_ptr + half // 2, mask=inside, other=0).to(tl.int32)
    return tl.load(codes_ptr + half, mask=inside, other=0), byte


@triton.jit
def _choose(which, out0, out1, out2, out3, out4, out5, out6, out7):
    """The pointer that the lowest three bits of ``which`` number."""
    first, second, third = (which & 1) == 0, (which & 2) == 0, (which & 4) == 0
    low = tl.where(second, tl.where(first, out0, out1), tl.where(first, out2, out3))
    high = tl.where(second, tl.where(first, out4, out5), tl.where(first, out6, out7))
    return tl.where(third, low, high)


@triton.jit
def multi_amax_kernel(
    table_ptr, out_ptr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """``out[index] = max(out[index], bits of max |bf16(w)|)`` for every span; bf16 is read as int16."""
    row_ptr, start, count, index = _share(table_ptr, BLOCKS, STEPS, PROGRAMS)
    address = tl.load(row_ptr)
    if start < count:
        w_ptr = _at(address, DTYPE, 16)
        seen = tl.load(out_ptr + index)
        largest = tl.zeros([BLOCKS, 16], dtype=tl.int32)
        for step in tl.static_range(STEPS):
            block = start + step * BLOCKS + tl.arange(0, BLOCKS)[:, None]
            values = tl.load(w_ptr + (block * 16 + tl.arange(0, 16)[None, :]), mask=block < count, other=0)
            largest = tl.maximum(largest, _magnitude(values))
        bits = _to_bf16(tl.max(largest))
        tl.atomic_max(out_ptr + index, bits, mask=bits > seen, sem="relaxed")


@triton.jit
def multi_quantize_kernel(
    table_ptr,
    g_ptr,
    amax_ptr,
    moved_ptr,
    DTYPE: tl.constexpr,
    AMAX: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Codes and E4M3 bytes of every span; with ``AMAX`` also what `multi_amax_kernel` does, from the same reading.

    With ``MOVED`` only spans of items whose number there is not 0: where few are, the rest takes a launch's time.
    """
    row_ptr, start, count, index = _share(table_ptr, BLOCKS, STEPS, PROGRAMS)
    address, codes, scales = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    if MOVED:
        if tl.load(moved_ptr + index) == 0:
            count = 0
    if start < count:
        # A span's codes start at a multiple of a block's 8 bytes, its block scales anywhere.
        w_ptr, codes_ptr, scale_ptr = _words_at(address, DTYPE), _at(codes, tl.uint8, 8), _at(scales, tl.uint8, 1)
        words = _load_words(w_ptr, start, count, BLOCKS)
        inv_g = tl.div_rn(1.0, tl.load(g_ptr + index))
        largest = tl.zeros([BLOCKS], dtype=tl.int32)
        seen = 0
        if AMAX:
            seen = tl.load(amax_ptr + index)
        for step in tl.static_range(STEPS):
            following = words
            if step + 1 < STEPS:
                following = _load_words(w_ptr, start + BLOCKS, count, BLOCKS)
            low, high = _unpair(words, DTYPE)
            packed, byte, amax = _quantize(low, high, inv_g)
            largest = tl.maximum(largest, amax)
            block = start + tl.arange(0, BLOCKS)
            inside = block < count
            tl.store(scale_ptr + block, byte, mask=inside)
            tl.store(codes_ptr + (block[:, None] * 8 + tl.arange(0, 8)[None, :]), packed, mask=inside[:, None])
            words = following
            start += BLOCKS
        if AMAX:
            bits = _to_bf16(tl.max(largest))
            tl.atomic_max(amax_ptr + index, bits, mask=bits > seen, sem="relaxed")


@triton.jit
def multi_compare_kernel(
    table_ptr,
    g_ptr,
    differs_ptr,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """``differs[index] = 1`` for every span where `multi_quantize_kernel` would write other bytes than are there."""
    row_ptr, start, count, index = _share(table_ptr, BLOCKS, STEPS, PROGRAMS)
    address, codes, scales = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    if start < count:
        w_ptr, codes_ptr, scale_ptr = _words_at(address, DTYPE), _at(codes, tl.uint8, 8), _at(scales, tl.uint8, 1)
        inv_g = tl.div_rn(1.0, tl.load(g_ptr + index))
        differences = tl.zeros([BLOCKS], dtype=tl.int32)
        for _ in tl.static_range(STEPS):
            low, high = _unpair(_load_words(w_ptr, start, count, BLOCKS), DTYPE)
            packed, byte, amax = _quantize(low, high, inv_g)
            block = start + tl.arange(0, BLOCKS)
            inside = block < count
            old = tl.load(codes_ptr + (block[:, None] * 8 + tl.arange(0, 8)[None, :]), mask=inside[:, None], other=0)
            old_byte = tl.load(scale_ptr + block, mask=inside, other=0)
            other = tl.max((old ^ packed).to(tl.int32), axis=1) | (old_byte ^ byte).to(tl.int32)
            differences |= tl.where(inside, other, 0)
            start += BLOCKS
        found = tl.max(differences)
        tl.atomic_max(differs_ptr + index, (found > 0).to(tl.int32), mask=found > 0, sem="relaxed")


@triton.jit
def multi_dequantize_kernel(
    table_ptr,
    gathered_ptr,
    g_ptr,
    out0,
    out1,
    out2,
    out3,
    out4,
    out5,
    out6,
    out7,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Up to eight full tensors of one dtype from the gathered bytes."""
    row_ptr, start, count, index = _share(table_ptr, BLOCKS, STEPS, PROGRAMS)
    codes, scales, where = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    if start < count:
        codes_ptr = (gathered_ptr + codes).to(tl.pointer_type(tl.int32))
        scale_ptr = gathered_ptr + scales
        words, byte = _load_codes(codes_ptr, scale_ptr, start, count, BLOCKS)
        g = tl.load(g_ptr + index)
        out = _choose(where, out0, out1, out2, out3, out4, out5, out6, out7).to(tl.int64)
        out_ptr = _words_at(out + (where >> 3) * (16 * DTYPE.primitive_bitwidth // 8), DTYPE)
        for step in tl.static_range(STEPS):
            next_words, next_byte = words, byte
            if step + 1 < STEPS:
                next_words, next_byte = _load_codes(codes_ptr, scale_ptr, start + BLOCKS, count, BLOCKS)
            half = start * 2 + tl.arange(0, 2 * BLOCKS)[:, None]
            at = half * 4 + tl.arange(0, 4)[None, :]
            tl.store(out_ptr + at, _dequantize(words, byte, g, DTYPE), mask=half < count * 2)
            words, byte = next_words, next_byte
            start += BLOCKS
