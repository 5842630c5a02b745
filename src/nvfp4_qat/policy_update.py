"""The trainer's half of a step: log-probabilities of the tokens the engine sampled, and the updates made from them.

The log-probabilities before the update serve twice: they are compared with the engine's, which is the mismatch that
`nvfp4_qat.rl` is about, and the updates are clipped around them. Everything runs in micro-batches, and a loss is
divided by the tokens of its whole minibatch, so their size does not change the result.

Source: token-level truncated importance sampling as in verl's rollout correction.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .demo_config import DemoConfig
from .grpo import policy_loss
from .masters import MasterAdamW
from .rollouts import Batch
from .runlog import Row


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The trainer's logits for each response token, fp32 ``[sequences, tokens, vocabulary]``."""
    output = model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        position_ids=(batch.attention.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=batch.mask.shape[1] + 1,
        use_cache=False,
    )
    logits: Tensor = output.logits[:, :-1]
    return logits.float()


def response_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The trainer's log-probability of each response token."""
    logprobs = torch.log_softmax(response_logits(model, batch), dim=-1)
    return logprobs.gather(2, batch.ids[:, -batch.mask.shape[1] :, None])[..., 0]


@torch.no_grad()
def old_logprobs(model: nn.Module, batch: Batch, cfg: DemoConfig) -> tuple[Tensor, float]:
    """The trainer's log-probabilities before the update, and the mean entropy of its distributions, in nats."""
    logprobs, entropy = [], 0.0
    for part in _parts(slice(0, len(batch.ids)), cfg.micro_batch):
        micro = batch.rows(part)
        distribution = torch.log_softmax(response_logits(model, micro), dim=-1)
        logprobs.append(distribution.gather(2, micro.ids[:, -micro.mask.shape[1] :, None])[..., 0])
        entropies = -(distribution.exp() * distribution).sum(-1)
        entropy += float(entropies.masked_fill(~micro.mask, 0.0).sum())
    return torch.cat(logprobs), entropy / int(batch.mask.sum())


def update(model: nn.Module, optimizer: MasterAdamW, batch: Batch, old: Tensor, cfg: DemoConfig) -> Row:
    """Train on a batch: one optimizer step for each of ``cfg.minibatches`` parts of it.

    Args:
        model: bf16 parameters, which ``optimizer`` holds the masters of.
        optimizer: renewed in place.
        batch: from `collate`.
        old: the trainer's log-probabilities of the batch before the step.
        cfg: clipping and truncated importance sampling.

    Returns:
        Means over the batch: ``loss``, ``grad_norm`` (before clipping), and the fractions of tokens clipped.
    """
    weights = None if cfg.tis is None else torch.exp(old - batch.rollout_logprobs).clamp(max=cfg.tis)
    totals = dict.fromkeys(("loss", "clipped_high", "clipped_low", "clipped_dual"), 0.0)
    norms = []
    size = -(-len(batch.ids) // cfg.minibatches)
    minibatches = list(_parts(slice(0, len(batch.ids)), size))
    for minibatch in minibatches:
        tokens = int(batch.mask[minibatch].sum())
        for part in _parts(minibatch, cfg.micro_batch):
            micro = batch.rows(part)
            loss, active = policy_loss(
                response_logprobs(model, micro),
                old[part],
                micro.advantages,
                micro.mask,
                clip_low=cfg.clip_low,
                clip_high=cfg.clip_high,
                clip_dual=cfg.clip_dual,
                weights=None if weights is None else weights[part],
                tokens=tokens,
            )
            loss.backward()
            optimizer.accumulate()
            totals["loss"] += float(loss.detach()) / len(minibatches)
            for name, count in active.items():
                totals[name] += count / int(batch.mask.sum())
        norms.append(optimizer.clip(cfg.max_grad_norm))
        optimizer.step()
    return {**totals, "grad_norm": sum(norms) / len(norms)}


def _parts(whole: slice, size: int) -> Iterator[slice]:
    """Cut a range of rows into ranges of at most ``size``."""
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))
