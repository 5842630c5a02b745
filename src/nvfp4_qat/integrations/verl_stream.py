"""The packed stream as verl carries it: named tensors, of which the first says what will come; and how it is taken.

verl moves weights as pairs of a name and a tensor, in buckets of CUDA memory or by a checkpoint engine, and asks
nothing of them. So a stream begins with an *announcement*, the manifest of the rest as JSON in a tensor of bytes:
engines need to know before anything is changed whether it will be complete.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from ..live_manifest import from_wire, to_wire
from ..live_recipe import Incoming
from ..live_worker import WorkerCode

NAME = "nvfp4_qat.announcement"
"""Of the first tensor."""

PROTOCOL = 1
"""Both sides must have the same."""

ALIGNMENT = 16
"""Bytes. Some carriers put one tensor right behind the other, and view them as their dtypes there."""


def announced(
    entries: Sequence[Incoming], stream: Iterable[tuple[str, Tensor]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """A stream with its announcement.

    Args:
        entries: what the stream will bring, all of it.
        stream: brings it, in any order.
        device: where the tensors of the stream are.

    Raises:
        MismatchError: it brings something else; the engine then lacks something, and refuses to go on.
    """
    yield NAME, announcement(entries).to(device)
    forms = {entry.name: (entry.shape, entry.dtype) for entry in entries}
    for name, tensor in stream:
        if forms.pop(name, None) != (tuple(tensor.shape), tensor.dtype):
            raise MismatchError(
                f"{name}, {tensor.dtype} {list(tensor.shape)}, was announced otherwise or has come before"
            )
        yield name, tensor
    if forms:
        raise MismatchError(f"{len(forms)} tensors of the announcement did not come: {', '.join(sorted(forms)[:20])}")


def announcement(entries: Sequence[Incoming]) -> Tensor:
    """Uint8 ``[n]`` on the CPU: the manifest as JSON."""
    text = json.dumps({"protocol": PROTOCOL, "tensors": to_wire(entries)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read(tensor: Tensor) -> list[list[Any]]:
    """The manifest of an announcement, as `live_manifest.to_wire` gives it.

    Raises:
        MismatchError: the sender has another version of this package.
    """
    found = json.loads(bytes(tensor.cpu().tolist()))
    if found.get("protocol") != PROTOCOL:
        raise MismatchError(
            f"the trainer's nvfp4-qat speaks version {found.get('protocol')} of the stream, the engine's {PROTOCOL}: "
            "install the same version for both"
        )
    wire: list[list[Any]] = found["tensors"]
    from_wire(wire)
    return wire


class Update:
    """One update of a worker, bucket by bucket.

    Args:
        worker: a `LiveWeights`.
    """

    def __init__(self, worker: Any) -> None:
        self._worker, self._name = worker, ""
        self._error: Exception | None = None

    def take(self, weights: list[tuple[str, Tensor]], is_last: bool) -> None:
        """Take a bucket, whose memory may be used again afterwards; an error is kept for `end`."""
        if self._error is not None:
            return
        try:
            self._taken(weights)
        except Exception as error:
            self._error = error.with_traceback(None)  # whose frames hold views of the bucket

    def end(self) -> None:
        """The stream is over.

        Raises:
            MismatchError: why the engine does not have the new weights. It must not answer then; the next complete
                update heals it.
        """
        if self._error is None:
            try:
                if not self._name:
                    raise MismatchError("the trainer sent nothing")
                self._answer("nvfp4_commit", self._name)
                return
            except Exception as error:
                self._error = error
        if self._name:
            self._worker.nvfp4_abandon(self._name)
        raise self._error

    def _taken(self, weights: list[tuple[str, Tensor]]) -> None:
        rest = [(name, tensor) for name, tensor in weights if name != NAME]
        for name, tensor in weights:
            if name == NAME:
                self._begin(tensor)
        if not self._name and rest:
            raise MismatchError(
                "this engine holds 4-bit weights, and the trainer sent others: the verl plugin of nvfp4-qat is not "
                "active in its FSDP workers. Install nvfp4-qat into their environment, on every node"
            )
        if rest:
            self._answer("nvfp4_load", self._name, rest)

    def _begin(self, tensor: Tensor) -> None:
        version = self._answer("nvfp4_status")["version"] or 0
        name = uuid.uuid4().hex
        self._answer("nvfp4_begin", name, version + 1, read(tensor))
        self._name = name

    def _answer(self, call: str, *arguments: Any) -> dict[str, Any]:
        answer = getattr(self._worker, call)(*arguments)
        if "error" in answer:
            raise MismatchError(f"{answer['error']} ({answer.get('kind')})")
        found: dict[str, Any] = answer["ok"]
        return found


def held(code: WorkerCode, model: nn.Module, rank: int = 0, workers: int = 1) -> str:
    """What of an engine's own layers is 4-bit, in a line, to be compared with what the trainer says of its plan.

    Args:
        code: of the engine.
        model: its model, or this worker's part of it.
        rank, workers: this worker's, and how many share the model; what each has for itself, such as norms, counts
            for each.
    """
    layers = codes = 0
    others: dict[int, int] = {}
    for _, layer in model.named_modules():
        form = code.checkpoint_form(layer)
        packed = [p for name, p in form.items() if name.endswith("weight_packed")]
        layers += bool(packed)
        codes += sum(2 * p.numel() for p in packed)
        if not packed:
            unused = _padding(layer)
            for p in layer.parameters(recurse=False):
                others[id(p)] = p.numel() - unused * math.prod(p.shape[1:])  # once where it is tied
    share = 100 * codes / max(codes + sum(others.values()), 1)
    who, whose = ("", "all") if workers == 1 else (f"worker {rank + 1} of {workers} of ", "its")
    return f"{who}the engine holds {layers} layers in 4 bits, {codes:,} parameters, {share:.1f} % of {whose} parameters"


def _padding(layer: nn.Module) -> int:
    """Rows of a vLLM vocabulary layer, in this rank's part, that belong to no token."""
    indices = getattr(layer, "shard_indices", None)
    if indices is None:
        return 0
    rows: int = indices.num_elements_padded - indices.num_org_elements - indices.num_added_elements
    return rows
