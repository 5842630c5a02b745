"""`run_demo`: the arms of `nvfp4_qat.rl` one after the other, from a warmed-up model to a report.

The directory of a run holds

=======================  ==============================================================================
``config.json``          settings, and a digest of the weights to begin from; a resumed run must have the same
``metrics-<arm>.jsonl``  one line a step
``tensorboard/<arm>/``   the same as events
``checkpoint-<arm>.pt``  where to continue; gone once the arm is finished
``weights-<arm>/``       copies of the weights, where ``keep_every`` asks for them
``summary.json``         means and comparisons, renewed after the first step of a command, after each arm and on Ctrl-C
``report.html``          what to look at, with ``curves.png``
=======================  ==============================================================================

A model that begins with random weights is first trained on the task's answers (`nvfp4_qat.warmup`).
"""

import contextlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .alone import alone
from .demo_config import ARMS, PLACEMENT, DemoConfig
from .errors import UserError
from .machine import available_cores, circumstances, versions
from .models import LoadedModel, load_model
from .report import write_report
from .rl import train_arm, trainer_device
from .run_files import read_summary
from .runlog import ArmLog, Row, replace_file
from .starting_weights import KEY, Start, begin, read_config
from .tasks import Task, make_task
from .vllm_engine import facts, require_vllm

WARMUP_COST = 0.25
"""A warm-up step in units of an RL step, for the estimate of the remaining time only."""


def run_demo(cfg: DemoConfig) -> dict[str, Any]:
    """Run or resume an experiment; returns the content of ``summary.json``.

    Args:
        cfg: what to run and where to.

    Raises:
        UserError: a package or a GPU is missing, the directory holds something else or another process works in it, a
            resumed run has other settings or would begin from other weights, or there is no such model or task. Nothing
            has been written then. Or a file of the run or the cache is damaged; no step has been lost then.
        KeyboardInterrupt: passed on after summary and report of the finished steps have been written.
    """
    _check_packages()
    if cfg.rollout == "vllm":
        require_vllm(cfg)
    with contextlib.ExitStack() as held:
        there = cfg.out.is_dir()
        if there:
            held.enter_context(alone(cfg.out))
        _check_directory(cfg)
        task = make_task(cfg.task, cfg.model)
        loaded = load_model(cfg.model, seed=cfg.weights_seed)
        if not there:
            cfg.out.mkdir(parents=True, exist_ok=True)  # not before it is known that there is something to run
            held.enter_context(alone(cfg.out))
            _check_directory(cfg)  # another process may have been here in between
        return _run(cfg, task, loaded)


