"""Runs that are compared begin from the same weights (`nvfp4_qat.starting_weights`): what an experiment's runs say.

A run refuses to be continued from other weights; here the runs are held against each other, before time is spent on
them and before anything is measured or collected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from experiment import Experiment, Run

from nvfp4_qat.demo_config import DemoConfig
from nvfp4_qat.machine import available_cores
from nvfp4_qat.models import load_model
from nvfp4_qat.starting_weights import Start, begin, check_same
from nvfp4_qat.tasks import make_task


def check_starts(experiment: Experiment, runs: Sequence[Run], out: Path) -> None:
    """See that all runs that have been made began from the same weights.

    Args:
        experiment: whose.
        runs: some that need not be among the file's, as they have other seeds.
        out: the experiment's directory.

    Raises:
        UserError: some did not; the message says which, and how to mend it.
    """
    for group in _groups(experiment, runs, out):
        check_same(_said(group, out), out / "cache" / "warm-up")


def warm_up_all(experiment: Experiment, runs: Sequence[Run], out: Path) -> None:
    """Bring the weights that runs begin from into the cache.

    Args:
        experiment: whose.
        runs: these.
        out: the experiment's directory.

    Raises:
        UserError: other runs of the experiment began from others.
    """
    torch.set_num_threads(available_cores())  # as a run does, by which the cache's file is named too
    for group in _groups(experiment, runs, out):
        if wanted := [run for run in group if run in runs]:
            _warm_up(experiment.config(wanted[0], out), _said(group, out))


def _warm_up(cfg: DemoConfig, earlier: dict[str, Start]) -> None:
    started = time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"warm-up: {step} steps, loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)

    begin(cfg, load_model(cfg.model, seed=cfg.weights_seed), make_task(cfg.task, cfg.model), earlier, progress)


def _groups(experiment: Experiment, runs: Sequence[Run], out: Path) -> list[list[Run]]:
    """The file's runs and some more, those together that are to begin from the same weights."""
    by = dict[str, list[Run]]()
    for run in dict.fromkeys([*experiment.chosen(None, None), *runs]):
        by.setdefault(str(experiment.config(run, out).starting_point()), []).append(run)
    return list(by.values())


def _said(runs: Sequence[Run], out: Path) -> dict[str, Start]:
    found = {run.key: Start.read(out / run.key) for run in runs}
    return {key: start for key, start in found.items() if start is not None}
