"""`PackedAllGather`: FSDP2's all-gather of a unit, which brings the unit's packed bytes along. See `gather_unit`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from .shards import Unit


class PackedAllGather(DefaultAllGather):
    """An all-gather of FSDP2 that brings the packed bytes of a unit along.

    FSDP2 lets it be replaced like its own: then the next gather is done by what it was replaced with.

    Args:
        inner: what does the gathering.
        packed: whose buffer is gathered.
        keep: whether what was gathered is used again while ``wanted`` stays the same.

    Source of the interface: ``AllGather`` in torch 2.11-2.13 ``torch/distributed/fsdp/_fully_shard/_fsdp_api.py``.
    """

    def __init__(self, inner: Any, packed: Unit, keep: bool = False) -> None:
        self.inner, self._packed, self._keep = inner, packed, keep
        self.wanted = -1
        """Which packing of the unit is to be gathered."""
        self._kept: Tensor | None = None
        self._kept_version = -1
        self._room, self._alone, self._joint = (
            packed.world * t.numel() for t in (packed.tail, packed.buffer, packed.memory)
        )
        self._gathered: Tensor | None = None
        self._work: Any = None
        self._tail = packed.tail

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2's output, and room for the bytes of all ranks: in front of it, where these are not to outlive it."""
        nbytes = (size[0] if len(size) == 1 else math.prod(size)) * dtype.itemsize
        start = self._joint if nbytes <= self._room else self._alone
        if self._keep:
            if self._kept is None or self._kept_version != self.wanted:
                self._kept = None  # before there is another
                self._gathered = self.inner.allocate((start,), dtype=torch.uint8, device=device)
            else:
                self._gathered = self._kept
            apart: Tensor = self.inner.allocate(size, dtype=dtype, device=device)
            return apart
        whole: Tensor = self.inner.allocate((start + nbytes,), dtype=torch.uint8, device=device)
        self._gathered = whole[:start]
        rest = whole[start:]
        return rest if dtype == torch.uint8 else rest.view(dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        packed, gathered = self._packed, self._gathered
        assert gathered is not None
        if gathered is self._kept:
            return self.inner(output_tensor, input_tensor, group, async_op)
        joint = gathered.numel() > self._alone
        if async_op or not joint:  # no time to copy the output, or no room for the input
            self._work = self.inner(gathered, packed.memory if joint else packed.buffer, group, async_op)
            return self.inner(output_tensor, input_tensor, group, async_op)
        dtype, n = input_tensor.dtype, input_tensor.numel()
        if self._tail.dtype != dtype or self._tail.numel() != n:
            with torch.inference_mode(False):  # training may follow
                self._tail = packed.tail[: n * dtype.itemsize].view(dtype)
        self._tail.copy_(input_tensor)
        work = self.inner(gathered, packed.memory, group)
        typed, size = gathered.view(dtype), dtype.itemsize
        strides = packed.memory.numel() // size, 1
        rest = typed.as_strided((packed.world, n), strides, typed.storage_offset() + packed.nbytes // size)
        output_tensor.view(packed.world, n).copy_(rest)
        return work

    def take(self) -> Tensor | None:
        """The bytes gathered last, to be read on the current stream: a chunk for each rank, its packed bytes first."""
        work, gathered = self._work, self._gathered
        self._work = self._gathered = None
        if work is not None:
            work.wait()
        if self._keep and gathered is not None:
            if gathered.is_cuda:  # it may be freed on another stream than it is read on
                gathered.record_stream(torch.cuda.current_stream(gathered.device))
            self._kept, self._kept_version = gathered, self.wanted
        return gathered

    def release(self) -> None:
        """Free what is kept."""
        self._kept = None
