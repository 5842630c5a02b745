"""Run an experiment: ``python experiments/run.py experiments/config/dense.yaml``.

Every run is a process of its own (``nvfp4_qat.demo.run_demo`` with one arm), and as many run at a time as there are
GPUs, times ``--per-gpu``. The model is warmed up once before, and what the finished runs kept is measured afterwards
(`measure`). At the end the rows are collected below ``experiments/results/`` (`collect`).

``--minutes`` ends the runs in time; the same command continues them. The exit status is 0 when everything is done, and
3 when there is more to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from collect import collect
from experiment import Experiment, Run

from nvfp4_qat.demo import run_demo
from nvfp4_qat.errors import UserError
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
        deadline = time.monotonic() + args.minutes * 60 if args.minutes else None
        slots = [gpu for _ in range(args.per_gpu) for gpu in args.gpus or _gpus()]
        script = Path(__file__)
        common = [str(args.config), "--out", str(out)]
        if not _ended([*common, "--one", "warm-up"], script, slots[0], out, "warm-up", deadline):
            return UNFINISHED
        if not Pool(slots, common, out, deadline).run(experiment, runs):
            return UNFINISHED
        if experiment.paired or experiment.variants:
            measure = script.with_name("measure.py")
            chosen = [
                "--seeds",
                ",".join(map(str, args.seeds or experiment.seeds)),
                "--runs",
                ",".join(args.runs or ()),
            ]
            if not _ended([*common, *chosen], measure, slots[0], out, "measure", deadline):
                return UNFINISHED
        collect(experiment, out, args.results / experiment.name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
    """Numbers of the GPUs there are; one empty word where there is none, and what is computed stays on the CPU."""
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


def _environment(gpu: str, share: int) -> dict[str, str]:
    """Of a process that sees one GPU and takes its share of the cores."""
    threads = max(1, min(8, (os.cpu_count() or 1) // share))
    seen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    return {**os.environ, **seen, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _start(arguments: list[str], script: Path, gpu: str, share: int, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(gpu, share), start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a process write what it has, and end it with all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ended(arguments: list[str], script: Path, gpu: str, out: Path, name: str, deadline: float | None) -> bool:
    """Run one process to its end; False if there was not enough time.

    Raises:
        UserError: it failed.
    """
    log = out / "logs" / f"{name}.log"
    process = _start(arguments, script, gpu, 1, log)
    try:
        code = process.wait(None if deadline is None else max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _stop(process)
        print(f"{name}: not finished", flush=True)
        return False
    except KeyboardInterrupt:
        _stop(process)
        raise
    if code:
        raise UserError(f"{name} failed; the end of {log}:\n{_tail(log)}")
    print(f"{name}: done", flush=True)
    return True


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@dataclass
class Pool:
    """Runs that take turns on GPUs.

    Args:
        slots: the GPU of each run that can be under way at a time.
        common: arguments that all runs get.
        out: the experiment's directory.
        deadline: of `time.monotonic`; None: there is none.
    """

    slots: list[str]
    common: list[str]
    out: Path
    deadline: float | None

    def run(self, experiment: Experiment, runs: Sequence[Run]) -> bool:
        """Finish runs; False if there was not enough time.

        Raises:
            UserError: one failed. The others have been ended in order.
        """
        waiting = [run for run in runs if not self._finished(experiment, run)]
        free, busy = list(self.slots), dict[str, tuple[subprocess.Popen[bytes], str]]()
        looked = time.monotonic()
        try:
            while waiting or busy:
                while waiting and free:
                    run, gpu = waiting.pop(0), free.pop(0)
                    log = self.out / "logs" / f"{run.key}.log"
                    arguments = [*self.common, "--one", run.key]
                    busy[run.key] = _start(arguments, Path(__file__), gpu, len(self.slots), log), gpu
                time.sleep(0.5)
                for key, (process, gpu) in list(busy.items()):
                    if process.poll() is not None:
                        if process.returncode:
                            raise UserError(f"{key} failed:\n{_tail(self.out / 'logs' / f'{key}.log')}")
                        del busy[key]
                        free.append(gpu)
                if time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    print(" | ".join(self._state(experiment, run) for run in runs), flush=True)
                if self.deadline is not None and time.monotonic() > self.deadline - GRACE:
                    return False
        finally:
            for process, _ in busy.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # all of them first: they end at the same time
            for process, _ in busy.values():
                _stop(process)
            print(" | ".join(self._state(experiment, run) for run in runs), flush=True)
        return True

    def _rows(self, experiment: Experiment, run: Run) -> list[dict[str, Any]]:
        path = self.out / run.key / f"metrics-{experiment.arm(run.name)}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _finished(self, experiment: Experiment, run: Run) -> bool:
        steps = experiment.config(run, self.out).steps
        return len(self._rows(experiment, run)) >= steps and (self.out / run.key / "summary.json").exists()

    def _state(self, experiment: Experiment, run: Run) -> str:
        rows = self._rows(experiment, run)
        if not rows:
            return f"{run.key} –"
        last = rows[-1]
        kl, seconds = last["rollout_corr/k3_kl"], last["time/step"]
        return f"{run.key} {len(rows)} r {last['reward']:+.2f} k3 {kl:.1e} {seconds:.1f}s"


if __name__ == "__main__":
    sys.exit(main())
