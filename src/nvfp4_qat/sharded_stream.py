"""`packed_weights` of a model that FSDP2 shards: every rank packs its rows, and only packed bytes are gathered.

In gather mode the bytes gathered are those training reads, after they were compared with the masters packed anew; in
module mode the shards are packed for the occasion. Everything that is not 4-bit is gathered in the dtype in which a
checkpoint stores it.

Whatever can go wrong is decided by all ranks together before the first tensor is sent: a rank that raised alone would
leave the others waiting for it. From then on every rank has to go on to the end of the stream, also one that receives
nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from .errors import MismatchError, StaleWeightsError, UserError
from .fsdp import plain_tensor
from .gather import Gather
from .model_tensors import ModelTensor
from .ops import PackedNVFP4
from .plan import QuantizedTensor, QuantPlan
from .qat_module import fusion_groups
from .shard_packer import ShardPacker, reduce_max
from .shards import Shard, Unit

T = TypeVar("T")

BUCKET = 1 << 25
"""Bytes that tensors which are gathered together may have in full; a larger one is gathered alone."""


def reshard(model: nn.Module) -> None:
    """Bring every FSDP2 module to its sharded state: after an evaluation some still show their full parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_finite(tensors: dict[str, ModelTensor]) -> None:
    """Raise `UserError` on every rank if a tensor holds NaN or Inf on any rank."""
    names = [name for name, entry in tensors.items() if entry.tensor.is_floating_point()]
    bad: list[Tensor] = []
    for name in names:
        tensor = tensors[name].tensor
        local = _local(tensor)
        low, high = torch.aminmax(local) if local.numel() else (local.new_zeros(()), local.new_zeros(()))
        bad.append(~(torch.isfinite(low) & torch.isfinite(high)))
    meshes = {e.tensor.device_mesh: None for e in tensors.values() if isinstance(e.tensor, DTensor)}
    wrong = [n for n, flag in zip(names, _any_rank(bad, meshes), strict=True) if flag]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} holds NaN or Inf: it cannot be exported. Check the training step that made it."
        )


