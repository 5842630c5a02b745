"""Models of random weights with the shapes of Qwen3-8B and Qwen3-30B-A3B, made on the device in a second or two.

Every rank makes the whole model from the same seed, so all arms and ranks start from the same weights without sending
any. The loss is computed in pieces of `LOSS_ROWS` tokens, each recomputed in backward: at 8,192 tokens the logits alone
would be 2.5 GB in bf16 and twice that in fp32, and would hide what the layers need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOSS_ROWS = 2048
"""Tokens whose logits exist at a time."""

_DENSE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_MOE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip

_NARROW: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
"""For `bench_host`."""

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3-8B": ("dense", _DENSE, 12),
    "Qwen3-30B-A3B": ("moe", _MOE, 8),
    "narrow": ("dense", _NARROW, 12),
    "narrow-moe": ("moe", {**_NARROW, "moe_intermediate_size": 32, "num_experts": 32, "num_experts_per_tok": 8}, 8),
    "tiny": ("dense", _TINY, 2),
    "tiny-moe": ("moe", {**_TINY, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}, 2),
}
"""Name → kind, shape as in the model's ``config.json`` (layers apart), and how many layers a benchmark gives it."""


def make_model(name: str, layers: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A causal language model of random weights whose forward returns the loss.

    Args:
        name: a key of `MODELS`.
        layers: number of decoder layers.
        dtype: of the parameters.
        device: where they are made.
        seed: of the weights; equal on all ranks.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    kind, shape, _ = MODELS[name]
    common = {**shape, "num_hidden_layers": layers, "max_position_embeddings": 40960, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind == "dense":
                model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**common))
            else:
                config = Qwen3MoeConfig(**common)
                config._experts_implementation = "grouped_mm"
                model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # Changed afterwards: transformers reads the source of a model's module to learn what the model supports.
    model.__class__ = type(f"{type(model).__name__}Loss", (_ChunkedLoss, type(model)), {})
    return model.train()


class _ChunkedLoss:
    """Replaces the forward of a causal language model: token numbers in, mean cross-entropy out."""

    model: Any
    lm_head: Any

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 ``[batch, length + 1]`` → float32 ``[]``."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
        hidden = self.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(hidden.split(LOSS_ROWS), labels.split(LOSS_ROWS), strict=True):
            total += checkpoint(self._loss, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        mean: Tensor = total / labels.numel()
        return mean

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def make_batch(name: str, tokens: int, sequence: int, device: torch.device, seed: int) -> Tensor:
    """Random tokens ``[batch, length + 1]`` of a model in `MODELS`, in sequences of at most ``sequence``.

    ``tokens`` of them are predicted.
    """
    length = min(sequence, tokens)
    if tokens % length:
        raise SystemExit(f"--tokens {tokens} is no multiple of --sequence {sequence}")
    generator = torch.Generator().manual_seed(seed)
    size = (tokens // length, length + 1)
    return torch.randint(MODELS[name][1]["vocab_size"], size, generator=generator).to(device)
