"""The Triton kernels and the reference on the same weights: on the GPU if there is one, else in Triton's interpreter.

Tiles are large where the kernels are interpreted, because the interpreter's cost is per program.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from helpers_numerics import assert_same_bits
from torch import Tensor

from nvfp4_qat import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
tl = pytest.importorskip("triton.language")

from nvfp4_qat import launch  # noqa: E402

BLOCKS = 256 if DEVICE == "cuda" else 4096
MARKS = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy
if DEVICE == "cuda":
    MARKS.append(pytest.mark.gpu)
TILE = launch.TILE if DEVICE == "cuda" else 1 << 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def tile(blocks: int, tuned: launch.Tile) -> launch.Tile:
    """Tiles of that many blocks; as many as ships on a GPU, unless a test wants others."""
    return tuned if DEVICE == "cuda" and blocks == BLOCKS else launch.Tile(blocks, 4, tuned.steps)


def launched(w: Tensor, g: Tensor, blocks: int = BLOCKS, small: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scale bytes and the fake-quantized weight from the kernels, with large or small tensors' tiles."""
    pack, both = (
        (launch.SMALL_QUANTIZE, launch.SMALL_FAKE_QUANTIZE) if small else (launch.QUANTIZE, launch.FAKE_QUANTIZE)
    )
    w, g = w.to(DEVICE), g.to(DEVICE)
    packed = torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.empty((*w.shape[:-1], w.shape[-1] // 16), dtype=torch.uint8, device=DEVICE)
    fake = torch.empty(w.shape, dtype=w.dtype, device=DEVICE)
    launch.quantize(w, g, packed, scale, tile(blocks, pack))
    launch.fake_quantize(w, g, fake, tile(blocks, both))
    return packed, scale, fake


def dequantized(packed: Tensor, scale: Tensor, g: Tensor, dtype: torch.dtype, blocks: int = BLOCKS) -> Tensor:
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=DEVICE)
    packed, scale, g = packed.to(DEVICE), scale.to(DEVICE), g.to(DEVICE)
    launch.dequantize(packed, scale, g, out, tile(blocks, launch.DEQUANTIZE))
    return out


def check(w: Tensor, g: Tensor, blocks: int = BLOCKS) -> None:
    expected_packed, expected_scale = reference.quantize(w, g)
    expected = reference.fake_quantize(w, g)
    for small in (True, False) if DEVICE == "cuda" and blocks == BLOCKS else (False,):
        packed, scale, fake = launched(w, g, blocks, small)
        assert_same_bits(scale, expected_scale, "block scales", w=w, g=g)
        assert_same_bits(packed, expected_packed, "packed codes", w=w, scale=expected_scale, g=g)
        assert_same_bits(fake, expected, "fake quantized", w=w, scale=expected_scale, g=g)
    again = dequantized(packed, scale, g, w.dtype, blocks)
    assert_same_bits(again, reference.dequantize(expected_packed, expected_scale, g, w.dtype), "dequantized", w=w, g=g)
    largest = launch.amax_bits(w.to(DEVICE), g.ndim, tile=TILE, steps=1)
    assert_same_bits(largest.view(torch.float32), reference.amax(w, g.ndim), "amax", w=w)
