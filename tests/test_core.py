"""`apply_qat` as a whole: what it refuses, that a refusal changes nothing, and real architectures end to end."""

import copy

import helpers_plan
import pytest
import torch
from small_models import qwen3, qwen3_moe, stack
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat.core import pack_from_masters

ON = nq.QATConfig(enable=True)


def classes(model):
    return [type(m) for m in model.modules()]


def test_disabled_does_nothing_and_says_so():
    model = stack()
    before = classes(model)
    with pytest.warns(UserWarning, match="enable is False"):
        plan = nq.apply_qat(model, nq.QATConfig())
    assert classes(model) == before and len(plan.quantized) == 6
    with pytest.raises(nq.UserError, match="call nvfp4_qat.apply_qat"):
        nq.qat_plan(model)


@pytest.mark.parametrize("config", [{"enable": True}, None, "w4a16"])
@pytest.mark.parametrize(
    "take",
    [
        lambda config: nq.apply_qat(stack(), config),
        lambda config: nq.QuantPlan.from_model(stack(), config),
        lambda config: nq.QATQuantizer(config),
    ],
    ids=["apply_qat", "plan", "quantizer"],
)
def test_what_is_no_config_is_refused_with_how_to_make_one(take, config):
    with pytest.raises(nq.UserError, match=r"^config must be a QATConfig") as caught:
        take(config)
    made = eval(str(caught.value).partition(": ")[2], {"nvfp4_qat": nq})
    assert made == ON


def test_twice_is_refused():
    model = stack()
    nq.apply_qat(model, ON)
    with pytest.raises(nq.UserError, match="before"):
        nq.apply_qat(model, ON)


def test_an_unknown_gather_mode_is_refused():
    with pytest.raises(nq.UserError, match='unknown gather=.fp8.: use "nvfp4"'):
        nq.apply_qat(stack(), ON, gather="fp8")
    with pytest.raises(nq.UserError, match="keep_gathered is for gather mode"):
        nq.apply_qat(stack(), ON, keep_gathered=True)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("re:.*gate_proj",), "splits the fusion group"),
        (("blocks", "lm_head"), "nothing"),
    ],
)
def test_a_bad_pattern_leaves_the_model_as_it_was(patterns, message):
    model = stack()
    before = classes(model)
    with pytest.raises(nq.UserError, match=message):
        nq.apply_qat(model, nq.QATConfig(enable=True, ignore_patterns=patterns))
    assert classes(model) == before


@pytest.mark.parametrize("gather", [None, "nvfp4"])
@pytest.mark.parametrize("part", ["", "blocks.1.up_proj", "lm_head"])
def test_fp16_is_refused_quantized_or_not(part, gather):
    model = stack()
    model.get_submodule(part).half()
    before = classes(model)
    with pytest.raises(nq.UserError, match=rf"in fp16 \({part or 'blocks.0.gate_proj'}.weight.*in bf16 or fp32"):
        nq.apply_qat(model, ON, gather=gather)
    assert classes(model) == before
    nq.apply_qat(model.bfloat16(), ON, gather=gather)


def test_odd_k_stays_bf16_with_its_reason():
    model = nn.ModuleDict({"a": nn.Linear(24, 32), "b": nn.Linear(32, 24)})
    plan = nq.apply_qat(model, ON)
    assert type(model["a"]) is nn.Linear and type(model["b"]) is nq.QATLinear
    assert [s.reason for s in plan.skipped] == ["K = 24 is not divisible by 16"]


def test_a_weight_that_became_a_plain_tensor_is_an_error_when_used():
    model = stack()
    nq.apply_qat(model, ON)
    layer = model.blocks[0].up_proj
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight  # what FSDP1 does with the views of its flat parameter
    with pytest.raises(nq.UserError, match="no longer a parameter"):
        model(torch.randn(2, 32))


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
@pytest.mark.parametrize("patterns", [("lm_head", "re:.*mlp.gate$"), ("lm_head", "re:.*mlp.gate$", "re:.*self_attn.*")])
def test_real_models_pack_exactly_the_plan(build, patterns):
    model = build()
    plan = nq.apply_qat(model, nq.QATConfig(enable=True, ignore_patterns=patterns))
    packed = {entry.name: value for entry, value in pack_from_masters(model)}
    assert list(packed) and packed.keys() == {entry.name for entry in plan.quantized}
    for entry in plan.quantized:
        master = model.get_parameter(entry.name)
        assert packed[entry.name].shape == master.shape == torch.Size(entry.shape)
        error = (packed[entry.name].dequantize(torch.float32) - master).abs().max() / master.abs().max()
        assert 0 < error < 0.2
    shared = {m.group: {float(g) for g in packed[m.name].global_scale.flatten()} for m in plan.quantized}
    for members in plan.groups().values():
        scales = [packed[m.name].global_scale for m in members]
        assert all(torch.equal(s, scales[0]) for s in scales)
    assert len(shared) == len(plan.groups())
    assert any("self_attn" in name for name in packed) == ("re:.*self_attn.*" not in patterns)
    model(torch.randint(0, 64, (1, 4))).logits.sum().backward()


def test_the_plan_survives_wrapping():
    model = stack()
    plan = nq.apply_qat(model, ON)
    assert nq.qat_plan(nn.Sequential(model)) is plan
    assert nq.qat_plan(torch.compile(model)) is plan


def test_a_module_with_a_forward_of_its_own_is_refused():
    model = stack()
    layer = model.blocks[0].up_proj
    layer.forward = layer.forward  # what accelerate's device_map leaves behind: it would bypass QAT
    before = classes(model)
    with pytest.raises(nq.UserError, match="forward of its own"):
        nq.apply_qat(model, ON)
    assert classes(model) == before


def test_an_unusual_parameter_is_refused_before_anything_changes():
    class Special(nn.Parameter):
        pass

    model = stack()
    model.blocks[1].up_proj.weight = Special(torch.randn(48, 32))
    before = classes(model)
    with pytest.raises(nq.UserError, match="Special"):
        nq.apply_qat(model, ON)
    assert classes(model) == before


def test_transformer_encoder_layers_are_quantized_in_eval_as_in_training():
    model = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    nq.apply_qat(model, ON)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-5, atol=1e-5)


def test_layers_without_elements_stay_as_they_are():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.ModuleDict({"a": nn.Linear(0, 16), "b": nn.Linear(16, 0), "c": nn.Linear(16, 16)})
    plan = nq.apply_qat(model, ON)
    assert [e.module for e in plan.quantized] == ["c"]


def test_a_model_that_reads_weights_computes_with_what_is_exported():
    model = helpers_plan.model("jamba", "cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.normal_()
    reference = copy.deepcopy(model)
    nq.apply_qat(model, ON)
    packed = {entry.name: value for entry, value in pack_from_masters(model)}
    assert any("mamba" in name for name in packed)
    with torch.no_grad():
        for name, value in packed.items():
            reference.get_parameter(name).copy_(value.dequantize(torch.float32))
        ids = torch.arange(10).view(2, 5)
        assert torch.equal(model(ids, use_cache=False).logits, reference(ids, use_cache=False).logits)


def test_on_meta_linear_layers_give_shapes():
    with torch.device("meta"):
        model, x = stack(bias=True), torch.randn(2, 32, requires_grad=True)
        nq.apply_qat(model, ON)
        y = model(x)
        y.sum().backward()
    assert y.is_meta and y.shape == (2, 8) and x.grad.shape == x.shape
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
    with pytest.raises(RuntimeError):
        model.blocks[0].gate_proj(torch.randn(2, 16, device="meta"))
