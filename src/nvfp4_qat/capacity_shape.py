"""What the formulas of `capacity` need of a model: its parameters in units as FSDP2 gathers them, and their plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .entries import QuantizedTensor
from .errors import UserError
from .format import BITS_PER_WEIGHT
from .plan import QuantPlan
from .plan_table import packed_bytes

BF16 = 2
"""Bytes of what is gathered and computed with."""


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, its plan entry where it is 4-bit, and how engines divide it.

    ``parts`` is the most tensor-parallel ranks it is divided among: 1 for norms and routers, which each holds whole;
    the number of key-value heads for their projections; None: any number.
    """

    shape: tuple[int, ...]
    entry: QuantizedTensor | None
    parts: int | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """In a packed stream, a checkpoint or an engine: 4.5 bits a weight and the global scales, else bf16."""
        return BF16 * self.elements if self.entry is None else packed_bytes(self.entry)

    def shard(self, ranks: int) -> int:
        """Elements of the longest shard: FSDP2 divides the first dimension, whatever is left goes to the first."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    ``widths`` is the sum of inputs and outputs of its linear layers for one token; experts count once for each that a
    token goes to.
    """

    weights: tuple[Weight, ...]
    widths: int

    @cached_property
    def elements(self) -> int:
        return sum(w.elements for w in self.weights)

    @cached_property
    def packed(self) -> float:
        """Bytes of its 4-bit weights without global scales, which do not travel in training."""
        return sum(w.elements for w in self.weights if w.entry is not None) * BITS_PER_WEIGHT / 8

    @cached_property
    def rest(self) -> int:
        """Bytes in bf16 of what is not 4-bit."""
        return BF16 * sum(w.elements for w in self.weights if w.entry is None)

    def shard(self, ranks: int) -> int:
        return sum(w.shard(ranks) for w in self.weights)

    def packed_shard(self, ranks: int) -> float:
        return sum(w.shard(ranks) for w in self.weights if w.entry is not None) * BITS_PER_WEIGHT / 8

    def received(self, ranks: int, packed: bool) -> float:
        """Bytes that a rank gets from the others in one all-gather: ``ranks - 1`` shards, packed or all in bf16."""
        whole = BF16 * self.shard(ranks)
        four_bit = BF16 * sum(w.shard(ranks) for w in self.weights if w.entry is not None)
        return (ranks - 1) * (whole - four_bit + self.packed_shard(ranks) if packed else whole)


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need of a model.

    Args:
        blocks: decoder blocks, in order. root: everything else.
        hidden: width between blocks. vocabulary: words of the head.
        heads, kv_heads, head_dim: of attention.
    """

    blocks: tuple[Unit, ...]
    root: Unit
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    plan: QuantPlan = field(repr=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        return (*self.blocks, self.root)

    @property
    def elements(self) -> int:
        return sum(unit.elements for unit in self.units)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token in the KV cache of an engine on one GPU: keys and values of every block, bf16."""
        return 2 * len(self.blocks) * self.kv_heads * self.head_dim * BF16


def model_shape(model: nn.Module, plan: QuantPlan) -> ModelShape:
    """Read a model's structure.

    Args:
        model: bare, as transformers builds it; the meta device will do.
        plan: its plan.

    Raises:
        UserError: no list of blocks in it, or attention of another kind than keys and values for every token.
    """
    config: Any = model.config
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "kv_lora_rank", None):
        raise UserError(f"memory of {', '.join(sorted(kinds)) or 'latent attention'} is not planned for yet")
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, which FSDP2 would gather one by one")
    prefix, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    routers = {entry.name for entry in plan.skipped if entry.kind == "router"}
    members: list[list[Weight]] = [[] for _ in range(len(found) + 1)]
    widths = [0] * len(members)
    for name, parameter in model.named_parameters():
        at = int(name[len(prefix) + 1 :].split(".")[0]) if name.startswith(f"{prefix}.") else -1
        shape = tuple(parameter.shape)
        whole = len(shape) < 2 or name in routers
        kv = name.rpartition(".")[0].endswith((".k_proj", ".v_proj"))
        entry = plan[name] if name in plan else None
        members[at].append(Weight(shape, entry, 1 if whole else kv_heads if kv else None))
        widths[at] += (0, 0, sum(shape), experts * sum(shape[1:]))[min(len(shape), 3)]
    *blocks, root = (Unit(tuple(weights), width) for weights, width in zip(members, widths, strict=True))
    return ModelShape(
        tuple(blocks), root, int(config.hidden_size), int(config.vocab_size), heads, kv_heads,
        int(getattr(config, "head_dim", None) or config.hidden_size // heads), plan,
    )  # fmt: skip
