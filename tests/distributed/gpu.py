"""What only shows on GPUs: streams, memory by the allocator's count, bytes copied from the host, large units.

Delays are put where a missing wait would let a stream run ahead: `torch.cuda._sleep` keeps a stream busy while the host
goes on. The comparison with the twin, which has no delays and no other streams, is to the bit, so one weight read too
early shows.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

import nvfp4_qat as nq
from distributed.instruments import live_bytes, local
from distributed.models import decoder
from distributed.pair import FULL, MIXED, Pair, adamw, layers, linears, loss_of, same, shard
from nvfp4_qat import gather_unit, multi

LONG = 50_000_000
"""Cycles: 25 to 30 ms, hundreds of times longer than anything these models do."""


def sleep(env: Env, cycles: int = LONG) -> None:
    """Keep the current stream busy."""
    if env.device == "cuda":
        torch.cuda._sleep(cycles)


@contextlib.contextmanager
def delayed(env: Env, owner: Any, name: str) -> Iterator[list[int]]:
    """Every call of a function or method begins with a sleep on its current stream; counts the calls."""
    calls: list[int] = []
    original = getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        sleep(env)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, late):
        yield calls


WIRES = {"through-fsdp": 1 << 60, "own": 0}


@case(2, worth=WIRES)
def packing_is_late(env: Env, worth: int) -> None:
    """The kernels that write the packed bytes start late: no gather may start before them."""
    with mock.patch.object(gather_unit, "WORTH", worth):
        for reshard in (True, False):
            pair = Pair(env, policy=MIXED, reshard_after_forward=reshard)
            with delayed(env, multi.Packs, "__call__") as calls:
                for _ in range(6):
                    pair.step(micros=2)
            assert calls, "packing goes another way: this test delays nothing"


@case(2, worth=WIRES)
def the_optimizer_is_late(env: Env, worth: int) -> None:
    """Masters are written late: packing may not read them before."""
    with mock.patch.object(gather_unit, "WORTH", worth):
        pair = Pair(env, policy=MIXED, optimizer=functools.partial(torch.optim.AdamW, lr=2e-2, fused=True))
        for _ in range(6):
            pair.step(before=lambda: sleep(env))


@case(2, worth=WIRES)
def gathering_is_late(env: Env, worth: int) -> None:
    """All-gathers read the packed bytes late: the next packing may not overwrite them before.

    The last gather of a step need not be waited for by what follows, so unused ones are started too.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    with mock.patch.object(gather_unit, "WORTH", worth):
        pair = Pair(env, policy=MIXED)
        model: Any = pair.model
        pair.compare_forward()
        with delayed(env, _fsdp_param_group, "foreach_all_gather") as calls:
            for _ in range(4):
                pair.step(micros=2)
                for unit in model.layers:
                    unit.unshard()
                    unit.reshard()
        assert calls


@case(2, worth=WIRES)
def unsharding_on_side_streams(env: Env, worth: int) -> None:
    """`unshard` called while another stream is current, right after a step whose writes are still under way."""
    with mock.patch.object(gather_unit, "WORTH", worth):
        pair = Pair(env, policy=MIXED)
        model: Any = pair.model
        pair.compare_forward()
        side = torch.cuda.Stream() if env.device == "cuda" else None
        for asynchronous in (False, True, False):
            sleep(env)
            pair.step(before=lambda: sleep(env))
            context: Any = torch.cuda.stream(side) if side is not None else contextlib.nullcontext()
            sleep(env)
            with context:
                handles = [unit.unshard(async_op=asynchronous) for unit in (model, *model.layers)]
                for handle in handles:
                    if handle is not None:
                        handle.wait()
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)
            pair.compare_forward("output of weights unsharded on a side stream")
            for unit in (model, *model.layers):
                unit.reshard()


