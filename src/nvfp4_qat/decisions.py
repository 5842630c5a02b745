"""Which weights are 4-bit: the rules, applied to an inventory.

How a weight is decided, in this order:

1. its module: embeddings, convolutions, routers, adapters, layers that engines keep in bf16 and unsupported layouts
   stay as they are;
2. its parameter: one that several modules share stays bf16; so does one whose K is not divisible by 16;
3. `ignore_patterns`, matched against canonical module names and checkpoint module names;
4. its fusion group: an engine quantizes it whole or not at all, and all experts of a layer likewise. If 1 or 2 exclude
   one member, the others follow it. If a pattern excludes only some, that is an error that names the group.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .architectures import EXPERT_PARAMS, coverage_unit, fused_layer, odd_k
from .checkpoint_names import CheckpointSlice, checkpoint_slices
from .config import DEFAULT_IGNORE_PATTERNS, QATConfig
from .entries import QuantizedTensor, SkippedTensor
from .errors import UserError
from .format import BLOCK
from .inventory import Inventory, Weight
from .naming import Pattern, join, split_leaf

Slices = dict[str, tuple[CheckpointSlice, ...]]


@dataclass
class _Case:
    """A weight on its way to a decision.

    `reason` is why it stays in bf16, None as long as nothing speaks against 4 bits. `ignored` maps those of its
    checkpoint modules that a pattern hit to the pattern; `kept` are the others.
    """

    weight: Weight
    group: str
    unit: str
    slices: tuple[CheckpointSlice, ...]
    reason: str | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def decide(
    inventory: Inventory, config: QATConfig
) -> tuple[tuple[QuantizedTensor, ...], tuple[SkippedTensor, ...], Slices]:
    """Apply the rules to every weight of a model.

    Args:
        inventory: the model's weights.
        config: the ignore patterns.

    Returns:
        The 4-bit weights, the others, and the checkpoint tensors of everything that is stored.

    Raises:
        UserError: see `QuantPlan.from_model`.
    """
    slices = checkpoint_slices(inventory.model, inventory.tensors)
    siblings: dict[str, set[str]] = defaultdict(set)
    for weight in inventory.weights:
        if weight.kind == "linear":
            parent, leaf = split_leaf(weight.module)
            siblings[parent].add(leaf)
    cases = [_case(weight, siblings, slices) for weight in inventory.weights]
    _match_patterns(cases, [Pattern(text) for text in config.ignore_patterns])
    _refuse_tied_head(cases, {w.name: w.kind for w in inventory.weights})
    units: dict[str, list[_Case]] = defaultdict(list)
    for case in cases:
        if case.weight.kind in ("linear", "experts"):
            units[case.unit].append(case)
    for unit, members in units.items():
        _settle(unit, members)

    quantized, skipped = [], []
    for case in cases:
        weight = case.weight
        if case.reason is None:
            slices[weight.name] = case.slices
            quantized.append(
                QuantizedTensor(
                    weight.name,
                    weight.module,
                    weight.param,
                    weight.shape,
                    weight.kind,
                    1 if weight.kind == "experts" else 0,
                    case.group,
                    case.slices,
                )
            )
        else:
            group = case.group if weight.kind == "linear" else None
            skipped.append(SkippedTensor(weight.name, weight.module, weight.shape, case.reason, weight.kind, group))
    if not quantized:
        raise UserError(_nothing_left(skipped))
    return tuple(quantized), tuple(skipped), slices


def _case(weight: Weight, siblings: Mapping[str, set[str]], slices: Slices) -> _Case:
    """Apply rules 1 and 2."""
    own = slices.get(weight.name, (CheckpointSlice(weight.name),))
    if weight.kind == "experts":
        case = _Case(weight, join(weight.module, weight.param), weight.module, own, weight.reason)
        if len(weight.shape) == 2:
            case.reason = "bias of the experts"
        elif case.reason is None and weight.param not in EXPERT_PARAMS:
            case.reason = f"{weight.param} is neither {' nor '.join(EXPERT_PARAMS)}"
        elif case.reason is None:
            split = _per_expert(weight, own)
            if split is None:
                case.reason = (
                    f"the checkpoint keeps all experts in one tensor, {own[0].name}, which has no NVFP4 layout"
                )
            else:
                case.slices = split
    elif weight.kind == "linear":
        parent, leaf = split_leaf(weight.module)
        group = join(parent, fused_layer(leaf, siblings[parent])[0])
        case = _Case(weight, group, coverage_unit(weight.module, group), own, weight.reason)
        if case.reason is None and weight.param != "weight":
            case.reason = f"{weight.param} is not the weight of a linear layer"
        elif case.reason is None and len(weight.shape) != 2:
            case.reason = f"a linear layer's weight has two dimensions, this one {len(weight.shape)}"
        elif case.reason is None and 0 in weight.shape:
            case.reason = "it has no elements"
        elif case.reason is None and weight.shape[1] % BLOCK:
            case.reason = odd_k(weight.shape[1])
    else:
        case = _Case(weight, weight.module, weight.module, own, weight.reason)
    if case.reason is None and (weight.tied_to or weight.shared_with):
        other = split_leaf(weight.tied_to or weight.shared_with or "")[0]
        case.reason = f"tied to {other}" if weight.tied_to else f"shared with {other}"
    return case


def _per_expert(weight: Weight, slices: tuple[CheckpointSlice, ...]) -> tuple[CheckpointSlice, ...] | None:
    """Return the experts' tensors one by one, or None where the checkpoint has its own way to keep them together."""
    if all(slice_.index is not None for slice_ in slices):
        return tuple(sorted(slices, key=lambda s: (s.index or 0, s.rows or (0, 0))))
    if [slice_.name for slice_ in slices] != [weight.name]:
        return None
    # The checkpoint is as fused as the model (Qwen3.5). Packed checkpoints of such models are not: engines read them
    # under one name per expert, gate first, which is also how the rows are stacked.
    experts, rows, _ = weight.shape
    parts: tuple[tuple[str, tuple[int, int] | None], ...] = (("down_proj", None),)
    if weight.param == "gate_up_proj":
        parts = (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows)))
    return tuple(
        CheckpointSlice(join(weight.module, str(expert), projection, "weight"), expert, part)
        for expert in range(experts)
        for projection, part in parts
    )


