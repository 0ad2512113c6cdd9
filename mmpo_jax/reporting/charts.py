"""Line charts and bars as inline SVG, in the colours of the page's style sheet.

Lines are told apart by colour and marker or dashes, so that neither print nor colour blindness
loses them. What a chart shows is in its `data-chart` too, from which the page's script reads the
values below the pointer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 370, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 16, 36
SLOTS = 8
"""Colours of the style sheet, `--line-0` and on; more lines use them again."""
DASHES = ("", "6 4", "2 3", "9 3 2 3")
MARKED = 24
"""Points of a line up to which each has a marker."""
LEAST_SPAN = 0.04
"""Span of the axis, at least, as a share of the largest value: less is noise, and would look like
a cliff."""
FROM_ZERO = 0.4
"""Span of positive values as a share of the largest from which on the axis begins at 0."""


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    """End of the band around it, where there is one."""
    high: float | None = None
    begins: bool = False
    """Whether no line leads to it from the point before."""


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]
    slot: int = 0
    """Its colour and marker."""
    dash: int = 0
    """Its dashes, of `DASHES`."""
    legend: str = ""
    """What the legend calls it and lines like it, where that is another than the name."""


@dataclasses.dataclass(frozen=True)
class Chart:
    title: str
    note: str
    """Which way is better, or what else there is to know; may be empty."""
    lines: Sequence[Line]
    x_name: str
    whole_x: bool = False
    """Whether every place has a tick, where they are few."""
    rules: Sequence[tuple[float, str]] = ()
    """Vertical lines, such as where a round begins: place and label."""


def number(value: float) -> str:
    """A number for axes and tables: four digits, three of those below 1."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    power = math.floor(math.log10(size))
    text = f"{value:.{3 - power if power >= 0 else 2 - power}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two, `most` of them at most."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span))
    steps = [step * factor for factor in (0.1, 0.2, 0.25, 0.5, 1, 2, 5)]
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [index * step for index in range(first, last + 1)]
    return [low, high]


def _whole(places: Iterable[float]) -> list[float]:
    """Those of whole numbers: between two rounds or updates there is nothing."""
    return [place for place in places if math.isclose(place, round(place), abs_tol=1e-9)]


