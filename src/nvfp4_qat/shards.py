"""Weights that are sharded over ranks along their first dimension, and how their packed bytes lie in memory.

Blocks of 16 run along the last dimension, so a shard on dim 0 can be quantized where it lies (`shard_packer`).

The packed shards of the weights that are gathered together (a `Unit`) lie in one buffer of bytes, equally long on every
rank: first the codes of all its weights, then their block scales. A rank whose shard is shorter, or empty (the last
ranks of an uneven division), leaves its part of the padding zero. Global scales are not gathered: every rank knows all
of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import ops
from .format import BLOCK
from .multi_unpack import UnpackPart, Unpacks

ALIGNMENT = 16
"""Bytes; kernels read codes in words of this size."""


@dataclass(eq=False)
class Shard:
    """A weight, and the part of it that this rank holds.

    Args:
        name: canonical name, for messages.
        shape: of the whole weight.
        batch_dims: 1 for fused experts, else 0.
        group: name of the fusion group.
        mesh: all ranks that hold the weight; None: this process alone.
        world: ranks the first dimension is divided over. rank: which of them this one is.
        master: gives the local part, contiguous ``[rows, …]``, as it is now.
    """

    name: str
    shape: tuple[int, ...]
    batch_dims: int
    group: str
    mesh: DeviceMesh | None
    world: int
    rank: int
    master: Callable[[], Tensor]
    first: int = field(default=-1, init=False)
    """Index of its first global scale in the packer's vectors."""

    def __post_init__(self) -> None:
        self.items = self.shape[0] if self.batch_dims else 1
        """How many global scales the whole weight has."""
        self.padded_rows = -(-self.shape[0] // self.world)
        """Rows of a full shard: what every rank has a place for."""
        self.start = min(self.rank * self.padded_rows, self.shape[0])
        """First row that this rank holds."""
        self.rows = min(self.padded_rows, self.shape[0] - self.start)
        """Rows that this rank holds."""
        self.row_blocks = torch.Size(self.shape[1:]).numel() // BLOCK
        """Blocks of 16 in a row."""
        self.local_shape = (self.rows, *self.shape[1:])
        self.local_items = self.rows if self.batch_dims else min(1, self.rows)

    @property
    def local_first(self) -> int:
        """Index of the first global scale that the local part uses."""
        return self.first + (self.start if self.batch_dims else 0)


class Unit:
    """Weights that are gathered together, and the buffer with this rank's packed shards of them.

    Args:
        shards: at least one; all divided over the same ranks.
        device: where the packed bytes live.
        room: bytes behind the packed shards for what is gathered with them, a multiple of 16.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, room: int = 0) -> None:
        self.shards, self.world, self.device = list(shards), shards[0].world, device
        blocks = [s.padded_rows * s.row_blocks for s in shards]
        ends = list(accumulate(
            (aligned(n) for n in (*(b * BLOCK // 2 for b in blocks), *blocks)), initial=0
        ))  # fmt: skip
        self.codes_at, self.scale_at, self.nbytes = ends[: len(blocks)], ends[len(blocks) : -1], ends[-1]
        self.memory = torch.zeros(self.nbytes + room, dtype=torch.uint8, device=device)
        self.buffer, self.tail = self.memory[: self.nbytes], self.memory[self.nbytes :]
        self._blocks = blocks

    @property
    def items(self) -> slice:
        """Its global scales among all, after the packer has numbered them."""
        last = self.shards[-1]
        return slice(self.shards[0].first, last.first + last.items)

    def parts(self) -> list[UnpackPart]:
        """Where the weights lie in a rank's chunk, for `Unpacks`; after the packer has numbered the global scales."""
        return [
            UnpackPart(codes, scale, blocks, s.shape[0] * s.row_blocks, s.items, s.first)
            for s, codes, scale, blocks in zip(self.shards, self.codes_at, self.scale_at, self._blocks, strict=True)
        ]

    def unpacks(self) -> Unpacks:
        return Unpacks(self.parts(), self.world, self.device)

    def packed_views(self) -> list[tuple[Tensor, Tensor]]:
        """Codes and block scales of the local rows of each weight, flat, as views of the buffer."""
        views = []
        for s, codes, scale in zip(self.shards, self.codes_at, self.scale_at, strict=True):
            n = s.rows * s.row_blocks
            views.append((self.buffer[codes : codes + n * BLOCK // 2], self.buffer[scale : scale + n]))
        return views

    def whole(self, gathered: Tensor, g: Tensor) -> list[ops.PackedNVFP4]:
        """The packed weights in full.

        Args:
            gathered: uint8, every rank's buffer in the order of the ranks.
            g: all global scales.

        Returns:
            New tensors, in the order of ``shards``.
        """
        chunks = gathered.view(self.world, self.nbytes)
        found = []
        for s, codes, scale, blocks in zip(self.shards, self.codes_at, self.scale_at, self._blocks, strict=True):
            total, leading = s.shape[0] * s.row_blocks, s.shape[:-1]
            packed = chunks[:, codes : codes + blocks * BLOCK // 2].reshape(-1)[: total * BLOCK // 2]
            scales = chunks[:, scale : scale + blocks].reshape(-1)[:total]
            multiplier = g[s.first : s.first + s.items].clone()
            found.append(
                ops.PackedNVFP4(
                    packed.view(*leading, -1),
                    scales.view(*leading, -1).view(torch.float8_e4m3fn),
                    multiplier if s.batch_dims else multiplier[0],
                )
            )
        return found


def aligned(n: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-n // ALIGNMENT) * ALIGNMENT
