"""`QATExperts`: fused 3-D experts of transformers that compute with the 4-bit values of their weights.

transformers v5 keeps the experts of a layer in two parameters, ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E,
H, I]``, and chooses among several forwards (``experts_implementation``: eager, grouped_mm, batched_mm). None of them is
written again here: the module's own forward runs on a stand-in that shows the dequantized weights under those two names
and is the module in every other respect.

Memory. The GEMMs save their weight operand for backward, which would keep a bf16 copy of every expert. So the two
weights are bracketed: `_Release`, at the output, frees their storages after forward, and its backward, the first to
run, fills them again from the packed copy. What autograd saved stays valid throughout, whichever views of it the
forward made. Under activation checkpointing the recomputed weights are what gets filled, because they are found through
``ctx.saved_tensors``. Compiled code keeps the bf16 weights: a compiler cannot trace storages that come and go.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .linear import read
from .qat_module import QATModule
from .state import PackedWeight


class _Dequantized(torch.autograd.Function):
    """The dequantized weight; its gradient goes to the master unchanged (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.dtype = master.dtype
        w, generation = read(master, handle, dtype)
        ctx.mark_non_differentiable(generation)
        return w, generation

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


class _Release(torch.autograd.Function):
    """Identity on ``out``; frees the storages of the weights after forward and fills them again before backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weights: list[tuple[PackedWeight, Tensor, int]]) -> Tensor:
        ctx.sources = [(weight, generation, w.shape) for weight, w, generation in weights]
        # Empty views: they lead to the storage, and hooks that copy or move what is saved find nothing to copy. Saved
        # the official way, so that activation checkpointing gives us those of the recomputed weights.
        ctx.save_for_backward(*(w.detach().flatten()[:0] for _, w, _ in weights))
        for _, w, _ in weights:
            w.untyped_storage().resize_(0)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for (weight, generation, shape), empty in zip(ctx.sources, ctx.saved_tensors, strict=True):
            weight.check_generation(generation)
            storage = empty.untyped_storage()
            if storage.size() == 0:  # else: recomputed a moment ago
                storage.resize_(shape.numel() * empty.element_size())
                weight.refill(empty.new_empty(0).set_(storage, 0, shape), generation)
        return grad, None


class _StandIn:
    """The experts module with other tensors under the names of its quantized parameters."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        object.__setattr__(self, "_module", module)
        for name, weight in weights.items():
            object.__setattr__(self, name, weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class QATExperts(QATModule):
    """Base of quantized experts; `to_qat_experts` derives a class from it and from the class of the module at hand."""

    _qat_original: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own forward, with dequantized weights."""
        device = hidden_states.device.type
        if device == "meta":  # which has no autocast, and shapes only
            on_meta: Tensor = self._qat_original.forward(self, hidden_states, *args, **kwargs)
            return on_meta
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shown: dict[str, Tensor] = {}
        kept: list[tuple[PackedWeight, Tensor, int]] = []
        for name, handle in self._qat_handles.items():
            master = getattr(self, name)
            w, generation = _Dequantized.apply(master, handle, dtype or master.dtype)  # type: ignore[no-untyped-call]
            shown[name] = w
            if not torch.compiler.is_compiling():
                kept.append((self._qat_weights[name], w, int(generation)))
        out: Tensor = self._qat_original.forward(_StandIn(self, shown), hidden_states, *args, **kwargs)
        if kept and out.requires_grad:
            out = _Release.apply(out, kept)  # type: ignore[no-untyped-call]
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The derived class exists in memory only: copy and pickle go through the original class.
        return _rebuild, (self._qat_original, tuple(self._qat_weights)), super().__reduce_ex__(protocol)[2]

    def extra_repr(self) -> str:
        return ", ".join((super().extra_repr(), *(f"{name}=nvfp4" for name in self._qat_weights))).lstrip(", ")


_derived: dict[type[nn.Module], type[nn.Module]] = {}


def _derive(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _derived:
        doc = f"{original.__name__} with 4-bit weights."
        body = {"_qat_original": original, "__module__": __name__, "__doc__": doc}
        _derived[original] = type(f"QAT{original.__name__}", (QATExperts, original), body)
    return _derived[original]


def _rebuild(original: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = object.__new__(_derive(original))
    return module


def to_qat_experts(module: nn.Module, weights: dict[str, PackedWeight]) -> QATExperts:
    """Turn a fused experts module into a quantized one in place.

    Args:
        module: owns the 3-D parameters.
        weights: parameter name → packed weight.
    """
    module.__class__ = _derive(type(module))
    assert isinstance(module, QATExperts)
    module._bind_qat(weights)
    return module
