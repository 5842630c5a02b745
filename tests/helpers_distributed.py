"""Run many small cases in one group of processes, and report each as a pytest test of its own.

Starting processes costs seconds and a case a fraction of one, so all cases of a test file that want the same number of
processes share one `torchrun`. A case is a function decorated with `case`; it runs on every rank at once and fails if
it raises on any. In a test file::

    from distributed import training             # a module full of cases
    from helpers_distributed import cases, group

    two = group(training, world=2)               # a fixture that starts the processes when the first test asks for them

    @pytest.mark.parametrize("name", cases(training, world=2))
    def test_two_processes(two, name):
        two.check(name)

Several modules may share a group of processes.

How failures stay apart. After each case the ranks tell each other, through files, whether it went well. If it did not,
collectives may be half done, so all processes end and the remaining cases run in a new group. If a rank does not
answer, it hangs: its stack is written down, everything is killed, the case is reported with that stack, and the rest
run in a new group. So a run without failures starts processes once and a hang costs its time limit and no more.

Deliberately missing: cases have no pytest fixtures and no captured output; what they print is shown if they fail.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
LIMIT = 90.0
"""Seconds a case may take, and the processes to start, before they count as hanging."""
GIVE_UP = 8
"""Groups of processes in a row in which no case passed, after which the remaining cases are not tried."""
PATIENCE = 8.0
"""Seconds the other ranks get to finish a case that failed on one."""


class Case(NamedTuple):
    """A function that runs on every rank, with the arguments of one of its variants."""

    name: str
    run: Callable[..., None]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Env:
    """What a case gets: where it runs.

    Args:
        rank: of this process.
        world: number of processes.
        device: "cpu" or "cuda"; a CUDA process has its own current device.
        path: an empty directory, the same for all ranks and of no other case.
    """

    rank: int
    world: int
    device: str
    path: Path

    def mesh(self, *shape: int) -> Any:
        """A device mesh over all processes; without a shape one-dimensional, with two numbers replicas × shards."""
        return _mesh(self.device, shape or (self.world,))

    def barrier(self) -> None:
        """Wait for the other ranks."""
        import torch.distributed as dist

        dist.barrier()


@functools.cache
def _mesh(device: str, shape: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


_registry: dict[tuple[str, int], dict[str, Case]] = {}


def case(*world: int, **variants: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a case.

    Args:
        world: the numbers of processes it runs with, each a case of its own.
        variants: at most one keyword argument of the function, with a dictionary from the variant's name to its value;
            each value makes a case. A value that is itself a dictionary gives several keyword arguments.
    """
    assert len(variants) <= 1 and world

    def register(function: Callable[..., None]) -> Callable[..., None]:
        title = function.__name__
        found = [Case(title, function, {})]
        for argument, values in variants.items():
            several = {name: v if isinstance(v, dict) else {argument: v} for name, v in values.items()}
            found = [Case(f"{title}[{name}]", function, arguments) for name, arguments in several.items()]
        for size in world:
            known = _registry.setdefault((function.__module__, size), {})
            for entry in found:
                assert entry.name not in known, f"two cases are called {entry.name}"
                known[entry.name] = entry
        return function

    return register


def again(
    module: ModuleType,
    world: int,
    under: ModuleType,
    wrap: Callable[[Callable[..., None]], Callable[..., None]],
    suffix: str,
    chosen: Callable[[str], bool] = lambda name: True,
) -> None:
    """Register cases of a module a second time, under another module.

    Args:
        module: whose cases.
        world: those for this number of processes.
        under: the module to register them with.
        wrap: what to run instead of each case's function, given that function.
        suffix: what to add to their names.
        chosen: which of them, by name.
    """
    known = _registry.setdefault((under.__name__, world), {})
    for name, entry in _registry[module.__name__, world].items():
        if chosen(name):
            assert name + suffix not in known, f"two cases are called {name + suffix}"
            known[name + suffix] = Case(name + suffix, wrap(entry.run), entry.arguments)


def cases(*modules: ModuleType, world: int) -> list[str]:
    """The names of modules' cases for a number of processes, in the order of the files."""
    return list(_find([module.__name__ for module in modules], world))


