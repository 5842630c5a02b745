"""Run an experiment: ``python experiments/run.py experiments/config/dense.yaml``.

Every run is a process of its own (``nvfp4_qat.demo.run_demo`` with one arm), and as many run at a time as there are
GPUs, times ``--per-gpu``. The model is warmed up once before, and what the finished runs kept is measured afterwards
(`measure`). At the end the rows are collected below ``experiments/results/`` (`collect`).

``--minutes`` ends the runs in time; the same command continues them. The exit status is 0 when everything is done, and
3 when there is more to do.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from collect import collect
from experiment import Experiment, Run
from measure import measured_file
from rows import read

from nvfp4_qat.demo import run_demo
from nvfp4_qat.errors import UserError
from nvfp4_qat.machine import commit
from nvfp4_qat.models import load_model
from nvfp4_qat.rl import trainer_device
from nvfp4_qat.tasks import make_task
from nvfp4_qat.warmup import warm_up

UNFINISHED = 3
"""Exit status of a command that has to be given again."""

GRACE = 40.0
"""Seconds that a run has to write its summary and end its engine."""

LOOK_EVERY = 20.0
"""Seconds between two lines about the runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        experiment = Experiment.load(args.config)
        out: Path = args.out or Path("runs") / experiment.name
        if args.one is not None:
            return _one(experiment, out, args.one)
        runs = experiment.chosen(args.runs, args.seeds)
        deadline = time.monotonic() + args.minutes * 60 if args.minutes else math.inf
        pool = Pool([gpu for _ in range(args.per_gpu) for gpu in args.gpus or _gpus()], out, deadline)
        done = all(pool.finish(tasks, say) for tasks, say in _stages(experiment, runs, args.config, out))
        collect(experiment, out, args.results / experiment.name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if done else UNFINISHED


def _stages(
    experiment: Experiment, runs: Sequence[Run], config: Path, out: Path
) -> Iterator[tuple[list[Task], Callable[[], str]]]:
    """What has to be finished before the next begins, and what is told meanwhile."""
    script, common = Path(__file__).resolve(), [str(config), "--out", str(out)]
    yield [Task("warm-up", script, [*common, "--one", "warm-up"])], lambda: "warm-up"
    waiting = [run for run in runs if not _finished(experiment, run, out)]
    tasks = [Task(run.key, script, [*common, "--one", run.key]) for run in waiting]
    yield tasks, lambda: " | ".join(_state(experiment, run, out) for run in runs)
    if experiment.paired or experiment.variants:
        names, measure = ",".join(dict.fromkeys(run.name for run in runs)), script.with_name("measure.py")
        seeds = list(dict.fromkeys(run.seed for run in runs))
        which = {seed: [*common, "--runs", names, "--seeds", str(seed)] for seed in seeds}
        told = [measured_file(out, seed) for seed in seeds]
        yield (
            [Task(f"measure-s{seed}", measure, which[seed]) for seed in seeds],
            lambda: " | ".join(f"{path.stem} {len(read(path))} rows" for path in told),
        )


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> tuple[str, ...] | None:
        return tuple(part for part in text.split(",") if part) or None

    def numbers(text: str) -> tuple[int, ...] | None:
        return tuple(int(part) for part in text.split(",") if part) or None

    parser = argparse.ArgumentParser(description="Run an experiment, or continue it.")
    parser.add_argument("config", type=Path, help="a file of experiments/config")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs keep what they need (default: runs/NAME)")
    here = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=here, metavar="DIR", help="where rows go at the end")
    parser.add_argument("--runs", type=words, help="some of the file's runs, by commas")
    parser.add_argument("--seeds", type=numbers, help="some of its seeds, by commas")
    parser.add_argument("--gpus", type=words, help="numbers of the GPUs to use (default: all)")
    parser.add_argument("--per-gpu", type=int, default=1, metavar="N", help="runs at a time on a GPU (default: 1)")
    parser.add_argument("--minutes", type=float, metavar="X", help="end in time; the same command goes on")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what the processes are told that are started here
    return parser


