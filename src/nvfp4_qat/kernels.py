# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The four Triton kernels (amax, quantize, dequantize, fake quantize); `launch` starts them.

They compute what `reference` computes, bit for bit, on a GPU and in Triton's interpreter (``TRITON_INTERPRET=1``).

**Tiles.** A contiguous tensor whose last dimension is a multiple of 16 is a flat list of blocks, so rows and columns
do not matter. It is split into *items*, the parts that have one global scale (the whole tensor, or one expert).
Program ``(c, i)`` works on the c-th tile of ``BLOCKS`` blocks of item i. Offsets in a tile are 32-bit, the tile's
start is 64-bit.

**Pairs.** The kernels read and write two neighbouring values as one integer word (int32 for 16-bit dtypes, int64 for
fp32) and compute on the two halves side by side: a pair becomes one packed byte, or comes from one, without moving data
between lanes.

**Bits.** A value in flight is an fp32 bit pattern in an int32. Rounding to bf16 and to E4M3 is integer arithmetic on
it, so nothing depends on a conversion instruction: the interpreter's casts to bf16 and fp8 do not round to nearest
even (Triton 3.6 and 3.9), and GPUs before Ada have none to fp8. The only floating-point operations are IEEE products,
two IEEE divisions a block, and the addition that rounds to E2M1.

Deliberately absent: inline assembly, autotuning, and checks on values. A block with a NaN gets the scale NaN.
"""

import triton
import triton.language as tl

from . import format

E2M1_MAX = tl.constexpr(format.E2M1_MAX)
E4M3_MAX = tl.constexpr(format.E4M3_MAX)
E4M3_MIN_NORMAL = tl.constexpr(format.E4M3_MIN_NORMAL)
E4M3_NAN = tl.constexpr(0x7F)

SIGN = tl.constexpr(-(1 << 31))
MAGNITUDE = tl.constexpr((1 << 31) - 1)
EXPONENT = tl.constexpr(0xFF << 23)
INFINITY = tl.constexpr(0xFF << 23)
NAN = tl.constexpr(0x1FF << 22)
HIGH_HALF = tl.constexpr(-(1 << 16))
LOW_HALF = tl.constexpr((1 << 16) - 1)
ANCHOR_SHIFT = tl.constexpr(2.0**22)


@triton.jit
def _round_bits(bits, DROP: tl.constexpr):
    """Round finite fp32 bit patterns to nearest even, without their last ``DROP`` mantissa bits."""
    half: tl.constexpr = (1 << (DROP - 1)) - 1
    return (bits + half + ((bits >> DROP) & 1)) & -(1 << DROP)


@triton.jit
def _to_bf16(bits):
    """Round any fp32 bit patterns to bf16. Rounding could carry a NaN into the sign bit: it becomes the quiet one."""
    magnitude = bits & MAGNITUDE
    return tl.where(magnitude > INFINITY, NAN, _round_bits(magnitude, 16)) | (bits & SIGN)


@triton.jit
def _half_to_bits(half):
    """The fp32 bit patterns of the fp16 numbers in the low halves of int32 words."""
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _bits_to_half(bits):
    """The inverse of `_half_to_bits`, rounding; the high halves are zero."""
    half = bits.to(tl.float32, bitcast=True).to(tl.float16)
    return half.to(tl.int16, bitcast=True).to(tl.int32) & LOW_HALF


@triton.jit
def _unpair(words, DTYPE: tl.constexpr):
    """The two values of each word, rounded to bf16, as fp32 bit patterns."""
    if DTYPE == tl.bfloat16:
        low, high = words << 16, words & HIGH_HALF
    elif DTYPE == tl.float16:
        low, high = _to_bf16(_half_to_bits(words)), _to_bf16(_half_to_bits(words >> 16))
    else:
        low, high = _to_bf16(words.to(tl.int32)), _to_bf16((words >> 32).to(tl.int32))
    return low, high


@triton.jit
def _pair(low, high, DTYPE: tl.constexpr):
    """Words of two values that bf16 can hold, from their fp32 bit patterns."""
    if DTYPE == tl.bfloat16:
        words = ((low >> 16) & LOW_HALF) | (high & HIGH_HALF)
    elif DTYPE == tl.float16:
        words = _bits_to_half(low) | (_bits_to_half(high) << 16)
    else:
        words = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
    return words


@triton.jit
def _tile(blocks_per_item, BLOCKS: tl.constexpr):
    """This program's item, the tile's first block in the tensor (int64), and how many blocks of the item are left."""
    item = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    return item, item.to(tl.int64) * blocks_per_item + start, blocks_per_item - start


@triton.jit
def _block_scale(amax, inv_g):
    """E4M3 block scales, as fp32 bit patterns, from the bit patterns of the blocks' largest magnitudes."""
    scale = tl.div_rn(amax.to(tl.float32, bitcast=True) * inv_g, E2M1_MAX)
    scale = tl.minimum(tl.maximum(scale, E4M3_MIN_NORMAL), E4M3_MAX)
    # In this range an E4M3 number is an fp32 number with three mantissa bits.
    return _round_bits(scale.to(tl.int32, bitcast=True), 20)


