"""A model of vLLM without the wrappers that LoRA puts around its layers.

Adapters are not part of an update: the base below them is, and its layers are processed and written as ever. With LoRA
enabled vLLM replaces layers by wrappers that hold the layer as ``base_layer``. Loaders, names and forms are those of
the model as its class makes it, so updates see a tree in which each wrapper has given its place to what it wraps.
Layers are the same objects in both trees; containers are copies that share everything but the dict of their children.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

WRAPPERS = "vllm.lora."
"""Where the classes of wrappers are."""


def without_adapters(model: nn.Module) -> nn.Module:
    """The model itself if nothing is wrapped, else such a tree."""
    if not any(_wrapped(module) is not None for module in model.modules()):
        return model
    return _bare(model, {})


def wrappers(model: nn.Module) -> list[nn.Module]:
    """Those that such a tree leaves out, whose tensors are of adapters."""
    return [module for module in model.modules() if _wrapped(module) is not None]


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of vLLM's holds; None for other modules."""
    if not any(cls.__module__.startswith(WRAPPERS) for cls in type(module).__mro__):
        return None
    return module._modules.get("base_layer")


def _bare(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    inner = _wrapped(module)
    if inner is not None:
        return _bare(inner, made)
    if id(module) not in made:
        children = {name: None if c is None else _bare(c, made) for name, c in module._modules.items()}
        found = module
        if any(children[name] is not child for name, child in module._modules.items()):
            found = copy.copy(module)
            attributes: dict[str, Any] = found.__dict__
            attributes["_modules"] = children
        made[id(module)] = found
    return made[id(module)]
