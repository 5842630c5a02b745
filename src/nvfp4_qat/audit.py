"""Comparing a plan with what another side says it quantizes, whatever style of names that side uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .architectures import experts_prefix
from .entries import QuantizedTensor, SkippedTensor
from .errors import MismatchError
from .naming import canonical_name, join, split_leaf

if TYPE_CHECKING:
    from .plan import QuantPlan

# Parameter names, and the module inside vLLM's `experts` that owns their weights.
_SUFFIXES = (".weight", ".weight_packed", ".weight_scale", ".weight_global_scale", ".routed_experts")


def compare_coverage(plan: QuantPlan, names: Iterable[str]) -> None:
    """Raise if `names` are not exactly the layers that `plan` quantizes; see `QuantPlan.audit`."""
    layers = _layers_by_alias(plan)
    planned = {layer for entry in plan.quantized for layer in _layers(plan, entry)}
    there: set[str] = set()
    unknown: dict[str, None] = {}
    for name in names:
        module = _module_name(name)
        if module in layers:
            there |= layers[module]
        else:
            unknown[module] = None
    problems = [f"  only here: {layer}" for layer in _lines(planned - there, plan.quantized, plan)]
    problems += [f"  only there: {layer}" for layer in _lines(there - planned, plan.skipped, plan)]
    problems += [f"  only there: {name} (the plan knows no such layer)" for name in unknown]
    if problems:
        raise MismatchError("these layers are quantized on one side only:\n" + "\n".join(problems))


def _layers(plan: QuantPlan, entry: QuantizedTensor | SkippedTensor) -> tuple[str, ...]:
    """Return what is compared: a linear layer's canonical name, experts one by one under their checkpoint names."""
    if entry.kind != "experts":
        return (entry.module,)
    return plan.checkpoint_modules(entry.name) if len(entry.shape) == 3 else ()


def _layers_by_alias(plan: QuantPlan) -> dict[str, set[str]]:
    """Map every name that a layer, or several together, may go by to the layers."""
    aliases: dict[str, set[str]] = defaultdict(set)
    entries: list[QuantizedTensor | SkippedTensor] = [*plan.quantized, *plan.skipped]
    for entry in entries:
        layers = _layers(plan, entry)
        modules = plan.checkpoint_modules(entry.name)
        aliases[entry.module].update(layers)
        if entry.group is not None:  # a layer that an engine fused, under the checkpoint's prefix as well
            aliases[entry.group].update(layers)
            aliases[join(split_leaf(modules[0])[0], split_leaf(entry.group)[1])].update(layers)
        if entry.kind != "experts":
            for module in modules:
                aliases[module].update(layers)
            continue
        prefix = experts_prefix(modules[0], entry.module)
        aliases[prefix].update(layers)
        for slice_, layer in zip(plan.checkpoint_slices.get(entry.name, ()), layers, strict=False):
            aliases[layer].add(layer)
            if slice_.index is not None:
                # An engine numbers experts in one way (experts.3.gate_proj), whatever the checkpoint calls them.
                projection = "down_proj" if slice_.rows is None else "up_proj" if slice_.rows[0] else "gate_proj"
                aliases[join(prefix, str(slice_.index), projection)].add(layer)
    return aliases


def _module_name(name: str) -> str:
    module = canonical_name(name)
    for suffix in _SUFFIXES:
        module = module.removesuffix(suffix)
    return module


def _lines(layers: set[str], entries: Sequence[QuantizedTensor | SkippedTensor], plan: QuantPlan) -> Iterator[str]:
    """Word the layers in the order of the plan, a layer's experts as one where all of them are meant."""
    worded: set[str] = set()
    for entry in entries:
        own = [layer for layer in _layers(plan, entry) if layer in layers and layer not in worded]
        worded.update(own)
        because = f" (here in bf16: {entry.reason})" if isinstance(entry, SkippedTensor) else ""
        if len(own) > 1 and len(own) == len(_layers(plan, entry)):
            yield f"{entry.name} of all {entry.shape[0]} experts{because}"
        else:
            yield from (layer + because for layer in own)
