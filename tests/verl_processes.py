"""A command with all that it starts, also daemons in sessions of their own as Ray has them, ended together."""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

MARK = "STARTED_BY"
"""A variable that all processes of a command inherit, with another value for each command."""


class Started:
    """A command that runs until it ends, or until it is killed: by `kill`, or at the end of the ``with`` block.

    Args:
        command: what is run.
        log: a file for its output.
        environment: its variables.
        folder: in which it runs.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**environment, MARK: self.mark}, cwd=folder
            )

    @property
    def code(self) -> int | None:
        """With which it ended; None: it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long.

        Returns:
            As `code`.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.code

    def processes(self) -> list[psutil.Process]:
        """The command's process, those below it, and others with its mark, which may have other parents."""
        found: dict[int, psutil.Process] = {}
        if self.code is None:
            with contextlib.suppress(psutil.Error):
                first = psutil.Process(self._process.pid)
                found = {process.pid: process for process in (first, *first.children(recursive=True))}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    found.setdefault(process.pid, process)
        return list(found.values())

    def kill(self, seconds: float = 30) -> int:
        """End all processes at once (SIGKILL), and those that they start meanwhile.

        Returns:
            How many there were.

        Raises:
            TimeoutError: some are left.
        """
        killed: set[int] = set()
        end = time.monotonic() + seconds
        while found := [process for process in self.processes() if lives(process)]:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(found)} processes do not end: {found[:5]}")
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # after a look whether the number is still this process's
                    killed.add(process.pid)
            self.wait(1)  # before psutil does, which would take its code
            psutil.wait_procs([process for process in found if process.pid != self._process.pid], timeout=1)
        return len(killed)

    def __enter__(self) -> Started:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def lives(process: psutil.Process) -> bool:
    """Whether a process does anything: one that has ended may still be there for its parent."""
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
