"""Module mode of linear layers: the numbers of the definition, and what a module keeps of `nn.Linear`."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same, grads, stack, straight_through
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat.ops import amax, global_scale, quantize

ON = nq.QATConfig(enable=True)


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


def test_a_forward_with_fake_tensors_leaves_nothing_behind():
    """As for an estimate of memory before training: what is kept for later calls must be real."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nvfp4_qat import reference

    model = stack()
    nq.apply_qat(model, ON)
    reference._value_pairs.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(2, 32))
    x = torch.randn(2, 32)
    assert torch.equal(model(x), model.reference(x))
