"""Gather mode with what else FSDP2 programs do: checkpointing, compilation, prefetching, unsharding by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_api
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import nvfp4_qat as nq
from distributed.instruments import local
from distributed.models import Decoder, decoder, uneven
from distributed.pair import MIXED, Pair, Units, batch, full, layers, linears, loss_of, plain_adamw, same, shard
from nvfp4_qat.gather import gather_of
from nvfp4_qat.gather_param import GatheredParam


class Checkpointed(Decoder):
    """Recomputes each layer in backward; checkpointing is outside of FSDP's units."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = x.detach().requires_grad_()  # the reentrant kind looks at its inputs
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.lm_head(self.norm(x))


class Reentrant(Checkpointed):
    reentrant = True


def seeded(kind: type[Decoder]) -> Decoder:
    torch.manual_seed(0)
    return kind()


def wrapped_layers(model: Decoder, units: Units, **options: Any) -> nn.Module:
    """Checkpointing inside of FSDP's units, by wrapper modules."""
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    return shard(model, units, **options)


def wrapped_parts(model: Decoder, units: Units, **options: Any) -> nn.Module:
    """Selective: the MLPs only, without units of their own."""
    for layer in model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)
    return shard(model, units, **options)


@case(
    2,
    setup={
        "outside": {"make": functools.partial(seeded, Checkpointed), "policy": MIXED},
        "outside-reentrant": {"make": functools.partial(seeded, Reentrant), "policy": MIXED},
        "outside-every-linear": {"make": functools.partial(seeded, Checkpointed), "units": linears},
        "wrapped-layers": {"wrap": wrapped_layers, "policy": MIXED},
        "wrapped-parts": {"wrap": wrapped_parts, "policy": MIXED},
    },
)
def activation_checkpointing(env: Env, **setup: Any) -> None:
    pair = Pair(env, **setup)
    for _ in range(2):
        pair.step(micros=2)


def compiled(backend: str, model: Decoder, units: Units, **options: Any) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return shard(model, units, **options)


@case(2)
def compiled_blocks(env: Env) -> None:
    """Blocks compiled as one graph each; this backend keeps every operation, so results stay equal to the bit."""

    def graphs() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    pair = Pair(env, wrap=functools.partial(compiled, "aot_eager"), policy=MIXED)
    before = graphs()
    for _ in range(3):
        pair.step()
    pair.compare_forward()
    ours = graphs() - before
    torch._dynamo.reset()
    plain = compiled("aot_eager", pair.plain, layers, mesh=env.mesh(), mp_policy=MIXED)
    before = graphs()
    for step in range(3):
        loss_of(plain(batch(env.rank, step, env.device))).backward()
    with torch.no_grad():
        plain(batch(env.rank, 0, env.device))
    assert ours == graphs() - before, f"{ours} graphs were compiled, {graphs() - before} without the package"


@case(2)
def compiled_blocks_of_inductor(env: Env) -> None:
    """Inductor reorders sums, so outputs are close and not equal: fp32, relative 1e-4 after sums of 64 and 96 terms."""
    torch._dynamo.reset()
    pair = Pair(env, wrap=functools.partial(compiled, "inductor"))
    for _ in range(2):
        x = pair.inputs()[env.rank]
        out = pair.model(x)
        loss_of(out).backward()
        (expected,), total = pair.expect([[0]])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for name, p in pair.parameters().items():
            scale = float(total[name].abs().max())
            torch.testing.assert_close(full(p.grad), total[name], rtol=1e-3, atol=1e-4 * scale)
        pair.twin.give({name: full(p.grad) for name, p in pair.parameters().items()})
        pair.update()


class Autocast(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x)


@case(2)
def autocast(env: Env) -> None:
    """Masters are fp32 and the unsharded weight is too; autocast rounds it to bf16, which loses nothing."""
    pair = Pair(env, make=functools.partial(seeded, Autocast))
    for _ in range(3):
        pair.step(micros=2)


@case(2)
def explicit_prefetching(env: Env) -> None:
    def wrap(model: Decoder, units: Units, **options: Any) -> nn.Module:
        shard(model, units, **options)
        blocks: list[Any] = list(model.layers)
        for here, there in zip(blocks, blocks[1:], strict=False):
            here.set_modules_to_forward_prefetch([there])
            there.set_modules_to_backward_prefetch([here])
        model.set_modules_to_forward_prefetch([blocks[0]])
        return model

    pair = Pair(env, make=functools.partial(decoder, depth=4), policy=MIXED, wrap=wrap)
    for _ in range(3):
        pair.step()


def dequantized(pair: Pair, name: str) -> Tensor:
    """What the unsharded weight must be: the definition, from the twin's masters."""
    masters = {n: p.detach() for n, p in pair.twin.model.named_parameters()}
    group = [entry.name for entry in pair.plan.quantized if entry.group == pair.plan[name].group]
    g = nq.global_scale(torch.stack([nq.amax(masters[member]) for member in group]).amax())
    return nq.quantize(masters[name], g).dequantize(pair.twin.policy.param_dtype or masters[name].dtype)


@case(
    2,
    how={
        "sync": {"handle": False},
        "async": {"handle": True},
        "uneven": {"handle": False, "make": uneven},
        "uneven-async": {"handle": True, "make": uneven},
    },
)
def explicit_unshard(env: Env, handle: bool, make: Callable[[], nn.Module] = decoder) -> None:
    """Weights unsharded by hand are the dequantized ones, before the first forward and after each step."""
    pair = Pair(env, make=make, policy=MIXED)
    model: Any = pair.model
    for _ in range(3):
        units = [model, *model.layers]
        handles = [unit.unshard(async_op=handle) for unit in units]
        for waiting in handles:
            if waiting is not None:
                waiting.wait()
        for name, parameter in pair.parameters().items():
            assert not isinstance(parameter, DTensor), f"{name} is still sharded"
            if name in pair.plan:
                same(parameter.detach(), dequantized(pair, name), name)
        for unit in units:
            unit.reshard()
        assert all(isinstance(p, DTensor) for p in pair.parameters().values())
        pair.step()


