"""The first update of a large model is announced in seconds: what its loaders do is recorded, expert by expert."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import CPU, Engine
from families import FAMILIES, Family
from torch import nn

from nvfp4_qat.live_recipe import Incoming, Part, Recipe
from nvfp4_qat.live_vllm import VllmCode
from nvfp4_qat.live_vllm_forms import without_memory

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 48, 128, 2048, 768, 151936
ROWS = {"q_proj": 4096, "k_proj": 512, "v_proj": 512}
SECONDS = 60
"""On one core, with much to spare for a slow one."""


def incoming() -> Iterator[Incoming]:
    """The tensors of Qwen3-30B-A3B, experts of a layer in one."""

    def plain(name: str, *shape: int) -> Incoming:
        return Incoming(name, shape, torch.bfloat16, (Part(name),))

    def packed(name: str, shape: tuple[int, ...], parts: dict[str, tuple[int, int] | None]) -> Iterator[Incoming]:
        *leading, columns = shape
        count = 0 if len(shape) == 2 else EXPERTS
        for suffix, form, dtype in (
            ("weight_packed", (*leading, columns // 2), torch.uint8),
            ("weight_scale", (*leading, columns // 16), torch.float8_e4m3fn),
            ("weight_global_scale", (count or 1,), torch.float32),
        ):
            rows = {p: r if suffix != "weight_global_scale" else None for p, r in parts.items()}
            of = tuple(Part(f"{p}.{suffix}", 0, count, r) for p, r in rows.items())
            yield Incoming(f"{name}.{suffix}", form, dtype, of)

    yield plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    yield plain("lm_head.weight", VOCABULARY, HIDDEN)
    yield plain("model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield plain(f"{at}{name}.weight", HIDDEN)
        for name in ("q_norm", "k_norm"):
            yield plain(f"{at}self_attn.{name}.weight", 128)
        yield plain(f"{at}mlp.gate.weight", EXPERTS, HIDDEN)
        for name, shape in [*((n, (r, HIDDEN)) for n, r in ROWS.items()), ("o_proj", (HIDDEN, 4096))]:
            yield from packed(f"{at}self_attn.{name}", shape, {f"{at}self_attn.{name}": None})
        experts = f"{at}mlp.experts."
        halves = {f"{experts}{{}}.{h}_proj": (k * INNER, (k + 1) * INNER) for k, h in enumerate(("gate", "up"))}
        yield from packed(f"{experts}gate_up_proj", (EXPERTS, 2 * INNER, HIDDEN), dict(halves))
        yield from packed(f"{experts}down_proj", (EXPERTS, HIDDEN, INNER), {f"{experts}{{}}.down_proj": None})


@pytest.fixture
def engine(folders: Path) -> Iterator[Engine]:
    (small,) = (family for family in FAMILIES if family.name == "qwen3-moe")
    options = {
        **small.options,
        **{"hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": INNER, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": LAYERS},
        **{"num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": VOCABULARY},
    }
    family = Family("qwen3-30b-a3b", small.config, small.architecture, small.layers, options)
    with Engine(family, folders / family.name, 0, 1, False) as made:
        yield made


def test_the_first_update_of_qwen3_30b_a3b_is_announced_in_seconds(engine: Engine) -> None:
    model: nn.Module = without_memory(engine.config, CPU)
    code, entries = VllmCode(model, engine.config, CPU), list(incoming())
    start = time.perf_counter()
    code.checkpoint_form(model)
    constructed = time.perf_counter() - start
    recipe = Recipe(model, code, entries)
    seconds = time.perf_counter() - start
    print(f"{len(entries)} tensors, {sum(p.count or 1 for e in entries for p in e.parts)} names: {seconds:.1f} s, "
          f"{constructed:.1f} s of it to construct the model again")  # fmt: skip
    copies = [copy for load in recipe.loads.values() for copy in load.copies]
    assert not any(load.calls for load in recipe.loads.values())
    assert len(copies) < 2 * len(entries)
    assert seconds < SECONDS
