"""What an engine's own weight loaders do with each tensor, recorded once and repeated as plain copies.

An engine's model knows where a tensor of a checkpoint belongs: which of its fused parameters, which rows of them, and
which part of the tensor this rank of a tensor- or expert-parallel group takes. That knowledge is code
(``model.load_weights`` and each parameter's ``weight_loader``), slow for tens of thousands of names, and silent about
names that it does not know. So it is run once, on tensors without data, while every operation that writes into a
parameter is watched. What is left is a list of copies between strided regions, per tensor: it tells before an update
what would be missing, unexpected or written twice, and an update repeats it without any of that code. Copies of equal
shape at equal distances, as those of all experts of a layer, become one.

A write that is no copy of a region of the tensor (a value read on the host, a conversion on the way) cannot be repeated
so. Its loader call is recorded instead and repeated as it was.

Deliberately absent: any knowledge of an engine, of names, of layouts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .live_materials import materialized
from .live_regions import Copy, Region, overlap, region_of, union

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A loader call that cannot be repeated as a copy.

    Args:
        key: of the parameter that is written.
        source: the part of the tensor that the loader was given.
        loader: to be called with the parameter, that part, and the rest, which are its first two arguments.
        rest: the other arguments, and those that only have names.
        written: what it wrote.
    """

    key: str
    source: Region
    loader: Callable[..., Any]
    rest: tuple[tuple[Any, ...], dict[str, Any]]
    written: tuple[Region, ...]

    def repeat(self, parameter: Tensor, tensor: Tensor) -> None:
        arguments, options = self.rest
        self.loader(parameter, self.source.of(tensor), *arguments, **options)


@dataclass
class Loads:
    """What loading one tensor does.

    ``constants`` are regions that a loader sets to a value of its own, such as the padding of a vocabulary.
    """

    copies: list[Copy] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    constants: list[tuple[str, Region, float]] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """Parameters whose loaders were called, also if they took nothing: another rank has the expert."""

    def keys(self) -> set[str]:
        """The parameters it writes."""
        return {key for key, _ in self.written()}

    def regions(self) -> dict[str, list[Region]]:
        """What it writes, by parameter; what it writes several times itself is there once."""
        found: dict[str, list[Region]] = {}
        for key, region in self.written():
            found.setdefault(key, []).append(region)
        return {key: union(several) for key, several in found.items()} if self.calls or self.constants else found

    def written(self) -> Iterator[tuple[str, Region]]:
        for copy in self.copies:
            yield copy.key, copy.destination
        for call in self.calls:
            yield from ((call.key, region) for region in call.written)
        for key, region, _ in self.constants:
            yield key, region

    def repeat(self, tensor: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Do it with data.

        Args:
            tensor: contiguous, of the shape and dtype that were recorded.
            parameters: by key.
        """
        with torch.no_grad():
            for key, region, value in self.constants:
                region.of(parameters[key]).fill_(value)
            for copy in self.copies:
                copy.destination.of(parameters[copy.key]).copy_(copy.source.of(tensor), non_blocking=True)
            for call in self.calls:
                call.repeat(parameters[call.key], tensor)


class Recorder(TorchDispatchMode):
    """Watches loaders write.

    Args:
        parameters: what may be written, by key; without data (meta) or with.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys = {_memory(t): key for key, t in parameters.items()}
        self._loads = Loads()
        self._source: Tensor | None = None
        self._call: _Running | None = None
        self._made: dict[int, Tensor] = {}
        """What loaders make for themselves."""

    def tensor(self, tensor: Tensor) -> Loads:
        """From now on a tensor is loaded; what happens is added to the result."""
        self._source, self._loads, self._made = tensor, Loads(), {}
        return self._loads

    def loader(self, key: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """The loader of a parameter, watched."""

        signature = inspect.signature(loader)

        @functools.wraps(loader)
        def watched(*arguments: Any, **options: Any) -> Any:
            self._loads.asked.add(key)
            outer, self._call = self._call, _Running(key)
            running = self._call
            bound = signature.bind(*arguments, **options)
            parameter, part, *rest = bound.args
            try:
                result = loader(*arguments, **options)
            except (RuntimeError, NotImplementedError) as error:
                if "meta tensor" not in str(error):
                    raise
                result = self._with_data(key, loader, parameter, part, rest, bound.kwargs)
            finally:
                self._call = outer
            if running.opaque:
                source = self._region(part, self._source)
                if source is None:
                    raise UnrepeatableError(f"{key}: its loader is given a tensor made from the one that is loaded")
                written = (
                    *running.opaque,
                    *(c.destination for c in running.copies),
                    *(r for _, r, _ in running.constants),
                )
                self._loads.calls.append(Call(key, source, loader, (tuple(rest), dict(bound.kwargs)), written))
            else:
                self._loads.copies += running.copies
                self._loads.constants += running.constants
            return result

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        targets = list(_targets(func, args, kwargs))
        for target in targets:
            memory = _memory(target)
            if not target.is_meta and memory not in self._keys and memory not in self._made:
                raise UnrepeatableError(
                    f"a loader writes to a tensor {list(target.shape)} that is no parameter ({func})"
                )
        out = func(*args, **kwargs)
        for target in targets:
            key = self._keys.get(_memory(target))
            if key is not None:
                self._note(func, args, key, target)
        for made in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(made, Tensor) and not made.is_meta and not _is_view(func):
                self._made[_memory(made)] = made
        return out

    def _note(self, func: Any, args: Any, key: str, target: Tensor) -> None:
        running = self._call
        if running is None:
            raise UnrepeatableError(f"{key} is written outside of its loader, by {func}")
        destination = region_of(target)
        if func is aten.copy_.default:
            source = self._region(args[1].expand(target.shape), self._source)
            if source is not None:
                running.copies.append(Copy(key, destination, source))
                return
        elif func in (aten.fill_.Scalar, aten.zero_.default):
            value = float(args[1]) if func is aten.fill_.Scalar else 0.0
            if target.is_meta and not overlap([destination], [c.destination for c in running.copies]):
                running.constants.append((key, destination, value))
                return
        if key != running.key:
            raise UnrepeatableError(f"the loader of {running.key} writes into {key}")
        running.opaque.append(destination)

    def _with_data(
        self, key: str, loader: Callable[..., Any], parameter: Tensor, part: Tensor, rest: Any, options: Any
    ) -> Any:
        """Run a loader that reads values, on zeros; then nothing that it writes can be told to be a copy."""
        stand_in = materialized(parameter, torch.device("cpu"))
        self._keys[_memory(stand_in)] = key
        try:
            return loader(stand_in, torch.zeros(part.shape, dtype=part.dtype), *rest, **options)
        finally:
            del self._keys[_memory(stand_in)]

    @staticmethod
    def _region(part: Tensor, whole: Tensor | None) -> Region | None:
        """``part`` as a region of ``whole``; None if it is of other memory."""
        if whole is None or _memory(part) != _memory(whole):
            return None
        found = region_of(part)
        start = found.start - int(whole.storage_offset()) * whole.element_size()
        return Region(start, found.size, found.stride, found.dtype)


class UnrepeatableError(Exception):
    """A loader does what cannot be recorded."""


@dataclass
class _Running:
    """What a call of a parameter's loader has done so far."""

    key: str
    copies: list[Copy] = field(default_factory=list)
    constants: list[tuple[str, Region, float]] = field(default_factory=list)
    opaque: list[Region] = field(default_factory=list)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _memory(tensor: Tensor) -> int:
    cdata: int = tensor.untyped_storage()._cdata
    return cdata


def _targets(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments of an operation that it writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                yield value
