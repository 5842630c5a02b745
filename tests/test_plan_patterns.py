"""What ignore patterns match, what they must not split, and parameters that have two names."""

import re
import warnings

import pytest
import torch
from helpers_plan import DEFAULT, model, plan_of
from torch import nn

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import UserError
from nvfp4_qat.plan import QuantPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        ("self_attn", "self_attn"),
        ("layers.0.self_attn", "layers.0.self_attn"),
        ("model.layers.1.mlp", "layers.1.mlp"),
        ("model.layers.0.self_attn.o_proj", "layers.0.self_attn.o_proj"),
        ("re:.*self_attn.*", "self_attn"),
        ("re:model\\.layers\\.0\\.", "layers.0."),
        ("re:.*\\.(q|k|v)_proj$", "(q|k|v)_proj"),
        ("o_proj", "o_proj"),
    ],
)
def test_patterns(pattern, ignored):
    plan = plan_of("qwen3", pattern)
    hit = {e.module for e in plan.skipped if e.reason == f"ignored by pattern {pattern!r}"}
    assert hit == {
        name
        for name, _ in model("qwen3").named_modules()
        if re.search(rf"{ignored}.*_proj$|{ignored}$", name) and name.endswith("_proj")
    }
    assert hit


@pytest.mark.parametrize(
    "pattern", ["self", "attn", "self_at", "layers.0.self", "proj", "re:self_attn", "q_proj.weight"]
)
def test_patterns_that_match_no_whole_component_warn(pattern):
    with pytest.warns(UserWarning, match=re.escape(repr(pattern))) as caught:
        plan = QuantPlan.from_model(model("qwen3"), QATConfig(ignore_patterns=[*DEFAULT, pattern]))
    assert caught[0].filename == __file__
    assert len(plan.skipped) == 2


def test_default_patterns_do_not_nag():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of("llama")  # a dense model has no mlp.gate
        plan_of("llama", "model.layers.1")


@pytest.mark.parametrize(
    ("architecture", "pattern", "message"),
    [
        ("qwen3", "k_proj", r"'k_proj' splits the fusion group model\.layers\.0\.self_attn\.qkv_proj: "
         r"it matches model\.layers\.0\.self_attn\.k_proj but not .*q_proj, .*v_proj"),
        ("qwen3", "re:.*layers.1.*up_proj", r"splits the fusion group model\.layers\.1\.mlp\.gate_up_proj"),
        ("deepseek_v3", "q_a_proj", r"splits the fusion group model\.layers\.0\.self_attn\.fused_qkv_a_proj"),
        ("qwen3_moe", "re:.*experts.3.*", r"fusion group model\.layers\.1\.mlp\.experts: .*experts\.3\.gate_proj"),
        ("qwen3_moe", "experts.0.gate_proj", r"splits .*\.mlp\.experts.* and \d+ more"),
        ("qwen3_moe", "re:.*down_proj$", r"splits the fusion group model\.layers\.1\.mlp\.experts"),
        ("mixtral", "re:.*w2$", r"splits the fusion group model\.layers\.0\.mlp\.experts"),
    ],
)  # fmt: skip
def test_a_pattern_that_splits_a_group_is_refused(architecture, pattern, message):
    with pytest.raises(UserError, match=message):
        plan_of(architecture, pattern)


@pytest.mark.parametrize(
    ("architecture", "pattern"),
    [
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "re:.*mlp.experts$"),
        ("qwen3_moe", "re:.*experts\\.\\d+\\."),
        ("mixtral", "block_sparse_moe"),
        ("mixtral", "re:.*\\.w[123]$"),
        ("qwen3_5_moe", "re:.*experts\\.\\d+\\..*_proj"),
    ],
)
def test_experts_are_matched_by_fused_and_by_checkpoint_names(architecture, pattern):
    plan = plan_of(architecture, pattern)
    assert not any(entry.kind == "experts" for entry in plan.quantized)
    assert {e.reason for e in plan.skipped if e.kind == "experts"} == {f"ignored by pattern {pattern!r}"}


def test_two_patterns_may_cover_a_group_together():
    plan = plan_of("qwen3", "q_proj", "re:.*[kv]_proj")
    assert not any("self_attn.q" in group for group in plan.groups())


@pytest.mark.parametrize("patterns", [["re:.*"], ["model", "lm_head"]])
def test_nothing_left_is_refused(patterns):
    with pytest.raises(
        UserError, match=r"nothing is left to quantize, all 16 weights stay in bf16: .*ignored by pattern"
    ):
        QuantPlan.from_model(model("qwen3"), QATConfig(ignore_patterns=patterns))


def test_a_model_without_matrices_is_refused():
    with pytest.raises(UserError, match="no weight of two dimensions"):
        QuantPlan.from_model(nn.LayerNorm(16), QATConfig())
    with pytest.raises(UserError, match="2 × embedding.*|Conv1D"):
        plan_of("gpt2")


def test_tied_head_is_skipped_and_not_stored():
    plan = plan_of("qwen3", tie_word_embeddings=True)
    assert {e.module: e.reason for e in plan.skipped}["lm_head"] == "tied to model.embed_tokens"
    assert "lm_head.weight" not in plan.checkpoint_slices and "model.embed_tokens.weight" in plan.checkpoint_slices
    assert plan.ignore_list() == ("lm_head",)  # a reader sees it as a linear layer all the same
    assert plan.parameters == sum(p.numel() for p in model("qwen3", tie_word_embeddings=True).parameters())


def test_a_tied_head_cannot_be_quantized():
    with pytest.raises(UserError, match='lm_head is tied to model.embed_tokens.*add "lm_head" to ignore_patterns'):
        QuantPlan.from_model(model("qwen3", tie_word_embeddings=True), QATConfig(ignore_patterns=[]))


def test_a_declared_tie_counts_although_the_parameters_are_still_two():
    untied = model("qwen3", tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(torch.empty_like(untied.lm_head.weight))
    with pytest.raises(UserError, match="lm_head is tied"):
        QuantPlan.from_model(untied, QATConfig(ignore_patterns=[]))
    assert "lm_head.weight" not in QuantPlan.from_model(untied, QATConfig()).checkpoint_slices


def test_an_untied_head_may_be_quantized_and_is_named_as_target():
    plan = QuantPlan.from_model(model("qwen3"), QATConfig(ignore_patterns=[]))
    assert "lm_head.weight" in plan and plan.targets() == ("Linear", "lm_head")
    assert plan.quantization_config()["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert plan_of("qwen3").targets() == ("Linear",)


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(32, 16)
        self.up_proj = nn.Linear(32, 16)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.again = self.up_proj
        self.alone = nn.Linear(32, 32)


def test_shared_parameters_stay_in_bf16_with_their_group():
    plan = QuantPlan.from_model(Sharing(), QATConfig())
    assert [entry.name for entry in plan.quantized] == ["alone.weight"]
    reasons = {entry.module: entry.reason for entry in plan.skipped}
    assert reasons["first"] == "shared with second" and reasons["second"] == "tied to first"
    assert reasons["up_proj"] == "shared with again" and reasons["again"] == "tied to up_proj"
    assert "runs it as one with up_proj" in reasons["gate_proj"]
    assert set(plan.checkpoint_slices) == {
        f"{m}.{p}" for m in ("gate_proj", "up_proj", "first", "alone") for p in ("weight", "bias")
    } | {"second.bias"}
    assert {"first", "second", "again"} <= set(plan.ignore_list())
