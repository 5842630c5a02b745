"""The manifest of an update: what is sent, and what checkpoints call its parts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers_live import bits

import nvfp4_qat as nq
from nvfp4_qat.checkpoint_names import CheckpointSlice
from nvfp4_qat.errors import UserError
from nvfp4_qat.live_manifest import _parts, from_wire, manifest, to_wire
from nvfp4_qat.live_recipe import Part

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 128,
}  # fmt: skip


def dense(**options):
    from transformers import Qwen3Config

    return Qwen3Config(**SIZES, head_dim=32, **options)


def qwen3_moe():
    from transformers import Qwen3MoeConfig

    experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    return Qwen3MoeConfig(**SIZES, head_dim=32, **experts)


def mixtral():
    from transformers import MixtralConfig

    return MixtralConfig(**SIZES, num_local_experts=4)


@pytest.mark.parametrize("ignore", [(), ("re:.*experts.*",), ("self_attn",)], ids=str)
@pytest.mark.parametrize(
    "config",
    [dense, lambda: dense(tie_word_embeddings=True), qwen3_moe, mixtral],
    ids=["dense", "tied", "moe", "mixtral"],
)
def test_the_parts_are_the_checkpoint(config, ignore):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    patterns = [
        p for p in ignore if "experts" not in p or "Moe" in type(model).__name__ or "Mix" in type(model).__name__
    ]
    qat = nq.QATConfig(enable=True)
    plan = nq.apply_qat(model, nq.QATConfig(enable=True, ignore_patterns=(*qat.ignore_patterns, *patterns)))
    entries = manifest(model, plan)
    assert from_wire(json.loads(json.dumps(to_wire(entries)))) == entries
    sent, stored = dict(nq.packed_weights(model, layout="fused")), dict(nq.packed_weights(model))
    assert {e.name: (e.shape, e.dtype) for e in entries} == {n: (tuple(t.shape), t.dtype) for n, t in sent.items()}
    found = {name: view for e in entries for part in e.parts for name, view in part.of(sent[e.name])}
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].shape == tensor.shape and bits(found[name]) == bits(tensor), name


def test_a_layer_of_experts_is_a_few_parts():
    names = [CheckpointSlice(f"layers.3.experts.{i}.up_proj", i, (4, 8)) for i in range(5)]
    assert list(_parts(names, rows=True)) == [Part("layers.3.experts.{}.up_proj", 0, 5, (4, 8))]
    some = [names[i] for i in (0, 1, 3, 4)]
    assert [(p.first, p.count) for p in _parts(some, rows=True)] == [(0, 2), (3, 2)]
    assert [p.rows for p in _parts(some, rows=False)] == [None, None]


def test_an_expert_whose_name_has_no_number_is_an_error():
    with pytest.raises(UserError, match="expert 2 of a tensor, but its name does not say so"):
        list(_parts([CheckpointSlice("experts.two.up_proj", 2)], rows=True))


def test_dtypes_that_are_not_known_are_one_error():
    wire = [["w", [2, 2], "float4", []], ["b", [2], "float32", []], ["v", [2], "float3", []]]
    with pytest.raises(UserError, match="nothing was changed: w has the dtype 'float4'; v has the dtype 'float3'. Ins"):
        from_wire(wire)
