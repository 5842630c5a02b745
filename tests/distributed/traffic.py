"""What gather mode sends, packs and keeps: 4.5 bits a weight, one packing a step, nothing after reshard."""

from __future__ import annotations

import functools
from typing import Any

import torch
from helpers_distributed import Env, case
from torch.distributed.fsdp import MixedPrecisionPolicy

import nvfp4_qat as nq
from distributed.features import Checkpointed, seeded
from distributed.instruments import Collectives, allocated, at_rest, live_bytes, local, packing, padded_numel, settled
from distributed.models import decoder, uneven
from distributed.pair import FULL, MIXED, Pair, expected_gather, keeping, layers, linears, loss_of, nothing

SCALES = {"bias": True, "width": 128, "hidden": 256}  # all shards are multiples of 256 weights: no padding anywhere


@case(
    2,
    4,
    setup={
        "fp32": {"policy": FULL},
        "mixed": {"policy": MIXED},
        "bf16": {"policy": FULL, "make": functools.partial(decoder, dtype=torch.bfloat16, **SCALES)},
        "one-unit": {"policy": MIXED, "units": nothing},
        "unit-per-layer": {"policy": MIXED, "units": linears},
    },
)
def bytes_gathered(env: Env, **setup: Any) -> None:
    """Forward and backward gather 4.5 bits for each 4-bit weight, and what is not quantized in its compute dtype."""
    setup.setdefault("make", functools.partial(decoder, **SCALES))
    pair = Pair(env, reshard_after_forward=True, alike=True, **setup)
    pair.compare_forward()  # packs
    quantized, rest = expected_gather(pair, env.world)
    weights = sum(p.numel() for name, p in pair.parameters().items() if name in pair.plan)
    assert quantized * env.world * 8 == 4.5 * weights, "the test's own sizes are not multiples of 256"
    with Collectives() as forward:
        out = pair.model(pair.inputs()[env.rank])
    units = len(list(setup.get("units", layers)(pair.model))) + 1
    _check_gathers(forward, quantized + rest, units)
    with Collectives() as backward:
        loss_of(out).backward()
    _check_gathers(backward, quantized + rest, units)
    assert sum(call.kind != "gather" for call in backward.calls) == units, "more than one reduction of gradients a unit"


def _check_gathers(seen: Collectives, expected: int, units: int) -> None:
    """The bytes, but for at most 16 a unit; one call a unit, and nothing else but reductions of gradients."""
    assert expected <= seen.gathered() <= expected + 16 * units, f"{seen.gathered()} bytes instead of {expected}"
    gathers = [call for call in seen.calls if call.kind == "gather"]
    assert len(gathers) == units, gathers
    others = {call.kind for call in seen.calls if call.kind != "gather"}
    assert others <= {"_reduce_scatter_base", "reduce_scatter_single"}, others


@case(2)
def bytes_that_are_kept_travel_once(env: Env) -> None:
    """Of a step of several micro-batches only the first forward gathers 4-bit weights; the step frees them."""
    with keeping():
        pair = Pair(env, make=functools.partial(decoder, **SCALES), policy=MIXED, reshard_after_forward=True)
    for _ in range(2):
        pair.step()
    quantized, rest = expected_gather(pair, env.world)
    held = at_rest(lambda: live_bytes(env.device))
    units = len(list(layers(pair.model))) + 1
    for micro in range(3):
        with Collectives() as forward:
            out = pair.model(pair.inputs(micro)[env.rank])
        travels = rest + (quantized if micro == 0 else 0)
        assert travels <= forward.gathered() <= travels + 16 * units, f"{forward.gathered()} instead of {travels}"
        with Collectives() as backward:
            loss_of(out).backward()
        assert rest <= backward.gathered() <= rest + 16 * units, f"{backward.gathered()} instead of {rest}"
        del out
    kept = settled(lambda: live_bytes(env.device) - held, 1 << 40)
    pair.optimizer.zero_grad()
    assert kept >= quantized * env.world
    pair.optimizer.step()
    limit = quantized // 2
    assert settled(lambda: live_bytes(env.device) - held, limit) <= limit, "what was gathered is kept after the step"


@case(2)
def bytes_gathered_of_uneven_shards(env: Env) -> None:
    """Padding costs what FSDP2 pads anyway, and alignment at most 32 bytes a weight."""
    pair = Pair(env, make=uneven, policy=MIXED, reshard_after_forward=True)
    pair.compare_forward()
    quantized, rest = expected_gather(pair, env.world)
    with Collectives() as seen:
        pair.compare_forward()
    extra = seen.gathered() - quantized - rest
    assert 0 <= extra <= 32 * len(pair.plan.quantized), extra


@case(2)
def bytes_without_resharding(env: Env) -> None:
    pair = Pair(env, policy=MIXED, reshard_after_forward=False)
    out = pair.model(pair.inputs()[env.rank])
    with Collectives() as seen:
        loss_of(out).backward()
    assert seen.gathered() == 0


