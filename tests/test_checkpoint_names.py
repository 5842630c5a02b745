"""Where each tensor stands in the checkpoint, as transformers itself writes it."""

import re
import time

import pytest
import torch
import transformers as tf
from helpers_plan import ALL, MOE, model, plan_of

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import UserError
from nvfp4_qat.plan import CheckpointSlice, QuantPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


@pytest.mark.parametrize("architecture", ALL)
def test_slices_are_what_transformers_writes(architecture):
    from transformers.core_model_loading import revert_weight_conversion

    bare = model(architecture, "cpu")
    state = bare.state_dict()
    written = revert_weight_conversion(bare, dict(state))
    # Experts are ignored, so that even those of Qwen3.5 stand under the name transformers itself gives them.
    ignore = ["lm_head", *(["experts"] if architecture in MOE else [])]
    slices = QuantPlan.from_model(bare, QATConfig(ignore_patterns=ignore)).checkpoint_slices
    assert set(slices) == set(state)
    ours = {piece.name: piece.of(state[name]) for name, pieces in slices.items() for piece in pieces}
    assert set(ours) == set(written)
    for name, tensor in written.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("architecture", MOE)
def test_experts_have_one_checkpoint_tensor_each(architecture):
    plan = plan_of(architecture)
    for entry in plan.quantized:
        assert entry.checkpoint == plan.checkpoint_slices[entry.name]
        if entry.kind == "linear":
            assert entry.checkpoint == (CheckpointSlice(entry.name),)
            continue
        experts, rows, _ = entry.shape
        assert [s.index for s in entry.checkpoint] == sorted(list(range(experts)) * (len(entry.checkpoint) // experts))
        halves = [(0, rows // 2), (rows // 2, rows)] if entry.param == "gate_up_proj" else [None]
        assert [s.rows for s in entry.checkpoint] == halves * experts
        gate, down = ("w1", "w2") if architecture == "mixtral" else ("gate_proj", "down_proj")
        prefix = entry.module.replace("mlp", "block_sparse_moe") if architecture == "mixtral" else entry.module
        first = gate if entry.param == "gate_up_proj" else down
        assert entry.checkpoint[0].name == f"{prefix}.0.{first}.weight"


def test_names_of_a_saved_checkpoint(tmp_path):
    from safetensors import safe_open

    bare = model("mixtral", "cpu", tie_word_embeddings=True)
    bare.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    plan = QuantPlan.from_model(bare, QATConfig())
    assert saved == {piece.name for pieces in plan.checkpoint_slices.values() for piece in pieces}
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert QuantPlan.from_model(loaded, QATConfig()).checkpoint_slices == plan.checkpoint_slices


def test_a_model_that_remembers_irreversible_conversions(monkeypatch):
    """What a model loaded from a quantized checkpoint is like: the architecture's own conversions are used instead."""
    from transformers.core_model_loading import WeightConverter

    bare = model("qwen3_moe")

    class Irreversible(WeightConverter):
        def reverse_transform(self):
            raise ValueError("Cannot reverse the transform with TP or quantization")

    from transformers.core_model_loading import MergeModulelist

    bare._weight_conversions = [Irreversible("mlp.experts.*.x", "mlp.experts.y", [MergeModulelist()])]
    assert QuantPlan.from_model(bare, QATConfig()).checkpoint_slices == plan_of("qwen3_moe").checkpoint_slices


def test_a_checkpoint_layout_that_is_no_run_of_rows_is_refused():
    from transformers.core_model_loading import Interleave, WeightConverter

    bare = model("qwen3")
    bare._weight_conversions = [WeightConverter("mlp.mixed.weight", "mlp.up_proj.weight", [Interleave(dim=0)])]
    with pytest.raises(
        UserError, match=r"keeps model\.layers\.0\.mlp\.up_proj\.weight in .*mixed\.weight transposed, permuted"
    ):
        QuantPlan.from_model(bare, QATConfig())


REAL = {
    "Qwen3-30B-A3B": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    },
    "DeepSeek-V3": {},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_take_seconds(name):
    config = tf.Qwen3MoeConfig(**REAL[name]) if REAL[name] else tf.DeepseekV3Config()
    with torch.device("meta"):
        bare = tf.AutoModelForCausalLM.from_config(config)
    start = time.process_time()
    plan = QuantPlan.from_model(bare, QATConfig())
    ignore, text = plan.ignore_list(), str(plan)
    plan.audit([entry.module for entry in plan.quantized])
    seconds = time.process_time() - start
    assert seconds < 60  # about 1.5 and 3.5 on one core; minutes would mean that real-size tensors are moved around
    names = [piece.name for pieces in plan.checkpoint_slices.values() for piece in pieces]
    assert len(names) == len(set(names))
    if name == "Qwen3-30B-A3B":
        assert len(names) == 18867  # 48 × (9 + 3 × 128) + 3
        assert plan.parameters == 30_532_122_624
        piece = plan["model.layers.47.mlp.experts.gate_up_proj"].checkpoint[-1]
        assert piece == CheckpointSlice("model.layers.47.mlp.experts.127.up_proj.weight", 127, (768, 1536))
        assert ignore == (*(f"model.layers.{i}.mlp.gate" for i in range(48)), "lm_head")
        assert re.search(r"model\.layers\.\{0\.\.47\}\.mlp\.experts\.gate_up_proj +\[128, 1536, 2048\] +× 48", text)
        assert "97.9 % of 30.53 B parameters; 61.1 GB in bf16 become 18.1 GB" in text
    else:
        assert plan.parameters == 671_026_404_352
        assert (
            plan["model.layers.60.mlp.experts.down_proj"]
            .checkpoint[-1]
            .name.endswith("60.mlp.experts.255.down_proj.weight")
        )
