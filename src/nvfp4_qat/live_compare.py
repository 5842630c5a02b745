"""`Comparison`: whether live weights are, to the bit, what an engine makes of given ones; nothing is written.

All tensors come as for a complete update. Layer by layer they are loaded and processed on a twin, by the engine's own
code and none of the quicker ways (`live_quick`), and the result is compared with the live memory. That proves a whole
chain of updates, of changes too, down to the bytes that kernels read; it costs what an update without quick ways does,
and the memory of a layer at a time. The engine may go on answering in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .live_recipe import Group, Recipe, some
from .live_repeat import same_bits
from .live_twin import Twin, derived


class Comparison:
    """Compares weights with a model's.

    Args:
        recipe: of the tensors that will come.
        device: of the model's weights.
        deriving: layers by name that keep what is made from other layers' weights.
    """

    def __init__(self, recipe: Recipe, device: torch.device, deriving: Mapping[str, nn.Module]) -> None:
        self._recipe, self._device, self._deriving = recipe, device, dict(deriving)
        self._missing = set(recipe.incoming)
        self._left = {id(group): set(group.awaited) for group in recipe.groups}
        self._filled: dict[str, nn.Parameter] = {}
        self._different: set[str] = set()

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take some of the tensors.

        Raises:
            MismatchError: a tensor that was not announced, in another form, or again.
        """
        for name, tensor in named:
            entry = self._recipe.incoming.get(name)
            if entry is None or name not in self._missing or (tensor.shape, tensor.dtype) != (entry.shape, entry.dtype):
                raise MismatchError(f"{name} was announced otherwise, or not, or has come before")
            self._missing.discard(name)
            groups = self._recipe.groups_of[name]
            for key in {key for group in groups for key in group.parameters} - self._filled.keys():
                self._filled[key] = self._recipe.unloaded(key, self._device)
            self._recipe.loads[name].repeat(tensor.to(self._device).contiguous(), self._filled)
            for group in groups:
                self._left[id(group)].discard(name)
                if not self._left[id(group)]:
                    self._compare(group)

    def different(self) -> list[str]:
        """The layers whose live weights are others; everything has come.

        Raises:
            MismatchError: something has not.
        """
        if self._missing:
            raise MismatchError(f"{len(self._missing)} tensors have not come: {some(sorted(self._missing))}")
        for name, layer in self._deriving.items():
            self._compare_twin(name, derived(layer, self._recipe.code, self._device, apart=True))
        return sorted(self._different)

    def _compare(self, group: Group) -> None:
        filled = {key: self._filled.pop(key) for key in group.parameters}
        if group.plain:
            for key in group.parameters & self._recipe.written:
                layer, name = self._recipe.layer(key)
                live = layer._parameters[name]
                if live is not None and not same_bits(live, filled[key]):
                    self._different.add(key.rpartition(".")[0])
            return
        for name in group.layers:
            own = {n: filled[key] for n, key in self._recipe.own(name).items()}
            twin = Twin(self._recipe.module(name), own, self._recipe.code, apart=True)
            twin.process()
            self._compare_twin(name, twin)

    def _compare_twin(self, name: str, twin: Twin) -> None:
        try:
            changes = twin.changes()
        except MismatchError:
            self._different.add(name)
            return
        if not all(same_bits(change.live, change.new) for change in changes):
            self._different.add(name)
