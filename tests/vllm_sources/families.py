"""Small models of the architectures that are tried, and random NVFP4 checkpoints for them.

Names, shapes and dtypes are those of compressed-tensors checkpoints with 4-bit weights and 16-bit activations. Layers
that vLLM fuses share a global scale, as such checkpoints have it. The vocabulary is no multiple of what vLLM pads to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_qat.live_recipe import Incoming, Part

HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 128, 256, 200, 2, 4, 2, 32, 4
ROUTED_INNER = 128

Checkpoint = list[tuple[Incoming, Tensor]]


@dataclass(frozen=True)
class Family:
    """A model architecture in a small size.

    Args:
        config: class name in transformers.
        options: of its config.
        ignore: layers that stay bf16, as the quantization config has it.
        layers: writes the layers' tensors.
    """

    name: str
    config: str
    architecture: str
    layers: Callable[[Writer, Family], None]
    options: dict[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def transformers_config(self) -> Any:
        import transformers

        common = {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 64,
            "architectures": [self.architecture],
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, self.config)(**{**common, **self.options})
        config.dtype = "bfloat16"
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
        config.quantization_config = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "ignore": ["lm_head", "re:.*mlp\\.gate$", *self.ignore],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}},
        }
        return config

    def checkpoint(self, seed: int) -> Checkpoint:
        """Random weights; experts as one tensor per projection."""
        writer = Writer(seed)
        writer.plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
        writer.plain("model.norm.weight", HIDDEN)
        if not self.options.get("tie_word_embeddings"):
            writer.plain("lm_head.weight", VOCABULARY, HIDDEN)
        self.layers(writer, self)
        return writer.tensors


def by_checkpoint_name(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights with one tensor for each name in a checkpoint."""
    named = [pair for entry, tensor in checkpoint for part in entry.parts for pair in part.of(tensor)]
    return [(Incoming(name, tuple(t.shape), t.dtype, (Part(name),)), t.contiguous()) for name, t in named]


