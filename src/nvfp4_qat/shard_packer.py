"""`ShardPacker`: every rank packs the rows it holds, of all weights of a model together.

Only the largest magnitudes need communication: those of all weights are taken in one pass and reduced with one
all-reduce per mesh dimension; all shards are packed in one more pass.

With power-of-two global scales the second pass over the weights is the first: they are packed with the old global
scales while their magnitudes are taken, and only weights whose scale moved are packed again. A scale moves when amax
crosses a power of two times 2688, which is rare.

NaN in any rank's shard stops every rank, with the tensor's name: all know the magnitudes of all weights. To look at
them the host waits for the device, which then has nothing to do when it goes on. So `pack` can leave
that to `settle`, which the caller calls some launches later, at the same place on every rank; what follows from the
magnitudes, new scales and packing again where they moved, happens on the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import ops, reference
from .errors import UserError
from .multi import Amaxes, Packs
from .shards import Unit, aligned


def reduce_max(values: Tensor, meshes: Iterable[DeviceMesh]) -> Tensor:
    """The maximum over all ranks of every mesh, in place: one all-reduce a mesh dimension."""
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return values


class ShardPacker:
    """Packs the shards of some units, all on one device.

    Args:
        units: what to pack; their buffers are filled by `pack`.
        policy: of the global scale.
    """

    def __init__(self, units: Sequence[Unit], policy: str) -> None:
        self.units, self.policy = list(units), policy
        self.shards = [s for unit in self.units for s in unit.shards]
        self.device = self.units[0].device
        groups: dict[tuple[str, int], int] = {}
        numbers: list[int] = []
        for shard in self.shards:
            shard.first = len(numbers)
            numbers += [groups.setdefault((shard.group, i), len(groups)) for i in range(shard.items)]
        self.g = torch.ones(len(numbers), dtype=torch.float32, device=self.device)
        self._amax = torch.zeros(len(numbers), dtype=torch.int32, device=self.device)
        self._packed_before = False
        self._unchecked: tuple[Tensor, torch.cuda.Event | None] | None = None
        """Magnitudes on their way to the host, and when they are there."""
        self._group_of = torch.tensor(numbers, device=self.device)
        self._groups = len(groups)
        self._meshes = list({s.mesh: None for s in self.shards if s.mesh is not None})
        self._stage = _Stage(self.device)
        self._all = _Chunk(self.units, self._stage)
        self._single: dict[int, _Chunk] = {}

    def amax(self) -> Tensor:
        """Largest magnitudes of all weights, over all ranks: int32 bit patterns, one for each global scale."""
        out = torch.zeros_like(self._amax)
        for chunk in self._chunks(self.units):
            chunk.amax(out)
        return self._reduced_amax(out)

    def scales(self, amax: Tensor) -> Tensor:
        """Global scales from `amax`: of each weight, the one of its fusion group."""
        group = torch.zeros(self._groups, dtype=torch.int32, device=self.device)
        group.scatter_reduce_(0, self._group_of, amax, "amax")
        return reference.global_scale(group.view(torch.float32), self.policy)[self._group_of]

    def pack(self, units: Sequence[Unit], wait: bool = True) -> list[Unit]:
        """Pack the shards of some units into their buffers. Collective.

        Args:
            units: those whose weights changed, the same on every rank.
            wait: whether to wait for the device, once, and look at the weights. Else that is left to `settle` if
                these are all units, not packed for the first time, their masters on the device and on one mesh.

        Returns:
            The units that were packed: the given ones, and those with a weight whose fusion group got another scale.

        Raises:
            UserError: a weight holds NaN, Inf or a magnitude beyond NVFP4, on every rank that holds it; the buffers of
                the given units hold nothing useful then. Also, before anything is packed, what `settle` raises.
        """
        self.settle()
        speculative = self._packed_before and self.policy == "pow2"
        chunks = self._chunks(units)
        later = not wait and self._packed_before and chunks == [self._all] and len(self._meshes) <= 1
        if len(units) == len(self.units):
            amax = torch.zeros_like(self._amax)
        else:
            amax = self._amax.clone()
            for unit in units:
                amax[unit.items] = 0
        for chunk in chunks:
            if speculative:
                chunk.pack(self.g, amax)
            else:
                chunk.amax(amax)
        amax = self._reduced_amax(amax)
        g = self.scales(amax)
        moved = (g != self.g).int()
        if later:
            self._send(amax)
        else:
            host = torch.stack((amax, moved)).cpu()
            self.check(host[0])
            self._check_other_meshes(host[0])
        self.g.copy_(g)
        self._amax = amax
        self._packed_before = True
        if not speculative:
            for chunk in chunks:
                chunk.pack(self.g)
        if later:
            if speculative:
                self._all.pack_again(self.g, moved)
            return list(units)
        if not host[1].any():
            return list(units)
        given = {id(unit) for unit in units}
        rest = [unit for unit in self.units if id(unit) not in given and host[1][unit.items].any()]
        for chunk in (*(chunks if speculative else ()), *(self._chunk(unit) for unit in rest)):
            chunk.pack(self.g, moved=moved)
        return [*units, *rest]

    def settle(self) -> None:
        """Look at the weights that `pack` did not wait for; waits until they are packed, if they are not yet.

        Raises:
            UserError: as `pack` does, on every rank that calls this.
        """
        if self._unchecked is None:
            return
        (amax, arrival), self._unchecked = self._unchecked, None
        if arrival is not None:
            arrival.synchronize()
        try:
            self.check(amax)
        except UserError:
            self._packed_before = False  # scales that mean nothing are no guess for the next ones
            raise

    @property
    def settled(self) -> bool:
        """Whether `settle` has nothing to look at."""
        return self._unchecked is None

    def _send(self, amax: Tensor) -> None:
        """Have magnitudes copied to the host, for `settle`."""
        if not amax.is_cuda:
            self._unchecked = amax.clone(), None
            return
        host = torch.empty(amax.shape, dtype=amax.dtype, pin_memory=True)
        host.copy_(amax, non_blocking=True)
        self._unchecked = host, torch.cuda.current_stream(amax.device).record_event()

    def differing(self) -> Tensor:
        """Which weights would be packed otherwise with the present global scales: int32, one for each of those.

        1 where an item of the local shard has other bytes than are in its unit's buffer, else 0.
        """
        differs = torch.zeros_like(self._amax)
        for chunk in self._chunks(self.units):
            chunk.compare(self.g, differs)
        return differs

    def check(self, amax: Tensor) -> None:
        """Raise `UserError` with the name of the first weight that cannot be quantized; ``amax`` is on the host."""
        values = amax.view(torch.float32)
        limit = ops.largest_magnitude()
        if bool((values <= limit).all()):  # false for NaN
            return
        for shard in self.shards:
            ops.check_amax(values[shard.first : shard.first + shard.items], shard.name)

    def _check_other_meshes(self, amax: Tensor) -> None:
        """Raise if ranks that this one shares a mesh with have raised, for a weight that this one does not hold."""
        if len(self._meshes) > 1:
            bad = ~(amax.view(torch.float32) <= ops.largest_magnitude())
            if bool(self.reduced(bad.any().int().reshape(1).to(self.device))):
                raise UserError("another rank holds a weight with NaN or Inf, and names it: see its error")

    def reduced(self, flags: Tensor) -> Tensor:
        """The maximum over all ranks of every mesh, in place; int32, equally long on every rank."""
        return reduce_max(flags, self._meshes)

    def _reduced_amax(self, amax: Tensor) -> Tensor:
        """The maximum over all ranks that hold a weight, replicas included: NaN in one of them stops all."""
        if len(self._meshes) <= 1:
            return self.reduced(amax)
        for mesh in self._meshes:  # each has other ranks, which hold other weights
            members = [s for s in self.shards if s.mesh == mesh]
            mine = torch.cat([amax[s.first : s.first + s.items] for s in members])
            reduce_max(mine, [mesh])
            for s, values in zip(members, mine.split([s.items for s in members]), strict=True):
                amax[s.first : s.first + s.items] = values
        return amax

    def _chunks(self, units: Sequence[Unit]) -> "list[_Chunk]":
        """All units in one chunk, or each in its own: if they are some only, or masters must be brought here."""
        here = all(unit.shards[0].master().device == self.device for unit in units)
        return [self._all] if here and len(units) == len(self.units) else [self._chunk(unit) for unit in units]

    def _chunk(self, unit: Unit) -> "_Chunk":
        return self._single.setdefault(id(unit), _Chunk([unit], self._stage))


class _Stage:
    """Device memory that masters from elsewhere (CPU offload) are copied to, one unit after the other."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def brought(self, masters: Sequence[Tensor]) -> list[Tensor]:
        """The masters on the device, copied if they are not there."""
        device = self._memory.device
        if all(m.device == device for m in masters):
            return list(masters)
        ends = list(accumulate((aligned(m.nbytes) for m in masters), initial=0))
        if ends[-1] > self._memory.numel():
            self._memory = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        found = []
        for master, at in zip(masters, ends, strict=False):
            copy = self._memory[at : at + master.nbytes].view(master.dtype).view(master.shape)
            found.append(copy.copy_(master, non_blocking=True))
        return found


