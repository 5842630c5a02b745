"""What the rows of benchmarks hold, and how a test imports the files of benchmarks/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

ENVIRONMENT = {
    "gpu": str,
    "torch": str,
    "triton": str,
    "transformers": str,
    "date": str,
    "commit": str,
    "settings": dict,
}
SCHEMAS = {
    "step": {
        "arm": str, "model": str, "layers": int, "parameters": int, "gpus": int, "sharding": str, "tokens": int,
        "sequence": int, "micro_batches": int, "masters": str, "checkpointing": bool, "clip": float, "link": str,
        "link_gb_s": (float, type(None)), "steps": int, "hold": str, "ms": float, "ms_samples": list, "ratio": float,
        "ratio_samples": list, "loss": float, "peak_bytes": (int, type(None)), "reserved_bytes": (int, type(None)),
        "gathered_bytes": int, "reduced_bytes": int, "alloc_retries": int, "check": str, **ENVIRONMENT,
    },
    "host": {
        "arm": str, "model": str, "layers": int, "ranks": int, "tokens": int, "steps": int, "ms": float,
        "ms_samples": list, "device_after_ms": float, "device_after_ms_samples": list, "ratio": float,
        "ratio_samples": list, **ENVIRONMENT,
    },
    "modules": {
        "layer": str, "model": str, "shapes": list, "tokens": int, "variant": str, "calls": int, "us": float,
        "us_samples": list, "ratio": float, "ratio_samples": list, "held_bytes": (int, type(None)), "weight_bytes": int,
        **ENVIRONMENT,
    },
    "sync": {
        "method": str, "layout": str, "ranks": str, "model": str, "layers": int, "masters": str, "gpus": int,
        "link": str, "link_gb_s": (float, type(None)), "seconds": float, "seconds_samples": list, "ratio": float,
        "ratio_samples": list, "stream_bytes": int, "received_bytes": int, "extra_bytes": (int, type(None)),
        "check": str, **ENVIRONMENT,
    },
}  # fmt: skip
"""What every row has besides "benchmark"."""


def importable() -> Iterator[None]:
    """To be a fixture: the files of benchmarks/ import each other by name, as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def check_schema(row: dict) -> None:
    schema = SCHEMAS[row["benchmark"]]
    optional = {"nccl", "lead", "device_us", "device_us_samples", "device_ratio", "device_ratio_samples"}
    assert set(row) - {"benchmark"} - optional == set(schema), row
    for key, kind in schema.items():
        assert isinstance(row[key], kind), (key, row[key])
    for key in (key for key in row if key.endswith("_samples")):
        median = row[key.removesuffix("_samples")]
        assert row[key] and min(row[key]) <= median <= max(row[key])
