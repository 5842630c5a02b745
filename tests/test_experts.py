"""Module mode of fused experts: every experts implementation, real models, and no bf16 copy of the experts."""

import copy
import pickle

import pytest
import torch
from small_models import grads, master_grads, qwen3_moe, reference_of
from torch.autograd.graph import saved_tensors_hooks

import nvfp4_qat as nq

ON = nq.QATConfig(enable=True)
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


@pytest.fixture(autouse=True)
def _same_sums():
    """batched_mm adds the gradients of an expert's tokens in the order threads finish, unless told otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen3_moe_equals_the_definition_bitwise(implementation, dtype):
    model = qwen3_moe(implementation=implementation).to(dtype)
    reference = reference_of(model)
    plan = nq.apply_qat(model, ON)
    assert {e.kind for e in plan.quantized} == {"linear", "experts"}
    assert isinstance(model.model.layers[0].mlp.experts, nq.QATExperts)
    ids = torch.randint(0, 64, (2, 9))
    y, expected = model(ids).logits, reference(ids).logits
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    got, want = master_grads(model), master_grads(reference)
    assert got.keys() == want.keys()
    assert [n for n in got if not torch.equal(got[n], want[n])] == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(implementation, use_reentrant):
    model = qwen3_moe(implementation=implementation)
    nq.apply_qat(model, ON)
    ids = torch.randint(0, 64, (2, 9))
    model(ids).logits.square().sum().backward()
    expected = grads(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    model(ids).logits.square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


def bytes_kept_for_backward(experts, *inputs):
    """Bytes that autograd holds beyond the parameters, each storage once, and the output."""
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = experts(*inputs)
    masters = {p.untyped_storage()._cdata for p in experts.parameters()}
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in saved}
    return sum(s.nbytes() for key, s in storages.items() if key not in masters), out


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_bf16_copy_of_the_experts_is_kept_between_forward_and_backward(implementation):
    model = qwen3_moe(implementation=implementation).bfloat16()
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(9, 32, dtype=torch.bfloat16, requires_grad=True)
    inputs = hidden, torch.randint(0, 4, (9, 2)), torch.rand(9, 2, dtype=torch.bfloat16)
    plain, _ = bytes_kept_for_backward(experts, *inputs)
    nq.apply_qat(model, ON)
    kept, out = bytes_kept_for_backward(experts, *inputs)
    assert kept <= plain + 64, f"{kept - plain} bytes more than without quantization; down_proj in bf16 has 4096"
    out.sum().backward()
    assert experts.down_proj.grad is not None and hidden.grad is not None


def test_backward_twice_with_retain_graph():
    model = qwen3_moe(implementation="grouped_mm")
    nq.apply_qat(model, ON)
    loss = model(torch.randint(0, 64, (2, 9))).logits.square().sum()
    loss.backward(retain_graph=True)
    first = grads(model)
    loss.backward()
    assert all(torch.equal(p.grad, 2 * first[n]) for n, p in model.named_parameters() if n in first)


def test_saved_tensor_offloading_keeps_working():
    model = qwen3_moe()
    nq.apply_qat(model, ON)
    ids = torch.randint(0, 64, (2, 9))
    model(ids).logits.square().sum().backward()
    expected = grads(model)
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        y = model(ids).logits.square().sum()
    y.backward()
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in expected.items())


def test_frozen_experts_pass_gradients_to_what_is_below():
    model = qwen3_moe()
    nq.apply_qat(model, ON)
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    model(torch.randint(0, 64, (2, 9))).logits.square().sum().backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad is None
    assert float(model.model.embed_tokens.weight.grad.abs().sum()) > 0


def test_experts_under_autocast_run_in_bf16():
    model = qwen3_moe(implementation="grouped_mm")
    nq.apply_qat(model, ON)
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 64, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids).logits.float().square().sum().backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.dtype == torch.float32
    with torch.no_grad():
        experts, reference = model.model.layers[0].mlp.experts, twin.model.layers[0].mlp.experts.to(torch.bfloat16)
        x, index, weights = torch.randn(9, 32).bfloat16(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x, index, weights)
        assert torch.equal(y, reference(x, index, weights))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_optimizer_steps_are_seen(implementation):
    model = qwen3_moe(implementation=implementation)
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ids = torch.randint(0, 64, (2, 9))
    for _ in range(2):
        model(ids).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh = qwen3_moe(implementation=implementation)
    fresh.load_state_dict(model.state_dict())
    nq.apply_qat(fresh, ON)
    assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_copy_pickle_and_save(tmp_path):
    model = qwen3_moe()
    keys = list(model.state_dict())
    nq.apply_qat(model, ON)
    assert list(model.state_dict()) == keys
    ids = torch.randint(0, 64, (1, 5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.model.layers[0].mlp.experts, nq.QATExperts)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        with torch.no_grad():
            twin.model.layers[0].mlp.experts.down_proj.mul_(2)
        assert not torch.equal(twin(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_compiles_with_grouped_mm():
    torch._dynamo.reset()
    model = qwen3_moe(implementation="grouped_mm").bfloat16()
    nq.apply_qat(model, ON)
    experts = model.model.layers[0].mlp.experts
    x, index = torch.randn(9, 32, dtype=torch.bfloat16), torch.randint(0, 4, (9, 2))
    weights = torch.rand(9, 2, dtype=torch.bfloat16)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        got = compiled(x, index, weights)
        assert torch.equal(got, experts(x, index, weights))
        got.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hooks_that_copy_what_is_saved(implementation):
    model = qwen3_moe(implementation=implementation)
    nq.apply_qat(model, ON)
    ids = torch.randint(0, 64, (2, 9))
    model(ids).logits.square().sum().backward()
    expected = grads(model)
    model.zero_grad()
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = model(ids).logits.square().sum()
    loss.backward()
    for name, grad in expected.items():  # a copy has other strides, so a GEMM may add up in another order
        assert (model.get_parameter(name).grad - grad).abs().max() <= 1e-6 * grad.abs().max()


def test_the_output_may_be_changed_in_place():
    experts = qwen3_moe().model.layers[0].mlp.experts
    nq.apply_qat(torch.nn.ModuleDict({"experts": experts}), ON)
    x = torch.randn(9, 32, requires_grad=True)
    out = experts(x, torch.randint(0, 4, (9, 2)), torch.rand(9, 2))
    out += 1.0
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_on_meta_they_give_shapes(implementation):
    with torch.device("meta"):
        experts = qwen3_moe(implementation=implementation, dtype=torch.bfloat16).model.layers[0].mlp.experts
        nq.apply_qat(torch.nn.ModuleDict({"experts": experts}), ON)
        x = torch.randn(9, 32, dtype=torch.bfloat16)
        out = experts(x, torch.randint(0, 4, (9, 2)), torch.rand(9, 2, dtype=torch.bfloat16))
    assert isinstance(experts, nq.QATExperts) and out.is_meta and out.shape == x.shape
