"""`run_demo`: the arms of `nvfp4_qat.rl` one after the other, from a warmed-up model to a report.

The directory of a run holds

=======================  ==============================================================================
``config.json``          the settings; a resumed run must have the same
``metrics-<arm>.jsonl``  one line a step
``tensorboard/<arm>/``   the same as events
``checkpoint-<arm>.pt``  where to continue; gone once the arm is finished
``summary.json``         means and comparisons, renewed after each arm and on Ctrl-C
``report.html``          what to look at, with ``curves.png``
=======================  ==============================================================================

A tiny model begins with random weights and is first trained on the task's answers until it is right now and then, which
is where RL can start. The result is kept in the user's cache directory under a name that says what it depends on.
"""

import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from . import __version__
from .demo_config import ARMS, PLACEMENT, DemoConfig
from .engine import Sample
from .errors import UserError
from .masters import MasterAdamW
from .models import load_model
from .policy_update import response_logits
from .report import write_report
from .rl import train_arm
from .rollouts import Batch, Graded, collate
from .runlog import ArmLog, Row, replace_file, save_file
from .tasks import Task, encode_prompt, make_task
from .vllm_engine import facts, require_vllm

WARMUP_COST = 0.25
"""A warm-up step in units of an RL step, for the estimate of the remaining time only."""


