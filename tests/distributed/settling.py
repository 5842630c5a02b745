"""Training does not wait until the weights it packs are known to be good: when they are looked at, and what is told."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from helpers_distributed import Env, case
from torch import Tensor
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq
from distributed.instruments import local, raises_everywhere
from distributed.misuse import NAME, SECONDS, poison
from distributed.models import decoder
from distributed.pair import MIXED, ON, Pair, as_bytes, full, layers, loss_of, same, shard
from nvfp4_qat.gather import AHEAD, gather_of

DEEP = functools.partial(decoder, depth=4)


def packed_without_waiting(env: Env, **options: Any) -> Pair:
    """A pair after a step, which the next packing needs not to wait."""
    pair = Pair(env, make=DEEP, policy=MIXED, reshard_after_forward=True, **options)
    pair.step()
    return pair


def repair(pair: Pair, good: Tensor) -> None:
    """Give the poisoned weight its values back: training goes on as if nothing had been."""
    whole: Any = pair.model
    for unit in (*whole.layers, whole):
        unit.reshard()
    with torch.no_grad():
        pair.parameters()[NAME].to_local().copy_(good.tensor_split(2)[pair.env.rank])
    pair.compare_masters()
    pair.compare_forward("output after the repair")
    pair.step()


@case(2)
def gathers_after_packing(env: Env) -> None:
    """The first gather packs and leaves the weights to be looked at, the one `AHEAD` after it does that."""
    pair = packed_without_waiting(env)
    gather: Any = gather_of(pair.model)
    units: Any = layers(pair.model)
    for i, unit in enumerate(units):
        unit.unshard()
        assert gather.settled == (i >= AHEAD), i
    for unit in units:
        unit.reshard()
    pair.compare_forward()
    pair.step()


@case(2, rank={"rank-0": 0, "rank-1": 1})
def nan_at_the_third_gather(env: Env, rank: int) -> None:
    """Every rank raises there, also where no forward of the model is under way."""
    pair = packed_without_waiting(env)
    good = full(pair.parameters()[NAME]).clone()
    poison(pair, rank, float("nan"))
    units: Any = layers(pair.model)
    for unit in units[:AHEAD]:
        unit.unshard()
    began = time.monotonic()
    message = raises_everywhere(nq.UserError, units[AHEAD].unshard)
    assert NAME in message and time.monotonic() - began < SECONDS, message
    message = raises_everywhere(nq.UserError, lambda: pair.model(pair.inputs()[env.rank]))  # packed anew, seen again
    assert NAME in message, message
    repair(pair, good)


@case(2, depth={"one-unit": 1, "two-units": 2})
def nan_in_few_units(env: Env, depth: int) -> None:
    """With fewer gathers than that, the end of the forward tells: in training and in evaluation."""
    pair = Pair(env, make=functools.partial(decoder, depth=depth), policy=MIXED, reshard_after_forward=True)
    pair.step()
    name = f"layers.{depth - 1}.mlp.up_proj.weight"
    poison(pair, 1, float("nan"), name)
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            message = raises_everywhere(nq.UserError, lambda: pair.model(pair.inputs()[env.rank]))
        assert name in message, message
        pair.model.reshard()


@case(2)
def nan_before_the_optimizer(env: Env) -> None:
    """An optimizer's step is refused while its weights are not looked at, and not another optimizer's."""
    pair = packed_without_waiting(env)
    good = full(pair.parameters()[NAME]).clone()
    poison(pair, 0, float("nan"))
    for p in pair.parameters().values():
        p.grad = DTensor.from_local(
            torch.ones_like(local(p)), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
    held = {name: full(p).clone() for name, p in pair.parameters().items()}
    units: Any = layers(pair.model)
    units[0].unshard()
    units[0].reshard()
    other = torch.nn.Parameter(torch.ones(4, device=env.device))
    other.grad = torch.ones_like(other)
    torch.optim.SGD([other], lr=1.0).step()
    assert other.eq(0).all()
    message = raises_everywhere(nq.UserError, pair.optimizer.step)
    assert NAME in message, message
    for name, p in pair.parameters().items():
        same(as_bytes(full(p)), as_bytes(held[name]), f"master {name} after a step that was refused")
    pair.optimizer.zero_grad()
    repair(pair, good)


@case(2)
def nan_before_an_export(env: Env) -> None:
    """Weights that are not looked at yet are, before a stream or a refresh begins."""
    for use in (lambda m: list(nq.packed_weights(m)), nq.refresh):
        pair = packed_without_waiting(env)
        poison(pair, 1, float("nan"))
        unit: Any = layers(pair.model)[0]
        unit.unshard()
        unit.reshard()
        message = raises_everywhere(nq.UserError, functools.partial(use, pair.model))
        assert NAME in message, message


@case(2)
def a_step_waits_for_nothing(env: Env) -> None:
    """On a GPU no part of a training step stops the host, not even packing."""
    model = DEEP().to(env.device)
    nq.apply_qat(model, ON, gather="nvfp4")
    shard(model, layers, mesh=env.mesh(), mp_policy=MIXED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, foreach=True)
    x = torch.ones(2, 5, 64, device=env.device)
    gather: Any = gather_of(model)
    for i in range(6):
        if env.device == "cuda" and i == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss_of(model(x)).backward()
            assert gather.settled and not gather.stale
            optimizer.step()
            optimizer.zero_grad()
        finally:
            if env.device == "cuda" and i == 5:
                torch.cuda.set_sync_debug_mode("default")
    before = gather.version
    model(x)
    assert gather.version == before + len(layers(model)), "nothing was packed: this test sees nothing"
