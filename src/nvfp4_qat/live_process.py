"""Loaded layers turned into what kernels read, and written to where they read it.

A layer with a proved quick way (`live_quick`) takes that, and is written at once although only the device knows yet
whether the numbers that the engine's code looks at are still the same: the host asks for many layers at a time. Until
then the loaded parameters are held, so that a layer for which they are not the same is processed by the engine's code
in the same update. Until everybody was asked for, an update cannot end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .live_quick import Quick
from .live_recipe import EngineCode, Group, Recipe
from .live_twin import Change, Twin

UNSURE = 1 << 27
"""Bytes of parameters that are held until the device is asked."""


@dataclass
class _Unsure:
    """A layer that a quick way has processed, as long as nobody has looked whether it was the right one.

    Args:
        name: of the layer.
        own: its loaded parameters.
        same: says so, bool ``[]`` on the device.
    """

    name: str
    own: Mapping[str, nn.Parameter]
    same: Tensor


class Processing:
    """Processes layers of a model.

    Args:
        code: the engine's.
        quick: quick ways for the layers of the recipe.
        recipe: says which parameters a layer has; None: there is none yet, and nothing to process.
        told: of each layer that the engine's code has processed, and what that changes.
    """

    def __init__(
        self,
        code: EngineCode,
        quick: Quick,
        recipe: Recipe | None = None,
        told: Callable[[str, list[Change]], None] = lambda name, changes: None,
    ) -> None:
        self._code, self.quick, self._recipe, self._told = code, quick, recipe, told
        self._unsure: list[_Unsure] = []
        self._bytes = 0
        """Of their parameters."""

    def do(self, group: Group, filled: Mapping[str, nn.Parameter]) -> None:
        """Process what a group has got, and write the result.

        Args:
            filled: loaded parameters, by key.

        Raises:
            MismatchError: the engine's processing gives something else than when it was started.
        """
        assert self._recipe is not None
        alone = len(group.layers) == 1
        own = {name: {n: filled[key] for n, key in self._recipe.own(name).items()} for name in group.layers}
        for changes in [self._prepared(name, own[name], alone) for name in group.layers]:
            write(changes)
        if self._bytes >= UNSURE:
            self.settle()

    def settle(self) -> None:
        """Ask the device whether all was right so far, and let the engine's code do what was not. Raises as `do`."""
        unsure = self._unsure
        self.forget()
        if not unsure:
            return
        for one, same in zip(unsure, torch.stack([one.same for one in unsure]).tolist(), strict=True):
            if not same:
                self.quick.missed(one.name)
                write(self._processed(one.name, one.own, alone=True))

    def forget(self) -> None:
        """Nobody needs to know any more."""
        self._unsure, self._bytes = [], 0

    def _prepared(self, name: str, own: Mapping[str, nn.Parameter], alone: bool) -> list[Change]:
        """What a layer's processing changes, by its quick way if there is one."""
        assert self._recipe is not None
        quick = self.quick.changes(name, self._recipe.module(name), own, alone)
        if quick is None:
            return self._processed(name, own, alone)
        if quick.same is None:
            return quick.changes
        if alone:
            self._unsure.append(_Unsure(name, own, quick.same))
            self._bytes += sum(p.nbytes for p in own.values())
        elif not bool(quick.same):
            self.quick.missed(name)
            return self._processed(name, own, alone)
        return quick.changes

    def _processed(self, name: str, own: Mapping[str, nn.Parameter], alone: bool) -> list[Change]:
        """What it changes, by the engine's own code."""
        assert self._recipe is not None
        layer = self._recipe.module(name)
        given = {n: lent(p) for n, p in own.items()}
        twin = Twin(layer, given, self._code)

        def process() -> list[Change]:
            twin.process()
            return changes_of(name, twin)

        def attempt(parameters: Mapping[str, nn.Parameter]) -> list[Change]:
            other = Twin(layer, parameters, self._code, apart=True)
            other.process()
            return other.changes()

        changes = self.quick.watched(name, layer, twin, given, own, process, attempt, alone)
        self._told(name, changes)
        return changes


def lent(p: nn.Parameter) -> nn.Parameter:
    """Another parameter with the same memory and attributes: the engine's code may give it other memory."""
    made: Any = p.detach()
    made.__class__, made.__dict__ = p.__class__, dict(p.__dict__)
    found: nn.Parameter = made
    return found


def changes_of(name: str, twin: Twin) -> list[Change]:
    """What a processed twin changes.

    Raises:
        MismatchError: kernels were built with other numbers, or tensors of another form.
    """
    try:
        return twin.changes()
    except MismatchError as error:
        raise MismatchError(
            f"{name} does not come out as it did when the engine was started: {error}. Start the engine anew."
        ) from None


def write(changes: Iterable[Change]) -> None:
    """Copy to where kernels read."""
    with torch.no_grad():
        for change in changes:
            change.live.data.copy_(change.new)