@case(
    2,
    setup={
        "plain": {"policy": MIXED},
        "unit-per-layer": {"policy": FULL, "units": linears},
        "recompute": {"policy": MIXED, "make": functools.partial(seeded, Checkpointed)},
    },
)
def one_reduction_and_one_packing_a_step(env: Env, **setup: Any) -> None:
    """However many weights, micro-batches, recomputations and backward passes there are."""
    pair = Pair(env, alike=True, reshard_after_forward=True, **setup)
    held = sum(local(p).numel() for name, p in pair.parameters().items() if name in pair.plan)
    padded = sum(padded_numel(p.shape, env.world) for name, p in pair.parameters().items() if name in pair.plan)
    for step in range(3):
        with Collectives() as seen, packing() as sizes:
            for micro in range(3):
                loss_of(pair.model(pair.inputs(micro)[env.rank])).backward()
        reductions = seen.amax_reductions()
        assert len(reductions) == 1, f"step {step}: {reductions}"
        assert reductions[0].dtype == torch.int32 and reductions[0].nbytes <= 4 * len(pair.plan.quantized)
        # Once, and those again whose global scale moved after they had been packed with the old one.
        assert env.device == "cuda" or held <= sum(sizes) <= 2 * padded, (
            f"step {step}: {sum(sizes)} elements were packed, {held} are held"
        )
        pair.optimizer.step()
        pair.optimizer.zero_grad()
    with Collectives() as seen, packing() as sizes:
        pair.optimizer.step()  # no gradients: nothing changed that one could know of, but a step it was
        with torch.no_grad():
            for micro in range(3):
                pair.model(pair.inputs(micro)[env.rank])
    assert len(seen.amax_reductions()) <= 1
    with Collectives() as seen, packing() as sizes, torch.no_grad():
        for micro in range(3):
            pair.model(pair.inputs(micro)[env.rank])
    assert not seen.amax_reductions() and not sizes, "packed again although nothing changed"


@case(2)
def a_state_dict_on_one_rank_is_harmless(env: Env) -> None:
    """Asking for a state dict starts no collective, neither then nor at the next forward."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)  # else FSDP2 itself gathers the root again, on that rank
    pair.step()
    pair.compare_forward()
    if env.rank == 0:
        pair.model.state_dict()
    with Collectives() as seen:
        pair.compare_forward()
    assert not seen.amax_reductions()
    pair.step()


def warm_up(device: str) -> None:
    """Have the GEMM library take its workspaces, in the threads of forward and backward, before memory is counted."""
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (w @ w).sum().backward()


@case(2, policy={"fp32": {"policy": FULL}, "mixed": {"policy": MIXED}})
def nothing_unsharded_stays(env: Env, policy: MixedPrecisionPolicy) -> None:
    """After forward and backward only masters, packed shards and what the program holds are left."""
    make = functools.partial(decoder, width=256, hidden=512)
    pair = Pair(env, make=make, policy=policy, reshard_after_forward=True)
    x = pair.inputs()[env.rank]
    pair.forget_twin()
    warm_up(env.device)
    start = at_rest(lambda: live_bytes(env.device))
    held = sum(local(p).numel() for name, p in pair.parameters().items() if name in pair.plan)
    largest = max(p.numel() for p in pair.parameters().values()) * 2  # bytes in bf16
    packed = held * 9 // 16
    # Beyond the packed shards: global scales, tables of the packer; no room for one unsharded weight of any layer.
    limit = packed + largest // 8 + (512 * 200 if env.device == "cuda" else 0)  # the allocator's rounding
    with torch.no_grad():
        pair.model(x)
    after_forward = settled(lambda: live_bytes(env.device) - start, limit)
    assert packed <= after_forward <= limit, f"{after_forward} bytes after forward, packed shards are {packed}"
    grown = []
    for _ in range(3):
        out = pair.model(x)
        loss_of(out).backward()
        del out
        pair.optimizer.zero_grad()
        grown.append(settled(lambda: live_bytes(env.device) - start, limit))
    assert max(grown) <= limit, f"{grown} bytes after backward, packed shards are {packed}"
    assert grown[0] == grown[-1], f"grows: {grown}"


@case(2)
def steps_allocate_no_more_than_they_free(env: Env) -> None:
    """By the allocator's own account, which sees what Python does not: in steady state nothing is kept.

    On a CPU that account holds Python's own objects too, and grows by 5 to 30 KB a step while a process settles
    (measured, with this package and without). The smallest 4-bit weight here has 128 KB when it is unsharded.
    """
    pair = Pair(env, make=functools.partial(decoder, width=512, hidden=1024), policy=MIXED, reshard_after_forward=True)
    x = pair.inputs()[env.rank]
    pair.forget_twin()

    def forward() -> None:
        with torch.no_grad():
            pair.model(x)

    def step() -> None:
        loss_of(pair.model(x)).backward()
        pair.optimizer.zero_grad()

    for call in (forward, step):
        call()
        call()
        limit = 5 * (1 << 16) if env.device == "cpu" else 0
        before = at_rest(lambda: allocated(env.device))
        for _ in range(5):
            call()
        grown = settled(lambda: allocated(env.device) - before, limit)  # noqa: B023
        assert grown <= limit, f"five calls of {call.__name__} keep {grown} bytes"


@case(2)
def gathered_bytes_are_freed(env: Env) -> None:
    """While a unit is unsharded, its gathered packed bytes are not kept beside the full weights."""
    make = functools.partial(decoder, width=256, hidden=512, depth=1)
    pair = Pair(env, make=make, policy=MIXED)
    pair.forget_twin()
    model: Any = pair.model
    with torch.no_grad():
        model(torch.randn(1, 2, 256, device=env.device))
    for unit in (*model.layers, model):
        unit.reshard()
    start = at_rest(lambda: live_bytes(env.device))
    model.layers[0].unshard()
    weights = 2 * sum(p.numel() for p in model.layers[0].parameters())
    kept = settled(lambda: live_bytes(env.device) - start, int(weights * 1.05))
    assert weights <= kept <= weights * 1.05, f"{kept} bytes for weights of {weights}"
    model.layers[0].reshard()
    assert settled(lambda: live_bytes(env.device) - start, weights // 50) <= weights // 50
    assert nq.qat_plan(model) is pair.plan
