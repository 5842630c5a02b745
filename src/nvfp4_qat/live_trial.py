"""Whether an engine's processing leaves parameters as they were loaded, tried with random numbers on a twin.

Such layers get updates directly into their live memory, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .live_materials import materialized
from .live_recipe import FLOATS, Group, Recipe, same_form
from .live_twin import Twin


def leaves_as_loaded(recipe: Recipe, group: Group, device: torch.device) -> bool:
    """Whether processing a group of layers changes nothing.

    Args:
        recipe: that the group is of.
        group: not processed in the trial.
        device: of the weights.
    """
    for key in group.parameters:
        layer, name = recipe.layer(key)
        live = layer._parameters.get(name)
        if live is None or not same_form(live, recipe.forms[key]):
            return False
    filled = {key: _random(materialized(recipe.forms[key], device)) for key in group.parameters}
    before = {key: _marks(p) for key, p in filled.items()}
    for name in group.layers:
        own = {n: filled[key] for n, key in recipe.own(name).items()}
        twin = Twin(recipe.model.get_submodule(name), own, recipe.code, apart=True)
        try:
            twin.process()
        except Exception:  # it looks at the numbers
            return False
        try:
            changes = twin.changes()
        except MismatchError:
            return False
        others = [c for c in changes if c.path[0] not in own or c.new is not own[c.path[0]]]
        if not all(torch.equal(c.live, c.new) for c in others):
            return False
    return all(_same(_marks(p), before[key]) for key, p in filled.items())


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