class _Plain(NamedTuple):
    """A tensor that is not 4-bit, and the dtype in which a checkpoint stores it."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def mesh(self) -> DeviceMesh | None:
        """What its rows are divided over, all other mesh dimensions having replicas; None: it lies otherwise."""
        if not isinstance(self.tensor, DTensor):
            return None
        *outer, last = self.tensor.placements
        rows = _on_rows(last) and all(isinstance(p, Replicate) for p in outer)
        return self.tensor.device_mesh if rows else None

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def whole_tensors(tensors: dict[str, ModelTensor], rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """Gather tensors in their stored dtypes; only ``rank`` receives, or every rank if None.

    Small ones go together: a model has hundreds of norms and biases, and a collective for each would take its time.
    """
    for bucket in _buckets(_Plain(n, plain_tensor(e.tensor.detach()), e.stored_dtype) for n, e in tensors.items()):
        yield from _whole_rows(bucket, rank) if bucket[0].mesh is not None else _whole(bucket[0], rank)


def _buckets(tensors: Iterable[_Plain]) -> Iterator[list[_Plain]]:
    bucket: list[_Plain] = []
    for found in tensors:
        alone = found.mesh is None or found.nbytes > BUCKET
        if bucket and (alone or found.mesh != bucket[0].mesh or sum(p.nbytes for p in bucket) + found.nbytes > BUCKET):
            yield bucket
            bucket = []
        if alone:
            yield [found]
        else:
            bucket.append(found)
    if bucket:
        yield bucket


def packed_from_gather(gather: Gather, rank: int | None) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    """The packed weights of a model in gather mode, one FSDP unit at a time.

    Raises:
        StaleWeightsError: names every weight that changed without notice, on every rank.
    """
    gather.agree()
    stale = gather.unnoticed_changes()
    if stale:
        raise StaleWeightsError.of(stale)
    return _undisturbed(gather, rank, gather.version)


def _undisturbed(gather: Gather, rank: int | None, version: int) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    units = _units([unit.packed for unit in gather.units], gather.packer.g, gather.plan, rank)
    while True:
        if gather.stale or gather.version != version:
            raise MismatchError.while_read()
        found = next(units, None)
        if found is None:
            return
        yield found


def packed_from_shards(
    model: nn.Module, plan: QuantPlan, tensors: dict[str, ModelTensor], rank: int | None
) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    """The packed weights of a sharded model in module mode: packed here, gathered one fusion group at a time.

    Raises:
        StaleWeightsError: names the weights that training computes with old global scales of, on every rank. A change
            that was not noticed and left the scale as it was did no harm: training rounds what FSDP gathers.
    """
    groups = [(group, group.stale()) for group in fusion_groups(model)]
    units = []
    for members in plan.groups().values():
        for entry in members:
            master = tensors[entry.name].tensor
            device = _device(master) if isinstance(master, DTensor) else master.device
            units.append(Unit([_shard(entry, master)], device))
    packer = ShardPacker(units, plan.config.global_scale)
    packer.pack(units)
    scales = {s.name: packer.g[s.first : s.first + s.items] for unit in units for s in unit.shards}
    wrong = [
        not was_stale and not all(m.scaled_by(scales[m.name]) for m in group.members()) for group, was_stale in groups
    ]
    meshes = {s.mesh: None for unit in units for s in unit.shards if s.mesh is not None}
    found = reduce_max(torch.tensor(wrong, dtype=torch.int32, device=units[0].device), meshes).tolist()
    if any(found):
        unnoticed = [group for (group, _), is_wrong in zip(groups, found, strict=True) if is_wrong]
        raise StaleWeightsError.of([m.name for group in unnoticed for m in group.members()])
    return _units(units, packer.g, plan, rank)


def on_rank_zero(stream: Iterator[T], use: Callable[[Iterator[T]], None]) -> None:
    """Let rank 0 use a stream that all ranks take part in; if it fails, every rank raises.

    Args:
        stream: collective, of tensors for rank 0.
        use: called on rank 0. If it raises, the stream is exhausted all the same, because the others wait for it.
    """
    problem: BaseException | None = None
    try:
        try:
            if dist.get_rank() == 0:
                use(stream)
        finally:
            for _ in stream:
                pass
    except (Exception, KeyboardInterrupt) as error:
        problem = error
    told = [None if problem is None else f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(told, src=0)
    if problem is not None:
        raise problem
    if told[0] is not None:
        raise UserError(f"rank 0 failed: {told[0]}")


def _shard(entry: QuantizedTensor, master: Tensor) -> Shard:
    if not isinstance(master, DTensor):
        return Shard(entry.name, entry.shape, entry.batch_dims, entry.group, None, 1, 0, master.detach)
    mesh, placements = master.device_mesh, master.placements
    *outer, last = placements
    if not all(isinstance(p, Replicate) for p in outer) or not (_on_rows(last) or isinstance(last, Replicate)):
        raise UserError(
            f"{entry.name} is sharded as {placements}: only shards on dim 0 of one mesh dimension can be packed where "
            "they lie, because blocks of 16 run along the last dimension"
        )
    world = mesh.size(mesh.ndim - 1) if _on_rows(last) else 1
    rank = mesh.get_local_rank(mesh.ndim - 1) if world > 1 else 0
    return Shard(
        entry.name, entry.shape, entry.batch_dims, entry.group, mesh, world, rank, lambda: master.to_local().detach()
    )


def _units(
    units: Sequence[Unit], g: Tensor, plan: QuantPlan, rank: int | None
) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    for unit in units:
        shard = unit.shards[0]
        group = shard.mesh.get_group(shard.mesh.ndim - 1) if shard.mesh is not None and unit.world > 1 else None
        gathered = _gather_bytes(unit.buffer, group, rank)
        if gathered is not None:
            for member, packed in zip(unit.shards, unit.whole(gathered, g), strict=True):
                yield plan[member.name], packed


def _whole(plain: _Plain, rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """A tensor in full, on the device it computes on, however it lies."""
    whole = plain.tensor
    if isinstance(whole, DTensor):
        local = _local(whole).to(device=_device(whole), dtype=plain.dtype)
        again = DTensor.from_local(
            local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        whole = again.full_tensor()
    if rank is None or rank == dist.get_rank():
        yield plain.name, whole.to(plain.dtype)


def _whole_rows(bucket: Sequence[_Plain], rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors whose rows are divided over one mesh, in full, by one collective."""
    mesh = bucket[0].mesh
    assert mesh is not None
    world = mesh.size(mesh.ndim - 1)
    shares = [_padded_rows(plain, world) for plain in bucket]
    sizes = [share.numel() for share in shares]
    data = shares[0] if len(shares) == 1 else torch.cat(shares)
    del shares
    gathered = _gather_bytes(data, mesh.get_group(mesh.ndim - 1) if world > 1 else None, rank)
    if gathered is None:
        return
    for plain, part in zip(bucket, gathered.view(world, -1).split(sizes, dim=1), strict=True):
        whole = (part if len(bucket) == 1 else part.clone(memory_format=torch.contiguous_format)).reshape(-1)
        rows, *rest = plain.tensor.shape
        yield plain.name, whole.view(plain.dtype).view(world * -(-rows // world), *rest)[:rows]


def _padded_rows(plain: _Plain, world: int) -> Tensor:
    """The bytes of this rank's rows, on the device that computes, and of zeros for the rows that others have more."""
    tensor = plain.tensor
    assert isinstance(tensor, DTensor)
    rows = -(-tensor.shape[0] // world)
    local = _local(tensor).to(device=_device(tensor), dtype=plain.dtype).contiguous()
    if local.shape[0] < rows:
        padded = local.new_zeros((rows, *tensor.shape[1:]))
        padded[: local.shape[0]] = local
        local = padded
    return local.view(-1).view(torch.uint8) if local.numel() else local.new_zeros(0, dtype=torch.uint8)


def _gather_bytes(mine: Tensor, group: Any, rank: int | None) -> Tensor | None:
    """All ranks' equally long bytes in order; None on a rank that does not receive. ``group`` None: no other ranks."""
    if group is None:
        return mine.clone() if rank is None or rank == dist.get_rank() else None
    world = dist.get_world_size(group)
    if rank is None:
        out = mine.new_empty(world * mine.numel())
        _all_gather(out, mine, group=group)
        return out
    if rank not in dist.get_process_group_ranks(group):  # the other replicas of HSDP have nothing to add
        return None
    if rank != dist.get_rank():
        dist.gather(mine, None, dst=rank, group=group)
        return None
    out = mine.new_empty(world * mine.numel())
    dist.gather(mine, list(out.chunk(world)), dst=rank, group=group)
    return out


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


def _any_rank(flags: Sequence[Tensor], meshes: Iterable[DeviceMesh]) -> list[bool]:
    """Which flags are set on any rank of the meshes."""
    meshes = list(meshes)
    if not flags:
        return []
    device = torch.device(meshes[0].device_type) if meshes else flags[0].device
    together = torch.stack([flag.to(device).int() for flag in flags])
    return [bool(flag) for flag in reduce_max(together, meshes).tolist()]


def _local(tensor: Tensor) -> Tensor:
    plain = plain_tensor(tensor.detach())
    return plain.to_local() if isinstance(plain, DTensor) else plain


def _device(tensor: DTensor) -> torch.device:
    """Where the mesh computes; a CPU-offloaded shard lies elsewhere."""
    kind = tensor.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _on_rows(placement: Any) -> bool:
    return type(placement) is ShardPlacement and placement.dim == 0
