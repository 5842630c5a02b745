"""The tensors of a model, and whether two models have the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_qat.live_twin import tensors

Named = dict[str, Tensor]

NO_WEIGHTS = ("input_global_scale", "input_scale")
"""In the names of tensors for quantized activations: these checkpoints have none, and nothing initializes them."""

SCRATCH = ("workspace",)


def kernel_tensors(model: nn.Module) -> Named:
    """What `live_twin` takes for the tensors of a model's layers."""
    return {
        ".".join((name, *path)): t
        for name, layer in model.named_modules()
        for path, t in tensors(layer, _vllms).items()
        if not any(word in part for part in path for word in NO_WEIGHTS)
    }


def reachable_tensors(model: nn.Module) -> Named:
    """Every tensor that can be found from a model, through whatever objects of vLLM, containers and functions.

    Knows nothing of how `live_twin` looks for them. Found once, under the first name.
    """
    found = dict(_walk(model, "", set()))
    return {n: t for n, t in found.items() if not any(word in n.lower() for word in (*NO_WEIGHTS, *SCRATCH))}


def workspaces(model: nn.Module) -> Named:
    """The tensors that kernels use as scratch memory."""
    found = ((name, layer.__dict__.get("workspace")) for name, layer in model.named_modules())
    return {name: t for name, t in found if isinstance(t, Tensor)}


def contents(named: Named) -> dict[str, tuple[int, bytes]]:
    """Address and bytes of each."""
    return {name: (t.data_ptr(), _bytes(t)) for name, t in named.items()}


def different(a: Named, b: Named) -> list[str]:
    """The names under which there is not bit for bit the same."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or _described(a[n]) != _described(b[n]))


def _vllms(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "vllm"


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if value is None or isinstance(value, (type, str, bytes, int, float)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
    if type(value).__module__.startswith("vllm.config"):
        return
    for key, child in _children(value):
        yield from _walk(child, f"{name}.{key}", seen)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from enumerate((value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        for i, cell in enumerate(value.__closure__ or ()):
            try:
                yield i, cell.cell_contents
            except ValueError:  # not filled yet
                continue
    elif isinstance(value, (nn.Module, Tensor)) or _vllms(type(value)):
        yield from vars(value).items() if hasattr(value, "__dict__") else ()
        yield from ((s, getattr(value, s)) for s in getattr(type(value), "__slots__", ()) if hasattr(value, s))


def _described(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.stride(), _bytes(t)


def _bytes(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
