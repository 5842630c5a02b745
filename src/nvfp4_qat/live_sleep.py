"""What a model needs besides new weights when an engine has discarded the memory of the old ones.

An engine that sleeps without keeping its weights, as vLLM does at level 2, has the memory again when it wakes up, at
the same addresses and with any contents. An update then brings every weight, but not all of a layer's tensors are made
from weights: locks that must be zero, scales that a checkpoint may leave out, tables among the plain attributes. They
are kept on the host. Registered buffers are the engine's to keep; vLLM does.

What belongs to adapters (LoRA) is such, too: their weights, and what says which request has which, lie among the plain
attributes of the wrappers around layers. So adapters that were loaded are there again after the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .live_recipe import EngineCode
from .live_twin import tensors


class Kept:
    """Copies on the host of the tensors that neither an engine nor a complete update brings back.

    Args:
        model: awake.
        code: its engine's.
        device: of its weights.
        wrappers: modules that are not in the model, such as those that hold adapters.
    """

    def __init__(
        self, model: nn.Module, code: EngineCode, device: torch.device, wrappers: Iterable[nn.Module] = ()
    ) -> None:
        brought = {_memory(p) for layer in model.modules() for p in _weights(layer, code)}
        found = {
            (_memory(t), t.data_ptr(), t.shape, t.stride(), t.dtype): t
            for layer in (*model.modules(), *wrappers)
            for t in _others(layer, code)
            if t.device == device and _memory(t) not in brought
        }
        with torch.no_grad():
            self._kept = [(t, t.detach().to("cpu", copy=True)) for t in found.values()]

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(copy.nbytes for _, copy in self._kept)

    def restore(self) -> None:
        """Put them back where they were."""
        with torch.no_grad():
            for live, copy in self._kept:
                live.data.copy_(copy)


def _weights(layer: nn.Module, code: EngineCode) -> Iterator[Tensor]:
    """The parameters that every complete update writes: `live_recipe.Recipe` accepts no other."""
    if code.checkpoint_form(layer) or code.derives(layer):
        for name, p in layer._parameters.items():
            if p is not None and not code.optional(layer, name) and not code.kept(layer, name):
                yield p


def _others(layer: nn.Module, code: EngineCode) -> Iterator[Tensor]:
    for path, tensor in tensors(layer, code.ours, scratch=True).items():
        if not code.outlives(layer, path[0]):
            yield tensor


def _memory(tensor: Tensor) -> int:
    cdata: int = tensor.untyped_storage()._cdata
    return cdata
