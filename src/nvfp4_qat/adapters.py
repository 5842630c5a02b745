"""What PEFT may do around a 4-bit layer: add to its output. Not merge into its weight, not read its weight.

A merged weight would be quantized to something neither side trained or served: Q(W + BA) is not Q(W) + BA. And an
adapter method whose forward reads the base weight itself (DoRA's norm, for instance) sees the master, not the 4-bit
values the engine has. Both would be silent, so both are refused, when the adapter is attached if possible.

Which methods are safe was measured: the layer's output equals that of the same adapter on the dequantized base, bit for
bit (peft 0.21).
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .errors import UserError

SAFE_METHODS = frozenset(
    ("lora", "adalora", "ia3", "loha", "lokr", "oft", "boft", "miss", "vera", "vblora", "fourierft", "randlora", "c3a")
    + ("delora",)
)


_GATHERED = "_nvfp4_gathered"


def mark_gathered(module: nn.Module) -> None:
    """Note on a module that its weight is gathered in 4 bits: nothing else about the module says so."""
    module.__dict__[_GATHERED] = True
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(guard))


def _is_quantized(module: nn.Module | None) -> bool:
    return module is not None and (hasattr(module, "_qat_weights") or _GATHERED in module.__dict__)


def guard(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Module registration hook: check an adapter layer that wraps a quantized one and take away its ability to merge.

    Raises:
        UserError: the adapter's method computes with the base weight itself.
    """
    if name == "base_layer" and _is_quantized(child):
        if hasattr(parent, "merge"):
            parent.merge = _merging_refused  # type: ignore[assignment]
        _check_method(parent)
    elif name == "base_model" and isinstance(child, nn.Module):
        check_adapters(child)  # a PEFT model is complete now


def check_methods(model: nn.Module, planned: Iterable[nn.Module]) -> None:
    """Check the adapter layers around modules that are about to be quantized; changes nothing.

    Raises:
        UserError: see `guard`.
    """
    bases = {id(module) for module in planned}
    for module in model.modules():
        if id(module._modules.get("base_layer")) in bases:
            _check_method(module)


def check_adapters(model: nn.Module) -> None:
    """Apply `guard` to every adapter layer of a model.

    Raises:
        UserError: see `guard`.
    """
    for module in model.modules():
        base = module._modules.get("base_layer")
        if base is not None:
            guard(module, "base_layer", base)


def _check_method(layer: nn.Module) -> None:
    package = type(layer).__module__.split(".")
    if package[:2] != ["peft", "tuners"]:
        return
    method = package[2]
    reads_weight = method not in SAFE_METHODS or getattr(layer, "miss_fn", None) == "bat"
    if len(getattr(layer, "lora_magnitude_vector", None) or ()):
        method, reads_weight = "DoRA", True
    if reads_weight:
        raise UserError(
            f"the adapter method {method} ({type(layer).__name__}) computes with the base layer's own weight, or is "
            "not known not to: on a 4-bit base, training and rollout would differ. Use LoRA, or add the layers it "
            "adapts to ignore_patterns."
        )


def _merging_refused(*_: Any, **__: Any) -> None:
    raise UserError(
        "merging an adapter into 4-bit weights is refused: Q(W + BA) differs from Q(W) + BA, which training used. "
        "Serve the adapter beside the packed base, or load the bf16 base without apply_qat and merge there."
    )


_hooks: list[Any] = []
