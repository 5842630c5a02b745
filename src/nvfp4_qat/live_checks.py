"""`Checks`: whether a model's weights are still what the last complete update left, layer by layer.

A worker notes a checksum of each layer when an update ends (`live_sums`), and takes it again later: bytes that somebody
else wrote in between show, wherever they are. What belongs to a layer is what updates write: the parameters that
kernels read as they are loaded, what the engine's processing gives for the others, and what is made from other layers'
weights. In what a worker keeps for later changes of single bytes (`live_patch`) it would come to light only with the
next change, so that is checked too.

A layer that has drifted is repaired when its tensors come whole; what is made from other layers' weights is made anew
at the end of each update.

Not covered: work space, locks, caches, tables, and anything else that no update writes. Drift between the check at the
beginning of an update of changes and its end passes for the update's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .live_recipe import Recipe, some
from .live_sums import Sums
from .live_twin import HELPERS, Change

logger = logging.getLogger(__name__)

ACTIVATIONS = re.compile(r"input_(global_)?scale")
"""In the names of tensors for quantized activations, which no checkpoint of 4-bit weights brings or kernel reads."""

Tensors = dict[str, list[Tensor]]
"""By layer."""


class Checks:
    """Checksums of a model's layers.

    Args:
        device: of its weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recipe: Recipe | None = None
        self._processed: Tensors = {}
        self._live, self._kept = Sums(device), Sums(device)
        self._noted: tuple[Tensors, Tensors, Tensor] | None = None
        """What was summed, live and kept, and the sums."""

    def start(self, recipe: Recipe) -> None:
        """Updates come by another recipe from now on."""
        self._recipe, self._processed, self._noted = recipe, {}, None

    def processed(self, layer: str, changes: Iterable[Change]) -> None:
        """What the engine's processing writes of a layer: all that any later update of it does."""
        weights = [c for c in changes if not any(map(ACTIVATIONS.search, c.path))]
        self._processed[layer] = [change.live for change in weights]

    def note(self, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        """An update has ended: remember what it left.

        Args:
            kept: by layer, tensors that are held for later changes.
        """
        live = self._covered()
        held = {name: list(tensors.values()) for name, tensors in kept.items()}
        self._noted = live, held, self._sums(live, held)

    def drifted(self) -> list[str]:
        """Layers that are not what the last complete update left."""
        return self.compared()[0]

    def compared(self) -> tuple[list[str], dict[str, int]]:
        """Layers that are not what the last complete update left, and the checksum of each layer now."""
        if self._noted is None:
            return [], {}
        live, held, noted = self._noted
        before, now = torch.stack([noted, self._sums(live, held)]).tolist()
        names = [*live, *held]
        drifted = sorted({name for name, a, b in zip(names, before, now, strict=True) if a != b})
        if drifted:
            logger.warning("weights were altered after they had been updated: %s", some(drifted))
        return drifted, dict(zip(live, now, strict=False))

    def needed(self, layers: Iterable[str]) -> set[str]:
        """Names of the tensors that repair layers."""
        wanted = set(layers)
        groups = [] if self._recipe is None else self._recipe.groups
        return {name for group in groups if not wanted.isdisjoint(group.layers) for name in group.awaited}

    def layout(self) -> str:
        """Equal for models of which equal weights have equal checksums: the same kernels, tensors of the same form."""
        if self._noted is None or self._recipe is None:
            return ""
        cuda = self._device.type == "cuda"
        found: list[Any] = [torch.cuda.get_device_name(self._device) if cuda else self._device.type]
        for name, tensors in self._noted[0].items():
            forms = [[str(t.dtype), list(t.shape), list(t.stride())] for t in tensors]
            found.append([name, _helpers(self._recipe.module(name)), forms])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def _sums(self, live: Tensors, held: Tensors) -> Tensor:
        return torch.cat([self._live.of(live), self._kept.of(held)])

    def _covered(self) -> Tensors:
        """The live tensors that updates write."""
        recipe, found = self._recipe, Tensors()
        if recipe is None:
            return found
        for group in recipe.groups:
            for key in sorted(group.parameters & recipe.written) if group.plain else ():
                layer, name = recipe.layer(key)
                live = layer._parameters[name]
                if live is not None:
                    found.setdefault(key.rpartition(".")[0], []).append(live)
        found |= self._processed
        here = {name: [t for t in found[name] if t.device == self._device and t.numel()] for name in sorted(found)}
        return {name: tensors for name, tensors in here.items() if tensors}


def _helpers(layer: nn.Module, depth: int = 2) -> list[str]:
    """The classes of what processes a layer's weights."""
    found = []
    for name in HELPERS:
        helper = getattr(layer, name, None)
        if helper is not None:
            found += [type(helper).__qualname__, *(_helpers(helper, depth - 1) if depth else [])]
    return found
