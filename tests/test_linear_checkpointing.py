"""Module mode of linear layers under activation checkpointing: the same gradients, and no product twice in vain."""

import functools

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same, grads, stack
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nvfp4_qat as nq

ON = nq.QATConfig(enable=True)


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
