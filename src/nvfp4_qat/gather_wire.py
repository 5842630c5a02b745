"""`Wire`: the all-gather of a whole FSDP unit, its packed weights and what is not quantized, in place of FSDP2's.

FSDP2 asks every parameter for what it has to gather, copies that into one buffer, gathers it, and copies the result
into a buffer for each parameter. With few tokens a step waits for the host that does all this. Here the packed weights
lie in the buffer that is sent already, what is not quantized (norms, biases, routers) is copied behind them, one
collective brings both, and what is not quantized goes from there to the buffers that FSDP2 has made for it. Streams,
order, waiting and the life of the memory are those of FSDP2's own gather.

`GatherUnit` takes it where nothing is out of the ordinary, and FSDP2's way with `PackedAllGather` elsewhere.

Source of what is replaced: ``foreach_all_gather`` and ``foreach_all_gather_copy_out`` in torch 2.11 and 2.13
``torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from .shards import Unit, aligned


class Wire:
    """Sends a unit's packed bytes and its passengers.

    Args:
        packed: the packed shards, with room behind them for the passengers.
        group: FSDP2's parameter group.
        passengers: its parameters that are not quantized; `carries` them.
        keep: whether gathered bytes are kept, and sent again only if they changed.
    """

    def __init__(self, packed: Unit, group: Any, passengers: Sequence[Any], keep: bool) -> None:
        self._packed, self._group, self._passengers, self._keep = packed, group, list(passengers), keep
        self._sizes = [p.padded_sharded_param_size.numel() for p in passengers]
        dtype = _dtypes(passengers).pop() if self._passengers else torch.uint8
        self._tail = packed.tail[: sum(self._sizes) * dtype.itemsize].view(dtype)
        self._tails = list(self._tail.split(self._sizes))
        self._all = packed.memory[: packed.nbytes + aligned(self._tail.nbytes)]
        self._filled: list[Tensor] = []
        self._views: list[Tensor] = []
        """The passengers' buffers, and these as FSDP2's ranks see them."""
        self._sent: Any = None
        """When the last gather on FSDP2's own streams is done."""
        self._used: Tensor | None = None
        """What is kept, for the gather under way: it may be released meanwhile."""
        self._kept: Tensor | None = None
        self._kept_version = -1

    @staticmethod
    def carries(packed: Unit, passengers: Sequence[Any]) -> bool:
        """Whether these may travel with the packed bytes."""
        plain = all(
            type(p) is FSDPParam
            and p.fsdp_placement.dim == 0
            and not hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather")
            and len(p.all_gather_outputs) == 1
            and hasattr(p, "_unsharded_param")
            for p in passengers
        )
        dtypes = _dtypes(passengers)
        sizes = sum(p.padded_sharded_param_size.numel() for p in passengers)
        return (
            plain and len(dtypes) <= 1 and sizes * max((d.itemsize for d in dtypes), default=1) <= packed.tail.numel()
        )

    @torch.no_grad()
    def gather(self, version: int, comm: Any, async_op: bool, copies: Any, gathers: Any) -> AllGatherResult:
        """Begin the all-gather.

        Args:
            version: of the packed bytes.
            comm: FSDP2's ``AllGather``.
            async_op: as FSDP2 has it.
            copies, gathers: FSDP2's streams for copying what is sent, and for collectives.
        """
        packed, group = self._packed, self._group
        kept = self._kept if self._kept_version == version else None
        send, self._used = self._all if kept is None else self._tail, kept
        if self._sent is None:  # what is written now may be read by a gather of FSDP2
            copies.wait_stream(gathers)
        else:
            copies.wait_event(self._sent)
        with group.device_handle.stream(copies):
            if self._tails:
                torch._foreach_copy_(self._tails, [p._sharded_param_data for p in self._passengers])
            if kept is None:
                self._kept = None  # before there is another
            elif not self._tails:
                return AllGatherResult(kept, copies.record_event(), None, [], [], [])
            out = comm.allocate((packed.world * send.numel(),), dtype=send.dtype, device=packed.device)
        gathers.wait_stream(copies)
        with group.device_handle.stream(gathers):
            work = comm(output_tensor=out, input_tensor=send, group=group._all_gather_process_group, async_op=async_op)
            self._sent = event = gathers.record_event()
        if self._keep and kept is None:
            self._kept, self._kept_version = out, version
        return AllGatherResult(out, event, work, [], [], [])

    def packed_bytes(self, result: AllGatherResult) -> Tensor:
        """Those of all ranks, each with what travelled with them, to be read on the current stream."""
        source, self._used = self._used, None
        if source is None:
            source = result.all_gather_output
        if self._keep and source.is_cuda:  # it may be freed on another stream than it is read on
            source.record_stream(torch.cuda.current_stream(source.device))
        return source

    @torch.no_grad()
    def deliver(self, result: AllGatherResult) -> None:
        """Fill the passengers' unsharded parameters, on the current stream."""
        if not self._passengers:
            return
        packed, out, size = self._packed, result.all_gather_output, self._tail.itemsize
        for p in self._passengers:
            p.alloc_all_gather_outputs()
        outputs = [p.all_gather_outputs[0] for p in self._passengers]
        if len(outputs) != len(self._filled) or any(a is not b for a, b in zip(outputs, self._filled, strict=True)):
            self._filled, self._views = outputs, [t.view(packed.world, -1) for t in outputs]
        if out.numel() * out.itemsize == self._tail.nbytes * packed.world:
            rest = out.view(packed.world, -1)
        else:
            out = out.view(self._tail.dtype)
            strides = self._all.numel() // size, 1
            start = out.storage_offset() + packed.nbytes // size
            rest = out.as_strided((packed.world, self._tail.numel()), strides, start).contiguous()
        counted = tuple(t for t in self._views if not t.is_inference())
        with torch.autograd._unsafe_preserve_version_counter(counted):  # type: ignore[attr-defined]
            torch.split_with_sizes_copy(rest, self._sizes, dim=1, out=self._views)

    def passed_over(self) -> None:
        """FSDP2 gathers the unit next."""
        self._sent = None

    def release(self) -> None:
        """Free what is kept."""
        self._kept = None


def _dtypes(passengers: Sequence[Any]) -> set[torch.dtype]:
    """In which they are gathered."""
    return {p.param_dtype or p.orig_dtype for p in passengers}
