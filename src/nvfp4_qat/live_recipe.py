"""What an update will bring, and the `Recipe`: where an engine's model puts it, found out before anything is touched.

A recipe is made once for a list of `Incoming` tensors, by running the model's own loaders on tensors without data
(`live_copies`). It is complete or not made at all: what the model has no place for, what nothing brings, what has
another shape and what comes twice are one error.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .live_copies import Loads, Recorder, UnrepeatableError
from .live_materials import materialized
from .live_regions import coverage, merged

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that loaders may convert, as `_converts` says."""

SHOWN = 50
"""Problems that an error lists in full."""

NAMED = 3
"""Names that are offered instead of an unknown one; and for how many unknown ones."""


class EngineCode(Protocol):
    """What a model's engine knows about its layers."""

    def checkpoint_form(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """A layer's own parameters as they were before processing, without data (meta), each time new objects."""

    def constructed(self, layer: nn.Module) -> frozenset[str]:
        """The names of parameters, buffers and plain attributes that a layer had before anything was loaded."""

    def processes(self, layer: nn.Module) -> bool:
        """Whether loaded parameters are turned into something else before kernels read them."""

    def process(self, layer: nn.Module) -> None:
        """Do so, in place."""

    def derives(self, layer: nn.Module) -> bool:
        """Whether a layer keeps tensors that are made from other layers' weights."""

    def derive(self, layer: nn.Module) -> None:
        """Make them anew, in place."""

    def elsewhere(self, model: nn.Module, name: str) -> bool:
        """Whether a checkpoint's tensor is of a layer that this model leaves to another pipeline stage."""

    def kept(self, layer: nn.Module, name: str) -> bool:
        """Whether an attribute is none of a layer's weights, though processing sets it: an update leaves it alone."""

    def outlives(self, layer: nn.Module, name: str) -> bool:
        """Whether an attribute is the engine's own to bring back, or to empty, when it has discarded its memory."""

    def optional(self, layer: nn.Module, name: str) -> bool:
        """Whether a checkpoint may leave a parameter out."""

    def quicker(self, layer: nn.Module) -> Callable[[Mapping[str, nn.Parameter]], dict[str, Tensor]] | None:
        """A faster routine for what `process` does: from loaded parameters to the layer's tensors by their names.

        It is proved before it is used (`live_quick`), so it may be tried for layers that it turns out not to be for.
        """

    def ours(self, cls: type) -> bool:
        """Whether objects of a class may keep a layer's tensors: they are looked into, and twins get copies of them."""


@dataclass(frozen=True)
class Part:
    """What checkpoints call some of a tensor: experts ``first`` to ``first + count - 1``, or all of it.

    Args:
        name: in the checkpoint; "{}" stands for the expert's number.
        count: 0: the tensor is not one of several experts.
        rows: range along the second last dimension; None: all.
    """

    name: str
    first: int = 0
    count: int = 0
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and the views they stand for."""
        if self.count == 0:
            yield self.name, self._rows(tensor)
        for i in range(self.count):
            at = self.first + i  # a number for each expert comes as a tensor of one
            yield self.name.format(at), self._rows(tensor[at] if tensor.ndim > 1 else tensor[at : at + 1])

    def _rows(self, t: Tensor) -> Tensor:
        return t if self.rows is None else t[..., self.rows[0] : self.rows[1], :]


@dataclass(frozen=True)
class Incoming:
    """A tensor that an update will bring."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Problem:
    """What went wrong with a tensor; ``unknown``: before any parameter's loader was asked."""

    text: str
    unknown: bool = False


class _Stream:
    """Tensors without data under the names of their parts, as an engine's model is given them.

    Args:
        entries: the tensors.
        recorder: is told of each when its first part is asked for.
    """

    def __init__(self, entries: Sequence[Incoming], recorder: Recorder) -> None:
        self._entries, self._recorder = entries, recorder
        self.loads: dict[str, Loads] = {}
        self.entry = self.name = entries[0].name if entries else ""
        self.shape, self._given = tuple[int, ...](), False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self._entries:
            self.entry, self.name, self.shape, self._given = entry.name, entry.name, entry.shape, False
            whole = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            self.loads[entry.name] = self._recorder.tensor(whole)
            for part in entry.parts:
                for name, view in part.of(whole):
                    self.name, self.shape, self._given = name, tuple(view.shape), True
                    yield name, view

    def problem(self, error: Exception) -> _Problem:
        """An error that a loader raised for the tensor that it got last."""
        text = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0][:200]
        text = f"{self.name} of shape {list(self.shape)} does not fit ({text})"
        return _Problem(text, self._given and not self.loads[self.entry].asked)