@case(2)
def unshard_across_a_step(env: Env) -> None:
    """Unsharded weights do not outlive an optimizer step unnoticed: the next forward computes with new ones."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=False)
    pair.compare_forward()  # leaves everything unsharded
    pair.model.reshard()
    for layer in pair.model.layers:
        layer.reshard()
    for _ in range(2):
        pair.step()
        pair.model.set_reshard_after_forward(True)


@case(2, units={"unit-per-layer": {"units": layers}, "units-of-one-weight": {"units": linears}})
def optimizer_in_backward(env: Env, units: Units) -> None:
    """Every parameter has an optimizer of its own, which steps as soon as the gradient is there."""
    pair = Pair(env, units=units, policy=MIXED, optimizer=plain_adamw, reshard_after_forward=True)

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for parameter in pair.model.parameters():
        optimizer = plain_adamw([parameter])
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: step(optimizer))
    for _ in range(3):
        (expected,), gradients = pair.expect([[0]])
        out = pair.model(pair.inputs()[env.rank])
        same(out, expected, f"output of step {pair.count}")
        loss_of(out).backward()
        pair.twin.give(gradients)
        pair.twin_optimizer.step()
        pair.count += 1
        pair.compare_masters()
    pair.compare_forward()


class Gather(_fsdp_api.AllGather):
    """A user's own all-gather."""

    def __init__(self) -> None:
        self.calls = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.calls += 1
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


@case(2, when={"before": {"before": True}, "after": {"before": False}})
def custom_all_gather(env: Env, before: bool) -> None:
    """`set_custom_all_gather`, before the first gather and after it."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    if not before:
        pair.step()
    own = Gather()
    for unit in (pair.model, *layers(pair.model)):
        unit.set_custom_all_gather(own)
    for _ in range(2):
        pair.step()
    assert own.calls >= 2 * 2 * 3


@case(2)
def the_versions_tested_take_the_shortcut(env: Env) -> None:
    pair = Pair(env, policy=MIXED)
    pair.step()
    gather = gather_of(pair.model)
    assert gather is not None
    assert all(type(weight.fsdp_param) is GatheredParam for weight in gather.weights.values()), torch.__version__


@case(2)
def memory_from_the_process_group(env: Env) -> None:
    """Asked for when gathers have begun: the all-gather that FSDP2 puts in place is what gathers from then on."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    for enable in (False, True, False):
        pair.step()
        for unit in (pair.model, *layers(pair.model)):
            unit.set_allocate_memory_from_process_group_for_comm(enable)
        pair.step()


@case(2)
def other_methods_than_forward(env: Env) -> None:
    pair = Pair(env, policy=MIXED)

    def embed(self: Decoder, x: Tensor) -> Tensor:
        return self.self_attn(self.input_norm(x)) * 2

    layer: Any = pair.model.layers[0]
    pair.model(pair.inputs()[env.rank])  # the root runs first, as FSDP2 wants it
    type(layer).embed = embed
    register_fsdp_forward_method(layer, "embed")
    x = pair.inputs()[env.rank].to(torch.bfloat16)
    with torch.no_grad():
        pair.twin(pair.inputs()[env.rank])
        same(layer.embed(x), embed(pair.twin.compute.layers[0], x), "output")


@case(2)
def whole_tensors_of_masters(env: Env) -> None:
    """`full_tensor()`, arithmetic and norms of sharded parameters speak of the masters, unquantized."""
    pair = Pair(env)
    pair.step()
    masters = dict(pair.twin.model.named_parameters())
    for name, parameter in pair.parameters().items():
        assert isinstance(parameter, DTensor) and parameter.shape == masters[name].shape
        whole = parameter.full_tensor()
        assert type(whole) in (Tensor, nn.Parameter), type(whole)
        same(whole.detach(), masters[name].detach(), name)
        doubled = parameter.detach() * 2
        assert isinstance(doubled, DTensor)
        same(doubled.full_tensor(), masters[name].detach() * 2, name)
        torch.testing.assert_close(
            parameter.detach().norm().full_tensor(), masters[name].detach().norm(), rtol=1e-6, atol=0.0
        )
        assert type(parameter.grad) in (type(None), DTensor)
    state = [s for slots in pair.optimizer.state.values() for s in slots.values() if isinstance(s, DTensor)]
    assert state and all(type(local(s)) is Tensor for s in state), "optimizer states are not plain"


@case(2)
def layers_sharded_without_their_root(env: Env) -> None:
    """Every quantized weight is in a unit; norms and the head stay whole on each rank."""

    def wrap(model: Decoder, units: Units, **options: Any) -> nn.Module:
        for unit in units(model):
            fully_shard(unit, **options)
        return model

    pair = Pair(env, wrap=wrap, units=layers, optimizer=plain_adamw)
    for _ in range(2):
        out = pair.model(pair.inputs()[env.rank])
        loss_of(out).backward()
        for p in pair.model.parameters():  # what FSDP2 does not reduce
            if not isinstance(p, DTensor):
                torch.distributed.all_reduce(p.grad)
                p.grad /= env.world
        (expected,), total = pair.expect([[0]])
        same(out.detach(), expected, "output")
        pair.compare_gradients(total)
        pair.update()
