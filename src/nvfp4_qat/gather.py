"""Gather mode: FSDP2 gathers packed weights, 4.5 bits each, and computes with what they stand for.

`attach` puts a `ShardedMaster` in the place of every planned parameter; ``fully_shard`` then shards those. From there
on a weight goes around like this::

    master shard ── once per optimizer step, all weights together ──> packed shard (one buffer per FSDP unit)
    packed shard ── FSDP2's own all-gather, forward, backward, recompute, every micro-batch ──> gathered bytes
    gathered bytes ── one kernel per unit ──> the unsharded parameters, which the modules use as they are

The unsharded parameter *is* the dequantized weight, so its gradient is the straight-through gradient, whatever module
computes with it. How the bytes of a unit travel is in `gather_unit`.

When a weight counts as changed: after a `torch.optim` step that owns it, after ``load_state_dict``, after any operation
that writes into it (`ShardedMaster` sees those), after `refresh`. Then the next gather packs all weights, which is
collective: every rank must see the same changes, as it does in any FSDP program. A state dict that was handed out may
have been written into (``dcp.load`` does that), and a shard may be another tensor than before (FSDP2 pads anew, on the
ranks with padding only); whether that changed anything is looked up in this rank's bytes, so that it remains harmless
if it happens on one rank alone. Writes through memory that PyTorch does not see (``p.data``'s
storage, a foreign kernel) need `nvfp4_qat.refresh`; the next sync or export notices them.

Streams. A gather may run on another stream than the one that packed or the one that wrote the weights. Packing waits
for the writers and for all readers of the bytes that it replaces; a gather waits for the packing.

What is deliberately missing: sharding on other dimensions, tensor parallelism, ``reshard_after_forward=<int>`` (FSDP2
has no such path for extensions), compiled autograd.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .errors import MismatchError, UserError
from .fsdp import ShardedMaster
from .gather_unit import GatherUnit
from .naming import canonical_name
from .plan import QuantizedTensor, QuantPlan
from .shards import Shard, ShardPacker, Unit
from .streams import StreamOrder


class GatherWeight:
    """A weight in gather mode: its plan entry, and what FSDP2 does with it."""

    def __init__(self, entry: QuantizedTensor, gather: "Gather") -> None:
        self.entry, self.name, self._gather = entry, entry.name, weakref.ref(gather)
        self.unit: GatherUnit | None = None
        self.index = -1
        """Its place in the unit."""
        self.fsdp_param: Any = None
        self.packed_from: Tensor | None = None
        """The local shard that the packed bytes were made from."""

    @property
    def gather(self) -> "Gather":
        gather = self._gather()
        if gather is None:
            raise UserError(f"the model that {self.name} belongs to is gone")
        return gather

    @property
    def model(self) -> object:
        return self._gather()

    def sharded(self) -> bool:
        return self.unit is not None

    def note(self) -> None:
        """Record that the master was written."""
        gather = self._gather()
        if gather is not None:
            gather.note()

    def before_gather(self, shard: ShardedMaster) -> tuple[Tensor, ...]:
        """What FSDP2 gathers for this weight: the unit's packed bytes, or nothing if another weight brings them."""
        if self.index != 0 and shard._inner is self.packed_from and self.unit is not None:
            return self.unit.contribution(self.index)  # the unit's first weight has seen to the rest
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
            self.unit.fill(gather.packer.g, gather.epoch)
        return (w, (w,)) if out is None else None

    def local(self) -> Tensor:
        """This rank's rows of the master, on whatever device it is."""
        shard = self.fsdp_param.sharded_param._local_tensor
        if not isinstance(shard, ShardedMaster):
            raise MismatchError(
                f"the shard of {self.name} was replaced by an unquantized tensor: load weights with load_state_dict or "
                "torch.distributed.checkpoint, which keep it"
            )
        self.packed_from = shard.adopt()
        return self.packed_from


