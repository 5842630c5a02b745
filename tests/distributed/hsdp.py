"""Four processes: replicas of shards (HSDP, 2 × 2 and 4 × 1), and four shards with ranks that hold nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from helpers_distributed import Env, case
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import nvfp4_qat as nq
from distributed.instruments import Collectives, raises_everywhere
from distributed.models import decoder, uneven
from distributed.pair import (
    FULL,
    MIXED,
    ON,
    Pair,
    expected_gather,
    full,
    layers,
    linears,
    loss_of,
    same,
    same_stream,
    shard,
)


def in_pairs(parts: list[Tensor]) -> Tensor:
    """The shards of a replica first (reduce-scatter), then the replicas (all-reduce): each sum of two has one order."""
    a, b, c, d = parts
    return (a + b) + (c + d)


@case(
    4,
    setup={
        "fp32": {"policy": FULL},
        "mixed": {"policy": MIXED},
        "bf16": {"make": functools.partial(decoder, dtype=torch.bfloat16)},
        "unit-per-layer": {"units": linears, "policy": MIXED},
        "uneven": {"make": uneven, "policy": MIXED},
        "never-reshard": {"reshard_after_forward": False},
    },
)
def two_replicas_of_two_shards(env: Env, **setup: Any) -> None:
    pair = Pair(env, mesh=env.mesh(2, 2), order=in_pairs, **setup)
    pair.compare_forward()
    for _ in range(3):
        pair.step()
    pair.compare_forward()


@case(4, setup={"fp32": {"policy": FULL}, "mixed": {"policy": MIXED}, "uneven": {"make": uneven}})
def four_replicas_of_one_shard(env: Env, **setup: Any) -> None:
    """Nothing to gather: the packed bytes are used where they are."""
    pair = Pair(env, mesh=env.mesh(4, 1), alike=True, **setup)
    for _ in range(3):
        pair.step()
    with Collectives() as seen:
        pair.compare_forward()
    assert seen.gathered() == 0


@case(
    4,
    setup={
        "fp32": {"policy": FULL},
        "mixed": {"policy": MIXED},
        "uneven": {"make": uneven},
        "uneven-mixed": {"make": uneven, "policy": MIXED, "units": linears},
        "uneven-bf16": {"make": functools.partial(uneven, dtype=torch.bfloat16)},
    },
)
def four_shards(env: Env, **setup: Any) -> None:
    """Weights of one, three and 17 rows: ranks that hold nothing of a weight take part all the same."""
    pair = Pair(env, alike=True, **setup)
    pair.compare_forward()
    for _ in range(3):
        pair.step()
    pair.compare_forward()


@case(4)
def four_shards_of_different_data(env: Env) -> None:
    """The order of a sum of four is the backend's: gradients agree within its rounding."""
    pair = Pair(env, policy=MIXED)
    for _ in range(3):
        pair.step(exact=False)


@case(4, shape={"2x2": {"shape": (2, 2)}, "4x1": {"shape": (4, 1)}, "4": {"shape": (4,)}})
def one_reduction_a_mesh_dimension(env: Env, shape: tuple[int, ...]) -> None:
    """In a whole step, wherever in it weights are packed."""
    pair = Pair(env, mesh=env.mesh(*shape), alike=True, policy=MIXED)
    for step in range(3):
        with Collectives() as seen:
            for micro in range(2):
                loss_of(pair.model(pair.inputs(micro)[env.rank])).backward()
            pair.optimizer.step()
            pair.optimizer.zero_grad()
        reductions = seen.amax_reductions()
        if step > 0:  # the first one packs what is there at the beginning as well
            assert sum(size > 1 for size in shape) <= len(reductions) <= len(shape), reductions


@case(4)
def bytes_of_two_shards(env: Env) -> None:
    """Gathered within a replica only."""
    pair = Pair(env, mesh=env.mesh(2, 2), policy=MIXED, reshard_after_forward=True)
    pair.compare_forward()
    with Collectives() as seen:
        pair.compare_forward()
    quantized, rest = expected_gather(pair, 2)
    assert 0 <= seen.gathered() - quantized - rest <= 16 * 3
    assert all(call.ranks == 2 for call in seen.calls)


@case(4)
def accumulation_without_all_reduce(env: Env) -> None:
    """`set_requires_all_reduce(False)`: micro-batches are reduced within a replica, replicas once at the end."""
    pair = Pair(env, mesh=env.mesh(2, 2), order=in_pairs)
    model: Any = pair.model
    for _ in range(2):
        for micro in range(2):
            model.set_requires_all_reduce(micro == 1)
            loss_of(model(pair.inputs(micro)[env.rank])).backward()
        ranks = []
        per_micro: list[list[dict[str, Tensor]]] = []
        for micro in range(2):
            per_micro.append([pair.twin.gradients([pair.inputs(micro)[rank]])[1] for rank in range(4)])
        names = list(per_micro[0][0])
        for replica in (0, 2):
            ranks.append(
                {name: sum(grads[replica][name] + grads[replica + 1][name] for grads in per_micro) for name in names}
            )
        expected = {name: (ranks[0][name] + ranks[1][name]) / 4 for name in names}
        pair.compare_gradients(expected)
        pair.update()


@case(4)
def evaluation_by_one_replica(env: Env) -> None:
    """Two ranks that hold all weights between them can use the model without the other two."""
    pair = Pair(env, mesh=env.mesh(2, 2), order=in_pairs, policy=MIXED)
    for _ in range(2):
        pair.step()
        pair.compare_forward()  # everybody: packs
        for replica in (0, 1):
            if env.rank // 2 == replica:
                for _ in range(2):
                    pair.compare_forward(f"output of replica {replica} alone")
            env.barrier()


@case(4)
def a_partial_reshard_is_refused(env: Env) -> None:
    """`reshard_after_forward=2` of four: FSDP2 has no way to reshard what it gathered in another form."""
    model = decoder()
    nq.apply_qat(model, ON, gather="nvfp4")

    def use() -> None:
        shard(model, layers, mesh=env.mesh(), reshard_after_forward=2)
        model(torch.zeros(1, 2, 64))

    message = raises_everywhere(nq.UserError, use)
    assert "reshard_after_forward" in message and "True" in message, message


@case(4)
def nan_in_one_replica(env: Env) -> None:
    """One rank of four: all stop, with the tensor's name."""
    pair = Pair(env, mesh=env.mesh(2, 2), order=in_pairs)
    pair.step()
    name = "layers.1.mlp.up_proj.weight"
    kept = full(pair.parameters()[name]).clone()
    if env.rank == 2:
        with torch.no_grad():
            pair.parameters()[name].to_local()[0, 0] = float("nan")

    def use() -> None:
        pair.optimizer.step()  # the event after which weights are packed again, at once or by the next forward
        pair.model(pair.inputs()[env.rank])

    message = raises_everywhere(nq.UserError, use)
    assert name in message, message
    assert torch.isfinite(kept).all()


@case(4)
def streams_from_four_shards(env: Env) -> None:
    """packed_weights and state dicts of uneven shards, some empty."""
    for mesh in (env.mesh(), env.mesh(2, 2)):
        pair = Pair(env, make=uneven, mesh=mesh, alike=True)
        pair.step()
        same_stream(nq.packed_weights(pair.model), nq.packed_weights(pair.twin.model))
        state = get_model_state_dict(pair.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        masters = pair.twin.model.state_dict()
        if env.rank == 0:
            assert state.keys() == masters.keys()
            for name, tensor in state.items():
                same(tensor, masters[name], name)
        pair.step()
