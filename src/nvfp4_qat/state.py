"""The packed copy of a master weight, and how it stays fresh.

Each quantized parameter has one `PackedWeight`; those that share a global scale form a `FusionGroup`. A group is packed
when something reads one of its members after any member changed: once per optimizer step, however many micro-batches,
recomputations and backward passes read it.

What tells that a weight changed. No single signal sees everything (measured on torch 2.13):

=================================  =====================  ==============================================================
write                              what moves             therefore
=================================  =====================  ==============================================================
SGD, AdamW (for-loop, foreach)     ``_version``           compared at each read
``fused=True`` optimizers          nothing                hooks around every `torch.optim` step note its parameters
``p.data = x``, ``p.data.mul_()``  nothing                `QATParameter` notes accesses to ``data``
``load_state_dict``                ``_version``           noted as well, by the module's own loading
``load_state_dict(assign=True)``   the object             compared at each read
``.to(device)``, ``.to_empty``     the address            compared at each read
a checkpoint reader that writes    nothing                `state_dict()` is noted as a possible write
into ``state_dict()``'s aliases
another process (shared memory),   nothing                such a weight is packed and compared at each read
or a weight made in inference mode
``dist.broadcast(p)`` and other    nothing                **not seen**: call `nvfp4_qat.refresh`
collectives on the parameter
an alias kept from ``p.data``,     nothing                **not seen** if the weight was read in between: `refresh`
written later
a foreign kernel                   nothing                **not seen**: `refresh`
=================================  =====================  ==============================================================

What is not seen does not go unnoticed for good: the next export or sync packs again, sees other bytes at an unchanged
signature and raises.

Weights that FSDP shards have no packed copy, but a global scale that must be fresh (`window`). Of them is seen:

=================================  =====================  ==============================================================
write                              what moves             therefore
=================================  =====================  ==============================================================
any `torch.optim` step             nothing reliable       hooks around every step renew the scale of what is not frozen
``load_state_dict``, also sharded  nothing reliable       noted, by the module's own loading
``state_dict()``'s aliases         nothing                noted as a possible write
in-place operations on what the    its ``_version``       compared at each read
optimizer owns: the parameter, the
flat parameter, the DTensor
``summon_full_params`` (writes)    with                   noted as a possible write; with ``use_orig_params=True`` an
                                   ``use_orig_params``    in-place operation is seen, ``p.data`` not
                                   its ``_version``
``p.data``, ``to_local()``, an     nothing                **not seen**: `refresh`
alias written later, collectives
=================================  =====================  ==============================================================

Packed tensors are plain attributes and not buffers: DDP would broadcast buffers, ``.bfloat16()`` would cast them and
``state_dict`` would hold them.
"""

import itertools
import secrets
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import ops, window
from .errors import MismatchError, UserError
from .fusion import FusionGroup, packing
from .parameter import QATParameter, adopt, check_adoptable


