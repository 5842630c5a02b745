"""The stream of packed weights: names, bytes, memory, wrappers, and what it refuses."""

from __future__ import annotations

import weakref

import helpers_plan
import pytest
import torch
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat import ops
from nvfp4_qat.model_tensors import model_tensors
from nvfp4_qat.quantizer import QATQuantizer, packed_names, packed_weights

tf = pytest.importorskip("transformers")
ON = nq.QATConfig(enable=True)
ARCHITECTURES = [a for a in helpers_plan.ALL if a != "deepseek_v32" or hasattr(tf, "DeepseekV32Config")]


def make(architecture: str = "qwen3", dtype: torch.dtype = torch.bfloat16, apply: bool = True, **overrides: object):
    """A small model of a real architecture; sizes of siblings differ, so that a shared global scale shows."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(helpers_plan.config(architecture, **overrides), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("k_proj.weight", "gate_proj.weight")):
                parameter.mul_(9.0)
            if name.endswith("gate_up_proj"):  # half of the experts, and of these only the gate
                parameter[::2, : parameter.shape[1] // 2].mul_(9.0)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 8)
    if apply:
        nq.apply_qat(model, ON)
    return model


def collect(stream) -> dict[str, torch.Tensor]:
    collected: dict[str, torch.Tensor] = {}
    for name, tensor in stream:
        assert name not in collected
        assert tensor.is_contiguous()
        collected[name] = tensor.clone()
    return collected


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(_bytes(t) for t in (a, b)))


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not same_bytes(a[name], b[name])] == []


def test_the_divisor_gives_back_the_multiplier_for_every_mantissa():
    divisor = (torch.arange(1 << 23, dtype=torch.int32) | (127 << 23)).view(torch.float32)
    g = divisor.reciprocal()  # what policy "amax" defines; powers of two are exact anyway
    assert torch.equal(g.reciprocal().reciprocal(), g)
    assert not torch.equal(g.reciprocal(), divisor)


def test_dense_names_shapes_and_values():
    model = make()
    sent = collect(packed_weights(model))
    attention = "model.layers.0.self_attn"
    weights = {part: model.get_parameter(f"{attention}.{part}.weight") for part in ("q_proj", "k_proj", "v_proj")}
    g = ops.global_scale(torch.stack([ops.amax(w) for w in weights.values()]).amax())
    assert len({float(ops.global_scale(ops.amax(w))) for w in weights.values()}) > 1, "sharing must be visible"
    for part, weight in weights.items():
        expected = ops.quantize(weight, g)
        assert same_bytes(sent[f"{attention}.{part}.weight_packed"], expected.packed)
        assert same_bytes(sent[f"{attention}.{part}.weight_scale"], expected.scale)
        assert same_bytes(sent[f"{attention}.{part}.weight_global_scale"], (1 / g).reshape(1))
        assert f"{attention}.{part}.weight" not in sent
    assert same_bytes(sent["lm_head.weight"], model.lm_head.weight.detach())
    assert same_bytes(sent["model.norm.weight"], model.model.norm.weight.detach())


def test_experts_one_by_one_and_fused():
    model = make("mixtral")
    single, fused = collect(packed_weights(model)), collect(packed_weights(model, layout="fused"))
    experts = "model.layers.1.mlp.experts"
    gate_up = model.get_parameter(f"{experts}.gate_up_proj")
    g = ops.global_scale(ops.amax(gate_up, 1))
    assert len(set(g.tolist())) > 1
    expected = ops.quantize(gate_up, g)
    codes, scale, divisor = packed_names(f"{experts}.gate_up_proj")
    assert same_bytes(fused[codes], expected.packed)
    assert same_bytes(fused[scale], expected.scale)
    assert same_bytes(fused[divisor], 1 / g)
    height = gate_up.shape[1] // 2
    for expert in range(gate_up.shape[0]):
        for part, rows in (("w1", slice(0, height)), ("w3", slice(height, None))):  # Mixtral's names of gate and up
            codes, scale, divisor = packed_names(f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight")
            assert same_bytes(single[codes], expected.packed[expert, rows].contiguous())
            assert same_bytes(single[scale], expected.scale[expert, rows].contiguous())
            assert same_bytes(single[divisor], (1 / g[expert]).reshape(1))
    assert "model.layers.1.block_sparse_moe.gate.weight" in single
    assert "model.layers.1.mlp.gate.weight" in fused, 'layout "fused" has the model\'s own names throughout'


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stream_of_full_tensors_gives_the_same_bytes(architecture):
    model = make(architecture)
    plan, state = nq.qat_plan(model), model.state_dict()
    for layout in ("checkpoint", "fused"):
        sent = collect(packed_weights(model, layout=layout))
        assert_same(collect(QATQuantizer(ON, plan, layout).quantize(state.items())), sent)
        assert_same(collect(QATQuantizer(ON, plan, layout).quantize(reversed(state.items()))), sent)
    passed = {name for name in collect(packed_weights(model)) if not name.endswith(("_packed", "_scale"))}
    assert passed < {part.name for parts in plan.checkpoint_slices.values() for part in parts}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_may_come_one_by_one(architecture):
    model = make(architecture)
    plan, state = nq.qat_plan(model), model.state_dict()
    parts = [(part.name, part.of(state[name])) for name, slices in plan.checkpoint_slices.items() for part in slices]
    assert_same(collect(QATQuantizer(ON, plan).quantize(parts)), collect(packed_weights(model)))
    with pytest.raises(nq.UserError, match='layout "fused" needs the whole'):
        collect(QATQuantizer(ON, plan, "fused").quantize(parts))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_known_names_need_no_plan(architecture):
    model = make(architecture)
    assert_same(collect(QATQuantizer(ON).quantize(model.state_dict().items())), collect(packed_weights(model)))


def test_without_a_plan_experts_come_one_by_one_or_are_refused():
    model = make("qwen3_moe")
    plan, state = nq.qat_plan(model), model.state_dict()
    parts = [(part.name, part.of(state[name])) for name, slices in plan.checkpoint_slices.items() for part in slices]
    assert_same(collect(QATQuantizer(ON).quantize(parts)), collect(packed_weights(model)))
    with pytest.raises(nq.UserError, match=r"experts\.gate_up_proj.*pass a plan"):
        collect(QATQuantizer(ON).quantize(state.items()))


@pytest.mark.parametrize("policy", ["pow2", "amax"])
def test_fp32_masters_give_the_bytes_of_their_bf16_rounding(policy):
    config = nq.QATConfig(enable=True, global_scale=policy)
    masters = make("qwen3_moe", torch.float32, apply=False)
    rounded = make("qwen3_moe", torch.float32, apply=False).to(torch.bfloat16)
    for model in (masters, rounded):
        nq.apply_qat(model, config)
    assert_same(collect(packed_weights(masters)), collect(packed_weights(rounded)))


def test_one_fusion_group_is_held_at_a_time():
    model = make()
    plan, shapes = nq.qat_plan(model), {name: p.shape for name, p in model.state_dict().items()}
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def produce():
        for name, shape in shapes.items():
            tensor = torch.randn(shape)
            alive.add(tensor)
            yield name, tensor
            del tensor

    for _ in QATQuantizer(ON, plan).quantize(produce()):
        most = max(most, len(alive))
    assert most == 3  # q, k and v


def test_tied_weights_come_once():
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sent = collect(packed_weights(model))
    assert "model.embed_tokens.weight" in sent
    assert "lm_head.weight" not in sent
    state = model.state_dict()
    assert "lm_head.weight" in state
    assert_same(collect(QATQuantizer(ON, nq.qat_plan(model)).quantize(state.items())), sent)


def test_masters_are_stored_in_the_dtype_of_training():
    """fp32 masters: bf16, except buffers and what transformers keeps in fp32. With any 16-bit parameter: as it is."""
    masters = make("deepseek_v3", torch.float32)
    stored = {name: entry.stored_dtype for name, entry in model_tensors(masters, nq.qat_plan(masters)).items()}
    kept = {name for name, dtype in stored.items() if dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert set(stored.values()) == {torch.float32, torch.bfloat16}
    sent = collect(packed_weights(masters))
    assert same_bytes(sent["model.norm.weight"], masters.model.norm.weight.detach().bfloat16())

    # A parameter that must stay in fp32, by transformers' own list.
    masters._keep_in_fp32_modules_strict = {"mlp.gate.weight"}
    assert collect(packed_weights(masters))["model.layers.1.mlp.gate.weight"].dtype == torch.float32

    mixed = make("qwen3", torch.bfloat16)
    mixed.model.norm.float()
    assert collect(packed_weights(mixed))["model.norm.weight"].dtype == torch.float32


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_looked_through(one_rank):
    peft = pytest.importorskip("peft")
    model = make("qwen3_moe", torch.float32)
    expected = collect(packed_weights(model))
    assert_same(collect(packed_weights(torch.compile(model))), expected)
    assert_same(collect(packed_weights(nn.parallel.DistributedDataParallel(model))), expected)
    assert_same(collect(packed_weights(model, ranks=0)), expected)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    assert_same(collect(packed_weights(adapted)), expected)
    assert_same(collect(packed_weights(torch.compile(adapted))), expected)


def test_adapters_of_a_stream_are_left_out():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make(apply=False), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    nq.apply_qat(adapted, ON)
    state = adapted.state_dict()
    assert any("lora_" in name for name in state)
    for plan in (nq.qat_plan(adapted), None):
        assert_same(collect(QATQuantizer(ON, plan).quantize(state.items())), collect(packed_weights(adapted)))


def test_only_the_named_rank_receives():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = make()
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        assert list(packed_weights(model, ranks=0)) == []
        assert collect(packed_weights(model, ranks=1)).keys() == collect(packed_weights(model)).keys()
        with pytest.raises(nq.UserError, match="from 0 to 1, got 2"):
            packed_weights(model, ranks=2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, -1, True, "some", None])
def test_bad_ranks(ranks):
    with pytest.raises(nq.UserError, match='ranks must be "all" or one rank'):
        packed_weights(make(), ranks=ranks)


def test_a_model_may_be_sharded_in_part(one_rank):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = make(dtype=torch.float32)
    expected = collect(packed_weights(model))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model.model.layers[0].mlp, mesh=mesh)
    found = collect(packed_weights(model))
    assert list(found) == list(expected)
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def test_where_full_tensors_are_needed_sharded_ones_are_refused(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = make(apply=False, dtype=torch.float32)
    plan = nq.QuantPlan.from_model(model, ON)
    fully_shard(model, mesh=mesh)
    with pytest.raises(nq.UserError, match=r"is sharded .*DTensor"):
        collect(QATQuantizer(ON, plan).quantize(model.named_parameters()))
    model = make(dtype=torch.float32)
    flat = _Wrapper(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    with pytest.raises(nq.UserError, match="module is sharded by FSDP1"):
        packed_weights(flat)


def test_a_model_without_a_plan_is_refused():
    with pytest.raises(nq.UserError, match="apply_qat.*or pass its state dict"):
        packed_weights(make(apply=False))


def test_a_model_that_is_not_the_planned_one_is_refused():
    model = make()
    model.lm_head.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(nq.UserError, match=r"lm_head\.bias is new"):
        packed_weights(model)
    model = make()
    del model.model.layers[1]
    with pytest.raises(nq.UserError, match=r"layers\.1\.self_attn\.q_proj\.weight is gone"):
        packed_weights(model)


def test_a_model_without_data_is_refused():
    model = helpers_plan.model("qwen3")
    nq.apply_qat(model, ON)
    with pytest.raises(nq.UserError, match="meta device"):
        packed_weights(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_nan_and_inf_name_the_tensor(name, value):
    model = make()
    state = model.state_dict()
    with torch.no_grad():
        state[name].view(-1)[5] = value
    for stream in (packed_weights(model), QATQuantizer(ON, nq.qat_plan(model)).quantize(state.items())):
        with pytest.raises(nq.UserError, match=rf"{name} holds NaN or Inf"):
            collect(stream)


def test_a_master_too_large_for_bf16_is_an_error():
    model = make(dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.finfo(torch.float32).max  # finite here, Inf in the checkpoint
    with pytest.raises(nq.UserError, match=r"model\.norm\.weight holds NaN or Inf"):
        collect(packed_weights(model))


def test_stale_weights_are_not_sent():
    model = make()
    nq.refresh(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    torch.from_numpy(weight.detach().view(torch.int16).numpy())[:] += 77  # a write that PyTorch does not see
    with pytest.raises(nq.StaleWeightsError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        collect(packed_weights(model))


def _names(model):
    return dict(model.state_dict())


def test_bad_streams():
    model = make()
    plan, state = nq.qat_plan(model), _names(model)
    q, k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")

    def run(*pairs, with_plan=plan, layout="checkpoint"):
        return collect(QATQuantizer(ON, with_plan, layout).quantize(pairs))

    for with_plan in (plan, None):
        missing = rf"{k}, {v} must come with {q}, whose global scale it shares"
        with pytest.raises(nq.UserError, match=missing):
            run((q, state[q]), with_plan=with_plan)
        with pytest.raises(nq.UserError, match=f"{q} came twice"):
            run((q, state[q]), (q, state[q]), with_plan=with_plan)
        with pytest.raises(nq.UserError, match=r"model\.norm\.weight came twice"):
            run(*[("model.norm.weight", state["model.norm.weight"])] * 2, with_plan=with_plan)
        with pytest.raises(nq.UserError, match=r"mystery\.weight"):
            run(("mystery.weight", torch.randn(32, 32)), with_plan=with_plan)
        with pytest.raises(nq.UserError, match=f"{q} is on the meta device"):
            run((q, state[q].to("meta")), with_plan=with_plan)
    with pytest.raises(nq.UserError, match=rf"{q} has shape \[16, 32\], the plan says \[32, 32\]"):
        run((q, state[q][:16]))
    with pytest.raises(nq.UserError, match="needs a plan"):
        QATQuantizer(ON, layout="fused")
    with pytest.raises(nq.UserError, match="unknown layout 'flat'"):
        QATQuantizer(ON, plan, layout="flat")
    with pytest.raises(nq.UserError, match="unknown layout 'flat'"):
        packed_weights(model, layout="flat")
    with pytest.raises(nq.UserError, match="global_scale='amax', the plan 'pow2'"):
        QATQuantizer(nq.QATConfig(global_scale="amax"), plan)
    assert list(run((q, state[q]), (k, state[k]), (v, state[v]))) == [n for x in (q, k, v) for n in packed_names(x)]


def test_a_buffer_that_is_used_again_is_noticed():
    model = make()
    state, buffer = _names(model), torch.empty(32, 32, dtype=torch.bfloat16)

    def receive():
        for part in "qkv":
            name = f"model.layers.0.self_attn.{part}_proj.weight"
            view = buffer[: len(state[name])]
            view.copy_(state[name])
            yield name, view

    with pytest.raises(nq.UserError, match="q_proj.weight was overwritten while it waited"):
        collect(QATQuantizer(ON, nq.qat_plan(model)).quantize(receive()))
    copies = ((name, tensor.clone()) for name, tensor in receive())
    assert len(collect(QATQuantizer(ON, nq.qat_plan(model)).quantize(copies))) == 9