class Gather:
    """All gathered weights of one model.

    Args:
        model: what `apply_qat` was called on; kept weakly.
        plan: its plan.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan) -> None:
        self._model, self.plan = weakref.ref(model), plan
        self.weights = {entry.name: GatherWeight(entry, self) for entry in plan.quantized}
        self.units: list[GatherUnit] = []
        self.epoch = 0
        """Counts packings."""
        self.streams = StreamOrder()
        self._packer: ShardPacker | None = None
        self._stale = True
        self._maybe_stale = False

    @property
    def packer(self) -> ShardPacker:
        assert self._packer is not None
        return self._packer

    @property
    def stale(self) -> bool:
        """Whether a write was seen since the last packing."""
        return self._stale

    def note(self) -> None:
        """Record that some master was written, on the current stream."""
        self._stale = True
        self.streams.wrote()

    def note_handed_out(self) -> None:
        """Record that a state dict was handed out, through which masters may be written."""
        self._maybe_stale = True

    def ensure_fresh(self, weight: GatherWeight, shard: ShardedMaster) -> None:
        """Pack before a gather if any weight changed. Collective then."""
        first = not self.units
        if self._stale:
            self.refresh()
        elif self._maybe_stale or shard.origin is not weight.packed_from:
            self._maybe_stale = False
            if self._differs():
                self.refresh()
        assert weight.unit is not None
        weight.unit.epoch = self.epoch
        if first:
            weight.unit.already_gathering()
        self.streams.reads()

    def refresh(self) -> None:
        """Pack all weights from their masters. Collective.

        Raises:
            UserError: weights that are not sharded or cannot be quantized; the latter on every rank.
        """
        self._stale = True
        with torch.inference_mode(False), torch.no_grad():
            self._find_units()
            self.streams.before_packing()
            self.epoch += 1
            self.packer.pack()
            self.streams.packed()
        self._stale = self._maybe_stale = False

    def agree(self) -> None:
        """Pack if any rank has seen a change, or may have. Collective."""
        self._find_units()
        flag = torch.tensor([int(self._stale or self._maybe_stale)], dtype=torch.int32, device=self.packer.device)
        if bool(self.packer.reduced(flag)):
            self.refresh()

    def unnoticed_changes(self) -> list[str]:
        """The weights whose packed bytes are not those of their masters. Collective; every rank gets the same list."""
        with torch.inference_mode(False), torch.no_grad():
            self.streams.before_packing()
            packer = self.packer
            amax = packer.amax()
            packer.check(amax.cpu())
            moved = packer.scales(amax) != packer.g
            flags = []
            for unit in self.units:
                fresh = unit.packed.packed_views(packer.repacked(unit.packed, packer.g))
                kept = unit.packed.packed_views(unit.packed.buffer)
                for s, new, old in zip(unit.packed.shards, fresh, kept, strict=True):
                    same = all(torch.equal(a, b) for a, b in zip(new, old, strict=True))
                    flags.append(moved[s.first : s.first + s.items].any() | (not same))
            self.streams.packed()
            changed = packer.reduced(torch.stack(flags).int()).tolist()
        return [shard.name for shard, flag in zip(packer.shards, changed, strict=True) if flag]

    def check_sharded(self) -> None:
        """Raise `UserError` unless every planned weight is in some FSDP unit, and `MismatchError` if one is lost."""
        self._find_units()
        for weight in self.weights.values():
            if not isinstance(weight.fsdp_param.sharded_param._local_tensor, ShardedMaster):
                weight.local()

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
        for group in _param_groups(model):
            # FSDP2 may replace shards at its first use, on ranks with padding only. Let it do so now, on all of them.
            group.lazy_init()
            found = [(p, w) for p in group.fsdp_params if (w := self._weight_of(p)) is not None]
            if not found:
                continue
            _check_group(group, found)
            shards = [self._shard(p, w) for p, w in found]
            with torch.inference_mode(False):  # training may follow
                units.append((group, found, Unit(shards, group.device)))
        found_names = {w.name for _, found, _ in units for _, w in found}
        missing = [name for name in self.weights if name not in found_names]
        if missing:
            some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"{len(missing)} of {len(self.weights)} weights to be gathered in 4 bits are not sharded by "
                f"fully_shard ({some}): call fully_shard on their modules or on the model before its first forward, or "
                "leave gather out of apply_qat"
            )
        with torch.inference_mode(False):
            self._packer = ShardPacker([packed for _, _, packed in units], self.plan.config.global_scale)
        self.streams.on(self._packer.device)
        for group, found, packed in units:
            unit = GatherUnit(packed, group)
            for index, (_, weight) in enumerate(found):
                weight.unit, weight.index = unit, index
            self.units.append(unit)

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
        return Shard(entry.name, entry.shape, entry.batch_dims, entry.group, mesh, world, rank, weight.local)

    def _differs(self) -> bool:
        """Whether this rank's masters would be packed to other bytes than those kept."""
        with torch.inference_mode(False), torch.no_grad():
            self.streams.before_packing()
            packer = self.packer
            changed = any(not torch.equal(packer.repacked(u.packed, packer.g), u.packed.buffer) for u in self.units)
            self.streams.packed()
            return changed


def _param_groups(model: nn.Module) -> Iterator[Any]:
    """The FSDP2 parameter groups of a model, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later
            for group in [state._fsdp_param_group] if groups is None else groups:
                if group is not None and id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _check_group(group: Any, found: Iterable[tuple[Any, GatherWeight]]) -> None:
    for fsdp_param, weight in found:
        if group.post_forward_mesh_info is not None and group.post_forward_mesh_info != group.mesh_info:
            raise UserError(
                f"{weight.name} is sharded with reshard_after_forward=<int>, which FSDP2 does not implement for "
                "tensors that are gathered in another form: use True or False"
            )
        if fsdp_param.fsdp_placement.dim != 0:
            raise UserError(
                f"{weight.name} is sharded on dim {fsdp_param.fsdp_placement.dim}: blocks of 16 along the last "
                "dimension share a scale, and shards are packed where they lie. Shard on dim 0."
            )
        if fsdp_param.is_dtensor:
            raise UserError(f"{weight.name} is also sharded by tensor or expert parallelism, which is not supported")


def gather_of(model: nn.Module) -> Gather | None:
    """The `Gather` of a model in gather mode, looked for through wrappers; None in module mode."""
    for module in model.modules():
        found = module.__dict__.get("_nvfp4_gather")
        if isinstance(found, Gather):
            return found
    return None


def plain_tensor(t: Tensor) -> Tensor:
    """The same data without the wrapper: a plain tensor, or a DTensor of one."""
    if isinstance(t, ShardedMaster):
        return t.origin.detach()
    if isinstance(t, DTensor) and isinstance(t._local_tensor, ShardedMaster):
        local = t._local_tensor.origin.detach()
        return DTensor.from_local(
            local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        ).detach()
    return t
