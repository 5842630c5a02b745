"""QuantPlan on real architectures: what is 4-bit, in which fusion group, what is not and why; the object itself."""

import copy
import inspect
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers as tf
from helpers_plan import ALL, model, plan_of
from torch import nn

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import UserError
from nvfp4_qat.plan import CheckpointSlice, QuantPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


def group_table(plan: QuantPlan) -> dict[str, list[str]]:
    """Group id to the last component of its members."""
    return {
        group: [m.module.split(".")[-1] if m.kind == "linear" else m.param for m in members]
        for group, members in plan.groups().items()
    }


ATTENTION = {"self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"], "self_attn.o_proj": ["o_proj"]}
MLP = {"mlp.gate_up_proj": ["gate_proj", "up_proj"], "mlp.down_proj": ["down_proj"]}
EXPERTS = {"mlp.experts.gate_up_proj": ["gate_up_proj"], "mlp.experts.down_proj": ["down_proj"]}
SHARED = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
SHARED_EXPERTS = {f"mlp.shared_experts.{group}": members for group, members in SHARED.items()}
SHARED_EXPERT = {f"mlp.shared_expert.{group}": members for group, members in SHARED.items()}
LATENT_ATTENTION = {
    "self_attn.fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    **{f"self_attn.{name}": [name] for name in ("q_b_proj", "kv_b_proj", "o_proj")},
}
EXPECTED = {
    "llama": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen2": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen3": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen3_moe": (ATTENTION | MLP, ATTENTION | EXPERTS),
    "mixtral": (ATTENTION | EXPERTS, ATTENTION | EXPERTS),
    "deepseek_v3": (LATENT_ATTENTION | MLP, LATENT_ATTENTION | EXPERTS | SHARED_EXPERTS),
    "glm4_moe": (ATTENTION | MLP, ATTENTION | EXPERTS | SHARED_EXPERTS),
    "qwen3_next": (
        {f"linear_attn.{name}": [name] for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
        | EXPERTS
        | SHARED_EXPERT,
        ATTENTION | EXPERTS | SHARED_EXPERT,
    ),
    "qwen3_5_moe": (
        {
            "linear_attn.in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
            "linear_attn.in_proj_ba": ["in_proj_b", "in_proj_a"],
            "linear_attn.out_proj": ["out_proj"],
        }
        | EXPERTS
        | SHARED_EXPERT,
        ATTENTION | EXPERTS | SHARED_EXPERT,
    ),
    "gpt_oss": (ATTENTION, ATTENTION),
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_fusion_groups_are_those_of_the_engine(architecture):
    plan = plan_of(architecture)
    expected = {
        f"model.layers.{i}.{g}": members
        for i, layer in enumerate(EXPECTED[architecture])
        for g, members in layer.items()
    }
    assert group_table(plan) == expected


@pytest.mark.parametrize("architecture", ALL)
def test_every_weight_is_in_the_plan_once(architecture):
    bare = model(architecture)
    plan = plan_of(architecture)
    names = [entry.name for entry in (*plan.quantized, *plan.skipped)]
    assert sorted(names) == sorted(name for name, p in bare.named_parameters() if p.ndim > 1)
    shapes = {name: tuple(p.shape) for name, p in bare.named_parameters()}
    assert all(entry.shape == shapes[entry.name] for entry in (*plan.quantized, *plan.skipped))
    assert all(entry.reason for entry in plan.skipped)
    for entry in plan.quantized:
        assert entry.name == f"{entry.module}.{entry.param}"
        assert (entry.kind, entry.batch_dims) == (("experts", 1) if len(entry.shape) == 3 else ("linear", 0))
        assert (entry.reduction_dim, entry.activation) == (-1, None)
        assert plan[entry.name] is entry and entry.name in plan
    assert plan.parameters == sum(p.numel() for p in bare.parameters())
    assert plan.head == "lm_head"


REASONS = {
    "qwen3_moe": {
        "model.embed_tokens": "embedding",
        "model.layers.1.mlp.gate": "router",
        "lm_head": "pattern 'lm_head'",
    },
    "mixtral": {"model.layers.0.mlp.gate": "router"},
    "qwen3_next": {
        "model.layers.0.linear_attn.conv1d": "convolution",
        "model.layers.0.mlp.shared_expert_gate": "engines keep the gate of the shared expert in bf16",
        "model.layers.0.mlp.gate": "router",
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts": "transposed experts.*no NVFP4 path|bias",
        "model.layers.0.mlp.router": "router",
    },
    "deepseek_v32": {
        "model.layers.0.self_attn.indexer.wk": "engines fuse it with weights_proj",
        "model.layers.0.self_attn.indexer.weights_proj": "engines fuse it with wk",
    },
    "granitemoe": {"model.layers.0.block_sparse_moe.experts": "all experts in one tensor, .*linear.weight"},
}


@pytest.mark.parametrize("architecture", REASONS)
def test_reasons(architecture):
    skipped = plan_of(architecture).skipped
    for module, reason in REASONS[architecture].items():
        found = [entry.reason for entry in skipped if entry.module == module]
        assert found and all(re.search(reason, text) for text in found), (module, found)


def test_gpt_oss_lists_its_experts_as_skipped():
    plan = plan_of("gpt_oss")
    experts = {e.name.split(".")[-1]: e for e in plan.skipped if e.module == "model.layers.0.mlp.experts"}
    assert set(experts) == {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
    assert all(e.kind == "experts" for e in experts.values())


class Zoo(nn.Module):
    """Layers of every unsupported sort, beside one that is supported."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(32, 16)
        self.odd = nn.Linear(20, 16)
        self.subclass = type("LowRankLinear", (nn.Linear,), {})(32, 16)
        self.attention = nn.MultiheadAttention(32, 2)
        self.conv = nn.Conv2d(16, 16, 3)
        self.bag = nn.Embedding(8, 16)
        self.bilinear = nn.Bilinear(16, 16, 16)
        self.transposed = tf.pytorch_utils.Conv1D(32, 16)
        self.up_only_experts = nn.ParameterDict(
            {"up_proj": torch.zeros(2, 32, 16), "down_proj": torch.zeros(2, 16, 32)}
        )
        self.table = nn.Parameter(torch.zeros(4, 16))
        self.scale = nn.Parameter(torch.zeros(16))
        self.register_buffer("kept", torch.zeros(2, 2))
        self.register_buffer("not_kept", torch.zeros(2, 2), persistent=False)


def test_unsupported_modules_are_skipped_with_their_reason():
    plan = QuantPlan.from_model(Zoo(), QATConfig())
    assert [entry.name for entry in plan.quantized] == ["good.weight"]
    assert {entry.name: entry.reason for entry in plan.skipped} == {
        "table": "Zoo is not nn.Linear",
        "odd.weight": "K = 20 is not divisible by 16",
        "subclass.weight": "nn.Linear subclass LowRankLinear is not supported",
        "attention.in_proj_weight": "MultiheadAttention is not nn.Linear",
        "attention.out_proj.weight": "nn.Linear subclass NonDynamicallyQuantizableLinear is not supported",
        "conv.weight": "convolution",
        "bag.weight": "embedding",
        "bilinear.weight": "Bilinear is not nn.Linear",
        "transposed.weight": "Conv1D keeps its weight transposed [K, N]",
        "up_only_experts.up_proj": "ParameterDict does not keep its experts in gate_up_proj and down_proj",
        "up_only_experts.down_proj": "ParameterDict does not keep its experts in gate_up_proj and down_proj",
    }
    assert "kept" in plan.checkpoint_slices and "scale" in plan.checkpoint_slices
    assert "not_kept" not in plan.checkpoint_slices
    assert all(slices == (CheckpointSlice(name),) for name, slices in plan.checkpoint_slices.items())


@pytest.mark.parametrize(
    "architecture",
    ("jamba", "mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
)
def test_layers_whose_weight_the_model_reads_stay_in_bf16(architecture):
    bare = model(architecture)
    plan = QuantPlan.from_model(bare, QATConfig())
    reasons = {entry.module: entry.reason for entry in plan.skipped}
    read = set()
    for name, module in bare.named_modules():
        if re.search("mamba|Mamba|FalconH1Mixer|BambaMixer", type(module).__name__) and hasattr(module, "in_proj"):
            assert f"{name}.in_proj.weight" in plan
            found = re.findall(r"self\.(\w+)\.weight\b(?!\.d)", inspect.getsource(type(module)))
            read |= {f"{name}.{leaf}" for leaf in found if isinstance(module._modules[leaf], nn.Linear)}
    assert read and all("reads its weight directly" in reasons.get(name, "") for name in read), read - reasons.keys()
    assert set(plan.ignore_list()) >= read


def test_odd_k_excludes_the_whole_group_and_all_experts():
    plan = plan_of("llama", intermediate_size=40)
    reasons = {entry.module: entry.reason for entry in plan.skipped}
    assert reasons["model.layers.0.mlp.down_proj"] == "K = 40 is not divisible by 16"
    assert "model.layers.0.mlp.gate_up_proj" in plan.groups()  # another layer to the engine
    plan = plan_of("qwen3_moe", moe_intermediate_size=24)
    for param in ("gate_up_proj", "down_proj"):
        (entry,) = [e for e in plan.skipped if e.name == f"model.layers.1.mlp.experts.{param}"]
        assert entry.reason == "down_proj: K = 24 is not divisible by 16"


class Mixed(nn.Module):
    """Siblings that an engine fuses, of which one cannot be quantized."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 16)
        self.k_proj = type("OddLinear", (nn.Linear,), {})(32, 16)
        self.v_proj = nn.Linear(32, 16)
        self.o_proj = nn.Linear(16, 32)


def test_one_unsupported_member_keeps_its_group_in_bf16():
    plan = QuantPlan.from_model(Mixed(), QATConfig())
    assert [entry.module for entry in plan.quantized] == ["o_proj"]
    reasons = {entry.module: entry.reason for entry in plan.skipped}
    assert reasons["k_proj"] == "nn.Linear subclass OddLinear is not supported"
    assert re.match(r"an engine runs it as one with k_proj, .* \(nn.Linear subclass OddLinear", reasons["q_proj"])
    QuantPlan.from_model(Mixed(), QATConfig(ignore_patterns=["re:[qv]_proj"]))  # k_proj is out anyway: no split


class ListExperts(nn.Module):
    """Experts as a ModuleList, as models with code of their own still have them."""

    def __init__(self, projections=("gate_proj", "up_proj", "down_proj"), k=16):
        super().__init__()
        first, second, last = projections
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.ModuleDict({first: nn.Linear(16, 32), second: nn.Linear(16, 32), last: nn.Linear(32 if e else k, 16)})
            for e in range(3)
        )
        self.lm_head = nn.Linear(16, 32)


def test_experts_in_a_module_list():
    plan = QuantPlan.from_model(ListExperts(k=32), QATConfig())
    assert group_table(plan)["experts.2.gate_up_proj"] == ["gate_proj", "up_proj"]
    assert {e.module: e.reason for e in plan.skipped}["gate"] == "router"
    with pytest.raises(UserError, match=r"splits the fusion group experts: it matches experts\.1\.down_proj"):
        QuantPlan.from_model(ListExperts(k=32), QATConfig(ignore_patterns=["experts.1.down_proj"]))
    model = nn.ModuleDict({"moe": ListExperts(k=20), "proj": nn.Linear(16, 16)})
    reasons = {e.module: e.reason for e in QuantPlan.from_model(model, QATConfig()).skipped}
    assert reasons["moe.experts.0.down_proj"] == "K = 20 is not divisible by 16"
    assert "moe.experts.0.down_proj, which stays in bf16" in reasons["moe.experts.2.gate_proj"]
    plan = QuantPlan.from_model(
        nn.ModuleDict({"moe": ListExperts(("w1", "w3", "w2"), k=32), "proj": nn.Linear(16, 16)}),
        QATConfig(ignore_patterns=["experts", "lm_head"]),
    )
    assert {"moe.experts.1.w1", "moe.experts.1.gate_proj", "moe.experts.1.w13"} <= set(plan.ignore_list())


def test_table():
    text = str(plan_of("qwen3_next"))
    lines = [re.sub(" {2,}", " | ", line) for line in text.splitlines()]
    assert lines[0] == "in NVFP4 | shape | global scale"
    assert "model.layers.{0..1}.mlp.experts.down_proj | [4, 32, 16] | × 2 | one per expert" in lines
    assert "model.layers.{0..1}.mlp.shared_expert.up_proj | [16, 32] | × 2 | shared in gate_up_proj" in lines
    assert "model.layers.1.self_attn.q_proj | [64, 32] | × 1 | shared in qkv_proj" in lines
    assert "model.layers.{0..1}.mlp.gate | [4, 32] | × 2 | router" in lines
    assert "lm_head | [64, 32] | × 1 | ignored by pattern 'lm_head'" in lines
    assert re.match(
        r"17 of 24 weights in NVFP4 \(w4a16, global scale pow2\): 83\.1 % of 29\.72 K parameters; 59\.4 KB", lines[-1]
    )
    assert max(map(len, text.splitlines())) < 160


def test_table_numbers():
    plan = plan_of("llama")
    count = sum(torch.Size(entry.shape).numel() for entry in plan.quantized)
    after = 2 * (plan.parameters - count) + count * 4.5 / 8 + 4 * len(plan.quantized)
    assert f"{2 * plan.parameters / 1000:.3g} KB in bf16 become {after / 1000:.3g} KB" in str(plan)
    assert f"{100 * count / plan.parameters:.1f} %" in str(plan)


def test_a_plan_can_be_copied_and_sent():
    plan = plan_of("qwen3_moe")
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)
    with pytest.raises(KeyError):
        plan["lm_head.weight"]
    assert plan["model.layers.0.self_attn.q_proj.weight"].group == "model.layers.0.self_attn.qkv_proj"


def test_a_plan_of_a_live_model_equals_that_of_its_meta_twin():
    for architecture in ("qwen2", "qwen3_moe"):
        assert QuantPlan.from_model(model(architecture, "cpu"), QATConfig()) == plan_of(architecture)


def test_planning_changes_nothing_on_the_model():
    bare = model("qwen3_moe")
    before = {name: id(value) for name, value in (*bare.named_parameters(), *bare.named_modules())}, set(vars(bare))
    QuantPlan.from_model(bare, QATConfig())
    assert before == ({n: id(v) for n, v in (*bare.named_parameters(), *bare.named_modules())}, set(vars(bare)))


def test_a_plain_module_needs_no_transformers():
    code = (
        "import sys\nfrom torch import nn\n"
        "from nvfp4_qat.config import QATConfig\nfrom nvfp4_qat.plan import QuantPlan\n"
        "print(QuantPlan.from_model(nn.Sequential(nn.Linear(32, 32)), QATConfig()))\n"
        "loaded = {'transformers', 'vllm', 'verl', 'trl', 'compressed_tensors', 'peft'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert "1 of 1 weights in NVFP4" in result.stdout