@triton.jit
def _e2m1(bits, inv_g, inv_scale):
    """Round the magnitude of ``(x · inv_g) · inv_scale`` to E2M1; `_code` and `_value` read the two results.

    With e the exponent of the magnitude, but at least 0, the grid's step is 2^(e-1), which is the last place of fp32
    numbers around 2^(e+22). Adding such an anchor therefore rounds to the grid, ties to even; subtracting it leaves
    the rounded magnitude. The anchor is the magnitude times 2^22 without its mantissa. To have it at hand the product
    is made 2^22 times too large from the start, and the fused multiply-add takes the factor back: both exact. The
    minimum in between keeps a compiler from fusing more.

    The anchor's last three bits are set to 6, an even number of steps, which makes `_code` short.
    """
    product = (tl.abs(bits.to(tl.float32, bitcast=True)) * inv_g) * (inv_scale * ANCHOR_SHIFT)
    product = tl.minimum(product, E2M1_MAX * ANCHOR_SHIFT)
    anchor = (tl.maximum(product, ANCHOR_SHIFT).to(tl.int32, bitcast=True) & EXPONENT) | 6
    anchor = anchor.to(tl.float32, bitcast=True)
    return tl.fma(product, 1.0 / ANCHOR_SHIFT, anchor), anchor


@triton.jit
def _code(total, bits):
    """The 4-bit code of `_e2m1`'s sum, with the sign of ``bits``.

    Let n be the magnitude in steps: the code is n + 2e. The sum's bit pattern ends in n + 6, and shifted right by 22
    it is 2 · (e + 22 + 127); the two together are n + 2e + 304, and 304 is 0 modulo 8.
    """
    total = total.to(tl.int32, bitcast=True)
    return ((total + (total >> 22)) & 7) | ((bits >> 28) & 8)


@triton.jit
def _value(total, anchor, scale, g):
    """``bf16((e2m1 · scale) · g)`` of `_e2m1`'s sum, without sign, as an fp32 bit pattern."""
    return _round_bits((((total - anchor) * scale) * g).to(tl.int32, bitcast=True), 16)


@triton.jit
def _decode(code, scale, g):
    """``bf16((e2m1 · scale) · g)`` of the code in the top four bits; scale and g come with the factors 2^118 and 2^8.

    The three magnitude bits, moved to where fp32 keeps its exponent and first mantissa bit, read as the E2M1 value
    times 2^-126, also for 0 and for 1/2 (an fp32 subnormal). The factors are exact and make up for it.
    """
    value = ((code >> 6) & (7 << 22)) | (code & SIGN)
    return _round_bits(((value.to(tl.float32, bitcast=True) * scale) * g).to(tl.int32, bitcast=True), 16)


@triton.jit
def amax_kernel(w_ptr, out_ptr, size, TILE: tl.constexpr, STEPS: tl.constexpr):
    """``out[item] = max(out[item], bits of max |bf16(w)|)``, for items of ``size`` values; bf16 comes as int16.

    Magnitudes sort like their bit patterns, NaN above infinity, so no NaN is lost. Rounding keeps the order: it is done
    once, on the maximum.
    """
    item = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * (TILE * STEPS)
    w_ptr += item.to(tl.int64) * size + start
    largest = tl.zeros([TILE], dtype=tl.int32)
    for step in range(STEPS):
        offsets = step * TILE + tl.arange(0, TILE)
        x = tl.load(w_ptr + offsets, mask=offsets < size - start, other=0)
        if w_ptr.dtype.element_ty == tl.int16:
            bits = x.to(tl.int32) << 16
        else:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest, bits & MAGNITUDE)
    tl.atomic_max(out_ptr + item, _to_bf16(tl.max(largest, axis=0)))


