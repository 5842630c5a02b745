"""Misuse is refused with a reason, writes are noticed, faults stop every rank and leave masters as they were."""

from __future__ import annotations

import copy
import functools
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import nvfp4_qat as nq
from distributed.common import (
    MIXED,
    ON,
    Pair,
    as_bytes,
    full,
    linears,
    loss_of,
    nothing,
    raises_everywhere,
    same,
    same_stream,
    shard,
)
from distributed.models import Decoder, decoder, uneven

REFUSED = (nq.UserError, nq.MismatchError)
SECONDS = 20.0
"""What "no hang" means here: a fault is reported within this time; a collective would wait for minutes."""
NAME = "layers.1.mlp.up_proj.weight"


def prepared(env: Env, seed: int = 0) -> Decoder:
    model = decoder(seed=seed).to(env.device)
    nq.apply_qat(model, ON, gather="nvfp4")
    return model


def x_of(env: Env) -> Tensor:
    return torch.ones(2, 5, 64, device=env.device)


# --- misuse ---


@case(2)
def never_sharded(env: Env) -> None:
    model = prepared(env)
    message = raises_everywhere(REFUSED, lambda: model(x_of(env)))
    assert "layers.0." in message and "fully_shard" in message, message
    for name, parameter in model.named_parameters():  # also outside of a module
        if parameter.ndim == 2 and "lm_head" not in name:
            x = torch.ones(1, parameter.shape[1], device=env.device)
            for use in (lambda p, x: x @ p.t(), lambda p, x: nn.functional.linear(x, p), lambda p, x: (x * p).sum()):
                raises_everywhere(REFUSED, functools.partial(use, parameter, x))
            break


@case(2, units={"one-layer-of-two": {"of": 1}, "attention-only": {"of": "self_attn"}})
def partly_sharded(env: Env, of: Any) -> None:
    """Weights outside of every FSDP unit would be used unquantized: the error names one of those."""
    model = prepared(env)
    for layer in [model.layers[0]] if of == 1 else [layer.self_attn for layer in model.layers]:
        fully_shard(layer, mesh=env.mesh())
    message = raises_everywhere(REFUSED, lambda: model(x_of(env)))
    assert ("layers.1" if of == 1 else ".mlp.") in message, message


@case(2)
def ddp_instead_of_fsdp(env: Env) -> None:
    from torch.nn.parallel import DistributedDataParallel

    raises_everywhere(REFUSED, lambda: DistributedDataParallel(prepared(env))(x_of(env)))


@case(2)
def after_fully_shard(env: Env) -> None:
    model = shard(decoder(), mesh=env.mesh())
    message = raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather="nvfp4"))
    assert "before" in message and "fully_shard" in message, message
    model(x_of(env))  # unchanged


@case(2)
def applied_twice(env: Env) -> None:
    model = prepared(env)
    for gather in ("nvfp4", None):
        raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather=gather))  # noqa: B023
    shard(model, mesh=env.mesh())
    raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather="nvfp4"))
    model(x_of(env))
    module_mode = decoder().to(env.device)
    nq.apply_qat(module_mode, ON)
    raises_everywhere(nq.UserError, lambda: nq.apply_qat(module_mode, ON, gather="nvfp4"))


@case(2)
def wrong_arguments(env: Env) -> None:
    for value in ("nvfp8", "", True, 4):
        message = raises_everywhere(nq.UserError, lambda: nq.apply_qat(decoder(), ON, gather=value))  # type: ignore[arg-type]  # noqa: B023
        assert "gather" in message, message


@case(2)
def not_enabled(env: Env) -> None:
    """With enable=False the model stays as it is, gather or not."""
    import warnings

    model = decoder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nq.apply_qat(model, nq.QATConfig(enable=False), gather="nvfp4")
    assert any("enable" in str(w.message) for w in caught)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@case(2)
def fully_shard_twice(env: Env) -> None:
    """FSDP2's own refusal; the model goes on working."""
    model = prepared(env)
    shard(model, mesh=env.mesh())
    raises_everywhere((ValueError, AssertionError, RuntimeError), lambda: fully_shard(model, mesh=env.mesh()))
    model(x_of(env))


