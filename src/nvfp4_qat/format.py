"""NVFP4 as data: what a tensor looks like in 4 bits. This file imports nothing of ours and nothing re-derives it.

A tensor ``W[..., K]`` with K divisible by 16 is stored as three tensors:

================  ==================================  ==========================================================
``packed``        uint8 ``[..., K/2]``                two E2M1 codes a byte, the even index in the low nibble
``scale``         float8_e4m3fn ``[..., K/16]``       one block scale per 16 consecutive values of the last dim
``global_scale``  float32, scalar or one per expert   a *multiplier*: ``W ≈ e2m1 · scale · global_scale``
================  ==================================  ==========================================================

An E2M1 code is a sign bit (bit 3) and an index into `E2M1_GRID` (bits 0-2). Code 8 is -0.0.

Direction of the global scale: inside this package it is always the multiplier. compressed-tensors checkpoints store its
inverse (``weight_global_scale``, a divisor); ModelOpt's ``weight_scale_2`` stores the multiplier. Only the exporter
converts.

Sources: NVIDIA's NVFP4 format; OCP Microscaling (E2M1); OCP 8-bit floating point (E4M3, no infinities, 0x7F is NaN).
"""

BLOCK = 16
"""Consecutive values along the last dimension that share one block scale."""

E2M1_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the eight codes of one sign."""

E2M1_MAX = 6.0

E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes; a value on one goes to the neighbour with the even code."""

E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
"""Block scales are clamped up to this: Marlin flushes subnormal block scales to zero, other kernels do not."""

GLOBAL_RANGE = E2M1_MAX * E4M3_MAX
"""The largest magnitude that code and block scale reach together (2688); the global scale maps amax below it."""

MIN_EXPONENT = -100
MAX_EXPONENT = 8
"""Bounds of log2(global_scale). Above 8 the engines' own ``g · 2^119`` would overflow."""

POLICIES = ("pow2", "amax")
"""How a global scale follows from amax; see `nvfp4_qat.global_scale`."""

BITS_PER_WEIGHT = 4.5
"""4 bits a code and 8 bits a block of 16 (the global scales add nothing that counts)."""
