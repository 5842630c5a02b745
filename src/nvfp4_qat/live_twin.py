"""A second form of an engine's layer, in which new weights are prepared while the live one is left alone.

After loading, an engine turns a layer's checkpoint tensors into what its kernels read: repacked, padded, rescaled, in
other dtypes, under other names. Nothing of that is written down here. A `Twin` is the live layer object with other
tensors: parameters as they were before that processing, filled with new weights, then processed by the engine's own
code on the twin. What comes out is compared with the live layer tensor by tensor and copied into its memory, which CUDA
graphs hold the addresses of.

What counts as a layer's tensors: its parameters and buffers, tensors among its plain attributes, and those of the
objects that compute for it (quantization method, scheme, kernel, their configurations), as far as they are the
engine's. Work space and locks are nobody's data: they stay what they are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .live_materials import materialized
from .live_recipe import EngineCode

SCRATCH = re.compile(r"workspace|semaphore|(^|_)locks?(_|$)", re.IGNORECASE)
"""In the names of tensors that hold no weights."""

DEPTH = 6
"""How far from a layer its tensors are looked for."""

HELPERS = ("quant_method", "scheme", "kernel", "impl", "base_quant_method")
"""Attributes with the objects that process a layer's weights, and which keep results."""

MODULE = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""

Path = tuple[str, ...]


class Change(NamedTuple):
    """A live tensor, where it was found, and the data for it."""

    path: Path
    live: Tensor
    new: Tensor


def tensors(layer: nn.Module, ours: Callable[[type], bool], scratch: bool = False) -> dict[Path, Tensor]:
    """A layer's tensors by where they are found, children left out.

    Args:
        layer: of an engine's model.
        ours: whether objects of a class are looked into; `live_recipe.EngineCode.ours`.
        scratch: with those that hold no weights, such as work space and locks.
    """
    found: dict[Path, Tensor] = {}
    for group in (layer._parameters, layer._buffers):
        found.update({(name,): t for name, t in group.items() if t is not None})
    for path, tensor in _found(layer, ours, (Tensor,)):
        found.setdefault(path, tensor)
    return {path: t for path, t in found.items() if scratch or not any(map(SCRATCH.search, path))}


def _found(layer: nn.Module, ours: Callable[[type], bool], kinds: tuple[type, ...]) -> Iterator[tuple[Path, Any]]:
    """Values of some kinds among a layer's plain attributes and in its helpers."""
    plain = _plain_attributes(layer)
    plain |= {name: _plain_attributes(m) for name in HELPERS if (m := layer._modules.get(name)) is not None}
    return _walk(plain, (), {id(layer)}, ours, kinds)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in MODULE}


def _walk(
    value: Any, path: Path, seen: set[int], ours: Callable[[type], bool], kinds: tuple[type, ...]
) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, kinds):
        yield path, value
        return
    if len(path) >= DEPTH or value is None:
        return
    if isinstance(value, (Tensor, nn.Module, type, str, bytes, int, float)):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(value)]
    elif ours(type(value)):
        items = list(getattr(value, "__dict__", {}).items())
        items += [(s, getattr(value, s)) for s in getattr(type(value), "__slots__", ()) if hasattr(value, s)]
    else:
        return
    for name, child in items:
        yield from _walk(child, (*path, name), seen, ours, kinds)


