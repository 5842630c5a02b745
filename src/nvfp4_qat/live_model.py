"""`LiveModel`: new weights for an engine's model while the engine stays up.

An update goes through three calls. ``begin`` says which tensors will come and refuses, before anything is touched and
with one error, what cannot become a complete set of weights (`live_recipe`). ``load`` takes them in any order and in
any portions; when a layer has all of its own, they are processed on its twin (`live_twin`) and copied into the memory
that kernels and CUDA graphs read. ``commit`` finishes what hangs on several layers and says that the model is whole
again. An update that ends in between leaves a model of two versions; `whole` tells, and the next complete update heals.

A layer whose processing leaves its parameters as they are loaded, which is tried with random numbers, gets updates
directly into its live memory. So does a layer without such processing.

Deliberately absent: transport, threads, and any engine: what is particular to vLLM is in `live_vllm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MismatchError, UserError
from .live_materials import materialized
from .live_recipe import FLOATS, EngineCode, Group, Incoming, Recipe, same_form, some
from .live_twin import Change, Twin


class LiveModel:
    """A model that is up, and takes new weights.

    Args:
        model: with the layers that compute, and ``load_weights``.
        code: its engine's.
        device: where its weights are.
    """

    def __init__(self, model: nn.Module, code: EngineCode, device: torch.device) -> None:
        self.model, self.code, self.device = model, code, device
        self.whole = True
        """Whether all weights are of one version."""
        self._recipe: Recipe | None = None
        self._missing: set[str] | None = None
        self._left: dict[int, set[str]] = {}
        self._filled: dict[str, nn.Parameter] = {}

    @property
    def updating(self) -> bool:
        return self._missing is not None

    def begin(self, incoming: Sequence[Incoming]) -> None:
        """Start an update; one that was going on is given up.

        Raises:
            MismatchError: with everything that is wrong; the model is as it was.
        """
        self.abandon()
        by_name = {entry.name: entry for entry in incoming}
        if self._recipe is None or self._recipe.incoming != by_name or len(by_name) != len(incoming):
            self._recipe = None
            recipe = Recipe(self.model, self.code, incoming)
            for group in recipe.groups:
                group.plain = group.plain or self._leaves_as_loaded(recipe, group)
            self._recipe = recipe
        self._missing = set(self._recipe.incoming)
        self._left = {id(group): set(group.awaited) for group in self._recipe.groups}

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take some of the tensors; their memory may be used again by work that is queued after this.

        Raises:
            UserError: no update has begun.
            MismatchError: a tensor that was not announced, in another form, or again; the update can go on. Or the
                engine's processing gives something else than when it was started; the update is given up.
        """
        recipe, missing = self._current()
        for name, tensor in named:
            entry = recipe.incoming.get(name)
            if entry is None:
                raise MismatchError(f"{name} was not announced when the update began")
            if name not in missing:
                raise MismatchError(f"{name} has come before in this update")
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise MismatchError(
                    f"{name} was announced as {entry.dtype} {list(entry.shape)} "
                    f"and is {tensor.dtype} {list(tensor.shape)}"
                )
            try:
                self._take(recipe, name, tensor.to(self.device).contiguous())
            except BaseException:
                self.abandon()
                raise
            missing.discard(name)

    def view(self, name: str, buffer: Tensor, at: int) -> Tensor:
        """An announced tensor that lies in a buffer.

        Args:
            buffer: uint8, one dimension.
            at: its first byte there, a multiple of 16.
        """
        recipe, _ = self._current()
        entry = recipe.incoming.get(name)
        if entry is None:
            raise MismatchError(f"{name} was not announced when the update began")
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        if at % 16 or at + nbytes > buffer.numel():
            raise MismatchError(f"{name} cannot lie at byte {at} of a buffer of {buffer.numel()}")
        return buffer[at : at + nbytes].view(entry.dtype).view(entry.shape)

    def commit(self) -> None:
        """End an update for which everything has come.

        Raises:
            UserError: no update has begun.
            MismatchError: something has not come; the update goes on.
        """
        _, missing = self._current()
        if missing:
            raise MismatchError(f"{len(missing)} tensors have not come: {some(sorted(missing))}")
        for name, layer in self.model.named_modules():
            if self.code.derives(layer):
                own = {n: materialized(p, self.device) for n, p in layer._parameters.items() if p is not None}
                with torch.no_grad():
                    for n, p in own.items():
                        p.copy_(layer._parameters[n])
                twin = Twin(layer, own, self.code.ours)
                with torch.no_grad():
                    self.code.derive(twin.layer)
                self._write(self._changes(name, twin))
        self._missing, self.whole = None, True

    def abandon(self) -> None:
        """Give up an update; what it has written stays."""
        self._missing, self._filled = None, {}

    def _current(self) -> tuple[Recipe, set[str]]:
        if self._recipe is None or self._missing is None:
            raise UserError("no update has begun, or it was given up: call begin first")
        return self._recipe, self._missing

    def _take(self, recipe: Recipe, name: str, tensor: Tensor) -> None:
        groups = recipe.groups_of[name]
        for group in groups:
            for key in group.parameters:
                if key not in self._filled:
                    self._filled[key] = self._destination(recipe, key, group)
        self.whole = False
        recipe.loads[name].repeat(tensor, self._filled)
        for group in groups:
            left = self._left[id(group)]
            left.discard(name)
            if not left:
                self._finish(recipe, group)

    def _destination(self, recipe: Recipe, key: str, group: Group) -> nn.Parameter:
        """Where a parameter is loaded to."""
        layer, name = recipe.layer(key)
        live = layer._parameters.get(name)
        if group.plain and live is not None:
            return live
        parameter = materialized(recipe.forms[key], self.device)
        if key not in recipe.written:  # no checkpoint brings it: it stays what it was
            with torch.no_grad():
                parameter.fill_(1)
                if live is not None and same_form(live, parameter):
                    parameter.copy_(live)
        return parameter

    def _finish(self, recipe: Recipe, group: Group) -> None:
        """Process what a group has got, and copy the result to where it is read."""
        filled = {key: self._filled.pop(key) for key in group.parameters}
        if group.plain:
            return
        twins = {name: self._processed(recipe, name, filled) for name in group.layers}
        for changes in [self._changes(name, twin) for name, twin in twins.items()]:
            self._write(changes)

    def _processed(self, recipe: Recipe, name: str, filled: Mapping[str, nn.Parameter], apart: bool = False) -> Twin:
        own = {n: filled[key] for n, key in recipe.own(name).items()}
        twin = Twin(self.model.get_submodule(name), own, self.code.ours, apart)
        if self.code.processes(twin.layer):
            with torch.no_grad():
                self.code.process(twin.layer)
        return twin

    def _leaves_as_loaded(self, recipe: Recipe, group: Group) -> bool:
        """Whether processing changes nothing, tried with random numbers."""
        for key in group.parameters:
            layer, name = recipe.layer(key)
            live = layer._parameters.get(name)
            if live is None or not same_form(live, recipe.forms[key]):
                return False
        filled = {key: _random(materialized(recipe.forms[key], self.device)) for key in group.parameters}
        before = {key: _marks(p) for key, p in filled.items()}
        for name in group.layers:
            try:
                twin = self._processed(recipe, name, filled, apart=True)
            except Exception:  # it looks at the numbers
                return False
            own = {n: filled[key] for n, key in recipe.own(name).items()}
            try:
                changes = twin.changes(self.code.ours)
            except MismatchError:
                return False
            others = [c for c in changes if c.path[0] not in own or c.new is not own[c.path[0]]]
            if not all(torch.equal(c.live, c.new) for c in others):
                return False
        return all(_same(_marks(p), before[key]) for key, p in filled.items())

    def _changes(self, name: str, twin: Twin) -> list[Change]:
        try:
            return twin.changes(self.code.ours)
        except MismatchError as error:
            self.abandon()
            raise MismatchError(
                f"{name} does not come out as it did when the engine was started: {error}. Start the engine anew."
            ) from None

    @staticmethod
    def _write(changes: Iterable[Change]) -> None:
        with torch.no_grad():
            for change in changes:
                change.live.data.copy_(change.new)


