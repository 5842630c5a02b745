"""What the GPU's counters say of the kernels, read by NVIDIA Nsight Compute (``ncu``), which must be on the PATH.

    python benchmarks/counters.py        a row for each kernel and size
    python benchmarks/counters.py --print-report    the table that ncu wrote, instead of rows

`bench_kernels` says how long a kernel takes; this says why. Bytes read from and written to device memory tell whether
anything moves twice, the memory's utilization whether it is the limit, and the issue slots used whether instead it is
arithmetic. ncu clears the caches before each kernel, leaves the clocks alone (``--clock-control none``), and runs a
kernel several times to read all counters: its duration differs a little from that of `bench_kernels`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_kernels import SHAPES, One
from common import RESULTS, Row, append, environment

COUNTERS = {
    "us": "gpu__time_duration.sum",
    "read_bytes": "dram__bytes_read.sum",
    "written_bytes": "dram__bytes_write.sum",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
}
"""Fields of a row, and the names of the counters."""

TIMES = {"ns": 1e-3, "us": 1.0, "ms": 1e3}
BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
UNITS = {"us": TIMES, "read_bytes": BYTES, "written_bytes": BYTES}
"""How ncu may scale a counter; the others have no unit or are percentages."""

KERNELS = ("fake quantize", "quantize", "dequantize", "amax")


def launch_all() -> None:
    """Run each kernel once on each size, in this order, with profiling on for these launches alone."""
    for shape in SHAPES:
        weight = One(shape)
        weight.out.copy_(weight.w)
        runs = {name: run for name, run in weight.runs().items() if name in KERNELS}
        for run in runs.values():
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for name in KERNELS:
            runs[name]()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile() -> str:
    """The CSV text that ncu writes about `launch_all` in a process of its own.

    Raises:
        RuntimeError: ncu is not installed, or it or the process failed.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu was not found; it comes with the CUDA toolkit (Nsight Compute): put it on the PATH")
    command = [
        ncu, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off",
        "--metrics", ",".join(COUNTERS.values()), sys.executable, __file__, "--launch",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ncu failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def rows(report: str) -> Iterator[Row]:
    """A row for each profiled kernel, in the order of `launch_all`.

    Raises:
        RuntimeError: Not one kernel for each run: the package launched others besides, or fewer.
    """
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = list(csv.DictReader(lines[start:]))
    units, kernels = (found[0], found[1:]) if found else ({}, [])
    expected = [(shape, name) for shape in SHAPES for name in KERNELS]
    if len(kernels) != len(expected):
        names = [kernel.get("Kernel Name") for kernel in kernels]
        raise RuntimeError(f"{len(expected)} kernels were to be profiled, ncu shows {len(kernels)}: {names}")
    for (shape, name), kernel in zip(expected, kernels, strict=True):
        row: Row = {"kernel": name, "name": " x ".join(map(str, shape)), "function": kernel["Kernel Name"]}
        for field, counter in COUNTERS.items():
            scale = UNITS[field][units[counter]] if field in UNITS else 1.0
            row[field] = round(float(kernel[counter].replace(",", "")) * scale, 2)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--print-report", action="store_true", help="print what ncu wrote; no rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "counters.jsonl", help="file the rows are appended to")
    arguments: Any = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if arguments.launch:
        launch_all()
        return
    try:
        report = profile()
        if arguments.print_report:
            print(report)
            return
        measured = list(rows(report))
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    where = environment(torch.device("cuda"))
    for row in measured:
        print(json.dumps(row), flush=True)
    append(arguments.out, [row | where for row in measured])


if __name__ == "__main__":
    main()
