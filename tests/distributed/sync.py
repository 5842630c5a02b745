"""Packed weights from shards are the bytes of one process, in bounded memory; checkpoints are the same files."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers_distributed import Env, case
from small_models import qwen3, qwen3_moe
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

import nvfp4_qat as nq
from distributed.experts import TokenPair, decoder_layers, experts_apart, moe
from distributed.instruments import Collectives, allocated, raises_everywhere, settled
from distributed.models import decoder, uneven
from distributed.pair import MIXED, ON, Pair, adamw, expected_gather, layers, linears, nothing, same, same_stream, shard

BF16 = functools.partial(decoder, dtype=torch.bfloat16)
AMAX = nq.QATConfig(enable=True, global_scale="amax")


@case(
    2,
    setup={
        "fp32": {},
        "bf16": {"make": BF16},
        "mixed": {"policy": MIXED},
        "unit-per-layer": {"units": linears},
        "one-unit": {"units": nothing, "policy": MIXED},
        "uneven": {"make": uneven},
        "amax-scales": {"config": AMAX},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "never-reshard": {"reshard_after_forward": False, "policy": MIXED},
    },
)
def streams(env: Env, **setup: Any) -> None:
    """Before the first forward, between steps, in both layouts: the tensors of module mode, byte for byte."""
    pair = Pair(env, **setup)
    both_layouts(pair)
    for _ in range(2):
        pair.step()
        both_layouts(pair)


@case(
    2,
    setup={
        "eager": {"make": moe, "units": decoder_layers},
        "three-experts": {"make": functools.partial(moe, experts=3), "units": decoder_layers, "policy": MIXED},
        "one-expert": {"make": functools.partial(moe, experts=1), "units": decoder_layers},
        "experts-apart": {"make": moe, "units": experts_apart, "policy": MIXED},
    },
)
def streams_of_experts(env: Env, **setup: Any) -> None:
    """Per expert and projection, or fused; global scales per expert."""
    pair = TokenPair(env, **setup)
    for _ in range(2):
        both_layouts(pair)
        pair.step()


def both_layouts(pair: Pair) -> None:
    model = pair.twin.model
    if pair.twin.compute is not model:  # mixed precision: module mode on the masters themselves gives the bytes
        model = pair.plain
        model.load_state_dict(pair.twin.model.state_dict())
        if not hasattr(pair, "sender"):
            nq.apply_qat(model, pair.plan.config)
            pair.sender = model
    for layout in ("checkpoint", "fused"):
        found = list(nq.packed_weights(pair.model, layout=layout))
        same_stream(iter(found), nq.packed_weights(model, layout=layout))
        names: list[Any] = [None] * pair.env.world
        dist.all_gather_object(names, [name for name, _ in found])
        assert all(other == names[0] for other in names), "ranks get the tensors in different orders"


@case(2, receiver={"rank-0": {"receiver": 0}, "rank-1": {"receiver": 1}})
def one_receiver(env: Env, receiver: int) -> None:
    """The others take part and get nothing."""
    pair = Pair(env)
    pair.step()
    for layout in ("checkpoint", "fused"):
        stream = nq.packed_weights(pair.model, layout=layout, ranks=receiver)
        if env.rank == receiver:
            same_stream(stream, nq.packed_weights(pair.twin.model, layout=layout))
        else:
            assert list(stream) == []
    pair.step()


@case(2)
def wrong_receivers_and_layouts(env: Env) -> None:
    pair = Pair(env)
    for ranks in (2, -1, "none", True):
        raises_everywhere(nq.UserError, lambda: list(nq.packed_weights(pair.model, ranks=ranks)))  # noqa: B023
    raises_everywhere(nq.UserError, lambda: list(nq.packed_weights(pair.model, layout="flat")))
    pair.step()


@case(2)
def a_stream_left_early(env: Env) -> None:
    """Every rank stops at the same tensor; nothing is left half done."""
    pair = Pair(env, policy=MIXED)
    pair.step()
    for stop in (0, 1, 7):
        stream = nq.packed_weights(pair.model)
        for i, _ in enumerate(stream):
            if i == stop:
                break
        del stream
        gc.collect()
    pair.step()
    both_layouts(pair)


@case(2)
def a_stream_interrupted_by_a_step(env: Env) -> None:
    """Half of the stream would be of the old weights and half of the new: every rank is told."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    pair.step()
    stream = nq.packed_weights(pair.model)
    for _ in range(4):
        next(stream)
    pair.step()
    pair.compare_forward()
    raises_everywhere(nq.MismatchError, lambda: list(stream))
    both_layouts(pair)
    pair.step()


