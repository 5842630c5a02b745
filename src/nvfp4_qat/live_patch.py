"""Single bytes of a live model's weights changed, without loading and processing the rest.

What an engine makes of packed codes is a permutation, which `live_maps` finds: changed codes are changed where they
lie. What it makes of everything else (scales, biases, global scales) is small and not always a permutation: these
parameters are kept as they were loaded, changed there, and processed again (`live_quick.Quick.parts`). If the engine's
code would look at another number now, such as a scale factor shared by a layer, that layer has to be sent whole, as has
every layer for which one of this is not known. The device is asked for these numbers once, when all layers are done.
Weights that kernels read as they are loaded are changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .live_maps import CodeMap, NoMapError, found, proved
from .live_quick import Part, Quick
from .live_recipe import Group, Recipe
from .live_regions import moved

Spots = tuple[Tensor, Tensor]
"""Bytes of a parameter, int64 ``[n]``, and their flips, uint8 ``[n]``."""


@dataclass
class _Work:
    """What is to be done to a group of layers: by key of the parameter."""

    group: Group
    spots: dict[str, list[Spots]] = field(default_factory=dict)


class Patcher:
    """Changes bytes of a live model.

    Args:
        model: the engine's.
        recipe: of the tensors that changes are of.
        quick: how layers are processed.
        device: of the weights.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, quick: Quick, device: torch.device) -> None:
        self._model, self._recipe, self._quick, self._device = model, recipe, quick, device
        self._kept: dict[str, dict[str, Tensor]] = {}
        """By layer: its parameters as loaded, but for packed ones."""
        self._maps: dict[tuple[str, str], CodeMap | None] = {}
        """By layer and parameter; None: there is none."""

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that are held for later changes."""
        maps = {id(m): m.nbytes for m in self._maps.values() if m is not None}
        return sum(maps.values()) + sum(t.nbytes for kept in self._kept.values() for t in kept.values())

    @property
    def kept(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By layer, the parameters that are held for later changes."""
        return self._kept

    def keep(self, layer: str, parameters: Mapping[str, Tensor]) -> None:
        """Remember what a layer was loaded with, if it can be processed in parts; packed codes are not kept."""
        if self._quick.parts(layer):
            needed = self._quick.parts(layer)[""].tape.shapes
            self._kept[layer] = {n: p.detach() for n, p in parameters.items() if n in needed}

    def change(self, changes: Iterable[tuple[str, Tensor, Tensor]]) -> set[str]:
        """Change a model's weights.

        Args:
            changes: names of tensors, bytes of them (int64 ``[n]``, each once), and old byte xor new byte (uint8
                ``[n]``); a tensor may come several times, with other bytes.

        Returns:
            Names of all tensors of layers that must be sent whole; what these hold until then is worth nothing.
        """
        works: dict[int, _Work] = {}
        whole: set[str] = set()
        for name, at, flips in changes:
            groups = self._recipe.groups_of[name]
            load = self._recipe.loads[name]
            try:
                if load.calls:
                    raise ValueError("a loader wants to see all of it")
                entry = self._recipe.incoming[name]
                nbytes = math.prod(entry.shape) * entry.dtype.itemsize
                spots = [(copy.key, *moved(copy, at, nbytes)) for copy in load.copies]
            except ValueError:
                whole.update(*(group.awaited for group in groups))
                continue
            for key, taken, to in spots:
                if len(to):
                    group = next(g for g in groups if key in g.parameters)
                    work = works.setdefault(id(group), _Work(group))
                    work.spots.setdefault(key, []).append((to, flips[taken]))
        asked: list[tuple[_Work, Tensor]] = []
        for work in works.values():
            if not work.group.awaited & whole and not self._done(work, asked):
                whole |= work.group.awaited
        if asked:
            for (work, _), same in zip(asked, torch.stack([same for _, same in asked]).tolist(), strict=True):
                if not same:
                    self._kept.pop(work.group.layers[0], None)
                    whole |= work.group.awaited
        return whole

    def _done(self, work: _Work, asked: list[tuple[_Work, Tensor]]) -> bool:
        """Change a group of layers.

        Args:
            work: what to do.
            asked: is told what the device knows: whether the numbers that the engine's code looks at are the same.
                If not, what was written is wrong, and is written over when the layer is sent whole.

        Returns:
            False: it must be sent whole.
        """
        spots = {key: _joined(several) for key, several in work.spots.items()}
        if work.group.plain:
            for key, (at, flips) in spots.items():
                layer, name = self._recipe.layer(key)
                live = layer._parameters[name]
                assert live is not None
                data = _memory(live)
                data[at] ^= flips
            return True
        if len(work.group.layers) != 1:
            return False
        (layer_name,) = work.group.layers
        names = {key: n for n, key in self._recipe.own(layer_name).items()}
        parts, kept = self._quick.parts(layer_name), self._kept.get(layer_name)
        if not parts or kept is None:
            return False
        packed = {names[key]: spot for key, spot in spots.items() if names[key] in parts}
        others = {names[key]: spot for key, spot in spots.items() if names[key] not in parts}
        maps = {name: self._map(layer_name, name, parts[name]) for name in packed}
        if any(m is None for m in maps.values()):
            self._kept.pop(layer_name, None)
            return False
        with torch.no_grad():
            if others:
                for name, (at, flips) in others.items():
                    if name in kept:  # else no kernel reads what it becomes
                        _memory(kept[name])[at] ^= flips
                made = self._quick.graphs.run(parts[""].tape, kept)
                if made is None:
                    self._kept.pop(layer_name)
                    return False
                for target, t in zip(parts[""].live, made.results, strict=True):
                    target.data.copy_(t)
                if made.same is not None:
                    asked.append((work, made.same))
            for name, (at, flips) in packed.items():
                code_map = maps[name]
                assert code_map is not None
                codes = torch.stack((2 * at, 2 * at + 1), -1).view(-1)
                code_flips = torch.stack((flips & 15, flips >> 4), -1).view(-1)
                code_map.change([t.data for t in parts[name].live], codes, code_flips)
        return True

    def _map(self, layer: str, name: str, part: Part) -> CodeMap | None:
        """Where a layer's kernels have the codes of a parameter; that of another layer, if it holds here too."""
        if (layer, name) in self._maps:
            return self._maps[layer, name]
        shape = part.tape.shapes[name]
        if not all(t.is_contiguous() for t in part.live):
            self._maps[layer, name] = None
            return None

        def process(codes: Tensor) -> list[Tensor]:
            made = part.tape.repeat({name: codes})
            assert made is not None, "a part that repacks looks at no numbers"
            return [t.contiguous() for t in made]

        known = [m for (_, n), m in self._maps.items() if n == name and m is not None and m.shape == shape]
        for candidate in {id(m): m for m in known}.values():
            if proved(candidate, process, self._device):
                self._maps[layer, name] = candidate
                return candidate
        try:
            self._maps[layer, name] = found(shape, process, self._device)
        except NoMapError:
            self._maps[layer, name] = None
        return self._maps[layer, name]


def _joined(spots: list[Spots]) -> Spots:
    return spots[0] if len(spots) == 1 else (torch.cat([at for at, _ in spots]), torch.cat([f for _, f in spots]))


def _memory(t: Tensor) -> Tensor:
    """The bytes of a tensor's memory from its first element on."""
    first = int(t.storage_offset()) * t.element_size()
    storage = t.untyped_storage()
    view = torch.empty(0, dtype=torch.uint8, device=t.device)
    with torch.no_grad():
        return view.set_(storage, first, (storage.nbytes() - first,), (1,))
