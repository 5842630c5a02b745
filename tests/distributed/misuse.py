"""Misuse is refused with a reason; faults stop every rank and leave masters and checkpoints as they were."""

from __future__ import annotations

import copy
import functools
import pickle
import time
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import nvfp4_qat as nq
from distributed.instruments import raises_everywhere
from distributed.models import NAME, Decoder, decoder, ones
from distributed.pair import MIXED, ON, Pair, adamw, as_bytes, full, linears, loss_of, nothing, same, shard

REFUSED = (nq.UserError, nq.MismatchError)
SECONDS = 20.0
"""What "no hang" means here: a fault is reported within this time; a collective would wait for minutes."""


def prepared(env: Env, seed: int = 0) -> Decoder:
    model = decoder(seed=seed).to(env.device)
    nq.apply_qat(model, ON, gather="nvfp4")
    return model


@case(2)
def never_sharded(env: Env) -> None:
    model = prepared(env)
    message = raises_everywhere(REFUSED, lambda: model(ones(env.device)))
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
    message = raises_everywhere(REFUSED, lambda: model(ones(env.device)))
    assert ("layers.1" if of == 1 else ".mlp.") in message, message


@case(2)
def ignored_parameters(env: Env) -> None:
    """`fully_shard(ignored_params=...)` leaves a weight whole, so nothing would quantize it."""
    model = prepared(env)
    shard(model, nothing, mesh=env.mesh(), ignored_params={model.get_parameter(NAME)})
    message = raises_everywhere(REFUSED, lambda: model(ones(env.device)))
    assert NAME in message, message


@case(2)
def ddp_instead_of_fsdp(env: Env) -> None:
    from torch.nn.parallel import DistributedDataParallel

    raises_everywhere(REFUSED, lambda: DistributedDataParallel(prepared(env))(ones(env.device)))


@case(2)
def after_fully_shard(env: Env) -> None:
    model = shard(decoder(), mesh=env.mesh())
    message = raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather="nvfp4"))
    assert "before" in message and "fully_shard" in message, message
    model(ones(env.device))  # unchanged


@case(2)
def applied_twice(env: Env) -> None:
    model = prepared(env)
    for gather in ("nvfp4", None):
        raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather=gather))  # noqa: B023
    shard(model, mesh=env.mesh())
    raises_everywhere(nq.UserError, lambda: nq.apply_qat(model, ON, gather="nvfp4"))
    model(ones(env.device))
    module_mode = decoder().to(env.device)
    nq.apply_qat(module_mode, ON)
    raises_everywhere(nq.UserError, lambda: nq.apply_qat(module_mode, ON, gather="nvfp4"))


@case(2)
def wrong_arguments(env: Env) -> None:
    for value in ("nvfp8", "", True, 4):
        message = raises_everywhere(nq.UserError, lambda: nq.apply_qat(decoder(), ON, gather=value))  # noqa: B023
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
    model(ones(env.device))


@case(2)
def other_shard_dimension(env: Env) -> None:
    """Blocks of 16 along the last dimension must stay whole, and scales are per tensor: dim 0 only."""

    def use() -> None:
        model = prepared(env)
        shard(model, mesh=env.mesh(), shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
        model(ones(env.device))

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
    model(ones(env.device))
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
    pair.model.reshard()
    layer: Any = pair.model.layers[1]
    layer.reshard()
    layer.mlp.up_proj = nn.Linear(64, 96, bias=False, device=env.device)
    raises_everywhere((*REFUSED, RuntimeError), lambda: list(nq.packed_weights(pair.model)))


# --- faults ---


def poison(pair: Pair, rank: int, value: float, name: str = NAME) -> None:
    """Write a value into one element that one rank holds, by an operation that every rank runs."""
    with torch.no_grad():
        local = pair.parameters()[name].to_local()
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
    pair.model.reshard()
    for name, p in pair.parameters().items():
        same(as_bytes(full(p)), as_bytes(held[name]), f"master {name} after the fault")
    state = pair.model.state_dict()
    dcp.save(state, checkpoint_id=env.path / "after")
    # Repaired, training goes on as if nothing had been.
    with torch.no_grad():
        local = pair.parameters()[NAME].to_local()
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
    pair.model.reshard()
    dcp.load(pair.model.state_dict(), checkpoint_id=env.path / "good")
    pair.optimizer = adamw(pair.model.parameters())
    pair.twin_optimizer = adamw(pair.twin.model.parameters())
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

    hook = pair.model.layers[1].mlp.register_forward_pre_hook(stop)
    try:
        pair.model(pair.inputs()[env.rank])
    except Interrupted:
        pass
    hook.remove()
    if hasattr(pair.model, "reset_iter_state"):  # torch 2.13: FSDP2's own way back after an exception
        pair.model.reset_iter_state()
        pair.step()
    else:
        pair.model.reshard()
        for layer in pair.model.layers:
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
        same(
            model(ones(env.device).bfloat16()).detach(),
            twin(ones(env.device).bfloat16()).detach(),
            f"output, cast {when}",
        )
