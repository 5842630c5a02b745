"""Module mode of linear layers: numbers, gradients, what the module keeps of `nn.Linear`, and what autograd keeps."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import stack, straight_through
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nvfp4_qat as nq
from nvfp4_qat.ops import amax, global_scale, quantize

ON = nq.QATConfig(enable=True)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, differing


@pytest.mark.parametrize("policy", ["pow2", "amax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5)])
def test_one_layer_equals_the_definition_bitwise(shape, bias, dtype, policy):
    torch.manual_seed(0)
    layer = nn.Linear(64, 40, bias=bias, dtype=dtype)
    model = nn.ModuleDict({"proj": layer})
    reference = copy.deepcopy(layer)
    nq.apply_qat(model, nq.QATConfig(enable=True, global_scale=policy))
    x = torch.randn(*shape, 64, dtype=dtype)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = layer(x1)
    y2 = F.linear(x2, straight_through(reference.weight, policy=policy), reference.bias)
    assert torch.equal(y1, y2)
    upstream = torch.randn_like(y1)
    y1.backward(upstream)
    y2.backward(upstream)
    assert torch.equal(x1.grad, x2.grad)
    assert_same(grads(layer), grads(reference))


def test_it_stays_an_nn_linear():
    model = stack(bias=True)
    linear = model.blocks[0].gate_proj
    weight, calls = linear.weight, []
    linear.register_forward_hook(lambda *a: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before apply_qat: it must keep working
    keys = list(model.state_dict())
    nq.apply_qat(model, ON)
    assert type(linear) is nq.QATLinear and isinstance(linear, nn.Linear)
    assert linear.weight is weight and isinstance(weight, nn.Parameter)
    assert list(model.state_dict()) == keys
    assert type(model.lm_head) is nn.Linear  # in the default ignore patterns
    model(torch.randn(2, 32)).sum().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert calls and not torch.equal(before, weight)
    assert "nvfp4" in repr(linear)


def test_siblings_share_the_global_scale_and_others_do_not():
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    model(x)
    block = model.blocks[0]
    scales = {n: float(getattr(block, n)._qat_weights["weight"].value.global_scale) for n in ("gate_proj", "up_proj")}
    assert scales["gate_proj"] == scales["up_proj"] == float(global_scale(amax(block.gate_proj.weight)))
    assert scales["up_proj"] != float(global_scale(amax(block.up_proj.weight)))
    assert torch.equal(model(x), model.reference(x))


def test_gradient_accumulation_packs_once(monkeypatch):
    model = stack()
    nq.apply_qat(model, ON)
    packed = []
    from nvfp4_qat import ops

    original = ops.quantize_into
    monkeypatch.setattr(ops, "quantize_into", lambda w, *a: (packed.append(1), original(w, *a)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        for _ in range(3):
            model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(packed) == 2 * 6  # two optimizer steps, six weights; not eighteen forwards and their backwards


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    model = stack()
    nq.apply_qat(model, ON)
    x = h = torch.randn(4, 32, requires_grad=True)
    for block in model.blocks:  # no residual: reentrant checkpointing adds the terms of a sum in another order
        h = block(h)
    model.lm_head(h).square().sum().backward()
    expected, expected_x = grads(model), x.grad.clone()
    model.zero_grad()
    x.grad = None
    h = x
    for block in model.blocks:
        h = checkpoint(block, h, use_reentrant=use_reentrant)
    model.lm_head(h).square().sum().backward()
    assert_same(grads(model), expected)
    assert torch.equal(x.grad, expected_x)


def test_activation_checkpointing_recomputes_no_product_in_vain(monkeypatch):
    model = stack()
    nq.apply_qat(model, ON)
    products, h = [], torch.randn(4, 32)
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: (products.append(1), original(*a))[1])
    for block in model.blocks:
        h = checkpoint(block, h, use_reentrant=False)
    h.square().sum().backward()
    # Two blocks of three layers: the forward, and the recomputation of all but the last, as of `nn.Linear`.
    assert len(products) == 2 * (3 + 2)


def selective(saved: list[object]) -> functools.partial:
    """Activation checkpointing that keeps the results of some operations."""

    def policy(ctx: object, func: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if func in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


aten = torch.ops.aten


@pytest.mark.parametrize("stale", ["written", "handed out"])
@pytest.mark.parametrize(
    "saved",
    [
        [aten.mm.default],
        [aten.mm.default, aten.max.default],
        [aten._to_copy.default],
        [aten.abs.default],
        [aten.clamp.default],
    ],
    ids=lambda ops: "+".join(op.name()[6:] for op in ops),
)
def test_selective_checkpointing_does_not_take_our_results_for_the_blocks(saved, stale):
    """Packing happens in the forward and not in the recomputation."""
    linear = nn.Linear(64, 32, bias=False)
    model = nn.ModuleDict({"proj": linear})
    nq.apply_qat(model, ON)
    x = torch.randn(2, 64)
    linear(x)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        y = (y / y.detach().abs().max()).clamp(-0.9, 0.9)
        return y.double().square()

    if stale == "written":
        with torch.no_grad():
            linear.weight.mul_(1.5)
    else:
        model.state_dict()
    (found,) = torch.autograd.grad(selective(saved)(block, x).sum(), linear.weight)
    (expected,) = torch.autograd.grad(block(x).sum(), linear.weight)
    assert torch.equal(found, expected)


def test_selective_checkpointing_sees_that_a_kept_output_was_written():
    linear = nn.Linear(64, 32)
    nq.apply_qat(nn.ModuleDict({"proj": linear}), ON)
    y = selective([aten.addmm.default])(lambda x: linear(x).add_(1.0).square(), torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="mutated"):
        y.sum().backward()


def test_a_subclass_of_tensors_stays_one():
    class Sub(torch.Tensor):
        pass

    linear = nn.Linear(64, 32)
    nq.apply_qat(nn.ModuleDict({"proj": linear}), ON)
    assert type(linear(torch.randn(2, 64).as_subclass(Sub))) is Sub


@pytest.mark.parametrize("rows", [16, 48])
def test_a_weight_of_another_shape(rows):
    linear = nn.Linear(64, 32, bias=False)
    nq.apply_qat(nn.ModuleDict({"proj": linear}), ON)
    x = torch.randn(2, 64)
    linear(x)
    linear.weight = nn.Parameter(torch.randn(rows, 64))
    y = linear(x)
    assert torch.equal(y, F.linear(x, straight_through(linear.weight)))
    y.sum().backward()
    assert linear.weight.grad.shape == (rows, 64)


def test_the_output_is_an_ordinary_tensor():
    linear = nn.Linear(32, 16)
    nq.apply_qat(nn.ModuleDict({"proj": linear}), ON)
    y = linear(torch.randn(3, 5, 32))
    assert y.shape == (3, 5, 16) and y.is_contiguous() and not y._is_view() and y._version == 0
    assert y.untyped_storage().size() == y.nbytes
    y.relu_().sum().backward()  # written in place, as a bf16 model may
    assert linear.weight.grad is not None and bool(linear.weight.grad.any())
    with torch.no_grad():
        assert not linear(torch.randn(5, 32)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_what_a_bf16_engine_computes(dtype):
    model = stack(bias=True).to(dtype)
    reference = copy.deepcopy(model)
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = model(x), reference.reference(x)
    assert y1.dtype == torch.bfloat16 and torch.equal(y1, y2)
    y1.float().square().sum().backward()
    y2.float().square().sum().backward()
    assert_same(grads(model), grads(reference))


def test_no_copy_of_the_weight_is_kept_for_backward():
    linear = nn.Linear(512, 512, bias=False)
    model = nn.ModuleDict({"proj": linear})
    nq.apply_qat(model, ON)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    x = torch.randn(4, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x)
    own = {x.data_ptr(), linear.weight.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) <= 64  # a handle and a generation number


@pytest.mark.parametrize("inner", ["proj", "whole"])
def test_compiles_without_a_graph_break_and_sees_every_step(inner):
    torch._dynamo.reset()
    model = stack(depth=3)
    nq.apply_qat(model, ON)
    if inner == "proj":
        compiled = copy.copy(model)
        blocks = [torch.compile(block, fullgraph=True, backend="aot_eager") for block in model.blocks]

        def run(x):
            for block in blocks:
                x = x + block(x)
            return model.lm_head(x)

    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        run = compiled
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)  # leaves every version counter alone
    x = torch.randn(4, 32)
    for _ in range(3):
        model.zero_grad()
        run(x).square().sum().backward()
        got = grads(model)
        model.zero_grad()
        y = model(x)
        assert torch.equal(run(x), y) and torch.equal(y, model.reference(x))
        y.square().sum().backward()
        for name, grad in grads(model).items():
            error = (got[name] - grad).abs().max() / grad.abs().max()
            assert error < 1e-6, f"{name}: {error}"  # fp32 sums in another order
        optimizer.step()


def test_inductor_compiles_one_graph_for_all_layers():
    torch._dynamo.reset()
    model = stack(depth=12)  # more layers than dynamo recompiles a function for
    nq.apply_qat(model, ON)
    torch._dynamo.utils.counters.clear()
    blocks = [torch.compile(block, fullgraph=True) for block in model.blocks]
    x = torch.randn(4, 32)
    with torch.no_grad():
        for block, plain in zip(blocks, model.blocks, strict=True):
            torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_copies_are_independent():
    model = stack()
    plan = nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert nq.qat_plan(twin) == plan
        with torch.no_grad():
            twin.blocks[0].gate_proj.weight.mul_(3.0)
        assert torch.equal(twin(x), twin.reference(x))
        assert not torch.equal(twin(x), model(x))
        assert torch.equal(model(x), model.reference(x))
    alone = copy.deepcopy(model.blocks[0].down_proj)
    y = torch.randn(2, 48)
    assert torch.equal(alone(y), F.linear(y, straight_through(alone.weight)))


def test_conversion_eval_and_inference_mode():
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    with torch.inference_mode():
        first = model(x)  # the packed copies are made here and must serve training afterwards
    assert torch.equal(first, model.eval()(x))
    model(x).sum().backward()
    model.train().to(torch.bfloat16)
    assert model.blocks[0].gate_proj.weight.dtype == torch.bfloat16
    x16 = x.bfloat16()
    assert torch.equal(model(x16), model.reference(x16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.zero_grad()
    model(x16).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        assert torch.equal(model(x16), model.reference(x16))


def test_a_wrong_input_dtype_is_refused_as_nn_linear_does():
    model = stack()
    nq.apply_qat(model, ON)
    with pytest.raises(RuntimeError, match="dtype"):
        model.blocks[0](torch.randn(2, 32, dtype=torch.bfloat16))


def test_backward_after_a_weight_change_is_an_error():
    model = stack()
    nq.apply_qat(model, ON)
    y = model(torch.randn(4, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(2.0)  # moves no version counter
    model(torch.randn(4, 32))
    with pytest.raises(nq.MismatchError, match="changed between"):
        y.sum().backward()


def test_a_state_dict_between_forward_and_backward_is_harmless():
    model = stack()
    nq.apply_qat(model, ON)
    y = model(torch.randn(4, 32))
    model.state_dict()
    model(torch.randn(4, 32))  # looks whether something was written through the aliases; nothing was
    y.sum().backward()


def test_empty_input():
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(0, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == (0, 32)
    assert float(model.blocks[0].down_proj.weight.grad.abs().sum()) == 0.0


def test_packed_value_is_what_quantize_gives():
    model = nn.ModuleDict({"proj": nn.Linear(64, 32)})
    nq.apply_qat(model, ON)
    model["proj"](torch.randn(1, 64))
    value = model["proj"]._qat_weights["weight"].value
    expected = quantize(model["proj"].weight, global_scale(amax(model["proj"].weight)))
    assert torch.equal(value.packed, expected.packed)
    assert torch.equal(value.scale.view(torch.uint8), expected.scale.view(torch.uint8))


def test_gradients_of_gradients():
    model = stack(depth=1)
    reference = copy.deepcopy(model)
    nq.apply_qat(model, ON)

    def penalty(forward, parameters):
        x = torch.ones(3, 32, requires_grad=True)
        (gradient,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameters)

    got = penalty(model, list(model.parameters())[:3])
    want = penalty(reference.reference, list(reference.parameters())[:3])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_a_frozen_layer_does_not_keep_its_input():
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    nq.apply_qat(nn.ModuleDict({"proj": layer}), ON)
    x = torch.randn(8, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(8, 64) @ straight_through(layer.weight))


def test_the_model_may_be_dropped_before_backward():
    x = torch.randn(2, 32, requires_grad=True)

    def forward():
        model = stack()
        nq.apply_qat(model, ON)
        return model(x)

    forward().sum().backward()
    assert x.grad is not None


def test_a_tensor_that_is_not_the_parameter_is_refused():
    model = stack()
    nq.apply_qat(model, ON)
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    with pytest.raises(nq.UserError, match="plain parameters"):
        torch.func.functional_call(model, other, (torch.randn(2, 32),))


def test_default_dtype_and_device_do_not_matter():
    from nvfp4_qat import reference

    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(2, 32)
    expected = model.reference(x)
    with torch.no_grad():
        model.blocks[0].up_proj.weight.mul_(1.0)
    reference._value_pairs.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
