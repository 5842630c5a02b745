"""Single bytes of a live model's weights changed, without loading and processing the rest.

What an engine makes of packed codes is a permutation, which `live_maps` finds: changed codes are changed where they
lie. What it makes of everything else (scales, biases, global scales) is small and not always a permutation: these
parameters are kept as they were loaded, changed there, and processed again (`live_quick.Quick.parts`). If the engine's
code would look at another number now, such as a scale factor shared by a layer, that layer has to be sent whole, as has
every layer for which one of this is not known. The device is asked for these numbers once, when all layers are done.
Weights that kernels read as they are loaded are changed in place.

On a GPU one launch changes the bytes of all tensors that have a route (`live_routes`); the others are changed one by
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .live_changes import Layout
from .live_maps import CodeMap, NoMapError, found, proved
from .live_quick import Part, Quick
from .live_recipe import Group, Recipe
from .live_regions import moved
from .live_routes import Routes, Target

Spots = tuple[Tensor, Tensor]
"""Bytes of a parameter, int64 ``[n]``, and their flips, uint8 ``[n]``."""


@dataclass
class _Work:
    """What is to be done to a group of layers.

    Args:
        spots: by key of the parameter.
        processed: whether other parameters than packed ones have been changed already, and must be processed.
    """

    group: Group
    spots: dict[str, list[Spots]] = field(default_factory=dict)
    processed: bool = False


class Patcher:
    """Changes bytes of a live model.

    Args:
        model: the engine's.
        recipe: of the tensors that changes are of.
        quick: how layers are processed.
        device: of the weights.
        kernel: whether the kernel changes bytes also on a CPU, where Triton interprets it; for tests.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, quick: Quick, device: torch.device, kernel: bool = False
    ) -> None:
        self._model, self._recipe, self._quick, self._device = model, recipe, quick, device
        self._kernel = kernel or device.type == "cuda"
        self._routes: tuple[Layout, list[int], Routes] | None = None
        """Of a layout, and the addresses of what they lead to."""
        self._group_of = {key: group for group in recipe.groups for key in group.parameters}
        self._kept: dict[str, dict[str, Tensor]] = {}
        """By layer: its parameters as loaded, but for packed ones."""
        self._maps: dict[tuple[str, str], CodeMap | None] = {}
        """By layer and parameter; None: there is none."""

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that are held for later changes."""
        maps = {id(m): m.nbytes for m in self._maps.values() if m is not None}
        routes = 0 if self._routes is None else self._routes[2].nbytes
        return routes + sum(maps.values()) + sum(t.nbytes for kept in self._kept.values() for t in kept.values())

    @property
    def kept(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By layer, the parameters that are held for later changes."""
        return self._kept

    def keep(self, layer: str, parameters: Mapping[str, Tensor]) -> None:
        """Remember what a layer was loaded with, if it can be processed in parts; packed codes are not kept."""
        if self._quick.parts(layer):
            needed = self._quick.parts(layer)[""].tape.shapes
            self._kept[layer] = {n: p.detach() for n, p in parameters.items() if n in needed}

    def forget(self, layer: str) -> None:
        """What a layer was loaded with may not be that any more: the next changes of it come whole."""
        self._kept.pop(layer, None)

    def change(self, layout: Layout, changes: Iterable[Spots]) -> set[str]:
        """Change a model's weights.

        Args:
            layout: of all tensors.
            changes: bytes of it (int64 ``[n]``, ascending), each once in all, and old byte xor new byte (uint8
                ``[n]``).

        Returns:
            Names of all tensors of layers that must be sent whole; what these hold until then is worth nothing.
        """
        works: dict[int, _Work] = {}
        whole: set[str] = set()
        routes = self._routed(layout) if self._kernel else None

        def work(key: str) -> _Work:
            group = self._group_of[key]
            return works.setdefault(id(group), _Work(group))

        for at, flips in changes:
            if routes is not None:
                routes.flip(at, flips)
            for name, chosen, start in layout.split(at):
                if routes is not None and name in routes.keys:
                    for key, codes in routes.keys[name]:
                        work(key).processed |= not codes
                    continue
                spots = self._spots(name, at[chosen] - start)
                if spots is None:
                    whole.update(*(group.awaited for group in self._recipe.groups_of[name]))
                    continue
                for key, taken, to in spots:
                    if len(to):
                        work(key).spots.setdefault(key, []).append((to, flips[chosen][taken]))
        asked: list[tuple[_Work, Tensor]] = []
        for each in works.values():
            if not each.group.awaited & whole and not self._done(each, asked):
                whole |= each.group.awaited
        if asked:
            for (each, _), same in zip(asked, torch.stack([same for _, same in asked]).tolist(), strict=True):
                if not same:
                    self._kept.pop(each.group.layers[0], None)
                    whole |= each.group.awaited
        return whole

    def _spots(self, name: str, at: Tensor) -> list[tuple[str, Tensor | slice, Tensor]] | None:
        """Where loading a tensor puts single bytes: the parameter, which of them, and which bytes there.

        Returns:
            None: it cannot be told.
        """
        load, entry = self._recipe.loads[name], self._recipe.incoming[name]
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        try:
            return None if load.calls else [(copy.key, *moved(copy, at, nbytes)) for copy in load.copies]
        except ValueError:
            return None

    def _routed(self, layout: Layout) -> Routes:
        """The routes, made anew only where something is elsewhere now."""
        addresses = list(self._addresses())
        if self._routes is None or self._routes[1] != addresses or self._routes[0].index != layout.index:
            loads = {name: self._recipe.loads[name] for name in layout.index}
            self._routes = layout, addresses, Routes(layout, loads, self._target, self._device)
        return self._routes[2]

    def _addresses(self) -> Iterator[int]:
        """Of everything that a route may lead to, zeros between layers."""
        for group in self._recipe.groups:
            yield 0
            if group.plain:
                for key in group.parameters:
                    layer, name = self._recipe.layer(key)
                    live = layer._parameters[name]
                    yield -1 if live is None else live.data_ptr()
            elif len(group.layers) == 1:
                yield -2 if self._in_place(group.layers[0]) else -3
                for t in self._kept.get(group.layers[0], {}).values():
                    yield t.data_ptr()
                for part in self._quick.parts(group.layers[0]).values():
                    for t in part.live:
                        yield t.data_ptr()

    def _in_place(self, layer: str) -> bool:
        return self._quick.in_place(layer, self._recipe.module(layer))

    def _target(self, key: str) -> Target | None:
        """Where the bytes of a parameter are, if each can be changed for itself."""
        group = self._group_of[key]
        if group.plain:
            layer, name = self._recipe.layer(key)
            live = layer._parameters[name]
            return None if live is None else Target([live.data])
        if len(group.layers) != 1:
            return None
        (layer_name,) = group.layers
        parts, kept = self._quick.parts(layer_name), self._kept.get(layer_name)
        if not parts or kept is None or not self._in_place(layer_name):
            return None
        names = [name for name, own in self._recipe.own(layer_name).items() if own == key]
        if len(names) != 1:
            return None
        (name,) = names
        if name in parts:
            code_map = self._map(layer_name, name, parts[name])
            return None if code_map is None else Target([t.data for t in parts[name].live], code_map)
        return Target([kept[name]] if name in kept else [])

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
        if not self._in_place(layer_name):  # somebody gave the layer another parameter
            self._kept.pop(layer_name)
            return False
        packed = {names[key]: spot for key, spot in spots.items() if names[key] in parts}
        others = {names[key]: spot for key, spot in spots.items() if names[key] not in parts}
        maps = {name: self._map(layer_name, name, parts[name]) for name in packed}
        if any(m is None for m in maps.values()):
            self._kept.pop(layer_name, None)
            return False
        with torch.no_grad():
            if others or work.processed:
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
