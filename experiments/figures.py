"""Draw the pictures of docs/experiments.md and write its sections, both from the rows in experiments/results/.

    python experiments/figures.py

What is written is decided in `sections`; here is how curves look.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nvfp4_qat.charts import moving_mean
from nvfp4_qat.report import COLOURS, DASHES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from page import updated  # noqa: E402
from rows import Results  # noqa: E402
from sections import CURVES, sections  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = "experiments.md", "experiments"

PANELS = (
    ("rollout_corr/k3_kl", "k3 KL between rollout and trainer", True),
    ("reward", "mean reward", False),
    ("eval/accuracy", "held-out accuracy in own precision", False),
    ("entropy", "entropy, nats a token", False),
    ("grad_norm", "gradient norm before clipping", True),
    ("flips/codes", "4-bit codes that a step changes", True),
)
"""Column, title, logarithmic."""


def draw_curves(results: Results, names: Sequence[str], path: Path) -> None:
    """Curves of runs: thin for each seed, strong for the mean over seeds, smoothed.

    Args:
        results: an experiment's rows.
        names: its runs that are drawn; their arms decide how.
        path: of the PNG.
    """
    figure = Figure(figsize=(11, 6.6), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (column, title, log) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            _curve(axes, results, name, column, log)
        if log and any(value > 0 for name in names for run in results.columns(name, column) for value in run):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _curve(axes: Any, results: Results, name: str, column: str, log: bool) -> None:
    arm = results.arm(name)
    colour, dashes = COLOURS.get(arm, "#5b6570"), DASHES.get(arm, "-")
    runs = [results.points(key, column) for key in results.keys(name)]
    runs = [(steps, values) for steps, values in runs if values]
    if not runs:
        return
    sparse = column.startswith("eval/")
    for steps, values in runs:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    length = min(len(values) for _, values in runs)
    means = [sum(values[i] for _, values in runs) / len(runs) for i in range(length)]
    drawn = means if sparse else moving_mean(means, log)
    axes.plot(runs[0][0][:length], drawn, color=colour, linewidth=2.0, linestyle=dashes, label=name)


def main() -> int:
    page = DOCS / PAGE
    for file, (experiment, names) in CURVES.items():
        results = Results(experiment)
        there = [name for name in names if name in results.names()]
        if there:
            draw_curves(results, there, DOCS / FOLDER / file)
    page.write_text(
        updated(page.read_text(encoding="utf-8"), sections(), FOLDER, "experiments/figures.py"), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
