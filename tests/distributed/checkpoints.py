"""State dicts and checkpoints of a model in gather mode are those of any FSDP2 model: plain keys, dtypes and shapes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq
from distributed.instruments import local
from distributed.models import Decoder, decoder, ones, uneven
from distributed.pair import FULL, MIXED, ON, Pair, adamw, full, layers, linears, loss_of, same, shard

BF16 = functools.partial(decoder, dtype=torch.bfloat16)
PACKAGE = b"nvfp4_qat"


def gathered(env: Env, seed: int = 0, make: Callable[..., nn.Module] = decoder, units: Any = layers) -> nn.Module:
    model = make(seed=seed)
    nq.apply_qat(model, ON, gather="nvfp4")
    return shard(model, units, mesh=env.mesh(), mp_policy=MIXED)


def ordinary(env: Env, seed: int = 0, make: Callable[..., nn.Module] = decoder, units: Any = layers) -> nn.Module:
    """The same without this package."""
    return shard(make(seed=seed), units, mesh=env.mesh(), mp_policy=MIXED)


def use(env: Env, model: nn.Module) -> None:
    """Make a model pack its weights. FSDP2 leaves the root unsharded after a forward, and nothing loads into that."""
    model(ones(env.device))
    model.reshard()


def check_plain(state: dict[str, Any], like: dict[str, Any]) -> None:
    """The same keys in the same order, types, dtypes, shapes and placements; local tensors are plain tensors."""
    assert list(state) == list(like), set(state) ^ set(like)
    for name, other in like.items():
        tensor = state[name]
        assert type(tensor) is type(other), f"{name} is a {type(tensor).__name__}, not a {type(other).__name__}"
        assert tensor.dtype == other.dtype and tensor.shape == other.shape and tensor.device == other.device, name
        if isinstance(tensor, DTensor):
            assert tensor.placements == other.placements and tensor.device_mesh == other.device_mesh, name
            assert tensor.stride() == other.stride() and tensor.requires_grad == other.requires_grad, name
            inner, plain = tensor.to_local(), other.to_local()
            assert type(inner) is type(plain) is Tensor, f"{name} holds a {type(inner).__name__}"
            assert inner.shape == plain.shape, name


def check_files(path: Path) -> None:
    """No file mentions the package, so none needs it to be read."""
    files = [file for file in path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert PACKAGE not in file.read_bytes(), f"{file.name} mentions the package"


def trains_like(env: Env, model: nn.Module, twin_state: dict[str, Tensor], what: str) -> None:
    """A model holds these masters, and computes with them: one step equals that of a pair made from them."""

    def make() -> nn.Module:
        fresh = decoder()
        fresh.load_state_dict(twin_state)
        return fresh

    pair = Pair(env, make=make, policy=MIXED)
    pair.model, pair.optimizer = model, adamw(model.parameters())
    pair.compare_masters()
    pair.compare_forward(f"output after {what}")
    pair.step()


@case(2, make={"fp32": {"make": decoder}, "bf16": {"make": BF16}, "uneven": {"make": uneven}})
def state_dicts_are_plain(env: Env, make: Callable[[], nn.Module]) -> None:
    ours, plain = gathered(env, make=make), ordinary(env, make=make)  # made on the CPU; fully_shard moves them
    unsharded = make().state_dict()
    for stage in ("before the first forward", "after a step"):
        check_plain(ours.state_dict(), plain.state_dict())
        check_plain(get_model_state_dict(ours), get_model_state_dict(plain))
        assert list(ours.state_dict(prefix="actor.")) == list(plain.state_dict(prefix="actor."))
        check_plain(dict(ours.layers[0].state_dict()), dict(plain.layers[0].state_dict()))
        for cpu in (False, True):
            options = StateDictOptions(full_state_dict=True, cpu_offload=cpu)
            found, like = get_model_state_dict(ours, options=options), get_model_state_dict(plain, options=options)
            check_plain(found, like)
            if not cpu or env.rank == 0:
                assert list(found) == list(unsharded)
            for name, tensor in found.items():
                assert type(tensor) is Tensor, f"{name} is a {type(tensor).__name__} {stage}"
        x = torch.ones(2, 5, 64, device=env.device, dtype=torch.bfloat16)
        for model in (ours, plain):
            loss_of(model(x)).backward()
    for name, parameter in ours.named_parameters():
        grad = parameter.grad
        assert isinstance(grad, DTensor) and type(grad.to_local()) is Tensor, f"gradient of {name}"


@case(2)
def saved_with_torch(env: Env) -> None:
    """Files of torch.save load without the package: no byte names it, and weights_only admits no foreign class."""
    pair = Pair(env, policy=MIXED)
    pair.step()
    whole = get_model_state_dict(pair.model, options=StateDictOptions(full_state_dict=True))
    mine = env.path / str(env.rank)
    mine.mkdir()
    torch.save(whole, mine / "whole.pt")
    torch.save(pair.model.state_dict(), mine / "sharded.pt")
    torch.save({"model": pair.model.state_dict(), "optimizer": pair.optimizer.state_dict()}, mine / "trainer.pt")
    check_files(mine)
    for name, tensor in torch.load(mine / "whole.pt", weights_only=True).items():
        same(tensor, pair.twin.model.state_dict()[name], name)
    decoder().load_state_dict(torch.load(mine / "whole.pt", weights_only=True))
    env.barrier()


@case(2)
def torch_load_of_a_sharded_file(env: Env) -> None:
    """torch.save and torch.load of this rank's sharded state dict, into another model."""
    pair = Pair(env, policy=MIXED)
    pair.step()
    path = env.path / f"{env.rank}.pt"
    torch.save(pair.model.state_dict(), path)
    other = gathered(env, seed=5)
    other.load_state_dict(torch.load(path, weights_only=False))
    trains_like(env, other, pair.twin.model.state_dict(), "torch.load")
    env.barrier()