@case(2)
def a_stream_of_unsharded_weights(env: Env) -> None:
    """After an evaluation with reshard_after_forward=False every parameter is still whole."""
    pair = Pair(env, reshard_after_forward=False)
    pair.step()
    pair.compare_forward()
    both_layouts(pair)
    pair.compare_forward()
    pair.step()


@case(2)
def a_stream_between_forward_and_backward(env: Env) -> None:
    """A sync in the middle of a step changes nothing of it."""
    from distributed.pair import loss_of

    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    out = pair.model(pair.inputs()[env.rank])
    same_stream(nq.packed_weights(pair.model), nq.packed_weights(pair.twin.model))
    loss_of(out).backward()
    _, total = pair.expect([[0]])
    pair.compare_gradients(total)
    pair.update()


@case(2)
def bytes_sent(env: Env) -> None:
    """Packed bytes once, and what is not quantized once, in the dtype a checkpoint has; no 16-bit copy of a weight."""
    pair = Pair(env, make=functools.partial(decoder, width=128, hidden=256), policy=MIXED)
    pair.compare_forward()
    quantized, rest = expected_gather(pair, env.world)
    with Collectives() as seen:
        for _ in nq.packed_weights(pair.model):
            pass
    sent = sum(call.nbytes for call in seen.calls if not call.kind.startswith("allreduce"))
    fp32 = 2 * rest  # masters of what is not quantized may be sent before or after they are rounded
    assert quantized + rest <= sent + 1 and sent <= quantized + fp32 + 16 * (len(layers(pair.model)) + 1), (
        f"{sent} bytes; packed {quantized}, others {rest} to {fp32}"
    )


