"""Buckets through a network: a process group of trainer and workers that depends on nothing else.

`Group` is a process group (NCCL between GPUs, Gloo between CPUs) beside `torch.distributed`'s default one, which
neither side need have. The trainer is rank 0 and keeps the `TCPStore` by which the others find it; the workers of one
engine are ranks 1 to n, so that an engine that fails takes no other one with it. Nobody waits for ever: what does not
end within the timeout raises an error, the group is given up, and the next update makes a new one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .errors import MismatchError, UserError
from .live_buckets import BUCKET, Buckets, Call, Places
from .live_threads import background

dist: Any = torch.distributed  # its annotations leave out what is used here

PATIENCE = timedelta(days=1)
"""What torch is told to wait: its watchdog would end the process, an engine's worker, where `Group` raises."""


class Group:
    """A trainer and the workers of one engine, between which rank 0 broadcasts.

    Args:
        store: by which the ranks find each other; see `meeting_place` and `meet`.
        rank: of this process; 0 is the trainer.
        size: number of processes.
        device: of the tensors.
        timeout: seconds that a step may take.

    Raises:
        TimeoutError: not everybody came.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.device, self.timeout = device, timeout
        self.usable = True
        """Until something failed."""
        self._store, self._rank = store, rank
        try:
            self._group = _process_group(store, rank, size, device, timeout)
        except RuntimeError as error:
            raise TimeoutError(f"no group of trainer and workers came about within {timeout:g} s ({error})") from None

    def broadcast(self, tensor: Tensor, announced: Future[Any] | None = None) -> None:
        """Send (rank 0) or receive (the others) a tensor; it is there when this returns.

        Args:
            tensor: of the same size everywhere; backends do not check that.
            announced: the others' answer; an error that it holds is raised instead of waiting for them.

        Raises:
            TimeoutError: it took too long.
            ConnectionError: another process has ended or left the group.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        deadline = time.monotonic() + self.timeout
        try:
            work = self._group.broadcast([tensor], options)
            while not work.is_completed():
                if announced is not None and announced.done():
                    announced.result()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self._others()} took no part in a broadcast within {self.timeout:g} s")
                time.sleep(2e-4)
            work.wait()
            if tensor.device.type == "cuda":
                torch.cuda.synchronize(tensor.device)
        except (OSError, MismatchError, UserError):
            self.usable = False
            raise
        except RuntimeError as error:  # of the backend, in its own words
            self.usable = False
            raise ConnectionError(f"the connection with {self._others()} is gone ({error})") from None

    def close(self) -> None:
        """Leave the group, without waiting for anybody."""
        self.usable = False
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    def _others(self) -> str:
        return "the workers" if self._rank == 0 else "the trainer"


def meeting_place(timeout: float) -> Any:
    """A store on a free port of this process."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def meet(address: str, port: int, timeout: float) -> Any:
    """The store of another process.

    Raises:
        UserError: it cannot be reached.
    """
    try:
        socket.create_connection((address, port), timeout).close()  # says at once what the store would retry
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"a worker on {socket.gethostname()} cannot reach the trainer at {address}:{port} ({error}): name an "
            'address that it can reach with Rollout.connect(…, address="…")'
        ) from None


def _process_group(store: Any, rank: int, size: int, device: torch.device, timeout: float) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = PATIENCE
    with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"), torch.cuda.device(device):
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Broadcast(Buckets):
    """To workers anywhere, through a `Group`.

    Args:
        call: of their engine.
        update: which update it is.
        group: this process is its rank 0.
        name: of the group.
        limit: bytes of a bucket, here and on every worker.
    """

    def __init__(self, call: Call, update: str, group: Group, name: str, limit: int = BUCKET) -> None:
        super().__init__(call, update, [group.device], limit, group.timeout)
        self._group, self._name = group, name

    def close(self) -> None:
        if not self._group.usable:
            self._group.close()  # workers that are still waiting are told by that
        super().close()

    def _pass_on(self, turn: int, places: Places) -> Future[Any]:
        return self._line.put(self._broadcast, self._buckets[turn][self._group.device], places)

    def _broadcast(self, bucket: Tensor, places: Places) -> None:
        """Announce a bucket, send it, and wait until it was taken."""
        answer = background(self._call, "nvfp4_load_broadcast", self._update, self._name, bucket.numel(), places)
        with _first_said_by(answer):
            self._group.broadcast(bucket, answer)
        answer.result(self._timeout)


def joined(call: Call, name: str, ranks: dict[str, int], address: str, device: torch.device, timeout: float) -> Group:
    """Make a group with the workers of an engine; this process is its rank 0.

    Args:
        call: of the engine.
        name: of the group, by which workers say in which they are.
        ranks: of its workers, from 1, by instance.
        address: of this machine, as the workers reach it.
        device: of the buckets.
        timeout: seconds that a step may take.

    Raises:
        UserError: a worker cannot reach the address.
        TimeoutError: not all of them came.
    """
    store = meeting_place(timeout)
    answer = background(call, "nvfp4_join", name, address, store.port, ranks, timeout)
    with _first_said_by(answer):
        group = Group(store, 0, len(ranks) + 1, device, timeout)
    answer.result(timeout)
    return group


@contextlib.contextmanager
def _first_said_by(answer: Future[Any]) -> Iterator[None]:
    """An error of the workers says more than that they are not there: if there is one it is raised instead."""
    try:
        yield
    except OSError:
        with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
            answer.result(1.0)
        raise