class PackedWeight:
    """The packed copy of one parameter of one module.

    Args:
        name: canonical name of the parameter, for messages.
        group: the fusion group; the weight adds itself when it is bound to its module.
        batch_dims: 1 for fused experts (one global scale per expert), else 0.
    """

    # From a random number on: a graph exported by another process must not find a weight of this one.
    _handles: ClassVar[Iterator[int]] = itertools.count(secrets.randbits(62))
    _never_twice: ClassVar[Iterator[int]] = itertools.count(-1, -1)
    _by_handle: ClassVar["weakref.WeakValueDictionary[int, PackedWeight]"] = weakref.WeakValueDictionary()

    def __init__(self, name: str, group: FusionGroup, batch_dims: int) -> None:
        self.name, self.group, self.batch_dims = name, group, batch_dims
        self.shape = torch.Size()
        self.value: ops.PackedNVFP4 | None = None
        self.seen: tuple[Any, ...] | None = None
        self.generation = 0
        self.shard: window.Shard | None = None
        self._generation_shown: tuple[int, Tensor] | None = None
        self._reader: tuple[ops.PackedNVFP4, ops.Dequantize] | None = None
        self._owner: weakref.ref[nn.Module] | None = None
        self._parameter = ""

    def bind(self, module: nn.Module, parameter: str) -> Tensor:
        """Attach to the module that owns the master weight.

        Returns:
            A handle, int64 ``[]`` on the CPU, by which compiled code finds this object (`lookup`). A tensor, because a
            Python integer would be a constant of the compiled graph and every layer would compile anew.
        """
        self._owner, self._parameter = weakref.ref(module), parameter
        self.shape = self.master().shape
        self.group.add(self)
        number = next(self._handles)
        self._by_handle[number] = self
        with torch.inference_mode(False):
            self.handle = torch.tensor(number, device="cpu")
        return self.handle

    @classmethod
    def lookup(cls, handle: Tensor) -> "PackedWeight":
        weight = cls._by_handle.get(int(handle))
        if weight is None:
            raise UserError("the model this 4-bit weight belongs to is gone, or lives in another process")
        return weight

    def alive(self) -> bool:
        return self._owner is not None and self._owner() is not None

    def shown(self) -> Tensor | None:
        """What the module shows as its weight now: the parameter, or what FSDP put in its place."""
        module = self._owner() if self._owner else None
        if module is None:
            return None
        found: Tensor | None = module.__dict__.get(self._parameter)
        return found if found is not None else module._parameters.get(self._parameter)

    def assigned(self, module: nn.Module, value: Tensor | None) -> None:
        """The module gets another tensor as its weight.

        Raises:
            UserError: it is neither a plain parameter nor what FSDP puts there.
        """
        by_fsdp = window.put_there_by_fsdp(value)
        if by_fsdp and self.group.window is None:
            self.group.window = window.WindowScale()
        if self.group.window is None:
            if isinstance(value, nn.Parameter):
                check_adoptable(value, self.name)
                self.group.family.forget()
            return
        if self.shard is None:
            self.shard = window.Shard()
            self.value = self.seen = self._reader = None
            self.group.family.forget()
            if by_fsdp and value is not None:
                self.shape = value.shape
        self.shard.assigned(module, value)

    def moved(self) -> None:
        """The module was moved or cast: let go of what is kept on a device where its weight no longer is."""
        shown = self.shown()
        if self.value is not None and shown is not None and self.value.packed.device != shown.device:
            self.value = self.seen = self._reader = None
            self.group.family.forget()

    def note(self, certain: bool) -> None:
        """Record that the weight was written, or that it may have been."""
        if self.shard is not None:
            self.shard.note(certain)
        else:
            self.master().note(certain)

    def master(self) -> QATParameter:
        """The parameter as it is now; a parameter that replaced it is adopted."""
        module = self._owner() if self._owner else None
        return adopt(module._parameters.get(self._parameter) if module is not None else None, self.name)

    def full(self) -> Tensor:
        """The whole master weight.

        Raises:
            UserError: FSDP shards it, and shows a part only.
        """
        if self.group.window is None:
            return self.master()
        shown = self.shown()
        if shown is None or not window.unsharded(shown, self.shape):
            raise UserError(
                f"{self.name} is sharded: nvfp4_qat.packed_weights(model) takes models that FSDP2 shards; with FSDP1 "
                "gather a full state dict and pass it through QATQuantizer(config, plan).quantize"
            )
        return shown

    def signature(self) -> tuple[Any, ...]:
        """Equal as long as nothing is known to have changed. First what only *may* mean a write."""
        p = self.master()
        maybe, written = p.notes()
        inference = p.is_inference()
        if inference or (p.device.type == "cpu" and p.untyped_storage().is_shared()):
            maybe = next(self._never_twice)
        return maybe, written, -1 if inference else p._version, id(p), p.data_ptr(), p.device

    def unchanged(self) -> bool:
        """Whether `signature` is that of the packed copy, found out with few lookups: every read asks."""
        module, seen = self._owner() if self._owner else None, self.seen
        if module is None:  # nobody can read it any more
            return True
        p = module._parameters.get(self._parameter)
        if seen is None or type(p) is not QATParameter or seen[2] == -1:
            return self.signature() == seen
        return bool(
            p.__dict__.get("_written") == seen[1]  # before _version, which a tensor made in inference mode has not
            and p._maybe_written == seen[0]
            and p._version == seen[2]
            and id(p) == seen[3]
            and p.data_ptr() == seen[4]
            and p.device == seen[5]
        )

    def window_signature(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """`signature` in two parts, for a group of which FSDP shards a member: what may mean a write, and what does."""
        if self.shard is None:
            maybe, *certain = self.signature()
            return (maybe,), tuple(certain)
        return self.shard.signature()

    def holds(self, new: ops.PackedNVFP4) -> bool:
        """Whether the kept copy equals ``new``, byte for byte."""
        return self.has_room_for(new) and all(
            torch.equal(_comparable(old), _comparable(fresh))
            for old, fresh in zip(self._tensors(), new.tensors(), strict=True)
        )

    def agrees(self, new: ops.PackedNVFP4) -> bool:
        """Whether training uses what ``new`` holds, or has used nothing yet."""
        return self.holds(new) if self.group.window is None else self.scaled_by(new.global_scale)

    def scaled_by(self, g: Tensor) -> bool:
        """Whether training uses these global scales, or has used none yet."""
        kept = self.group.window
        unsharded = self.value.global_scale if self.value is not None else None
        used = kept.g if kept is not None else unsharded
        return used is None or torch.equal(used.reshape(-1).to(g.device), g.reshape(-1))

    def has_room_for(self, new: Tensor | ops.PackedNVFP4) -> bool:
        """Whether a copy is kept and its storages can take that of ``new``."""
        old, device = self.value, new.packed.device if isinstance(new, ops.PackedNVFP4) else new.device
        return old is not None and old.packed.device == device and old.shape == new.shape

    def store(self, new: ops.PackedNVFP4) -> None:
        """Keep ``new``, in the storages kept so far where they fit: captured CUDA graphs read those."""
        self.generation += 1
        if not self.has_room_for(new):
            self.value = ops.PackedNVFP4(new.packed, new.scale, new.global_scale.clone())  # members share the latter
            return
        for kept, fresh in zip(self._tensors(), new.tensors(), strict=True):
            kept.copy_(fresh)

    def overwrite(self) -> None:
        """The kept copy is about to be overwritten: from now on it is stale, and what was computed with it past."""
        if self.seen is not None or self.value is None:
            self.generation += 1
        self.seen = None

    def clone(self) -> ops.PackedNVFP4:
        return ops.PackedNVFP4(*(t.clone() for t in self._tensors()))

    def ensure(self, master: Tensor) -> Tensor:
        """Bring the packed copy (or, sharded, the global scale) up to date if the master changed.

        Args:
            master: what the caller takes for the master weight.

        Returns:
            Which generation of the packed copy that is, int64 ``[]`` on the CPU, for `read_again`.

        Raises:
            MismatchError: ``master`` is another tensor than the module's parameter.
        """
        group, shown = self.group, self.shown()
        if group.window is None and type(shown) is not QATParameter:
            module = self._owner() if self._owner else None
            if module is not None and window.put_there_by_fsdp(shown):  # without __setattr__
                self.assigned(module, shown)
            else:
                shown = self.master()
        if group.window is not None:
            window.check_unsharded(shown, self)
        if master is not shown and (shown is None or master.data_ptr() != shown.data_ptr()):
            raise MismatchError(
                f"{self.name} is computed with another tensor than its module's parameter (a replica, or a copy made "
                "by functional_call or a compiler): such a copy has no 4-bit form"
            )
        if master.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UserError(
                f"{self.name} is read while a CUDA graph is captured: its replays would never look for new weights. "
                'Let torch.compile(mode="reduce-overhead") capture graphs; it leaves this read outside of them.'
            )
        if group.window is None:
            group.ensure_fresh()
        elif group.window.stale(group):
            with packing():
                if group.window.stale(group):
                    group.window.renew(self)
        if self._generation_shown is None or self._generation_shown[0] != self.generation:
            with torch.inference_mode(False), _disable_current_modes():
                self._generation_shown = self.generation, torch.tensor(self.generation, device="cpu")
        return self._generation_shown[1]

    def current(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, after `ensure`."""
        return self.kept(dtype) if self.group.window is None else window.fake_quantized(master, self, dtype)

    def read_generation(self, master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The dequantized weight in ``dtype``, packed first if the master changed, and what `ensure` returns."""
        generation = self.ensure(master)
        return self.current(master, dtype), generation

    def read_again(self, master: Tensor, dtype: torch.dtype, generation: int) -> Tensor:
        """The dequantized weight that a forward saw, for its backward.

        Args:
            master: what the forward took for the master weight; sharded ones are quantized again.
            dtype: of the result.
            generation: what `ensure` gave the forward.

        Raises:
            MismatchError: the weight has changed since.
        """
        self.check_generation(generation)
        return self.current(master, dtype)

    def refill(self, out: Tensor, generation: int) -> None:
        """`read_again` into a given tensor, from what the module shows now."""
        self.check_generation(generation)
        with torch.no_grad():
            if self.group.window is None:
                self.kept(out.dtype, out)
            else:
                shown = self.shown()
                window.check_unsharded(shown, self)
                assert shown is not None
                window.fake_quantized(shown, self, out.dtype, out)

    def check_generation(self, generation: int) -> None:
        if self.generation != generation:
            raise MismatchError(
                f"{self.name} changed between the forward and the backward that needs it. Call backward before the "
                "optimizer step, or run the forward again."
            )

    def kept(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The dequantized weight of the copy as it is, into ``out`` if given."""
        value, reader = self.value, self._reader
        assert value is not None
        if value.packed.is_cuda:
            self.group.family.order(value.packed.device).reads()
        if out is None:
            out = torch.empty(value.shape, dtype=dtype, device=value.packed.device)
        if reader is None or reader[0] is not value:
            packed, scale, g = value.tensors()
            with _disable_current_modes():  # it is kept, so no fake tensor may get into it
                self._reader = reader = value, ops.Dequantize(packed, scale.view(torch.uint8), g)
        reader[1](out)
        return out

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.value is not None
        if self.value.packed.is_cuda:
            self.group.family.order(self.value.packed.device).reads()
        return self.value.tensors()

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs for itself: its module is bound anew in `qat_module`.
        kept_here = "value", "seen", "shard", "_owner", "_generation_shown", "_reader"
        return {**self.__dict__, **dict.fromkeys(kept_here)}


def _comparable(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
