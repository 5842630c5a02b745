"""Supervised training before RL, for models that begin with random weights.

RL can only start where a model is right now and then. `warm_up` trains it on a task's own answers, for a number of
steps or until a right answer is sampled with a given chance, and keeps the result in the user's cache directory under a
name that says what it depends on.

A warm-up that is interrupted or killed is continued (`nvfp4_qat.warmup_partial`). Every batch is seeded by its step's
number, so what is left comes out as it would have. Of processes that want the same one the first makes it, and the
others wait.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .alone import in_turn
from .damaged import read_saved
from .demo_config import DemoConfig
from .engine import Sample
from .machine import versions
from .masters import MasterAdamW
from .policy_update import response_logits, response_logprobs
from .rollouts import Batch, Graded, collate
from .runlog import save_file
from .tasks import Task, encode_prompts
from .warmup_partial import Partial, partial_file

LOOK_EVERY = 50
"""Steps between two looks at the chance of a right answer."""

HELD_OUT = 256
"""Problems that it is measured on."""

FLOOR = 0.1
"""Of the peak learning rate, where it falls to over a fixed number of steps."""


def warm_up(
    model: Any,
    tokenizer: Any,
    task: Task,
    cfg: DemoConfig,
    progress: Callable[[int, float], None],
    device: torch.device | str = "cpu",
) -> bool:
    """Train a model in place on the task's answers, or take the result of an earlier run from the cache.

    Args:
        model: bf16, on the CPU, with the random weights that the run's model seed gives; it is there again afterwards.
        tokenizer: of the model.
        task: its problems' answers are the targets.
        cfg: number of steps, batch, learning rate and when to end.
        progress: called with the number of finished steps and the loss.
        device: where to compute.

    Returns:
        Whether there was anything to train.

    Raises:
        UserError: what is in the cache is damaged.
        KeyboardInterrupt: passed on after what is finished has been saved.
    """
    if cfg.warmup_steps == 0:
        return False
    device = torch.device(device)
    path = warmup_file(cfg, task, model, device)
    if _is_loaded(model, path):
        return False
    with in_turn(path):  # a second result, not quite the same, would replace the one that runs have begun from
        if _is_loaded(model, path):
            return False
        _train(model, tokenizer, task, cfg, progress, device, path)
    return True


def _is_loaded(model: Any, path: Path) -> bool:
    """Take the result of an earlier warm-up, where there is one."""
    if not path.is_file():
        return False
    weights = read_saved(path, set(model.state_dict()), "delete it; the warm-up is made again")
    partial_file(path).unlink(missing_ok=True)  # of a process that was killed between the two
    model.load_state_dict(weights)
    return True


def _train(
    model: Any,
    tokenizer: Any,
    task: Task,
    cfg: DemoConfig,
    progress: Callable[[int, float], None],
    device: torch.device,
    path: Path,
) -> None:
    """Make a warm-up, or what is left of it, and keep its result."""
    model.to(device)
    held_out = _answers(tokenizer, task, HELD_OUT, f"held-out/{cfg.weights_seed}").to(device)
    optimizer = MasterAdamW(model.parameters(), cfg.warmup_lr, weight_decay=0.01)
    partial = Partial(path, optimizer, cfg.checkpoint_seconds)
    with partial.saved_on_interrupt():
        for step in range(partial.done, cfg.warmup_steps):
            if _is_enough(model, held_out, step, cfg):
                break
            optimizer.set_lr(cfg.warmup_lr * _schedule(step, cfg))
            batch = _answers(tokenizer, task, cfg.warmup_batch, f"warmup/{cfg.weights_seed}/{step}").to(device)
            logits = response_logits(model, batch)[batch.mask]
            loss = F.cross_entropy(logits, batch.ids[:, -batch.mask.shape[1] :][batch.mask])
            loss.backward()
            optimizer.accumulate()
            optimizer.clip(1.0)
            with partial.update(step):
                optimizer.step()
            progress(step + 1, float(loss.detach()))
        model.to("cpu")
        save_file(path, model.state_dict())
    partial_file(path).unlink(missing_ok=True)


def _is_enough(model: Any, held_out: Batch, step: int, cfg: DemoConfig) -> bool:
    """Whether a right answer is sampled often enough, where a look is due before this step."""
    if cfg.warmup_until is None or step == 0 or step % LOOK_EVERY:
        return False
    return chance_of_right(model, held_out) >= cfg.warmup_until


@torch.no_grad()
def chance_of_right(model: Any, answers: Batch) -> float:
    """The chance that a whole answer is sampled as it is written, on average over a batch of them.

    A lower bound of the accuracy where several texts are right.
    """
    logprobs: Tensor = response_logprobs(model, answers).masked_fill(~answers.mask, 0.0)
    return float(logprobs.sum(1).exp().mean())


def _schedule(step: int, cfg: DemoConfig) -> float:
    """The learning rate of a step, in units of its peak."""
    rise = (step + 1) / min(50, cfg.warmup_steps)
    fall = 1.0 if cfg.warmup_until is not None else max(1 - step / cfg.warmup_steps, FLOOR)
    return min(rise, fall)


def _answers(tokenizer: Any, task: Task, count: int, key: str) -> Batch:
    """Problems with their right answers in the place of sampled responses."""
    problems = task.problems(count, key)
    prompts = encode_prompts(tokenizer, problems)
    answers = tokenizer([problem.answer for problem in problems], add_special_tokens=False).input_ids
    group = []
    for prompt, ids in zip(prompts, answers, strict=True):
        answer = [*ids, tokenizer.eos_token_id]
        group.append(Graded(Sample(prompt, answer, [0.0] * len(answer)), 0.0, True))
    return collate([group], tokenizer.pad_token_id)


def warmup_file(cfg: DemoConfig, task: Task, model: Any, device: torch.device) -> Path:
    """A path in the cache that is named by all that the warmed-up weights follow from."""
    ingredients = {
        "model": model.config.to_dict(),
        "task": repr(task),
        "steps": cfg.warmup_steps,
        "until": cfg.warmup_until,
        "batch": cfg.warmup_batch,
        "lr": cfg.warmup_lr,
        "seed": cfg.weights_seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads(),
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvfp4_qat"
    return (cfg.cache or home) / f"warmup-{cfg.model}-{digest}.pt"
