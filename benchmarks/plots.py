"""Draw the pictures of docs/performance.md and write its sections, both from the rows in benchmarks/results/.

    python benchmarks/plots.py

What is drawn and written is decided in `tables`; here is only how it looks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from page import Panel, Picture, Point, updated
from tables import sections

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = "performance.md", "performance"

STYLES = {
    "gather mode": ("#00795a", "o"),
    "gathered once": ("#5aa88f", "P"),
    "module mode": ("#9c3f86", "s"),
    "module mode, packing": ("#0067a8", "^"),
    "re-quantize": ("#c44900", "D"),
    "this package": ("#00795a", "o"),
    "packed_weights, checkpoint": ("#00795a", "o"),
    "packed_weights, fused": ("#00795a", "s"),
    "packed_weights, checkpoint, to rank 0 alone": ("#5aa88f", "o"),
    "packed_weights, fused, to rank 0 alone": ("#5aa88f", "s"),
}
"""Colours of the reports (`nvfp4_qat.report`); the shape of the mark tells series apart without colour."""

OTHERS = (("#0067a8", "^"), ("#c44900", "D"), ("#9c3f86", "v"), ("#5b6570", "P"), ("#a07d00", "X"), ("#3a3f9c", "<"))
"""For series without a style of their own, in order of appearance."""

LINE, GAP = 0.22, 0.9
"""Inches of height that a series has in a group; what lies between groups, as a multiple of it."""

WIDTH, FONT = 9.33, 10
"""Inches, and points: on a page 900 pixels wide the text has the size of the page's own."""

INK, GRID, BAND, NOISE = "#20262c", "#e3e6ea", "#f4f6f8", "#cfd5db"


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, 1,400 pixels wide."""
    styles = _styles(picture)
    slots = [
        list(dict.fromkeys(point.series for group in same for point in group.points))
        for same in zip(*(panel.groups for panel in picture.panels), strict=True)
    ]
    labels = [group.label for group in picture.panels[0].groups]
    heights = [float(max(len(s), label.count("\n") + 1)) for s, label in zip(slots, labels, strict=True)]
    legend = _legend(picture, styles)
    columns = max(1, int(115 / (max(len(str(mark.get_label())) for mark in legend) + 7)))
    lines = sum(heights) + GAP * len(heights) + 1.1 * -(-len(legend) // columns) + 3
    figure = Figure(figsize=(WIDTH, LINE * lines), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: Sequence[Any] = figure.subplots(1, len(picture.panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(panels, picture.panels, strict=True):
        _panel(axes, panel, slots, heights, styles)
    figure.legend(handles=legend, loc="outside upper left", ncols=columns, frameon=False, fontsize=FONT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _styles(picture: Picture) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys(p.series for panel in picture.panels for group in panel.groups for p in group.points)
    known = {name: style for name, style in STYLES.items() if name in names}
    rest = [name for name in names if name not in STYLES]
    return known | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}


def _legend(picture: Picture, styles: dict[str, tuple[str, str]]) -> list[Any]:
    marks: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=name)
        for name, (colour, marker) in styles.items()
    ]
    groups = [group for panel in picture.panels for group in panel.groups]
    if any(group.noise for group in groups):
        marks.append(Patch(color=NOISE, label="bf16 against itself"))
    if any(group.floor is not None for group in groups):
        marks.append(Line2D([], [], color=INK, linestyle=":", label="floor: bytes that must move"))
    return marks


def _panel(
    axes: Any, panel: Panel, slots: Sequence[list[str]], heights: Sequence[float], styles: dict[str, tuple[str, str]]
) -> None:
    y, ticks = 0.0, []
    for i, (group, series, height) in enumerate(zip(panel.groups, slots, heights, strict=True)):
        top, bottom = y - GAP / 2, y + height + GAP / 2
        if i % 2 == 0:
            axes.axhspan(top, bottom, color=BAND, zorder=0, linewidth=0)
        if group.noise is not None:
            axes.fill_betweenx([top, bottom], *group.noise, color=NOISE, zorder=0.5, linewidth=0)
        if group.floor is not None:
            axes.vlines(group.floor, top, bottom, color=INK, linestyle=":", linewidth=1.3)
        first = y + (height - len(series)) / 2 + 0.5
        for point in group.points:
            _point(axes, point, first + series.index(point.series), *styles[point.series], panel.digits)
        ticks.append(y + height / 2)
        y += height + GAP
    axes.set_ylim(y - GAP / 2, -GAP / 2)
    if panel.line is not None:
        axes.axvline(panel.line, color=INK, linewidth=1.0, zorder=1)
    else:
        axes.set_xlim(left=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))  # room for the last number
    axes.set_yticks(ticks, [group.label for group in panel.groups], fontsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.set_title(panel.title, loc="left", fontsize=FONT + 1)
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _point(axes: Any, point: Point, y: float, colour: str, marker: str, digits: int) -> None:
    axes.hlines(y, point.low, point.high, color=colour, linewidth=1.6)
    axes.plot([point.value], [y], color=colour, marker=marker, markersize=6, linestyle="")
    axes.annotate(
        f"{point.value:.{digits}f}", (point.high, y), (8, 0), textcoords="offset points", va="center",
        fontsize=FONT - 1, color=INK, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def write(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Draw and write everything; pictures that no section has any more are removed.

    Returns:
        The files written.
    """
    made = sections(results)
    pictures = [section.picture for section in made if section.picture is not None]
    page, folder = docs / PAGE, docs / FOLDER
    page.write_text(updated(page.read_text(encoding="utf-8"), made, FOLDER), encoding="utf-8")
    for old in folder.glob("*.png"):
        if old.name not in {picture.file for picture in pictures}:
            old.unlink()
    for picture in pictures:
        draw(picture, folder / picture.file)
    return [page, *(folder / picture.file for picture in pictures)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--docs", type=Path, default=DOCS, help=f"folder of {PAGE}")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for file in write(args.results, args.docs):
        print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
