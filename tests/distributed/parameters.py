"""The unsharded parameters of a unit: one piece of memory, put into the modules and taken out of them together."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

import torch
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

import nvfp4_qat as nq
from distributed.instruments import raises_everywhere
from distributed.models import decoder
from distributed.pair import FULL, MIXED, ON, Pair, Units, keeping, layers, linears
from distributed.pair import shard as shard_model
from nvfp4_qat import gather_unit
from nvfp4_qat.gather import Gather, gather_of
from nvfp4_qat.gather_groups import param_groups
from nvfp4_qat.gather_param import GatheredParam
from nvfp4_qat.gather_unit import APART, GatherUnit
from nvfp4_qat.multi_unpack import Unpacks

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
    (memory,) = unit._memories
    assert memory.untyped_storage().size() == 0
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
    assert unit._memories[0] is memory, "allocated anew"


def named(unit: GatherUnit) -> list[tuple[str, Any]]:
    return [(s.name.removeprefix("layers.1."), p) for s, p in zip(unit.packed.shards, unit._params, strict=True)]


class OtherGather(DefaultAllGather):
    """Not one that a unit uses for itself."""


def gathered_by(pair: Pair, layer: Any, by_fsdp2: bool) -> list[Any]:
    """The layer's parameter groups, after all layers were given another all-gather or not."""
    if by_fsdp2:
        for each in layers(pair.model):
            each.set_custom_all_gather(OtherGather())
    return list(param_groups(layer))


