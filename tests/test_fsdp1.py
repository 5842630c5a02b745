"""Module mode under FSDP1: two gloo processes compute what one computes, to the bit where sums have one order."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import helpers_window as scenarios
import pytest
import torch
from distributed.models import Layer
from helpers_distributed import Env, case
from helpers_sharding import ON, Reference, Sharding, assert_equal_forward, batch, decoder, uneven, use
from helpers_two_processes import of_two
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import nvfp4_qat as nq
from nvfp4_qat.core import pack_from_masters
from nvfp4_qat.naming import canonical_name

FULL, GRAD_OP, NO = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD
BF16 = MixedPrecision(param_dtype=torch.bfloat16)


def fsdp(env: Env, orig: bool = True, **options: Any) -> Sharding:
    use(env.device)
    device = torch.device(env.device, torch.cuda.current_device()) if env.device == "cuda" else torch.device("cpu")

    def wrap(model: nn.Module, unit: type[nn.Module]) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP1 and NO_SHARD are deprecated
            policy = ModuleWrapPolicy({unit})
            return FSDP(model, auto_wrap_policy=policy, use_orig_params=orig, device_id=device, **options)

    def masters(model: nn.Module) -> dict[str, Tensor]:
        with FSDP.summon_full_params(model):
            return {canonical_name(n): p.detach().clone() for n, p in model.named_parameters()}

    mixed = options.get("mixed_precision")
    return Sharding(
        wrap, masters, lambda m: m.no_sync(), lambda m, n: m.clip_grad_norm_(n), mixed.param_dtype if mixed else None
    )


ORIGINAL = {"original": {"orig": True}, "flat": {"orig": False}}


@case(2, options={
    "full-original-loop": {"optimizer": "loop", "orig": True, "sharding_strategy": FULL},
    "full-flat-fused": {"optimizer": "fused", "orig": False, "sharding_strategy": FULL},
    "full-original-foreach-bf16": {"optimizer": "foreach", "sharding_strategy": FULL, "mixed_precision": BF16},
    "full-flat-loop-bf16": {"optimizer": "loop", "orig": False, "sharding_strategy": FULL, "mixed_precision": BF16},
    "grad_op-original-fused": {"optimizer": "fused", "sharding_strategy": GRAD_OP},
    "grad_op-flat-foreach": {"optimizer": "foreach", "orig": False, "sharding_strategy": GRAD_OP},
    "grad_op-original-bf16": {"optimizer": "loop", "sharding_strategy": GRAD_OP, "mixed_precision": BF16},
    "grad_op-flat-bf16": {"optimizer": "fused", "orig": False, "sharding_strategy": GRAD_OP, "mixed_precision": BF16},
    "no-original-foreach": {"optimizer": "foreach", "sharding_strategy": NO},
    "no-flat-loop": {"optimizer": "loop", "orig": False, "sharding_strategy": NO},
    "no-original-fused-bf16": {"optimizer": "fused", "sharding_strategy": NO, "mixed_precision": BF16},
    "no-flat-foreach-bf16": {"optimizer": "foreach", "orig": False, "sharding_strategy": NO, "mixed_precision": BF16},
})  # fmt: skip
def trains_as_one_process(env: Env, optimizer: str, **options: Any) -> None:
    scenarios.trains_as_one_process(fsdp(env, **options), optimizer)


@case(2, options=ORIGINAL)
def weights_of_all_sizes(env: Env, **options: Any) -> None:
    scenarios.trains_as_one_process(fsdp(env, **options), "sgd", uneven, steps=1, tolerance=1e-6)


@case(2, options={**ORIGINAL, "bf16": {"mixed_precision": BF16}})
def averages_different_batches(env: Env, **options: Any) -> None:
    scenarios.averages_different_batches(fsdp(env, **options))


@case(2, options={**ORIGINAL, "grad_op": {"sharding_strategy": GRAD_OP}, "bf16": {"mixed_precision": BF16}})
def accumulates_gradients(env: Env, **options: Any) -> None:
    scenarios.accumulates_gradients(fsdp(env, **options))


@case(2, options=ORIGINAL)
def does_not_read_ahead(env: Env, **options: Any) -> None:
    scenarios.does_not_read_ahead(fsdp(env, forward_prefetch=True, **options))


@case(2, options=ORIGINAL)
def clips_gradients(env: Env, **options: Any) -> None:
    scenarios.clips_gradients(fsdp(env, **options))


@case(2, options={
    "non-reentrant-original": {"implementation": CheckpointImpl.NO_REENTRANT},
    "non-reentrant-flat": {"implementation": CheckpointImpl.NO_REENTRANT, "orig": False},
    "reentrant-original": {"implementation": CheckpointImpl.REENTRANT},
    "reentrant-flat-bf16": {"implementation": CheckpointImpl.REENTRANT, "orig": False, "mixed_precision": BF16},
    "non-reentrant-grad_op": {"implementation": CheckpointImpl.NO_REENTRANT, "sharding_strategy": GRAD_OP},
})  # fmt: skip
def checkpoints_activations(env: Env, implementation: CheckpointImpl, **options: Any) -> None:
    scenarios.checkpoints_activations(fsdp(env, **options), implementation)


@case(2, options={
    "eager-original": {"implementation": "eager"},
    "grouped_mm-flat-bf16": {"implementation": "grouped_mm", "orig": False, "mixed_precision": BF16},
    "batched_mm-flat": {"implementation": "batched_mm", "orig": False},
    "grouped_mm-checkpoint": {"implementation": "grouped_mm", "checkpoint": True},
    "grouped_mm-grad_op": {"implementation": "grouped_mm", "sharding_strategy": GRAD_OP},
})  # fmt: skip
def trains_experts(env: Env, implementation: str, checkpoint: bool = False, **options: Any) -> None:
    scenarios.trains_experts(fsdp(env, **options), implementation, checkpoint)


@case(2, options=ORIGINAL)
def offloads_to_the_cpu(env: Env, orig: bool) -> None:
    """Where a CPU computes, FSDP1 itself adds up the gradients of all steps, if it keeps the original parameters."""
    with contextlib.ExitStack() as stack:
        if env.device == "cpu":  # there is no memory to pin, and streams have nothing to wait for
            stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: self))
            stack.enter_context(mock.patch.object(torch.cpu.Stream, "synchronize", lambda self: None, create=True))
        sharding = fsdp(env, orig=orig, cpu_offload=CPUOffload(offload_params=True))
        if env.device == "cpu":
            scenarios.trains_as_one_process(sharding, steps=1 if orig else 3)
        else:  # the reference's optimizer computes on the GPU, with other instructions
            scenarios.trains_as_one_process(sharding, steps=1, tolerance=1e-6)


@case(2, options={**ORIGINAL, "bf16": {"mixed_precision": BF16}})
def holds_no_copy_of_linear_layers(env: Env, **options: Any) -> None:
    scenarios.holds_no_copy_of_linear_layers(fsdp(env, **options))


@case(2, options=ORIGINAL)
def holds_no_copy_of_experts(env: Env, **options: Any) -> None:
    scenarios.holds_no_copy_of_experts(fsdp(env, **options))


@case(2, options=ORIGINAL)
def frees_what_was_there_before(env: Env, **options: Any) -> None:
    scenarios.frees_what_was_there_before(fsdp(env, **options))


@case(2, options=ORIGINAL)
def stops_every_rank_at_nan(env: Env, orig: bool) -> None:
    def poison(model: nn.Module) -> None:
        unit = model.module.layers[1]
        shard = unit.module.mlp.down_proj.weight if orig else unit._flat_param
        assert shard.ndim == 1
        shard.data[-3] = float("nan")

    scenarios.stops_every_rank_at_nan(fsdp(env, orig=orig), poison)


@case(2, options=ORIGINAL)
def refuses_siblings_in_different_units(env: Env, **options: Any) -> None:
    scenarios.refuses_siblings_in_different_units(fsdp(env, **options))


@case(2, options=ORIGINAL)
def refuses_backward_after_a_step(env: Env, **options: Any) -> None:
    scenarios.refuses_backward_after_a_step(fsdp(env, **options))


@case(2, options=ORIGINAL)
def another_models_step_does_no_harm(env: Env, **options: Any) -> None:
    scenarios.another_models_step_does_no_harm(fsdp(env, **options))


@case(2, options=ORIGINAL)
def inference_comes_first(env: Env, **options: Any) -> None:
    scenarios.inference_comes_first(fsdp(env, **options))


@case(2, options=ORIGINAL)
def packs_full_parameters(env: Env, **options: Any) -> None:
    """While FSDP1 shows whole parameters they can be packed; else the error says what to do."""
    model, reference = fsdp(env, **options)(decoder()), Reference(decoder())
    model(batch(0))
    with pytest.raises(nq.UserError, match="q_proj.weight is sharded"):
        list(pack_from_masters(model))
    with FSDP.summon_full_params(model, writeback=False):
        sent = {entry.name: value for entry, value in pack_from_masters(model)}
    for entry, value in pack_from_masters(reference.working):
        for mine, other in zip(value.tensors(), sent[entry.name].tensors(), strict=True):
            assert torch.equal(mine.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)), entry.name


def load_full(model: nn.Module) -> None:
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        model.load_state_dict(decoder(seed=1).state_dict())


def load_sharded(model: nn.Module) -> None:
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = model.state_dict()
        for value in state.values():
            for shard in value.local_shards():
                shard.tensor.mul_(3.0)
        model.load_state_dict(state)


def load_local(model: nn.Module) -> None:
    with torch.no_grad(), FSDP.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("flat_param"):
                value.local_shards()[0].tensor.mul_(3.0)
        model.load_state_dict(state)


def write_in_summon(model: nn.Module) -> None:
    with FSDP.summon_full_params(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)


def write_data_in_summon(model: nn.Module) -> None:
    with FSDP.summon_full_params(model):
        write_data(model)


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)


def write_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(3.0)


CHANGES = (load_full, load_sharded, load_local, write_in_summon, write_data_in_summon, write_in_place, write_data)


@case(2, change={
    f"{change.__name__}-{name}": {"change": change, "noticed": (change, name) not in (
        (write_data, "original"), (write_data, "flat"), (write_data_in_summon, "original")), **options}
    for change in CHANGES
    for name, options in ORIGINAL.items()
    if (change, name) != (load_local, "original")  # torch cannot
})  # fmt: skip
def notices(env: Env, change: Callable[[nn.Module], None], noticed: bool, **options: Any) -> None:
    scenarios.notices(fsdp(env, **options), change, noticed)


@case(2)
def compiles(env: Env) -> None:
    sharding = fsdp(env)

    def wrap(model: nn.Module) -> nn.Module:
        sharded = sharding.wrap(model, Layer)
        for layer in model.layers:
            layer.module.compile(backend="aot_eager")
        return sharded

    scenarios.compiles(sharding, wrap)


@case(2)
def frozen_weights_are_looked_at_once(env: Env) -> None:
    scenarios.frozen_weights_are_looked_at_once(fsdp(env))


@case(2)
def ignored_parameters_keep_their_packed_copy(env: Env) -> None:
    use(env.device)
    model = decoder()
    nq.apply_qat(model, ON)
    own = [layer.mlp.down_proj.weight for layer in model.layers]
    sharded = fsdp(env, ignored_states=own).wrap(model, Layer)
    reference = Reference(decoder())
    assert_equal_forward(sharded(batch(0)), reference(batch(0)))
    assert all(layer.module.mlp.down_proj._qat_weights["weight"].value is not None for layer in model.layers)
    assert all(layer.module.mlp.up_proj._qat_weights["weight"].value is None for layer in model.layers)


@case(2)
def a_layer_called_outside_its_unit_is_refused(env: Env) -> None:
    model = fsdp(env, orig=False)(decoder())
    model(batch(0))
    with pytest.raises(nq.UserError, match=r"layers\.0\.mlp\.up_proj\.weight is used while FSDP shards it"):
        model.module.layers[0].module.mlp.up_proj(batch(0))


two, two_gpus, test_two_processes, test_two_gpus = of_two(sys.modules[__name__])
