"""Gather mode: FSDP2 gathers packed weights, 4.5 bits each, and computes with what they stand for.

`attach` puts a `ShardedMaster` in the place of every planned parameter; ``fully_shard`` then shards those. From there
on a weight goes around like this::

    master shard ── once per optimizer step, all weights together ──> packed shard (one buffer per FSDP unit)
    packed shard ── FSDP2's own all-gather, forward, backward, recompute, every micro-batch ──> gathered bytes
    gathered bytes ── one kernel per unit ──> the unsharded parameters, which the modules use as they are

The unsharded parameter *is* the dequantized weight, so its gradient is the straight-through gradient, whatever module
computes with it. How the bytes of a unit travel is in `gather_unit`.

When a weight counts as changed: after a `torch.optim` step that owns it, after ``load_state_dict``, after any operation
that writes into it (`ShardedMaster` sees those), after a write into the tensors of a state dict (``dcp.load``; their
version counters tell), after `refresh`. The next gather of its unit then packs all units with changes, which is
collective among the ranks that the weights are divided over: each must see the same changes, as it does in any FSDP
program. What happens on some ranks only, because FSDP2 pads shards there, is not taken for a change. Writes through
memory that PyTorch does not see (a foreign kernel, a collective on the local tensor) need `nvfp4_qat.refresh`; the next
sync or export notices them.

A weight that cannot be quantized (NaN) is an error in the forward that packs it, on every rank: by its third gather, by
its end, or before the optimizer's step, whichever comes first, so that the host need not wait for the device until then
(`ShardPacker.settle`).

Streams. A gather may run on another stream than the one that packed or the one that wrote the weights. Packing waits
for the writers and for all readers of the bytes that it replaces; a gather waits for the packing.

What is deliberately missing: sharding on other dimensions, tensor parallelism, ``reshard_after_forward=<int>`` (FSDP2
has no such path for extensions), compiled autograd.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from . import gather_param
from .errors import MismatchError, UserError
from .fsdp import Memory, ShardedMaster
from .gather_groups import check_group, param_groups, room
from .gather_unit import GatherUnit
from .naming import canonical_name
from .plan import QuantizedTensor, QuantPlan
from .shard_packer import ShardPacker
from .shards import Shard, Unit
from .streams import StreamOrder

AHEAD = 2
"""Gathers after one that packs, by which the packed weights are looked at: the device has more to do meanwhile."""


class GatherWeight:
    """A weight in gather mode: its plan entry, and what FSDP2 does with it."""

    def __init__(self, entry: QuantizedTensor, gather: "Gather") -> None:
        self.entry, self.name, self._gather = entry, entry.name, weakref.ref(gather)
        self.unit: GatherUnit | None = None
        self.index = -1
        """Its place in the unit."""
        self.affected: list[GatherUnit] = []
        """Its unit, and those with a weight that shares its global scale."""
        self.fsdp_param: Any = None
        self.memory: Memory | None = None
        """Where the master is, as far as is known."""
        self.generation = 0
        """Counts the writes into the master."""

    @property
    def gather(self) -> "Gather":
        gather = self._gather()
        if gather is None:
            raise UserError(f"the model that {self.name} belongs to is gone")
        return gather

    def sharded(self) -> bool:
        return self.unit is not None

    def note(self) -> None:
        """Record that the master was written, on the current stream."""
        self.note_all([self])

    @staticmethod
    def note_all(weights: "Iterable[GatherWeight]") -> "set[Gather]":
        """The same of several; returns whose they are."""
        gathers = set()
        for weight in weights:
            weight.generation += 1
            for unit in weight.affected:
                unit.stale = True
            gather = weight._gather()
            if gather is not None:
                gathers.add(gather)
        for gather in gathers:
            gather.streams.wrote()
        return gathers

    def before_gather(self, shard: ShardedMaster) -> tuple[Tensor, ...]:
        """What FSDP2 gathers for this weight: the unit's packed bytes, or nothing if another weight brings them."""
        if self.index <= 0 or shard.memory is not self.memory:
            self.gather.ensure_fresh(self, shard)
        assert self.unit is not None
        return self.unit.contribution(self.index)

    def after_gather(self, gathered: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None) -> Any:
        """Give FSDP2 the full parameter, to be filled with the unit's others; FSDP2 frees the second result."""
        assert self.unit is not None
        if out is None:
            with torch.inference_mode(False):  # it may be trained, though it is evaluated first
                w = torch.empty(self.entry.shape, dtype=dtype, device=self.unit.packed.device)
        else:
            w = out
        if self.unit.collect(self.index, gathered, w):
            gather = self.gather
            gather.streams.reads()
            self.unit.fill(gather.packer.g)
        return (w, (w,)) if out is None else None

    def fill_unit(self) -> bool:
        """Fill all parameters of the unit, whose first weight this is; False if FSDP2 must go through them."""
        assert self.unit is not None
        gather = self.gather
        gather.streams.reads()
        return self.unit.fill_all(gather.packer.g)

    def shard(self) -> ShardedMaster:
        """This rank's rows of the master."""
        shard = self.fsdp_param.sharded_param._local_tensor
        if not isinstance(shard, ShardedMaster):
            raise MismatchError(
                f"the shard of {self.name} was replaced by an unquantized tensor: load weights with load_state_dict or "
                "torch.distributed.checkpoint, which keep it"
            )
        return shard

    def master(self) -> Tensor:
        """The data of `shard`, which is the master from now on: writes into its memory count."""
        shard = self.shard()
        self.adopt(shard)
        return shard.plain

    def adopt(self, shard: ShardedMaster) -> None:
        """Take a shard in other memory than before for the master."""
        self.memory = shard.memory
        self.memory.adopted, self.memory.written = True, False


