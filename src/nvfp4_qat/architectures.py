"""What transformers and vLLM make of a layer: which an engine fuses, which it never quantizes, what experts look like.

These tables are the only place that knows layer names. They follow what vLLM does, because that is what has to agree
with training:

- vLLM runs some sibling layers as one (`packed_modules_mapping`, `stacked_params_mapping` of each model file). Such a
  layer has one global scale: it takes the largest stored divisor and does not touch the block scales. So siblings must
  share it.
- vLLM builds routers, shared-expert gates and a few others without a quantization method, whatever the checkpoint says.
- A mixture-of-experts layer is quantized as a whole or not at all.

A table serves every architecture: a fusion group is formed of those siblings that exist under one parent. Sharing a
scale where an engine does not fuse costs next to nothing; not sharing where it does is silently wrong.

And they keep in bf16 what cannot be trained in 4 bits, because transformers does not call the layer.

Sources: vLLM 0.24.0 `model_executor/models/*.py`, `layers/quantization/compressed_tensors/`; transformers 5.23
`integrations/moe.py` and the Mamba mixers of `models/*/modeling_*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from .format import BLOCK
from .naming import join, split_leaf

# (name of the fused layer, its parts). What extends another entry stands before it and applies only when complete.
FUSED_LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("in_proj_qkvg", ("q_proj", "k_proj", "v_proj", "g_proj")),  # Olmo-Hybrid linear attention
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),  # multi-head latent attention
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),  # gated delta net
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)

# Linear layers that an engine keeps in bf16 although the checkpoint could say otherwise, by the end of their name.
ENGINE_BF16 = {
    "shared_expert_gate": "router: engines keep the gate of the shared expert in bf16",
    "indexer.wk": "engines fuse it with weights_proj and keep both in bf16",
    "indexer.weights_proj": "engines fuse it with wk and keep both in bf16",
}

# Linear layers of Mamba whose weight the model reads instead of calling them, on some path (a fused CUDA kernel) or on
# all. It would compute with the master then, and an engine with the 4-bit weight.
READ_DIRECTLY = (
    "mamba.dt_proj",  # Jamba
    "mamba.out_proj",  # Bamba, Falcon-H1, GraniteMoeHybrid, Zamba2
    "mixer.dt_proj",  # Mamba, FalconMamba, and the next two
    "mixer.x_proj",
    "mixer.out_proj",  # Mamba2, Nemotron-H, too
)

ROUTER_LEAVES = ("gate", "router")
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What vLLM calls the three projections of an expert when it reads `ignore`, whatever the checkpoint calls them."""
EXPERT_PARAMS = ("gate_up_proj", "down_proj")
"""The fused 3-D parameters of transformers 5: `[E, 2I, H]` with gate above up, and `[E, H, I]`."""

LINEAR_LEAVES = frozenset(
    {part for _, parts in FUSED_LAYERS for part in parts}
    | {"o_proj", "out_proj", "down_proj", "w2", "dense"}
    | {"q_b_proj", "kv_b_proj", "wq_b", "in_proj_qkvz", "in_proj_ba", "qkv_proj", "gate_up_proj", "fc1", "fc2"}
) - {"query", "key", "value"}
"""Names of linear layers that are 4-bit by default, for tensors that come without a model."""

_NUMBERED_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)$")


