"""The packed copy of a master weight, and how it stays fresh.

Each quantized parameter has one `PackedWeight`; those that share a global scale form a `FusionGroup`. A group is packed
when something reads one of its members after any member changed: once per optimizer step, however many micro-batches,
recomputations and backward passes read it.

What tells that a weight changed. No single signal sees everything (measured on torch 2.13):

=================================  =====================  ==============================================================
write                              what moves             therefore
=================================  =====================  ==============================================================
SGD, AdamW (for-loop, foreach)     ``_version``           compared at each read
``fused=True`` optimizers          nothing                a hook after every `torch.optim` step notes its parameters
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

Packed tensors are plain attributes and not buffers: DDP would broadcast buffers, ``.bfloat16()`` would cast them and
``state_dict`` would hold them.
"""

import itertools
import secrets
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .adapters import guard
from .errors import MismatchError, UserError
from .format import BLOCK
from .parameter import QATParameter, adopt, after_optimizer_step, check_adoptable

_packing = threading.RLock()
"""One thread packs at a time; the others wait for it instead of packing the same weights again."""


class FusionGroup:
    """Weights that share a global scale, because the inference engine fuses them into one GEMM operand."""

    def __init__(self, name: str, policy: str) -> None:
        self.name, self.policy = name, policy
        self._members: list[weakref.ref[PackedWeight]] = []

    def members(self) -> list["PackedWeight"]:
        """The members whose module is still alive, in the order of the plan."""
        return [m for ref in self._members if (m := ref()) is not None and m.alive()]

    def add(self, member: "PackedWeight") -> None:
        if all(ref() is not member for ref in self._members):
            self._members.append(weakref.ref(member))

    def stale(self) -> bool:
        return any(m.signature() != m.seen for m in self.members())

    def ensure_fresh(self) -> None:
        """Pack again if any member changed since it was last packed."""
        if self.stale():
            with _packing:
                if self.stale():
                    self.commit(self.pack(), self.surely_stale())

    def surely_stale(self) -> bool:
        """Whether a member was written, not only handed out."""
        return any(m.seen is None or m.signature()[1:] != m.seen[1:] for m in self.members())

    def pack(self) -> list["Packing"]:
        """Pack every member from its master weight into new tensors; nothing kept here changes."""
        members = self.members()
        if not members:
            raise UserError(f"the modules of the fusion group {self.name} are gone: pass a model that is still alive")
        with torch.inference_mode(False), torch.no_grad():
            signatures = [m.signature() for m in members]  # before reading: a write from now on makes it stale again
            amaxes = [ops.amax(m.master(), m.batch_dims) for m in members]
            for member, amax in zip(members, amaxes, strict=True):
                ops.check_amax(amax, member.name)
            g = ops.global_scale(torch.stack(amaxes).amax(0), self.policy, self.name)
            packed = []
            for member, signature in zip(members, signatures, strict=True):
                w = member.master().detach()
                codes = torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=w.device)
                scale = torch.empty((*w.shape[:-1], w.shape[-1] // BLOCK), dtype=torch.uint8, device=w.device)
                ops.quantize_into(w, g, codes, scale)
                value = ops.PackedNVFP4(codes, scale.view(torch.float8_e4m3fn), g)
                packed.append(Packing(member, value, signature))
            return packed

    def commit(self, packed: list["Packing"], certain: bool) -> None:
        """Make a result of `pack` what training reads; ``certain=False``: the weights may well be unchanged."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training as well
            for member, new, signature in packed:
                if certain or not member.holds(new):
                    member.store(new)
                member.seen = signature

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "policy": self.policy, "_members": []}  # members add themselves when they are bound


class Packing(NamedTuple):
    """A member packed anew: its value, and its signature from before it was read."""

    member: "PackedWeight"
    value: ops.PackedNVFP4
    signature: tuple[Any, ...]


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
        self.value: ops.PackedNVFP4 | None = None
        self.seen: tuple[Any, ...] | None = None
        self.generation = 0
        self._owner: weakref.ref[nn.Module] | None = None
        self._parameter = ""

    def bind(self, module: nn.Module, parameter: str) -> Tensor:
        """Attach to the module that owns the master weight.

        Returns:
            A handle, int64 ``[]`` on the CPU, by which compiled code finds this object (`lookup`). A tensor, because a
            Python integer would be a constant of the compiled graph and every layer would compile anew.
        """
        self._owner, self._parameter = weakref.ref(module), parameter
        self.group.add(self)
        number = next(self._handles)
        self._by_handle[number] = self
        with torch.inference_mode(False):
            return torch.tensor(number, device="cpu")

    @classmethod
    def lookup(cls, handle: Tensor) -> "PackedWeight":
        weight = cls._by_handle.get(int(handle))
        if weight is None:
            raise UserError("the model this 4-bit weight belongs to is gone, or lives in another process")
        return weight

    def alive(self) -> bool:
        return self._owner is not None and self._owner() is not None

    def master(self) -> QATParameter:
        """The parameter as it is now; a parameter that replaced it is adopted."""
        module = self._owner() if self._owner else None
        return adopt(module._parameters.get(self._parameter) if module is not None else None, self.name)

    def signature(self) -> tuple[Any, ...]:
        """Equal as long as nothing is known to have changed. First what only *may* mean a write."""
        p = self.master()
        maybe, written = p.notes()
        inference = p.is_inference()
        if inference or (p.device.type == "cpu" and p.untyped_storage().is_shared()):
            maybe = next(self._never_twice)
        return maybe, written, -1 if inference else p._version, id(p), p.data_ptr(), p.device

    def holds(self, new: ops.PackedNVFP4) -> bool:
        """Whether the kept copy equals ``new``, byte for byte."""
        return self.fits(new) and all(
            torch.equal(_comparable(old), _comparable(fresh))
            for old, fresh in zip(self._tensors(), new.tensors(), strict=True)
        )

    def fits(self, new: ops.PackedNVFP4) -> bool:
        """Whether a copy is kept and its storages can take ``new``."""
        old = self.value
        return old is not None and old.packed.device == new.packed.device and old.packed.shape == new.packed.shape

    def store(self, new: ops.PackedNVFP4) -> None:
        """Keep ``new``, in the storages kept so far where they fit: captured CUDA graphs read those."""
        self.generation += 1
        if not self.fits(new):
            self.value = ops.PackedNVFP4(new.packed, new.scale, new.global_scale.clone())  # members share the latter
            return
        for kept, fresh in zip(self._tensors(), new.tensors(), strict=True):
            kept.copy_(fresh)

    def read(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, packing first if the master changed.

        Args:
            master: what the caller takes for the master weight.
            dtype: of the result.

        Raises:
            MismatchError: ``master`` is another tensor than the module's parameter.
        """
        if master.data_ptr() != self.master().data_ptr():
            raise MismatchError(
                f"{self.name} is computed with another tensor than its module's parameter (a replica, or a copy made "
                "by functional_call or a compiler): such a copy has no 4-bit form"
            )
        if master.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UserError(
                f"{self.name} is read while a CUDA graph is captured: its replays would never look for new weights. "
                'Let torch.compile(mode="reduce-overhead") capture graphs; it leaves this read outside of them.'
            )
        self.group.ensure_fresh()
        return self.kept(dtype)

    def read_generation(self, master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`read`, and which generation of the packed copy it was, int64 ``[]`` on the CPU, for `read_again`."""
        return self.read(master, dtype), torch.tensor(self.generation, device="cpu")

    def read_again(self, dtype: torch.dtype, generation: int) -> Tensor:
        """The dequantized weight that a forward saw, for its backward.

        Raises:
            MismatchError: the packed copy has changed since.
        """
        self.check_generation(generation)
        return self.kept(dtype)

    def check_generation(self, generation: int) -> None:
        if self.generation != generation:
            raise MismatchError(
                f"{self.name} changed between the forward and the backward that needs it. Call backward before the "
                "optimizer step, or run the forward again."
            )

    def kept(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The dequantized weight of the copy as it is, into ``out`` if given."""
        packed, scale, g = self._tensors()
        if out is None:
            return ops.dequantize_eager(packed, scale.view(torch.uint8), g, dtype)
        ops.dequantize_into(packed, scale.view(torch.uint8), g, out)
        return out

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.value is not None
        return self.value.tensors()

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs for itself: its module is bound anew in QATModule.__setstate__.
        return {**self.__dict__, "value": None, "seen": None, "_owner": None}


def _comparable(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


class QATModule(nn.Module):
    """What quantized modules have in common: their packed weights, found again after copying and unpickling."""

    _qat_weights: dict[str, PackedWeight]
    _qat_handles: dict[str, Tensor]

    def _bind_qat(self, weights: dict[str, PackedWeight]) -> None:
        _install_hooks()
        self._qat_weights = weights
        self._qat_handles = {name: weight.bind(self, name) for name, weight in weights.items()}
        for weight in weights.values():
            weight.master()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # New objects: those in `state` may be the ones of a module that is still in use (copy.copy).
        self._bind_qat({n: PackedWeight(w.name, w.group, w.batch_dims) for n, w in self._qat_weights.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_qat_weights", ()) and isinstance(value, nn.Parameter):
            check_adoptable(value, self._qat_weights[name].name)  # FSDP2 shards by setting the attribute
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._note(certain=True)

    def _save_to_state_dict(self, *args: Any) -> None:
        super()._save_to_state_dict(*args)
        self._note(certain=False)

    def _note(self, certain: bool) -> None:
        for weight in self._qat_weights.values():
            weight.master().note(certain)


def packed_weights_of(model: nn.Module) -> Iterator[PackedWeight]:
    """Every packed weight of a model, in module order."""
    for module in model.modules():
        if isinstance(module, QATModule):
            yield from module._qat_weights.values()


_hooks: list[Any] = []


def _install_hooks() -> None:
    """Once a process, when its first quantized module is made or unpickled."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(after_optimizer_step))
        _hooks.append(register_module_module_registration_hook(guard))