class _HandedOut(NamedTuple):
    """A tensor of a state dict: it may be written into, which only its version counters tell."""

    weight: GatherWeight
    probe: Tensor
    """Shares the version counter of the DTensor that was handed out, and not its memory."""
    probe_version: int
    memory: Memory
    plain_version: int

    def written(self) -> bool:
        shard = self.weight.shard()
        inside = shard.memory is self.memory and shard.plain._version != self.plain_version
        return inside or self.probe._version != self.probe_version


class Gather:
    """All gathered weights of one model.

    Args:
        model: what `apply_qat` was called on; kept weakly.
        plan: its plan.
        keep: whether gathered bytes are kept until the optimizer's step, so that each weight travels once.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan, keep: bool = False) -> None:
        self._model, self.plan, self._keep = weakref.ref(model), plan, keep
        self.weights = {entry.name: GatherWeight(entry, self) for entry in plan.quantized}
        self.units: list[GatherUnit] = []
        self.streams = StreamOrder()
        self._packer: ShardPacker | None = None
        self._replicated = False
        self._gathers = 0
        """Since the last packing."""
        self._handed_out: list[_HandedOut] = []

    @property
    def packer(self) -> ShardPacker:
        assert self._packer is not None
        return self._packer

    @property
    def stale(self) -> bool:
        """Whether a write was seen since the last packing."""
        return not self.units or any(unit.stale for unit in self.units)

    @property
    def version(self) -> int:
        """Changes whenever a unit is packed."""
        return sum(unit.version for unit in self.units)

    def hand_out(self, weight: GatherWeight, given: Tensor) -> None:
        """Remember a tensor of a state dict, an alias of the master, until the next gather."""
        if weight.unit is None or not isinstance(given, DTensor) or given.is_inference():
            return
        probe: Any = given.detach()
        probe._local_tensor = torch.empty(0)
        shard = weight.shard()
        self._handed_out.append(_HandedOut(weight, probe, given._version, shard.memory, shard.plain._version))

    def ensure_fresh(self, weight: GatherWeight, shard: ShardedMaster) -> None:
        """Pack before a gather if the unit's weights changed. Collective then."""
        self._find_units()
        self._look_at_handed_out()
        if shard.memory is not weight.memory:
            if shard.memory.written or shard.memory.generation != weight.generation:
                weight.note()
            weight.adopt(shard)
        unit = weight.unit
        assert unit is not None
        if unit.stale:
            self._pack(wait=False)
        else:
            self._gathers += 1
            if self._gathers == AHEAD:
                self.settle()
        self.streams.reads()

    @property
    def settled(self) -> bool:
        """Whether `settle` has nothing to do."""
        return self._packer is None or self._packer.settled

    def settle(self) -> None:
        """Look at the weights that were packed without waiting for the device.

        Raises:
            UserError: one cannot be quantized, on every rank; the next gather packs all of them again.
        """
        if self.settled:
            return
        try:
            self.packer.settle()
        except UserError:
            for unit in self.units:
                unit.stale = True
            raise

    def refresh(self) -> None:
        """Pack all weights from their masters. Collective.

        Raises:
            UserError: weights that are not sharded or cannot be quantized; the latter on every rank.
        """
        self._find_units()
        for unit in self.units:
            unit.stale = True
        self._pack()

    def after_step(self) -> None:
        """Free what is kept, and with replicas (HSDP) pack at once: one of them may compute without the others next."""
        for unit in self.units:
            unit.release()
        if self._replicated:
            self._pack(wait=False)

    def _pack(self, wait: bool = True) -> None:
        """Pack what is stale; ``wait`` as for `ShardPacker.pack`."""
        self.settle()
        self._gathers = 0
        stale = [unit for unit in self.units if unit.stale]
        # Not seen by dispatch modes: see `fusion.packing`.
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            self.streams.before_packing()
            for unit in stale:
                unit.version += 1  # also if packing fails half-way
            packed = {id(unit) for unit in self.packer.pack([unit.packed for unit in stale], wait)}
            self.streams.packed()
        for unit in self.units:
            if id(unit.packed) in packed and not unit.stale:
                unit.version += 1
            unit.stale = False
        self._handed_out = []

    def _look_at_handed_out(self) -> None:
        handed_out, self._handed_out = self._handed_out, []
        for entry in handed_out:
            if entry.written():
                entry.weight.note()

    def agree(self) -> None:
        """Pack if any rank has seen a change. Collective."""
        self._find_units()
        self.settle()
        self._look_at_handed_out()
        flags = torch.tensor([int(unit.stale) for unit in self.units], dtype=torch.int32, device=self.packer.device)
        for unit, flag in zip(self.units, self.packer.reduced(flags).tolist(), strict=True):
            unit.stale = bool(flag)
        if self.stale:
            self._pack()

    def unnoticed_changes(self) -> list[str]:
        """The weights whose packed bytes are not those of their masters. Collective; every rank gets the same list."""
        with torch.inference_mode(False), torch.no_grad():
            self.streams.before_packing()
            packer = self.packer
            amax = packer.amax()
            packer.check(amax.cpu())
            moved = packer.scales(amax) != packer.g
            flags = packer.reduced(torch.maximum(packer.differing(), moved.int()))
            self.streams.packed()
            changed = flags.cpu().numpy()
        return [s.name for s in packer.shards if changed[s.first : s.first + s.items].any()]

    def check_sharded(self) -> None:
        """Raise `UserError` unless every planned weight is in some FSDP unit, and `MismatchError` if one is lost."""
        self._find_units()
        for weight in self.weights.values():
            weight.shard()

    def check_modules(self, model: nn.Module) -> None:
        """Raise `MismatchError` unless the model still holds the modules whose weights are gathered."""
        modules = {canonical_name(name): module for name, module in model.named_modules()}
        self._find_units()
        replaced = [
            w.name for w in self.weights.values() if modules.get(w.entry.module) is not w.fsdp_param._module_info.module
        ]
        if replaced:
            raise MismatchError(
                f"the model no longer quantizes what its plan says: the modules of {', '.join(replaced)} were replaced "
                "after apply_qat. Change modules before apply_qat, or add them to ignore_patterns."
            )

    def _find_units(self) -> None:
        if self.units:
            return
        model = self._model()
        if model is None:
            raise UserError("the model that apply_qat was called on is gone")
        units: list[tuple[Any, list[tuple[Any, GatherWeight]], Unit]] = []
        for group in param_groups(model):
            # FSDP2 may replace shards at its first use, on ranks with padding only. Let it do so now, on all of them.
            group.lazy_init()
            found = [(p, w) for p in group.fsdp_params if (w := self._weight_of(p)) is not None]
            if not found:
                continue
            check_group(group, found)
            shards = [self._shard(p, w) for p, w in found]
            with torch.inference_mode(False):  # training may follow
                units.append((group, found, Unit(shards, group.device, room(group, found))))
        found_names = {w.name for _, found, _ in units for _, w in found}
        missing = [name for name in self.weights if name not in found_names]
        if missing:
            some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"{len(missing)} of {len(self.weights)} weights to be gathered in 4 bits are not sharded by "
                f"fully_shard ({some}): call fully_shard on their modules, or on the model that was given to "
                "apply_qat, before the first forward (not only on a module around it), or leave gather out of apply_qat"
            )
        with torch.inference_mode(False):
            self._packer = ShardPacker([packed for _, _, packed in units], self.plan.config.global_scale)
        self.streams.on(self._packer.device)
        self._replicated = any(
            s.mesh is not None and s.mesh.size() > s.world for _, _, packed in units for s in packed.shards
        )
        for group, found, packed in units:
            unit = GatherUnit(packed, group, [p for p, _ in found], self._keep)
            for index, (_, weight) in enumerate(found):
                weight.unit, weight.index = unit, index
            gather_param.adopt(unit, group, [w for _, w in found])
            self.units.append(unit)
        for members in self.plan.groups().values():
            together = {id(u): u for member in members if (u := self.weights[member.name].unit) is not None}
            for member in members:
                self.weights[member.name].affected = list(together.values())

    def _weight_of(self, fsdp_param: Any) -> GatherWeight | None:
        shard = fsdp_param.sharded_param._local_tensor
        if isinstance(shard, ShardedMaster) and self.weights.get(shard.weight.name) is shard.weight:
            assert isinstance(shard.weight, GatherWeight)
            return shard.weight
        return None

    def _shard(self, fsdp_param: Any, weight: GatherWeight) -> Shard:
        weight.fsdp_param = fsdp_param
        info, entry = fsdp_param.mesh_info, weight.entry
        world = getattr(info, "shard_mesh_size", 1)
        rank = getattr(info, "shard_mesh_rank", 0)
        mesh = fsdp_param.sharded_param.device_mesh
        return Shard(entry.name, entry.shape, entry.batch_dims, entry.group, mesh, world, rank, weight.master)


def gather_of(model: nn.Module) -> Gather | None:
    """The `Gather` of a model in gather mode, looked for through wrappers; None in module mode."""
    for module in model.modules():
        found = module.__dict__.get("_nvfp4_gather")
        if isinstance(found, Gather):
            return found
    return None
