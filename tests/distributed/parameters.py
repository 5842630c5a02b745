"""The unsharded parameters of a unit: one piece of memory, put into the modules and taken out of them together."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from helpers_distributed import Env, case
from torch import Tensor, nn

import nvfp4_qat as nq
from distributed.instruments import raises_everywhere
from distributed.pair import MIXED, Pair
from nvfp4_qat.gather import Gather, gather_of
from nvfp4_qat.gather_unit import APART, GatherUnit

LAST, FIRST = "layers.1.mlp.down_proj.weight", "layers.1.self_attn.q_proj.weight"
"""Of a unit."""


def trained(env: Env, **options: Any) -> tuple[Pair, GatherUnit, Any]:
    """A pair after a step, the second layer's unit, and the layer."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True, **options)
    pair.step()
    gather = gather_of(pair.model)
    assert isinstance(gather, Gather)
    layer: Any = pair.model.layers[1]
    return pair, gather.units[1], layer


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.ndim == 2}


@case(2)
def one_memory(env: Env) -> None:
    """Allocated with the first gather of a unit, freed with its reshard, with a version counter for each weight."""
    pair, unit, layer = trained(env)
    memory = unit._memory
    assert memory is not None and memory.untyped_storage().size() == 0
    layer.unshard()
    weights = weights_of(layer)
    assert len(weights) == len(unit.packed.shards) == 7
    places = sorted((w.storage_offset() * w.element_size(), w.nbytes) for w in weights.values())
    assert {w.untyped_storage().data_ptr() for w in weights.values()} == {memory.data_ptr()}
    assert all(start % APART == 0 for start, _ in places)
    assert all(a + n <= b for (a, n), (b, _) in zip(places, places[1:], strict=False))
    assert places[-1][0] + places[-1][1] <= memory.nbytes == memory.untyped_storage().size()
    before = {name: w._version for name, w in weights.items()}
    with torch.no_grad():
        weights["mlp.up_proj.weight"].mul_(1)
    changed = [name for name, w in weights.items() if w._version != before[name]]
    assert changed == ["mlp.up_proj.weight"], changed
    layer.reshard()
    assert memory.untyped_storage().size() == 0
    assert all(p.sharded_param is layer.get_parameter(name) for name, p in named(unit))
    pair.step()
    assert unit._memory is memory, "allocated anew"


def named(unit: GatherUnit) -> list[tuple[str, Any]]:
    return [(s.name.removeprefix("layers.1."), p) for s, p in zip(unit.packed.shards, unit._params, strict=True)]


@case(2)
def one_call_for_all(env: Env) -> None:
    """FSDP2 asks the first weight of a unit only: what the others answer is not looked for."""
    pair, unit, layer = trained(env)
    with mock.patch.object(GatherUnit, "collect", side_effect=AssertionError("one after the other")):
        layer.unshard()
        assert unit.ready and unit.filled and unit.asked == 7
        layer.reshard()
        pair.step()


@case(2, name={"first": FIRST, "last": LAST})
def a_replaced_shard(env: Env, name: str) -> None:
    """A shard replaced by a plain tensor is an error where a unit is gathered by hand, and the unit is whole again with
    the shard."""
    pair, _, layer = trained(env)
    parameter: Any = pair.parameters()[name]
    shard = parameter._local_tensor
    for _ in range(2):
        parameter._local_tensor = shard.plain
        message = raises_everywhere(nq.MismatchError, layer.unshard)
        assert f"the shard of {name} was replaced by an unquantized tensor" in message, message
        layer.reshard()
        parameter._local_tensor = shard
    pair.compare_forward()
    pair.step()


@case(2)
def modules_that_set_their_own_attributes(env: Env) -> None:
    """A class with its own ``__setattr__`` gets its parameters by that."""
    seen = []

    def watched(self: nn.Linear, name: str, value: Any) -> None:
        if name == "weight":
            seen.append(value)
        nn.Module.__setattr__(self, name, value)

    with mock.patch.object(nn.Linear, "__setattr__", watched, create=True):
        pair, unit, layer = trained(env)
        assert unit._places == []
        seen.clear()
        layer.unshard()
        unsharded = [p._unsharded_param for p in unit._params]
        assert all(any(given is p for given in seen) for p in unsharded)
        layer.reshard()
        assert all(any(given is p.sharded_param for given in seen) for p in unit._params)
        pair.step()


@case(2)
def frozen_between_steps(env: Env) -> None:
    """``requires_grad`` of a master counts from the next gather on."""
    pair, _, layer = trained(env)
    parameter = pair.parameters()[LAST]
    for wanted in (False, True):
        parameter.requires_grad_(wanted)
        layer.unshard()
        assert layer.mlp.down_proj.weight.requires_grad is wanted
        layer.reshard()
    pair.step()
