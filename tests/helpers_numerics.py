"""Inputs that cover NVFP4's corners, and a comparison that shows the first difference in bits.

A case is a bf16 weight ``[E, n, 16]`` (or any shape) with multipliers ``[E]``; `test_reference` compares the reference
with the oracle on them and `test_kernels` the kernels with the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import torch
from torch import Tensor

BITS = {1: (torch.uint8, 0xFF), 2: (torch.int16, 0xFFFF), 4: (torch.int32, 0xFFFFFFFF), 8: (torch.int64, 2**64 - 1)}


def assert_same_bits(actual: Tensor, expected: Tensor, what: str, **context: Tensor) -> None:
    """Fail at the first element whose bits differ, showing both and what each context tensor holds there.

    NaNs are equal to each other whatever their bits. A context tensor of another size, such as block scales, is shown
    at the corresponding place.
    """
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    integer, mask = BITS[actual.element_size()]
    a, b = actual.reshape(-1).view(integer), expected.reshape(-1).view(integer)
    differs = a != b
    if actual.is_floating_point() and actual.element_size() > 1:
        differs &= ~(actual.reshape(-1).isnan() & expected.reshape(-1).isnan())
    if not differs.any():
        return
    first = int(differs.nonzero()[0])
    at = tuple(int(i) for i in np.unravel_index(first, actual.shape))
    lines = [
        f"{what}: {int(differs.sum())} of {actual.numel()} differ, first at {at}:",
        f"  got      {int(a[first]) & mask:#x} = {actual.reshape(-1)[first].item()}",
        f"  expected {int(b[first]) & mask:#x} = {expected.reshape(-1)[first].item()}",
    ]
    for name, tensor in context.items():
        there = first * tensor.numel() // actual.numel()
        lines.append(f"  {name} at {there}: {tensor.reshape(-1)[there : there + 16].tolist()}")
    raise AssertionError("\n".join(lines))


def bf16(bits: np.ndarray) -> Tensor:
    """A bf16 tensor from its bit patterns."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16)


def bf16_of(values: np.ndarray) -> Tensor:
    """A bf16 tensor of the nearest values."""
    return bf16(oracle.bf16_bits(values))


def every_finite_bf16() -> tuple[Tensor, Tensor]:
    """Every finite bf16, once among its neighbours and once among numbers of all magnitudes, under several multipliers.

    Holds zero blocks, subnormals, amax at and far beyond saturation, and every exponent of the block scale.
    """
    magnitudes = np.arange(0x7F80)
    patterns = np.stack([magnitudes, magnitudes | 0x8000], 1).reshape(-1)
    blocks = np.concatenate([patterns.reshape(-1, 16), patterns.reshape(16, -1).T])
    g = torch.tensor([1.0, 2.0**-100, 2.0**8, 2.0**-12, 3.14159e-4, 1 / 3])
    return bf16(blocks).expand(len(g), -1, -1).contiguous(), g


