"""`FusionGroup`: weights that share a global scale, and are therefore packed together, or not at all.

Inference engines fuse q, k and v, or gate and up, into one GEMM operand with one global scale. A group keeps no packed
tensors: its members do (`state`, which also says when they are fresh). All groups of a model are a `batch.Family`. As
soon as FSDP shards a member the group has a `window.WindowScale` instead of packed copies.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import ops
from .batch import Family
from .errors import UserError
from .format import BLOCK
from .window import WindowScale

if TYPE_CHECKING:
    from .state import PackedWeight

_lock = threading.RLock()


@contextlib.contextmanager
def packing() -> Iterator[None]:
    """One thread packs at a time; the others wait for it instead of packing the same weights again.

    No dispatch mode sees it. Selective activation checkpointing, for instance, keeps results of operations and hands
    them out in the same order when it recomputes; but a recomputation does not pack again.
    """
    with _lock, _disable_current_modes():
        yield


class FusionGroup:
    """Weights that share a global scale, because the inference engine fuses them into one GEMM operand.

    Args:
        name: canonical name, for messages.
        policy: of the global scale.
        family: the groups it is packed together with; None: it alone.
    """

    def __init__(self, name: str, policy: str, family: Family | None = None) -> None:
        self.name, self.policy = name, policy
        self.family = family if family is not None else Family()
        self.window: WindowScale | None = None
        """There is one as soon as FSDP shards a member; then there are no packed copies."""
        self._members: list[weakref.ref[PackedWeight]] = []
        self.family.add(self)

    def members(self) -> list["PackedWeight"]:
        """The members whose module is still alive, in the order of the plan."""
        return [m for ref in self._members if (m := ref()) is not None and m.alive()]

    def add(self, member: "PackedWeight") -> None:
        if all(ref() is not member for ref in self._members):
            self._members.append(weakref.ref(member))
        self.family.add(self)

    def stale(self) -> bool:
        if self.window is not None:
            return self.window.stale(self)
        return not all(m.unchanged() for ref in self._members if (m := ref()) is not None)

    def ensure_fresh(self) -> None:
        """Pack again if any member changed since it was last packed, and with it what else changed in the model."""
        if self.stale():
            with packing():
                if self.stale() and not self.family.pack(self):
                    self.commit(self.pack(), self.surely_stale())

    def surely_stale(self) -> bool:
        """Whether a member was written, not only handed out."""
        return any(m.seen is None or m.signature()[1:] != m.seen[1:] for m in self.members())

    def written(self) -> list[Any]:
        """Equal as long as no member is known to have been written."""
        return [m.window_signature()[1] for m in self.members()]

    def note(self, certain: bool) -> None:
        """Record that every member was written, or that it may have been."""
        for member in self.members():
            member.note(certain)

    def pack(self) -> list["Packing"]:
        """Pack every member from its master weight into new tensors; nothing kept here changes."""
        members = self.members()
        if not members:
            raise UserError(f"the modules of the fusion group {self.name} are gone: pass a model that is still alive")
        with torch.inference_mode(False), torch.no_grad():
            # Signatures before reading: a write from now on makes it stale again.
            signatures = [m.signature() if self.window is None else () for m in members]
            masters = [m.full().detach() for m in members]
            amaxes = [ops.amax(w, m.batch_dims) for w, m in zip(masters, members, strict=True)]
            for member, amax in zip(members, amaxes, strict=True):
                ops.check_amax(amax, member.name)
            g = ops.global_scale(torch.stack(amaxes).amax(0), self.policy, self.name)
            packed = []
            for member, w, signature in zip(members, masters, signatures, strict=True):
                codes = torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=w.device)
                scale = torch.empty((*w.shape[:-1], w.shape[-1] // BLOCK), dtype=torch.uint8, device=w.device)
                ops.quantize_into(w, g, codes, scale)
                value = ops.PackedNVFP4(codes, scale.view(torch.float8_e4m3fn), g)
                packed.append(Packing(member, value, signature))
            return packed

    def copies(self) -> list["Packing"] | None:
        """The packed copies that training reads, brought up to date and cloned; None unless there are some."""
        members = self.members()
        if self.window is not None or not all(m.has_room_for(m.master()) for m in members):
            return None
        with packing(), torch.inference_mode(False), torch.no_grad():
            self.ensure_fresh()
            return [Packing(m, m.clone(), m.seen or ()) for m in members]

    def commit(self, packed: list["Packing"], certain: bool) -> None:
        """Make a result of `pack` what training reads; ``certain=False``: the weights may well be unchanged."""
        orders = [self.family.order(new.value.packed.device) for new in packed]
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training as well
            for order, (member, new, signature) in zip(orders, packed, strict=True):
                order.before_packing()
                if certain or not member.holds(new):
                    member.store(new)
                member.seen = signature
                order.packed()

    def __getstate__(self) -> dict[str, Any]:
        # Members add themselves when they are bound.
        return {"name": self.name, "policy": self.policy, "family": self.family, "window": None, "_members": []}


class Packing(NamedTuple):
    """A member packed anew: its value, and its signature from before it was read."""

    member: "PackedWeight"
    value: ops.PackedNVFP4
    signature: tuple[Any, ...]
