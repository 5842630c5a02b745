"""Times of kernels as multiples of a device copy: rows of `bench_kernels` as two sections, ours and other packages'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from common import Row
from page import Group, Panel, Picture, Point, Section, markdown
from row_tools import short

NAMES = {
    "fake quantize": "fake quantize",
    "quantize": "pack",
    "quantize and amax": "pack and take amax",
    "dequantize": "dequantize",
    "amax": "amax",
}
"""Kernels as the benchmark and as the page name them."""

BESIDE = (
    ("quantize", "copy of as many bytes", "copy of as many bytes"),
    ("dequantize", "copy of as many bytes", "copy of as many bytes"),
    ("quantize", "quantize one by one", "one launch a weight"),
    ("amax", "torch amax", "PyTorch"),
    ("amax", "torch foreach amax", "PyTorch"),
    ("fake quantize", "plain PyTorch", "plain PyTorch"),
)
"""What is timed beside a kernel: which kernel, what the benchmark calls it, and what the page does."""

FLOORS = {"fake quantize": 1.0, "quantize": 0.641, "quantize and amax": 0.641, "dequantize": 0.641, "amax": 0.5}
"""Bytes that a kernel must move over those of a copy of the bf16 values."""

US = "us_p10_p50_p90"

DRAWN = 4.0
"""A picture shows nothing slower than so many copies."""


def kernel_sections(rows: Iterable[Row]) -> list[Section]:
    """Nothing, or a section of this package's kernels and one of other packages'."""
    latest = {(row["gpu"], row["case"], row["name"], row.get("ranks", 0)): row for row in rows}
    ours = [row for row in latest.values() if row["case"] != "peers"]
    theirs = [row for row in latest.values() if row["case"] == "peers"]
    return [section(found) for section, found in ((_own, ours), (_peers, theirs)) if found]


def _own(rows: Sequence[Row]) -> Section:
    lines, groups = [], []
    for row in sorted(rows, key=lambda row: (row["gpu"], ("one", "many", "unpack").index(row["case"]))):
        beside: dict[str, list[tuple[str, str]]] = {}
        for kernel, timed, name in BESIDE:
            if timed in row["times_a_copy"]:
                beside.setdefault(kernel, []).append((timed, name))
        for kernel in (kernel for kernel in NAMES if kernel in row["times_a_copy"]):
            others = "; ".join(f"{name} {row['times_a_copy'][timed]:.2f}" for timed, name in beside.get(kernel, []))
            host = row.get("host_us", {}).get(kernel)
            floor = row["floors"][kernel]
            lines.append([
                short(row["gpu"]), _what(row), NAMES[kernel], f"{row[US][kernel][1]:.1f}", _ratio(row, kernel),
                f"{floor:.2f}", others or "–", f"{host:.0f}" if host is not None else "–",
            ])  # fmt: skip
            series = [("this package", kernel), *((name, timed) for timed, name in beside.get(kernel, []))]
            label = f"{NAMES[kernel]}: {_what(row)}{_on(row, rows)}"
            groups.append((list(NAMES).index(kernel), Group(label, _points(row, series), floor=floor)))
    groups.sort(key=lambda item: item[0])  # stable: within a kernel, in the order of the rows
    head = ["GPU", "weights", "kernel", "µs", "/ copy", "floor", "beside it, / copy", "Python, µs"]
    text = (
        "Time on the device as a multiple of a plain copy of the same bf16 values: the median, in brackets the "
        "10th and 90th percentile. The floor is the bytes that must move over those of the copy. Several weights "
        f"are one launch, with Python's time for it in the last column. {_noise(rows)}"
    )
    picture = Picture(
        "kernels.png",
        "Time of the kernels relative to a device copy, with the floors, as in the table below",
        (Panel("time / copy", tuple(group for _, group in groups), line=1.0),),
    )
    return Section("Kernels", text, markdown(head, lines), picture)


def _peers(rows: Sequence[Row]) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row["versions"]))
    lines, groups = [], []
    for row in rows:
        cells = [_ratio(row, name) for name in ("fake quantize", *names)]
        lines.append([short(row["gpu"]), _what(row), f"{row[US]['copy'][1]:.1f}", *cells])
        series = [("this package", "fake quantize"), *((name, name) for name in names if name in row["times_a_copy"])]
        groups.append(Group(f"{_what(row)}{_on(row, rows)}", _points(row, series), floor=1.0))
    versions = {name: row["versions"][name] for row in rows for name in row["versions"]}
    head = ["GPU", "weight", "copy, µs", "this package", *(f"{name} {versions[name]}" for name in names)]
    text = (
        "Fake quantization of one bf16 weight whose amax is known, as a multiple of a plain copy: this package's "
        "kernel and the functions of other packages, called as they stand. Packages whose function does not run "
        f"on this GPU are not listed. The picture leaves out what takes longer than {DRAWN:g} copies. "
        f"{_noise(rows)}"
    )
    picture = Picture(
        "peers.png",
        "Time of fake quantization in several packages relative to a device copy, as in the table below",
        (Panel("time / copy", tuple(groups), line=1.0, digits=2),),
    )
    return Section("Beside other packages", text, markdown(head, lines), picture)


def counter_section(rows: Iterable[Row]) -> Section | None:
    """Rows of `counters`; ``floors`` and sizes are those of `bench_kernels`."""
    latest = {(row["gpu"], row["name"], row["kernel"]): row for row in rows}
    if not latest:
        return None
    lines = []
    for row in latest.values():
        values = math.prod(int(side) for side in row["name"].split(" x "))
        must = 4 * values * FLOORS[row["kernel"]]  # a copy reads 2 bytes a value, and writes 2
        lines.append([
            short(row["gpu"]), _what(row), NAMES[row["kernel"]], f"{row['us']:.1f}",
            f"{(row['read_bytes'] + row['written_bytes']) / must:.3f}",
            *(f"{row[key]:.0f} %" for key in ("memory_percent", "issue_percent", "warps_percent")),
            f"{row['waves']:.1f}",
        ])  # fmt: skip
    head = ["GPU", "weight", "kernel", "µs", "moved / must move", "memory busy", "issue slots", "warps", "waves"]
    text = (
        "What the GPU's counters say (Nsight Compute, clocks left alone). Bytes that device memory read and wrote over "
        "those that must move: less than 1 where a result still lies in the L2 cache at the end, and more where "
        "something moved twice. Then the shares of the peak: of memory's throughput, of the issue slots of the "
        "schedulers, of the warps that could be resident; and how many times the launch fills the GPU. Small "
        "launches keep memory less busy, since filling and draining the GPU is a larger part of them."
    )
    return Section("Counters of the kernels", text, markdown(head, lines))


def _what(row: Row) -> str:
    name, ranks = str(row["name"]).replace(" x ", "×"), row.get("ranks", 0)
    return f"{name}, {ranks} rank{'s' * (ranks > 1)}" if ranks else name


def _on(row: Row, rows: Sequence[Row]) -> str:
    """The GPU, where the rows come from several kinds."""
    return f", {short(row['gpu'])}" if len({r["gpu"] for r in rows}) > 1 else ""


def _scaled(row: Row, timed: str) -> list[float]:
    """10th percentile, median and 90th percentile as multiples of the copy."""
    ratio, times = row["times_a_copy"][timed], row[US][timed]
    return [ratio * time / times[1] for time in times]


def _ratio(row: Row, timed: str) -> str:
    if timed not in row["times_a_copy"]:
        return "–"
    low, median, high = _scaled(row, timed)
    return f"{median:.3f} ({low:.3f}–{high:.3f})" if median < 10 else f"{median:.1f} ({low:.1f}–{high:.1f})"


def _points(row: Row, series: Iterable[tuple[str, str]]) -> tuple[Point, ...]:
    found = {name: _scaled(row, timed) for name, timed in series}
    return tuple(Point(name, mid, low, high) for name, (low, mid, high) in found.items() if mid <= DRAWN)


def _noise(rows: Sequence[Row]) -> str:
    """How far the copy, timed before and after the rest, differs from itself."""
    apart = max(abs(row["times_a_copy"]["copy"] - row["times_a_copy"]["copy again"]) for row in rows)
    return f"The copy, timed before and after the rest, differs from itself by at most {apart:.3f}."
