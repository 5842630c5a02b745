"""Run an experiment: ``python experiments/run.py experiments/config/dense.yaml``.

Every run is a process of its own (``nvfp4_qat.demo.run_demo`` with one arm), and as many run at a time as there are
GPUs, times ``--per-gpu``. The model is warmed up once before, and what the finished runs kept is measured afterwards
(`measure`). However a command ends, the rows that are there are collected below ``experiments/results/`` (`collect`).

``--minutes`` ends the runs in time, as Ctrl-C and SIGTERM do at any time; the same command continues them. The exit
status is 0 when everything is done, and 3 when there is more to do.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from collect import collect, sharing_file
from experiment import Experiment, Run
from measure import KINDS, measured_file, unmeasured
from pool import SHARED, Interrupts, Pool, Task, follow
from rows import read
from starts import check_starts, warm_up_all

from nvfp4_qat.alone import alone
from nvfp4_qat.demo import run_demo
from nvfp4_qat.demo_config import DemoConfig
from nvfp4_qat.errors import UserError
from nvfp4_qat.jsonl import append_rows
from nvfp4_qat.run_files import read_summary
from nvfp4_qat.starting_weights import Start

UNFINISHED = 3
"""Exit status of a command that has to be given again."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        experiment = Experiment.load(args.config)
        out: Path = args.out or Path("runs") / experiment.name
        if args.one is not None:
            return _one(experiment, experiment.chosen(args.runs, args.seeds), out, args.one)
        with Interrupts() as interrupts:
            try:
                return _all(experiment, out, args, interrupts)
            except KeyboardInterrupt:
                print("interrupted; the same command goes on", file=sys.stderr)
                return 128 + (interrupts.came or signal.SIGINT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _all(experiment: Experiment, out: Path, args: argparse.Namespace, interrupts: Interrupts) -> int:
    runs = experiment.chosen(args.runs, args.seeds)
    _require(experiment, runs, out)
    deadline = time.monotonic() + args.minutes * 60 if args.minutes else math.inf
    slots = [gpu for _ in range(args.per_gpu) for gpu in args.gpus or _gpus()]
    pool, done, results = Pool(slots, out, deadline, interrupts), True, args.results / experiment.name
    for tasks, say in _stages(experiment, runs, args.config, out):
        check_starts(experiment, runs, out)
        try:
            done = done and pool.finish(tasks, say)
        except (KeyboardInterrupt, UserError):
            with suppress(UserError):  # of two reasons the first one is told
                check_starts(experiment, runs, out)
                collect(experiment, out, results, runs)
            raise
    check_starts(experiment, runs, out)
    collect(experiment, out, results, runs)
    if done and (lost := unmeasured(experiment, out, runs)):
        raise UserError(
            f"{', '.join(lost)}: not measured, and the weights after the last step are not in {out}: bring back what "
            "these runs kept (weights-*), or remove their directories and give the command again"
        )
    return 0 if done else UNFINISHED


def _require(experiment: Experiment, runs: Sequence[Run], out: Path) -> None:
    """Say what is missing before a process is started that would not find it."""
    if not any(experiment.config(run, out).rollout == "vllm" for run in runs):
        return
    if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
        raise UserError(
            "these runs need an NVIDIA GPU and vLLM: pip install '.[vllm,demo]' on a machine with an H100 or H200"
        )


def _stages(
    experiment: Experiment, runs: Sequence[Run], config: Path, out: Path
) -> Iterator[tuple[list[Task], Callable[[], str]]]:
    """What has to be finished before the next begins, and what is told meanwhile."""
    script, common = Path(__file__).resolve(), [str(config), "--out", str(out)]
    waiting = [run for run in runs if not _finished(experiment, run, out)]
    for folder in (out / run.key for run in waiting):
        if folder.is_dir():
            with alone(folder):  # said now and not by a process among others, which all would be ended for it
                pass
    if any(_has_to_warm_up(experiment.config(run, out)) for run in waiting):
        named = ["--runs", ",".join(dict.fromkeys(run.name for run in waiting))]
        yield [Task("warm-up", script, [*common, *named, "--one", "warm-up"])], lambda: "warm-up"
    tasks = [Task(run.key, script, [*common, "--one", run.key]) for run in waiting]
    yield tasks, lambda: " | ".join(_state(experiment, run, out) for run in runs)
    if experiment.paired or experiment.variants:
        names, measure = ",".join(dict.fromkeys(run.name for run in runs)), script.with_name("measure.py")
        seeds = list(dict.fromkeys(run.seed for run in runs))
        which = [(seed, kind) for seed in seeds for kind in KINDS]
        told = [measured_file(out, seed, kind) for seed, kind in which]
        arguments = [[*common, "--runs", names, "--seeds", str(seed), "--kinds", kind] for seed, kind in which]
        yield (
            [Task(f"measure-{kind}-s{seed}", measure, a) for (seed, kind), a in zip(which, arguments, strict=True)],
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


def _one(experiment: Experiment, runs: Sequence[Run], out: Path, key: str) -> int:
    """The warm-up of some runs, or one run."""
    follow()
    if key == "warm-up":
        warm_up_all(experiment, runs, out)
    else:
        run = Run(*_split(key))
        _note_sharing(sharing_file(out, key), bool(_rows(experiment, run, out)))
        run_demo(experiment.config(run, out))
    return 0


def _note_sharing(file: Path, begun: bool) -> None:
    """Add how many runs share the GPU to what was noted for the run's earlier pieces."""
    if not begun:
        file.unlink(missing_ok=True)  # of a run that was taken away
    told = os.environ.get(SHARED, "")
    pieces = [None] if begun and not file.exists() else []  # begun by a version that noted nothing
    append_rows(file, [{"runs_on_gpu": count} for count in [*pieces, int(told) if told else None]])


def _split(key: str) -> tuple[str, int]:
    name, _, seed = key.rpartition("-s")
    return name, int(seed)


# --- what runs have left ----------------------------------------------------------------------------------------------


def _rows(experiment: Experiment, run: Run, out: Path) -> list[dict[str, Any]]:
    return read(out / run.key / f"metrics-{experiment.arm(run.name)}.jsonl")


def _finished(experiment: Experiment, run: Run, out: Path) -> bool:
    """Whether all steps have been made, and a summary written that knows of them."""
    steps = experiment.config(run, out).steps
    told = read_summary(out / run.key).get("arms", {}).get(experiment.arm(run.name)) or {}
    return len(_rows(experiment, run, out)) >= steps and told.get("steps", 0) >= steps


def _has_to_warm_up(cfg: DemoConfig) -> bool:
    """Whether a run may find no warmed-up weights. One that has begun says which, and sees that it gets them."""
    if not cfg.warmup_steps:
        return False
    start = Start.read(cfg.out)
    return start is None or start.file is None or cfg.cache is None or not (cfg.cache / start.file).is_file()


def _state(experiment: Experiment, run: Run, out: Path) -> str:
    rows = _rows(experiment, run, out)
    if not rows:
        return f"{run.key} –"
    last = rows[-1]
    kl, seconds = last["rollout_corr/k3_kl"], last["time/step"]
    return f"{run.key} {len(rows)} r {last['reward']:+.2f} k3 {kl:.1e} {seconds:.1f}s"


if __name__ == "__main__":
    sys.exit(main())
