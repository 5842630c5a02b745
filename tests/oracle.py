"""An independent oracle for NVFP4: every rounding is a search for the nearest representable number.

It shares nothing with `nvfp4_qat`: number formats are spelled out bit by bit, nearest values are found by comparing
distances to all candidates, products are taken in float64 (where they are exact) and rounded once, and the global scale
is exact rational arithmetic.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

F32, F64 = NDArray[np.float32], NDArray[np.float64]
U8, U16 = NDArray[np.uint8], NDArray[np.uint16]


def decode_float(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Value of a sign/exponent/mantissa pattern with the IEEE bias and subnormals, read without infinities or NaN."""
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if bits >> (mantissa_bits + exponent_bits) & 1 else 1.0
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


E2M1 = np.array([decode_float(code, 2, 1) for code in range(16)])
E4M3 = np.array([decode_float(byte, 4, 3) if byte & 0x7F != 0x7F else np.nan for byte in range(256)])
NORMAL_SCALES = np.arange(0x08, 0x7F, dtype=np.uint8)
"""The E4M3 bytes of positive normal numbers, 2^-6 to 448."""
BF16 = np.array([decode_float(bits, 8, 7) for bits in range(1 << 15)])
"""Value of each non-negative bf16 pattern. Infinity, 0x7F80, reads as 2^128, as rounding to nearest takes it."""


def nearest(x: F64, values: F64, codes: U8) -> U8:
    """The code whose value is nearest to each ``x``, the even one of two that are equally near, the last beyond it.

    ``values`` ascend. Distances are exact wherever they decide: near a midpoint x and the grid have similar exponents.
    """
    distance = np.abs(x.clip(values[0], values[-1])[..., None] - values)
    is_nearest = distance == distance.min(-1, keepdims=True)
    # Neighbouring codes have different parity: among the one or two nearest this picks the only one or the even one.
    return codes[np.where(is_nearest, codes % 2, 2).argmin(-1)]


def to_float32(x: Fraction) -> np.float32:
    """The float32 nearest to a positive rational number in float32's normal range, ties to even."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < Fraction(2) ** exponent
    steps = x / Fraction(2) ** (exponent - 23)
    return np.float32(round(steps) * 2.0 ** (exponent - 23))  # round() of a Fraction takes ties to even


def bf16_bits(x: F32 | F64) -> U16:
    """The bf16 pattern nearest to each finite ``x``: the better of the patterns around it, ties to even."""
    magnitude = np.abs(np.asarray(x, np.float64))
    above = np.searchsorted(BF16[:0x7F81], magnitude).clip(0, 0x7F80)
    below = (above - 1).clip(0)
    to_above, to_below = np.abs(BF16[above] - magnitude), np.abs(BF16[below] - magnitude)
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(up, above, below).astype(np.uint16) | (np.signbit(x).astype(np.uint16) << 15)


def bf16_value(bits: U16) -> F64:
    """The numbers that bf16 patterns stand for."""
    return np.where(bits >> 15, -1.0, 1.0) * BF16[bits & 0x7FFF]


def global_scale(amax: float, policy: str) -> np.float32:
    """The multiplier for a magnitude, by exact rational arithmetic."""
    if amax == 0:
        return np.float32(1)
    exact = Fraction(amax)
    if policy == "pow2":
        e = max(-100, math.frexp(amax)[1] - 14)  # 2688 * 2^e is still below amax, or e at its lower bound
        while exact > 2688 * Fraction(2) ** e:
            e += 1
        return np.float32(2.0**e)
    divisor = min(2688 / exact, Fraction(2) ** 100)
    return to_float32(1 / Fraction(float(to_float32(divisor))))


def inverse(x: F32) -> F32:
    """``1 / x`` rounded once to float32. The detour over float64 changes nothing: it has more than twice the digits."""
    return (1.0 / x.astype(np.float64)).astype(np.float32)


def times(a: F32, b: F32) -> F32:
    """The float32 nearest to the product, which float64 holds exactly."""
    with np.errstate(over="ignore"):
        return (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)


def quantize(bits: U16, g: F32) -> tuple[U8, U8]:
    """Codes, one a byte, and scale bytes of bf16 patterns ``[n, 16]``, one block a row, with a multiplier ``[n]``."""
    x = bf16_value(bits).astype(np.float32)
    inverse_g = inverse(g)
    sixth = (times(np.abs(x).max(1), inverse_g).astype(np.float64) / 6).astype(np.float32)
    scale = nearest(sixth.astype(np.float64), E4M3[NORMAL_SCALES], NORMAL_SCALES)
    inverse_s = inverse(E4M3[scale].astype(np.float32))
    product = times(times(x, inverse_g[:, None]), inverse_s[:, None]).astype(np.float64)
    codes = nearest(np.abs(product), E2M1[:8], np.arange(8, dtype=np.uint8))
    return codes | (np.signbit(x).astype(np.uint8) << 3), scale


def dequantize(codes: U8, scale: U8, g: F32) -> U16:
    """bf16 patterns ``[n, 16]`` of codes ``[n, 16]``, scale bytes ``[n]`` and multipliers ``[n]``; NaN reads 0x7FC0."""
    product = E2M1[codes] * E4M3[scale][:, None] * g.astype(np.float64)[:, None]  # at most 30 bits: exact
    is_nan = np.isnan(product)
    bits = bf16_bits(np.where(is_nan, 0, product).astype(np.float32))
    return np.where(is_nan, np.uint16(0x7FC0), bits)


def pack(codes: U8) -> U8:
    """Two codes a byte, the even index in the low nibble."""
    return codes[..., 0::2] + codes[..., 1::2] * np.uint8(16)


def unpack(packed: U8) -> U8:
    """The inverse of `pack`."""
    return np.stack([packed % 16, packed // 16], -1).reshape(*packed.shape[:-1], -1)