def fused_layer(leaf: str, siblings: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Return the layer that an engine fuses `leaf` into.

    Args:
        leaf: the last component of a linear layer's name.
        siblings: the names of all linear layers under the same parent, `leaf` included.

    Returns:
        Name of the fused layer and the siblings it is made of, in the engine's order; `leaf` itself if it stands alone.
    """
    for position, (fused, parts) in enumerate(FUSED_LAYERS):
        if leaf not in parts:
            continue
        present = tuple(part for part in parts if part in siblings)
        extends_another = any(set(parts) > set(other) for _, other in FUSED_LAYERS[position + 1 :])
        if len(present) == len(parts) or (len(present) > 1 and not extends_another):
            return fused, present
    return leaf, (leaf,)


def coverage_unit(module: str, group: str) -> str:
    """Return what an engine quantizes as a whole or not at all: all experts of a layer, else the fusion group."""
    match = _NUMBERED_EXPERT.match(module)
    return match["experts"] if match else group


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain `nn.Linear`: itself, our `QATLinear`, or what FSDP2 makes of one."""
    for cls in type(module).__mro__:
        if cls is nn.Linear:
            return True
        if not cls.__module__.startswith(("nvfp4_qat.", "torch.distributed.")):
            return False
    return False


def experts_reason(module: nn.Module) -> str | None:
    """Return why a module that keeps experts in 3-D parameters cannot be quantized, or None if it can."""
    params = [module._parameters.get(name) for name in EXPERT_PARAMS]
    shapes = [tuple(param.shape) for param in params if param is not None and param.ndim == 3]
    if len(shapes) != len(EXPERT_PARAMS):
        return f"{type(module).__name__} does not keep its experts in {' and '.join(EXPERT_PARAMS)}"
    if getattr(module, "is_transposed", False):
        return "transposed experts [E, K, N]: blocks would not run along K, and vLLM has no NVFP4 path for them"
    if not getattr(module, "is_concatenated", True):
        return "gate and up rows of the experts are interleaved, which no engine has an NVFP4 layout for"
    gate_up, down = shapes
    if gate_up[0] != down[0] or gate_up[1] != 2 * down[2] or gate_up[2] != down[1]:
        return f"experts of shapes {list(gate_up)} and {list(down)} are not laid out as [E, 2I, H] and [E, H, I]"
    for name, shape in zip(EXPERT_PARAMS, shapes, strict=True):
        if shape[-1] % BLOCK:
            return f"{name}: {odd_k(shape[-1])}"
    return None


def odd_k(k: int) -> str:
    """Word the reason for a reduction dimension that blocks of 16 do not divide."""
    return f"K = {k} is not divisible by {BLOCK}"


def is_router(name: str, children: Mapping[str, Collection[str]]) -> bool:
    """Tell whether a module is, or is part of, what chooses among experts: a `gate` or `router` beside `experts`.

    Args:
        name: its canonical name.
        children: canonical module name to the names of its children.
    """
    while name:
        name, leaf = split_leaf(name)
        if leaf in ROUTER_LEAVES and "experts" in children[name]:
            return True
    return False


def classify_module(module: nn.Module, name: str, router: bool) -> tuple[str, str | None]:
    """Say what a module that owns a weight of two or more dimensions is.

    Args:
        module: the module.
        name: its canonical name.
        router: whether it stands where a router does, see `is_router`.

    Returns:
        Its kind ("linear", "experts", "router", "embedding", "convolution" or "other") and the reason why nothing of it
        can be quantized, None if it can.
    """
    kind = type(module).__name__
    leaf = split_leaf(name)[1]
    if isinstance(module, nn.Embedding):
        return "embedding", "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution", "convolution"
    if router or "Router" in kind:
        return "router", "router"
    if "expert" in f"{kind}.{leaf}".lower() and any(p is not None and p.ndim == 3 for p in module._parameters.values()):
        return "experts", experts_reason(module)
    if is_linear(module):
        return "linear", bf16_reason(name)
    if isinstance(module, nn.Linear):
        return "linear", f"nn.Linear subclass {kind} is not supported"
    if kind == "Conv1D":
        return "other", "Conv1D keeps its weight transposed [K, N]"
    return "other", f"{kind} is not nn.Linear"


def bf16_reason(name: str) -> str | None:
    """Return why the linear layer of this name stays in bf16, or None: an engine or the model itself wants it so."""
    for suffix, reason in ENGINE_BF16.items():
        if f".{name}".endswith(f".{suffix}"):
            return reason
    if f".{name}".endswith(tuple(f".{suffix}" for suffix in READ_DIRECTLY)):
        return "the model reads its weight directly instead of calling the layer"
    return None


def is_numbered_expert(module: str) -> bool:
    """Tell whether a module name is that of one expert's projection: `…experts.3.gate_proj`."""
    return _NUMBERED_EXPERT.match(module) is not None


def engine_expert_names(checkpoint_module: str) -> list[str]:
    """Return the names that vLLM looks up in `ignore` for an expert that the checkpoint calls otherwise (Mixtral's w1).

    Args:
        checkpoint_module: any module; one that is no expert has no such names.
    """
    match = _NUMBERED_EXPERT.match(checkpoint_module)
    if match is None or match["leaf"] in EXPERT_PROJECTIONS:
        return []
    return [join(match["experts"], match["index"], projection) for projection in EXPERT_PROJECTIONS]


def experts_prefix(checkpoint_module: str, module: str) -> str:
    """Return what engines call the module that holds all experts of a layer.

    Args:
        checkpoint_module: one of its modules in the checkpoint, such as "model.layers.0.block_sparse_moe.experts.3.w1".
        module: the canonical name of the fused module, which is the answer where the checkpoint does not number
            experts.
    """
    match = _NUMBERED_EXPERT.match(checkpoint_module)
    return match["experts"] if match else module
