"""Module mode under FSDP2 (without gather mode): two gloo processes compute what one computes, to the bit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import helpers_window as scenarios
import pytest
import torch
from distributed.models import Layer
from helpers_distributed import Env, case
from helpers_sharding import (
    OPTIMIZERS,
    Reference,
    Sharding,
    assert_equal_forward,
    assert_same,
    batch,
    decoder,
    loss_of,
    uneven,
    use,
)
from helpers_two_processes import of_two
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import nvfp4_qat as nq
from nvfp4_qat.naming import canonical_name

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def fsdp(env: Env, **options: Any) -> Sharding:
    use(env.device)
    options = {"mesh": env.mesh(), **options}

    def wrap(model: nn.Module, unit: type[nn.Module]) -> nn.Module:
        for module in model.modules():
            if isinstance(module, unit):
                fully_shard(module, **options)
        fully_shard(model, **options)
        return model

    def masters(model: nn.Module) -> dict[str, Tensor]:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return {canonical_name(n): p.full_tensor().detach().clone() for n, p in model.named_parameters()}

    @contextlib.contextmanager
    def no_sync(model: nn.Module) -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    def clip(model: nn.Module, norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), norm).full_tensor()

    mixed = options.get("mp_policy")
    return Sharding(wrap, masters, no_sync, clip, mixed.param_dtype if mixed else None)


PLAIN: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"mp_policy": BF16}}
KEPT = {"reshard_after_forward": False}


@case(2, options={
    "loop": {"optimizer": "loop"},
    "fused-bf16": {"optimizer": "fused", "mp_policy": BF16},
    "foreach-kept": {"optimizer": "foreach", **KEPT},
    "fused-bf16-kept": {"optimizer": "fused", "mp_policy": BF16, **KEPT},
})  # fmt: skip
def trains_as_one_process(env: Env, optimizer: str, **options: Any) -> None:
    scenarios.trains_as_one_process(fsdp(env, **options), optimizer)


@case(2)
def offloads_to_the_cpu(env: Env) -> None:
    sharding = fsdp(env, offload_policy=CPUOffloadPolicy(pin_memory=env.device == "cuda"))
    if env.device == "cpu":
        scenarios.trains_as_one_process(sharding, "foreach")
    else:  # the reference's optimizer computes on the GPU, with other instructions
        scenarios.trains_as_one_process(sharding, "foreach", steps=1, tolerance=1e-6)


@case(2)
def weights_of_all_sizes(env: Env) -> None:
    scenarios.trains_as_one_process(fsdp(env), "sgd", uneven, tolerance=1e-6)


@case(2)
def replicas(env: Env) -> None:
    scenarios.trains_as_one_process(fsdp(env, mesh=env.mesh(2, 1)))


@case(2, options=PLAIN)
def averages_different_batches(env: Env, **options: Any) -> None:
    scenarios.averages_different_batches(fsdp(env, **options))


@case(2, options={"plain": {}, "kept": KEPT, "bf16": {"mp_policy": BF16}})
def accumulates_gradients(env: Env, **options: Any) -> None:
    scenarios.accumulates_gradients(fsdp(env, **options))


@case(2)
def clips_gradients(env: Env) -> None:
    scenarios.clips_gradients(fsdp(env))


@case(2, options={
    "non-reentrant": {"implementation": CheckpointImpl.NO_REENTRANT},
    "non-reentrant-bf16": {"implementation": CheckpointImpl.NO_REENTRANT, "mp_policy": BF16},
    "reentrant": {"implementation": CheckpointImpl.REENTRANT},
})  # fmt: skip
def checkpoints_activations(env: Env, implementation: CheckpointImpl, **options: Any) -> None:
    scenarios.checkpoints_activations(fsdp(env, **options), implementation)


@case(2, options={
    "eager": {"implementation": "eager"},
    "grouped_mm-bf16": {"implementation": "grouped_mm", "mp_policy": BF16},
    "batched_mm-kept": {"implementation": "batched_mm", **KEPT},
    "grouped_mm-checkpoint": {"implementation": "grouped_mm", "checkpoint": True},
})  # fmt: skip
def trains_experts(env: Env, implementation: str, checkpoint: bool = False, **options: Any) -> None:
    scenarios.trains_experts(fsdp(env, **options), implementation, checkpoint)


@case(2, options=PLAIN)
def holds_no_copy_of_linear_layers(env: Env, **options: Any) -> None:
    scenarios.holds_no_copy_of_linear_layers(fsdp(env, **options))


@case(2, options=PLAIN)
def holds_no_copy_of_experts(env: Env, **options: Any) -> None:
    scenarios.holds_no_copy_of_experts(fsdp(env, **options))


@case(2)
def frees_what_was_there_before(env: Env) -> None:
    scenarios.frees_what_was_there_before(fsdp(env))


@case(2)
def stops_every_rank_at_nan(env: Env) -> None:
    def poison(model: nn.Module) -> None:
        model.layers[1].mlp.down_proj.weight._local_tensor.view(-1)[-3] = float("nan")

    scenarios.stops_every_rank_at_nan(fsdp(env), poison)


@case(2)
def refuses_siblings_in_different_units(env: Env) -> None:
    scenarios.refuses_siblings_in_different_units(fsdp(env))


@case(2)
def refuses_backward_after_a_step(env: Env) -> None:
    scenarios.refuses_backward_after_a_step(fsdp(env))


@case(2)
def another_models_step_does_no_harm(env: Env) -> None:
    scenarios.another_models_step_does_no_harm(fsdp(env))


@case(2, options=PLAIN)
def inference_comes_first(env: Env, **options: Any) -> None:
    scenarios.inference_comes_first(fsdp(env, **options))


def resharded(model: nn.Module) -> nn.Module:
    """Without backward FSDP2 leaves the root's own parameters unsharded."""
    model.reshard()
    return model


