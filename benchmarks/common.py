"""What the benchmarks share: who takes part, how time is taken, and how a row says where it comes from.

A row is one JSON object on a line of a file in ``benchmarks/results/``. It holds every sample, not only the median, and
`environment`: GPU, versions, date and commit. Nothing that is printed or drawn elsewhere is measured elsewhere.

Ratios are paired: arms run in turn within one process (`rotated`), and a sample is divided by the sample of the
baseline from the same round. A GPU that grows warm, or a neighbour on the host, then moves both numbers of a pair.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_qat import machine
from nvfp4_qat.jsonl import Row, append_rows, read_rows

RESULTS = Path(__file__).parent / "results"

append, read = append_rows, read_rows
"""How rows get into a file of results, and out of it."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that take part, one per GPU; ``mesh`` is None in a process that `torchrun` did not start."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @classmethod
    def join(cls) -> World:
        """Join the processes started by `torchrun`, over NCCL on GPUs and gloo on CPUs; alone without it."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if "WORLD_SIZE" not in os.environ:
            return cls(0, 1, device, None)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return cls(dist.get_rank(), dist.get_world_size(), device, mesh)

    def largest(self, *values: float) -> list[float]:
        """Each value's maximum over the ranks."""
        if self.mesh is None:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def wait(self) -> None:
        """Return when every rank is here and its device has finished."""
        if self.mesh is not None:
            self.largest(0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on the device now; 0 on a CPU, where nobody counts."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        """Let `peak` count from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes of tensors since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def run(main: Callable[[], int]) -> None:
    """Run a benchmark as a program: its exit code is ``main``'s, and the process group ends with it."""
    try:
        status = main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(status)


class Stopwatch:
    """Seconds of the slowest rank from `World.wait` to `World.wait`."""

    def __init__(self, world: World) -> None:
        self.world, self.seconds = world, 0.0

    def __enter__(self) -> Stopwatch:
        self.world.wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self.seconds = self.world.largest(time.perf_counter() - self._start)[0]


class Traffic(TorchDispatchMode):
    """Counts the bytes this rank receives from others in gathers (``gathered``) and reductions (``reduced``).

    A ring moves (n-1)/n of an all-gather's result and of a reduce-scatter's input over each link, and twice that in an
    all-reduce; that is what is counted, whatever algorithm the library chooses. Sends and receives count as gathers.
    """

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world, self.gathered, self.reduced = world, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t not in (torch.Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a subclass: what it is made of comes by again
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self._count(name, args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        others = (self.world.size - 1) / self.world.size
        if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "gather_", "scatter_"):
            self.gathered += round(_nbytes(args[0]) * others)
        elif name in ("all_gather_into_tensor", "all_gather_into_tensor_coalesced"):
            self.gathered += round(_nbytes(result) * others)
        elif name in ("broadcast_", "recv_", "recv_any_source_"):
            self.gathered += _nbytes(args[0])
        elif name == "_reduce_scatter_base_":
            self.reduced += round(_nbytes(args[1]) * others)
        elif name in ("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"):
            self.reduced += round(_nbytes(args[0]) * others)
        elif name in ("allreduce_", "all_reduce", "all_reduce_", "allreduce_coalesced_"):
            self.reduced += round(2 * _nbytes(args[0]) * others)


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_nbytes(t) for t in tensors) if isinstance(tensors, (list, tuple)) else 0


def link(world: World) -> str:
    """How GPUs reach each other: "p2p" (NVLink where there is one), "no p2p" (through host memory), or "none"."""
    if world.size == 1:
        return "none"
    if world.device.type == "cpu":
        return "gloo"
    return "no p2p" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "p2p"


def link_speed(world: World, nbytes: int = 1 << 28) -> float | None:
    """GB/s at which a rank receives in an all-gather of ``nbytes``, the median of five; None on one rank."""
    if world.size == 1 or world.device.type == "cpu":
        return None
    part = torch.zeros(nbytes // world.size, dtype=torch.uint8, device=world.device)
    whole = torch.empty(part.numel() * world.size, dtype=torch.uint8, device=world.device)
    seconds = []
    for _ in range(6):
        with Stopwatch(world) as watch:
            dist.all_gather_into_tensor(whole, part)
        seconds.append(watch.seconds)
    return round((whole.numel() - part.numel()) / statistics.median(seconds[1:]) / 1e9, 1)


def rotated(items: Sequence[T], by: int) -> list[T]:
    """``items`` beginning ``by`` places later, so that no item is always first in a round."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def summary(name: str, samples: Sequence[float], digits: int = 3) -> Row:
    """``name``: the median; ``name_samples``: all of them, in the order they were taken."""
    return {name: round(statistics.median(samples), digits), f"{name}_samples": [round(s, digits) for s in samples]}


def paired(samples: Sequence[float], baseline: Sequence[float], name: str = "ratio") -> Row:
    """`summary` of the ratios within rounds."""
    return summary(name, [a / b for a, b in zip(samples, baseline, strict=True)], digits=4)


def environment(device: torch.device) -> Row:
    """Where and with what a row was measured."""
    row: Row = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "transformers")},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
    }
    if device.type == "cuda":
        row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    settings = {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "PYTORCH_CUDA_ALLOC"))}
    return {**row, "settings": settings}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the code (`nvfp4_qat.machine.commit`)."""
    return machine.commit(Path(__file__).resolve().parent.parent) or "unknown"