@case(2, worth=WIRES)
def many_steps_with_random_delays(env: Env, worth: int) -> None:
    """Sleeps of random length at random places, for many steps; prefetching as far as it goes."""

    def wrap(model: Any, units: Any, **options: Any) -> nn.Module:
        shard(model, units, **options)
        blocks = list(model.layers)
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 3])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - 2) : i][::-1])
        return model

    generator = torch.Generator().manual_seed(env.rank)

    def maybe(*_: Any) -> None:
        if torch.rand((), generator=generator) < 0.3:
            sleep(env, int(torch.randint(1, LONG // 2, (), generator=generator)))

    with mock.patch.object(gather_unit, "WORTH", worth):
        pair = Pair(env, make=functools.partial(decoder, depth=4), policy=MIXED, wrap=wrap)
        for module in pair.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(maybe)
                module.register_full_backward_hook(maybe)
        for i in range(25):
            pair.step(micros=1 + i % 2, before=maybe)


@case(2, setup={"mixed": {"policy": MIXED}, "fp32": {"policy": FULL}, "unit-per-layer": {"units": linears}})
def large_units(env: Env, **setup: Any) -> None:
    """Units large enough that the package chooses its own gather, and shards of many tiles."""
    size = {"depth": 2, "width": 2048, "hidden": 6144} if env.device == "cuda" else {"depth": 2, "hidden": 128}
    pair = Pair(env, make=functools.partial(decoder, **size), **setup)
    for _ in range(3):
        pair.step()


@case(2)
def memory_of_training(env: Env) -> None:
    """In steady state memory after a step stands still, and its peak is that of FSDP2 without the package, or less."""
    if env.device != "cuda":
        return
    size = {"depth": 6, "width": 1024, "hidden": 4096}
    peaks = {}
    for gather in (None, "nvfp4"):
        model = decoder(**size)
        if gather:
            nq.apply_qat(model, nq.QATConfig(enable=True), gather=gather)
        shard(model, layers, mesh=env.mesh(), mp_policy=MIXED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        x = torch.randn(2, 64, 1024, device=env.device)
        after = []
        for i in range(5):
            if i == 2:
                torch.cuda.reset_peak_memory_stats()
            loss_of(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after.append(live_bytes("cuda"))
        assert after[2] == after[3] == after[4], after
        held = sum(local(p).numel() for p in model.parameters())
        peaks[gather] = torch.cuda.max_memory_allocated() - held * 9 // 16 * bool(gather)  # the packed shards stay
        del model, optimizer, x
        torch.cuda.empty_cache()
    assert peaks["nvfp4"] <= peaks[None] * 1.01, peaks


@case(2, pinned={"pinned": True, "pageable": False})
def offloaded_training(env: Env, pinned: bool) -> None:
    """Masters on the host, bit-equal forward; see `Pair.compare_masters` for the optimizer's part."""
    pair = Pair(env, policy=MIXED, offload_policy=CPUOffloadPolicy(pin_memory=pinned and env.device == "cuda"))
    for _ in range(3):
        pair.step(micros=2)
    assert all(local(p).device.type == "cpu" for p in pair.parameters().values())


@case(2)
def bytes_from_the_host(env: Env) -> None:
    """With CPU offload the masters are copied to the device at most once a step, not at every gather."""
    if env.device != "cuda":
        return
    policy = CPUOffloadPolicy(pin_memory=True)
    make = functools.partial(decoder, width=512, hidden=2048)
    # Steps so small that no global scale moves: a weight whose scale moved is packed, and copied, a second time.
    small = functools.partial(torch.optim.AdamW, lr=1e-6)
    pair = Pair(env, make=make, policy=MIXED, optimizer=small, offload_policy=policy, reshard_after_forward=True)
    held = rest = 0
    for name, p in pair.parameters().items():
        if name in pair.plan:
            held += local(p).numel()
        else:
            rest += local(p).numel() * 4

    def step(micros: int) -> None:
        for micro in range(micros):
            loss_of(pair.model(pair.inputs(micro)[env.rank])).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()

    step(1)
    copied = {micros: _copied_from_host(functools.partial(step, micros), env.path) for micros in (1, 4)}
    inputs = 4 * pair.inputs()[0].numel() * 4
    slack = 1 << 16
    # What is not quantized goes over for each of two gathers of each micro-batch; masters once, in fp32, or packed.
    assert copied[1] <= 4 * held + 2 * rest + inputs + slack, (copied, held, rest)
    each = (copied[4] - copied[1]) / 3
    assert each <= 2 * (rest + held * 9 // 16) + inputs + slack, (copied, held, rest)


def _copied_from_host(call: Callable[[], None], path: Path) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    trace = path / f"trace{torch.distributed.get_rank()}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"]]
    return sum(int(e["args"]["bytes"]) for e in copies)


@case(2)
def moved_to_the_cpu_and_back(env: Env) -> None:
    """`model.cpu()` frees the device of masters, and `to` brings them back to be gathered."""
    pair = Pair(env, make=functools.partial(decoder, width=512, hidden=2048), policy=MIXED, reshard_after_forward=True)
    pair.step()
    model: Any = pair.model
    held = sum(local(p).numel() for p in pair.parameters().values()) * 4
    before = live_bytes(env.device)
    model.cpu()
    if env.device == "cuda":
        freed = before - live_bytes("cuda")
        assert freed >= 0.95 * held, f"{freed} bytes were freed, masters have {held}"
    model.to(env.device)
    with torch.no_grad():
        out = model(pair.inputs()[env.rank])
    same(out, pair.twin(pair.inputs()[env.rank]), "output after coming back")


@case(2)
def made_on_the_cpu(env: Env) -> None:
    """apply_qat on a model on the CPU; fully_shard brings it to the GPU."""
    pair = Pair(env, policy=MIXED)
    model = decoder()
    nq.apply_qat(model, nq.QATConfig(enable=True), gather="nvfp4")
    shard(model, layers, mesh=env.mesh(), mp_policy=MIXED)
    pair.model, pair.optimizer = model, adamw(model.parameters())
    for _ in range(2):
        pair.step()


@case(2)
def the_bytes_of_a_cpu(env: Env) -> None:
    """packed_weights of GPU shards are those that one process makes on a CPU of the same masters."""
    pair = Pair(env, make=functools.partial(decoder, width=512, hidden=1024))
    for _ in range(2):
        pair.step()
    masters: dict[str, Tensor] = {name: p.detach().cpu() for name, p in pair.twin.model.named_parameters()}
    single = decoder(width=512, hidden=1024)
    single.load_state_dict(masters)
    nq.apply_qat(single, nq.QATConfig(enable=True))
    expected = dict(nq.packed_weights(single))
    for name, tensor in nq.packed_weights(pair.model):
        found, wanted = tensor.cpu().contiguous(), expected.pop(name).contiguous()
        same(found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8), name)
    assert not expected