def load_full(model: nn.Module) -> None:
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(resharded(model), decoder(seed=1).state_dict(), options=options)


def load_shards(model: nn.Module) -> None:
    model.load_state_dict({name: value * 3.0 for name, value in get_model_state_dict(resharded(model)).items()})


def load_assign(model: nn.Module) -> None:
    state = {name: nn.Parameter(value.detach() * 3.0) for name, value in resharded(model).state_dict().items()}
    model.load_state_dict(state, assign=True)


def write_aliases(model: nn.Module) -> None:
    """What a checkpoint reader does."""
    for value in resharded(model).state_dict().values():
        value.to_local().data.mul_(3.0)


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in resharded(model).parameters():
            parameter.mul_(3.0)


def step_elsewhere(model: nn.Module) -> None:
    """An optimizer over copies, which are written back into memory that PyTorch does not watch."""
    shards = [p._local_tensor for p in resharded(model).parameters()]
    copies = [nn.Parameter(shard.clone()) for shard in shards]
    optimizer = torch.optim.SGD(copies, lr=4.0)  # minus three times the weight
    for copied in copies:
        copied.grad = copied.detach().clone()
    optimizer.step()
    for shard, copied in zip(shards, copies, strict=True):
        shard.data.copy_(copied)


def write_local(model: nn.Module) -> None:
    for parameter in resharded(model).parameters():
        parameter._local_tensor.data.mul_(3.0)


@case(2, change={
    change.__name__: {"change": change, "noticed": change is not write_local}
    for change in (load_full, load_shards, load_assign, write_aliases, write_in_place, step_elsewhere, write_local)
})  # fmt: skip
def notices(env: Env, change: Callable[[nn.Module], None], noticed: bool) -> None:
    scenarios.notices(fsdp(env), change, noticed)


@case(2, options=PLAIN)
def an_unnoticed_change_is_an_error_at_the_next_sync(env: Env, **options: Any) -> None:
    """Training goes on with the old global scale, so the engine would get other weights than it computes with."""
    model = fsdp(env, **options)(decoder())
    loss_of(model(batch(0))).backward()
    list(nq.packed_weights(model))
    for p in model.parameters():
        p.to_local().detach().mul_(3)
    with pytest.raises(nq.StaleWeightsError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        list(nq.packed_weights(model))
    nq.refresh(model)
    list(nq.packed_weights(model))
    OPTIMIZERS["fused"](model.parameters()).step()  # is noticed, whatever it does to the scale
    list(nq.packed_weights(model))


@case(2)
def a_step_while_weights_are_read_is_an_error(env: Env) -> None:
    model = fsdp(env)(decoder())
    step = OPTIMIZERS["fused"](model.parameters())
    loss_of(model(batch(0))).backward()
    stream = nq.packed_weights(model)
    next(stream)
    step.step()
    with pytest.raises(nq.MismatchError, match="while packed_weights was being read"):
        list(stream)
    list(nq.packed_weights(model))


@case(2, inside={"layer": {"whole": False}, "whole": {"whole": True}})
def compiles(env: Env, whole: bool) -> None:
    sharding = fsdp(env)

    def wrap(model: nn.Module) -> nn.Module:
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=not whole) if not whole else None
        sharded = sharding.wrap(model, Layer)
        if whole:
            sharded.compile(backend="aot_eager")
        return sharded

    scenarios.compiles(sharding, wrap)


@case(2)
def frozen_weights_are_looked_at_once(env: Env) -> None:
    scenarios.frozen_weights_are_looked_at_once(fsdp(env))


@case(2)
def a_layer_called_outside_its_unit_is_refused(env: Env) -> None:
    model = fsdp(env)(decoder())
    model(batch(0))
    with pytest.raises(nq.UserError, match=r"layers\.0\.mlp\.up_proj\.weight is used while FSDP shards it"):
        model.layers[0].mlp.up_proj(batch(0))


@case(2)
def weights_loaded_after_sharding_on_meta(env: Env) -> None:
    sharding = fsdp(env)
    sharded = sharding(decoder().to("meta"))
    sharded.to_empty(device=env.device)
    set_model_state_dict(sharded, decoder(seed=1).state_dict(), options=StateDictOptions(full_state_dict=True))
    assert_equal_forward(sharded(batch(0)), Reference(decoder(seed=1))(batch(0)))


@case(2)
def autocast_over_fp32_shards(env: Env) -> None:
    model, reference = fsdp(env)(decoder()), Reference(decoder())
    with torch.autocast(env.device, torch.bfloat16):
        y, expected = model(batch(0)), reference(batch(0))
    assert_equal_forward(y, expected)
    loss_of(y).backward()
    loss_of(expected).backward()
    grads = {canonical_name(n): p.grad.full_tensor() for n, p in model.named_parameters()}
    assert_same(grads, {n: p.grad for n, p in reference.masters.named_parameters()})


two, two_gpus, test_two_processes, test_two_gpus = of_two(sys.modules[__name__])