def _match_patterns(cases: Sequence[_Case], patterns: Sequence[Pattern]) -> None:
    """Apply rule 3: note for every name of every weight which pattern hit it, and warn of patterns that hit nothing."""
    hits: Counter[str] = Counter()
    for case in cases:
        if case.weight.kind == "adapter":
            continue
        modules = [split_leaf(slice_.name)[0] for slice_ in case.slices]
        for pattern in patterns:
            if pattern.matches(case.weight.module):
                matched = modules
            else:
                matched = [module for module in modules if pattern.matches(module)]
            hits[pattern.text] += len(matched)
            for module in matched:
                case.ignored.setdefault(module, pattern.text)
        case.kept = [module for module in modules if module not in case.ignored]
    for pattern in patterns:
        if not hits[pattern.text] and pattern.text not in DEFAULT_IGNORE_PATTERNS:
            warnings.warn(f"ignore pattern {pattern.text!r} matches no weight of this model", stacklevel=4)


def _refuse_tied_head(cases: Sequence[_Case], kinds: Mapping[str, str]) -> None:
    for case in cases:
        weight = case.weight
        other = weight.tied_to or weight.shared_with
        if weight.kind == "linear" and other and kinds.get(other) == "embedding" and not case.ignored:
            raise UserError(
                f"{weight.module} is tied to {split_leaf(other)[0]}, so it cannot be quantized without the embedding; "
                f'add "{weight.module}" to ignore_patterns'
            )


def _settle(unit: str, members: Sequence[_Case]) -> None:
    """Apply rule 4 to the weights that an engine quantizes together."""
    undecided = [case for case in members if case.reason is None]
    hit = {name: pattern for case in undecided for name, pattern in case.ignored.items()}
    kept = [name for case in undecided for name in case.kept]
    if hit and kept:
        raise UserError(
            f"ignore pattern {next(iter(hit.values()))!r} splits the fusion group {unit}: it matches {_few(list(hit))} "
            f"but not {_few(kept)}; an engine runs the whole group as one layer, so ignore all of it or nothing"
        )
    excluded = next((case for case in members if case.reason and case.weight.param in ("weight", *EXPERT_PARAMS)), None)
    for case in undecided:
        if case.ignored:
            case.reason = "ignored by pattern " + ", ".join(repr(text) for text in dict.fromkeys(case.ignored.values()))
        elif excluded is not None:
            case.reason = (
                f"an engine runs it as one with {excluded.weight.module}, which stays in bf16 ({excluded.reason})"
            )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _nothing_left(skipped: Sequence[SkippedTensor]) -> str:
    if not skipped:
        return (
            "nothing to quantize: the model has no weight of two dimensions (make the plan before FSDP1 flattens them)"
        )
    reasons = Counter(entry.reason for entry in skipped)
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
    return f"nothing is left to quantize, all {len(skipped)} weights stay in bf16: {listed}"
