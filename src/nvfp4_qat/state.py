"""The packed copy of a master weight, and how it stays fresh.

Each quantized parameter has one `PackedWeight`; those that share a global scale form a `FusionGroup`. A group is packed
when something reads one of its members after any member changed: once per optimizer step, however many micro-batches,
recomputations and backward passes read it.

What tells that a weight changed. No single signal sees everything (measured on torch 2.13):

=================================  =====================  ==============================================================
write                              what moves             therefore
=================================  =====================  ==============================================================
SGD, AdamW (for-loop, foreach)     ``_version``           compared at each read
``fused=True`` optimizers          nothing                a hook after every `torch.optim` step counts on its parameters
``p.data = x``, ``p.data.mul_()``  nothing                `QATParameter` counts accesses to ``data``
``load_state_dict``                ``_version``           counted as well, by the module's own loading
``load_state_dict(assign=True)``   the object             compared at each read
``.to(device)``, ``.to_empty``     the address            compared at each read
a checkpoint reader that writes    nothing                `state_dict()` counts as a possible write
into ``state_dict()``'s aliases
=================================  =====================  ==============================================================

A write that none of these sees (an optimizer outside `torch.optim` that writes to raw memory) needs
`nvfp4_qat.refresh`; without it the next export or sync packs again, sees other bytes at an unchanged signature and
raises.

Packed tensors are plain attributes and not buffers: DDP would broadcast buffers, ``.bfloat16()`` would cast them and
``state_dict`` would hold them.
"""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .errors import MismatchError, UserError
from .format import BLOCK


class QATParameter(nn.Parameter):
    """A parameter that counts what PyTorch's version counter misses. A plain one becomes it by `adopt`, in place."""

    _writes = 0
    _maybe_written = 0

    @property
    def data(self) -> Tensor:
        self._maybe_written += 1  # the caller may write into the alias it gets
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._writes += 1
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


def adopt(parameter: nn.Parameter) -> QATParameter:
    """Turn a plain parameter into a `QATParameter` without changing its identity (optimizers may hold it already)."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = QATParameter
    if not isinstance(parameter, QATParameter):
        raise UserError(
            f"a quantized weight has become a {type(parameter).__name__}: apply_qat in module mode needs plain "
            "parameters (one GPU, or DDP around the model). Sharded parameters are not supported in module mode."
        )
    return parameter


def mark_written(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Optimizer post-step hook: every quantized parameter the optimizer owns has changed."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, QATParameter):
                parameter._writes += 1


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
        members = self.members()
        changed = [m for m in members if m.signature() != m.seen]
        if changed:
            certain = any(m.seen is None or m.signature()[1:] != m.seen[1:] for m in changed)
            self.commit(self.pack(), certain)

    def pack(self) -> list[tuple["PackedWeight", ops.PackedNVFP4]]:
        """Pack every member from its master weight into new tensors; nothing kept here changes."""
        members = self.members()
        with torch.inference_mode(False), torch.no_grad():
            amaxes = [ops.amax(m.master(), m.batch_dims) for m in members]
            for member, amax in zip(members, amaxes, strict=True):
                ops.check_amax(amax, member.name)
            g = ops.global_scale(torch.stack(amaxes).amax(0), self.policy, self.name)
            packed = []
            for member in members:
                w = member.master().detach()
                codes = torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=w.device)
                scale = torch.empty((*w.shape[:-1], w.shape[-1] // BLOCK), dtype=torch.uint8, device=w.device)
                ops.quantize_into(w, g, codes, scale)
                packed.append((member, ops.PackedNVFP4(codes, scale.view(torch.float8_e4m3fn), g)))
            return packed

    def commit(self, packed: list[tuple["PackedWeight", ops.PackedNVFP4]], certain: bool = True) -> None:
        """Make a result of `pack` what training reads; ``certain=False``: the weights may well be unchanged."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training as well
            for member, new in packed:
                if certain or not member.holds(new):
                    member.store(new)
                member.seen = member.signature()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "policy": self.policy, "_members": []}  # members add themselves when they are bound


class PackedWeight:
    """The packed copy of one parameter of one module.

    Args:
        name: canonical name of the parameter, for messages.
        group: the fusion group; the weight adds itself when it is bound to its module.
        batch_dims: 1 for fused experts (one global scale per expert), else 0.
    """

    _handles: ClassVar[Iterator[int]] = itertools.count(1)
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
        return cls._by_handle[int(handle)]

    def alive(self) -> bool:
        return self._owner is not None and self._owner() is not None

    def master(self) -> QATParameter:
        """The parameter as it is now; a parameter that replaced it is adopted."""
        module = self._owner() if self._owner else None
        parameter = module._parameters.get(self._parameter) if module is not None else None
        if parameter is None:
            raise UserError(
                f"{self.name} is no longer a parameter of its module. Module mode needs plain parameters: remove "
                "parametrizations before apply_qat, and do not wrap the model in FSDP1."
            )
        return parameter if type(parameter) is QATParameter else adopt(parameter)

    def signature(self) -> tuple[Any, ...]:
        """Equal as long as nothing is known to have changed. First what only *may* mean a write."""
        p = self.master()
        version = -1 if p.is_inference() else p._version
        return p._maybe_written, p._writes, version, id(p), p.data_ptr(), p.device

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

    def read(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight of the current master, packing first if it changed."""
        self.group.ensure_fresh()
        return self.kept(dtype)

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
        self._qat_weights = weights
        self._qat_handles = {name: weight.bind(self, name) for name, weight in weights.items()}
        for name in weights:
            parameter = self._parameters[name]
            assert parameter is not None
            adopt(parameter)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind_qat(self._qat_weights)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._count("_writes")

    def _save_to_state_dict(self, *args: Any) -> None:
        super()._save_to_state_dict(*args)
        self._count("_maybe_written")

    def _count(self, what: str) -> None:
        for weight in self._qat_weights.values():
            master = weight.master()
            setattr(master, what, getattr(master, what) + 1)


def packed_weights_of(model: nn.Module) -> Iterator[PackedWeight]:
    """Every packed weight of a model, in module order."""
    for module in model.modules():
        if isinstance(module, QATModule):
            yield from module._qat_weights.values()
