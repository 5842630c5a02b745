"""NVFP4 in plain PyTorch: the definition, written to be read. Kernels are compared with this file and never import it.

One block of 16 values ``x`` with the tensor's multiplier ``g``::

    x    <- bf16(x)                                    the input is always bf16, whatever dtype the master has
    s    <- e4m3(clamp((max|x| · (1/g)) / 6, 2^-6, 448))        one block scale, never subnormal
    code <- e2m1(clamp((x · (1/g)) · (1/s), -6, 6))             ties to the even code; the sign bit is that of x
    x̂    <- bf16((e2m1 value · s) · g)

Every operation is an IEEE fp32 operation in this order; ``1/g`` and ``1/s`` are rounded once. With a power-of-two ``g``
all but the two roundings to E4M3 and E2M1 are exact, and so is ``x̂``: an E2M1 · E4M3 product has at most 6 significant
bits. That is why trainer and inference kernel hold the same bf16 weight whatever order they multiply in.

Nothing here checks values or bounds memory; `nvfp4_qat.ops` does both.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .format import BLOCK, E2M1_GRID, E2M1_MAX, E4M3_MAX, E4M3_MIN_NORMAL, GLOBAL_RANGE, MIN_EXPONENT

SIGNED_GRID = (*E2M1_GRID, *(-x for x in E2M1_GRID))


def amax(w: Tensor, batch_dims: int = 0) -> Tensor:
    """Largest magnitude of ``bf16(w)`` over all but the first ``batch_dims`` dimensions, as float32; NaN wins."""
    flat = w.to(torch.bfloat16).abs().flatten(batch_dims)
    if flat.shape[-1] == 0:
        return flat.new_zeros(flat.shape[:-1], dtype=torch.float32)
    return flat.amax(-1).float()


def global_scale(amax: Tensor, policy: str = "pow2") -> Tensor:
    """The multiplier for tensors whose largest magnitude is ``amax``, elementwise, as float32.

    ``pow2``: 2^e with the smallest integer e ≥ -100 such that ``amax ≤ 2688 · 2^e``. ``amax``: the stored divisor
    ``d = 2688 / amax`` defines ``g = 1 / d``, so that a checkpoint, which stores d, gives back the same g. All-zero: 1.
    """
    amax = amax.float()
    if policy == "pow2":
        fraction, bound = torch.frexp(torch.full_like(amax, GLOBAL_RANGE))
        mantissa, exponent = torch.frexp(amax)
        e = (exponent - bound + (mantissa > fraction).int()).clamp(min=MIN_EXPONENT)
        g = ((e + 127) << 23).int().view(torch.float32)
    else:
        divisor = (torch.full_like(amax, GLOBAL_RANGE) / amax).clamp(max=2.0**-MIN_EXPONENT)
        g = torch.ones_like(amax) / divisor
    return torch.where(amax == 0, torch.ones_like(amax), g)


def _like_blocks(g: Tensor, w: Tensor) -> Tensor:
    """Shape ``g``, scalar or one per leading index of ``w``, to broadcast against ``w`` split into blocks."""
    return g.reshape(g.shape + (1,) * (w.ndim + 1 - g.ndim))


def _codes(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes, uint8 ``[..., K/16, 16]``, and block scales, float8_e4m3fn ``[..., K/16, 1]``."""
    x = w.to(torch.bfloat16).float().unflatten(-1, (-1, BLOCK))
    scaled = x * (1 / _like_blocks(g, w))
    block_amax = scaled.abs().amax(-1, keepdim=True)
    six = torch.full_like(block_amax, E2M1_MAX)  # CUDA multiplies by the inverse of a Python number
    scale = (block_amax / six).clamp(E4M3_MIN_NORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    a = (scaled * (1 / scale.float())).abs().clamp(max=E2M1_MAX)
    # The grid is three uniform runs: steps of 1/2 to 2, of 1 to 4, of 2 to 6. round() is half-to-even and the codes
    # count along the runs, so an even multiple is an even code.
    code = torch.where(a < 2, (a * 2).round(), torch.where(a < 4, a.round() + 2, (a / 2).round() + 4))
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3), scale


def _scaled(value: Tensor, scale: Tensor, g: Tensor) -> Tensor:
    """bf16 weights ``[..., K]`` of values ``[..., K/16, 16]`` (overwritten) and block scales ``[..., K/16, 1]``."""
    value = value.mul_(scale.float()).mul_(g.reshape(g.shape + (1,) * (value.ndim - g.ndim)))
    return value.flatten(-2).to(torch.bfloat16)


def quantize(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Codes two a byte, uint8 ``[..., K/2]``, and block scales as E4M3 bytes, uint8 ``[..., K/16]``."""
    codes, scale = _codes(w, g)
    codes = codes.flatten(-2)
    return codes[..., ::2] | (codes[..., 1::2] << 4), scale.view(torch.uint8).squeeze(-1)


def dequantize(packed: Tensor, scale: Tensor, g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights ``[..., K]``, rounded to bf16 and then given as ``dtype``; ``scale`` is uint8 E4M3 bytes."""
    pairs = _value_pairs(packed.device).index_select(0, packed.flatten().int())
    value = pairs.view(torch.float32).view(*scale.shape, BLOCK)
    return _scaled(value, scale.view(torch.float8_e4m3fn).unsqueeze(-1), g).to(dtype)


@functools.cache
def _value_pairs(device: torch.device) -> Tensor:
    """The two E2M1 values of each of the 256 bytes, a pair of float32 in one int64: one lookup serves two codes.

    It is kept, so no mode that is on at the first call may make another kind of tensor of it.
    """
    with torch.inference_mode(False), _disable_current_modes():
        values = [[SIGNED_GRID[byte & 15], SIGNED_GRID[byte >> 4]] for byte in range(256)]
        return torch.tensor(values, dtype=torch.float32, device=device).view(torch.int64).flatten()


def fake_quantize(w: Tensor, g: Tensor) -> Tensor:
    """``dequantize(quantize(w))`` in ``w``'s dtype."""
    codes, scale = _codes(w, g)
    grid = torch.tensor(SIGNED_GRID, dtype=torch.float32, device=w.device)
    value = grid.index_select(0, codes.flatten().int()).view(codes.shape)
    return _scaled(value, scale, g).to(w.dtype)
