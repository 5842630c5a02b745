"""The arithmetic of GRPO with DAPO's changes: advantages, the penalty on length, the clipped objective.

Numbers and tensors in, numbers and tensors out; no model, no engine, no settings. What `nvfp4_qat.rl` does with it:
rewards lose `overlong_penalty` and become advantages within their group (`nvfp4_qat.rollouts`), and the updates follow
the gradient of `policy_loss` (`nvfp4_qat.policy_update`).

Sources: GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476), dual clip (arXiv 1912.09729).
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Centre and scale rewards within each group.

    Args:
        rewards: ``[groups, samples]``.

    Returns:
        ``(r - mean) / (std + 1e-6)`` of the same shape, with the unbiased standard deviation; zero in a group whose
        rewards are all equal.

    Source: GRPO, arXiv 2402.03300, section 4.1.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def overlong_penalty(length: int, max_new_tokens: int, buffer: int, factor: float) -> float:
    """Return what a response loses by its length, at most 0.

    Args:
        length: of the response in tokens.
        max_new_tokens: longest response.
        buffer: the last so many tokens cost ``factor / buffer`` each; 0: length costs nothing.
        factor: cost of a response that uses the whole buffer.

    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    if buffer == 0:
        return 0.0
    return min(-(length - (max_new_tokens - buffer)) / buffer * factor, 0.0)


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float = 10.0,
    weights: Tensor | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective, averaged over tokens.

    Args:
        new: log-probabilities under the weights being trained, ``[sequences, tokens]``, with gradient.
        old: the same before the step's first update.
        advantages: same shape.
        mask: same shape, true where a token belongs to a response.
        clip_low: the ratio new/old is not rewarded below ``1 - clip_low``,
        clip_high: nor above ``1 + clip_high`` ("clip higher").
        clip_dual: bound of the loss of a token with negative advantage, in multiples of the advantage.
        weights: importance weights of the tokens, without gradient.
        tokens: what to divide by, if the mask is a part of a batch; default: the tokens under the mask.

    Returns:
        The loss, and the number of tokens for which the upper, lower or dual bound was active.

    Source: DAPO, arXiv 2503.14476, equation 8; dual clip, arXiv 1912.09729, equation 5.
    """
    # Masked before exp: an overflow in the padding would turn its zero gradient into NaN.
    ratio = torch.exp((new - old).masked_fill(~mask, 0.0))
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    bound = -advantages * clip_dual
    dual = (advantages < 0) & (loss > bound)
    loss = torch.where(dual, bound, loss)
    if weights is not None:
        loss = loss * weights
    active = {
        "clipped_high": mask & (advantages > 0) & (ratio > 1 + clip_high),
        "clipped_low": mask & (advantages < 0) & (ratio < 1 - clip_low),
        "clipped_dual": mask & dual,
    }
    count = int(mask.sum()) if tokens is None else tokens
    return loss.masked_fill(~mask, 0.0).sum() / count, {name: float(on.sum()) for name, on in active.items()}
