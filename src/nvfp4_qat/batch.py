"""All stale weights of a model packed together: a read that finds one packs every other one as well.

After an optimizer step every weight is stale, and the first forward would pack one fusion group after the other: for
each a few launches, small operations and a wait for the device. Together they take one pass over the weights for all
amaxes, one computation of all global scales, ONE wait for the device, and one pass that packs (`multi`).

With power-of-two global scales and copies from before, the two passes are one: a scale moves only when amax crosses a
power of two times 2688, which is rare, so the weights are packed with the old scales while their amaxes are taken, and
those whose scale moved once more. The copies are overwritten then before anything is known of the new values. So they
count as stale from before the first byte changes until all is well: after NaN, or any other error, the next read packs
again, and a backward that needs the old values raises.

A group that cannot be quantized (NaN) is left stale and the others are packed: only who reads it gets the error.

Not packed together: weights that were only handed out and may well be unchanged (`FusionGroup.pack` compares them), on
other devices, with gaps between their elements, or whose parameter is not one; weights that FSDP shards (`window`).

Everything is written into the storages that training reads. A second packed copy of the model exists at no time.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .errors import UserError
from .format import BLOCK
from .multi import Amaxes, Packs
from .parameter import when_data_moves
from .streams import StreamOrder

if TYPE_CHECKING:
    from .fusion import FusionGroup
    from .state import PackedWeight


class Entry(NamedTuple):
    """A weight to be packed: its master, and its signature from before the master is read."""

    weight: "PackedWeight"
    master: Tensor
    signature: tuple[Any, ...]


class Family:
    """The fusion groups of one model, in the order of the plan."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[FusionGroup, None] = weakref.WeakKeyDictionary()
        self._orders: dict[torch.device, StreamOrder] = {}

    def add(self, group: "FusionGroup") -> None:
        self._groups.setdefault(group)

    def groups(self) -> list["FusionGroup"]:
        """The groups that are still in use."""
        return list(self._groups)

    def pack(self, wanted: "FusionGroup") -> bool:
        """Pack a stale group, and with it all others that are surely stale. The caller holds the lock.

        Returns:
            Whether ``wanted`` is fresh now. If not, it has to be packed alone, which tells what is wrong with it.
        """
        entries = _entries(wanted)
        if entries is None:
            return False
        together = [entries]
        for group in self.groups():
            if group is not wanted and (others := _entries(group)) is not None and _alike(entries, others):
                together.append(others)
        order = self.order(entries[0].master.device)
        with torch.inference_mode(False), torch.no_grad():
            batch = _batches.pop(self, None)
            if batch is None or not batch.fits(together):
                batch = Batch(together, wanted.policy)
            order.before_packing()
            good = batch.pack(together)
            order.packed()
            _batches[self] = batch
        return good[0]

    def order(self, device: torch.device) -> StreamOrder:
        """Who waits for whom on a device: what one stream packs, others read."""
        if device not in self._orders:
            self._orders[device] = StreamOrder()
            self._orders[device].on(device)
        return self._orders[device]

    def forget(self) -> None:
        """Drop all references to masters."""
        _batches.pop(self, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Family, ()  # a copy is empty: groups add themselves when their members are bound


_batches: "weakref.WeakKeyDictionary[Family, Batch]" = weakref.WeakKeyDictionary()
"""The last batch of each model: the same weights are packed at the next step, from and to the same places."""

when_data_moves(_batches.clear)


def _entries(group: "FusionGroup") -> list[Entry] | None:
    """The members of a group, if it is surely stale and can be packed with others."""
    if group.window is not None:
        return None
    try:
        entries = [Entry(w, w.master().detach(), w.signature()) for w in group.members()]
    except UserError:  # whoever reads it will be told
        return None
    if all(e.weight.seen is not None and e.signature[1:] == e.weight.seen[1:] for e in entries):
        return None
    device = entries[0].master.device
    fit = all(e.master.is_contiguous() and e.master.device == device and not e.master.is_meta for e in entries)
    return entries if fit else None


def _alike(these: Sequence[Entry], those: Sequence[Entry]) -> bool:
    """Whether groups may be packed together: on one device, and all or none of them with copies from before.

    The latter so that an export, which packs what has copies, makes no others.
    """
    return these[0].master.device == those[0].master.device and _kept(these) == _kept(those)


def _kept(entries: Sequence[Entry]) -> bool:
    return all(e.weight.has_room_for(e.master) for e in entries)


class Batch:
    """Groups that are packed together, and the kernels' tables for them.

    Args:
        groups: the members of each; either all have copies from before, or none.
        policy: of the global scale.
    """

    def __init__(self, groups: Sequence[Sequence[Entry]], policy: str) -> None:
        self._policy = policy
        entries = [e for group in groups for e in group]
        kept = _kept(entries)
        self._targets = [e.weight.value if kept and e.weight.value else _room_for(e) for e in entries]
        self._items: list[int] = []
        self._first: list[int] = []
        self._slots: list[slice] = []
        """Where in the vectors of global scales a group's are."""
        self._of_group: list[range] = []
        """Which tensors are a group's."""
        end = 0
        for group in groups:
            count = group[0].master.shape[: group[0].weight.batch_dims].numel()
            self._slots.append(slice(end, end + count))
            self._of_group.append(range(len(self._items), len(self._items) + len(group)))
            self._items += [count] * len(group)
            self._first += [end] * len(group)
            end += count
        codes, scales = [t.packed for t in self._targets], [t.scale.view(torch.uint8) for t in self._targets]
        self._packs = Packs([e.master for e in entries], self._items, self._first, codes, scales)
        self._amaxes: Amaxes | None = None

    def fits(self, groups: Sequence[Sequence[Entry]]) -> bool:
        """Whether these are the same weights, at the same places, with the same copies."""
        entries = [e for group in groups for e in group]
        if len(entries) != len(self._targets) or len(groups) != len(self._slots):
            return False
        same = all(e.weight.value is t for e, t in zip(entries, self._targets, strict=True))
        return same and self._packs.fits([e.master for e in entries])

    def pack(self, groups: Sequence[Sequence[Entry]]) -> list[bool]:
        """Pack the groups this was made for.

        Returns:
            Which of them are fresh now. The others cannot be quantized and remain stale.
        """
        entries = [e for group in groups for e in group]
        kept = all(e.weight.value is t for e, t in zip(entries, self._targets, strict=True))
        device = entries[0].master.device
        amax = torch.zeros(self._slots[-1].stop, dtype=torch.int32, device=device)
        old: Tensor | None = None
        if kept and self._policy == "pow2":
            old = torch.cat([self._targets[tensors[0]].global_scale.reshape(-1) for tensors in self._of_group])
            for entry in entries:
                entry.weight.overwrite()
            self._packs(old, amax)
        else:
            self._amax([e.master for e in entries], amax)
        g = reference.global_scale(amax.view(torch.float32), self._policy)
        good, moved = self._verdict(amax, g, old)
        write = [i for i, tensors in enumerate(self._of_group) if good[i] and moved[i]]
        indices = [j for i in write for j in self._of_group[i]]
        if indices:
            for j in indices:
                entries[j].weight.overwrite()
            packs = self._packs if len(indices) == len(entries) else self._packs.only(indices)
            packs(g)
            slots = [self._slots[i] for i in write for _ in self._of_group[i]]
            scales = [self._targets[j].global_scale for j in indices]
            torch._foreach_copy_(scales, [g[slot].view(s.shape) for slot, s in zip(slots, scales, strict=True)])
        for fine, tensors in zip(good, self._of_group, strict=True):
            for j in tensors if fine else ():
                entries[j].weight.value, entries[j].weight.seen = self._targets[j], entries[j].signature
        return good

    def _amax(self, masters: Sequence[Tensor], out: Tensor) -> None:
        if self._amaxes is None or not self._amaxes.fits(masters):
            self._amaxes = Amaxes(masters, self._items, self._first)
        self._amaxes(out)

    def _verdict(self, amax: Tensor, g: Tensor, old: Tensor | None) -> tuple[list[bool], list[bool]]:
        """Of each group, whether it can be quantized, and whether its global scale is another than ``old``.

        The one place that waits for the device.
        """
        bad = ~(amax.view(torch.float32) <= ops.largest_magnitude())  # true for NaN
        moved = torch.ones_like(bad) if old is None else g != old
        host = torch.stack((bad, moved)).cpu().numpy()
        if not host.any():
            return [True] * len(self._slots), [False] * len(self._slots)
        return [not host[0, s].any() for s in self._slots], [bool(host[1, s].any()) for s in self._slots]


def _room_for(entry: Entry) -> ops.PackedNVFP4:
    shape, device = entry.master.shape, entry.master.device
    return ops.PackedNVFP4(
        torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=device),
        torch.empty((*shape[:-1], shape[-1] // BLOCK), dtype=torch.float8_e4m3fn, device=device),
        torch.empty(shape[: entry.weight.batch_dims], dtype=torch.float32, device=device),
    )
