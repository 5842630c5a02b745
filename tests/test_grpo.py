"""GRPO with DAPO's changes against numbers worked out by hand: advantages, the penalty for length, the loss."""

import math

import pytest
import torch

from nvfp4_qat.grpo import group_advantages, overlong_penalty, policy_loss


def test_advantages_are_centred_and_scaled_within_a_group():
    rewards = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, -1.0]])
    scale = 1 + 1e-6  # mean -1/2, unbiased standard deviation 1
    deviation = math.sqrt(8 / 3) + 1e-6
    expected = [[1.5 / scale, *[-0.5 / scale] * 3], [0.0] * 4, [2 / deviation, 0.0, 0.0, -2 / deviation]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected))


@pytest.mark.parametrize(
    ("length", "buffer", "factor", "penalty"),
    [
        (10, 4, 1.0, 0.0),
        (16, 4, 1.0, 0.0),
        (17, 4, 1.0, -0.25),
        (20, 4, 1.0, -1.0),
        (18, 4, 2.0, -1.0),
        (20, 0, 1.0, 0),
    ],
)
def test_overlong_penalty(length, buffer, factor, penalty):
    assert overlong_penalty(length, 20, buffer, factor) == penalty


def loss_of(ratio, advantage, **kwargs):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, active = policy_loss(new, torch.zeros(1, 1), one * advantage, one.bool(), **kwargs)
    loss.backward()
    return loss.item(), new.grad.item(), [name for name, count in active.items() if count]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "active"),
    [
        (1.0, 2.0, -2.0, -2.0, []),
        (1.25, 2.0, -2.5, -2.5, []),
        (1.5, 2.0, -2.56, 0.0, ["clipped_high"]),  # 1.28 · 2
        (0.5, 2.0, -1.0, -1.0, []),  # a good token that became rarer may always come back
        (0.9, -2.0, 1.8, 1.8, []),
        (0.5, -2.0, 1.6, 0.0, ["clipped_low"]),  # 0.8 · 2
        (1.5, -2.0, 3.0, 3.0, []),
        (20.0, -2.0, 20.0, 0.0, ["clipped_dual"]),  # 10 · 2
    ],
)
def test_clipping(ratio, advantage, loss, gradient, active):
    result = loss_of(ratio, advantage)
    assert result[0] == pytest.approx(loss, rel=1e-6)
    assert result[1] == pytest.approx(gradient, rel=1e-6)
    assert result[2] == active


def test_clip_bounds_are_parameters():
    assert loss_of(1.5, 1.0, clip_high=0.1)[0] == pytest.approx(-1.1)
    assert loss_of(0.5, -1.0, clip_low=0.4)[0] == pytest.approx(0.6)
    assert loss_of(5.0, -1.0, clip_dual=3.0)[0] == pytest.approx(3.0)


def test_the_loss_is_a_mean_over_tokens_not_over_sequences():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([[4.0, 9.0, 9.0], [-1.0, -1.0, -1.0]])
    new = torch.zeros(2, 3, requires_grad=True)
    loss, _ = policy_loss(new, torch.zeros(2, 3), advantages, mask)
    assert loss.item() == pytest.approx(-(4 - 3) / 4)
    loss.backward()
    assert new.grad.tolist() == [[-1.0, 0.0, 0.0], [0.25, 0.25, 0.25]]
    assert policy_loss(new, torch.zeros(2, 3), advantages, mask, tokens=8)[0].item() == pytest.approx(-1 / 8)
    weights = torch.tensor([[0.5, 7.0, 7.0], [2.0, 1.0, 1.0]])
    weighted = policy_loss(new, torch.zeros(2, 3), advantages, mask, weights=weights)[0]
    assert weighted.item() == pytest.approx(-(0.5 * 4 - 2 - 1 - 1) / 4)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_overflow_outside_the_mask_does_no_harm(advantage):
    new = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss, _ = policy_loss(new, torch.zeros(1, 2), torch.full((1, 2), advantage), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == -advantage
    assert new.grad.tolist() == [[-advantage, 0.0]]
