# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The four Triton kernels (amax, quantize, dequantize, fake quantize), and the arithmetic that `multi_kernels` shares.

They compute what `reference` computes, bit for bit, on a GPU and in Triton's interpreter (``TRITON_INTERPRET=1``).

**Tiles.** A contiguous tensor whose last dimension is a multiple of 16 is a flat list of blocks, so rows and columns
do not matter. It is split into *items*, the parts that have one global scale (the whole tensor, or one expert).
Program ``(c, i)`` works on the c-th tile of ``BLOCKS`` blocks of item i. Offsets in a tile are 32-bit, the tile's
start is 64-bit.

**Pairs.** The kernels read and write two neighbouring values as one integer word (int32 for 16-bit dtypes, int64 for
fp32) and compute on the two halves side by side: a pair becomes one packed byte, or comes from one, without moving data
between lanes.

**Bits.** A value in flight is an fp32 bit pattern in an int32. Rounding is integer arithmetic on it, or the addition of
a number so large that the last place of fp32 becomes that of the result. Nothing depends on a conversion instruction:
the interpreter's casts to bf16 and fp8 do not round to nearest even (Triton 3.6 and 3.9), and GPUs before Ada have none
to fp8. The only floating-point operations are IEEE products, two IEEE divisions a block, and those additions.

**Instructions.** While packing, an H200's memory brings each multiprocessor some 6 weights a clock, in which it
executes at most 128 instructions, half of them integer operations and minima: a weight may cost 20 and 10. Hence
rounding by addition, and few operations in all.

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
SIGNS = tl.constexpr(-(1 << 31) | (1 << 15))
WIDE_SIGNS = tl.constexpr(-(1 << 63) | (1 << 31))
NIBBLE_SIGNS = tl.constexpr(0x88888888 - (1 << 32))
UNIT = tl.constexpr(2.0**23)
UNIT_AND_7 = tl.constexpr(0x4B000007)


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
def _with_signs(magnitudes, words, DTYPE: tl.constexpr):
    """Words of magnitudes with the signs of other words."""
    if DTYPE == tl.float32:
        signed = magnitudes | (words & WIDE_SIGNS)
    else:
        signed = magnitudes | (words & SIGNS)
    return signed


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
def _code(magnitude, inv_g, inv_scale):
    """E2M1 codes without sign, in the last byte of the result, from the bit patterns of ``|x|``.

    With p = ``(|x| · inv_g) · inv_scale`` the code is min(2p, p + 2, p/2 + 4, 7), rounded half to even: the grid is
    three uniform runs, the line of each is below the others where it holds, and codes count along all of them. Around
    2^23 the last place of fp32 is 1, so adding that to a line rounds it once, and the sum's last byte is the code.
    Rounding keeps the order, so the minimum may come afterwards, and on positive numbers' bit patterns. The products
    with 2 and 1/2 are exact, fused or not. NaN and infinity end up at 7.
    """
    p = (magnitude.to(tl.float32, bitcast=True) * inv_g) * inv_scale
    below_2 = tl.fma(p, 2.0, UNIT).to(tl.int32, bitcast=True)
    below_4 = (p + (UNIT + 2.0)).to(tl.int32, bitcast=True)
    below_6 = tl.fma(p, 0.5, UNIT + 4.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.minimum(tl.minimum(below_2, below_4), below_6), UNIT_AND_7)


