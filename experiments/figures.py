"""Draw the pictures of docs/experiments.md and write its sections and README's headline, from experiments/results/.

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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nvfp4_qat.charts import moving_mean, power_of_ten
from nvfp4_qat.report import COLOURS, DASHES
from nvfp4_qat.report_page import small

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from claims import headline  # noqa: E402
from page import between, updated  # noqa: E402
from rows import RESULTS, Results  # noqa: E402
from sections import CURVES, sections  # noqa: E402
from words import MODELS, label  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = "experiments.md", "experiments"
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- headline: written by experiments/figures.py -->", "<!-- headline end -->"

BELOW = (
    "Trainer on a GPU, rollouts by vLLM with CUDA graphs. Truncated importance sampling is on in every arm and "
    "corrects part of the mismatch."
)
BRACKETS = "In brackets: 95 % intervals."

PANELS = (
    ("rollout_corr/k3_kl", "k3 KL between rollout and trainer", True),
    ("reward", "mean reward", False),
    ("eval/accuracy", "held-out accuracy (own precision)", False),
    ("entropy", "entropy, nats a token", False),
    ("grad_norm", "gradient norm before clipping", True),
    ("flips/codes", "share of 4-bit codes that a step changes", True),
)
"""Column, title, logarithmic."""


def draw_curves(results: Results, names: Sequence[str], path: Path) -> None:
    """Curves of runs: thin for each seed, strong for the mean over seeds, smoothed (geometrically on logarithmic axes).

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
        if log and _positive(results, names, column):
            _logarithmic(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step", fontsize=10)
        axes.tick_params(labelsize=9, which="both")
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis with a number at each power of ten, and at 2 and 5 times each where there are few of these."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high < 100 * low
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: small(value) if few else power_of_ten(value)))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if few else tuple(range(2, 10))))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: small(value)) if few else NullFormatter())


def _positive(results: Results, names: Sequence[str], column: str) -> bool:
    runs = [run for name in names for run in results.points(name, column).values()]
    return any(value > 0 for run in runs for value in run.values())


def _curve(axes: Any, results: Results, name: str, column: str, log: bool) -> None:
    arm = results.arm(name)
    colour, dashes = COLOURS.get(arm, "#5b6570"), DASHES.get(arm, "-")
    points = results.points(name, column)
    sparse = column.startswith("eval/")
    if sparse:  # the last evaluation is that of the weights after the last step
        for seed, run in results.points(name, column.replace("eval/", "eval_end/")).items():
            points[seed] |= {step + 1: value for step, value in run.items()}
    runs = [run for run in points.values() if run]
    if not runs:
        return
    for run in runs:
        axes.plot(list(run), list(run.values()), color=colour, linewidth=0.7, alpha=0.25)
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    means = [sum(run[step] for run in runs) / len(runs) for step in steps]
    drawn, marker = (means, "o") if sparse else (moving_mean(means, log), None)
    axes.plot(
        steps, drawn, color=colour, linewidth=2.0, linestyle=dashes, marker=marker, markersize=4,
        label=label(results, name),
    )  # fmt: skip


def with_headline(readme: str, folder: Path = RESULTS) -> str:
    """README with what is between its markers renewed; nothing is there while there are no rows.

    Args:
        readme: its text.
        folder: where the experiments' rows are.
    """
    table = headline([Results(name, folder) for name in MODELS])
    intervals = f"{BRACKETS} " if "(" in table else ""
    shown = f"{table}\n\n{BELOW} {intervals}The rest is in [experiments](docs/experiments.md).\n" if table else ""
    return between(readme, BEGIN, END, f"\n{shown}")


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
    README.write_text(with_headline(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
