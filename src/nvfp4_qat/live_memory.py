"""Memory that processes of one machine share: how a buffer is described on the wire, and opened again.

A buffer on a GPU is shared by CUDA IPC, one on a CPU by a file in shared memory; who uses them need not know which. A
description consists of strings and numbers only, so it crosses any process border as JSON, without pickled code.

Beside it, who is where: names for machines, processes and devices that do not depend on how each process numbers its
GPUs.
"""

from __future__ import annotations

import functools
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

Shared = Mapping[str, Any]
"""A buffer, described for another process."""


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """A buffer that `share` can describe: uint8, one dimension, without values."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def share(buffer: Tensor) -> dict[str, Any]:
    """Describe a buffer of `allocate` for another process of this machine.

    Args:
        buffer: it must stay alive, with this memory, until the others have opened it and read from it.

    Returns:
        Strings and numbers; two descriptions of one buffer differ, so describe each once.
    """
    if buffer.device.type == "cpu":
        manager, name, nbytes = buffer.untyped_storage()._share_filename_cpu_()
        return {"kind": "file", "manager": manager.decode(), "name": name.decode(), "bytes": nbytes}
    from torch.multiprocessing.reductions import reduce_tensor

    _, (_, size, _, offset, _, _, _, handle, nbytes, start, _, counter, counter_at, event, sync) = reduce_tensor(buffer)
    return {
        "kind": "cuda", "handle": handle.hex(), "size": size[0], "offset": offset, "bytes": nbytes, "start": start,
        "counter": counter.hex(), "counter_at": counter_at, "event": event.hex(), "sync": sync,
    }  # fmt: skip


def open_shared(shared: Shared, device: torch.device) -> Tensor:
    """Map a buffer of another process into this one.

    Args:
        shared: what `share` said there.
        device: the same GPU by this process's number, or the CPU.

    Raises:
        UserError: the description is of another kind of device.
        RuntimeError: the process that made the buffer has ended.
    """
    wanted = "file" if device.type == "cpu" else "cuda"
    if shared["kind"] != wanted:
        raise UserError(f"a buffer in memory of the kind {shared['kind']!r} cannot be opened on {device}")
    if wanted == "file":
        names = shared["manager"].encode(), shared["name"].encode()
        storage = torch.UntypedStorage._new_shared_filename_cpu(*names, shared["bytes"])
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    handle, counter, event = (bytes.fromhex(shared[key]) for key in ("handle", "counter", "event"))
    tensor: Tensor = rebuild_cuda_tensor(
        Tensor, (shared["size"],), (1,), shared["offset"], torch.UntypedStorage, torch.uint8, device.index, handle,
        shared["bytes"], shared["start"], False, counter, shared["counter_at"], event, shared["sync"],
    )  # fmt: skip
    return tensor


def machine() -> str:
    """A name for this machine; that of a container is not that of its host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def process() -> str:
    """A name for this process that no other one has, also not a later one with its number."""
    return f"{os.getpid()}:{_token(os.getpid())}"


@functools.cache
def _token(_: int) -> str:
    return uuid.uuid4().hex


def device_name(device: torch.device) -> str:
    """The UUID of a GPU, or "cpu"."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def device_of(name: str) -> torch.device:
    """The device of a name, as this process numbers it.

    Raises:
        UserError: this process does not see that GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == name:
            return torch.device("cuda", index)
    raise UserError(
        f"the engine's GPU {name} is not visible to this process: leave it in CUDA_VISIBLE_DEVICES, or send the "
        'weights with Rollout.connect(…, transport="broadcast")'
    )