DIRECTIONS: dict[str, dict[str, Any]] = {
    "with-to-with": {"writer": gathered, "reader": gathered},
    "with-to-without": {"writer": gathered, "reader": ordinary},
    "without-to-with": {"writer": ordinary, "reader": gathered},
}


@case(2, direction=DIRECTIONS)
def dcp_in_all_directions(env: Env, writer: Any, reader: Any) -> None:
    """Distributed checkpoints, also between models that are wrapped in different units."""
    source = writer(env, seed=1)
    loss_of(source(ones(env.device))).backward()
    optimizer = adamw(source.parameters())
    optimizer.step()
    optimizer.zero_grad()
    dcp.save({"model": source.state_dict()}, checkpoint_id=env.path / "aliases")
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=env.path / "state")
    check_files(env.path)
    for path in ("aliases", "state"):
        for units in (layers, linears):
            target = reader(env, seed=2, units=units)
            use(env, target)  # has packed its old weights
            state = target.state_dict() if path == "aliases" else get_model_state_dict(target)
            dcp.load({"model": state}, checkpoint_id=env.path / path)
            if path == "state":
                set_model_state_dict(target, state)
            # With "aliases" nothing more is called: dcp.load has written into the tensors that state_dict() handed out.
            masters = {name: full(p) for name, p in source.named_parameters()}
            for name, p in target.named_parameters():
                same(full(p), masters[name], f"{name} from {path}")
            if reader is gathered:
                trains_like(env, target, masters, f"dcp.load of {path}")
    env.barrier()


