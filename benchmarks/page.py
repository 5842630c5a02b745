"""What a page of results is made of: sections with a table and a picture, both described as plain data.

`tables` makes them from rows, `plots` draws the pictures and writes the page. A picture is one or more panels side by
side that share their groups; in a group every series has a line of its own with its median, its range and its number
in figures, so that nothing has to be read off an axis.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))

from markers import between  # noqa: E402

BEGIN, END = "<!-- sections: written by {} -->", "<!-- sections end -->"
"""What is between them is written by a script, which is named in the first."""

SCRIPT = "benchmarks/plots.py"

WIDTH = 130
"""Characters of a line of text in the page."""


@dataclass(frozen=True)
class Point:
    """A series' median in a group, with the smallest and largest sample."""

    series: str
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, series: str, row: Mapping[str, Any], name: str, unit: float = 1.0) -> Point:
        """``name`` of a row and its samples, times ``unit``."""
        samples = row[f"{name}_samples"]
        return cls(series, unit * row[name], unit * min(samples), unit * max(samples))


@dataclass(frozen=True)
class Group:
    """What is compared: one configuration."""

    label: str
    points: tuple[Point, ...]
    floor: float | None = None
    """The smallest possible value, drawn as a dotted line."""
    noise: tuple[float, float] | None = None
    """From the lowest to the highest sample of the baseline against itself, drawn as a band."""


@dataclass(frozen=True)
class Panel:
    """One axis; ``line``, where given, is a value to compare with, usually 1."""

    title: str
    groups: tuple[Group, ...]
    line: float | None = None
    digits: int = 3


@dataclass(frozen=True)
class Picture:
    """A file beside the page, and its text for those who do not see it."""

    file: str
    alt: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Section:
    """A heading with what it says."""

    title: str
    text: str
    table: str
    picture: Picture | None = None


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def written(sections: Sequence[Section], folder: str) -> str:
    """The sections in Markdown; pictures lie in ``folder``."""
    parts = []
    for section in sections:
        picture = f"![{section.picture.alt}]({folder}/{section.picture.file})" if section.picture else ""
        parts += [f"## {section.title}", textwrap.fill(section.text, WIDTH), picture, section.table]
    return "\n\n".join(part for part in parts if part) or "No rows have been committed yet."


def updated(page: str, sections: Sequence[Section], folder: str, script: str = SCRIPT) -> str:
    """The page with everything between its markers renewed.

    Args:
        page: its text.
        sections: what comes between the markers.
        folder: of the pictures.
        script: whose markers these are.
    """
    return between(page, BEGIN.format(script), END, f"\n\n{written(sections, folder)}\n\n")
