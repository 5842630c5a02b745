"""What the benchmarks of a whole model ask for alike: which one, how deep, how many rounds, where rows go, dtypes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS
from shapes import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Of the parameters, by what ``--masters`` calls them."""


def model_parser(description: str | None, rows: str) -> argparse.ArgumentParser:
    """A parser for a benchmark, which adds what it asks for besides.

    Args:
        description: the benchmark's docstring.
        rows: the file in `RESULTS` that rows are appended to by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-8B")
    parser.add_argument("--layers", type=int, help="decoder layers; by default 12 (Qwen3-8B) or 8 (Qwen3-30B-A3B)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / rows, help="file the rows are appended to")
    return parser
