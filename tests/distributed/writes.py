"""Writes into masters: which are seen, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq
from distributed.instruments import Collectives, raises_everywhere
from distributed.models import NAME, decoder, ones, uneven
from distributed.pair import MIXED, Pair, full, same, same_stream, shard


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


def local_item(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        local = p.to_local()
        for i in range(len(local)):
            local[i] = local[i] * 3.0


def local_slice(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.to_local()[:, ::2] *= 3.0
        p.to_local().narrow(1, 0, p.shape[1])[:, 1::2].mul_(3.0)


def local_select(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        for row in range(p.to_local().shape[0]):
            p.to_local().select(0, row).mul_(3.0)


def local_unbind(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        for row in p.to_local().unbind(0):
            row.mul_(3.0)


def local_transposed(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        p.to_local().t().mul_(3.0)
        p.to_local().chunk(2)[0].unflatten(1, (-1, 16)).mul_(1.0)


def local_out(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        local = p.to_local()
        torch.mul(local, 3.0, out=local)


def local_set_by_mask(pair: Pair, p: Any) -> None:
    with torch.no_grad():
        local = p.to_local()
        tripled = local * 3.0
        local.masked_scatter_(torch.ones_like(tripled, dtype=torch.bool), tripled)


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
    no_grad_mul, item_assignment, foreach_mul, local_mul, local_rows, local_item, local_slice, local_select,
    local_unbind, local_transposed, local_out, local_set_by_mask, detached_view, sharded_state, state_copy, set_state,
    load, optimizer_without_torch, through_data, through_local_data,
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


@case(2, make={"even": {"make": decoder, "name": NAME}, "uneven": {"make": uneven, "name": "layers.0.wide.weight"}})
def aliases_from_before_the_first_packing(env: Env, make: Callable[[], nn.Module], name: str) -> None:
    """A view of a shard taken right after fully_shard is written much later: seen, wherever FSDP2 has put the shard."""
    pair = Pair(env, make=make, reshard_after_forward=True)
    taken: Any = pair.parameters()[name]
    alias = taken.to_local()
    pair.step()
    pair.compare_forward()
    before = full(taken).clone()
    with torch.no_grad():
        alias.mul_(3.0)
        connected = not torch.equal(full(taken), before)
        dict(pair.twin.model.named_parameters())[name].copy_(full(taken))
    pair.compare_forward("output after the write")
    plain = shard(make().to(env.device), mesh=env.mesh())
    of_plain: Any = dict(plain.named_parameters())[name]
    alias = of_plain.to_local()
    plain(ones(env.device))
    plain.reshard()
    before = full(of_plain).clone()
    with torch.no_grad():
        alias.mul_(3.0)
    assert connected or torch.equal(full(of_plain), before), "the alias would be one without the package"


@case(2)
def reading_is_not_writing(env: Env) -> None:
    """Copies of masters, sums and norms cause no packing; what is copied out is plain."""
    pair = Pair(env, policy=MIXED, reshard_after_forward=True)
    pair.step()
    pair.compare_forward()
    for p in pair.parameters().values():
        assert isinstance(p, DTensor)
        mine = p.detach().to_local()
        buffer = torch.empty(mine.shape, dtype=mine.dtype, device=mine.device)
        with torch.no_grad():
            buffer.copy_(p.to_local())
            moving_average = torch.zeros_like(buffer)
            moving_average.lerp_(p.to_local(), 0.5)
            torch._foreach_copy_([buffer], [p.to_local()])
            moving_average.add_(p.to_local()).mul_(p.to_local())
            stacked = torch.cat([buffer.flatten(), p.to_local().flatten()])
        same(buffer, mine + 0, "copy")
        assert type(stacked) is type(moving_average) is Tensor
        for value in (p.clone(), p + 1, p.norm(), p.full_tensor(), p.to_local().clone(), p.to_local().float()):
            assert isinstance(value, Tensor)
    with Collectives() as seen:
        pair.compare_forward()
    assert not seen.amax_reductions(), "reading masters made them count as written"
    pair.step()


def storage_of(tensor: Tensor) -> Any:
    """The memory of what `state_dict` handed out, this rank's rows, as a foreign kernel sees it."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numpy() if tensor.device.type == "cpu" else tensor.detach()


@case(2)
def an_optimizer_that_writes_to_raw_memory(env: Env) -> None:
    """A `torch.optim.Optimizer` whose step goes through memory that nobody watches: its step is what tells."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, model: nn.Module) -> None:
            parameters = dict(model.named_parameters())
            super().__init__(parameters.values(), {})
            state = model.state_dict()
            self.pairs = [(p, storage_of(state[name])) for name, p in parameters.items()]

        def step(self, closure: None = None) -> None:
            for p, alias in self.pairs:
                grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                if isinstance(alias, Tensor):
                    alias.data.sub_(grad)
                else:
                    alias -= grad.numpy()

    pair = Pair(env, reshard_after_forward=True)
    pair.optimizer, pair.twin_optimizer = Foreign(pair.model), Foreign(pair.twin.model)
    for _ in range(3):
        pair.step()
        pair.compare_forward()


def write_unseen(alias: Any) -> None:
    if isinstance(alias, Tensor):
        alias.data.mul_(3.0)
    else:
        alias *= 3.0


@case(2, ranks={"all": {"ranks": (0, 1)}, "first": {"ranks": (0,)}, "last": {"ranks": (1,)}})
def unseen_writes_stop_the_next_sync(env: Env, ranks: tuple[int, ...]) -> None:
    """Through memory nobody watches: every rank raises at packed_weights and names the weight; refresh mends it."""
    pair = Pair(env, reshard_after_forward=True)
    alias = storage_of(pair.model.state_dict()[NAME])
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
    alias = storage_of(pair.model.state_dict()[NAME])
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
                parameter.to_local().mul_(3.0)
        nq.refresh(pair.model)
        with torch.no_grad():
            dict(pair.twin.model.named_parameters())[NAME].copy_(full(parameter))
        pair.compare_forward()


@case(2, rank={"rank-0": 0, "rank-1": 1})
def a_state_dict_written_with_what_was_there(env: Env, rank: int) -> None:
    """Every rank writes into its state dict, but what one of them writes it had before: all pack, or none."""
    pair = Pair(env, reshard_after_forward=True)
    pair.step()
    for write in (lambda t, factor: t.to_local().mul_(factor), lambda t, factor: t.copy_(t * factor)):
        pair.compare_forward()
        state = pair.model.state_dict()[NAME]
        write(state, 3.0) if env.rank == rank else write(state, 1.0)
        with torch.no_grad():
            dict(pair.twin.model.named_parameters())[NAME].copy_(full(pair.parameters()[NAME]))
        pair.compare_forward("output after the write")
    pair.step()


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
