"""Deciding for one tensor of a stream, by its name alone, where there is no model to make a plan from.

A plan knows more: which siblings exist, what is tied, how a checkpoint names fused experts. Here the tables of
`architectures` must do. Whatever they do not settle is an error that asks for a plan, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .architectures import (
    EXPERT_PARAMS,
    EXPERT_PROJECTIONS,
    FUSED_LAYERS,
    LINEAR_LEAVES,
    ROUTER_LEAVES,
    bf16_reason,
    fused_layer,
    odd_k,
)
from .checkpoint_names import CheckpointSlice
from .config import QATConfig
from .entries import QuantizedTensor, SkippedTensor
from .errors import UserError
from .format import BLOCK
from .naming import Pattern, canonical_name, join, split_leaf

_EMBEDDINGS = frozenset({"embed_tokens", "embed_positions", "embeddings", "wte", "wpe"})
_CONVOLUTIONS = frozenset({"conv1d", "conv"})
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|modules_to_save|prompt_encoder)(\.|$)")
_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)$")
_WITH_A_PLAN = "pass a plan (QuantPlan.from_model) to decide by the model instead of by names"


def classify_tensor(name: str, shape: tuple[int, ...], config: QATConfig) -> QuantizedTensor | SkippedTensor:
    """Decide for one tensor whether it is 4-bit, knowing only its name and shape.

    Args:
        name: parameter name, wrapped or canonical, in the layout of a checkpoint (one tensor per expert and
            projection).
        shape: the full tensor's shape.
        config: what to ignore.

    Returns:
        The entry a plan would hold. A member of a fusion group is in the group of the whole fused layer, whichever
        siblings the model has.

    Raises:
        UserError: the name is not known to be 4-bit or not, or a pattern splits a fusion group.
    """
    name = canonical_name(name)
    module, param = split_leaf(name)
    parent, leaf = split_leaf(module)

    def skipped(reason: str, kind: str = "other") -> SkippedTensor:
        return SkippedTensor(name, module, shape, reason, kind)

    if _ADAPTER.search(f".{name}"):
        return skipped("adapter", "adapter")
    if len(shape) < 2:
        return skipped("fewer than two dimensions")
    if param in EXPERT_PARAMS and len(shape) == 3:
        raise UserError(
            f"{name} holds all experts, and how a checkpoint names them one by one is not known; {_WITH_A_PLAN}"
        )
    if param != "weight" and len(shape) == 2:
        return skipped(f"{param} is not the weight of a linear layer")
    if leaf in _EMBEDDINGS:
        return skipped("embedding", "embedding")
    if leaf in _CONVOLUTIONS:
        return skipped("convolution", "convolution")
    if leaf in ROUTER_LEAVES:
        return skipped("router", "router")
    bf16 = bf16_reason(module)
    if bf16 is not None:
        return skipped(bf16, "linear")
    pattern = _pattern_hit(module, leaf, [Pattern(text) for text in config.ignore_patterns])
    if pattern is not None:
        return skipped(f"ignored by pattern {pattern!r}", "linear")
    if leaf == "lm_head":
        raise UserError(f'{module} may be tied to the embedding; add "lm_head" to ignore_patterns or {_WITH_A_PLAN}')
    if len(shape) != 2 or leaf not in LINEAR_LEAVES:
        raise UserError(f"{name} {list(shape)} is no layer known by name; {_WITH_A_PLAN}")
    if shape[1] % BLOCK:
        if _EXPERT.match(module):
            raise UserError(f"{name}: {odd_k(shape[1])}, and experts are 4-bit all or none; {_WITH_A_PLAN}")
        return skipped(odd_k(shape[1]), "linear")
    group = join(parent, fused_layer(leaf, _usual_siblings(leaf))[0])
    return QuantizedTensor(name, module, param, shape, "linear", 0, group, (CheckpointSlice(name),))


def fusion_siblings(module: str) -> tuple[str, ...]:
    """Return the layers that an engine fuses with a linear layer, as far as its name tells.

    Args:
        module: canonical name of a linear layer, such as "model.layers.0.self_attn.k_proj".

    Returns:
        Module names of the fused layer's parts in the engine's order, `module` among them. A model may lack some of
        them.
    """
    parent, leaf = split_leaf(module)
    return tuple(join(parent, part) for part in fused_layer(leaf, _usual_siblings(leaf))[1])


def _usual_siblings(leaf: str) -> tuple[str, ...]:
    """Return the parts of the fused layer that `leaf` belongs to in most models: the smallest that has it."""
    return min((parts for _, parts in FUSED_LAYERS if leaf in parts), key=len, default=(leaf,))


def _pattern_hit(module: str, leaf: str, patterns: Sequence[Pattern]) -> str | None:
    """Return the pattern that ignores a layer, after checking that it ignores what an engine runs together with it."""
    together = list(fusion_siblings(module))
    expert = _EXPERT.match(module)
    if expert is not None:
        projections = EXPERT_PROJECTIONS if leaf in EXPERT_PROJECTIONS else ("w1", "w2", "w3")
        indices = sorted({0, 1, int(expert["index"]), int(expert["index"]) + 1})
        together = [join(expert["experts"], str(index), projection) for index in indices for projection in projections]
    hit = next((pattern for pattern in patterns if pattern.matches(module)), None)
    for other in together:
        if any(pattern.matches(other) for pattern in patterns) != (hit is not None):
            ignored, kept = (module, other) if hit is not None else (other, module)
            raise UserError(
                f"ignore_patterns split a fusion group: {ignored} is ignored but {kept} is not, and engines run them "
                f"as one layer; ignore all of it or nothing, or {_WITH_A_PLAN}"
            )
    return None if hit is None else hit.text
