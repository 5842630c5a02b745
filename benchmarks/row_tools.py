"""Choosing rows for the page, and saying in words what a row was measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common import Row

Configurations = dict[tuple[object, ...], dict[str, Row]]
"""Configuration → arm, method or variant → its row."""

LINKS = {"p2p": "direct link", "no p2p": "through host memory"}


def usable(rows: Iterable[Row]) -> list[Row]:
    """Without dry runs on a CPU, rows whose own check failed, and rows that do not say when they were measured."""
    return [
        row for row in rows if row.get("gpu", "CPU") != "CPU" and row.get("check", "ok") == "ok" and row.get("date")
    ]


def grouped(rows: Iterable[Row], keys: Sequence[str], member: str) -> Configurations:
    """Rows by configuration, sorted, and within it by one more key; later rows replace earlier ones."""
    found: Configurations = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row[member]] = row
    return dict(sorted(found.items(), key=lambda item: [(isinstance(v, str), v) for v in item[0]]))


def short(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``H100``"""
    return gpu.removeprefix("NVIDIA ").split()[0]


def machine(row: Row) -> str:
    """``2 × H200, direct link (190 GB/s)``: GPUs, and how fast an all-gather is between them."""
    text = f"{row['gpus']} × {short(row['gpu'])}"
    if row["gpus"] > 1:
        speed = f" ({row['link_gb_s']:.0f} GB/s)" if row.get("link_gb_s") else ""
        return f"{text}, {LINKS.get(row['link'], row['link'])}{speed}"
    return f"{text}, FSDP2" if row.get("sharding") == "FSDP2" else text


def with_range(row: Row | None, name: str, digits: int = 3) -> str:
    """``0.985 (0.981–0.989)``: the median and the range of ``name``; a dash where there is none."""
    if row is None or name not in row:
        return "–"
    samples = row[f"{name}_samples"]
    return f"{row[name]:.{digits}f} ({min(samples):.{digits}f}–{max(samples):.{digits}f})"