def _span(values: Iterable[float]) -> tuple[float, float]:
    """(low, high) of an axis that shows these."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    largest = max(abs(low), abs(high)) or 1.0
    if low >= 0 and high - low > FROM_ZERO * high:
        return 0.0, high * 1.06 or 1.0
    lacking = max(0.0, LEAST_SPAN * largest - (high - low)) / 2
    margin = 0.08 * (high - low) + lacking
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def draw(chart: Chart) -> Markup:
    """The chart as `<svg>`, which a screen reader says in a sentence."""
    points = [point for line in chart.lines for point in line.points]
    xs = [point.x for point in points] or [0.0]
    x0, x1 = min([*xs, *(place for place, _ in chart.rules)]), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    bands = (end for p in points for end in (p.low, p.high) if end is not None)
    y0, y1 = _span([*(point.y for point in points), *bands])

    def at_x(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    all_xs = chart.whole_x and len(set(xs)) <= 12
    x_ticks = sorted(set(xs)) if all_xs else _whole(ticks(x0, x1, 6))
    parts = [
        *_grid(y0, y1, at_y),
        *_x_axis(chart, x_ticks, at_x),
        *(_band(line, piece, at_x, at_y) for line in chart.lines for piece in _pieces(line)),
        *(part for line in chart.lines for part in _line(line, at_x, at_y)),
    ]
    data = {
        "x": [x0, x1],
        "name": chart.x_name,
        "box": [LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT],
        "lines": [
            {"name": line.name, "slot": line.slot % SLOTS, "points": _told(line.points)}
            for line in chart.lines
        ],
    }
    opening = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" '
        'data-chart="{}">'
    ).format(WIDTH, HEIGHT, describe(chart), json.dumps(data, separators=(",", ":")))
    return opening + Markup("").join(parts) + Markup("</svg>")


def describe(chart: Chart) -> str:
    """What a chart shows, in a sentence or two."""
    told = [
        f"{line.name} from {number(line.points[0].y)} to {number(line.points[-1].y)}"
        for line in chart.lines
        if line.points
    ]
    return f"{chart.title} by {chart.x_name}: {'; '.join(told) or 'nothing measured'}."


def _told(points: Sequence[Point]) -> list[list[float]]:
    """Points for the script: x, y, and the ends of the band where there is one."""
    rows = []
    for point in points:
        row = [point.x, point.y]
        if point.low is not None and point.high is not None:
            row += [point.low, point.high]
        rows.append([float(f"{value:.5g}") for value in row])
    return rows


def _grid(y0: float, y1: float, at_y: Callable[[float], float]) -> Iterator[Markup]:
    for tick in ticks(y0, y1):
        y = at_y(tick)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y, y
        )
        yield Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 7, y + 3.5, number(tick)
        )


def _x_axis(
    chart: Chart, marks: Sequence[float], at_x: Callable[[float], float]
) -> Iterator[Markup]:
    bottom = HEIGHT - BOTTOM
    yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        LEFT, WIDTH - RIGHT, bottom, bottom
    )
    for tick in marks:
        yield Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            at_x(tick), bottom + 15, number(tick)
        )
    yield Markup('<text class="name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, chart.x_name
    )
    for place, label in chart.rules:
        x = at_x(place)
        yield Markup('<line class="rule" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
            x, x, TOP, bottom
        )
        yield Markup('<text class="tick" x="{:.1f}" y="{}">{}</text>').format(x + 4, TOP - 5, label)


def _pieces(line: Line) -> Iterator[Sequence[Point]]:
    """The points of a line, in pieces that are drawn each by itself."""
    cuts = [place for place, point in enumerate(line.points) if point.begins and place]
    for first, last in zip([0, *cuts], [*cuts, len(line.points)], strict=True):
        yield line.points[first:last]


def _band(
    line: Line,
    piece: Sequence[Point],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
) -> Markup:
    """The area between the ends of the bands; nothing where there are none."""
    ends = [(p.x, p.low, p.high) for p in piece if p.low is not None and p.high is not None]
    if len(ends) < 2:
        return Markup("")
    upper = [f"{at_x(x):.1f},{at_y(high):.1f}" for x, _, high in ends]
    lower = [f"{at_x(x):.1f},{at_y(low):.1f}" for x, low, _ in reversed(ends)]
    return Markup('<polygon class="band" style="--c:var(--line-{})" points="{}"/>').format(
        line.slot % SLOTS, " ".join([*upper, *lower])
    )


def _line(
    line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> Iterator[Markup]:
    for piece in _pieces(line):
        yield Markup(
            '<polyline class="line" style="--c:var(--line-{})" stroke-dasharray="{}" points="{}"/>'
        ).format(
            line.slot % SLOTS,
            DASHES[line.dash % len(DASHES)],
            " ".join(f"{at_x(point.x):.1f},{at_y(point.y):.1f}" for point in piece),
        )
    if len(line.points) <= MARKED:
        for point in line.points:
            yield marker(line.slot, at_x(point.x), at_y(point.y))


def marker(slot: int, x: float, y: float) -> Markup:
    """The mark of a line: circle, square, triangle, diamond by its colour."""
    shapes = (
        "M{x0:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        "M{x0:.1f} {y0:.1f}h7v7h-7z",
        "M{x:.1f} {y0:.1f}l4.2 7.2h-8.4z",
        "M{x:.1f} {y1:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
    )
    path = shapes[slot % len(shapes)].format(x=x, y=y, x0=x - 3.5, y0=y - 3.5, y1=y - 4.6)
    return Markup('<path class="mark" style="--c:var(--line-{})" d="{}"/>').format(
        slot % SLOTS, path
    )


def legend(chart: Chart) -> list[tuple[Markup, str]]:
    """(piece of a line, what it stands for), lines of one name once; nothing of a single line."""
    names = {line.legend or line.name: line for line in reversed(chart.lines)}
    found = [(key(line), name) for name, line in reversed(names.items())]
    return found if len(chart.lines) > 1 else []


def key(line: Line) -> Markup:
    """A piece of a line with its marker, for a legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 30 12" aria-hidden="true">'
        '<line class="line" style="--c:var(--line-{})" stroke-dasharray="{}" '
        'x1="1" x2="29" y1="6" y2="6"/>{}</svg>'
    ).format(line.slot % SLOTS, DASHES[line.dash % len(DASHES)], marker(line.slot, 15, 6))
