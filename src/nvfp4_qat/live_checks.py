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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
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
        kept: what is held for later changes, by layer; asked for anew each time, as it may go.
    """

    def __init__(self, device: torch.device, kept: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        self._device, self._kept = device, kept
        self._recipe: Recipe | None = None
        self._processed: Tensors = {}
        self._sums, self._sums_of_kept = Sums(device), Sums(device)
        self._live: Tensors | None = None
        """What was summed at the end of the last update."""
        self._held: list[str] = []
        """Layers of which something was held then."""
        self._noted = torch.empty(0)
        """The sums of both."""

    def start(self, recipe: Recipe) -> None:
        """Updates come by another recipe from now on."""
        self._recipe, self._processed, self._live = recipe, {}, None

    def processed(self, layer: str, changes: Iterable[Change]) -> None:
        """What the engine's processing writes of a layer: all that any later update of it does."""
        weights = [c for c in changes if not any(map(ACTIVATIONS.search, c.path))]
        self._processed[layer] = [change.live for change in weights]

    def note(self) -> None:
        """An update has ended: remember what it left."""
        self._live, self._held = self._covered(), list(self._kept())
        self._noted = self._summed(self._live)

    def drifted(self) -> list[str]:
        """Layers that are not what the last complete update left; none if no update has ended."""
        return [] if self._live is None else self.compared()[0]

    def compared(self) -> tuple[list[str], dict[str, int]]:
        """Layers that are not what the last complete update left, and the checksum of each layer now.

        Raises:
            UserError: no update of these tensors has ended.
        """
        if self._live is None:
            raise UserError("there are no checksums to compare with: sync first")
        before, now = torch.stack([self._noted, self._summed(self._live)]).tolist()
        gone = set(self._held) - self._kept().keys()
        names = [*self._live, *(None if name in gone else name for name in self._held)]
        drifted = sorted({name for name, a, b in zip(names, before, now, strict=True) if a != b and name is not None})
        if drifted:
            logger.warning("weights were altered after they had been updated: %s", some(drifted))
        return drifted, dict(zip(self._live, now, strict=False))

    def needed(self, layers: Iterable[str]) -> set[str]:
        """Names of the tensors that repair layers."""
        wanted = set(layers)
        groups = [] if self._recipe is None else self._recipe.groups
        return {name for group in groups if not wanted.isdisjoint(group.layers) for name in group.awaited}

    def layout(self) -> str:
        """Equal for models of which equal weights have equal checksums: the same kernels, tensors of the same form."""
        if self._live is None or self._recipe is None:
            return ""
        cuda = self._device.type == "cuda"
        found: list[Any] = [torch.cuda.get_device_name(self._device) if cuda else self._device.type]
        for name, tensors in self._live.items():
            forms = [[str(t.dtype), list(t.shape), list(t.stride())] for t in tensors]
            found.append([name, _helpers(self._recipe.module(name)), forms])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def _summed(self, live: Tensors) -> Tensor:
        """Of what is live, and what is held for the same layers as when that was noted."""
        kept = self._kept()
        held = {name: list(kept.get(name, {}).values()) for name in self._held}
        return torch.cat([self._sums.of(live), self._sums_of_kept.of(held)])

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