@case(2, ranks={"all": {"ranks": "all"}, "one": {"ranks": 0}})
def memory_of_a_stream(env: Env, ranks: Any) -> None:
    """At no time more than a few layers' packed weights beside the model, whatever the depth."""
    pair = Pair(env, make=functools.partial(decoder, depth=12, width=256, hidden=512))
    pair.compare_forward()
    pair.forget_twin()
    model: Any = pair.model
    model.reshard()
    packed_layer = sum(p.numel() for p in model.layers[0].parameters()) * 9 // 16
    for name, _ in nq.packed_weights(model, ranks=ranks):  # what is made once is made now
        assert name
    gc.collect()
    start = allocated(env.device)
    with at_collectives(lambda: allocated(env.device)) as samples:
        for _ in nq.packed_weights(model, ranks=ranks):
            samples.append(allocated(env.device))
    assert len(samples) >= 12
    peak = max(samples) - start
    # A layer's gathered bytes and the tensors made of them; those of the layer before, which the loop and a thread of
    # the backend may still hold.
    assert peak <= 4.5 * packed_layer, f"{peak} bytes beside the model, one of the 12 layers has {packed_layer}"
    gc.collect()
    kept = settled(lambda: allocated(env.device) - start, packed_layer // 2)
    assert kept <= packed_layer // 2, f"{kept} bytes stay"  # a CPU's account holds Python's objects as well


@contextlib.contextmanager
def at_collectives(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Takes a measurement at each all-gather and each gather to one rank, after it."""
    samples: list[int] = []
    originals = {}

    def watched(original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            work = original(*args, **kwargs)
            samples.append(measure())
            return work

        return method

    for name in (*Collectives.GATHER, "gather"):
        if name in vars(dist.ProcessGroup):
            originals[name] = vars(dist.ProcessGroup)[name]
            setattr(dist.ProcessGroup, name, watched(getattr(dist.ProcessGroup, name)))
    try:
        yield samples
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def trained(env: Env, model: nn.Module, gather: bool) -> nn.Module:
    """A model with weights of its own, sharded or not."""
    nq.apply_qat(model, ON, gather="nvfp4" if gather else None)
    if gather:
        shard(model, lambda m: list(m.model.layers), mesh=env.mesh())
    return model


@case(2, make={"dense": {"make": qwen3}, "experts": {"make": qwen3_moe}})
def checkpoints_are_the_same_files(env: Env, make: Callable[[], Any]) -> None:
    """save_checkpoint on a sharded model and in one process: the same files to the byte; they load and verify."""
    sharded, single = trained(env, make().to(env.device), True), trained(env, make().to(env.device), False)
    ids = torch.arange(16, device=env.device).view(2, 8)
    for model in (sharded, single):
        optimizer = adamw(model.parameters())
        model(input_ids=ids).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in sharded.named_parameters():
        same(p.full_tensor().detach(), dict(single.named_parameters())[name].detach(), name)
    with torch.no_grad():
        sharded(input_ids=ids)  # leaves the root unsharded
    nq.save_checkpoint(sharded, env.path / "sharded")
    if env.rank == 0:
        nq.save_checkpoint(single, env.path / "single")
        ours, theirs = files(env.path / "sharded"), files(env.path / "single")
        assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
        for name, content in theirs.items():
            assert ours[name] == content, f"{name} differs"
        nq.verify_checkpoint(env.path / "sharded", single)
        restored = dict(nq.load_checkpoint(env.path / "sharded").named_parameters())
        plan, packed = nq.qat_plan(single), dict(nq.packed_weights(single, layout="fused"))
        for entry in plan.quantized:
            stem = entry.name.removesuffix("weight") if entry.name.endswith(".weight") else f"{entry.name}."
            codes, scale, divisor = (packed[f"{stem}weight_{part}"] for part in ("packed", "scale", "global_scale"))
            g = divisor.reciprocal() if entry.batch_dims else divisor.reciprocal()[0]
            same(restored[entry.name], nq.PackedNVFP4(codes, scale, g).dequantize(), f"{entry.name}, read back")
    env.barrier()


@case(2)
def a_checkpoint_that_cannot_be_written(env: Env) -> None:
    """Rank 0 cannot write: all ranks raise, in time, and the model goes on."""
    model = trained(env, qwen3().to(env.device), True)
    (env.path / "taken").mkdir(exist_ok=True)
    (env.path / "taken" / f"file{env.rank}").write_text("")
    env.barrier()
    message = raises_everywhere(nq.UserError, lambda: nq.save_checkpoint(model, env.path / "taken"))
    assert "taken" in message or "rank 0" in message, message
    nq.save_checkpoint(model, env.path / "free")
    env.barrier()
    assert (env.path / "free" / "config.json").exists()


@case(2)
def nan_in_what_is_not_quantized(env: Env) -> None:
    """An exported tensor that holds NaN on one rank: every rank raises with its name."""
    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    with torch.no_grad():
        local: Tensor = pair.parameters()["lm_head.weight"].to_local()
        local[0, 0] = float("nan") if env.rank == 1 else local[0, 0]
    message = raises_everywhere(nq.UserError, lambda: list(nq.packed_weights(pair.model)))
    assert "lm_head.weight" in message, message
    message = raises_everywhere(nq.UserError, lambda: list(nq.packed_weights(pair.model, ranks=1)))
    assert "lm_head.weight" in message or "rank" in message, message


@case(2)
def the_plan_and_the_flip_rate(env: Env) -> None:
    """What reads the stream reads this one too: the plan's audit, the tracker of changed bytes."""
    from nvfp4_qat.metrics import FlipTracker

    pair = Pair(env)
    tracker = FlipTracker()
    for _ in range(2):
        names = [name for name, _ in tracker.watch(nq.packed_weights(pair.model))]
        pair.step()
    quantized = [name.removesuffix("_packed") for name in names if name.endswith("weight_packed")]
    nq.qat_plan(pair.model).audit(quantized)
    assert quantized
