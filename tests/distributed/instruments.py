"""Instruments: what is sent, what is packed, what memory is in use, and whether every rank raises."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nvfp4_qat import reference


class Call(NamedTuple):
    """A collective: its method, the bytes and dtype of this rank's input, the number of ranks."""

    kind: str
    nbytes: int
    dtype: torch.dtype
    ranks: int


class Collectives:
    """Records the collectives that Python code asks a process group for while it is open.

    The methods of `ProcessGroup` are watched and not the functions of `torch.distributed`, whose names change.
    """

    GATHER = ("_allgather_base", "all_gather_single", "allgather", "allgather_into_tensor_coalesced")
    OTHER = ("allreduce", "_reduce_scatter_base", "reduce_scatter_single", "broadcast", "gather", "alltoall_base")

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Collectives:
        for name in self.GATHER + self.OTHER:
            if name in vars(dist.ProcessGroup):
                self._originals[name] = vars(dist.ProcessGroup)[name]  # getattr would give another object
                setattr(dist.ProcessGroup, name, self._watched(name, getattr(dist.ProcessGroup, name)))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)

    def _watched(self, name: str, original: Any) -> Any:
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            both = name in self.GATHER or "reduce_scatter" in name  # (outputs, inputs), else inputs only
            inputs = list(_tensors(args[1] if both else args[0]))
            if inputs:
                kind = "gather" if name in self.GATHER else name
                nbytes = sum(t.numel() * t.element_size() for t in inputs)
                self.calls.append(Call(kind, nbytes, inputs[0].dtype, group.size()))
            return original(group, *args, **kwargs)

        return method

    def gathered(self) -> int:
        """Bytes this rank contributed to all-gathers."""
        return sum(call.nbytes for call in self.calls if call.kind == "gather")

    def amax_reductions(self) -> list[Call]:
        """All-reduces of integers: gradients are reduced in floating point."""
        return [call for call in self.calls if call.kind == "allreduce" and not call.dtype.is_floating_point]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def packing() -> Iterator[list[int]]:
    """Collects how many elements are quantized, call by call, while it is open. CPU tensors only."""
    sizes: list[int] = []
    original = reference.quantize

    def counted(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(w.numel())
        return original(w, g)

    reference.quantize = counted
    try:
        yield sizes
    finally:
        reference.quantize = original


def live_bytes(device: str = "cpu") -> int:
    """Bytes of all tensors alive; on a CPU of those that Python can see."""
    gc.collect()
    if device == "cuda":
        return allocated(device)
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):  # DTensors and other wrappers claim bytes that they do not hold
            storage = thing.untyped_storage()
            if storage.device.type == device:
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated(device: str) -> int:
    """Bytes in use by the account of the allocator: the GPU's, or the C library's, which holds Python's objects too."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        raise unittest.SkipTest("needs mallinfo2, of glibc 2.33 and later")
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def settled(measure: Callable[[], int], limit: int) -> int:
    """A measurement, the least of several while it is above the limit: the backend's threads let go of memory late."""
    least = measure()
    deadline = time.monotonic() + (3.0 if limit else 0.5)
    while least > limit and time.monotonic() < deadline:
        time.sleep(0.05)
        least = min(least, measure())
    return least


def at_rest(measure: Callable[[], int]) -> int:
    """A measurement to compare later ones with, taken when the backend's threads have let go of earlier memory."""
    return settled(measure, 1)


def local(p: Tensor) -> Tensor:
    """This rank's part of a sharded parameter."""
    return p.detach().to_local() if isinstance(p, DTensor) else p.detach()


def padded_numel(shape: torch.Size, world: int) -> int:
    """Elements of a rank's part with the padding that makes all parts equal."""
    return -(-shape[0] // world) * torch.Size(shape[1:]).numel()


def raises_everywhere(error: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], Any]) -> str:
    """Call on every rank; all must raise. Returns this rank's message. Collective."""
    message = None
    try:
        call()
    except error as caught:
        message = str(caught)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, message)
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    assert not silent, f"no error on ranks {silent}; the others: {[a for a in answers if a]}"
    assert message is not None
    return message