class Untouched(GatheredParam):
    """What FSDP2 must not ask."""

    def _asked(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("one after the other")

    all_gather_inputs = property(_asked)
    init_all_gather_outputs = alloc_all_gather_outputs = init_unsharded_param = to_unsharded = to_sharded = _asked


@case(2, by_fsdp2={"by-fsdp2": True, "by-the-unit": False})
def one_call_for_all(env: Env, by_fsdp2: bool) -> None:
    """FSDP2 goes through the first weight of a unit and what is not quantized, and sees all of them between."""
    pair, unit, layer = trained(env)
    (group,) = gathered_by(pair, layer, by_fsdp2)
    everyone, first = list(group.fsdp_params), unit._params[0]
    assert unit.few == [p for p in everyone if p is first or p not in unit._params] and len(unit.few) > 1
    for p in unit._params[1:]:
        p.__class__ = Untouched
    with mock.patch.object(GatherUnit, "collect", side_effect=AssertionError("one after the other")):
        layer.unshard()
        assert unit.alone and group.fsdp_params == everyone and group._own is not by_fsdp2
        assert not by_fsdp2 or (unit.ready and unit.filled and unit.asked == 7)
        layer.reshard()
        pair.step()
    for p in unit._params[1:]:
        p.__class__ = GatheredParam


@case(2, by_fsdp2={"by-fsdp2": True, "by-the-unit": False})
def an_error_in_a_gather(env: Env, by_fsdp2: bool) -> None:
    """FSDP2 sees all parameters again, and the next gather begins anew."""
    pair, unit, layer = trained(env)
    (group,) = gathered_by(pair, layer, by_fsdp2)
    everyone = list(group.fsdp_params)
    own = "send", "receive"
    for what in ("prepare", "fill_all") if by_fsdp2 else own:
        with mock.patch.object(GatherUnit, what, side_effect=KeyboardInterrupt):
            raises_everywhere(KeyboardInterrupt, layer.unshard)
        assert unit.alone and group.fsdp_params == everyone, what
        unit.give_up()
        layer.reshard()
    pair.compare_forward()
    pair.step()


@case(
    2,
    variant={
        f"{which}-{policy}-{units}-{when}": {"name": name, "policy": p, "units": u, "stale": when == "stale"}
        for which, name in (("first", FIRST), ("last", LAST))
        for policy, p in (("mixed", MIXED), ("fp32", FULL))
        for units, u in (("layers", layers), ("linears", linears))
        for when in ("stale", "packed")
    },
)
def a_replaced_shard(env: Env, name: str, policy: MixedPrecisionPolicy, units: Units, stale: bool) -> None:
    """A shard replaced by a plain tensor is an error where a unit is gathered by hand, and the unit is whole again with
    the shard."""
    pair = Pair(env, policy=policy, units=units, reshard_after_forward=True)
    pair.step()
    parameter: Any = pair.parameters()[name]
    unit: Any = pair.model.layers[1] if units is layers else pair.model.get_submodule(name.removesuffix(".weight"))
    shard = parameter._local_tensor
    for _ in range(2):
        if not stale:
            pair.compare_forward()
            unit.reshard()
        parameter._local_tensor = shard.plain
        message = raises_everywhere(nq.MismatchError, unit.unshard)
        assert f"the shard of {name} was replaced by an unquantized tensor" in message, message
        unit.reshard()
        parameter._local_tensor = shard
    pair.compare_forward()
    pair.step()


@case(2)
def a_replaced_shard_after_a_gather_that_was_dropped(env: Env) -> None:
    """What an abandoned gather has asked for does not count for the next one."""
    pair, _, layer = trained(env)
    pair.compare_forward()
    layer.reshard()
    parameter: Any = pair.parameters()[FIRST]
    shard = parameter._local_tensor
    layer.unshard(async_op=True)
    for group in param_groups(layer):
        group._all_gather_result = None  # as FSDP2 does with prefetches that were not needed
    parameter._local_tensor = shard.plain
    message = raises_everywhere(nq.MismatchError, layer.unshard)
    assert f"the shard of {FIRST} was replaced" in message, message
    layer.reshard()
    parameter._local_tensor = shard
    pair.compare_forward()
    pair.step()


@case(2, kept={"once": True, "each-time": False})
def an_error_while_filling(env: Env, kept: bool) -> None:
    """After an error between gather and use (no memory, an interrupt) a unit can be gathered again."""
    with keeping() if kept else contextlib.nullcontext():
        pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    pair.step()
    with mock.patch.object(Unpacks, "__call__", side_effect=torch.OutOfMemoryError("no memory")):
        raises_everywhere(torch.OutOfMemoryError, lambda: pair.model(pair.inputs()[env.rank]))
    refused = 0
    for _ in range(3):
        for unit in (*layers(pair.model), pair.model):
            sharded: Any = unit
            sharded.reshard()
        try:
            pair.compare_forward()
            break
        except nq.MismatchError:
            refused += 1
    assert refused <= 1, refused
    pair.step()


@case(2)
def an_error_while_parameters_are_made(env: Env) -> None:
    """Nothing half-made stays: the next gather makes them all."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    gather = gather_of(pair.model)
    assert gather is not None
    plain, count = nn.Parameter, 0

    def third_fails(*args: Any, **options: Any) -> nn.Parameter:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with mock.patch.object(gather_unit.nn, "Parameter", third_fails):
        raises_everywhere(KeyboardInterrupt, lambda: pair.model(pair.inputs()[env.rank]))
    for layer in layers(pair.model):
        sharded: Any = layer
        sharded.reshard()
    pair.compare_forward()
    pair.model.reshard()
    pair.step()
    assert all(unit._memories for unit in gather.units)


@case(2)
def two_dtypes_in_a_unit(env: Env) -> None:
    """Each has its memory, so that all weights of a unit can be saved together."""
    model: Any = decoder()
    for layer in model.layers:
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.bfloat16()
        layer.mlp.up_proj.weight.requires_grad_(False)
    model = model.to(env.device)
    nq.apply_qat(model, ON, gather="nvfp4")
    shard_model(model, layers, mesh=env.mesh(), reshard_after_forward=True)
    layer = model.layers[0]
    for _ in range(2):
        layer.unshard()
        weights = weights_of(layer)
        storages = {w.untyped_storage().data_ptr(): w.dtype for w in weights.values()}
        assert sorted(map(str, storages.values())) == ["torch.bfloat16", "torch.float32"]
        torch.save({name: w.detach() for name, w in weights.items()}, io.BytesIO())
        layer.reshard()
    gather = gather_of(model)
    assert gather is not None and all(m.untyped_storage().size() == 0 for m in gather.units[0]._memories)


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


@case(
    2,
    variant={
        f"{when}-{which}": {"kept": when == "kept", "reshard_after_forward": which == "resharded"}
        for when in ("kept", "each-time")
        for which in ("resharded", "never-resharded")
    },
)
def evaluated_between_the_first_steps(env: Env, kept: bool, **options: Any) -> None:
    """What a unit makes for its own gather while it is evaluated in inference mode serves training too."""
    with keeping() if kept else contextlib.nullcontext():
        pair = Pair(env, policy=MIXED, **options)
    pair.step()
    with torch.inference_mode():
        pair.model(pair.inputs()[env.rank])
    for _ in range(2):
        pair.step()
