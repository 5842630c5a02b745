"""What docs/experiments.md says, made from rows: which sections there are, in their order.

Nothing is written here that does not follow from committed rows, and a section without rows is left out; only the
claims at the top say what has not been run. `intervals` says what the numbers in brackets are.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from claims import claims  # noqa: E402
from page import Section  # noqa: E402
from rows import RESULTS, Results, read  # noqa: E402
from section_arms import FAST, PLAIN, comparison, evaluations, served  # noqa: E402
from section_contract import contract, paired  # noqa: E402
from section_tables import quantizers, real_size  # noqa: E402

CURVES = {
    "dense.png": ("dense", PLAIN),
    "dense-fast.png": ("dense", FAST),
    "smollm2.png": ("smollm2", PLAIN),
    "moe.png": ("moe", PLAIN),
}
"""Pictures: experiment, and which of its runs are drawn."""


def sections(folder: Path = RESULTS) -> list[Section]:
    """All sections that there are rows for, after the claims.

    Args:
        folder: where the experiments' rows are.
    """
    dense, moe, smollm2 = (Results(name, folder) for name in ("dense", "moe", "smollm2"))
    made: list[Section | None] = [
        claims(dense, moe, smollm2),
        comparison("Experiment 1: with and without QAT", dense, PLAIN, "dense.png"),
        comparison("Experiment 1 at twice the learning rate", dense, FAST, "dense-fast.png"),
        comparison("Experiment 1 with a pretrained model", smollm2, PLAIN, "smollm2.png"),
        evaluations("Experiment 1 with a pretrained model: evaluation", smollm2),
        evaluations("Experiment 2: all layers or FFN only", dense),
        comparison("Experiment 3: fused experts", moe, PLAIN, "moe.png"),
        evaluations("Experiment 3: evaluation", moe),
        served((dense, moe, smollm2)),
        paired((dense, moe, smollm2)),
        contract((dense, moe)),
        quantizers(read(folder / "quantizers.jsonl")),
        real_size(read(folder / "real_size.jsonl")),
    ]
    return [section for section in made if section is not None]