@triton.jit
def _weight(code, scale, g):
    """``|bf16((value · scale) · g)|`` as an fp32 bit pattern; scale and g come with the factors 2^118 and 2^8.

    The magnitude bits of the code are bits 22 to 24, where fp32 has its last two exponent bits and its first mantissa
    bit: there they read as the code's value times 2^-126, also for 0 and for 1/2 (an fp32 subnormal). The factors are
    exact and make up for it.

    For a number of exponent e the last place of bf16 is that of fp32 numbers around 2^(e+16). Adding such an anchor
    rounds to bf16, ties to even, and taking it away is exact; so is the product that makes the anchor, fused or not.
    NaN stays NaN. This holds from 2^-126 to 2^111; global scales are 2^-100 to 2^8.
    """
    y = (code.to(tl.float32, bitcast=True) * scale) * g
    power = (y.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    return tl.fma(power, -(2.0**16), tl.fma(power, 2.0**16, y)).to(tl.int32, bitcast=True)


@triton.jit
def _quantize(low, high, inv_g):
    """Packed codes of pairs ``[B, 8]``, and of their blocks the E4M3 bytes and the largest magnitudes' bits ``[B]``."""
    low_magnitude, high_magnitude = low & MAGNITUDE, high & MAGNITUDE
    amax = tl.max(tl.maximum(low_magnitude, high_magnitude), axis=1)
    scale = _block_scale(amax, inv_g)
    byte = tl.where(amax > INFINITY, E4M3_NAN, (scale >> 20) - ((127 - 7) << 3))  # the exponents' biases are 127 and 7
    inv_scale = tl.div_rn(1.0, scale.to(tl.float32, bitcast=True))[:, None]
    low_code, high_code = _code(low_magnitude, inv_g, inv_scale), _code(high_magnitude, inv_g, inv_scale)
    # Put together in the highest byte, where the sign of the odd code already is.
    packed = (high & SIGN) | ((low >> 4) & (1 << 27)) | ((low_code << 24) + (high_code << 28))
    return (packed >> 24).to(tl.uint8), byte.to(tl.uint8), amax


@triton.jit
def _fake_quantize(words, g, DTYPE: tl.constexpr):
    """Words ``[B, 8]`` -> quantized and dequantized words."""
    low, high = _unpair(words, DTYPE)
    low, high = low & MAGNITUDE, high & MAGNITUDE
    inv_g = tl.div_rn(1.0, g)
    amax = tl.max(tl.maximum(low, high), axis=1)
    scale = _block_scale(amax, inv_g).to(tl.float32, bitcast=True)
    inv_scale = tl.div_rn(1.0, scale)[:, None]
    scale = tl.where(amax > INFINITY, float("nan"), scale * 2.0**118)[:, None]
    low = _weight(_code(low, inv_g, inv_scale) << 22, scale, g * 256.0)
    high = _weight(_code(high, inv_g, inv_scale) << 22, scale, g * 256.0)
    return _with_signs(_pair(low, high, DTYPE), words, DTYPE)


@triton.jit
def _dequantize(codes, byte, g, DTYPE: tl.constexpr):
    """Words ``[H, 4]`` of half blocks, from eight codes in an int32 ``[H]``, the E4M3 byte of each, and g."""
    # As for codes in `_weight`: moved, the byte's magnitude bits read as its value times 2^-120.
    scale = (((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120) * 2.0**118
    scale = tl.where((byte & 0x7F) == E4M3_NAN, float("nan"), scale)[:, None]
    # The signs of scale and g go to the codes, so that a 0 has one too.
    codes ^= (((byte << 24) ^ g.to(tl.int32, bitcast=True)) >> 31) & NIBBLE_SIGNS
    codes = codes[:, None] >> (tl.arange(0, 4)[None, :] * 8)
    low = _weight((codes << 22) & (7 << 22), scale, tl.abs(g) * 256.0) | ((codes << 28) & SIGN)
    high = _weight((codes << 18) & (7 << 22), scale, tl.abs(g) * 256.0) | ((codes << 24) & SIGN)
    return _pair(low, high, DTYPE)


@triton.jit
def _magnitude(x):
    """The fp32 bit patterns of |x|, not rounded; bf16 comes as int16."""
    if x.dtype == tl.int16:
        bits = x.to(tl.int32) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return bits & MAGNITUDE


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
        largest = tl.maximum(largest, _magnitude(x))
    tl.atomic_max(out_ptr + item, _to_bf16(tl.max(largest, axis=0)))


@triton.jit(do_not_specialize=["blocks_per_item"])
def quantize_kernel(
    w_ptr,
    g_ptr,
    packed_ptr,
    scale_ptr,
    blocks_per_item,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``w`` as words -> packed codes, uint8, and block scales, E4M3 bytes; tile after tile as in fake quantize."""
    item, first, left = _tile(blocks_per_item, BLOCKS * STEPS)
    left = tl.minimum(left, BLOCKS * STEPS).to(tl.int32)
    w_ptr += first * 8
    packed_ptr += first * 8
    scale_ptr += first
    block = tl.arange(0, BLOCKS)
    pair = tl.arange(0, 8)[None, :]
    inv_g = tl.div_rn(1.0, tl.load(g_ptr + item))
    words = tl.load(w_ptr + (block[:, None] * 8 + pair), mask=(block < left)[:, None], other=0)
    for step in tl.static_range(STEPS):
        following = words
        if step + 1 < STEPS:
            after = block[:, None] + (step + 1) * BLOCKS
            following = tl.load(w_ptr + (after * 8 + pair), mask=after < left, other=0)
        low, high = _unpair(words, DTYPE)
        packed, byte, _ = _quantize(low, high, inv_g)
        here = block + step * BLOCKS
        tl.store(scale_ptr + here, byte, mask=here < left)
        tl.store(packed_ptr + (here[:, None] * 8 + pair), packed, mask=(here < left)[:, None])
        words = following


@triton.jit(do_not_specialize=["blocks_per_item"])
def fake_quantize_kernel(
    w_ptr, g_ptr, out_ptr, blocks_per_item, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr
):
    """Quantize and dequantize ``w`` in registers; ``w`` and ``out`` are words of the same dtype.

    A program works through ``STEPS`` tiles and loads the next one before it computes on the present one.
    """
    item, first, left = _tile(blocks_per_item, BLOCKS * STEPS)
    left = tl.minimum(left, BLOCKS * STEPS).to(tl.int32)
    w_ptr += first * 8
    out_ptr += first * 8
    block = tl.arange(0, BLOCKS)[:, None]
    pair = tl.arange(0, 8)[None, :]
    g = tl.load(g_ptr + item)
    words = tl.load(w_ptr + (block * 8 + pair), mask=block < left, other=0)
    for step in tl.static_range(STEPS):
        following = words
        if step + 1 < STEPS:
            after = block + (step + 1) * BLOCKS
            following = tl.load(w_ptr + (after * 8 + pair), mask=after < left, other=0)
        here = block + step * BLOCKS
        tl.store(out_ptr + (here * 8 + pair), _fake_quantize(words, g, DTYPE), mask=here < left)
        words = following


@triton.jit(do_not_specialize=["blocks_per_item"])
def dequantize_kernel(
    packed_ptr, scale_ptr, g_ptr, out_ptr, blocks_per_item, DTYPE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Packed codes, read eight at a time as int32, E4M3 bytes (any of the 256) and g -> ``out`` as words."""
    item, first, left = _tile(blocks_per_item, BLOCKS)
    half = tl.arange(0, 2 * BLOCKS)  # half a block is eight codes
    inside = half < 2 * left
    codes = tl.load(packed_ptr + first * 2 + half, mask=inside, other=0)
    byte = tl.load(scale_ptr + first + half // 2, mask=inside, other=0).to(tl.int32)
    words = _dequantize(codes, byte, tl.load(g_ptr + item), DTYPE)
    at = half[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + first * 8 + at, words, mask=inside[:, None])