def every_ratio_to_the_scale() -> tuple[Tensor, Tensor]:
    """For each of the 119 scales, every bf16 from 1/8 to 6 times it: all ties, all that a power-of-two g can give."""
    blocks = []
    for scale in oracle.E4M3[oracle.NORMAL_SCALES]:
        low, high = (int(oracle.bf16_bits(np.array(x * scale))) for x in (0.125, 6.0))
        values = oracle.bf16_value(
            np.resize(np.arange(low, high + 1, dtype=np.uint16), -(-(high - low + 1) // 15) * 15)
        )
        values[1::2] *= -1
        anchor = np.full((len(values) // 15, 1), 6 * scale)
        blocks.append(np.concatenate([anchor, values.reshape(-1, 15)], 1))
    return bf16_of(np.concatenate(blocks))[None], torch.ones(1)


def near_ties(count: int = 4096) -> tuple[Tensor, Tensor]:
    """Blocks whose second element, divided by g and the scale, lies within a few units in the last place of a tie.

    bf16 elements alone do not come so near: g is chosen to bring it there. One g per block, ``[count, 1, 16]``.
    """
    rng = np.random.default_rng(0)
    tie = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], count)
    scale = oracle.E4M3[rng.choice(oracle.NORMAL_SCALES, count)]
    x = oracle.bf16_value(rng.integers(0x3000, 0x3F80, count).astype(np.uint16))
    exact = (x / (tie * scale)).astype(np.float32)
    g = (exact.view(np.int32) + rng.integers(-1, 2, count).astype(np.int32)).view(np.float32)
    blocks = np.zeros((count, 1, 16))
    blocks[:, 0, 0] = 6 * scale * g.astype(np.float64)
    blocks[:, 0, 1], blocks[:, 0, 2] = x, -x
    return bf16_of(blocks), torch.from_numpy(g)


def near_scale_ties(count: int = 4096) -> tuple[Tensor, Tensor]:
    """Blocks whose largest magnitude lies that close to a midpoint between two block scales, by the choice of g."""
    rng = np.random.default_rng(3)
    scales = oracle.E4M3[oracle.NORMAL_SCALES]
    tie = rng.choice((scales[1:] + scales[:-1]) / 2, count)
    largest = oracle.bf16_value(rng.integers(0x3000, 0x3F80, count).astype(np.uint16))
    exact = (largest / (6 * tie)).astype(np.float32)
    g = (exact.view(np.int32) + rng.integers(-2, 3, count).astype(np.int32)).view(np.float32)
    blocks = largest[:, None, None] * rng.uniform(-0.99, 0.99, (count, 1, 16))
    blocks[:, 0, 5] = largest
    return bf16_of(blocks), torch.from_numpy(g)


def zeros() -> tuple[Tensor, Tensor]:
    """Blocks of +0, of -0, of both, and of values so small that all codes are zero, signed."""
    blocks = np.zeros((4, 16))
    blocks[1] = -0.0
    blocks[2, ::2] = -0.0
    blocks[3] = np.where(np.arange(16) % 2, -1, 1) * 2.0**-120
    g = torch.tensor([1.0, 2.0**-100, 2.0**8, 0.1])
    return bf16_of(blocks).expand(len(g), -1, -1).contiguous(), g


def saturation() -> tuple[Tensor, Tensor]:
    """amax at 2688 g, one bf16 below and above it, and the largest finite bf16, for powers of two g and some others."""
    g = np.concatenate([2.0 ** np.arange(-100, 9), [0.3, 1e-3, 7e-10]]).astype(np.float32)
    top = oracle.bf16_bits(2688.0 * g.astype(np.float64)).astype(np.int64)
    heads = np.stack([top - 1, top, top + 1, np.full_like(top, 0x7F7F)], 1)
    ratios = np.array([1, -1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, -0.01, 1 / 3, 2 / 3])
    tails = oracle.bf16_bits(oracle.BF16[heads][..., None] * ratios)
    return bf16(np.concatenate([heads[..., None], tails], -1)), torch.from_numpy(g)


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    f.__name__: f for f in (every_finite_bf16, every_ratio_to_the_scale, near_ties, near_scale_ties, zeros, saturation)
}


def all_codes_and_scales() -> tuple[Tensor, Tensor]:
    """Packed codes ``[256, 8]`` and scale bytes ``[256, 1]``: every code under every byte, signs and NaN included."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    return torch.from_numpy(oracle.pack(codes)), torch.arange(256, dtype=torch.uint8)[:, None]


def multipliers() -> Tensor:
    """Every power of two that a global scale can be, and multipliers as the amax policy gives them."""
    amaxes = np.random.default_rng(1).uniform(1e-6, 50, 24)
    return torch.tensor([2.0**e for e in range(-100, 9)] + [float(oracle.global_scale(a, "amax")) for a in amaxes])
