"""Tables on the device, from which the kernels for many tensors read what they have to do (`multi_kernels`)."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .format import BLOCK

Int64 = npt.NDArray[np.int64]

CODES = BLOCK // 2
"""Bytes of the codes of a block."""

ALIGNMENT = 16
"""Bytes that the kernels move at once: weights, gathered codes and each rank's chunk start at multiples of it."""


class Tiles(NamedTuple):
    """How a kernel divides its work. This changes its speed and never its results.

    Args:
        blocks: blocks of 16 that a program has in registers at once, a power of two.
        steps: tiles of that size that a program works through.
        share: programs for one row of the table.
        warps: warps in a program.
    """

    blocks: int
    steps: int
    share: int
    warps: int = 4


class Table:
    """Rows on the device for one launch of a kernel, and the arguments that go with them.

    Args:
        runs: int64 ``[n, 5]``, stretches of blocks that lie in one item: three numbers (addresses or offsets) for the
            first block, the number of blocks, the item's index.
        strides: how much each of the three numbers grows from a block to the next.
        dtype: what the kernel gets as ``DTYPE``: a Triton type.
    """

    def __init__(
        self, runs: Int64, strides: tuple[int, int, int], dtype: Any, tiles: Tiles, device: torch.device
    ) -> None:
        from . import launch

        span = tiles.blocks * tiles.steps * tiles.share
        pieces = -(-runs[:, 3] // span)
        run = np.repeat(np.arange(len(runs)), pieces)
        done = span * (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        rows = np.empty((len(run), 4), dtype=np.int64)
        rows[:, :3] = runs[run, :3] + done[:, None] * np.array(strides)
        rows[:, 3] = np.minimum(runs[run, 3] - done, span) | (runs[run, 4] << 32)
        self.rows = torch.from_numpy(rows).to(device)
        self.grid = (len(rows) * tiles.share,)
        assert self.grid[0] < 1 << 31
        sizes = {"BLOCKS": tiles.blocks, "STEPS": tiles.steps, "PROGRAMS": tiles.share}
        self.options = {**launch.OPTIONS, "DTYPE": dtype, **sizes, "num_warps": tiles.warps}