def _run(cfg: DemoConfig, task: Task, loaded: LoadedModel) -> dict[str, Any]:
    """The arms, and what is left of them, in a directory that is held."""
    logs = {arm: ArmLog(cfg.out, arm, cfg.checkpoint_seconds) for arm in ARMS}  # a resumed run may have more arms
    now, before = circumstances(trainer_device(cfg)), _circumstances(cfg)
    computed = False
    spent = sum(row["time/step"] for log in logs.values() for row in log.rows)
    started = time.monotonic()
    _write_config(cfg, Start.read(cfg.out))

    def conclude(interrupted: bool = False, report: bool = True) -> dict[str, Any]:
        seconds = spent + time.monotonic() - started
        summary = summarize(cfg, task.name, {arm: log.rows for arm, log in logs.items()}, loaded.note, seconds)
        if (start := Start.read(cfg.out)) is not None:
            summary |= start.entry()
        # A run in pieces has several; looking at a finished one again adds none.
        summary["circumstances"] = [*before, now] if now not in before and (computed or not before) else before
        if interrupted:
            summary["interrupted"] = True
        replace_file(cfg.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        if report and any(log.rows for log in logs.values()):
            write_report(cfg.out)
        return summary

    def progress(row: Row) -> None:
        nonlocal computed
        if not computed:
            computed = True
            conclude(interrupted=True, report=False)  # a kill leaves no rows of unknown code
        bar.step(row)

    threads = torch.get_num_threads()
    with _Bar(cfg) as bar:
        try:
            torch.set_num_threads(available_cores())
            if any(len(logs[arm].rows) < cfg.steps for arm in cfg.arms):
                _begin(cfg, loaded, task, any(log.rows for log in logs.values()), bar.warmup)
            bar.end_warmup()
            for arm in cfg.arms:
                bar.arm(arm)
                train_arm(loaded.model, loaded.tokenizer, task, arm, cfg, logs[arm], progress, bar.skip)
                summary = conclude()
        except KeyboardInterrupt:
            conclude(interrupted=True)
            raise
        finally:
            for log in logs.values():
                log.close()
            torch.set_num_threads(threads)
    return summary


def _begin(
    cfg: DemoConfig, loaded: LoadedModel, task: Task, has_rows: bool, progress: Callable[[int, float], None]
) -> None:
    """Bring a model to the weights that all arms begin from, and see that earlier ones did, too."""
    begun = Start.read(cfg.out)
    if has_rows and begun is None:
        raise UserError(
            f"{cfg.out} does not say which weights its arms began from, as versions before this one did not write it: "
            "give another directory"
        )
    earlier = {} if begun is None else {str(cfg.out): begun}
    _write_config(cfg, begin(cfg, loaded, task, earlier, progress))


def _write_config(cfg: DemoConfig, start: Start | None) -> None:
    entries = cfg.identity() | ({} if start is None else start.entry())
    replace_file(cfg.out / "config.json", (json.dumps(entries, indent=2) + "\n").encode())


def _check_packages() -> None:
    """Miss a package now, not when the first arm is finished and its report is to be drawn."""
    needed = ("transformers", "compressed_tensors", "tqdm", "tensorboard", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo needs {', '.join(missing)}: pip install 'nvfp4-qat[demo]'")


def _check_directory(cfg: DemoConfig) -> None:
    """Refuse a directory that is neither empty, nor new, nor the same run's that is to be resumed."""
    identity = json.loads(json.dumps(cfg.identity()))
    if cfg.out.exists() and not cfg.out.is_dir():
        raise UserError(f"{cfg.out} is a file: give another directory")
    occupied = cfg.out.is_dir() and any(cfg.out.iterdir())
    if occupied and not cfg.resume:
        raise UserError(f"{cfg.out} is not empty: give another directory, or continue the run in it with --resume")
    if occupied:
        if not (cfg.out / "config.json").is_file():
            raise UserError(f"{cfg.out} holds no run to resume (no config.json): give another directory")
        saved = read_config(cfg.out)
        names = saved.keys() - {KEY} | identity.keys()
        differing = sorted(name for name in names if saved.get(name) != identity.get(name))
        if differing:
            changes = ", ".join(f"{name}: {saved.get(name)} then, {identity.get(name)} now" for name in differing)
            raise UserError(f"{cfg.out} was begun with other settings ({changes}): use the same or another directory")


def _circumstances(cfg: DemoConfig) -> list[dict[str, Any]]:
    """Those of the pieces of a run that have been computed."""
    found: list[dict[str, Any]] = read_summary(cfg.out).get("circumstances", [])
    return found


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


class _Bar:
    """One progress bar for the whole run, in units of an RL step; what was done before is not part of it."""

    def __init__(self, cfg: DemoConfig) -> None:
        from tqdm import tqdm

        self._arm = ""
        self._steps = cfg.steps
        self._warmup_steps = cfg.warmup_steps
        self._warmed = 0
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
        self.skip((done - self._warmed - 1) * WARMUP_COST)  # steps of an earlier command
        self._bar.update(WARMUP_COST)
        self._warmed = done

    def end_warmup(self) -> None:
        """Take the warm-up steps that were not needed out of the estimate."""
        self.skip((self._warmup_steps - self._warmed) * WARMUP_COST)

    def arm(self, arm: str) -> None:
        """Begin an arm."""
        self._arm = arm

    def step(self, row: Row) -> None:
        """Show a step of the arm."""
        self._bar.set_description_str(f"{self._arm} {row['step'] + 1}/{self._steps}", refresh=False)
        self._bar.set_postfix_str(f"reward {row['reward']:+.3f}, k3 KL {row['rollout_corr/k3_kl']:.1e}", refresh=False)
        self._bar.update(1)