@case(2)
def other_shard_dimension(env: Env) -> None:
    """Blocks of 16 along the last dimension must stay whole, and scales are per tensor: dim 0 only."""

    def use() -> None:
        model = prepared(env)
        shard(model, mesh=env.mesh(), shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
        model(x_of(env))

    message = raises_everywhere(nq.UserError, use)
    assert "dim" in message and "layers.0" in message, message


@case(2)
def copies_and_pickles(env: Env) -> None:
    """A copy that would not be quantized, or a pickle that loads nowhere, is refused and says what to do instead."""
    model = prepared(env)
    for make in (copy.deepcopy, pickle.dumps):
        message = raises_everywhere(REFUSED, functools.partial(make, model))
        assert "state_dict" in message or "apply_qat" in message, message
    shard(model, mesh=env.mesh())
    for make in (copy.deepcopy, pickle.dumps):
        raises_everywhere(
            (*REFUSED, AssertionError, RuntimeError, pickle.PicklingError), functools.partial(make, model)
        )
    model(x_of(env))
    same_weights = copy.deepcopy(get_model_state_dict(model))  # this one is plain
    assert all(type(t.to_local()) is Tensor for t in same_weights.values())


@case(2)
def a_master_used_directly(env: Env) -> None:
    """Between forwards a parameter is the unquantized shard: multiplying with it is refused, looking at it is not."""
    pair = Pair(env)
    pair.step()
    parameter = pair.parameters()[NAME]
    assert isinstance(parameter, DTensor)
    x = torch.ones(3, parameter.shape[1], device=env.device)
    raises_everywhere((*REFUSED, RuntimeError), lambda: nn.functional.linear(x, parameter))  # mixed with a DTensor
    whole = DTensor.from_local(x, env.mesh(), run_check=False)
    for use in (lambda: nn.functional.linear(whole, parameter), lambda: whole @ parameter.t()):
        raises_everywhere((*REFUSED, RuntimeError), use)
    str(parameter), repr(pair.model), parameter.sum(), parameter.abs().max(), parameter.float(), parameter.shape
    pair.step()


@case(2)
def a_lost_parameter(env: Env) -> None:
    """A module given a new, ordinary weight after sharding does not silently train unquantized."""
    pair = Pair(env)
    pair.compare_forward()
    pair.model.reshard()  # type: ignore[operator]
    layer: Any = pair.model.layers[1]  # type: ignore[index,union-attr]
    layer.reshard()
    layer.mlp.up_proj = nn.Linear(64, 96, bias=False, device=env.device)
    raises_everywhere((*REFUSED, RuntimeError), lambda: list(nq.packed_weights(pair.model)))


# --- writes ---


def no_grad_mul(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.mul_(3.0)


def item_assignment(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.copy_(p * 3.0)


def foreach_mul(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_([p], 3.0)


def local_mul(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.to_local().mul_(3.0)


def local_rows(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.to_local()[...] *= 3.0


def detached_view(pair: Pair, p: Any) -> None:
    p.detach().to_local().view(-1)[:].mul_(3.0)


def sharded_state(pair: Pair, p: Any) -> None:
    pair.model.state_dict()[NAME].to_local().mul_(3.0)


def state_copy(pair: Pair, p: Any) -> None:
    state = pair.model.state_dict()
    state[NAME].copy_(state[NAME] * 3.0)


def set_state(pair: Pair, p: Any) -> None:
    state = {name: full(t).clone() for name, t in pair.model.state_dict().items()}
    state[NAME] *= 3.0
    set_model_state_dict(pair.model, state, options=StateDictOptions(full_state_dict=True))


def load(pair: Pair, p: Any) -> None:
    state = {name: t.clone() for name, t in pair.model.state_dict().items()}
    state[NAME] = state[NAME] * 3.0
    pair.model.load_state_dict(state)


def optimizer_without_torch(pair: Pair, p: Any) -> None:
    for q in pair.model.parameters():
        if q is p:
            with torch.no_grad():
                q.add_(q, alpha=2.0)


def through_data(pair: Pair, p: Any) -> None:
    p.data.mul_(3.0)


def through_local_data(pair: Pair, p: Any) -> None:
    p.to_local().data.mul_(3.0)


SEEN = (
    no_grad_mul, item_assignment, foreach_mul, local_mul, local_rows, detached_view, sharded_state, state_copy,
    set_state, load, optimizer_without_torch, through_data, through_local_data,
)  # fmt: skip


@case(2, write={f.__name__: f for f in SEEN})
def writes_are_seen(env: Env, write: Callable[[Pair, Any], None]) -> None:
    """The next forward computes with what was written, without `refresh`; twice, with a forward between."""
    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    for _ in range(2):
        pair.compare_forward("output before the write")
        write(pair, pair.parameters()[NAME])
        with torch.no_grad():
            dict(pair.twin.model.named_parameters())[NAME].mul_(3.0)
        pair.compare_masters()
        pair.compare_forward("output after the write")
    pair.step()


def storage_of(pair: Pair) -> Tensor:
    """Memory of this rank's rows, as a foreign kernel sees it: what `state_dict` handed out, kept from before."""
    tensor = pair.model.state_dict()[NAME].to_local()
    return tensor.numpy() if tensor.device.type == "cpu" else tensor.detach()


def write_unseen(alias: Any) -> None:
    if isinstance(alias, Tensor):
        alias.data.mul_(3.0)
    else:
        alias *= 3.0


@case(2, ranks={"all": {"ranks": (0, 1)}, "first": {"ranks": (0,)}, "last": {"ranks": (1,)}})
def unseen_writes_stop_the_next_sync(env: Env, ranks: tuple[int, ...]) -> None:
    """Through memory nobody watches: every rank raises at packed_weights and names the weight; refresh mends it."""
    pair = Pair(env, reshard_after_forward=True)
    alias = storage_of(pair)
    pair.step()
    pair.compare_forward()
    list(nq.packed_weights(pair.model))  # nothing to complain of
    if env.rank in ranks:
        write_unseen(alias)
    for _ in range(2):
        message = raises_everywhere(nq.StaleWeightsError, lambda: list(nq.packed_weights(pair.model)))
        assert NAME in message and "refresh" in message, message
        assert message.count("layers.") == 1, f"names weights that did not change: {message}"
    nq.refresh(pair.model)
    masters = dict(pair.twin.model.named_parameters())
    with torch.no_grad():
        masters[NAME].copy_(full(pair.parameters()[NAME]))
    same_stream(nq.packed_weights(pair.model), nq.packed_weights(pair.twin.model))
    pair.compare_forward("output after refresh")
    pair.step()


@case(2)
def unseen_writes_reach_the_state_dict(env: Env) -> None:
    """A checkpoint is taken from the masters, so it holds what was written, noticed or not."""
    pair = Pair(env, reshard_after_forward=True)
    alias = storage_of(pair)
    pair.compare_forward()
    before = full(pair.parameters()[NAME]).clone()
    write_unseen(alias)
    state = get_model_state_dict(pair.model, options=StateDictOptions(full_state_dict=True))
    same(state[NAME], before * 3.0, NAME)


@case(2, make={"even": decoder, "uneven": uneven})
def refresh_is_collective_and_idempotent(env: Env, make: Callable[[], nn.Module]) -> None:
    pair = Pair(env, make=make, policy=MIXED)
    nq.refresh(pair.model)  # before the first forward
    nq.refresh(pair.model)
    pair.compare_forward()
    pair.step()
    nq.refresh(pair.model)
    pair.step(micros=2)


@case(2)
def writes_to_the_rows_of_one_rank(env: Env) -> None:
    """A program that touches only what a rank holds: every rank says so with `refresh`, and all is right."""
    pair = Pair(env, reshard_after_forward=True)
    for rank in (1, 0):
        pair.step()
        parameter = pair.parameters()[NAME]
        if env.rank == rank:
            with torch.no_grad():
                parameter.to_local().mul_(3.0)  # type: ignore[attr-defined]
        nq.refresh(pair.model)
        with torch.no_grad():
            dict(pair.twin.model.named_parameters())[NAME].copy_(full(parameter))
        pair.compare_forward()


@case(2, row={"rank-0": {"row": 0}, "rank-1": {"row": -1}})
def a_checkpoint_that_differs_on_one_rank(env: Env, row: int) -> None:
    """dcp.load writes on every rank, but changes what one holds: all ranks must come to the same conclusion."""
    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    pair.compare_forward()
    with torch.no_grad():
        dict(pair.twin.model.named_parameters())[NAME][row] *= 50.0
    whole = {name: p.detach().clone() for name, p in pair.twin.model.named_parameters()}
    if env.rank == 0:
        dcp.save(whole, checkpoint_id=env.path / "other", no_dist=True)
    env.barrier()
    dcp.load(pair.model.state_dict(), checkpoint_id=env.path / "other")
    pair.compare_masters()
    pair.compare_forward("output after the load")
    pair.step()


# --- faults ---


def poison(pair: Pair, rank: int, value: float, name: str = NAME) -> None:
    """Write a value into one element that one rank holds, by an operation that every rank runs."""
    with torch.no_grad():
        local = pair.parameters()[name].to_local()  # type: ignore[attr-defined]
        local[0, :1].fill_(value if pair.env.rank == rank else float(local[0, 0]))


@case(
    2,
    fault={
        "nan-rank-0": {"rank": 0, "value": float("nan")},
        "nan-rank-1": {"rank": 1, "value": float("nan")},
        "inf": {"rank": 1, "value": float("-inf")},
        "too-large": {"rank": 0, "value": 2688.0 * 512},
    },
)
def a_bad_value_on_one_rank(env: Env, rank: int, value: float) -> None:
    """Every rank raises with the weight's name, in seconds, at each use; masters and checkpoint are as they were."""
    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    good = full(pair.parameters()[NAME]).clone()
    poison(pair, rank, value)
    held = {name: full(p).clone() for name, p in pair.parameters().items()}
    x = pair.inputs()[env.rank]
    for use in (
        lambda: pair.model(x),
        lambda: pair.model(x),
        lambda: list(nq.packed_weights(pair.model)),
        lambda: nq.refresh(pair.model),
    ):
        began = time.monotonic()
        message = raises_everywhere(nq.UserError, use)
        assert time.monotonic() - began < SECONDS
        assert NAME in message and message.count("layers.") == 1, message
    pair.model.reshard()  # type: ignore[operator]
    for name, p in pair.parameters().items():
        same(as_bytes(full(p)), as_bytes(held[name]), f"master {name} after the fault")
    state = pair.model.state_dict()
    dcp.save(state, checkpoint_id=env.path / "after")
    # Repaired, training goes on as if nothing had been.
    with torch.no_grad():
        local = pair.parameters()[NAME].to_local()  # type: ignore[attr-defined]
        rows = good.tensor_split(2)[env.rank]
        local.copy_(rows)
    pair.compare_masters()
    pair.compare_forward("output after the repair")
    for _ in range(2):
        pair.step()


@case(2)
def a_failed_optimizer_step(env: Env) -> None:
    """NaN gradients reach the masters: the run stops at the next forward, and goes on from its checkpoint."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    pair.step()
    dcp.save(pair.model.state_dict(), checkpoint_id=env.path / "good")
    loss = loss_of(pair.model(pair.inputs()[env.rank]))
    (loss * (float("nan") if env.rank == 1 else 1.0)).backward()
    pair.optimizer.step()
    pair.optimizer.zero_grad()
    message = raises_everywhere(nq.UserError, lambda: pair.model(pair.inputs()[env.rank]))
    assert "layers." in message and "NaN" in message, message
    pair.model.reshard()  # type: ignore[operator]
    dcp.load(pair.model.state_dict(), checkpoint_id=env.path / "good")
    pair.optimizer = torch.optim.SGD(pair.model.parameters(), lr=0.1)
    pair.twin_optimizer = torch.optim.SGD(pair.twin.model.parameters(), lr=0.1)
    pair.compare_masters()
    pair.step()


@case(2)
def an_error_inside_the_forward(env: Env) -> None:
    """An exception of the program's own, on every rank, leaves weights that the next step computes rightly with."""

    class Interrupted(Exception):
        pass

    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    pair.step()

    def stop(*_: Any) -> None:
        raise Interrupted

    hook = pair.model.layers[1].mlp.register_forward_pre_hook(stop)  # type: ignore[index,union-attr]
    try:
        pair.model(pair.inputs()[env.rank])
    except Interrupted:
        pass
    hook.remove()
    if hasattr(pair.model, "reset_iter_state"):  # torch 2.13: FSDP2's own way back after an exception
        pair.model.reset_iter_state()
        pair.step()
    else:
        pair.model.reshard()  # type: ignore[operator]
        for layer in pair.model.layers:  # type: ignore[union-attr]
            layer.reshard()
    list(nq.packed_weights(pair.model))
    pair.compare_masters()


@case(2)
def zero_rank_meta_parameters(env: Env) -> None:
    """Used while still on the meta device: an error, not a packing of nothing."""
    with torch.device("meta"):
        model = Decoder()
    nq.apply_qat(model, ON, gather="nvfp4")
    shard(model, mesh=env.mesh())
    raises_everywhere((*REFUSED, RuntimeError), lambda: model(torch.ones(1, 2, 64)))


@case(2)
def units_that_change_their_dtype(env: Env) -> None:
    """`model.bfloat16()` between apply_qat and fully_shard, and after it: right, or refused."""
    for when in ("before", "after"):
        model = prepared(env)
        try:
            if when == "before":
                model.bfloat16()
            shard(model, linears if when == "before" else nothing, mesh=env.mesh())
            if when == "after":
                model.bfloat16()
        except nq.UserError:
            continue
        twin = decoder().bfloat16().to(env.device)
        nq.apply_qat(twin, ON)
        same(model(x_of(env).bfloat16()).detach(), twin(x_of(env).bfloat16()).detach(), f"output, cast {when}")
