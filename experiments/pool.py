"""Processes that take turns on GPUs, and that end together: when one fails, when time is up, on Ctrl-C and SIGTERM.

A process is the first of a group of its own. Whatever way it ends, what is left of its group is killed: an engine's
processes would keep their GPU. A command that is killed itself cannot do that; so a process looks after it, and ends in
order when it is no more (`follow`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from nvfp4_qat.errors import UserError
from nvfp4_qat.machine import commit

GRACE = 40.0
"""Seconds that all runs together have to write their summaries and end their engines."""

LOOK_EVERY = 20.0
"""Seconds between two lines about the runs."""

SHARED = "NVFP4_QAT_SHARED"
"""The variable that tells a process how many may be on its GPU at a time, itself counted; empty without a GPU."""

STARTED_BY = "NVFP4_QAT_STARTED_BY"
"""The variable that tells a process which one has started it."""


@dataclass(frozen=True)
class Task:
    """A process: its name, which its log has too, a script, and the script's arguments."""

    name: str
    script: Path
    arguments: list[str]


class Interrupts:
    """SIGINT and SIGTERM as a note that `check` reads; a second one is a KeyboardInterrupt at once.

    As an exception the first one could come when a process has been started and nobody knows of it yet.
    """

    came: signal.Signals | None = None

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None:
            raise KeyboardInterrupt
        self.came = signal.Signals(number)

    def check(self) -> None:
        """Raise KeyboardInterrupt if one came."""
        if self.came is not None:
            raise KeyboardInterrupt


@dataclass
class Pool:
    """Processes that take turns on GPUs.

    Args:
        slots: the GPU of each that can be under way at a time.
        out: the experiment's directory.
        deadline: of `time.monotonic`.
        interrupts: looked at all the time.
    """

    slots: list[str]
    out: Path
    deadline: float
    interrupts: Interrupts = field(default_factory=Interrupts)

    def finish(self, tasks: Sequence[Task], say: Callable[[], str]) -> bool:
        """Run processes to their ends; False if there was not enough time.

        Args:
            tasks: in the order in which they start.
            say: what to print now and then.

        Raises:
            UserError: one failed. The others have been ended in order.
            KeyboardInterrupt: a signal came. All have been ended in order.
        """
        waiting, free, busy = list(tasks), list(self.slots), dict[str, tuple[subprocess.Popen[bytes], str]]()
        looked = time.monotonic()
        try:
            while waiting or busy:
                self.interrupts.check()
                if time.monotonic() > self.deadline - GRACE:
                    return False
                while waiting and free:
                    task, gpu = waiting.pop(0), free.pop(0)
                    sharing = self.slots[: len(tasks)].count(gpu)
                    busy[task.name] = self._started(task, gpu, sharing), gpu
                time.sleep(0.5)
                for name, (process, gpu) in list(busy.items()):
                    if process.poll() is not None:
                        del busy[name]
                        _kill_group(process)
                        free.append(gpu)
                        if process.returncode:
                            log = self._log(name)
                            raise UserError(f"{name} failed; the end of {log}:\n{_tail(log)}")
                if time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    print(say(), flush=True)
        finally:
            _end([process for process, _ in busy.values()])
            print(say(), flush=True)
        return True

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def _started(self, task: Task, gpu: str, sharing: int) -> subprocess.Popen[bytes]:
        log = self._log(task.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, min(8, (os.cpu_count() or 1) // len(self.slots)))
        seen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        # Told to them, as an installed package does not know its commit.
        known = commit(Path(__file__).resolve().parent.parent) or ""
        told = {"NVFP4_QAT_COMMIT": known, SHARED: str(sharing) if gpu else "", STARTED_BY: str(os.getpid())}
        environment = {**os.environ, **seen, **told, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(task.script), *task.arguments]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )


def follow() -> None:
    """In a process of a `Pool`: end in order when the command that started it is no more."""
    parent = os.environ.pop(STARTED_BY, "")
    if parent:
        threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    print("the command that started this process is gone", file=sys.stderr, flush=True)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(os.getpid(), signal.SIGKILL)


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Let processes write what they have, all at the same time, and end them with all that they started."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # a second Ctrl-C comes here at once
        for process in processes:
            _kill_group(process)
            process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