@case(2)
def dcp_into_one_process(env: Env) -> None:
    """The checkpoint fills an unsharded model without a process group's help, and one of those fills a sharded one."""
    source = gathered(env, seed=1)
    masters = {name: full(p) for name, p in source.named_parameters()}
    dcp.save(source.state_dict(), checkpoint_id=env.path / "sharded")
    if env.rank == 0:
        plain = decoder(seed=2)
        state = plain.state_dict()
        dcp.load(state, checkpoint_id=env.path / "sharded", no_dist=True)
        for name, tensor in state.items():
            same(tensor, masters[name].cpu(), name)
        dcp.save(decoder(seed=3).state_dict(), checkpoint_id=env.path / "unsharded", no_dist=True)
    env.barrier()
    target = gathered(env, seed=4)
    dcp.load(target.state_dict(), checkpoint_id=env.path / "unsharded")
    trains_like(env, target, decoder(seed=3).state_dict(), "a checkpoint of one process")


@case(2)
def dcp_async_save(env: Env) -> None:
    """A checkpoint written in the background holds the masters of the moment it was asked for."""
    pair = Pair(env, policy=MIXED)
    pair.step()
    masters = {name: full(p).clone() for name, p in pair.parameters().items()}
    group = dist.new_group(backend="gloo")
    writing = dcp.async_save(pair.model.state_dict(), checkpoint_id=env.path / "async", process_group=group)
    for _ in range(2):
        pair.step()
    writing.result()
    check_files(env.path)
    target = gathered(env, seed=4)
    dcp.load(target.state_dict(), checkpoint_id=env.path / "async")
    trains_like(env, target, masters, "an asynchronous checkpoint")


@case(2, assign={"copy": {"assign": False}, "assign": {"assign": True}})
def load_state_dict(env: Env, assign: bool) -> None:
    """`Module.load_state_dict` from an ordinary model's and from our own sharded state dict, before and after use."""
    for make in (ordinary, gathered):
        for used in (False, True):
            source, target = make(env, seed=1), gathered(env, seed=2)
            if used:
                use(env, target)
            missing = target.load_state_dict(source.state_dict(), assign=assign)
            assert not missing.missing_keys and not missing.unexpected_keys
            masters = {name: full(p) for name, p in source.named_parameters()}
            trains_like(env, target, masters, f"load_state_dict of an {make.__name__} model, used={used}")


@case(2)
def load_state_dict_of_one_layer(env: Env) -> None:
    target, source = gathered(env, seed=0), ordinary(env, seed=1)
    use(env, target)
    target.layers[1].mlp.load_state_dict(source.layers[1].mlp.state_dict())
    masters = decoder(seed=0).state_dict()
    masters |= {n: t for n, t in decoder(seed=1).state_dict().items() if n.startswith("layers.1.mlp")}
    trains_like(env, target, masters, "loading one layer")


@case(2, used={"fresh": False, "used": True})
def uneven_shards_are_padded_again(env: Env, used: bool) -> None:
    """FSDP2 pads some ranks' shards anew, at its first forward, after a load, after `to`: no rank waits for another."""
    pair = Pair(env, make=uneven, policy=MIXED, reshard_after_forward=True)
    model: Any = pair.model
    if used:
        pair.step()

    def unshard() -> None:
        model.unshard()
        model.reshard()

    changes: list[Callable[[], Any]] = [
        lambda: list(nq.packed_weights(model)),
        unshard,
        lambda: nq.refresh(model),
        lambda: model.to(env.device),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}),
        lambda: model.requires_grad_(True),
        lambda: model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True),
    ]
    for change in changes:
        change()
        list(nq.packed_weights(model))
        pair.compare_forward()
        change()
        pair.compare_forward()
    pair.optimizer = adamw(model.parameters())  # the parameters are new ones now
    pair.twin_optimizer = adamw(pair.twin.model.parameters())
    for _ in range(2):
        pair.step()