def run_demo(cfg: DemoConfig) -> dict[str, Any]:
    """Run or resume an experiment; returns the content of ``summary.json``.

    Args:
        cfg: what to run and where to.

    Raises:
        UserError: a package or a GPU is missing, the directory holds something else, a resumed run has other settings,
            or there is no such model or task. Nothing has been written then.
        KeyboardInterrupt: passed on after summary and report of the finished steps have been written.
    """
    _check_packages()
    if cfg.rollout == "vllm":
        require_vllm(cfg)
    _check_directory(cfg)
    task = make_task(cfg.task, cfg.model)
    logs = {arm: ArmLog(cfg.out, arm, cfg.checkpoint_seconds) for arm in ARMS}  # a resumed run may have more arms
    spent = sum(row["time/step"] for log in logs.values() for row in log.rows)
    started = time.monotonic()
    loaded = load_model(cfg.model, seed=cfg.seed)
    cfg.out.mkdir(parents=True, exist_ok=True)  # not before it is known that there is something to run
    replace_file(cfg.out / "config.json", (json.dumps(cfg.identity(), indent=2) + "\n").encode())

    def conclude(interrupted: bool = False) -> dict[str, Any]:
        seconds = spent + time.monotonic() - started
        summary = summarize(cfg, task.name, {arm: log.rows for arm, log in logs.items()}, loaded.note, seconds)
        if interrupted:
            summary["interrupted"] = True
        replace_file(cfg.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        if any(log.rows for log in logs.values()):
            write_report(cfg.out)
        return summary

    threads = torch.get_num_threads()
    with _Bar(cfg) as bar:
        try:
            torch.set_num_threads(available_cores())
            if not warm_up(loaded.model, loaded.tokenizer, task, cfg, bar.warmup):
                bar.skip(cfg.warmup_steps * WARMUP_COST)
            for arm in cfg.arms:
                bar.arm(arm)
                train_arm(loaded.model, loaded.tokenizer, task, arm, cfg, logs[arm], bar.step, bar.skip)
                summary = conclude()
        except KeyboardInterrupt:
            conclude(interrupted=True)
            raise
        finally:
            for log in logs.values():
                log.close()
            torch.set_num_threads(threads)
    return summary


def _check_packages() -> None:
    """Miss a package now, not when the first arm is finished and its report is to be drawn."""
    needed = ("transformers", "compressed_tensors", "tqdm", "tensorboard", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo needs {', '.join(missing)}: pip install 'nvfp4-qat[demo]'")


def _check_directory(cfg: DemoConfig) -> None:
    """Refuse a directory that is neither empty, nor new, nor the same run's that is to be resumed."""
    path = cfg.out / "config.json"
    identity = json.loads(json.dumps(cfg.identity()))
    if cfg.out.exists() and not cfg.out.is_dir():
        raise UserError(f"{cfg.out} is a file: give another directory")
    occupied = cfg.out.is_dir() and any(cfg.out.iterdir())
    if occupied and not cfg.resume:
        raise UserError(f"{cfg.out} is not empty: give another directory, or continue the run in it with --resume")
    if occupied:
        if not path.is_file():
            raise UserError(f"{cfg.out} holds no run to resume (no config.json): give another directory")
        saved = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in saved.keys() | identity.keys() if saved.get(name) != identity.get(name))
        if differing:
            changes = ", ".join(f"{name}: {saved.get(name)} then, {identity.get(name)} now" for name in differing)
            raise UserError(f"{cfg.out} was begun with other settings ({changes}): use the same or another directory")


# --- warm-up ---------------------------------------------------------------------------------------------------------


def warm_up(model: Any, tokenizer: Any, task: Task, cfg: DemoConfig, progress: Callable[[int, float], None]) -> bool:
    """Train a model in place on the task's answers, or take the result of an earlier run from the cache.

    Args:
        model: bf16, with the random weights that ``cfg.seed`` gives.
        tokenizer: of the model.
        task: its problems' answers are the targets.
        cfg: number of steps, batch and learning rate.
        progress: called with the number of finished steps and the loss.

    Returns:
        Whether there was anything to train.
    """
    if cfg.warmup_steps == 0:
        return False
    path = _warmup_file(cfg, task, model)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return False
    optimizer = MasterAdamW(model.parameters(), cfg.warmup_lr, weight_decay=0.01)
    for step in range(cfg.warmup_steps):
        rise, fall = (step + 1) / min(50, cfg.warmup_steps), 1 - step / cfg.warmup_steps
        optimizer.set_lr(cfg.warmup_lr * min(rise, max(fall, 0.1)))
        batch = _answers(tokenizer, task, cfg.warmup_batch, f"warmup/{cfg.seed}/{step}")
        logits = response_logits(model, batch)[batch.mask]
        loss = F.cross_entropy(logits, batch.ids[:, -batch.mask.shape[1] :][batch.mask])
        loss.backward()
        optimizer.accumulate()
        optimizer.clip(1.0)
        optimizer.step()
        progress(step + 1, float(loss.detach()))
    save_file(path, model.state_dict())
    return True


def _answers(tokenizer: Any, task: Task, count: int, key: str) -> Batch:
    """Problems with their right answers in the place of sampled responses."""
    group = []
    for problem in task.problems(count, key):
        answer = [*tokenizer(problem.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        group.append(Graded(Sample(encode_prompt(tokenizer, problem), answer, [0.0] * len(answer)), 0.0, True))
    return collate([group], tokenizer.pad_token_id)


def _warmup_file(cfg: DemoConfig, task: Task, model: Any) -> Path:
    """A path in the cache that is named by all that the warmed-up weights follow from."""
    ingredients = {
        "model": model.config.to_dict(),
        "task": repr(task),
        "steps": cfg.warmup_steps,
        "batch": cfg.warmup_batch,
        "lr": cfg.warmup_lr,
        "seed": cfg.seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvfp4_qat"
    return (cfg.cache or home) / f"warmup-{cfg.model}-{digest}.pt"


# --- what is reported ------------------------------------------------------------------------------------------------


def summarize(cfg: DemoConfig, task: str, rows: dict[str, Sequence[Row]], note: str, seconds: float) -> dict[str, Any]:
    """Return what ``summary.json`` holds.

    Args:
        cfg: the run.
        task: the task's name.
        rows: each arm's steps.
        note: what must be known about the model.
        seconds: wall time of the run, over all its resumptions.
    """
    arms = {arm: summarize_arm(arm_rows, cfg.steps) for arm, arm_rows in rows.items() if arm_rows}

    def ratio(above: str, below: str) -> float | None:
        numbers = [arms[arm]["k3_kl_mean"] for arm in (above, below) if arm in arms]
        return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] > 0 else None

    vllm = cfg.rollout == "vllm"
    return {
        "model": cfg.model,
        "task": task,
        "steps": cfg.steps,
        "arms": arms,
        "k3_kl_ratios": {"noqat/qat": ratio("noqat", "qat"), "qat/bf16": ratio("qat", "bf16")},
        "note": note,
        "config": cfg.identity(),
        **({"engine": {name: getattr(cfg, name) for name in PLACEMENT}} if vllm else {}),
        "versions": versions() | (facts() if vllm else {}),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }


def summarize_arm(rows: Sequence[Row], steps: int) -> dict[str, Any]:
    """Return means over an arm's steps, and the reward of the first and last quarter of them with its standard error.

    Args:
        rows: at least one step.
        steps: planned steps, a quarter of which makes a quarter.

    Returns:
        A dict of numbers; ``reward_rise_in_standard_errors`` is the rise from the first to the last quarter over the
        standard error of the difference of two means, None where a quarter has a single step.
    """

    def mean(key: str) -> float:
        return float(sum(row[key] for row in rows)) / len(rows)

    quarter = max(steps // 4, 1)
    first, first_error = _mean_and_error([row["reward"] for row in rows[:quarter]])
    last, last_error = _mean_and_error([row["reward"] for row in rows[-quarter:]])
    error = None if first_error is None or last_error is None else math.hypot(first_error, last_error)
    return {
        "steps": len(rows),
        "k3_kl_mean": mean("rollout_corr/k3_kl"),
        "kl_mean": mean("rollout_corr/kl"),
        "logprob_abs_diff_mean": mean("rollout_corr/logprob_abs_diff"),
        "reward_first": first,
        "reward_first_se": first_error,
        "reward_last": last,
        "reward_last_se": last_error,
        "reward_rise_in_standard_errors": (last - first) / error if error else None,
        "accuracy_mean": mean("accuracy"),
        "sync_bytes": rows[-1]["sync_bytes"],
        **_syncs(rows),
        "seconds": round(sum(row["time/step"] for row in rows), 1),
    }


def _syncs(rows: Sequence[Row]) -> dict[str, Any]:
    """Median seconds and last version, of an engine that tells them."""
    told = [row for row in rows if "sync_version" in row]
    if not told:
        return {}
    seconds = statistics.median(row["sync_seconds"] for row in told)
    return {"sync_seconds_median": seconds, "sync_version_last": told[-1]["sync_version"]}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("torch", "transformers", "compressed-tensors")
    own = {"python": platform.python_version(), "nvfp4-qat": __version__}
    return own | {name: metadata.version(name) for name in packages}


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of a container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return min(cores, int(limit))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, _, period = quota.read_text().strip().partition(" ")
        if allowed.isdigit() and period.isdigit():
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores


class _Bar:
    """One progress bar for the whole run, in units of an RL step; what was done before is not part of it."""

    def __init__(self, cfg: DemoConfig) -> None:
        from tqdm import tqdm

        self._arm = ""
        self._steps = cfg.steps
        self._warmup_steps = cfg.warmup_steps
        self._bar = tqdm(
            total=cfg.warmup_steps * WARMUP_COST + len(cfg.arms) * cfg.steps,
            disable=not cfg.progress,
            bar_format="{desc:<14}{percentage:4.0f}% |{bar}| {elapsed} so far, {remaining} to go{postfix}",
            # A log file gets a line now and then; a terminal is drawn over.
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, units: float) -> None:
        """Take work that need not be done out of the estimate."""
        self._bar.total -= units

    def warmup(self, done: int, loss: float) -> None:
        """Show a warm-up step."""
        self._bar.set_description_str(f"warm-up {done}/{self._warmup_steps}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bar.update(WARMUP_COST)

    def arm(self, arm: str) -> None:
        """Begin an arm."""
        self._arm = arm

    def step(self, row: Row) -> None:
        """Show a step of the arm."""
        self._bar.set_description_str(f"{self._arm} {row['step'] + 1}/{self._steps}", refresh=False)
        self._bar.set_postfix_str(f"reward {row['reward']:+.3f}, k3 KL {row['rollout_corr/k3_kl']:.1e}", refresh=False)
        self._bar.update(1)
