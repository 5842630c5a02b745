"""A run's files become what a person wants to look at: ``report.html`` and ``curves.png``."""

import math
import os
from pathlib import Path

from .charts import moving_mean
from .errors import UserError
from .report_page import render_page
from .run_files import K3_KL, REWARD, Run, load_run

COLOURS = {"bf16": "#0067a8", "noqat": "#c44900", "qat": "#00795a", "qat-ffn": "#9c3f86"}
DASHES = {"bf16": (0, (5, 2)), "qat-ffn": (0, (1, 1))}
"""How ``curves.png`` draws the arms, as ``report.css`` does on the page; dashes tell them apart without colour."""


def write_report(out_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``curves.png`` from a run's summary and metrics.

    Args:
        out_dir: the directory a run was written to.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: the directory holds no run, a file in it is malformed, or matplotlib is not installed.
    """
    folder = Path(out_dir)
    run = load_run(folder)
    page = folder / "report.html"
    _write_curves(run, folder / "curves.png")
    temporary = folder / ".report.html.part"
    temporary.write_text(render_page(run), encoding="utf-8")
    temporary.replace(page)
    return page


def _write_curves(run: Run, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing curves.png needs matplotlib: pip install 'nvfp4-qat[demo]'") from None

    figure = Figure(figsize=(11, 4.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    kl, reward = figure.subplots(1, 2)
    positive = any(0 < value < math.inf for arm in run.arms for value in arm.column(K3_KL))
    if positive:
        kl.set_yscale("log")
    for arm in run.arms:
        colour, steps = COLOURS.get(arm.name, "#5b6570"), arm.column("step")
        for axes, key, log in ((kl, K3_KL, positive), (reward, REWARD, False)):
            axes.plot(steps, arm.column(key), color=colour, linewidth=0.8, alpha=0.35)
            means = moving_mean(arm.column(key), log)
            axes.plot(steps, means, color=colour, linewidth=2.2, linestyle=DASHES.get(arm.name, "-"), label=arm.name)
    kl.set_title("k3 KL between rollout and trainer (lower is better)", loc="left", fontsize=11)
    reward.set_title("Mean reward", loc="left", fontsize=11)
    for axes in (kl, reward):
        axes.set_xlabel("step")
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    temporary = path.with_name(".curves.png.part")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
