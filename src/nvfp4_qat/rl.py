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

What samples is either the engine of `nvfp4_qat.engine`, on the CPU like the trainer then, or vLLM
(`nvfp4_qat.vllm_engine`), with the trainer on a GPU. Both take the same streams.

A step's row also holds ``eval/*``, of the weights that the step begins with, where the run's settings ask for it, and
the last one ``eval_end/*``, of those it ends with.

Here are the arms and the loop. The steps 1 and 2 are `nvfp4_qat.rollouts`, the trainer's part of 3 and 4 is
`nvfp4_qat.policy_update`, and the formulas with their sources are in `nvfp4_qat.grpo`.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import QATConfig
from .core import apply_qat, qat_plan
from .demo_config import TRAINER_GPU, DemoConfig
from .engine import RolloutEngine, SamplingEngine
from .grpo import group_advantages, overlong_penalty, policy_loss
from .masters import MasterAdamW
from .metrics import FlipTracker, rollout_metrics
from .plan import QuantPlan
from .policy_update import old_logprobs, response_logits, response_logprobs, update
from .quantizer import QATQuantizer, packed_weights
from .rollouts import Batch, Graded, Group, collate, collect, evaluate, stable_seed
from .runlog import ArmLog, Row
from .tasks import Task

__all__ = [
    "ATTENTION",
    "Batch",
    "Graded",
    "Group",
    "Stream",
    "arm_plan",
    "collate",
    "collect",
    "group_advantages",
    "old_logprobs",
    "overlong_penalty",
    "plain_weights",
    "policy_loss",
    "prepare_arm",
    "response_logits",
    "response_logprobs",
    "stable_seed",
    "stop_ids",
    "train_arm",
    "train_step",
    "update",
]

Stream = Iterator[tuple[str, Tensor]]
ATTENTION = "re:.*self_attn.*"


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
    config = _arm_config(arm, policy)
    if arm == "noqat":
        quantizer = QATQuantizer(config, QuantPlan.from_model(model, config), layout="fused")
        return lambda: quantizer.quantize(plain_weights(model))
    apply_qat(model, config)
    return lambda: packed_weights(model, layout="fused")


def arm_plan(model: nn.Module, arm: str, policy: str = "pow2") -> QuantPlan:
    """What of an arm's stream is 4-bit.

    Args:
        model: after `prepare_arm`.
        arm, policy: as there.
    """
    if arm.startswith("qat"):
        return qat_plan(model)
    plan = QuantPlan.from_model(model, _arm_config(arm, policy))
    return plan.unquantized() if arm == "bf16" else plan


def _arm_config(arm: str, policy: str) -> QATConfig:
    config = QATConfig(enable=True, global_scale=policy)
    if arm == "qat-ffn":
        config = replace(config, ignore_patterns=(*config.ignore_patterns, ATTENTION))
    return config


def trainer_device(cfg: DemoConfig) -> torch.device:
    """Where the trainer computes: on a GPU where vLLM samples on one."""
    return torch.device(TRAINER_GPU if cfg.rollout == "vllm" else "cpu")


def start_engine(model: nn.Module, plan: QuantPlan, stops: set[int], cfg: DemoConfig) -> SamplingEngine:
    """Start what samples; it has no weights to speak of before its first `load`.

    Args:
        model: in training, after `apply_qat` or not, on `trainer_device`.
        plan: what of the streams of `load` is 4-bit (`arm_plan`).
        stops: token ids that end a response.
        cfg: which engine.
    """
    if cfg.rollout == "builtin":
        return RolloutEngine(model.config, stops)
    from .vllm_engine import VllmEngine

    return VllmEngine(model, plan, stops, cfg)


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
    model = copy.deepcopy(base).to(trainer_device(cfg))
    stream = prepare_arm(model, arm)
    optimizer = MasterAdamW((p for p in model.parameters() if p.requires_grad), cfg.lr, cfg.weight_decay)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    flips = FlipTracker()
    with contextlib.closing(start_engine(model, arm_plan(model, arm), stop_ids(base, tokenizer), cfg)) as engine:
        engine.load(stream())
        flips.count(stream())
        for step in range(len(log.rows), cfg.steps):
            if _is_due(cfg.keep_every, step):
                log.keep(step, dict(plain_weights(model)))
            row = _evaluated("eval", engine, task, tokenizer, cfg) if _is_due(cfg.eval_every, step) else {}
            row |= train_step(model, optimizer, engine, task, tokenizer, cfg, step)
            started = time.perf_counter()
            row |= engine.load(stream()).figures()
            row["time/sync"] = time.perf_counter() - started
            row |= flips.count(stream())  # on its own: counting is no part of a sync
            row["time/step"] = sum(value for name, value in row.items() if name.startswith("time/"))
            if step == cfg.steps - 1:
                row |= _evaluated("eval_end", engine, task, tokenizer, cfg) if cfg.eval_every else {}
                if cfg.keep_every:
                    log.keep(cfg.steps, dict(plain_weights(model)))
            log.step(row, {"optimizer": optimizer.state_dict()})
            progress(row)
    log.finish()


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _evaluated(prefix: str, engine: SamplingEngine, task: Task, tokenizer: Any, cfg: DemoConfig) -> Row:
    found = evaluate(engine, task, tokenizer, cfg.eval_problems, cfg.eval_samples)
    return {f"{prefix}/{name}": value for name, value in found.items()}


def train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    engine: SamplingEngine,
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
    engine.sleep()
    clock.append(time.perf_counter())
    batch = collate(kept or drawn[: cfg.prompts], tokenizer.pad_token_id).to(trainer_device(cfg))
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
        "time/sleep": clock[2] - clock[1],
        "time/logprobs": clock[3] - clock[2],
        "time/update": clock[4] - clock[3],
    }


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The token ids that end a response, from the tokenizer and the model's generation settings."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = declared if isinstance(declared, list) else [declared]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}