class Twin:
    """A layer with parameters of its own, to be filled and processed.

    Args:
        layer: the live one; not touched.
        parameters: in checkpoint form, on the device.
        code: the engine's.
        apart: with copies of all tensors that processing may write into.
    """

    def __init__(
        self, layer: nn.Module, parameters: Mapping[str, nn.Parameter], code: EngineCode, apart: bool = False
    ) -> None:
        self.live, self._code, ours = layer, code, code.ours
        # What processing added is left out, for it may ask whether that is there, and then not make it anew.
        names = code.constructed(layer) | MODULE
        twin = copy.copy(layer)
        twin.__dict__ = {name: value for name, value in layer.__dict__.items() if name in names}
        empty = {name: None for name, p in layer._parameters.items() if p is None}
        twin._parameters, twin._modules = {**empty, **parameters}, dict(layer._modules)
        buffers = {name: b for name, b in layer._buffers.items() if name in names}
        twin._buffers = {name: None if b is None else b.clone() for name, b in buffers.items()}
        copies: dict[int, Any] = {id(layer): twin}
        if apart:
            held = layer._parameters.keys() | layer._buffers.keys()
            copies |= {id(t): t.clone() for path, t in tensors(layer, ours).items() if path[0] not in held}
            twin.__dict__.update({n: copies.get(id(v), v) for n, v in twin.__dict__.items() if isinstance(v, Tensor)})
        for attributes in (twin.__dict__, twin._modules):
            for name in HELPERS:
                if attributes.get(name) is not None:
                    attributes[name] = _own(attributes[name], copies, ours)
        self.layer = twin

    def process(self) -> None:
        """Let the engine's code turn the parameters into what kernels read."""
        if self._code.processes(self.layer):
            with torch.no_grad():
                self._code.process(self.layer)

    def changes(self) -> list[Change]:
        """Where the processed twin has data for the live layer.

        Raises:
            MismatchError: the layers do not have the same tensors any more; nothing was written.
        """
        live, new = (self._weights(tensors(layer, self._code.ours)) for layer in (self.live, self.layer))
        registered = self.live._parameters.keys() | self.live._buffers.keys()
        problems = [f"{'.'.join(p)} is gone" for p in live.keys() - new.keys() if p[0] in registered]
        added = (self.layer._parameters.keys() | self.layer._buffers.keys()) - registered
        problems += [f"{name} is new" for name in added if (name,) in new and (name,) not in live]
        problems += self._other_numbers()
        pairs: dict[Any, Change] = {}
        for path, old in live.items():
            fresh = new.get(path)
            if fresh is None or _same_memory(old, fresh):
                continue
            if (old.shape, old.dtype, old.stride()) != (fresh.shape, fresh.dtype, fresh.stride()):
                problems.append(f"{'.'.join(path)} was {_form(old)} and is {_form(fresh)}")
            place = (old.data_ptr() if old.numel() else id(old), old.shape, old.stride(), old.dtype)
            pairs.setdefault(place, Change(path, _once(old), _once(fresh)))
        if problems:
            raise MismatchError("; ".join(sorted(problems)))
        return list(pairs.values())

    def _weights(self, found: dict[Path, Any]) -> dict[Path, Any]:
        """Without what no update changes."""
        return {path: value for path, value in found.items() if not self._code.kept(self.live, path[0])}

    def _other_numbers(self) -> Iterator[str]:
        """Numbers that processing made otherwise: kernels and CUDA graphs were built with the old ones."""
        live, new = (
            self._weights(dict(_found(layer, self._code.ours, (int, float)))) for layer in (self.live, self.layer)
        )
        for path in live.keys() & new.keys():
            nan = live[path] != live[path] and new[path] != new[path]
            if live[path] != new[path] and not nan:
                yield f"{'.'.join(path)} was {live[path]} and is {new[path]}"


def derived(layer: nn.Module, code: EngineCode, device: torch.device, apart: bool = False) -> Twin:
    """A layer that keeps tensors made from other layers' weights, with these made anew."""
    names = code.constructed(layer)
    live = {n: p for n, p in layer._parameters.items() if p is not None and n in names}
    own = {n: materialized(p, device) for n, p in live.items()}
    twin = Twin(layer, own, code, apart)
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(live[n])
        code.derive(twin.layer)
    return twin


def _own(value: Any, copies: dict[int, Any], ours: Callable[[type], bool], depth: int = 0) -> Any:
    """A twin's copy of an object that processing may leave something in; tensors and foreign objects are shared."""
    if id(value) in copies:
        return copies[id(value)]
    if depth > DEPTH or value is None or isinstance(value, (Tensor, type, str, bytes, int, float)):
        return value

    def own(child: Any) -> Any:
        return _own(child, copies, ours, depth + 1)

    if type(value) in (list, tuple):
        return type(value)(own(child) for child in value)
    if type(value) is dict:
        copies[id(value)] = found = {}
        found.update({key: own(child) for key, child in value.items()})
        return found
    cls = type(value)
    if not ours(cls) or hasattr(cls, "__del__"):  # dropping a copy would close what the live one has open
        return value
    copies[id(value)] = new = copy.copy(value)
    if new is value:
        return value
    if hasattr(new, "__dict__"):
        registries = MODULE if isinstance(value, nn.Module) else frozenset[str]()
        for name, child in value.__dict__.items():
            if name not in registries:
                new.__dict__[name] = own(child)
            elif isinstance(child, dict):  # of a module: its parameters and the like
                new.__dict__[name] = dict(child)
    return new


def _once(t: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _form(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