@dataclass(eq=False)
class Group:
    """Layers that are processed together: one, or those that share a parameter.

    Args:
        layers: their names.
        parameters: keys of theirs.
        awaited: the tensors that write into these.
        plain: whether what is loaded is what kernels read.
    """

    layers: list[str] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)
    awaited: set[str] = field(default_factory=set)
    plain: bool = True


class Recipe:
    """Where a list of tensors goes.

    Args:
        model: the engine's.
        code: the engine's.
        incoming: what an update will bring.

    Raises:
        MismatchError: it is not exactly what the model needs. The model is as it was.
    """

    def __init__(self, model: nn.Module, code: EngineCode, incoming: Sequence[Incoming]) -> None:
        self.model, self.code = model, code
        self._modules: dict[str, nn.Module] = {}
        self.look()
        self.incoming = {entry.name: entry for entry in incoming}
        self.forms: dict[str, nn.Parameter] = {}
        """Parameters before processing, without data, by key: the layer's name and theirs."""
        self.shared: dict[str, str] = {}
        """Keys that mean the parameter of another key."""
        self.keys: dict[str, list[str]] = {}
        """Of each layer."""
        self.loads: dict[str, Loads] = {}
        """By tensor."""
        self.elsewhere: set[str] = set()
        """Tensors for layers that another pipeline stage has."""
        self._find_forms()
        problems = [f"{name} is listed twice" for name in _repeated([entry.name for entry in incoming])]
        problems += [*self._record(), *self._account()]
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise MismatchError(
                "the engine's model cannot take these weights; nothing was changed: "
                + "; ".join(problems[:SHOWN])
                + more
            )
        self.written = {key for load in self.loads.values() for key in load.keys()}
        self.groups_of: dict[str, list[Group]] = {}
        self.groups = self._grouped()

    def look(self) -> None:
        """Look again which modules the model has: once before an update, not for every tensor."""
        self._modules = dict(self.model.named_modules())

    def module(self, name: str) -> nn.Module:
        """A layer by its name."""
        return self._modules[name]

    def layer(self, key: str) -> tuple[nn.Module, str]:
        """The layer that a parameter belongs to, and its name there."""
        module, _, name = key.rpartition(".")
        return self._modules[module], name

    def own(self, layer: str) -> dict[str, str]:
        """The names of a layer's parameters, and under which key each is found."""
        return {key.rpartition(".")[2]: self.shared.get(key, key) for key in self.keys[layer]}

    def unloaded(self, key: str, device: torch.device) -> nn.Parameter:
        """A parameter to be loaded to; what no checkpoint brings is what it was in the live layer, or ones."""
        parameter = materialized(self.forms[key], device)
        if key not in self.written:
            layer, name = self.layer(key)
            live = layer._parameters.get(name)
            with torch.no_grad():
                parameter.fill_(1)
                if live is not None and same_form(live, parameter):
                    parameter.copy_(live)
        return parameter

    def _find_forms(self) -> None:
        first: dict[int, str] = {}
        for prefix, layer in self.model.named_modules():
            for name, form in self.code.checkpoint_form(layer).items():
                key = f"{prefix}.{name}" if prefix else name
                self.keys.setdefault(prefix, []).append(key)
                live = layer._parameters.get(name)
                if live is not None and first.setdefault(id(live), key) != key:
                    self.shared[key] = first[id(live)]
                else:
                    self.forms[key] = form

    def _record(self) -> Iterator[str]:
        """Run the loaders; yields what goes wrong."""
        loaders = {key: getattr(form, "weight_loader", _default_loader) for key, form in self.forms.items()}
        problems = self._run(loaders, [list(self.incoming.values())])
        if problems:  # what happens to the others is only known if each is loaded for itself
            problems = self._run(loaders, [[entry] for entry in self.incoming.values()])
        unknown = 0
        for name, entry in self.incoming.items():
            load = self.loads.setdefault(name, Loads())
            load.copies = merged(load.copies)
            if not load.asked and self._is_elsewhere(entry):
                self.elsewhere.add(name)
            elif load.asked or name in problems and not problems[name].unknown:
                if name in problems:
                    yield problems[name].text
            else:
                unknown += 1
                yield f"{name}: the engine has no such weight" + (self._alike(entry) if unknown <= NAMED else "")

    def _is_elsewhere(self, entry: Incoming) -> bool:
        names = [part.name.format(part.first) for part in entry.parts]
        return bool(names) and all(self.code.elsewhere(self.model, name) for name in names)

    def _alike(self, entry: Incoming) -> str:
        """The names in the engine that are most like one that it does not have."""
        found = difflib.get_close_matches(entry.parts[0].name if entry.parts else entry.name, self.forms, NAMED)
        return f" (it has {', '.join(found)})" if found else ""

    def _run(self, loaders: Mapping[str, Any], batches: Iterable[Sequence[Incoming]]) -> dict[str, _Problem]:
        """Load tensors in batches; what goes wrong, by the tensor at which a batch ended."""
        self.loads = {}
        recorder, problems = Recorder(self.forms), dict[str, _Problem]()
        form: Any
        for key, form in self.forms.items():
            form.weight_loader = recorder.loader(key, loaders[key])
        with self._in_checkpoint_form():
            for batch in batches:
                stream = _Stream(batch, recorder)
                try:
                    with recorder:
                        self.model.load_weights(iter(stream))  # type: ignore[operator]
                except UnrepeatableError as error:
                    problems[stream.entry] = _Problem(str(error))
                except Exception as error:  # whatever an engine's loaders raise for a tensor that does not fit
                    problems[stream.entry] = stream.problem(error)
                self.loads |= stream.loads
        return problems

    def _account(self) -> Iterator[str]:
        """Yields what is missing and what comes twice."""
        regions: dict[str, list[Any]] = {key: [] for key in self.forms}
        for name, load in self.loads.items():
            for key, written in load.regions().items():
                regions[key] += written
            for copy in load.copies:
                of, to = copy.source.dtype, copy.destination.dtype
                if not _converts(of, to):
                    yield f"{name} is {of}, but {copy.key} is {to}"
        for key, written in regions.items():
            form = self.forms[key]
            if not written:
                layer, name = self.layer(key)
                live = layer._parameters.get(name)
                if not self.code.optional(layer, name):
                    yield f"{key}: nothing brings it"
                elif live is None or not same_form(live, form):
                    yield f"{key}: nothing brings it, and what it was cannot be told from the layer"
                continue
            left_out, twice = coverage(form, written)
            if left_out:
                yield f"{key}: {left_out} of {form.numel()} elements are missing"
            if twice:
                yield f"{key}: {twice} elements are written twice"

    def _grouped(self) -> list[Group]:
        of: dict[str, Group] = {}
        for name in self.keys:
            keys = set(self.own(name).values())
            before = {id(g): g for key in keys if (g := of.get(key)) is not None}
            group = next(iter(before.values()), Group())
            for other in before.values():
                if other is not group:
                    group.layers += other.layers
                    group.parameters |= other.parameters
                    group.plain &= other.plain
            group.layers.append(name)
            group.parameters |= keys
            group.plain &= self._plain(name, keys)
            of.update(dict.fromkeys(group.parameters, group))
        for name, load in self.loads.items():
            self.groups_of[name] = list({id(of[key]): of[key] for key in load.keys()}.values())
            for group in self.groups_of[name]:
                group.awaited.add(name)
        return list({id(g): g for g in of.values()}.values())

    def _plain(self, name: str, keys: set[str]) -> bool:
        layer = self.module(name)
        if self.code.processes(layer):
            return False
        live = {key: layer._parameters.get(key.rpartition(".")[2]) for key in self.keys[name]}
        forms = {key: self.forms[self.shared.get(key, key)] for key in live}
        return all(t is not None and same_form(t, forms[key]) for key, t in live.items())

    @contextlib.contextmanager
    def _in_checkpoint_form(self) -> Iterator[None]:
        """Let the model's layers have the parameters that its loaders expect; afterwards they are as before."""
        before = [(layer, layer._parameters) for layer in self.model.modules()]
        try:
            for name in self.keys:
                layer = self.module(name)
                layer._parameters = {n: self.forms[key] for n, key in self.own(name).items()}
            yield
        finally:
            for layer, parameters in before:
                layer._parameters = parameters


def same_form(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and strides."""
    return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def some(names: Sequence[str], shown: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _converts(of: torch.dtype, to: torch.dtype) -> bool:
    """Whether a loader may convert: between floats, but neither to fp16, which would overflow, nor from it to bf16."""
    if of == to:
        return True
    return of in FLOATS and to in FLOATS and to != torch.float16 and (of, to) != (torch.float16, torch.bfloat16)


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    found = []
    for name in names:
        if name in seen:
            found.append(name)
        seen.add(name)
    return found


def _default_loader(parameter: Tensor, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise ValueError(f"expected {list(parameter.shape)}")
    parameter.data.copy_(tensor)
