"""Weights for the tests of many tensors at once, and who computes: plain PyTorch tensor by tensor, or the kernels.

The kernels run on the GPU if there is one, else in Triton's interpreter, whose cost is per program: sizes are small and
so are the tiles, and every tensor ends in the middle of a tile. `test_gpu_multi` has the sizes of models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers_numerics import assert_same_bits
from torch import Tensor

from nvfp4_qat import reference
from nvfp4_qat.multi_table import Tiles
from nvfp4_qat.multi_unpack import UnpackPart, Unpacks

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

MARKS = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy
if HAS_GPU:
    MARKS.append(pytest.mark.gpu)
TILES = Tiles(blocks=8, steps=2, share=4)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Mode:
    """Where the tensors are and who computes."""

    def __init__(self, name: str) -> None:
        self.kernels = name == "kernels"
        self.device = torch.device("cuda" if self.kernels and HAS_GPU else "cpu")

    def put(self, t: Tensor) -> Tensor:
        """``t`` on the device, at the same offset from an aligned address as it has in its own storage."""
        if t.device == self.device:
            return t
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(self.device)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def zeros(self, n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=self.device)


def randn(*shape: int, dtype: torch.dtype = BF16, offset: int = 0) -> Tensor:
    """Random weights that start ``offset`` elements into their storage."""
    n = int(np.prod(shape))
    flat = (torch.randn(n + offset) * 0.05).to(dtype)
    return flat[offset:].view(shape)


def expected_amaxes(tensors: list[Tensor], items: list[int], first: list[int], n: int) -> Tensor:
    out = torch.zeros(n)
    for w, count, i in zip(tensors, items, first, strict=True):
        if w.numel():
            part = reference.amax(w.reshape(count, -1), 1)
            out[i : i + count] = torch.maximum(out[i : i + count], part)
    return out


def some_g(n: int) -> Tensor:
    """A multiplier per index, of both policies."""
    amax = torch.rand(n) * 0.3 + 1e-3
    return torch.where(torch.arange(n) % 2 == 0, reference.global_scale(amax), reference.global_scale(amax, "amax"))


class Unit:
    """Weights of one FSDP unit, packed by the reference, cut into ranks as FSDP2 does, and laid out to be gathered."""

    def __init__(self, weights: list[tuple[tuple[int, ...], int]], world: int) -> None:
        self.world, self.shapes = world, [shape for shape, _ in weights]
        self.g = some_g(sum(items for _, items in weights) + 1)
        self.packed: list[tuple[Tensor, Tensor]] = []
        self.parts: list[UnpackPart] = []
        at, index = 16, 1
        for shape, items in weights:
            w = randn(*shape)
            total = w.numel() // 16
            self.packed.append(reference.quantize(w.view(items, -1, 16), self.g[index : index + items]))
            blocks = -(-shape[0] // world) * (total // shape[0])
            scale = at + blocks * 8 + 3
            self.parts.append(UnpackPart(at, scale, blocks, total, items, index))
            at = -(-(scale + blocks) // 16) * 16
            index += items
        self.nbytes = at

    def gathered(self) -> Tensor:
        """Every rank's chunk; what pads it is random."""
        chunks = torch.randint(0, 256, (self.world, self.nbytes), dtype=torch.uint8)
        for part, (codes, scale) in zip(self.parts, self.packed, strict=True):
            for rank in range(self.world):
                mine = slice(rank * part.blocks, min((rank + 1) * part.blocks, part.total))
                codes_here, scale_here = codes.view(-1, 8)[mine], scale.view(-1)[mine]
                chunks[rank, part.codes : part.codes + codes_here.numel()] = codes_here.flatten()
                chunks[rank, part.scale : part.scale + scale_here.numel()] = scale_here
        return chunks.flatten()

    def expected(self, dtypes: list[torch.dtype]) -> Iterator[Tensor]:
        for part, (codes, scale), shape, dtype in zip(self.parts, self.packed, self.shapes, dtypes, strict=True):
            g = self.g[part.first : part.first + part.items]
            yield reference.dequantize(codes, scale, g, dtype).view(shape)

    def check(self, mode: Mode, gathered: Tensor, dtypes: list[torch.dtype], tiles: Tiles = TILES) -> None:
        unpacks = Unpacks(self.parts, self.world, mode.device, tiles=tiles, kernels=mode.kernels)
        g = self.g.to(mode.device)
        for start in (16, 32, 1):  # addresses change from call to call, and a result may begin anywhere
            sizes = [part.total * 16 for part in self.parts]
            wide = [torch.full((n + 48,), 7.0, dtype=d, device=mode.device) for n, d in zip(sizes, dtypes, strict=True)]
            outs = [
                torch.nn.Parameter(t[start : start + n].view(shape))
                for t, n, shape in zip(wide, sizes, self.shapes, strict=True)
            ]
            versions = [t._version for t in outs]
            unpacks(mode.put(gathered), g, outs)
            assert versions == [t._version for t in outs]
            for n, t, out, wanted in zip(sizes, wide, outs, self.expected(dtypes), strict=True):
                assert_same_bits(out.detach(), wanted, f"a weight of {self.world} ranks")
                assert (t[:start] == 7).all() and (t[start + n :] == 7).all()
