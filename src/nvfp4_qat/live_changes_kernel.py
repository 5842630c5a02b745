# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernels of live changes: bytes that differ are found, and flipped where an engine has them.

`count_kernel` and `take_kernel` compare new tensors with the memory of old ones (`live_snapshot`), a *tile* of words in
a program. A row of their table, six int64, is a tensor: the first of its programs, the addresses of its first word in
both, how many words it has, the place of its first byte, and its first tile's number in the order of places. Counted
first, the places of all tiles fill one list without gaps.

`flip_kernel` changes bytes by a table that says where each range of bytes goes (`live_routes`). Neighbours may change
at once, in other programs, so that it flips bits of aligned 32-bit words atomically: in any order the result is the
same.
"""

import triton
import triton.language as tl

TENSOR_ROW = tl.constexpr(6)
ROUTE_ROW = tl.constexpr(10)
BYTES = tl.constexpr(1)
CODES = tl.constexpr(2)
LOW_CODES = tl.constexpr(0x0F0F0F0F_0F0F0F0F)
LOW_PAIRS = tl.constexpr(0x03030303_03030303)
LOW_BITS = tl.constexpr(0x01010101_01010101)


@triton.jit
def _tile(table_ptr, rows, WORDS: tl.constexpr, SEARCH: tl.constexpr):
    """A program's row, its first word in that tensor, and the number of its tile."""
    program = tl.program_id(0).to(tl.int64)
    low, high = 0, rows
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        after = tl.load(table_ptr + middle * TENSOR_ROW) <= program
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    row_ptr = table_ptr + low * TENSOR_ROW
    tile = program - tl.load(row_ptr)
    return row_ptr, tile * WORDS, tl.load(row_ptr + 5) + tile


@triton.jit
def _words(row_ptr, first, TYPE: tl.constexpr, WORDS: tl.constexpr):
    """A tile's old and new words as int64, where the old ones are, and which of ``WORDS`` there are."""
    at = first + tl.arange(0, WORDS)
    there = at < tl.load(row_ptr + 3)
    new_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(TYPE)) + at
    old_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(TYPE)) + at
    new = tl.load(new_ptr, mask=there, other=0).to(tl.int64)
    old = tl.load(old_ptr, mask=there, other=0).to(tl.int64)
    return old, new, old_ptr, there


@triton.jit
def _bytes_not_zero(words, TYPE: tl.constexpr):
    """How many bytes of each word are not zero, int32."""
    if TYPE == tl.uint8:
        return (words != 0).to(tl.int32)
    x = (words | ((words >> 4) & LOW_CODES)) & LOW_CODES
    x = (x | (x >> 2)) & LOW_PAIRS
    x = (x | (x >> 1)) & LOW_BITS
    return ((x * LOW_BITS) >> 56).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def count_kernel(table_ptr, rows, counts_ptr, TYPE: tl.constexpr, WORDS: tl.constexpr, SEARCH: tl.constexpr):
    """How many bytes of each tile differ.

    ``TYPE``: a word, int64 or uint8. ``SEARCH``: steps that find one of the rows.
    """
    row_ptr, first, number = _tile(table_ptr, rows, WORDS, SEARCH)
    old, new, _, _ = _words(row_ptr, first, TYPE, WORDS)
    tl.store(counts_ptr + number, tl.sum(_bytes_not_zero(old ^ new, TYPE), axis=0))


