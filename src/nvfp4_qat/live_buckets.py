"""Buckets: how the tensors of an update get from the trainer to the workers of an engine.

`Direct` hands tensors over within a process. The others copy them into one of two buckets of bounded size, of which one
is filled while the workers read the other; a bucket is filled again only when the workers have answered about it. With
`SharedMemory` the workers map the buckets; `live_broadcast.Broadcast` sends them through a network.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UserError
from .live_manifest import DTYPES, dtype_name
from .live_memory import allocate, device_of, share
from .live_threads import Line

BUCKET = 1 << 28
"""Bytes of a bucket; a larger tensor makes a larger one."""

ALIGNMENT = 256
"""Bytes; tensors in a bucket begin at multiples of it."""

Call = Callable[..., Any]
"""Calls a method of `vllm.LiveWeights` on every worker of an engine; raises if one says that it failed."""

Places = list[list[Any]]
"""Tensors of a bucket: name, first byte, shape and dtype of each, as JSON has them."""


class Sender(Protocol):
    """Takes the tensors of one update."""

    def send(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; its memory stays as it is until the next `flush`."""

    def flush(self) -> None:
        """Return when the workers have everything."""

    def close(self) -> None:
        """Free what is held; also after an error."""


class Direct:
    """To workers of this process.

    Args:
        call: of their engine.
        update: which update it is.
        limit: bytes that are handed over together.
    """

    def __init__(self, call: Call, update: str, limit: int = BUCKET) -> None:
        self._call, self._update, self._limit = call, update, limit
        self._waiting: list[tuple[str, Tensor]] = []
        self._bytes = 0

    def send(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._bytes + tensor.nbytes > self._limit:
            self.flush()
        self._waiting.append((name, tensor))
        self._bytes += tensor.nbytes

    def flush(self) -> None:
        if self._waiting:
            self._call("nvfp4_load", self._update, self._waiting)
        self._waiting, self._bytes = [], 0

    def close(self) -> None:
        self._waiting, self._bytes = [], 0


class Buckets:
    """Two buckets in turn; how one is passed on is up to a subclass.

    Never more than two buckets are held on a device, each of ``limit`` bytes or of the largest tensor.

    Args:
        call: of the engine.
        update: which update it is.
        devices: where a bucket is needed.
        limit: bytes of a bucket.
        timeout: seconds that the workers may take for one bucket.
    """

    def __init__(
        self, call: Call, update: str, devices: Sequence[torch.device], limit: int = BUCKET, timeout: float = 300.0
    ) -> None:
        self._call, self._update, self._devices, self._limit, self._timeout = call, update, devices, limit, timeout
        self._buckets: list[dict[torch.device, Tensor]] = [{}, {}]
        self._answers: list[Future[Any] | None] = [None, None]
        self._line = Line()
        self._turn = self._used = 0
        self._places: Places = []

    def send(self, name: str, tensor: Tensor) -> None:
        if self._places and self._used + tensor.nbytes > self._limit:
            self._finish()
        if not self._places:
            self._make_room(tensor.nbytes)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for bucket in self._buckets[self._turn].values():
            bucket[self._used : self._used + data.numel()].copy_(data, non_blocking=True)
        self._places.append([name, self._used, list(tensor.shape), dtype_name(tensor.dtype)])
        self._used += -(-data.numel() // ALIGNMENT) * ALIGNMENT

    def flush(self) -> None:
        if self._places:
            self._finish()
        for turn in (self._turn, 1 - self._turn):  # the older one first
            self._wait(turn)

    def close(self) -> None:
        self._line.close()
        pending = [answer for answer in self._answers if answer is not None]
        concurrent.futures.wait(pending, self._timeout)  # workers may still be reading
        self._buckets, self._answers = [{}, {}], [None, None]

    def _pass_on(self, turn: int, places: Places) -> Future[Any]:
        """Let the workers have a bucket; the answer is there when they have taken everything out of it."""
        raise NotImplementedError

    def _renewed(self, turn: int) -> None:
        """A bucket has other memory than before."""

    def _finish(self) -> None:
        for device in self._buckets[self._turn]:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # other processes do not see our streams
        self._answers[self._turn] = self._pass_on(self._turn, self._places)
        self._turn, self._used, self._places = 1 - self._turn, 0, []

    def _make_room(self, nbytes: int) -> None:
        self._wait(self._turn)
        size = max(nbytes, self._limit)
        bucket = self._buckets[self._turn]
        if not bucket or any(buffer.numel() < size for buffer in bucket.values()):
            bucket.clear()  # before there is another
            bucket.update({device: allocate(size, device) for device in self._devices})
            self._renewed(self._turn)

    def _wait(self, turn: int) -> None:
        answer, self._answers[turn] = self._answers[turn], None
        if answer is None:
            return
        try:
            answer.result(self._timeout)
        except concurrent.futures.TimeoutError:
            if answer.done():  # the call's own
                raise
            raise TimeoutError(f"the workers did not take a bucket within {self._timeout:g} s") from None


class SharedMemory(Buckets):
    """To workers of other processes on this machine, in memory that they map.

    Args:
        call: of their engine.
        update: which update it is.
        devices: names of the workers' devices (`live_memory.device_name`); this process sees them too.
        limit: bytes of a bucket.
        timeout: seconds that the workers may take for one bucket.
    """

    def __init__(
        self, call: Call, update: str, devices: Sequence[str], limit: int = BUCKET, timeout: float = 300.0
    ) -> None:
        self._named = {device_of(name): name for name in devices}
        super().__init__(call, update, list(self._named), limit, timeout)
        self._wire: list[list[list[Any]]] = [[], []]

    def _renewed(self, turn: int) -> None:
        self._wire[turn] = [[self._named[device], share(buffer)] for device, buffer in self._buckets[turn].items()]

    def _pass_on(self, turn: int, places: Places) -> Future[Any]:
        return self._line.put(self._call, "nvfp4_load_shared", self._update, self._wire[turn], places)


def tensors_in(bucket: Tensor, places: Places) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, on the workers' side, as views of it.

    Raises:
        UserError: a place that is not in the bucket.
    """
    for name, at, shape, dtype in places:
        kind = DTYPES[dtype]
        nbytes = math.prod(shape) * kind.itemsize
        if at % ALIGNMENT or at < 0 or at + nbytes > bucket.numel():
            raise UserError(f"{name}, {nbytes} bytes, cannot lie at byte {at} of a bucket of {bucket.numel()}")
        yield name, bucket[at : at + nbytes].view(kind).view(shape)