class Writer:
    """Random tensors under the names that a checkpoint gives them."""

    def __init__(self, seed: int) -> None:
        self.tensors: Checkpoint = []
        self._random = torch.Generator().manual_seed(seed)

    def plain(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self._add(name, torch.randn(*shape, generator=self._random).to(dtype))

    def linears(self, prefix: str, shapes: dict[str, tuple[int, int]], quantized: bool = True) -> None:
        """Linear layers that share a global scale: names and [out, in]."""
        global_scale = self._global_scales(1)
        for name, shape in shapes.items():
            if not quantized:
                self.plain(f"{prefix}{name}.weight", *shape)
                continue
            for suffix, tensor in self._quantized(*shape).items():
                self._add(f"{prefix}{name}.{suffix}", tensor)
            self._add(f"{prefix}{name}.weight_global_scale", global_scale.clone())

    def experts(self, prefix: str, inner: int) -> None:
        """Routed experts, with gate_proj and up_proj one after the other in one tensor."""
        for name, halves, shape in (
            ("gate_up_proj", ("gate_proj", "up_proj"), (EXPERTS, 2 * inner, HIDDEN)),
            ("down_proj", ("down_proj",), (EXPERTS, HIDDEN, inner)),
        ):
            for suffix, tensor in self._quantized(*shape).items():
                parts = []
                for i, half in enumerate(halves):
                    rows = (i * inner, (i + 1) * inner) if len(halves) == 2 else None
                    parts.append(Part(f"{prefix}{{}}.{half}.{suffix}", 0, EXPERTS, rows))
                self._add(f"{prefix}{name}_{suffix}", tensor, parts)
            scales = [Part(f"{prefix}{{}}.{half}.weight_global_scale", 0, EXPERTS) for half in halves]
            self._add(f"{prefix}{name}_weight_global_scale", self._global_scales(EXPERTS, 1), scales)

    def _quantized(self, *shape: int) -> dict[str, Tensor]:
        *leading, columns = shape
        packed = torch.randint(0, 256, (*leading, columns // 2), generator=self._random, dtype=torch.uint8)
        # float8_e4m3fn from 2 to 384: of a tensor whose largest scale is stored near the top of the range
        scale = torch.randint(0x40, 0x7D, (*leading, columns // 16), generator=self._random, dtype=torch.uint8)
        return {"weight_packed": packed, "weight_scale": scale.view(torch.float8_e4m3fn)}

    def _global_scales(self, *shape: int) -> Tensor:
        return 500 + 1500 * torch.rand(*shape, generator=self._random)

    def _add(self, name: str, tensor: Tensor, parts: list[Part] | None = None) -> None:
        entry = Incoming(name, tuple(tensor.shape), tensor.dtype, tuple(parts or [Part(name)]))
        self.tensors.append((entry, tensor))


def _prefixes() -> Iterator[tuple[int, str]]:
    return ((i, f"model.layers.{i}.") for i in range(LAYERS))


def _norms(writer: Writer, prefix: str) -> None:
    writer.plain(f"{prefix}input_layernorm.weight", HIDDEN)
    writer.plain(f"{prefix}post_attention_layernorm.weight", HIDDEN)


def _mlp(writer: Writer, prefix: str, inner: int) -> None:
    writer.linears(prefix, {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN)})
    writer.linears(prefix, {"down_proj": (HIDDEN, inner)})


def _attention(writer: Writer, prefix: str, family: Family, norms: bool = True, biases: bool = False) -> None:
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    quantized = "re:.*self_attn.*" not in family.ignore
    writer.linears(prefix, {name: (n, HIDDEN) for name, n in rows.items()}, quantized)
    writer.linears(prefix, {"o_proj": (HIDDEN, HEADS * HEAD_DIM)}, quantized)
    if biases:
        for name, n in rows.items():
            writer.plain(f"{prefix}{name}.bias", n)
    if norms:
        writer.plain(f"{prefix}q_norm.weight", HEAD_DIM)
        writer.plain(f"{prefix}k_norm.weight", HEAD_DIM)


def _qwen3(writer: Writer, family: Family) -> None:
    for _, prefix in _prefixes():
        _norms(writer, prefix)
        _attention(writer, f"{prefix}self_attn.", family)
        _mlp(writer, f"{prefix}mlp.", INNER)


def _qwen2(writer: Writer, family: Family) -> None:
    for _, prefix in _prefixes():
        _norms(writer, prefix)
        _attention(writer, f"{prefix}self_attn.", family, norms=False, biases=True)
        _mlp(writer, f"{prefix}mlp.", INNER)


def _qwen3_moe(writer: Writer, family: Family) -> None:
    for _, prefix in _prefixes():
        _norms(writer, prefix)
        _attention(writer, f"{prefix}self_attn.", family)
        writer.plain(f"{prefix}mlp.gate.weight", EXPERTS, HIDDEN)
        writer.experts(f"{prefix}mlp.experts.", ROUTED_INNER)


Q_RANK = 64
KV_RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128  # vLLM's kernels for latent attention take no others


def _deepseek(writer: Writer, family: Family) -> None:
    quantized = "re:.*self_attn.*" not in family.ignore
    for i, prefix in _prefixes():
        _norms(writer, prefix)
        attention = f"{prefix}self_attn."
        compressed = {"kv_a_proj_with_mqa": (KV_RANK + ROPE, HIDDEN)}
        queries = HEADS * (NOPE + ROPE)
        if family.options["q_lora_rank"]:
            writer.linears(attention, {"q_a_proj": (Q_RANK, HIDDEN), **compressed}, quantized)
            writer.linears(attention, {"q_b_proj": (queries, Q_RANK)}, quantized)
            writer.plain(f"{attention}q_a_layernorm.weight", Q_RANK)
        else:
            writer.linears(attention, {"q_proj": (queries, HIDDEN)}, quantized)
            writer.linears(attention, compressed, quantized)
        writer.linears(attention, {"kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK)}, quantized)
        writer.linears(attention, {"o_proj": (HIDDEN, HEADS * VALUE)}, quantized)
        writer.plain(f"{attention}kv_a_layernorm.weight", KV_RANK)
        if i == 0:
            _mlp(writer, f"{prefix}mlp.", INNER)
            continue
        writer.plain(f"{prefix}mlp.gate.weight", EXPERTS, HIDDEN)
        if family.options["topk_method"] == "noaux_tc":
            writer.plain(f"{prefix}mlp.gate.e_score_correction_bias", EXPERTS, dtype=torch.float32)
        writer.experts(f"{prefix}mlp.experts.", ROUTED_INNER)
        _mlp(writer, f"{prefix}mlp.shared_experts.", ROUTED_INNER)


_ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": ROUTED_INNER}
_LATENT = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": KV_RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": ROUTED_INNER,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_scaling": None,
}

FAMILIES = (
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", _qwen3, {"head_dim": HEAD_DIM}),
    Family(
        "qwen3-tied", "Qwen3Config", "Qwen3ForCausalLM", _qwen3, {"head_dim": HEAD_DIM, "tie_word_embeddings": True}
    ),
    Family(
        "qwen3-bf16-attention",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        _qwen3,
        {"head_dim": HEAD_DIM},
        ("re:.*self_attn.*",),
    ),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", _qwen2),
    Family(
        "qwen3-moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        {"head_dim": HEAD_DIM, "decoder_sparse_step": 1, "mlp_only_layers": [], **_ROUTED},
    ),
    Family(
        "deepseek-v2-bf16-attention",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _deepseek,
        {"q_lora_rank": None, "topk_method": "greedy", **_LATENT},
        ("re:.*self_attn.*",),
    ),
    Family(
        "deepseek-v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _deepseek,
        {"q_lora_rank": Q_RANK, "topk_method": "noaux_tc", **_LATENT},
    ),
)


def some(*names: str) -> list[Any]:
    """Families by name, as parameters of a test."""
    return [pytest.param(family, id=family.name) for family in FAMILIES if family.name in names]
