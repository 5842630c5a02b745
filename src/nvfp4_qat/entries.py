"""The two kinds of entry of a `QuantPlan`: a weight that is 4-bit, and one that is not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint_names import CheckpointSlice


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that is 4-bit everywhere.

    Args:
        name: canonical parameter name, "model.layers.0.self_attn.q_proj.weight" or
            "model.layers.0.mlp.experts.gate_up_proj".
        module: canonical module name. param: "weight", "gate_up_proj" or "down_proj".
        shape: `[N, K]`, or `[E, N, K]` for experts.
        kind: "linear" or "experts".
        batch_dims: leading dimensions with a global scale each: 0, or 1 for experts.
        group: fusion group, "model.layers.0.self_attn.qkv_proj"; its members share the global scale (expert by expert).
        checkpoint: its tensors in a checkpoint, gate before up and expert by expert.
        reduction_dim: dimension along which blocks of 16 run.
        activation: how its input is quantized; None: not at all.
    """

    name: str
    module: str
    param: str
    shape: tuple[int, ...]
    kind: str
    batch_dims: int
    group: str
    checkpoint: tuple[CheckpointSlice, ...]
    reduction_dim: int = -1
    activation: str | None = None


@dataclass(frozen=True)
class SkippedTensor:
    """A weight of two or more dimensions that stays as it is.

    Args:
        name: canonical parameter name. module: canonical module name. shape: its shape.
        reason: why, in words.
        kind: "linear", "experts", "router", "embedding", "convolution", "adapter" or "other".
        group: the fusion group it would belong to, for linear layers.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    reason: str
    kind: str = "other"
    group: str | None = None