@case(2, kind={"from-all": {"kind": "all"}, "from-rank-0": {"kind": "rank0"}, "sharded": {"kind": "sharded"}})
def set_model_state(env: Env, kind: str) -> None:
    source = decoder(seed=1)
    target = gathered(env, seed=2)
    use(env, target)
    if kind == "sharded":
        set_model_state_dict(target, get_model_state_dict(ordinary(env, seed=1)))
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=kind == "rank0")
        state = source.state_dict() if kind == "all" or env.rank == 0 else {}
        set_model_state_dict(target, state, options=options)
    trains_like(env, target, source.state_dict(), "set_model_state_dict")


@case(2, way={"assign": {"way": "assign"}, "to_empty": {"way": "to_empty"}, "reset": {"way": "reset"}})
def from_the_meta_device(env: Env, way: str) -> None:
    with torch.device("meta"):
        model = Decoder()
    nq.apply_qat(model, ON, gather="nvfp4")
    shard(model, layers, mesh=env.mesh(), mp_policy=MIXED)
    source = ordinary(env, seed=1)
    masters = decoder(seed=1).state_dict()
    if way == "assign":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.to_empty(device=env.device)
        if way == "to_empty":
            model.load_state_dict(source.state_dict())
        else:  # written in place, as reset_parameters does
            with torch.no_grad():
                for parameter, other in zip(model.parameters(), source.parameters(), strict=True):
                    parameter.copy_(other)
    trains_like(env, model, masters, f"{way} on the meta device")


@case(2)
def training_goes_on_where_it_stopped(env: Env) -> None:
    """Model and optimizer through DCP: the third step equals that of the run that did not stop."""
    pair = Pair(env, policy=MIXED)
    for _ in range(2):
        pair.step()
    model_state, optimizer_state = get_state_dict(pair.model, pair.optimizer)
    for slots in optimizer_state["state"].values():
        for slot in slots.values():
            assert type(local(slot)) is Tensor
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=env.path / "run")
    check_files(env.path)
    model = gathered(env, seed=7, units=linears)
    optimizer = adamw(model.parameters())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=env.path / "run")
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    pair.model, pair.optimizer = model, optimizer
    pair.compare_masters()
    pair.step()
    env.barrier()


@case(2)
def optimizer_states_whole(env: Env) -> None:
    """Full optimizer state, gathered to rank 0 and sent back from there; equal to that of the twin."""
    pair = Pair(env, policy=FULL)
    for _ in range(2):
        pair.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(pair.model, pair.optimizer, options=options)
    twin = pair.twin_optimizer.state_dict()["state"]
    if env.rank == 0:
        for i, (name, _) in enumerate(pair.twin.model.named_parameters()):
            for slot in ("exp_avg", "exp_avg_sq"):
                same(state["state"][name][slot], twin[i][slot].cpu(), f"{slot} of {name}")
        torch.save(state, env.path / "optimizer.pt")
        assert PACKAGE not in (env.path / "optimizer.pt").read_bytes()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    pair.optimizer = adamw(pair.model.parameters())
    set_optimizer_state_dict(pair.model, pair.optimizer, state if env.rank == 0 else {}, options=options)
    pair.step()


@case(2)
def a_plain_program_reads_it(env: Env) -> None:
    """A Python that cannot import the package reads the checkpoint."""
    import subprocess
    import sys

    source = gathered(env, seed=1)
    dcp.save(source.state_dict(), checkpoint_id=env.path / "dcp")
    whole = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if env.rank == 0:
        torch.save(whole, env.path / "whole.pt")
        script = (
            "import sys\n"
            "sys.modules['nvfp4_qat'] = None\n"  # importing it fails
            "import torch, torch.distributed.checkpoint as dcp\n"
            f"whole = torch.load({str(env.path / 'whole.pt')!r}, weights_only=True)\n"
            "state = {name: torch.empty_like(t) for name, t in whole.items()}\n"
            f"dcp.load(state, checkpoint_id={str(env.path / 'dcp')!r}, no_dist=True)\n"
            "assert state and all(torch.equal(state[name], t) for name, t in whole.items())\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    env.barrier()
