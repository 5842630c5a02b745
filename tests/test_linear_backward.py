"""Module mode of linear layers in backward: what autograd keeps, which weights it sees, and what may happen before."""

import copy

import pytest
import torch
from small_models import stack, straight_through
from torch import nn

import nvfp4_qat as nq

ON = nq.QATConfig(enable=True)


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
