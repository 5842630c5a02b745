"""LoRA on top of 4-bit weights: the base is packed once and frozen, adapters stay as they are, merging is refused."""

import copy

import pytest
import torch
from small_models import qwen3, qwen3_moe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nvfp4_qat as nq

peft = pytest.importorskip("peft")
ON = nq.QATConfig(enable=True)
IDS = torch.arange(10).view(2, 5)


def lora(model, targets=("q_proj", "gate_proj")):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))


def adapters(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("order", ["adapters first", "qat first"])
def test_the_base_is_packed_once_and_adapters_train(order):
    model = qwen3()
    if order == "qat first":
        nq.apply_qat(model, ON)
        wrapped = lora(model)
    else:
        wrapped = lora(model)
        plan = nq.apply_qat(wrapped, ON)
        assert not [e for e in plan.quantized if "lora" in e.name]
        assert {s.reason for s in plan.skipped if "lora_" in s.name} and all(
            "adapter" in s.reason for s in plan.skipped if "lora_" in s.name
        )
    layers = [m for m in wrapped.modules() if isinstance(m, nq.QATLinear)]
    assert len(layers) == 2 * 7
    assert not [n for n, m in wrapped.named_modules() if isinstance(m, nq.QATLinear) and "lora_" in n]
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, fused=True)
    before = {n: p.detach().clone() for n, p in adapters(wrapped).items()}
    for _ in range(3):
        wrapped(IDS).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in adapters(wrapped).items())
    assert {layer._qat_weights["weight"].generation for layer in layers} == {1}
    assert all(layer.weight.grad is None for layer in layers)


def test_forward_is_quantized_base_plus_adapter():
    wrapped = lora(qwen3())
    nq.apply_qat(wrapped, ON)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert torch.equal(layer(x), layer.base_layer(x) + adapter)


@pytest.mark.parametrize("order", ["adapters first", "qat first"])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer", "safe"])
def test_merging_is_refused_and_changes_nothing(order, how):
    model = qwen3()
    if order == "qat first":
        nq.apply_qat(model, ON)
    wrapped = lora(model)
    if order == "adapters first":
        nq.apply_qat(wrapped, ON)
    before = copy.deepcopy({n: p.detach() for n, p in wrapped.named_parameters()})
    with pytest.raises(nq.UserError, match="merging an adapter into 4-bit weights is refused"):
        if how == "merge_adapter":
            wrapped.merge_adapter()
        elif how == "merge_and_unload":
            wrapped.merge_and_unload()
        elif how == "safe":
            wrapped.merge_adapter(safe_merge=True)
        else:
            wrapped.base_model.model.model.layers[0].self_attn.q_proj.merge()
    assert all(torch.equal(p, before[n]) for n, p in wrapped.named_parameters())
    wrapped(IDS)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["adapters first", "qat first"])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_in_gather_mode(order, how, mesh):
    model = qwen3()
    wrapped = lora(model) if order == "adapters first" else model
    nq.apply_qat(wrapped, ON, gather="nvfp4")
    wrapped = lora(model) if order == "qat first" else wrapped
    for sharded in (False, True):
        if sharded:
            for unit in (*model.model.layers, model):
                fully_shard(unit, mesh=mesh)
        before = {name: value.clone() for name, value in wrapped.state_dict().items()}
        with pytest.raises(nq.UserError, match="merging an adapter into 4-bit weights is refused"):
            getattr(wrapped, how)()
        after = wrapped.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) and after.keys() == before.keys()


def test_saved_adapters_load_onto_a_quantized_base(tmp_path):
    wrapped = lora(qwen3())
    nq.apply_qat(wrapped, ON)
    wrapped.save_pretrained(tmp_path)
    base = qwen3()
    nq.apply_qat(base, ON)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(wrapped(IDS).logits, again(IDS).logits)
    assert not [n for n, m in again.named_modules() if isinstance(m, nq.QATLinear) and "lora_" in n]


def test_experts_with_adapters_on_attention():
    wrapped = lora(qwen3_moe(), targets=("q_proj", "v_proj"))
    nq.apply_qat(wrapped, ON)
    wrapped(IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapters(wrapped).values())


@pytest.mark.parametrize("gather", [None, "nvfp4"])
@pytest.mark.parametrize("order", ["adapters first", "qat first"])
def test_dora_is_refused_because_it_reads_the_weight(order, gather):
    model = qwen3()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    if order == "qat first":
        nq.apply_qat(model, ON, gather=gather)
        with pytest.raises(nq.UserError, match="DoRA"):
            peft.get_peft_model(model, config)
    else:
        wrapped = peft.get_peft_model(model, config)
        before = {name: (type(module), module.__dict__.keys()) for name, module in wrapped.named_modules()}
        with pytest.raises(nq.UserError, match="DoRA"):
            nq.apply_qat(wrapped, ON, gather=gather)
        assert {name: (type(m), m.__dict__.keys()) for name, m in wrapped.named_modules()} == before
        assert {type(p) for p in wrapped.parameters()} == {torch.nn.Parameter}
        nq.apply_qat(wrapped, nq.QATConfig(enable=True, ignore_patterns=(*ON.ignore_patterns, "self_attn")), gather)


def test_unknown_adapter_methods_are_refused():
    model = qwen3()
    nq.apply_qat(model, ON)
    with pytest.raises(nq.UserError, match="hra"):
        peft.get_peft_model(model, peft.HRAConfig(r=4, target_modules=["q_proj"]))


def test_a_second_trained_copy_of_a_quantized_layer_is_an_error_at_export():
    model = qwen3()
    nq.apply_qat(model, ON)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(nq.MismatchError, match="modules_to_save"):
        list(nq.packed_weights(wrapped))
