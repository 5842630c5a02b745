"""Deciding by name alone agrees with the plan wherever it decides, and asks for a plan where it cannot."""

import warnings

import pytest
import torch
from helpers_plan import DENSE, MOE, model
from torch import nn

from nvfp4_qat.classify import classify_tensor, fusion_siblings
from nvfp4_qat.config import QATConfig
from nvfp4_qat.entries import QuantizedTensor, SkippedTensor
from nvfp4_qat.errors import UserError
from nvfp4_qat.plan import QuantPlan

DEFAULT = QATConfig().ignore_patterns


def checkpoint_tensors(architecture: str, plan: QuantPlan, bare: nn.Module):
    """(checkpoint name, shape, plan entry or None) of everything a checkpoint stores."""
    state = bare.state_dict()
    entries = {entry.name: entry for entry in (*plan.quantized, *plan.skipped)}
    for name, pieces in plan.checkpoint_slices.items():
        for piece in pieces:
            yield piece.name, tuple(piece.of(state[name]).shape), entries.get(name)


@pytest.mark.parametrize("patterns", [(), ("re:.*self_attn.*",), ("experts", "shared_expert", "shared_experts")])
@pytest.mark.parametrize("architecture", [*DENSE, *MOE])
def test_agrees_with_the_plan_on_checkpoint_tensors(architecture, patterns):
    config = QATConfig(ignore_patterns=(*DEFAULT, *patterns))
    bare = model(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = QuantPlan.from_model(bare, config)
    decided = 0
    for name, shape, entry in checkpoint_tensors(architecture, plan, bare):
        if entry is not None and entry.kind == "experts" and len(shape) == 3:
            with pytest.raises(UserError, match="holds all experts.*pass a plan"):
                classify_tensor(name, shape, config)
            continue
        by_name = classify_tensor(name, shape, config)
        assert by_name.name == name and by_name.shape == shape
        assert isinstance(by_name, QuantizedTensor) == isinstance(entry, QuantizedTensor), name
        if isinstance(entry, QuantizedTensor):
            decided += 1
            assert by_name.checkpoint[0].name == name and by_name.batch_dims == 0 and by_name.kind == "linear"
            if entry.kind == "linear":
                assert (by_name.group, by_name.module, by_name.param) == (entry.group, entry.module, entry.param)
        elif entry is not None and entry.kind != "experts":
            assert by_name.reason == entry.reason
    assert decided == sum(len(entry.checkpoint) for entry in plan.quantized)


def test_groups_of_experts_are_per_expert():
    config = QATConfig()
    group = "model.layers.0.mlp.experts.3.gate_up_proj"
    for leaf in ("gate_proj", "up_proj"):
        assert classify_tensor(f"model.layers.0.mlp.experts.3.{leaf}.weight", (32, 16), config).group == group
    assert classify_tensor("a.experts.3.w3.weight", (32, 16), config).group == "a.experts.3.w13"
    assert classify_tensor("a.experts.3.w2.weight", (32, 16), config).group == "a.experts.3.w2"


def test_siblings():
    assert fusion_siblings("a.self_attn.k_proj") == tuple(f"a.self_attn.{p}_proj" for p in "qkv")
    assert fusion_siblings("a.mlp.down_proj") == ("a.mlp.down_proj",)
    assert fusion_siblings("a.q_a_proj") == ("a.q_a_proj", "a.kv_a_proj_with_mqa")
    assert fusion_siblings("gate_proj") == ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.norm.weight", (16,), "fewer than two dimensions"),
        ("model.layers.0.self_attn.q_proj.bias", (16,), "fewer than two dimensions"),
        ("model.embed_tokens.weight", (64, 16), "embedding"),
        ("model.layers.0.mlp.gate.weight", (4, 16), "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (4, 16), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 16), "shared expert"),
        ("model.layers.0.linear_attn.conv1d.weight", (32, 1, 4), "convolution"),
        ("model.layers.0.linear_attn.A_log", (4, 16), "A_log is not the weight"),
        ("lm_head.weight", (64, 16), "ignored by pattern 'lm_head'"),
        ("model.layers.0.self_attn.q_proj.weight", (16, 40), "K = 40 is not divisible by 16"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", (8, 16), "adapter"),
    ],
)
def test_skipped(name, shape, reason):
    entry = classify_tensor(name, shape, QATConfig())
    assert isinstance(entry, SkippedTensor) and reason in entry.reason


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mixer.strange.weight", (16, 16), r"weight \[16, 16\] is no layer known by name; pass a plan"),
        ("model.layers.0.moe.w1.weight", (4, 16, 16), "is no layer known by name"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 16), "holds all experts"),
        ("model.layers.0.mlp.experts.1.down_proj.weight", (16, 24), "K = 24.*all or none"),
        ("score.weight", (2, 16), "is no layer known by name"),
    ],
)  # fmt: skip
def test_undecided(name, shape, message):
    with pytest.raises(UserError, match=message):
        classify_tensor(name, shape, QATConfig())


def test_a_head_that_is_not_ignored_may_be_tied():
    with pytest.raises(UserError, match="lm_head may be tied"):
        classify_tensor("lm_head.weight", (64, 16), QATConfig(ignore_patterns=[]))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "k_proj"),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj"),
        ("model.layers.0.mlp.gate_proj.weight", "re:.*gate_proj"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "experts.3"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "re:.*down_proj"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "w2"),
    ],
)
def test_a_pattern_that_splits_is_refused(name, pattern):
    with pytest.raises(UserError, match="split a fusion group"):
        classify_tensor(name, (16, 16), QATConfig(ignore_patterns=[pattern]))


def test_wrapped_names_are_canonical():
    name = "module.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    entry = classify_tensor(name, tuple(torch.Size((32, 16))), QATConfig())
    assert entry.name == "model.layers.0.mlp.up_proj.weight" and entry.group == "model.layers.0.mlp.gate_up_proj"
