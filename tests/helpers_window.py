"""Training with sharded weights beside training in one process: what every kind of sharding has to get right.

If all ranks see the same batch, averaging their gradients is exact, so the masters must stay equal to the bit however
they are sharded. With different batches the order of sums differs. Each scenario runs on every rank.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import helpers_sharding
import torch
import torch.distributed as dist
from distributed.models import Layer
from helpers_sharding import (
    EXACT,
    ON,
    OPTIMIZERS,
    Reference,
    Sharding,
    assert_equal_forward,
    assert_same,
    batch,
    counted_renewals,
    decoder,
    loss_of,
    moe,
    net_bytes,
    quantized_tensors,
    tokens,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.multiprocessing.reductions import StorageWeakRef

import nvfp4_qat as nq
from nvfp4_qat.qat_module import packed_weights_of


def trains_as_one_process(
    sharding: Sharding, optimizer: str = "loop", build: Any = decoder, steps: int = 3, tolerance: float = 0.0
) -> None:
    """Forward and masters are equal to the bit, after several steps as well.

    With a tolerance: parameters that do not begin where a CPU's vectors do. The last few elements of an array are not
    updated by the same instructions as the others, so they may differ in the last bit.
    """
    sharding.config = EXACT
    model, reference = sharding(build()), Reference(build(), sharding.dtype, optimizer, EXACT)
    step = OPTIMIZERS[optimizer](model.parameters())
    for i in range(steps):
        y, expected = model(batch(i)), reference(batch(i))
        assert_equal_forward(y, expected)
        loss_of(y).backward()
        loss_of(expected).backward()
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(model), reference.state(), tolerance)


def averages_different_batches(sharding: Sharding) -> None:
    """Each rank sees its own batch: forward equal to the bit, masters up to the order of a sum of two."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, reference = sharding(decoder()), Reference(decoder(), sharding.dtype)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    reference.optimizer = torch.optim.SGD(reference.masters.parameters(), lr=0.1)
    for i in range(2):
        y = model(batch(i, rank))
        if i == 0:
            assert_equal_forward(y, reference(batch(i, rank)))
        loss_of(y).backward()
        (sum(loss_of(reference(batch(i, r))) for r in range(world)) / world).backward()
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(model), reference.state(), 1e-6 if sharding.dtype is None else 1e-2)


def accumulates_gradients(sharding: Sharding) -> None:
    """Three micro-batches a step, two of them without communication; the scales are made once a step."""
    model, reference = sharding(decoder()), Reference(decoder(), sharding.dtype, "fused")
    step = OPTIMIZERS["fused"](model.parameters())
    for i in range(2):
        with counted_renewals() as passes:
            for j in range(3):
                x = batch(10 * i + j)
                with sharding.no_sync(model) if j < 2 else contextlib.nullcontext():
                    y = model(x)
                    loss_of(y).backward()
                expected = reference(x)
                assert_equal_forward(y, expected)
                loss_of(expected).backward()
                reference.collect_grads() if sharding.dtype is None else None
        assert sum(passes) == 2 * 7 and len(passes) == 2, passes  # seven weights in each of two units, once
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(model), reference.state(), 0.0 if sharding.dtype is None else 1e-2)


def does_not_read_ahead(sharding: Sharding) -> None:
    """Where FSDP gathers the next unit early, its weights may not be there yet when this unit's scales are made."""
    model = sharding(decoder())
    step = OPTIMIZERS["fused"](model.parameters())
    for i in range(3):
        with counted_renewals() as passes:
            loss_of(model(batch(i))).backward()
        assert passes == [7, 7], passes
        step.step()


def clips_gradients(sharding: Sharding) -> None:
    """The norm is a sum over shards, in another order."""
    model, reference = sharding(decoder()), Reference(decoder(), sharding.dtype)
    loss_of(model(batch(0))).backward()
    loss_of(reference(batch(0))).backward()
    reference.collect_grads()
    norm = sharding.clip(model, 0.01)
    expected = nn.utils.clip_grad_norm_(reference.masters.parameters(), 0.01)
    assert norm > 0.01 and abs(float(norm) / float(expected) - 1) < 1e-6, (norm, expected)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    reference.optimizer = torch.optim.SGD(reference.masters.parameters(), lr=1.0)
    reference.step()
    assert_same(sharding.masters(model), reference.state(), 1e-6)


