"""Rows of the experiment: appended as soon as they are known, and what of a GPU is in use when they are.

A row has what the run was (arm, model, GPUs, …), ``what`` it is of, its values, and where it was measured
(`common.environment`). What a run has appended stays when it ends early.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import time
from typing import Any

import torch
from common import Row, World, append, environment, link, link_speed

ABOUT = ("arm", "model", "layers", "masters", "tokens", "sequence", "engine", "sleep", "expert_parallel")
"""Arguments that every row has."""


class Rows:
    """Appends what is measured to the file of results, and prints it; on rank 0.

    Args:
        args: of the run.
        world: that takes part; every rank makes one.
    """

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self._out, self._writes, self._start = args.out, world.rank == 0, time.perf_counter()
        self._about: Row = {"experiment": "real_size", **{name: getattr(args, name) for name in ABOUT}}
        self._about |= {"gpus": world.size, "link": link(world), "link_gb_s": link_speed(world)}
        self._where = environment(world.device) | {"vllm": _version("vllm")} if self._writes else {}

    def add(self, what: str, **values: Any) -> None:
        """Append a row."""
        assert not values.keys() & {*self._about, *self._where}
        if self._writes:
            append(self._out, [{**self._about, "what": what, **values, **self._where}])
            print(f"{time.perf_counter() - self._start:7.1f} s  {what} {json.dumps(values)}", flush=True)


def used(world: World) -> int:
    """Bytes of the GPU that all processes together use, on the fullest GPU; 0 on a CPU. Every rank asks."""
    if world.device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(world.device)
    return int(world.largest(total - free)[0])


def allocator(world: World) -> Row:
    """What PyTorch's allocator reserved at most, and how often it had to free its cache. Every rank asks."""
    if world.device.type == "cpu":
        return {}
    reserved = torch.cuda.max_memory_reserved(world.device)
    retries = torch.cuda.memory_stats(world.device)["num_alloc_retries"]
    return dict(zip(("reserved_peak_bytes", "alloc_retries"), map(int, world.largest(reserved, retries)), strict=True))


def release(world: World) -> None:
    """Give memory that the ranks do not use back to the GPUs, where the engine finds it."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    world.wait()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
