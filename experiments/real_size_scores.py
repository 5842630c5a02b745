"""How far the policy that samples is from the one that is trained, token by token, at real size.

The engine answers prompts and says how likely each sampled token was; then each rank of the trainer computes the same
of its share of the sequences (`Loss`), all with the weights of the last sync. Their difference is that of two programs
with equal weights (`nvfp4_qat.metrics.rollout_metrics`, k3 KL first of all), as the weights themselves are compared to
the bit elsewhere (`Rollout.verify`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Row
from real_size_ranks import Team
from shapes import LOSS_ROWS, _ChunkedLoss
from torch import Tensor

from nvfp4_qat.metrics import PREFIX, rollout_metrics
from nvfp4_qat.sharded_stream import reshard

SHOWN = ("k3_kl", "kl", "logprob_abs_diff", "logprob_abs_diff_max")

Sampled = tuple[list[list[int]], list[list[float]]]
"""Sequences of one length, prompts included; the log-probability of each token behind the prompts."""


class Loss(_ChunkedLoss):
    """Replaces the forward of a causal language model: token numbers in, mean cross-entropy out, or scores."""

    def forward(self, tokens: Tensor, each: bool = False) -> Tensor:
        """Compute the loss.

        Args:
            tokens: int64 ``[batch, length + 1]``.
            each: instead of the loss return the log-probability of every token but the first; without gradients.

        Returns:
            float32 ``[]``, or ``[batch, length]``.
        """
        if not each:
            return super().forward(tokens)
        hidden = self.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        wanted = tokens[:, 1:].flatten()
        scores = [
            -F.cross_entropy(self.lm_head(rows).float(), words, reduction="none")
            for rows, words in zip(hidden.split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
        ]
        return torch.cat(scores).view(len(tokens), -1)


def mismatch(model: Any, team: Team, sample: Callable[[], Sampled]) -> Row:
    """Compare the trainer's log-probabilities with those of the engine that sampled.

    Args:
        model: of `real_size_trainer.make`, with the engine's weights.
        team: of all its ranks.
        sample: lets the engine answer; called on rank 0. It gives a sequence for each rank at least.
    """
    sequences, rollout = team.first(sample)
    mine = range(team.world.rank, len(sequences), team.world.size)
    tokens = torch.tensor([sequences[i] for i in mine], device=team.world.device)
    with torch.no_grad():
        scores: Tensor = model(tokens, each=True)
    reshard(model)
    answered = scores[:, -len(rollout[0]) :].cpu().double().tolist()
    train = {i: row for part in team.all(dict(zip(mine, answered, strict=True))) for i, row in part.items()}
    ours, theirs = torch.tensor([train[i] for i in range(len(sequences))]), torch.tensor(rollout)
    found = rollout_metrics(ours.double(), theirs.double(), torch.ones_like(theirs), rollout_is=None)
    return {"scored_tokens": theirs.numel(), **{name: found[PREFIX + name] for name in SHOWN}}
