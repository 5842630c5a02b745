"""Line charts as inline SVG: no script, no font, no network, colours from the page's own style sheet.

A chart is text that a page embeds. A series has the CSS class `css_class` of its name and nothing else that says how it
looks, so light and dark are the style sheet's business. Hovering a step shows its values, by ``:hover`` alone.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = (1010, 340), (500, 280)
"""Width and height in SVG units, close to a chart's pixels on the page, so that its text has the page's size."""

LEFT, RIGHT, TOP, BOTTOM = 58, 78, 14, 40
"""Margins around the plot area; the right one holds the series' names."""

MAX_HOVER_STEPS = 200
"""More steps than this share hover targets: a long run must not make a page of many megabytes."""

LABEL_GAP = 17.0
"""Smallest distance between the labels at the line ends, in SVG units."""


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` of equal length, NaN where a value is missing; ``smooth`` is drawn on top of it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: Sequence[float] | None = None

    @property
    def line(self) -> Sequence[float]:
        """The values that are drawn strongly."""
        return self.y if self.smooth is None else self.smooth


def moving_mean(values: Sequence[float], log: bool = False) -> list[float]:
    """Centred mean over an eighth of the values, at least three (fewer at the ends), skipping missing ones.

    Args:
        values: one per step, NaN where missing.
        log: take the geometric mean, which belongs to a logarithmic axis; values that are not positive are missing.
    """
    half = max(len(values) // 16, 1)
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if _usable(v, log)]
        total = sum(math.log(v) if log else v for v in window)
        mean = total / len(window) if window else math.nan
        means.append(math.exp(mean) if log else mean)
    return means


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    fmt: Callable[[float], str],
    log: bool = False,
    size: tuple[int, int] = WIDE,
) -> str:
    """Draw lines over steps.

    Args:
        series: what to draw; a series without a finite value is left out.
        title: the chart's accessible name.
        description: what a reader who cannot see it should know.
        fmt: how a value is written in the hover text.
        log: logarithmic y axis; values that are not positive are gaps.
        size: width and height in SVG units.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw.
    """
    series = [s for s in series if any(_usable(v, log) for v in s.y)]
    if not series:
        return '<p class="empty">Nothing to draw.</p>'
    frame = _Frame.around(series, log, *size)
    body = [*frame.grid(), *(part for s in series for part in _line(s, frame)), *_end_labels(series, frame)]
    body += _hover(series, frame, fmt)
    name = escape(f"{title}. {description}")
    return f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{name}">{"".join(body)}</svg>'


def _usable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


@dataclass(frozen=True)
class _Frame:
    """The plot area: data ranges and the mapping to SVG units."""

    x0: float
    x1: float
    y0: float
    y1: float
    ticks: Sequence[float]
    log: bool
    right: float
    bottom: float

    @classmethod
    def around(cls, series: Sequence[Series], log: bool, width: int, height: int) -> "_Frame":
        xs = [x for s in series for x in s.x]
        ys = [v for s in series for v in (*s.y, *s.line) if _usable(v, log)]
        ticks = _log_ticks(min(ys), max(ys)) if log else _linear_ticks(min(ys), max(ys))
        x0, x1 = min(xs), max(xs)
        if x0 == x1:
            x0, x1 = x0 - 1, x1 + 1
        return cls(x0, x1, min(*ticks, *ys), max(*ticks, *ys), ticks, log, width - RIGHT, height - BOTTOM)

    def px(self, x: float) -> float:
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (self.right - LEFT)

    def py(self, y: float) -> float:
        y, low, high = (math.log(v) if self.log else v for v in (y, self.y0, self.y1))
        return self.bottom - (y - low) / (high - low) * (self.bottom - TOP)

    def grid(self) -> Iterator[str]:
        label = power_of_ten if self.log else plain_number
        for tick in self.ticks:
            y = self.py(tick)
            yield f'<line class="grid" x1="{LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>'
        steps = [t for t in _linear_ticks(self.x0, self.x1, about=8) if self.x0 <= t <= self.x1 and t == int(t)]
        for tick in steps:
            place = f'x="{self.px(tick):.1f}" y="{self.bottom + 18}"'
            yield f'<text class="tick" {place} text-anchor="middle">{tick:.0f}</text>'
        middle = f'x="{(LEFT + self.right) / 2}" y="{self.bottom + 36}"'
        yield f'<text class="tick" {middle} text-anchor="middle">step</text>'


def css_class(name: str) -> str:
    """The class that carries a series' colour; any name gives a valid one."""
    return "s-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)


def plain_number(value: float) -> str:
    """Up to three significant digits with a real minus sign."""
    return f"{value:.3g}".replace("-", "−")


def power_of_ten(value: float) -> str:
    """``1e-4`` as 10⁻⁴ and ``2e-4`` as 2·10⁻⁴."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == 1 else f"{mantissa}·{power}"


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 1:
        return [m * 10.0**first for m in (1, 2, 5, 10)]
    stride = math.ceil((last - first) / 8)
    return [10.0**e for e in range(first, last + 1, stride)]


def _linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _line(series: Series, frame: _Frame) -> Iterator[str]:
    css = css_class(series.name)
    if series.smooth is not None:
        yield f'<path class="raw {css}" d="{_path(series.x, series.y, frame)}"/>'
    yield f'<path class="line {css}" d="{_path(series.x, series.line, frame)}"/>'
    points = [(x, y) for x, y in zip(series.x, series.line, strict=True) if _usable(y, frame.log)]
    if len(points) == 1:  # a path of one point is invisible
        yield _dot(series.name, frame.px(points[0][0]), frame.py(points[0][1]))


def _dot(name: str, x: float, y: float) -> str:
    return f'<circle class="dot {css_class(name)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _path(xs: Sequence[float], ys: Sequence[float], frame: _Frame) -> str:
    parts, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if _usable(y, frame.log):
            parts.append(f"{pen}{frame.px(x):.1f} {frame.py(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _end_labels(series: Sequence[Series], frame: _Frame) -> Iterator[str]:
    """Names where the lines end, pushed apart: no legend to look up, and colour is not the only key."""
    ends = sorted((frame.py([v for v in s.line if _usable(v, frame.log)][-1]), s.name) for s in series)
    heights = [y for y, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    overflow = heights[-1] - frame.bottom
    if overflow > 0:
        heights[-1] -= overflow
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - LABEL_GAP)
    for y, (_, name) in zip(heights, ends, strict=True):
        place = f'x="{frame.right + 8}" y="{y + 4:.1f}"'
        yield f'<text class="label {css_class(name)}" {place}>{escape(name)}</text>'


def _hover(series: Sequence[Series], frame: _Frame, fmt: Callable[[float], str]) -> Iterator[str]:
    """One invisible column per step that shows a cursor and every series' value while the pointer is on it."""
    steps = sorted({x for s in series for x in s.x})
    steps = steps[:: math.ceil(len(steps) / MAX_HOVER_STEPS)]
    values = {s.name: dict(zip(s.x, s.y, strict=True)) for s in series}
    width = (frame.right - LEFT) / len(steps)
    for step in steps:
        rows = [(n, v[step]) for n, v in values.items() if step in v and _usable(v[step], frame.log)]
        if not rows:
            continue
        x = frame.px(step)
        box = x + 10 if x < (LEFT + frame.right) / 2 else x - 182
        text = [f'<text class="tip-head" x="{box + 10:.1f}" y="{TOP + 18}">step {step:g}</text>']
        for i, (name, value) in enumerate(rows):
            y = TOP + 36 + 17 * i
            left, right = f'x="{box + 10:.1f}" y="{y}"', f'x="{box + 162:.1f}" y="{y}" text-anchor="end"'
            text.append(f'<text class="label {css_class(name)}" {left}>{escape(name)}</text>')
            text.append(f'<text class="tip-value" {right}>{escape(fmt(value))}</text>')
        yield (
            f'<g class="step"><rect class="hit" x="{x - width / 2:.1f}" y="{TOP}" width="{width:.2f}" '
            f'height="{frame.bottom - TOP}"/><g class="tip">'
            f'<line class="cursor" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.bottom}"/>'
            + "".join(_dot(n, x, frame.py(v)) for n, v in rows)
            + f'<rect class="tip-box" x="{box:.1f}" y="{TOP}" width="172" height="{28 + 17 * len(rows)}" rx="6"/>'
            + "".join(text)
            + "</g></g>"
        )
