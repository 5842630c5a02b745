"""An update of a policy: log-probabilities, micro-batches, importance weights, and the optimizer's fp32 masters."""

import math

import pytest
import torch
from helpers_rl import TOKENIZER, make_batch, micro_config, micro_model

from nvfp4_qat.masters import MasterAdamW
from nvfp4_qat.policy_update import old_logprobs, response_logprobs, update


def test_old_log_probabilities_and_entropy(tmp_path):
    model = micro_model()
    batch = make_batch()
    old, entropy = old_logprobs(model, batch, micro_config(tmp_path, micro_batch=5))
    with torch.no_grad():
        whole = response_logprobs(model, batch)
    torch.testing.assert_close(old[batch.mask], whole[batch.mask], atol=0.05, rtol=0)  # bf16 in other batch sizes
    assert 4.0 < entropy <= math.log(len(TOKENIZER))


def test_micro_batches_do_not_change_the_update(tmp_path):
    results = []
    for micro in (2, 100):
        model = micro_model().float()
        batch = make_batch()
        cfg = micro_config(tmp_path, micro_batch=micro, minibatches=1)
        optimizer = MasterAdamW(model.parameters(), lr=1e-3)
        old, _ = old_logprobs(model, batch, cfg)
        stats = update(model, optimizer, batch, old, cfg)
        results.append((stats, optimizer.masters))
    for name, value in results[0][0].items():
        assert value == pytest.approx(results[1][0][name], abs=1e-5), name
    for a, b in zip(results[0][1], results[1][1], strict=True):
        # AdamW's first step is lr · sign(g): a gradient of nearly zero may come out with either sign.
        assert ((a - b).abs() > 1e-5).float().mean() < 0.01


def test_an_update_makes_good_responses_likelier(tmp_path):
    model = micro_model()
    batch = make_batch()
    cfg = micro_config(tmp_path, minibatches=2)
    optimizer = MasterAdamW(model.parameters(), lr=1e-3)
    before, _ = old_logprobs(model, batch, cfg)
    stats = update(model, optimizer, batch, before, cfg)
    after, _ = old_logprobs(model, batch, cfg)
    gain = ((after - before) * batch.advantages)[batch.mask].sum()
    assert gain > 0
    assert stats["grad_norm"] > 0


def test_importance_weights_are_the_truncated_ratio_to_the_rollout(tmp_path):
    """At the first update ratio and gradient scale are known: the loss is -Σ weight · advantage / tokens."""
    model = micro_model()
    batch = make_batch()
    losses = {}
    for tis in (None, 2.0, 0.25):
        cfg = micro_config(tmp_path, minibatches=1, micro_batch=100, tis=tis)
        old, _ = old_logprobs(model, batch, cfg)
        weights = torch.ones_like(old) if tis is None else torch.exp(old - batch.rollout_logprobs).clamp(max=tis)
        expected = -(weights * batch.advantages)[batch.mask].sum() / batch.mask.sum()
        fresh = micro_model()
        losses[tis] = update(fresh, MasterAdamW(fresh.parameters(), lr=0.0), batch, old, cfg)["loss"]
        assert losses[tis] == pytest.approx(float(expected), abs=1e-5)
    assert len(set(losses.values())) == 3


# --- fp32 masters


def test_masters_hold_steps_that_bf16_cannot():
    parameter = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    optimizer = MasterAdamW([parameter], lr=1e-6)
    for step in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.step()
        assert torch.equal(parameter.detach(), optimizer.masters[0].bfloat16())
        if step == 9:
            assert torch.equal(parameter.detach(), before)
    assert (parameter.detach() < before).all()
    assert optimizer.masters[0].tolist() == pytest.approx([float(before[0]) - 200e-6] * 4, rel=1e-3)


def test_gradients_are_accumulated_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-3)
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        parameter.grad = torch.full((1,), value, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert parameter.grad is None
    assert optimizer.clip(1.0) == 258.0
    parameter.grad = torch.full((1,), float("nan"), dtype=torch.bfloat16)
    optimizer.accumulate()
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip(1.0)


def test_optimizer_state_continues_exactly():
    def train(optimizer, parameter, steps):
        for step in steps:
            parameter.grad = torch.full_like(parameter, math.sin(step))
            optimizer.accumulate()
            optimizer.step()

    start = torch.linspace(-1, 1, 8).bfloat16()
    whole = torch.nn.Parameter(start.clone())
    reference = MasterAdamW([whole], lr=1e-3)
    train(reference, whole, range(6))
    half = torch.nn.Parameter(start.clone())
    first = MasterAdamW([half], lr=1e-3)
    train(first, half, range(3))
    continued = torch.nn.Parameter(start.clone())
    second = MasterAdamW([continued], lr=1e-3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(continued.detach(), half.detach())
    train(second, continued, range(3, 6))
    assert torch.equal(second.masters[0], reference.masters[0])
    assert torch.equal(continued.detach(), whole.detach())