def _gpus() -> list[str]:
    """The GPUs that this process may use; one empty word where there is none, and what is computed stays on the CPU."""
    if visible := [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]:
        return visible
    return [str(i) for i in range(torch.cuda.device_count())] or [""]


# --- in a process of its own -----------------------------------------------------------------------------------------


def _one(experiment: Experiment, out: Path, key: str) -> int:
    """The warm-up, or one run."""
    runs = {run.key: run for run in experiment.chosen(None, None)}
    if key != "warm-up":
        run = runs.get(key) or Run(*_split(key))
        run_demo(experiment.config(run, out))
        return 0
    cfg = experiment.config(next(iter(runs.values())), out)
    loaded = load_model(cfg.model, seed=cfg.weights_seed)
    started = time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"warm-up: {step} steps, loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)

    warm_up(loaded.model, loaded.tokenizer, make_task(cfg.task, cfg.model), cfg, progress, trainer_device(cfg))
    return 0


def _split(key: str) -> tuple[str, int]:
    name, _, seed = key.rpartition("-s")
    return name, int(seed)


# --- and around them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A process: its name, which its log has too, a script, and the script's arguments."""

    name: str
    script: Path
    arguments: list[str]


@dataclass
class Pool:
    """Processes that take turns on GPUs.

    Args:
        slots: the GPU of each that can be under way at a time.
        out: the experiment's directory.
        deadline: of `time.monotonic`.
    """

    slots: list[str]
    out: Path
    deadline: float

    def finish(self, tasks: Sequence[Task], say: Callable[[], str]) -> bool:
        """Run processes to their ends; False if there was not enough time.

        Args:
            tasks: in the order in which they start.
            say: what to print now and then.

        Raises:
            UserError: one failed. The others have been ended in order.
        """
        waiting, free, busy = list(tasks), list(self.slots), dict[str, tuple[subprocess.Popen[bytes], str]]()
        looked = time.monotonic()
        try:
            while waiting or busy:
                if time.monotonic() > self.deadline - GRACE:
                    return False
                while waiting and free:
                    task, gpu = waiting.pop(0), free.pop(0)
                    busy[task.name] = self._started(task, gpu), gpu
                time.sleep(0.5)
                for name, (process, gpu) in list(busy.items()):
                    if process.poll() is not None:
                        del busy[name]
                        free.append(gpu)
                        if process.returncode:
                            log = self._log(name)
                            raise UserError(f"{name} failed; the end of {log}:\n{_tail(log)}")
                if time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    print(say(), flush=True)
        finally:
            for process, _ in busy.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # all of them first: they end at the same time
            for process, _ in busy.values():
                _stop(process)
            print(say(), flush=True)
        return True

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def _started(self, task: Task, gpu: str) -> subprocess.Popen[bytes]:
        log = self._log(task.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, min(8, (os.cpu_count() or 1) // len(self.slots)))
        seen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        # Told to them, as an installed package does not know its commit.
        told = {"NVFP4_QAT_COMMIT": commit(Path(__file__).resolve().parent.parent) or ""}
        environment = {**os.environ, **seen, **told, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(task.script), *task.arguments]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a process write what it has, and end it with all that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _rows(experiment: Experiment, run: Run, out: Path) -> list[dict[str, Any]]:
    return read(out / run.key / f"metrics-{experiment.arm(run.name)}.jsonl")


def _finished(experiment: Experiment, run: Run, out: Path) -> bool:
    steps = experiment.config(run, out).steps
    return len(_rows(experiment, run, out)) >= steps and (out / run.key / "summary.json").exists()


def _state(experiment: Experiment, run: Run, out: Path) -> str:
    rows = _rows(experiment, run, out)
    if not rows:
        return f"{run.key} –"
    last = rows[-1]
    kl, seconds = last["rollout_corr/k3_kl"], last["time/step"]
    return f"{run.key} {len(rows)} r {last['reward']:+.2f} k3 {kl:.1e} {seconds:.1f}s"


if __name__ == "__main__":
    sys.exit(main())
