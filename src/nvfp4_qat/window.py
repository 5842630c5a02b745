"""Window mode: module mode of weights that FSDP shards.

FSDP1, and FSDP2 without gather mode, gather a full tensor before the forward of a unit and again before its backward,
and free it in between. A module sees its weight in these windows only, so there is nothing to keep a packed copy of.
What is kept is the global scale, once per optimizer step::

    first read of a step      amax of all weights of the unit in one pass, global scales, one wait for the device
    forward                   ŵ = fake_quantize(w, g), freed after the GEMM
    backward, recomputation   the same once more, from what FSDP gathered again

Every rank sees the full weight, so all compute the same amax and raise the same error: no communication of our own.

For backward autograd keeps a reference to the unsharded tensor, as it does for `nn.Linear`; FSDP frees its storage and
fills it again. ŵ is never kept.

Members of a fusion group must be visible together to have one amax: one FSDP unit must hold them all. Visible is not
enough where FSDP1 gathers ahead, because the data may still be on its way. So with FSDP1 the members must be views of
one flat parameter; FSDP2 shows a tensor only after it waited for it.

What tells a new step. Parameters are no help: FSDP1 sets ``data`` of the original ones in every window, FSDP2 keeps the
unsharded ones for good, and either writes into them where no version counter sees it. So a scale is renewed after

- a step of any optimizer, unless the weight is frozen: an optimizer may own what is not recognizable as this weight,
- ``load_state_dict``, ``state_dict()`` (its aliases may be written) and `nvfp4_qat.refresh`,
- an in-place operation on what the optimizer owns (its version counter): the original parameter (FSDP1), the flat
  parameter (FSDP1 with ``use_orig_params=False``) or the DTensor (FSDP2), or the replacement of it.

A backward whose forward saw other weights raises. For that it counts whether an optimizer stepped that owns this very
weight, or amax changed: another model's step in between must do no harm.

What is deliberately missing: tensor parallelism.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .errors import UserError
from .multi import Amaxes
from .parameter import is_dtensor, last_step, stepped, tick

if TYPE_CHECKING:
    from .fusion import FusionGroup
    from .state import PackedWeight


def flat_parameter_of(tensor: Tensor | None) -> Tensor | None:
    """The flat parameter of FSDP1 that a tensor is a view of."""
    base = tensor._base if type(tensor) is Tensor else None
    return base if getattr(base, "_is_flat_param", False) else None


def put_there_by_fsdp(value: Tensor | None) -> bool:
    """Whether what a module shows for a weight is a DTensor (FSDP2) or a view of a flat parameter (FSDP1)."""
    return is_dtensor(value) or flat_parameter_of(value) is not None


class Shard:
    """What tells that a weight which FSDP shards was written."""

    def __init__(self) -> None:
        self._owned: Tensor | None = None
        """What an optimizer gets for the weight. No weak reference: with one, a DTensor cannot be moved or filled."""
        self._maybe_written = self._written = tick()

    def note(self, certain: bool) -> None:
        """Record that the weight was written, or that it may have been."""
        if certain:
            self._written = tick()
        else:
            self._maybe_written = tick()

    def assigned(self, module: nn.Module, value: Tensor | None) -> None:
        """FSDP, or someone else, sets the weight of a module to a parameter, a view or a shard."""
        if is_dtensor(value):
            self._owns(value)
        elif is_dtensor(self._owned) or not getattr(module, "_is_fsdp_managed_module", False):
            pass  # FSDP2 shows the unsharded parameter
        elif not getattr(module, "_fsdp_use_orig_params", False):
            if isinstance(value, nn.Parameter):  # summon_full_params: the caller may write into it
                self.note(certain=False)
            else:
                self._owns(flat_parameter_of(value))
        elif isinstance(value, nn.Parameter):
            self._owns(value)

    def _owns(self, parameter: Tensor | None) -> None:
        if parameter is not None and parameter is not self._owned:
            self._owned = parameter
            self.note(certain=True)

    def signature(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Equal as long as nothing is known to have changed: what only may mean a write, and what does."""
        owned = self._owned
        if owned is None:
            return (last_step(), self._maybe_written), (self._written, last_step(), -1)
        step = last_step() if owned.requires_grad else 0
        version = -1 if owned.is_inference() else owned._version
        return (step, self._maybe_written), (self._written, stepped(owned), version)


