"""vLLM's side of live weights: what its workers answer.

Start vLLM with ``worker_extension_cls="nvfp4_qat.vllm.LiveWeights"``; nothing of vLLM is patched. Each worker then
answers the calls below (``collective_rpc``), which `nvfp4_qat.rollout.Rollout` makes. Arguments and answers are plain
lists, numbers and bytes, so they cross process borders without pickled code; tensors themselves are handed over in the
same process, or as CUDA memory that both processes map.

A call never raises, because what a worker raises may end the engine: it answers ``{"error": ...}``, and the caller
raises.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .live_manifest import from_wire
from .live_model import LiveModel
from .live_vllm import VllmCode

PROTOCOL = 1
"""Of the calls: both sides must have the same."""

logger = logging.getLogger(__name__)


def _answers(call: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(call)
    def answer(self: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return {"ok": call(self, *arguments, **options)}
        except Exception as error:
            logger.exception("%s failed", call.__name__)
            return {"error": str(error), "kind": type(error).__name__}

    return answer


class LiveWeights:
    """Calls that take new weights, mixed into vLLM's worker."""

    @_answers
    def nvfp4_hello(self) -> dict[str, Any]:
        """Who this worker is, and what of its model is 4-bit."""
        from importlib.metadata import version

        state = _state(self)
        worker: Any = self
        return {
            "protocol": PROTOCOL,
            "package": version("nvfp4-qat"),
            "vllm": version("vllm"),
            "rank": int(worker.rank),
            "process": f"{socket.gethostname()}:{os.getpid()}",
            "gpu": _uuid(state.live.device),
            "quantized": state.code.quantized(state.live.model),
            **state.status(),
        }

    @_answers
    def nvfp4_begin(self, version: int, incoming: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Start an update; see `LiveModel.begin`."""
        state = _state(self)
        state.live.begin(from_wire(incoming))
        state.coming = version
        return state.status()

    @_answers
    def nvfp4_load(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
        """Take tensors of this process."""
        state = _state(self)
        state.live.load(named)
        return state.status()

    @_answers
    def nvfp4_load_shared(self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Take tensors out of memory of another process; when this answers the memory may be used again.

        Args:
            buffers: for each GPU its UUID and what `share` said of the buffer there.
            places: names of announced tensors, and at which byte of the buffer each begins.
        """
        state = _state(self)
        buffer = state.shared(buffers)
        state.live.load((name, state.live.view(name, buffer, at)) for name, at in places)
        torch.cuda.synchronize(state.live.device)
        return state.status()

    @_answers
    def nvfp4_commit(self, version: int) -> dict[str, Any]:
        """End an update; see `LiveModel.commit`."""
        state = _state(self)
        if state.coming != version:
            raise UserError(f"version {version} is to be committed, but the update that began is {state.coming}")
        state.live.commit()
        if state.live.device.type == "cuda":
            torch.cuda.synchronize(state.live.device)
        state.version = version
        return state.status()

    @_answers
    def nvfp4_status(self) -> dict[str, Any]:
        """Which version this worker has."""
        return _state(self).status()


class _State:
    """What a worker remembers between calls."""

    def __init__(self, worker: Any) -> None:
        device = torch.empty(0, device=worker.device).device  # with its index
        self.code = VllmCode(worker.vllm_config, device)
        self.live = LiveModel(worker.model_runner.get_model(), self.code, device)
        self.version: int | None = None
        """Of the weights; None: those the engine was started with."""
        self.coming: int | None = None
        self._shared: dict[str, Tensor] = {}

    def status(self) -> dict[str, Any]:
        return {"version": self.version, "whole": self.live.whole, "updating": self.live.updating}

    def shared(self, buffers: Sequence[Sequence[Any]]) -> Tensor:
        """The buffer on this worker's GPU, mapped once."""
        mine = _uuid(self.live.device)
        for uuid, shared in buffers:
            if uuid == mine:
                key = json.dumps(shared)
                if key not in self._shared:
                    self._shared[key] = open_shared(shared, self.live.device)
                return self._shared[key]
        raise UserError(f"no buffer was shared on this worker's GPU {mine}, but on {', '.join(b[0] for b in buffers)}")


def _state(worker: Any) -> _State:
    state = worker.__dict__.get("_nvfp4_state")
    if state is None:
        state = worker.__dict__["_nvfp4_state"] = _State(worker)
    found: _State = state
    return found


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def share(buffer: Tensor) -> list[Any]:
    """How another process finds a CUDA buffer, as strings and numbers.

    Args:
        buffer: uint8, one dimension; it must stay alive, with this memory, as long as others read it.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    _, (_, size, _, offset, _, _, _, handle, nbytes, start, _, counter, counter_at, event, sync) = reduce_tensor(buffer)
    return [handle.hex(), size[0], offset, nbytes, start, counter.hex(), counter_at, event.hex(), sync]


def open_shared(shared: Sequence[Any], device: torch.device) -> Tensor:
    """The buffer that `share` tells of, mapped into this process."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    handle, size, offset, nbytes, start, counter, counter_at, event, sync = shared
    tensor: Tensor = rebuild_cuda_tensor(
        Tensor, (size,), (1,), offset, torch.UntypedStorage, torch.uint8, device.index, bytes.fromhex(handle),
        nbytes, start, False, bytes.fromhex(counter), counter_at, bytes.fromhex(event), sync,
    )  # fmt: skip
    return tensor
