"""Rollouts: responses sampled from the engine, graded, chosen by dynamic sampling and put into a batch.

A group is all responses to one prompt. One that is all right or all wrong carries no signal, so `collect` draws more
prompts in its place. Prompts and sampling are seeded by the run's seed, the step's number and that of the draw, so a
resumed run sees what the killed one would have seen.

Source of dynamic sampling: DAPO (arXiv 2503.14476).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .demo_config import DemoConfig
from .engine import Sample, SamplingEngine, left_pad
from .grpo import group_advantages, overlong_penalty
from .runlog import Row
from .tasks import EVAL_KEY, Task, encode_prompts


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

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collect(
    engine: SamplingEngine, task: Task, tokenizer: Any, cfg: DemoConfig, step: int
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
        prompts = encode_prompts(tokenizer, problems)
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


def evaluate(engine: SamplingEngine, task: Task, tokenizer: Any, problems: int, samples: int) -> Row:
    """Sample and grade responses to the problems that a task has for evaluations.

    Args:
        engine: with the weights to evaluate, in their precision.
        task: source of problems and grades.
        tokenizer: of the model.
        problems: how many at most.
        samples: responses to each, at temperature 1.

    Returns:
        ``accuracy``, the mean over all responses (avg@samples); ``accuracy_se``, its standard error over problems, no
        two of which are alike, 0 of a single one; ``problems``, how many there were; ``response_length``, the mean in
        tokens.
    """
    counts, length = right_answers(engine, task, tokenizer, problems, samples)
    right = torch.tensor(counts, dtype=torch.float64) / samples
    return {
        "accuracy": float(right.mean()),
        "accuracy_se": float(right.std() / len(right) ** 0.5) if len(right) > 1 else 0.0,
        "problems": len(counts),
        "response_length": length,
    }


def right_answers(
    engine: SamplingEngine, task: Task, tokenizer: Any, problems: int, samples: int
) -> tuple[list[int], float]:
    """The same problem by problem: how many of its responses are right, and the mean length of all."""
    asked = task.evaluation(problems)
    prompts = encode_prompts(tokenizer, asked)
    answers = engine.generate(prompts, samples, task.max_new_tokens, stable_seed(EVAL_KEY))
    right = [
        sum(task.grade(problem, tokenizer.decode(s.response, skip_special_tokens=True)).correct for s in group)
        for problem, group in zip(asked, answers, strict=True)
    ]
    lengths = [len(sample.response) for group in answers for sample in group]
    return right, sum(lengths) / len(lengths)


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


def stable_seed(key: str) -> int:
    """A seed from a text, the same in every process (`hash` is not)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