Marks = tuple[Any, ...]


def _marks(t: Tensor) -> Marks:
    """Sums along two directions of a tensor's bytes: what moved within it has other ones."""
    flat = t.detach().reshape(-1).view(torch.uint8)
    width = 1 << (max(flat.numel(), 1).bit_length() // 2)
    square = flat[: flat.numel() // width * width].view(-1, width)
    sums = square.sum(0, dtype=torch.int64), square.sum(1, dtype=torch.int64)
    return (*sums, flat[square.numel() :].sum(dtype=torch.int64))


def _same(a: Marks, b: Marks) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _random(parameter: nn.Parameter) -> nn.Parameter:
    """Numbers of all magnitudes; the global random state stays as it is."""
    g = torch.Generator(parameter.device).manual_seed(0)
    options: Any = {"generator": g, "device": parameter.device}
    with torch.no_grad():
        for part in parameter.view(-1).split(1 << 24):  # without temporaries of the tensor's size
            if parameter.dtype in FLOATS:
                powers = torch.rand(part.shape, **options) * 8 - 4
                part.copy_(torch.randn(part.shape, **options) * 10**powers)
            else:  # any bytes but those of fp8's NaN
                part.copy_(torch.randint(127, (part.nbytes,), dtype=torch.uint8, **options).view(part.dtype))
    return parameter
