"""What vLLM and compressed-tensors make of the exported config, and the audit of what another side quantized."""

import json
import warnings

import pytest
from helpers_plan import ALL, DEFAULT, DENSE, engine_ignores, model, plan_of

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.plan import QuantPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


@pytest.mark.parametrize("fused", [FUSED, {"qkv_proj": FUSED["qkv_proj"]}], ids=["full", "without-mlp"])
@pytest.mark.parametrize(
    "patterns", [(), ("re:.*self_attn.*",), ("mlp",), ("experts",), ("model.layers.0",), ("re:.*(gate|up)_proj$",)]
)
@pytest.mark.parametrize("architecture", ALL)
def test_the_engine_ignores_what_the_plan_skips(architecture, patterns, fused):
    """vLLM asks for each of its layers; Qwen3-MoE there does not even list gate_up_proj among its fused layers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = plan_of(architecture, *patterns)
    except UserError as error:
        assert "splits the fusion group" in str(error) or "nothing is left" in str(error)
        return
    ignore = plan.ignore_list()
    entries = {e.name: e for e in (*plan.quantized, *plan.skipped)}
    for entry in entries.values():
        quantized = entry.name in plan
        if entry.kind == "experts":
            prefix = entry.module.replace("mlp", "block_sparse_moe") if architecture == "mixtral" else entry.module
            layers = [f"{prefix}.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
        elif entry.kind == "linear":
            if entry.group.split(".")[-1] in FUSED and entry.group.split(".")[-1] not in fused and quantized:
                continue  # an engine that does not know a layer as fused quantizes whatever is not ignored
            layers = [entry.group, entry.module]
        else:
            continue
        for layer in layers:
            if layer == entry.module and entry.group != entry.module and entry.kind == "linear":
                assert (layer in ignore) != quantized
            else:
                assert engine_ignores(layer, ignore, fused) != quantized, layer


@pytest.mark.parametrize("patterns", [(), ("re:.*self_attn.*",)])
@pytest.mark.parametrize("architecture", [*DENSE, "gpt_oss"])
def test_compressed_tensors_quantizes_the_planned_linear_layers(architecture, patterns):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    if architecture == "gpt_oss" and patterns:
        patterns = ("re:.*layers.0.*",)
    bare = model(architecture, "cpu")
    plan = QuantPlan.from_model(bare, QATConfig(ignore_patterns=(*DEFAULT, *patterns)))
    document = json.loads(json.dumps(plan.quantization_config()))
    apply_quantization_config(bare, QuantizationConfig.model_validate(document), show_progress=False)
    schemed = {
        name for name, module in bare.named_modules() if getattr(module, "quantization_scheme", None) is not None
    }
    assert schemed == {entry.module for entry in plan.quantized}


def test_ignore_list_is_plain_names_for_ignored_experts():
    plan = plan_of("mixtral", "experts")
    names = plan.ignore_list()
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in names  # the checkpoint's
    assert "model.layers.1.block_sparse_moe.experts.3.down_proj" in names  # vLLM's
    assert "model.layers.1.block_sparse_moe.gate" in names and "model.layers.1.mlp.gate" in names
    assert "model.embed_tokens" not in names
    assert len(names) == len(set(names))


def test_audit_accepts_every_style_of_names():
    for architecture in ALL:
        plan = plan_of(architecture)
        plan.audit(plan.groups())
        plan.audit(entry.name for entry in plan.quantized)
        plan.audit(f"_orig_mod.{entry.module}" for entry in plan.quantized)
        plan.audit(piece.name for entry in plan.quantized for piece in entry.checkpoint)
        plan.audit(piece.name + "_packed" for entry in plan.quantized for piece in entry.checkpoint)
    plan = plan_of("mixtral")
    linear = [entry.module for entry in plan.quantized if entry.kind == "linear"]
    plan.audit([*linear, *(f"model.layers.{i}.block_sparse_moe.experts.routed_experts" for i in range(2))])
    projections = [f"{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
    plan.audit([*linear, *(f"model.layers.{i}.block_sparse_moe.experts.{p}" for i in range(2) for p in projections)])


def test_audit_lists_every_difference():
    plan = plan_of("qwen3_moe", "re:.*layers.0.self_attn.*")
    there = [name for name in plan.groups() if not name.endswith(("layers.1.self_attn.qkv_proj", "0.mlp.down_proj"))]
    there = [name for name in there if "experts" not in name]
    there += [
        f"model.layers.1.mlp.experts.{e}.{p}_proj"
        for e in range(4)
        for p in ("gate", "up", "down")
        if (e, p) != (2, "up")
    ]
    there += ["model.layers.0.self_attn.qkv_proj", "lm_head", "model.layers.9.mlp.down_proj"]
    with pytest.raises(MismatchError) as error:
        plan.audit(there)
    assert str(error.value).splitlines()[1:] == [
        "  only here: model.layers.0.mlp.down_proj",
        "  only here: model.layers.1.self_attn.q_proj",
        "  only here: model.layers.1.self_attn.k_proj",
        "  only here: model.layers.1.self_attn.v_proj",
        "  only here: model.layers.1.mlp.experts.2.up_proj",
        "  only there: model.layers.0.self_attn.q_proj (here in bf16: ignored by pattern 're:.*layers.0.self_attn.*')",
        "  only there: model.layers.0.self_attn.k_proj (here in bf16: ignored by pattern 're:.*layers.0.self_attn.*')",
        "  only there: model.layers.0.self_attn.v_proj (here in bf16: ignored by pattern 're:.*layers.0.self_attn.*')",
        "  only there: lm_head (here in bf16: ignored by pattern 'lm_head')",
        "  only there: model.layers.9.mlp.down_proj (the plan knows no such layer)",
    ]


def test_audit_words_whole_experts_as_one():
    plan = plan_of("qwen3_moe", "experts")
    there = [*plan.groups(), "model.layers.1.mlp.experts"]
    with pytest.raises(
        MismatchError, match=r"only there: model\.layers\.1\.mlp\.experts\.gate_up_proj of all 4 experts \(here"
    ):
        plan.audit(there)
    full = plan_of("gpt_oss")
    with pytest.raises(MismatchError, match="transposed"):
        full.audit([*full.groups(), "model.layers.0.mlp.experts"])
    with pytest.raises(MismatchError, match=r"only here: model\.layers\.1\.mlp\.experts\.down_proj of all 4 experts"):
        plan_of("qwen3_moe").audit(plan.groups())
    with pytest.raises(MismatchError):
        plan.audit([])
