"""Tiny versions of real architectures, and what an engine makes of a checkpoint's `ignore` list."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers as tf
from torch import nn

from nvfp4_qat.config import QATConfig
from nvfp4_qat.plan import QuantPlan

DENSE = ("llama", "qwen2", "qwen3")
MOE = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v32")
ALL = (*DENSE, *MOE, "gpt_oss", "granitemoe")
DEFAULT = QATConfig().ignore_patterns

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
# Multi-head latent attention: q_lora_rank, kv_lora_rank and head sizes of their own.
MLA = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"intermediate_size": 48, "num_key_value_heads": 1, "mamba_expand": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
MAMBA_ALONE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "expand": 2}


def config(architecture: str, **overrides: object) -> tf.PretrainedConfig:
    """The config of a two-layer model of a real architecture."""
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    make = {
        "llama": lambda: tf.LlamaConfig(**SIZES | HEADS, intermediate_size=48),
        "qwen2": lambda: tf.Qwen2Config(**SIZES, num_key_value_heads=1, intermediate_size=48),
        "qwen3": lambda: tf.Qwen3Config(**SIZES | HEADS, intermediate_size=48),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(
            **SIZES | HEADS | experts, intermediate_size=48, num_experts=4, mlp_only_layers=[0]
        ),
        "mixtral": lambda: tf.MixtralConfig(
            **SIZES, num_key_value_heads=1, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        ),
        "deepseek_v3": lambda: tf.DeepseekV3Config(
            **SIZES | MLA | experts, intermediate_size=48, n_routed_experts=4, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        ),  # fmt: skip
        "glm4_moe": lambda: tf.Glm4MoeConfig(
            **SIZES | HEADS | experts, intermediate_size=48, n_routed_experts=4, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        ),  # fmt: skip
        "qwen3_next": lambda: tf.Qwen3NextConfig(
            **SIZES | HEADS | experts | DELTA_NET, intermediate_size=48, num_experts=4,
            shared_expert_intermediate_size=16,
        ),  # fmt: skip
        "gpt_oss": lambda: tf.GptOssConfig(
            **SIZES | HEADS, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        ),
        "qwen3_5_moe": lambda: tf.Qwen3_5MoeTextConfig(
            **SIZES | HEADS | experts | DELTA_NET, num_experts=4, shared_expert_intermediate_size=16
        ),
        "deepseek_v32": lambda: tf.DeepseekV32Config(
            **SIZES | MLA | experts, intermediate_size=48, n_routed_experts=4, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1, index_head_dim=32, index_n_heads=2, index_topk=4,
        ),  # fmt: skip
        "granitemoe": lambda: tf.GraniteMoeConfig(
            **SIZES, num_key_value_heads=1, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        ),
        "jamba": lambda: tf.JambaConfig(**SIZES | MAMBA, mamba_dt_rank=16, num_experts=2, num_experts_per_tok=1),
        "mamba": lambda: tf.MambaConfig(**MAMBA_ALONE, time_step_rank=16),
        "falcon_mamba": lambda: tf.FalconMambaConfig(**MAMBA_ALONE, time_step_rank=16),
        "mamba2": lambda: tf.Mamba2Config(**MAMBA_ALONE, num_heads=4, head_dim=16, n_groups=1),
        "bamba": lambda: tf.BambaConfig(**SIZES | MAMBA | MAMBA2, attn_layer_indices=[1]),
        "falcon_h1": lambda: tf.FalconH1Config(**SIZES | MAMBA | MAMBA2, mamba_d_ssm=64),
        "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
            **SIZES | MAMBA | MAMBA2, layer_types=["mamba", "attention"], num_local_experts=0,
            shared_intermediate_size=48,
        ),
        "nemotron_h": lambda: tf.NemotronHConfig(
            **SIZES | HEADS, intermediate_size=48, hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=16,
            n_groups=1,
        ),
        "zamba2": lambda: tf.Zamba2Config(
            **SIZES, intermediate_size=48, num_key_value_heads=2, n_mamba_heads=4, mamba_ngroups=1,
            layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, attention_head_dim=32,
        ),
        "gpt2": lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=64),
    }  # fmt: skip
    made = make[architecture]()
    made.tie_word_embeddings = False
    for name, value in overrides.items():
        setattr(made, name, value)
    return made


def model(architecture: str, device: str = "meta", **overrides: object) -> nn.Module:
    """A two-layer model, on the meta device unless said otherwise."""
    with torch.device(device):
        return tf.AutoModelForCausalLM.from_config(config(architecture, **overrides))


def plan_of(architecture: str, *patterns: str, **overrides: object) -> QuantPlan:
    """The plan of such a model with the default patterns and some more."""
    return QuantPlan.from_model(model(architecture, **overrides), QATConfig(ignore_patterns=(*DEFAULT, *patterns)))


def engine_ignores(layer: str, ignore: Iterable[str], fused: dict[str, tuple[str, ...]]) -> bool:
    """Decide as vLLM does whether `ignore` covers one of its layers; parts that disagree are an error there too.

    A fused layer is ignored under its own name, or if all of its parts are.
    """
    names = set(ignore)
    assert not any(name.startswith("re:") for name in names)
    parent, _, leaf = layer.rpartition(".")
    if layer in names or leaf not in fused:
        return layer in names
    votes = {f"{parent}.{part}" in names for part in fused[leaf]}
    assert len(votes) == 1, f"{layer}: {fused[leaf]} disagree"
    return votes.pop()