@triton.jit(do_not_specialize=["blocks_per_item"])
def quantize_kernel(w_ptr, g_ptr, packed_ptr, scale_ptr, blocks_per_item, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):
    """``w`` as words -> packed codes, uint8, and block scales, E4M3 bytes."""
    item, first, left = _tile(blocks_per_item, BLOCKS)
    block = tl.arange(0, BLOCKS)
    inside = block < left
    pairs = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    low, high = _unpair(tl.load(w_ptr + first * 8 + pairs, mask=inside[:, None], other=0), DTYPE)

    inv_g = tl.div_rn(1.0, tl.load(g_ptr + item))
    amax = tl.max(tl.maximum(low & MAGNITUDE, high & MAGNITUDE), axis=1)
    scale = _block_scale(amax, inv_g)
    byte = tl.where(amax > INFINITY, E4M3_NAN, (scale >> 20) - ((127 - 7) << 3))  # the exponents' biases are 127 and 7
    tl.store(scale_ptr + first + block, byte.to(tl.uint8), mask=inside)

    inv_scale = tl.div_rn(1.0, scale.to(tl.float32, bitcast=True))[:, None]
    low_sum, _ = _e2m1(low, inv_g, inv_scale)
    high_sum, _ = _e2m1(high, inv_g, inv_scale)
    packed = _code(low_sum, low) | (_code(high_sum, high) << 4)
    tl.store(packed_ptr + first * 8 + pairs, packed.to(tl.uint8), mask=inside[:, None])


@triton.jit(do_not_specialize=["blocks_per_item"])
def fake_quantize_kernel(w_ptr, g_ptr, out_ptr, blocks_per_item, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):
    """Quantize and dequantize ``w`` in registers; ``w`` and ``out`` are words of the same dtype."""
    item, first, left = _tile(blocks_per_item, BLOCKS)
    block = tl.arange(0, BLOCKS)
    inside = (block < left)[:, None]
    pairs = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    low, high = _unpair(tl.load(w_ptr + first * 8 + pairs, mask=inside, other=0), DTYPE)

    g = tl.load(g_ptr + item)
    inv_g = tl.div_rn(1.0, g)
    amax = tl.max(tl.maximum(low & MAGNITUDE, high & MAGNITUDE), axis=1)
    scale = _block_scale(amax, inv_g).to(tl.float32, bitcast=True)
    inv_scale = tl.div_rn(1.0, scale)[:, None]
    # Rounding is for finite values: NaN is put into the result's bits.
    nan = (tl.where(amax > INFINITY, NAN, 0) | tl.where(g != g, NAN, 0))[:, None]

    low_sum, low_anchor = _e2m1(low, inv_g, inv_scale)
    high_sum, high_anchor = _e2m1(high, inv_g, inv_scale)
    low = _value(low_sum, low_anchor, scale[:, None], g) | (low & SIGN) | nan
    high = _value(high_sum, high_anchor, scale[:, None], g) | (high & SIGN) | nan
    tl.store(out_ptr + first * 8 + pairs, _pair(low, high, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["blocks_per_item"])
def dequantize_kernel(
    packed_ptr, scale_ptr, g_ptr, out_ptr, blocks_per_item, DTYPE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Packed codes, read eight at a time as int32, E4M3 bytes (any of the 256) and g -> ``out`` as words."""
    item, first, left = _tile(blocks_per_item, BLOCKS)
    half = tl.arange(0, 2 * BLOCKS)  # half a block is eight codes
    inside = half < 2 * left
    codes = tl.load(packed_ptr + first * 2 + half, mask=inside, other=0)[:, None]
    byte = tl.load(scale_ptr + first + half // 2, mask=inside, other=0).to(tl.int32)
    g = tl.load(g_ptr + item)

    # As for codes in `_decode`: the moved bits read as scale · 2^-120, subnormals included.
    scale = (((byte & 0x7F) << 20) | ((byte << 24) & SIGN)).to(tl.float32, bitcast=True)
    scale = (scale * 2.0**120) * 2.0**118
    nan = (tl.where((byte & 0x7F) == E4M3_NAN, NAN, 0) | tl.where(g != g, NAN, 0))[:, None]

    pair = tl.arange(0, 4)[None, :]
    codes = codes >> (pair * 8)
    low = _decode(codes << 28, scale[:, None], g * 256.0) | nan
    high = _decode(codes << 24, scale[:, None], g * 256.0) | nan
    tl.store(out_ptr + first * 8 + half[:, None] * 4 + pair, _pair(low, high, DTYPE), mask=inside[:, None])