class _Chunk:
    """Units whose shards are packed by one call, and the kernels' tables for their masters.

    The tables know addresses only: masters that are moved away must not be kept alive.
    """

    def __init__(self, units: Sequence[Unit], stage: _Stage) -> None:
        self.shards = [s for unit in units for s in unit.shards]
        self._stage = stage
        self._packed = [view for unit in units for view in unit.packed_views()]
        self._amaxes: Amaxes | None = None
        self._packs: Packs | None = None

    def amax(self, out: Tensor) -> None:
        masters = self._masters()
        if self._amaxes is None or not self._amaxes.fits(masters):
            self._amaxes = Amaxes(masters, *self._items())
        self._amaxes(out)
        if not self._amaxes.release():
            self._amaxes = None

    def pack(self, g: Tensor, amax: Tensor | None = None, moved: Tensor | None = None) -> None:
        with self._tables() as packs:
            packs(g, amax, moved)

    def pack_again(self, g: Tensor, moved: Tensor) -> None:
        """The same directly after it, when the masters are where they were."""
        if self._packs is None:
            self.pack(g, moved=moved)
        else:
            self._packs(g, None, moved)

    def compare(self, g: Tensor, differs: Tensor) -> None:
        with self._tables() as packs:
            packs.compare(g, differs)

    @contextmanager
    def _tables(self) -> Iterator[Packs]:
        masters = self._masters()
        if self._packs is None or not self._packs.fits(masters):
            packed, scale = [p for p, _ in self._packed], [s for _, s in self._packed]
            self._packs = Packs(masters, *self._items(), packed, scale)
        yield self._packs
        if not self._packs.release():
            self._packs = None

    def _items(self) -> tuple[list[int], list[int]]:
        return [s.local_items for s in self.shards], [s.local_first for s in self.shards]

    def _masters(self) -> list[Tensor]:
        masters = [s.master() for s in self.shards]
        for shard, master in zip(self.shards, masters, strict=True):
            if master.is_meta:
                raise UserError(f"{shard.name} is on the meta device and holds no data: load the weights first")
            assert master.shape == shard.local_shape, (shard.name, master.shape, shard.local_shape)
        return self._stage.brought(masters)
