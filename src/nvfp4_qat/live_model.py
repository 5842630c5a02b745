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

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import MismatchError, UserError
from .live_changes import Layout
from .live_checks import Checks
from .live_compare import Comparison
from .live_copies import Loads
from .live_graphs import Graphs
from .live_patch import Patcher
from .live_process import Processing, changes_of, write
from .live_quick import Quick
from .live_recipe import EngineCode, Group, Incoming, Recipe, some
from .live_sleep import Kept
from .live_trial import leaves_as_loaded
from .live_twin import Change, derived


@dataclass
class _Parts:
    """What has come of a tensor that comes in parts: ranges of rows, and the tensor itself if a loader needs it."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    whole: Tensor | None = None


class LiveModel:
    """A model that is up, and takes new weights.

    Args:
        model: with the layers that compute, and ``load_weights``.
        code: its engine's.
        device: where its weights are.
        wrappers: around layers, with tensors of their own that updates leave alone (`live_vllm_adapters`).
    """

    def __init__(
        self, model: nn.Module, code: EngineCode, device: torch.device, wrappers: Sequence[nn.Module] = ()
    ) -> None:
        self.model, self.code, self.device, self._wrappers = model, code, device, wrappers
        self.whole = True
        """Whether all weights are of one version."""
        self._recipe: Recipe | None = None
        self._processing = Processing(code, Quick(code, Graphs(device)))
        self._deriving: list[str] = []
        self.patcher: Patcher | None = None
        """What changes of single bytes need; None: nothing is remembered for them."""
        self._by_engine: set[str] = set()
        """Layers that the engine's own code has processed, which may have written into what was loaded."""
        self._missing: set[str] | None = None
        self._left: dict[int, set[str]] = {}
        self._filled: dict[str, nn.Parameter] = {}
        self._parts: dict[str, _Parts] = {}
        self._kept: Kept | None = None
        self.checks = Checks(device, lambda: {} if self.patcher is None else self.patcher.kept)
        """Whether the weights are still what the last complete update left."""
        self.drifted: list[str] = []
        """Layers that were not when the update of changes began that goes on."""

    @property
    def quick(self) -> Quick:
        """Shorter ways of processing, learned from the first updates."""
        return self._processing.quick

    @property
    def updating(self) -> bool:
        return self._missing is not None

    def begin(self, incoming: Sequence[Incoming], remember: bool = False) -> None:
        """Start an update; one that was going on is given up.

        Args:
            incoming: what it will bring.
            remember: whether memory is to be used for later updates by `change`; see `live_patch`.

        Raises:
            MismatchError: with everything that is wrong; the model is as it was.
        """
        self.abandon()
        by_name = {entry.name: entry for entry in incoming}
        if self._recipe is None or self._recipe.incoming != by_name or len(by_name) != len(incoming):
            self._recipe = None
            recipe = Recipe(self.model, self.code, incoming)
            for group in recipe.groups:
                group.plain = group.plain or leaves_as_loaded(recipe, group, self.device)
            self._recipe = recipe
            self._processing = Processing(self.code, Quick(self.code, Graphs(self.device)), recipe, self._processed)
            self.checks.start(recipe)
            self._deriving = [name for name, layer in self.model.named_modules() if self.code.derives(layer)]
            self.patcher = None
        self._recipe.look()
        if not remember:
            self.patcher = None
        elif self.patcher is None:
            self.patcher = Patcher(self.model, self._recipe, self.quick, self.device)
        self._missing = set(self._recipe.incoming)
        self._left = {id(group): set(group.awaited) for group in self._recipe.groups}

    def begin_changes(self, incoming: Sequence[Incoming]) -> None:
        """Start an update of which only changes come, by `change`; what it asks for whole comes by `load`.

        Layers that are not what the last update left are found here and are in `drifted`; they will be asked for.

        Args:
            incoming: as in the last complete update, which must have been told to remember.

        Raises:
            UserError: there was none, or it was of other tensors.
        """
        if not self.whole or self._recipe is None or self.patcher is None:
            raise UserError("changes need an engine that has remembered a complete update")
        if self._recipe.incoming != {entry.name: entry for entry in incoming}:
            raise UserError("changes need the tensors of the last complete update")
        self._recipe.look()
        self.abandon()
        self.drifted = self.checks.drifted()
        self._missing, self._left = set(), {}

    def change(self, layout: Layout, changes: Iterable[tuple[Tensor, Tensor]]) -> set[str]:
        """Take changes; once in an update.

        Args:
            layout, changes: see `live_patch.Patcher.change`.

        Returns:
            Names of tensors that must come whole before the update can end.
        """
        recipe, missing = self._current()
        if self.patcher is None:
            raise UserError("changes need an engine that has remembered a complete update")
        self.whole = False
        with self._or_abandoned():
            needed = self.patcher.change(layout, changes) | self.checks.needed(self.drifted)
        return self._expect(recipe, missing, needed)

    def expect_whole(self, names: Iterable[str]) -> None:
        """After `change`: other tensors come whole too, since another rank of the engine needs them."""
        recipe, missing = self._current()
        self._expect(recipe, missing, set(names))

    def _expect(self, recipe: Recipe, missing: set[str], names: set[str]) -> set[str]:
        """Await tensors, and all others of their groups, and of the groups that these write into."""
        needed: set[str] = set()
        new = list(names)
        while new:
            name = new.pop()
            if name not in needed:
                needed.add(name)
                new += [other for group in recipe.groups_of[name] for other in group.awaited]
        missing |= needed
        self._left |= {id(g): set(g.awaited) for g in recipe.groups if g.awaited & needed}
        return needed

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take some of the tensors; their memory may be used again by work that is queued after this.

        Raises:
            UserError: no update has begun.
            MismatchError: a tensor that was not announced, in another form, or again; the update can go on. Or the
                engine's processing gives something else than when it was started; the update is given up.
        """
        recipe, missing = self._current()
        for name, tensor in named:
            entry = self._awaited(recipe, missing, name)
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise MismatchError(
                    f"{name} was announced as {entry.dtype} {list(entry.shape)} "
                    f"and is {tensor.dtype} {list(tensor.shape)}"
                )
            if name in self._parts:
                raise MismatchError(f"some rows of {name} have come before in this update")
            with self._or_abandoned():
                self._take(recipe, name, tensor.to(self.device).contiguous())
            missing.discard(name)
        self._settle()

    def load_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Take a part of a tensor that is too large to be sent at once; parts come in any order.

        Args:
            start: the first row, along the tensor's first dimension.
            rows: [count, ...], as the tensor from there.

        Raises:
            As `load`.
        """
        recipe, missing = self._current()
        entry = self._awaited(recipe, missing, name)
        end = start + (rows.shape[0] if rows.ndim else 0)
        form = (rows.ndim, tuple(rows.shape[1:]), rows.dtype)
        if form != (len(entry.shape), entry.shape[1:], entry.dtype) or not 0 <= start < end <= entry.shape[0]:
            raise MismatchError(
                f"{name} was announced as {entry.dtype} {list(entry.shape)}; its rows from {start} cannot be "
                f"{rows.dtype} {list(rows.shape)}"
            )
        parts = self._parts.setdefault(name, _Parts())
        if any(start < b and a < end for a, b in parts.ranges):
            raise MismatchError(f"some rows of {name} from {start} to {end - 1} have come before in this update")
        with self._or_abandoned():
            self._take_rows(recipe, entry, start, rows.to(self.device).contiguous(), parts)
        parts.ranges.append((start, end))
        if sum(b - a for a, b in parts.ranges) == entry.shape[0]:
            del self._parts[name]
            with self._or_abandoned():
                self._taken(recipe, name)
            missing.discard(name)
            self._settle()

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
            names = [f"{name} (not all of it)" if name in self._parts else name for name in sorted(missing)]
            raise MismatchError(f"{len(missing)} tensors have not come: {some(names)}")
        self._settle()
        for name in list(self._deriving):
            with self._or_abandoned():
                changes = changes_of(name, derived(self.model.get_submodule(name), self.code, self.device))
            if not changes:
                self._deriving.remove(name)  # it makes nothing that is weights, whatever these are
            self.checks.processed(name, changes)
            write(changes)
        self.checks.note()
        self._missing, self.whole = None, True

    def comparison(self, incoming: Sequence[Incoming]) -> Comparison:
        """What compares a complete set of tensors with the live weights, which stay as they are.

        Raises:
            UserError: the weights are incomplete, or were of other tensors.
        """
        if not self.whole or self.updating or self._recipe is None:
            raise UserError("the weights cannot be compared: they are incomplete, or not of an update")
        if self._recipe.incoming != {entry.name: entry for entry in incoming}:
            raise UserError("the weights cannot be compared: the last complete update was of other tensors")
        self._recipe.look()
        return Comparison(self._recipe, self.device, {n: self.model.get_submodule(n) for n in self._deriving})

    def abandon(self) -> None:
        """Give up an update; what it has written stays."""
        self._missing, self._filled, self._parts = None, {}, {}
        self._processing.forget()

    def _settle(self) -> None:
        with self._or_abandoned():
            self._processing.settle()

    @contextlib.contextmanager
    def _or_abandoned(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    @staticmethod
    def _awaited(recipe: Recipe, missing: set[str], name: str) -> Incoming:
        entry = recipe.incoming.get(name)
        if entry is None:
            raise MismatchError(f"{name} was not announced when the update began")
        if name not in missing:
            raise MismatchError(f"{name} has come before in this update")
        return entry

    def keep(self) -> int:
        """Copy to the host what an update does not bring, before the engine discards the memory of its weights.

        From then on the model is not whole. The next update puts it back before it writes anything, when the engine
        must have its memory again; it is not looked at before that.

        Returns:
            Bytes on the host, held until then.
        """
        if self._kept is None:  # else the memory has been discarded already
            self._kept = Kept(self.model, self.code, self.device, self._wrappers)
        self.quick.graphs.clear()
        self.whole = False
        return self._kept.nbytes

    def _current(self) -> tuple[Recipe, set[str]]:
        if self._recipe is None or self._missing is None:
            raise UserError("no update has begun, or it was given up: call begin first")
        return self._recipe, self._missing

    def _take(self, recipe: Recipe, name: str, tensor: Tensor) -> None:
        self._make_room(recipe, name)
        recipe.loads[name].repeat(tensor, self._filled)
        self._taken(recipe, name)

    def _take_rows(self, recipe: Recipe, entry: Incoming, start: int, rows: Tensor, parts: _Parts) -> None:
        self._make_room(recipe, entry.name)
        load = recipe.loads[entry.name]
        if load.calls:  # a loader wants to see all of the tensor
            if parts.whole is None:
                parts.whole = torch.empty(entry.shape, dtype=entry.dtype, device=self.device)
            parts.whole[start : start + len(rows)] = rows
            if len(rows) + sum(b - a for a, b in parts.ranges) == entry.shape[0]:
                load.repeat(parts.whole, self._filled)
            return
        if not parts.ranges:
            Loads(constants=load.constants).repeat(rows, self._filled)
        row = rows[0].nbytes
        load.of_bytes(start * row, (start + len(rows)) * row).repeat(rows, self._filled)

    def _make_room(self, recipe: Recipe, name: str) -> None:
        """Memory for what a tensor is loaded to."""
        if self._kept is not None:
            self._kept.restore()
            self._kept = None
        for group in recipe.groups_of[name]:
            for key in group.parameters:
                if key not in self._filled:
                    self._filled[key] = self._destination(recipe, key, group)
        self.whole = False

    def _taken(self, recipe: Recipe, name: str) -> None:
        """A tensor has come; layers that have all of theirs are finished."""
        for group in recipe.groups_of[name]:
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
        return recipe.unloaded(key, self.device)

    def _finish(self, recipe: Recipe, group: Group) -> None:
        """Process what a group has got, and copy the result to where it is read."""
        filled = {key: self._filled.pop(key) for key in group.parameters}
        if group.plain:
            return
        self._by_engine.difference_update(group.layers)
        self._processing.do(group, filled)
        if self.patcher is not None and len(group.layers) == 1 and self._by_engine.isdisjoint(group.layers):
            (name,) = group.layers
            self.patcher.keep(name, {n: filled[key] for n, key in recipe.own(name).items()})

    def _processed(self, name: str, changes: list[Change]) -> None:
        """The engine's own code has processed a layer."""
        self.checks.processed(name, changes)
        self._by_engine.add(name)
        if self.patcher is not None:
            self.patcher.forget(name)
