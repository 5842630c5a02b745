"""GRPO with DAPO's changes, and the experiment it is here for: what do 4-bit rollouts cost, with QAT and without?

One step, as in every RL trainer whose rollouts come from a separate engine:

1. the engine samples a group of responses to each prompt and reports the log-probability of every token;
2. groups that are all right or all wrong carry no signal: more prompts are drawn in their place (dynamic sampling);
3. the trainer computes the log-probabilities of the same tokens. They should be equal; how far they are is the mismatch
   (`nvfp4_qat.metrics`), the number this experiment is about;
4. a few clipped policy-gradient updates, each the token mean over a part of the batch;
5. the new weights are sent to the engine.

The arms differ in 3 and 5 only:

===========  ==========================================  =====================================
arm          the trainer computes with                   the engine is sent
===========  ==========================================  =====================================
``bf16``     bf16 weights                                bf16 weights
``noqat``    bf16 weights                                the same, packed to NVFP4
``qat``      NVFP4 values, gradients straight through    the packed bytes those values come from
``qat-ffn``  the same, attention left in bf16            the same
===========  ==========================================  =====================================

They start from the same weights and see the same prompts and random numbers. Nothing random is carried from step to
step: each draw is seeded by the run's seed and the step's number, so a resumed run repeats what the killed one would
have done.

The model's own parameters are bf16, with fp32 masters in the optimizer (`nvfp4_qat.masters`), so trainer and engine
compute with the same bf16 numbers and only rounding inside the two programs is left between them. Dropout is off
(`eval`) for the same reason.

Sources: GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476), dual clip (arXiv 1912.09729), token-level truncated
importance sampling as in verl's rollout correction.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import QATConfig
from .core import apply_qat
from .demo_config import DemoConfig
from .engine import RolloutEngine, Sample, left_pad
from .masters import MasterAdamW
from .metrics import FlipTracker, rollout_metrics
from .plan import QuantPlan
from .quantizer import QATQuantizer, packed_weights
from .runlog import ArmLog, Row
from .tasks import Task, encode_prompt

Stream = Iterator[tuple[str, Tensor]]
ATTENTION = "re:.*self_attn.*"


# --- the arithmetic of GRPO and DAPO ---------------------------------------------------------------------------------


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


# --- rollouts and batches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """A sampled response and what it earned, the overlong penalty included."""

    sample: Sample
    reward: float
    correct: bool


Group = list[Graded]


@dataclass(frozen=True)
class Batch:
    """Responses as rectangles: prompts padded in front, responses behind; ``[sequences, tokens]`` each.

    ``ids`` and ``attention`` cover prompt and response, the others only the response.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor

    def rows(self, part: slice) -> "Batch":
        """Some of the sequences."""
        return Batch(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def collect(
    engine: RolloutEngine, task: Task, tokenizer: Any, cfg: DemoConfig, step: int
) -> tuple[list[Group], list[Group], int]:
    """Sample and grade the groups of one step, with dynamic sampling.

    Args:
        engine: with the weights to sample from.
        task: source of prompts and rewards.
        tokenizer: of the model.
        cfg: how many prompts, samples and batches.
        step: the step's number, which seeds prompts and sampling.

    Returns:
        The groups to train on, at most ``cfg.prompts``, in which some responses are right and some wrong; all groups
        that were drawn; the number of batches this took, at most ``cfg.max_batches``.
    """
    kept: list[Group] = []
    drawn: list[Group] = []
    batches = 0
    while len(kept) < cfg.prompts and batches < cfg.max_batches:
        key = f"{cfg.seed}/{step}/{batches}"
        problems = task.problems(cfg.prompts, key)
        prompts = [encode_prompt(tokenizer, problem) for problem in problems]
        for problem, samples in zip(
            problems, engine.generate(prompts, cfg.samples, task.max_new_tokens, stable_seed(key)), strict=True
        ):
            group = []
            for sample in samples:
                grade = task.grade(problem, tokenizer.decode(sample.response, skip_special_tokens=True))
                penalty = overlong_penalty(
                    len(sample.response), task.max_new_tokens, task.overlong_buffer, cfg.overlong_factor
                )
                group.append(Graded(sample, grade.score + penalty, grade.correct))
            drawn.append(group)
            if len({graded.correct for graded in group}) == 2:
                kept.append(group)
        batches += 1
    return kept[: cfg.prompts], drawn, batches


def collate(groups: Sequence[Group], pad: int) -> Batch:
    """Turn groups of equal size into one batch, group after group."""
    rewards = torch.tensor([[graded.reward for graded in group] for group in groups])
    samples = [graded.sample for group in groups for graded in group]
    prompt_ids, prompt_mask = left_pad([sample.prompt for sample in samples], pad)
    longest = max(len(sample.response) for sample in samples)
    ids = torch.full((len(samples), longest), pad)
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(samples), longest)
    for row, sample in enumerate(samples):
        length = len(sample.response)
        ids[row, :length] = torch.tensor(sample.response)
        logprobs[row, :length] = torch.tensor(sample.logprobs)
        mask[row, :length] = True
    advantages = group_advantages(rewards).view(-1, 1).expand(-1, longest)
    return Batch(torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask.long()], 1), mask, logprobs, advantages)


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


