"""How tensors get from a trainer to an engine's workers on the same machine.

`Direct` hands them over within a process. `Shared` copies them into buckets of CUDA memory that the workers map; there
are two, so that one is filled while the workers read the other. A bucket is filled again when the workers' answer about
it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

BUCKET = 1 << 28
"""Bytes of a bucket; a larger tensor makes a larger one."""

ALIGNMENT = 256
"""Bytes; tensors in a bucket begin at multiples of it."""

Call = Callable[..., Any]
"""Calls a method of `vllm.LiveWeights` on every worker, and raises if one says that it failed."""


class Direct:
    """To workers of this process.

    Args:
        call: of their engine.
        limit: bytes that are handed over together.
    """

    def __init__(self, call: Call, limit: int = BUCKET) -> None:
        self._call, self._limit = call, limit
        self._waiting: list[tuple[str, Tensor]] = []
        self._bytes = 0

    def send(self, name: str, tensor: Tensor) -> None:
        self._waiting.append((name, tensor))
        self._bytes += tensor.nbytes
        if self._bytes >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Hand over what is waiting."""
        if self._waiting:
            self._call("nvfp4_load", self._waiting)
        self._waiting, self._bytes = [], 0

    def close(self) -> None:
        """Nothing is kept."""


class Shared:
    """To workers of other processes on this machine.

    Args:
        call: of their engine.
        gpus: UUIDs of the workers' GPUs, which this process sees too.
        limit: bytes of a bucket.
    """

    def __init__(self, call: Call, gpus: Sequence[str], limit: int = BUCKET) -> None:
        self._call, self._limit = call, limit
        self._devices = {uuid: _device(uuid) for uuid in gpus}
        self._buckets: list[dict[str, Tensor]] = [{}, {}]
        self._answers: list[Future[Any] | None] = [None, None]
        self._thread = ThreadPoolExecutor(1)  # one at a time, in order
        self._turn = self._used = 0
        self._places: list[tuple[str, int]] = []

    def send(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into a bucket; a full one is passed on."""
        if self._places and self._used + tensor.nbytes > self._limit:
            self._pass_on()
        if not self._places:
            self._make_room(tensor.nbytes)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for buffer in self._buckets[self._turn].values():
            buffer[self._used : self._used + data.numel()].copy_(data, non_blocking=True)
        self._places.append((name, self._used))
        self._used += -(-data.numel() // ALIGNMENT) * ALIGNMENT

    def flush(self) -> None:
        """Pass on what is waiting, and wait until the workers have everything."""
        if self._places:
            self._pass_on()
        for turn in range(2):
            self._answer(turn)

    def close(self) -> None:
        """Free the buckets, when the workers have stopped reading."""
        self._thread.shutdown(wait=True)
        self._buckets = [{}, {}]

    def _make_room(self, nbytes: int) -> None:
        self._answer(self._turn)
        size = max(nbytes, self._limit)
        bucket = self._buckets[self._turn]
        if any(buffer.numel() < size for buffer in bucket.values()) or not bucket:
            self._buckets[self._turn] = {
                uuid: torch.empty(size, dtype=torch.uint8, device=device) for uuid, device in self._devices.items()
            }

    def _pass_on(self) -> None:
        from .vllm import share

        bucket, places = self._buckets[self._turn], self._places
        for device in {buffer.device for buffer in bucket.values()}:
            torch.cuda.synchronize(device)  # the other process does not see our streams
        buffers = [[uuid, share(buffer)] for uuid, buffer in bucket.items()]
        self._answers[self._turn] = self._thread.submit(
            self._call, "nvfp4_load_shared", buffers, [list(place) for place in places]
        )
        self._turn, self._used, self._places = 1 - self._turn, 0, []

    def _answer(self, turn: int) -> None:
        answer, self._answers[turn] = self._answers[turn], None
        if answer is not None:
            answer.result()


def _device(uuid: str) -> torch.device:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    raise UserError(
        f"the engine's GPU {uuid} is not visible to this process: leave it in CUDA_VISIBLE_DEVICES, or run trainer and "
        "engine so that they can share memory"
    )
