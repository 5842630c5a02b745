"""`State`: what a worker remembers between the calls that `vllm.LiveWeights` answers.

One update goes on at a time, or a comparison, which takes tensors in the same ways and writes nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import live_asleep
from .errors import UserError
from .live_broadcast import Group
from .live_changes import PIECE_NAME, Layout, from_pieces, places
from .live_compare import Comparison
from .live_dummy import check_scales
from .live_in_flight import Notes
from .live_manifest import from_wire
from .live_memory import Shared, device_name, open_shared
from .live_model import LiveModel
from .live_recipe import EngineCode, Incoming
from .live_settings import check_settings
from .live_vllm_adapters import without_adapters, wrappers


class WorkerCode(EngineCode, Protocol):
    """What a worker knows about its engine's layers."""

    def quantized(self, model: nn.Module) -> list[str]:
        """The layers that hold 4-bit weights, by the engine's names."""


class State:
    """What a worker remembers between calls."""

    def __init__(self, worker: Any) -> None:
        check_settings(worker)
        self.asleep = live_asleep.of(worker)
        self.asleep.check()
        device = torch.empty(0, device=worker.device).device  # with its index
        whole = worker._nvfp4_model()
        model = without_adapters(whole)
        check_scales(worker, model)
        self.code: WorkerCode = worker._nvfp4_code(model, device)
        self.live = LiveModel(model, self.code, device, wrappers(whole))
        self.instance = uuid.uuid4().hex
        """Another one when the engine was started anew."""
        self.version: int | None = None
        """Of the last complete update; None: there was none since the engine started."""
        self.completed: str | None = None
        """The name of that update. No other has it, while trainers may give the same version to different weights."""
        self.stale = False
        """Whether the engine may hold results of the weights before those of the last complete update."""
        self.notes = Notes()
        self.extra_bytes = 0
        """Of GPU memory that the last complete update needed at its peak, beyond what was allocated before."""
        self._before = 0
        self.update: str | None = None
        self.coming: int | None = None
        self.changing: Layout | None = None
        """Of the tensors whose changes come."""
        self.comparison: Comparison | None = None
        """Instead of an update."""
        self._announced: tuple[list[Any], list[Incoming]] = [], []
        self._pieces: dict[str, Tensor] = {}
        self.group: Group | None = None
        self.group_name: str | None = None
        self._opened: dict[str, Tensor] = {}
        self._received: Tensor | None = None

    def status(self) -> dict[str, Any]:
        """The version of the last complete update, whether all weights are of it, what is held, and the group."""
        return {
            "instance": self.instance,
            "version": self.version,
            "completed": self.completed,
            "whole": self.live.whole,
            "updating": self.update is not None,
            "stale": self.stale,
            "asleep": sorted(self.asleep.parts),
            "group": self.group_name,
            "extra_bytes": self.extra_bytes,
            "graph_bytes": self.live.quick.graphs.nbytes,
            "remembers": (patcher := self.live.patcher) is not None,
            "remembered_bytes": 0 if patcher is None else patcher.nbytes,
        }

    def watch(self) -> None:
        """Count from here what memory is needed."""
        if self.live.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.live.device)
            self._before = torch.cuda.memory_allocated(self.live.device)

    def watched(self) -> int:
        cuda = self.live.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.live.device) - self._before if cuda else 0

    def finished(self) -> None:
        """Wait for the device."""
        if self.live.device.type == "cuda":
            torch.cuda.synchronize(self.live.device)

    def expect(self, update: str) -> None:
        """Refuse what belongs to another update."""
        if self.update is None:
            raise UserError("no update goes on: it was not begun, was given up after an error, or the engine is new")
        if self.update != update:
            raise UserError("this update was given up when another one began; two trainers may send to one engine")

    def announced(self, wire: Sequence[Sequence[Any]]) -> list[Incoming]:
        """The manifest that was sent; the same objects as last time, if it is the same."""
        if list(wire) != self._announced[0]:
            self._announced = list(wire), from_wire(wire)
        return self._announced[1]

    def load(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """Take tensors; when this returns, their memory may be used again by anybody."""
        if self.comparison is None:
            self.live.load(self._without_changes(named))
        else:
            self.comparison.load(named)
        self.finished()
        return self.status()

    def _without_changes(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            if name.startswith(PIECE_NAME):
                if name in self._pieces:
                    raise UserError(f"{name} has come before in this update")
                self._pieces[name] = tensor.clone()
            else:
                yield name, tensor

    def change(self) -> set[str]:
        """Make the changes that have come."""
        if self.changing is None:
            raise UserError("no changes were announced")
        layout, pieces, self._pieces = self.changing, from_pieces(self._pieces, self.live.device), {}
        return self.live.change(layout, places(pieces))

    def opened(self, buffers: Sequence[tuple[str, Shared]]) -> Tensor:
        """The buffer on this worker's device, mapped once."""
        mine = device_name(self.live.device)
        for device, shared in buffers:
            if device == mine:
                key = json.dumps(shared, sort_keys=True)
                if key not in self._opened:
                    self._opened[key] = open_shared(shared, self.live.device)
                return self._opened[key]
        raise UserError(f"no buffer is on this worker's device {mine}, only on {', '.join(b[0] for b in buffers)}")

    def received(self, group: Group, nbytes: int) -> Tensor:
        """The next buffer that the trainer broadcasts."""
        if self._received is None or self._received.numel() < nbytes:
            self._received = None  # before there is another
            self._received = torch.empty(nbytes, dtype=torch.uint8, device=self.live.device)
        buffer = self._received[:nbytes]
        group.broadcast(buffer)
        return buffer

    def forget(self) -> None:
        """Let go what belongs to one update."""
        self.update = self.coming = self._received = self.changing = self.comparison = None
        self._opened.clear()
        self._pieces.clear()

    def give_up(self) -> None:
        """End an update that goes on; what it has written stays."""
        if self.update is not None:
            self.forget()
            self.live.abandon()

    def leave(self) -> None:
        if self.group is not None:
            self.group.close()
        self.group = self.group_name = None