def stable_seed(key: str) -> int:
    """A seed from a text, the same in every process (`hash` is not)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


# --- the arms --------------------------------------------------------------------------------------------------------


def plain_weights(model: nn.Module) -> Stream:
    """Every tensor of a model once, as it is; of tied ones the first name."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor.detach()


def prepare_arm(model: nn.Module, arm: str, policy: str = "pow2") -> Callable[[], Stream]:
    """Make a bf16 model into what an arm trains, and say what the arm sends to the engine.

    Args:
        model: changed in place for ``qat`` and ``qat-ffn``.
        arm: ``bf16``, ``noqat``, ``qat`` or ``qat-ffn``.
        policy: the global scale's policy.

    Returns:
        A function that yields the stream of one sync, from the weights of the moment.
    """
    if arm == "bf16":
        return lambda: plain_weights(model)
    config = QATConfig(enable=True, global_scale=policy)
    if arm == "qat-ffn":
        config = replace(config, ignore_patterns=(*config.ignore_patterns, ATTENTION))
    if arm == "noqat":
        quantizer = QATQuantizer(config, QuantPlan.from_model(model, config), layout="fused")
        return lambda: quantizer.quantize(plain_weights(model))
    apply_qat(model, config)
    return lambda: packed_weights(model, layout="fused")


def train_arm(
    base: nn.Module,
    tokenizer: Any,
    task: Task,
    arm: str,
    cfg: DemoConfig,
    log: ArmLog,
    progress: Callable[[Row], None],
    skip: Callable[[int], None],
) -> None:
    """Run one arm from the shared starting weights, or from its checkpoint, to its last step.

    Args:
        base: the starting weights, bf16; not changed.
        tokenizer: of the model.
        task: source of prompts and rewards.
        arm: which experiment.
        cfg: the run.
        log: where rows and checkpoints go; decides where to start.
        progress: called with each new row.
        skip: called with the number of steps that were done before.
    """
    state = log.resume(cfg.steps)
    skip(len(log.rows))
    if len(log.rows) >= cfg.steps:
        return
    model = copy.deepcopy(base)
    stream = prepare_arm(model, arm)
    optimizer = MasterAdamW((p for p in model.parameters() if p.requires_grad), cfg.lr, cfg.weight_decay)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    engine = RolloutEngine(base.config, stop_ids(base, tokenizer))
    flips = FlipTracker()
    engine.load(flips.watch(stream()))
    for step in range(len(log.rows), cfg.steps):
        row = train_step(model, optimizer, engine, task, tokenizer, cfg, step)
        started = time.perf_counter()
        row["sync_bytes"] = engine.load(flips.watch(stream()))
        row |= flips.rate.fractions() if flips.rate is not None else {}
        row["time/sync"] = time.perf_counter() - started
        row["time/step"] = sum(value for name, value in row.items() if name.startswith("time/"))
        log.step(row, {"optimizer": optimizer.state_dict()})
        progress(row)
    log.finish()


def train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    engine: RolloutEngine,
    task: Task,
    tokenizer: Any,
    cfg: DemoConfig,
    step: int,
) -> Row:
    """Roll out, measure the mismatch, update; returns the step's metrics.

    ``reward`` and ``accuracy`` are means over every response drawn, the dropped groups included: over the kept ones
    they could only hover around the middle. If no group is left, the mismatch is measured and nothing is trained.
    """
    clock = [time.perf_counter()]
    kept, drawn, batches = collect(engine, task, tokenizer, cfg, step)
    clock.append(time.perf_counter())
    batch = collate(kept or drawn[: cfg.prompts], tokenizer.pad_token_id)
    old, entropy = old_logprobs(model, batch, cfg)
    mismatch = rollout_metrics(old, batch.rollout_logprobs, batch.mask, rollout_is_threshold=cfg.tis or 2.0)
    clock.append(time.perf_counter())
    trained = update(model, optimizer, batch, old, cfg) if kept else {}
    clock.append(time.perf_counter())
    responses = [graded for group in drawn for graded in group]
    lengths = [len(graded.sample.response) for graded in responses]
    return {
        "step": step,
        "reward": sum(graded.reward for graded in responses) / len(responses),
        "accuracy": sum(graded.correct for graded in responses) / len(responses),
        "entropy": entropy,
        "response_length": sum(lengths) / len(lengths),
        "groups_trained": len(kept),
        "batches_drawn": batches,
        **trained,
        **mismatch,
        "time/rollout": clock[1] - clock[0],
        "time/logprobs": clock[2] - clock[1],
        "time/update": clock[3] - clock[2],
    }


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The token ids that end a response, from the tokenizer and the model's generation settings."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = declared if isinstance(declared, list) else [declared]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}
