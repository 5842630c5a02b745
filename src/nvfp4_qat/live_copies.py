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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .live_materials import materialized
from .live_regions import Copy, Region, clipped, overlap, region_of, union

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

    def of_bytes(self, first: int, last: int) -> Loads:
        """What loading the bytes ``first`` to ``last - 1`` of the tensor does, without constants; not with calls."""
        assert not self.calls
        return Loads([part for copy in self.copies for part in clipped(copy, first, last)])

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

    What is written is put down to the tensor whose memory it comes from, else to the one that was given last. So a
    model may be given a stream of many tensors at once, as it expects them.

    Args:
        parameters: what may be written, by key; without data (meta) or with.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys = {_memory(t): key for key, t in parameters.items()}
        self._sources: dict[int, tuple[Tensor, Loads]] = {}
        self._last = Loads()
        self._call: _Running | None = None
        self._made: dict[int, Tensor] = {}
        """What loaders make for themselves."""

    def tensor(self, tensor: Tensor) -> Loads:
        """From now on parts of a tensor are given; what happens to them is added to the result."""
        self._last, self._made = Loads(), {}
        self._sources[_memory(tensor)] = tensor, self._last
        return self._last

    def loader(self, key: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """The loader of a parameter, watched."""

        signature = inspect.signature(loader)

        @functools.wraps(loader)
        def watched(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            parameter, part, *rest = bound.args
            _, loads = self._sources.get(_memory(part), (None, self._last))
            loads.asked.add(key)
            outer, self._call = self._call, _Running(key, loads)
            running = self._call
            try:
                result = loader(*arguments, **options)
            except (RuntimeError, NotImplementedError) as error:
                if "meta" not in str(error):
                    raise
                result = self._with_data(key, loader, parameter, part, rest, bound.kwargs)
            finally:
                self._call = outer
            if running.opaque:
                found = self._source(part)
                if found is None:
                    raise UnrepeatableError(f"{key}: its loader is given a tensor made from the one that is loaded")
                written = (*running.opaque, *(c.destination for _, c in running.copies))
                written += tuple(region for _, region, _ in running.constants)
                loads.calls.append(Call(key, found[0], loader, (tuple(rest), dict(bound.kwargs)), written))
            else:
                for of, copy in running.copies:
                    of.copies.append(copy)
                loads.constants += running.constants
            return result

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes, is_view = _effects(func)
        targets = [t for i, name in writes if isinstance(t := args[i] if i < len(args) else kwargs.get(name), Tensor)]
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
        if not is_view:
            for made in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(made, Tensor) and not made.is_meta:
                    self._made[_memory(made)] = made
        return out

    def _note(self, func: Any, args: Any, key: str, target: Tensor) -> None:
        running = self._call
        if running is None:
            raise UnrepeatableError(f"{key} is written outside of its loader, by {func}")
        if func in BY_INDEX:
            regions = indexed(target, BY_INDEX[func](args))
            if regions is None:
                raise UnrepeatableError(
                    f"the loader of {key} writes elements that it chooses one by one ({func}): which, cannot be told "
                    "before it has run"
                )
        else:
            regions = [region_of(target)]
            (destination,) = regions
            if func is aten.copy_.default:
                found = self._source(args[1].expand(target.shape))
                if found is not None:
                    source, loads = found
                    running.copies.append((loads, Copy(key, destination, source)))
                    return
            elif func in (aten.fill_.Scalar, aten.zero_.default):
                value = float(args[1]) if func is aten.fill_.Scalar else 0.0
                if target.is_meta and not overlap(regions, [c.destination for _, c in running.copies]):
                    running.constants.append((key, destination, value))
                    return
        if key != running.key:
            raise UnrepeatableError(f"the loader of {running.key} writes into {key}")
        running.opaque += regions

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

    def _source(self, part: Tensor) -> tuple[Region, Loads] | None:
        """Which region of a tensor that is loaded ``part`` is; None if it is of other memory."""
        whole, loads = self._sources.get(_memory(part), (None, None))
        if whole is None or loads is None:
            return None
        found = region_of(part)
        start = found.start - int(whole.storage_offset()) * whole.element_size()
        return Region(start, found.size, found.stride, found.dtype), loads


class UnrepeatableError(Exception):
    """A loader does what cannot be recorded."""


@dataclass
class _Running:
    """What a call of a parameter's loader has done so far."""

    key: str
    loads: Loads
    copies: list[tuple[Loads, Copy]] = field(default_factory=list)
    constants: list[tuple[str, Region, float]] = field(default_factory=list)
    opaque: list[Region] = field(default_factory=list)


def _nowhere(args: Any) -> None:
    """Writes some of its target only, which ones cannot be told."""


BY_INDEX: dict[Any, Callable[[Any], Sequence[Tensor | None] | None]] = {
    aten.index_put_.default: lambda args: args[1] if len(args) < 4 or not args[3] else None,
    aten.index_copy_.default: lambda args: [*[None] * (args[1] % args[0].ndim), args[2]],
    aten.index_fill_.int_Scalar: lambda args: [*[None] * (args[1] % args[0].ndim), args[2]],
    aten.index_fill_.int_Tensor: lambda args: [*[None] * (args[1] % args[0].ndim), args[2]],
    aten._index_put_impl_.default: _nowhere,
    aten.index_add_.default: _nowhere,
    aten.masked_fill_.Scalar: _nowhere,
    aten.masked_fill_.Tensor: _nowhere,
    aten.masked_scatter_.default: _nowhere,
    aten.put_.default: _nowhere,
    aten.scatter_.src: _nowhere,
    aten.scatter_.value: _nowhere,
}
"""Operations that write the elements which tensors of numbers say, and these from their arguments."""

INDEXED = 1 << 16
"""How many regions such an operation may write."""


def indexed(target: Tensor, indices: Sequence[Tensor | None] | None) -> list[Region] | None:
    """The regions of ``target[indices]``, each once; None if they cannot be told, or are too many.

    Args:
        indices: as of `torch.Tensor.index_put_`, one for each dimension from the first: whole numbers, or a mask of
            as many dimensions as it has; None is all of a dimension.
    """
    if indices is None or any(i is not None and i.is_meta for i in indices):
        return None
    numbers: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        numbers += index.nonzero().unbind(1) if index is not None and masks else [index]
    dims = [dim for dim, index in enumerate(numbers) if index is not None]
    given = [index.cpu() for index in numbers if index is not None]
    if not given:
        return [region_of(target)]
    chosen = torch.stack([i.reshape(-1) for i in torch.broadcast_tensors(*given)], 1)
    chosen = torch.unique(chosen % torch.tensor([target.shape[dim] for dim in dims]), dim=0)
    if len(chosen) > INDEXED:
        return None
    found = []
    for at in chosen.tolist():
        region = target
        for dim, i in sorted(zip(dims, at, strict=True), reverse=True):
            region = region.select(dim, i)
        found.append(region_of(region))
    return found


@functools.cache
def _effects(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """Which arguments an operation writes into, by place and name, and whether what it returns is a view."""
    arguments = enumerate(func._schema.arguments)
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return written, any(r.alias_info is not None for r in func._schema.returns)


def _memory(tensor: Tensor) -> int:
    cdata: int = tensor.untyped_storage()._cdata
    return cdata