def checkpoints_activations(sharding: Sharding, implementation: CheckpointImpl) -> None:
    """Recomputation sees the same 4-bit weights, and no scale is made again for it."""
    model, reference = decoder(), Reference(decoder(), sharding.dtype)
    nq.apply_qat(model, ON)
    wrapper = lambda m: checkpoint_wrapper(m, checkpoint_impl=implementation)  # noqa: E731
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: isinstance(m, Layer))
    sharded = sharding.wrap(model, type(model.layers[0]))
    step = OPTIMIZERS["loop"](sharded.parameters())
    for i in range(2):
        x = batch(i).requires_grad_()  # reentrant checkpointing needs an input with a gradient
        with counted_renewals() as passes:
            y = sharded(x)
            loss_of(y).backward()
        assert len(passes) == 2, passes
        expected = reference(batch(i))
        assert_equal_forward(y, expected)
        loss_of(expected).backward()
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(sharded), reference.state())


def trains_experts(sharding: Sharding, implementation: str, checkpoint: bool = False) -> None:
    """Fused experts of transformers, sharded with their decoder layer."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    torch.use_deterministic_algorithms(True, warn_only=True)
    model, reference = moe(implementation), moe(implementation)
    if sharding.dtype is not None:  # parameters only: mixed precision leaves buffers alone
        for parameter in reference.parameters():
            parameter.data = parameter.data.to(sharding.dtype)
    nq.apply_qat(reference, ON)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    sharded = sharding(model, Qwen3MoeDecoderLayer)
    y, expected = sharded(tokens()).logits, reference(tokens()).logits
    assert_equal_forward(y, expected)
    loss_of(y).backward()
    loss_of(expected).backward()
    torch.optim.SGD(sharded.parameters(), lr=1.0).step()
    with torch.no_grad():
        want = {n: p.float() for n, p in moe(implementation).named_parameters()}
        for name, p in reference.named_parameters():
            if p.grad is not None:
                want[name] -= p.grad.float()
    assert_same(sharding.masters(sharded), want)
    torch.use_deterministic_algorithms(False)


def holds_no_copy_after_reshard(
    sharding: Sharding, build: Callable[[], nn.Module], unit: type[nn.Module], x: Callable[[], Tensor]
) -> None:
    """Between forward and backward nothing is held that training without QAT does not hold, after backward nothing."""

    def forward(model: nn.Module) -> Tensor:
        y = model(x())
        return loss_of(getattr(y, "logits", y))

    held = []
    for quantize in (False, True):
        model = build()
        sharded = sharding(model, unit) if quantize else sharding.wrap(model, unit)
        forward(sharded).backward()  # what is allocated once
        samples = []
        with quantized_tensors() if quantize else contextlib.nullcontext() as alive:
            for _ in range(5):  # now and then a thread of the backend is the one that frees, which does not count
                bytes_held, loss = net_bytes(lambda: forward(sharded))  # noqa: B023
                samples.append(bytes_held)
                assert alive is None or alive() == 0, f"{alive()} bytes of 4-bit weights not freed after forward"
                loss.backward()
                del loss
                assert alive is None or alive() == 0, f"{alive()} bytes of 4-bit weights not freed after backward"
        held.append(int(statistics.median(samples)))
    # Bytes of a weight: a generation number, an amax, a global scale; CUDA rounds up to 512.
    each = 64 if helpers_sharding.DEVICE == "cpu" else 1024
    slack = each * len(nq.qat_plan(sharded).quantized)
    assert held[1] - held[0] <= slack, f"{held[1] - held[0]} bytes more held after forward than without QAT"


def holds_no_copy_of_linear_layers(sharding: Sharding) -> None:
    holds_no_copy_after_reshard(sharding, decoder, Layer, lambda: batch(0))


def holds_no_copy_of_experts(sharding: Sharding) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    holds_no_copy_after_reshard(sharding, moe, Qwen3MoeDecoderLayer, tokens)


def frees_what_was_there_before(sharding: Sharding) -> None:
    """A model that has run before it is sharded leaves neither packed copies nor whole masters behind."""
    model = decoder()
    nq.apply_qat(model, ON)
    model(batch(0))
    weights = list(packed_weights_of(model))
    old = [StorageWeakRef(weight.master().untyped_storage()) for weight in weights]
    old += [StorageWeakRef(weight.value.packed.untyped_storage()) for weight in weights if weight.value]
    assert len(old) == 28
    sharded = sharding.wrap(model, Layer)
    assert_equal_forward(sharded(batch(1)), Reference(decoder())(batch(1)))
    gc.collect()
    assert all(ref.expired() for ref in old)


def stops_every_rank_at_nan(sharding: Sharding, poison: Callable[[nn.Module], None]) -> None:
    """NaN in the part of layers.1.mlp.down_proj that one rank holds."""
    model = sharding(decoder())
    loss_of(model(batch(0))).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    if dist.get_rank() == dist.get_world_size() - 1:
        poison(model)
    try:
        model(batch(0))
    except nq.UserError as error:
        assert "layers.1.mlp.down_proj.weight holds NaN" in str(error), error
    else:
        raise AssertionError("NaN went unnoticed")


def refuses_siblings_in_different_units(sharding: Sharding) -> None:
    """q, k and v in units of their own cannot have one amax."""
    model = sharding(decoder(), nn.Linear)
    try:
        model(batch(0))
    except nq.UserError as error:
        message = str(error)
        assert "layers.0.self_attn.q_proj.weight" in message and "layers.0.self_attn.v_proj.weight" in message
        assert "one unit" in message and "fully_shard" in message
    else:
        raise AssertionError("siblings in different units went unnoticed")


def notices(sharding: Sharding, change: Callable[[nn.Module], None], noticed: bool = True) -> None:
    """After a change of the masters, forward computes with the new ones; if the change is invisible, after refresh."""
    model = sharding(decoder())
    model(batch(0))
    change(model)
    y = model(batch(1))
    twin = decoder()
    twin.load_state_dict(sharding.masters(model))
    expected = Reference(twin, sharding.dtype)(batch(1))
    if not noticed:
        assert not torch.equal(y, expected), "this change is noticed: update the documentation"
        nq.refresh(model)
        y = model(batch(1))
    assert_equal_forward(y, expected)


def refuses_backward_after_a_step(sharding: Sharding) -> None:
    """A backward must see the weights of its forward."""
    model = sharding(decoder())
    step = OPTIMIZERS["fused"](model.parameters())
    loss_of(model(batch(0))).backward()
    y = model(batch(0))
    step.step()
    model(batch(1))
    try:
        loss_of(y).backward()
    except nq.MismatchError as error:
        assert "changed between" in str(error)
    else:
        raise AssertionError("backward with other weights than forward went unnoticed")


def another_models_step_does_no_harm(sharding: Sharding) -> None:
    """An optimizer step between forwards and backwards of a model it does not own."""
    model = sharding(decoder())
    loss = loss_of(model(batch(0)))
    other = nn.Linear(4, 4)
    other(torch.ones(4)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    model(batch(1))
    loss.backward()


def inference_comes_first(sharding: Sharding) -> None:
    """What is made for an evaluation serves training; a step in between is seen by evaluations as well.

    The first is without inference mode, because FSDP itself cannot train with what it allocates there.
    """
    model, reference = sharding(decoder()), Reference(decoder(), sharding.dtype)
    step = OPTIMIZERS["fused"](model.parameters())
    reference.optimizer = OPTIMIZERS["fused"](reference.masters.parameters())
    for i in range(2):
        with torch.inference_mode() if i else torch.no_grad():
            assert_equal_forward(model.eval()(batch(i)), reference(batch(i)))
        loss_of(model.train()(batch(i))).backward()
        loss_of(reference(batch(i))).backward()
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(model), reference.state())


def compiles(sharding: Sharding, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Compiled layers inside their units see every step; the sums of a compiled softmax are in another order."""
    torch._dynamo.reset()
    model = decoder()
    nq.apply_qat(model, ON)
    sharded = wrap(model)
    reference = Reference(decoder(), sharding.dtype)
    step = OPTIMIZERS["fused"](sharded.parameters())
    for i in range(3):
        y, expected = sharded(batch(i)), reference(batch(i))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        loss_of(y).backward()
        loss_of(expected).backward()
        step.step()
        step.zero_grad()
        reference.step()
    assert_same(sharding.masters(sharded), reference.state(), 1e-3)


def frozen_weights_are_looked_at_once(sharding: Sharding) -> None:
    """An optimizer step cannot change what needs no gradient: the base under LoRA."""
    model = decoder()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    sharded = sharding(model)
    step = OPTIMIZERS["fused"](p for p in sharded.parameters() if p.requires_grad)
    with counted_renewals() as passes:
        for i in range(3):
            loss_of(sharded(batch(i))).backward()
            step.step()
    assert len(passes) == 2, passes