@triton.jit(do_not_specialize=["rows"])
def take_kernel(
    table_ptr, rows, counts_ptr, ends_ptr, at_ptr, flips_ptr,
    TYPE: tl.constexpr, WORDS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Places and flips of the bytes of each tile that differ, ascending; the old bytes become the new ones.

    ``ends_ptr``: how many bytes differ in a tile and all before it.
    """
    row_ptr, first, number = _tile(table_ptr, rows, WORDS, SEARCH)
    old, new, old_ptr, there = _words(row_ptr, first, TYPE, WORDS)
    flips = old ^ new
    found = _bytes_not_zero(flips, TYPE)
    to = tl.load(ends_ptr + number) - tl.load(counts_ptr + number) + tl.cumsum(found, axis=0) - found
    width: tl.constexpr = 1 if TYPE == tl.uint8 else 8
    place = tl.load(row_ptr + 4) + (first + tl.arange(0, WORDS)) * width
    for i in tl.static_range(width):
        flip = (flips >> (8 * i)) & 255
        changes = flip != 0
        tl.store(at_ptr + to, place + i, mask=changes)
        tl.store(flips_ptr + to, flip.to(tl.uint8), mask=changes)
        to += changes.to(tl.int64)
    tl.store(old_ptr, new.to(TYPE), mask=there & (flips != 0))


@triton.jit(do_not_specialize=["count", "rows"])
def flip_kernel(at_ptr, flips_ptr, count, table_ptr, rows, addresses_ptr, SEARCH: tl.constexpr, PLACES: tl.constexpr):
    """Flip bits of bytes, ``count`` of them, where a table of ``rows`` routes says they are.

    A route, ten int64: first byte, end, kind, what is added to a place to get the byte of the parameter, and, for
    codes, what a `live_maps.CodeMap` has: columns, rows and columns of a tile, the addresses of ``output``, ``first``
    and ``within``. The kind is in the low 32 bits; above them is where the addresses of the tensors begin in
    ``addresses_ptr``. ``SEARCH``: steps that find one of the routes.
    """
    number = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    there = number < count
    place = tl.load(at_ptr + number, mask=there, other=0)
    flip = tl.load(flips_ptr + number, mask=there, other=0).to(tl.int32)
    low = tl.zeros([PLACES], dtype=tl.int32)
    high = low + rows
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        after = tl.load(table_ptr + middle.to(tl.int64) * ROUTE_ROW) <= place
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    row_ptr = table_ptr + low.to(tl.int64) * ROUTE_ROW
    inside = there & (flip != 0) & (tl.load(row_ptr) <= place) & (place < tl.load(row_ptr + 1))
    kind_and_first = tl.load(row_ptr + 2, mask=inside, other=0)
    kind = kind_and_first & 0xFFFFFFFF
    addresses_ptr += kind_and_first >> 32
    byte = place + tl.load(row_ptr + 3, mask=inside, other=0)

    plain = inside & (kind == BYTES)
    address = tl.load(addresses_ptr, mask=plain, other=0) + byte
    word_ptr = (address & -4).to(tl.pointer_type(tl.int32))
    tl.atomic_xor(word_ptr, flip << ((address & 3) * 8).to(tl.int32), mask=plain, sem="relaxed")

    codes = inside & (kind == CODES)
    columns = tl.load(row_ptr + 4, mask=codes, other=1)
    tile_rows = tl.load(row_ptr + 5, mask=codes, other=1)
    tile_columns = tl.load(row_ptr + 6, mask=codes, other=1)
    output_ptr = tl.load(row_ptr + 7, mask=codes, other=0).to(tl.pointer_type(tl.int64))
    first_ptr = tl.load(row_ptr + 8, mask=codes, other=0).to(tl.pointer_type(tl.int64))
    within_ptr = tl.load(row_ptr + 9, mask=codes, other=0).to(tl.pointer_type(tl.int64))
    for half in tl.static_range(2):
        code = 2 * byte + half
        row, column = code // columns, code % columns
        tile = (row // tile_rows) * (columns // tile_columns) + column // tile_columns
        part = (flip >> (4 * half)) & 15
        mine = codes & (part != 0)
        output = tl.load(output_ptr + tile, mask=mine, other=0)
        within = tl.load(within_ptr + (row % tile_rows) * tile_columns + column % tile_columns, mask=mine, other=0)
        to = tl.load(first_ptr + tile, mask=mine, other=0) + within
        address = tl.load(addresses_ptr + output, mask=mine, other=0) + (to >> 3) * 4
        tl.atomic_xor(
            address.to(tl.pointer_type(tl.int32)), part << ((to & 7) * 4).to(tl.int32), mask=mine, sem="relaxed"
        )