class WindowScale:
    """The global scale of a fusion group that FSDP shards."""

    def __init__(self) -> None:
        self.g: Tensor | None = None
        self._amax: Tensor | None = None
        self._seen: list[tuple[Any, Any]] | None = None

    def stale(self, group: "FusionGroup") -> bool:
        return _signature(group) != self._seen

    def renew(self, wanted: "PackedWeight") -> None:
        """Compute the global scale anew, and those of other groups that are visible now. The caller holds the lock.

        Raises:
            UserError: a member is not visible, or cannot be quantized.
        """
        group, shown = wanted.group, wanted.shown()
        check_unsharded(shown, wanted)
        assert shown is not None
        groups, tensors = [group], [_visible_members(wanted, shown)]
        for other in _following(group):
            if other.window is None or not other.members():
                continue
            weights = _visible(other, shown)
            if weights is None:
                break  # the next unit
            if other.window.stale(other):
                groups.append(other)
                tensors.append(weights)
        with torch.inference_mode(False), torch.no_grad():
            signatures = [_signature(g) for g in groups]  # before reading: a write from now on makes it stale again
            counts = [w[0].shape[: g.members()[0].batch_dims].numel() for g, w in zip(groups, tensors, strict=True)]
            amax = _amaxes(tensors, counts)
            scales = reference.global_scale(amax.view(torch.float32), group.policy).split(counts)
            on_host = amax.cpu().split(counts)  # waits for the device
            fine = [bool((bits.view(torch.float32) <= ops.largest_magnitude()).all()) for bits in on_host]  # NaN: false
            if not fine[0]:
                for member, w in zip(group.members(), tensors[0], strict=True):
                    ops.check_amax(ops.amax(w, member.batch_dims), member.name)
                raise AssertionError(f"the amax of {group.name} is out of range and that of no member is")
            for i, g in enumerate(groups):
                if fine[i] and g.window is not None:  # who reads one that is not fine will be told
                    g.window._keep(g, scales[i], on_host[i], signatures[i])

    def _keep(self, group: "FusionGroup", g: Tensor, amax: Tensor, signature: list[tuple[Any, Any]]) -> None:
        certain = self._seen is None or [s[1] for s in signature] != [s[1] for s in self._seen]
        if certain or self._amax is None or not torch.equal(self._amax, amax):
            for member in group.members():
                member.generation += 1
        batched = group.members()[0].batch_dims > 0
        self.g, self._amax, self._seen = g if batched else g[0], amax, signature


def _signature(group: "FusionGroup") -> list[tuple[Any, Any]]:
    return [member.window_signature() for member in group.members()]


def _following(group: "FusionGroup") -> Sequence["FusionGroup"]:
    groups = group.family.groups()
    return groups[groups.index(group) + 1 :]


def _visible(group: "FusionGroup", beside: Tensor) -> list[Tensor] | None:
    """What the members' modules show, if all of it is there as surely as another tensor is."""
    unit, found = flat_parameter_of(beside), []
    for member in group.members():
        w = member.shown()
        if w is None or not unsharded(w, member.shape) or flat_parameter_of(w) is not unit or w.device != beside.device:
            return None
        found.append(w.detach())
    return found


def _visible_members(wanted: "PackedWeight", shown: Tensor) -> list[Tensor]:
    found = _visible(wanted.group, shown)
    if found is None:
        raise UserError(
            f"{wanted.name} shares the global scale of {wanted.group.name} with "
            f"{', '.join(m.name for m in wanted.group.members() if m is not wanted)}, but they are not gathered "
            "together: FSDP holds them in different units. Wrap the whole attention or MLP block as one unit "
            "(fully_shard(block), or an auto_wrap_policy with the block's class), or add them to ignore_patterns."
        )
    return found


def unsharded(tensor: Tensor | None, shape: torch.Size) -> bool:
    """Whether a tensor is a full weight with data in it."""
    if tensor is None or is_dtensor(tensor) or tensor.shape != shape:
        return False
    end = tensor.storage_offset() + tensor.numel()
    return tensor.untyped_storage().size() >= end * tensor.element_size()


def check_unsharded(tensor: Tensor | None, weight: "PackedWeight") -> None:
    """Raise `UserError` unless a tensor is the full weight, with data in it."""
    if not unsharded(tensor, weight.shape):
        raise UserError(
            f"{weight.name} is used while FSDP shards it, outside the forward or backward of its FSDP unit: call the "
            "module that was wrapped, not a part of it. (Tensor parallelism is not supported.)"
        )


def _amaxes(tensors: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> Tensor:
    """Bit patterns of the largest magnitudes, int32, as many of each group as ``counts`` says."""
    flat = [w.contiguous() for weights in tensors for w in weights]
    items = [count for weights, count in zip(tensors, counts, strict=True) for _ in weights]
    first, start = [], 0
    for weights, count in zip(tensors, counts, strict=True):
        first += [start] * len(weights)
        start += count
    out = torch.zeros(start, dtype=torch.int32, device=flat[0].device)
    Amaxes(flat, items, first)(out)
    return out


def fake_quantized(w: Tensor, weight: "PackedWeight", dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """What a full weight's 4-bit form holds, with the global scale of this step.

    Args:
        w: the weight as FSDP gathered it, in any dtype.
        weight: which one it is.
        dtype: of the result.
        out: where to write it, contiguous and of this dtype; None: a new tensor.

    Raises:
        UserError: ``w`` holds no data.
    """
    check_unsharded(w, weight)
    g = weight.group.window.g if weight.group.window is not None else None
    assert g is not None
    with torch.no_grad():
        w = w.detach()
        if w.dtype != dtype:
            w = w.to(torch.bfloat16)  # what quantization does first anyway, and all that its result needs
        if not w.is_cuda:
            result = ops.fake_quantize(w, g).to(dtype)
            return result if out is None else out.copy_(result)
        from . import launch

        if out is not None and out.dtype == w.dtype:
            launch.fake_quantize(w, g, out)
            return out
        result = torch.empty(w.shape, dtype=w.dtype, device=w.device)
        launch.fake_quantize(w, g, result)
        return result.to(dtype) if out is None else out.copy_(result)