def _find(modules: Iterable[str], world: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for module in modules:
        for name, entry in _registry.get((module, world), {}).items():
            assert name not in found, f"two cases are called {name}"
            found[name] = entry
    return found


def group(*modules: ModuleType, world: int, device: str = "cpu", limit: float = LIMIT) -> Any:
    """A module-scoped fixture that runs the cases that were selected for its test file; see `Group.check`."""

    @pytest.fixture(scope="module")
    def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
        known = cases(*modules, world=world)
        chosen = {
            item.callspec.params.get("name")
            for item in request.session.items
            if isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.path == request.path
            and request.fixturename in item.fixturenames
        }
        names = [name for name in known if name in chosen]
        directory = tmp_path_factory.mktemp(f"{modules[0].__name__.rpartition('.')[2]}-{world}")
        with Group([module.__name__ for module in modules], world, device, names, directory, limit) as started:
            yield started

    return running


@dataclass
class Group:
    """The processes that run a list of cases, and what is known of the results so far."""

    modules: list[str]
    world: int
    device: str
    names: list[str]
    directory: Path
    limit: float
    _results: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _launch: int = 0
    _progress: float = 0.0
    _read: dict[Path, int] = field(default_factory=dict)
    _started: set[str] = field(default_factory=set)
    _in_vain: int = 0

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def check(self, name: str) -> None:
        """Wait for a case to finish; fail or skip as it did."""
        assert name in self.names
        while len(self._results.get(name, {})) < self.world:
            self._advance()
        results = self._results[name]
        failed = {rank: result for rank, result in results.items() if result["outcome"] == "failed"}
        if failed:
            texts = {rank: str(result["text"]).rstrip() for rank, result in sorted(failed.items())}
            if len(set(texts.values())) == 1 and len(texts) == self.world:
                texts = {-1: next(iter(texts.values()))}
            report = "\n".join(f"--- {'every rank' if rank < 0 else f'rank {rank}'}\n{t}" for rank, t in texts.items())
            pytest.fail(report, pytrace=False)
        if all(result["outcome"] == "skipped" for result in results.values()):
            pytest.skip(results[0]["text"])

    def _advance(self) -> None:
        """Start processes if none run, and take in what they wrote since the last time."""
        if self._process is None:
            self._start([name for name in self.names if len(self._results.get(name, {})) < self.world])
            return
        ended = self._process.poll() is not None  # before reading, so that nothing can be written after
        self._collect()
        if ended:
            self._bury(f"the processes ended with exit code {self._process.returncode}")
        elif time.monotonic() - self._progress > (limit := self.limit if self._started else max(self.limit, LIMIT)):
            self._interrupt()
            self._bury(f"nothing happened for {limit:g} s")
        else:
            time.sleep(0.05)

    def _start(self, names: list[str]) -> None:
        self._launch += 1
        here = self.directory / str(self._launch)
        here.mkdir()
        self._read, self._started = {}, set()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic GEMMs
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.world}"]
        command += [__file__, ",".join(self.modules), self.device, str(here), str(self.limit), *names]
        with open(here / "output", "wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._progress = time.monotonic()

    def _collect(self) -> None:
        for path in sorted((self.directory / str(self._launch)).glob("*.jsonl")):
            with open(path) as file:
                file.seek(self._read.get(path, 0))
                while (line := file.readline()).endswith("\n"):
                    self._read[path] = file.tell()
                    self._progress = time.monotonic()
                    result = json.loads(line)
                    if result["outcome"] == "started":
                        self._started.add(result["name"])
                    else:
                        self._results.setdefault(result["name"], {})[int(path.stem)] = result

    def _bury(self, reason: str) -> None:
        """The processes are gone, or about to be: what they left open becomes the failure of one case."""
        self._kill()
        self._collect()
        here = self.directory / str(self._launch)
        missing = [name for name in self.names if len(self._results.get(name, {})) < self.world]
        broken = [name for name in missing if name in self._started]
        if not self._started:  # the next processes would not start either
            broken = missing
        passed = any(
            all(
                result["outcome"] != "failed" for result in self._results.get(name, {0: {"outcome": "failed"}}).values()
            )
            for name in self._started
        )
        self._in_vain = 0 if passed else self._in_vain + 1
        if self._in_vain == GIVE_UP:
            reason, broken = f"not tried after {GIVE_UP} failures in a row; the last group: {reason}", missing
        for name in broken:
            for rank in range(self.world):
                stack = _text(here / f"{rank}.stack") or "no stack was written"
                output = _text(here / "output")
                text = f"did not finish: {reason}\n{stack}\n{output[:2000]}\n[...]\n{output[2000:][-2000:]}"
                self._results.setdefault(name, {}).setdefault(rank, {"outcome": "failed", "text": text})

    def _interrupt(self) -> None:
        """Ask every process for its stack."""
        for path in (self.directory / str(self._launch)).glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGUSR1)
        time.sleep(1.0)

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for path in (self.directory / str(self._launch)).glob("*.pid"):  # torchrun gives each a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            self._process.wait()
            self._process = None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _work(modules: list[str], device: str, directory: Path, limit: float, names: Iterable[str]) -> int:
    """One rank: run the cases and write down how each went."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (directory / f"{rank}.pid").write_text(str(os.getpid()))
    stacks = open(directory / f"{rank}.stack", "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    for module in modules:
        importlib.import_module(module)
    known = _find(modules, world)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=2 * limit))
    votes = dist.FileStore(str(directory / "votes"), world)
    log = open(directory / f"{rank}.jsonl", "a", buffering=1)  # noqa: SIM115
    for index, name in enumerate(names):
        gc.collect()
        gc.freeze()  # collections within the case look only at what it makes, and take a tenth of the time
        entry = known[name]
        print(json.dumps({"name": name, "outcome": "started"}), file=log)
        env = Env(rank, world, device, directory / f"case{index}")
        env.path.mkdir(exist_ok=True)
        torch.manual_seed(0)
        began = time.monotonic()
        outcome, text = _attempt(entry, env)
        result = {"name": name, "outcome": outcome, "text": text, "seconds": round(time.monotonic() - began, 2)}
        print(json.dumps(result), file=log)
        votes.set(f"{index}/{rank}", outcome)
        everyone = [f"{index}/{other}" for other in range(world)]
        try:
            votes.wait(everyone, datetime.timedelta(seconds=PATIENCE if outcome == "failed" else limit))
        except RuntimeError:  # what a store raises when time is up
            for path in directory.glob("*.pid"):
                os.kill(int(path.read_text()), signal.SIGUSR1)
            time.sleep(1.0)
            return 3
        if any(votes.get(key) == b"failed" for key in everyone):
            return 3
    dist.destroy_process_group()
    return 0


def _attempt(entry: Case, env: Env) -> tuple[str, str]:
    try:
        entry.run(env, **entry.arguments)
    except unittest.SkipTest as reason:
        return "skipped", str(reason)
    except BaseException:
        return "failed", traceback.format_exc(limit=-12)
    return "ok", ""


if __name__ == "__main__":
    # The cases register with the module of this name, not with __main__.
    import helpers_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("modules")
    parser.add_argument("device")
    parser.add_argument("directory", type=Path)
    parser.add_argument("limit", type=float)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    status = helpers_distributed._work(args.modules.split(","), args.device, args.directory, args.limit, args.names)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a broken group would keep the process alive
