"""Ranks that end together: what one of them does alone, and what becomes of the others when it fails.

Collectives are called by every rank, but only rank 0 drives the engine. Two things follow.

- While rank 0 starts an engine or generates, the others wait for its answer in a gloo broadcast (`Team.first`), on the
  CPU: an NCCL collective that waits would spin on the GPU that the engine computes on.
- An exception on one rank would leave the others in a collective for ever. So a rank that fails writes its trace and
  ends at once, without the clean-up of process groups or of the interpreter, which may wait for the others (`run`). The
  launcher (`torchrun`) sees that, and ends the other ranks.

An engine's processes are children of rank 0. They do not notice that it died of a signal, and would keep their GPU
memory. A small process (`Guard`) does: it reads from a pipe that only rank 0 has the other end of, and when that
closes without a word it kills rank 0's process group, which is all that rank 0 has started. `torchrun` gives each rank
a process group of its own.

A rank that hangs ends after a time limit (``faulthandler``), with the stack of each thread.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from common import World

T = TypeVar("T")

WATCH = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
if not sys.stdin.buffer.read():
    os.killpg(0, signal.SIGKILL)
"""
"""What the guard runs. It outlives the signals that `torchrun` sends to a process group to end it."""


class Guard:
    """Kills what this process has started when this process ends without `release`, however that comes about."""

    def __init__(self) -> None:
        if os.getpgrp() != os.getpid():  # else the launcher's processes would be killed too
            os.setpgid(0, 0)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that is to end the engine's processes did not start")

    def release(self) -> None:
        """Everything has been ended as it should."""
        self._process.communicate(b"done")


class Team:
    """The ranks of an experiment.

    Args:
        world: they are in.
        seconds: that one of them may keep the others waiting.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self._control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.world.rank == 0)

    def first(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 alone while the others wait; every rank gets what came out, which can be pickled."""
        told: list[Any] = [action() if self.leads else None]
        dist.broadcast_object_list(told, src=0, group=self._control, device=torch.device("cpu"))
        found: T = told[0]
        return found

    def all(self, value: T) -> list[T]:
        """Every rank's value, which can be pickled, on every rank."""
        found: list[Any] = [None] * self.world.size
        dist.all_gather_object(found, value, group=self._control)
        return found


def limit(seconds: float) -> None:
    """End this rank, with the stacks of its threads, if it still runs after so many seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a rank's program; it ends with its exit code, and at once if it fails."""
    status = 1
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
