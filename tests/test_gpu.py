"""Module mode on a CUDA device: the bytes of a CPU, the gradients of the definition, freshness, CUDA graphs, memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import master_grads, qwen3_moe, reference_of, stack, straight_through
from torch import nn

import nvfp4_qat as nq

pytestmark = pytest.mark.gpu
ON = nq.QATConfig(enable=True)


@pytest.mark.parametrize("policy", ["pow2", "amax"])
@pytest.mark.parametrize("shape", [(384, 1024), (3, 64, 48), (5, 16)])
def test_packing_gives_the_bytes_of_the_cpu(shape, policy):
    w = torch.randn(shape) * 0.03
    g = nq.global_scale(nq.amax(w, w.ndim - 2), policy)
    cpu, gpu = nq.quantize(w, g), nq.quantize(w.cuda(), g.cuda())
    assert torch.equal(nq.amax(w.cuda(), w.ndim - 2).cpu(), nq.amax(w, w.ndim - 2))
    assert torch.equal(nq.global_scale(nq.amax(w.cuda(), w.ndim - 2), policy).cpu(), g)
    assert torch.equal(gpu.packed.cpu(), cpu.packed)
    assert torch.equal(gpu.scale.view(torch.uint8).cpu(), cpu.scale.view(torch.uint8))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert torch.equal(gpu.dequantize(dtype).cpu(), cpu.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (64, 33)])
def test_one_layer_equals_the_definition_bitwise(shape, bias, dtype):
    layer = nn.Linear(512, 384, bias=bias, dtype=dtype, device="cuda")
    reference = copy.deepcopy(layer)
    nq.apply_qat(nn.ModuleDict({"proj": layer}), ON)
    x = torch.randn(*shape, 512, dtype=dtype, device="cuda")
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(x1), F.linear(x2, straight_through(reference.weight), reference.bias)
    assert torch.equal(y1, y2)
    upstream = torch.randn_like(y1)
    y1.backward(upstream)
    y2.backward(upstream)
    assert torch.equal(x1.grad, x2.grad)
    assert torch.equal(layer.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_optimizer_steps_are_seen(options):
    model = stack().cuda()
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(3):
        model(torch.randn(4, 32, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        x = torch.randn(3, 32, device="cuda")
        assert torch.equal(model(x), model.reference(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models_see_every_step_also_with_cuda_graphs(mode):
    torch._dynamo.reset()
    model = stack(depth=4).cuda()
    nq.apply_qat(model, ON)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    x = torch.randn(4, 32, device="cuda")
    for _ in range(6):  # CUDA graphs are recorded in the second or third call
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        torch.testing.assert_close(y, model.reference(x), rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_equal_the_definition_bitwise(implementation):
    model = qwen3_moe(implementation=implementation).to("cuda", torch.bfloat16)
    reference = reference_of(model)
    nq.apply_qat(model, ON)
    ids = torch.randint(0, 64, (2, 9), device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y, expected = model(ids).logits, reference(ids).logits
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    got, want = master_grads(model), master_grads(reference)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=2e-2 * float(want[name].abs().max()))


def test_a_linear_layer_holds_its_packed_copy_and_nothing_more():
    layer = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    nq.apply_qat(nn.ModuleDict({"proj": layer}), ON)
    y = layer(x)
    held = torch.cuda.memory_allocated() - before - y.nbytes
    packed = layer.weight.numel() * 9 // 16
    tables = layer.weight.numel() // 1024  # two, of 32 bytes a 65,536 weights: what the kernels are to do
    assert packed <= held <= packed + tables + 4096, (held, packed)


def test_experts_hold_their_packed_copy_and_nothing_more():
    model = qwen3_moe(implementation="grouped_mm", moe_intermediate_size=512, hidden_size=256).to(
        "cuda", torch.bfloat16
    )
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.randint(0, 4, (8, 2), device="cuda"), torch.rand(8, 2, device="cuda").bfloat16()

    def held() -> int:
        experts(x, index, weights)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = experts(x, index, weights)
        result = torch.cuda.memory_allocated() - before
        out.sum().backward()
        return result

    plain = held()
    nq.apply_qat(model, ON)
    assert held() <= plain + 4096
