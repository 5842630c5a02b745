"""`Unpacks`: the weights of one FSDP unit from the gathered bytes of all ranks. See `multi`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .format import BLOCK
from .multi_table import ALIGNMENT, CODES, Table, Tiles

if TYPE_CHECKING:
    from .launch import Prepared

UNPACK = Tiles(blocks=128, steps=1, share=32, warps=2)

OUTS = 8
"""Results of one launch of the dequantize kernel: its arguments, and three bits in a row of its table."""


class UnpackPart(NamedTuple):
    """Where a weight lies in the gathered bytes.

    Rank r's chunk holds the blocks from ``r * blocks`` on, as many as there are before ``total``; what pads a chunk
    to equal size is not read.

    Args:
        codes: byte offset of its codes in a rank's chunk, a multiple of 16.
        scale: byte offset of its block scales in a rank's chunk.
        blocks: blocks of 16 in a rank's (padded) shard.
        total: blocks in the full weight.
        items: its global scales: 1, or the number of experts.
        first: index in ``g`` of the first of them.
    """

    codes: int
    scale: int
    blocks: int
    total: int
    items: int
    first: int


class Unpacks:
    """The full weights of one FSDP unit from the gathered bytes.

    Args:
        parts: see `UnpackPart`.
        world: ranks, that is, chunks in the gathered bytes.
        device: where the tables go.
        tiles, kernels: as for `Amaxes`.
    """

    def __init__(
        self,
        parts: Sequence[UnpackPart],
        world: int,
        device: torch.device,
        *,
        tiles: Tiles = UNPACK,
        kernels: bool = False,
    ) -> None:
        for part in parts:
            assert part.codes % ALIGNMENT == 0 and part.total % part.items == 0 and part.blocks * world >= part.total
        self._parts, self._world, self._device, self._tiles = list(parts), world, torch.device(device), tiles
        self._kernels = kernels or self._device.type == "cuda"
        self._launches: dict[tuple[object, ...], list[tuple[list[int], Table, Prepared]]] = {}

    def __call__(self, gathered: Tensor, g: Tensor, outs: Sequence[Tensor]) -> None:
        """Write every weight.

        Args:
            gathered: contiguous uint8, ``world`` chunks of one size, a multiple of 16.
            g: contiguous float32 multipliers.
            outs: for each part a contiguous tensor of ``16 * total`` elements, bf16, fp16 or fp32. Their version
                counters stay as they are: autograd takes an FSDP parameter for the same tensor every time.
        """
        assert gathered.is_contiguous() and gathered.dtype == torch.uint8 and g.is_contiguous()
        assert gathered.numel() % (self._world * ALIGNMENT) == 0 and len(outs) == len(self._parts)
        if not self._kernels:
            return self._one_by_one(gathered, g, outs)
        from . import launch

        originals = outs
        outs = [t if t.data_ptr() % ALIGNMENT == 0 else torch.empty_like(t) for t in originals]
        gathered = gathered if gathered.data_ptr() % ALIGNMENT == 0 else gathered.clone()
        key = (gathered.numel(), *(t.dtype for t in outs))
        if key not in self._launches:
            self._launches[key] = list(self._make_tables(gathered.numel() // self._world, [t.dtype for t in outs]))
        with launch.on_device(gathered):
            for indices, table, run in self._launches[key]:
                run(table.rows, gathered, g, *[outs[i] for i in indices])
        for made, original in zip(outs, originals, strict=True):
            if made is not original:
                original.data.copy_(made)

    def _one_by_one(self, gathered: Tensor, g: Tensor, outs: Sequence[Tensor]) -> None:
        for i, out in enumerate(outs):
            blocks = out.data.view(1, -1, BLOCK)
            for codes, scale, start, count, index in self._runs(i, gathered.numel() // self._world):
                ops.dequantize_into(
                    gathered[codes : codes + count * CODES].view(1, -1, CODES),
                    gathered[scale : scale + count].view(1, -1, 1),
                    g[index : index + 1],
                    blocks[:, start : start + count],
                )

    def _runs(self, i: int, chunk: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Part i in stretches of one rank and one item: offsets of codes and scales, first block, count, index in g."""
        part = self._parts[i]
        size = part.total // part.items
        for rank in range(self._world):
            start, end = rank * part.blocks, min((rank + 1) * part.blocks, part.total)
            while start < end:
                count = min(end, (start // size + 1) * size) - start
                skip = start - rank * part.blocks
                codes, scale = (rank * chunk + at + skip * b for at, b in ((part.codes, CODES), (part.scale, 1)))
                yield codes, scale, start, count, part.first + start // size
                start += count

    def _make_tables(self, chunk: int, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[list[int], Table, "Prepared"]]:
        """Parts of one dtype, at most eight and the last one repeated up to that; their table, and their launch."""
        from . import launch, multi_kernels

        for dtype in dict.fromkeys(dtypes):
            of_dtype = [i for i, d in enumerate(dtypes) if d == dtype and self._parts[i].total]
            for at in range(0, len(of_dtype), OUTS):
                indices = of_dtype[at : at + OUTS]
                runs = np.array([r for i in indices for r in self._runs(i, chunk)], dtype=np.int64)
                which = np.array([k for k, i in enumerate(indices) for _ in self._runs(i, chunk)])
                runs[:, 2] = runs[:, 2] * OUTS + which
                strides = CODES, 1, OUTS
                table = Table(runs, strides, launch.DTYPES[dtype][1], self._tiles, self._device)
                run = launch.Prepared(multi_kernels.multi_dequantize_kernel, table.grid, (), table.options)
                yield indices + indices[-1:] * (OUTS - len(indices)), table, run
