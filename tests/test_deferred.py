"""Checks of what was packed that are made before the next optimizer step, as on a GPU; here that is forced on a CPU."""

import copy

import pytest
import torch
from small_models import stack
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat import deferred

ON = nq.QATConfig(enable=True)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(deferred, "deferring", lambda device: True)


def model_and_optimizer(rate: float = 0.05) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = stack()
    nq.apply_qat(model, ON)
    return model, torch.optim.AdamW(model.parameters(), lr=rate)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> torch.Tensor:
    loss = model(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("policy", ["pow2", "amax"])
def test_training_gives_the_same_numbers(policy, monkeypatch):
    results = []
    for later in (True, False):
        monkeypatch.setattr(deferred, "deferring", lambda device, later=later: later)
        torch.manual_seed(0)
        model = stack()
        nq.apply_qat(model, nq.QATConfig(enable=True, global_scale=policy))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.2)  # moves global scales
        losses = [step(model, optimizer, seed) for seed in range(8)]
        results.append((losses, model.state_dict(), dict(nq.packed_weights(model))))
    (losses, state, stream), (other_losses, other_state, other_stream) = results
    assert losses == other_losses
    for one, other in ((state, other_state), (stream, other_stream)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one if one[n].ndim)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_the_optimizer_does_not_step_with_what_cannot_be_quantized(value):
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    weight = model.blocks[1].up_proj.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nq.UserError, match="blocks.1.up_proj.weight holds"):
        step(model, optimizer)
    assert all(torch.equal(t, before[n]) or not t.isfinite().all() for n, t in model.state_dict().items())
    for _ in range(2):  # from now on at once
        with pytest.raises(nq.UserError, match="blocks.1.up_proj.weight holds"):
            model(torch.randn(4, 32))
    optimizer.zero_grad()
    with torch.no_grad():
        weight.copy_(good)
    for seed in range(3):
        step(model, optimizer, seed)
    with torch.no_grad():
        weight[3, 5] = value
    model(torch.randn(4, 32))  # again later
    with pytest.raises(nq.UserError, match="blocks.1.up_proj.weight"):
        optimizer.step()


def test_without_gradients_it_is_looked_at_right_away():
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    with torch.no_grad():
        model.blocks[0].gate_proj.weight[0, 0] = float("nan")
        with pytest.raises(nq.UserError, match="gate_proj.weight holds NaN"):
            model(torch.randn(4, 32))


def test_streams_look_for_themselves():
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    with torch.no_grad():
        model.blocks[0].gate_proj.weight[0, 0] = float("nan")
    model(torch.randn(4, 32))
    with pytest.raises(nq.UserError, match="gate_proj.weight holds NaN"):
        list(nq.packed_weights(model))


def test_what_was_overwritten_since_is_named_all_the_same():
    model, optimizer = model_and_optimizer()
    weight = model.blocks[0].down_proj.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    model(torch.randn(4, 32)).sum().backward()
    with torch.no_grad():
        weight[0, 0] = 0.0
    with pytest.raises(nq.UserError, match="blocks.0.down_proj.weight: one of them held NaN"):
        optimizer.step()


def test_a_model_that_is_gone_is_nobodys_business():
    model, optimizer = model_and_optimizer()
    with torch.no_grad():
        model.blocks[0].down_proj.weight[0, 0] = float("nan")
    model(torch.randn(4, 32))
    del model, optimizer
    other, other_optimizer = model_and_optimizer()
    step(other, other_optimizer)


def test_an_optimizer_without_hooks_does_not_collect_checks(monkeypatch):
    monkeypatch.setattr(deferred, "MANY", 3)
    model, _ = model_and_optimizer()
    checks = model.blocks[0].up_proj._qat_weights["weight"].group.family.checks
    for _ in range(10):
        model(torch.randn(4, 32))
        with torch.no_grad():
            model.blocks[0].up_proj.weight.mul_(1.01)
        assert len(checks._waiting) <= 3
