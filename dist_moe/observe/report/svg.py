"""Line charts as inline SVG: shapes without colors or fonts, which the page's style sheet gives by class.

The values are in the page a second time, as JSON, for the script that shows them where the pointer is. Without scripts
the charts are complete but for that.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 40
MOST_POINTS = 600
"""Of one line; of more, those with the smallest and the largest value of each interval are drawn."""
LOG_SPREAD = 20.0
"""The largest value / the smallest one from which a scale is logarithmic."""
NARROWEST = 1e-12


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: For the legend and the pointer.
        style: Classes of the style sheet, such as `run-0` or `run-0 floor`.
        points: (x, y) in order of x; y is None where the curve has a gap.
        dots: Whether each point has a dot, for a few points.
        in_legend: Whether the legend names it; the pointer names every curve.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False
    in_legend: bool = True

    def finite(self) -> list[tuple[float, float]]:
        """Return the points that have a value."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """A chart of one or more curves over the same axis.

    Attributes:
        key: A name for the page, of letters, digits and hyphens.
        title: What is shown, with the unit.
        meaning: How to read it, in one or two sentences.
        lines: The curves.
        x_title: What the horizontal axis shows.
        digits: After the decimal point, where the pointer is.
        log: Whether the scale may be logarithmic, where the values spread over `LOG_SPREAD`.
        from_zero: Whether a linear scale begins at 0.
    """

    key: str
    title: str
    meaning: str
    lines: Sequence[Line]
    x_title: str = "step"
    digits: int = 3
    log: bool = False
    from_zero: bool = False

    @property
    def is_log(self) -> bool:
        """Whether the vertical scale is logarithmic."""
        values = [y for line in self.lines for _, y in line.finite()]
        return self.log and bool(values) and min(values) > 0 and max(values) / min(values) > LOG_SPREAD

    def data(self) -> dict[str, object]:
        """Return what the script needs: the area of the plot, its range, and the values of each curve."""
        low, high = _range([x for line in self.lines for x, _ in line.finite()])
        return {
            "box": [LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM],
            "x": [low, high],
            "xTitle": self.x_title,
            "digits": self.digits,
            "lines": [
                {"name": line.name, "style": line.style, "points": thinned(line.finite())} for line in self.lines
            ],
        }


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Keep at most `most` points: the first, the last, and the lowest and the highest of each of equal intervals."""
    if len(points) <= most:
        return list(points)
    low, high = points[0][0], points[-1][0]
    width = (high - low) or 1.0  # all at one place: one interval
    buckets = (most - 2) // 2

    def bucket(point: tuple[float, float]) -> int:
        return min(buckets - 1, int((point[0] - low) / width * buckets))

    kept = {points[0], points[-1]}
    for _, members in groupby(points, key=bucket):
        inside = list(members)
        kept |= {min(inside, key=lambda point: point[1]), max(inside, key=lambda point: point[1])}
    return sorted(kept)


def draw(chart: Chart) -> Markup:
    """Draw a chart. Names are escaped."""
    xs = [x for line in chart.lines for x, _ in line.finite()]
    ys = [y for line in chart.lines for _, y in line.finite()]
    if chart.from_zero and not chart.is_log:
        ys = [*ys, 0.0] if any(ys) else [0.0, 1.0]
    place = _Placement(_range(xs), _padded(_range(ys), chart.is_log), chart.is_log)
    y_ticks = log_ticks(*place.y_range) if chart.is_log else ticks(*place.y_range)
    parts = [
        *_grid(place, y_ticks),
        *(_x_tick(place, x) for x in ticks(*place.x_range, most=8, whole=chart.x_title == "step")),
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, chart.x_title
        ),
        *(part for line in chart.lines for part in _curve(line, place)),
    ]
    return Markup('<svg class="chart" id="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        chart.key, WIDTH, HEIGHT, chart.title, Markup("").join(parts)
    )


@dataclass(frozen=True)
class _Placement:
    """Where values are in the picture."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_log: bool

    def x(self, value: float) -> str:
        low, high = self.x_range
        return _short(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT))

    def y(self, value: float) -> str:
        low, high, value = (math.log(each) if self.is_log else each for each in (*self.y_range, value))
        return _short(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM))


def _grid(place: _Placement, y_ticks: Sequence[float]) -> Iterator[Markup]:
    for value in y_ticks:
        y = place.y(value)
        yield Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, y, WIDTH - RIGHT, y)
        yield Markup('<text class="tick" x="{}" y="{}" dy="0.35em" text-anchor="end">{}</text>').format(
            LEFT - 7, y, tick_text(value)
        )


def _x_tick(place: _Placement, value: float) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        place.x(value), HEIGHT - BOTTOM + 16, tick_text(value)
    )


def _curve(line: Line, place: _Placement) -> Iterator[Markup]:
    """Draw one path for the whole curve, broken at gaps, and its dots."""
    pieces, open_piece = [], False
    kept = set(thinned(line.finite()))
    for x, y in line.points:
        if y is None or not math.isfinite(y):
            open_piece = False
        elif (x, y) in kept:
            pieces.append(f"{'L' if open_piece else 'M'}{place.x(x)} {place.y(y)}")
            open_piece = True
    if pieces:
        yield Markup('<path class="line {}" d="{}"/>').format(line.style, "".join(pieces))
    if line.dots or len(kept) == 1:
        for x, y in sorted(kept):
            yield Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>').format(line.style, place.x(x), place.y(y))


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most`."""
    step = (high - low) / most
    power = 10.0 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of each decade from `low` to `high`, or powers of ten where these are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    decades = decades[:: 1 + len(decades) // 12]
    return [value for power in decades for factor in factors if low <= (value := factor * 10.0**power) <= high]


def tick_text(value: float) -> str:
    """Format a number of an axis: short, with thousands separated or in powers of ten."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.12g}" if abs(value) < 1000 else f"{value:,.0f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value; of none or one, a range around it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low > NARROWEST * max(abs(low), abs(high), NARROWEST):
        return low, high
    half = max(abs(low) * 0.1, 0.5 if not low else NARROWEST)
    return low - half, high + half


def _padded(limits: tuple[float, float], is_log: bool) -> tuple[float, float]:
    low, high = limits
    if is_log:
        return low / 1.15, high * 1.15
    room = (high - low) * 0.05
    # A scale that begins at 0 keeps its line there.
    return (low if low == 0 else low - room), high + room


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def legend(lines: Sequence[Line]) -> Markup:
    """Draw the legend of a chart: a piece of each curve with its name, which is escaped."""
    entry = Markup(
        '<span class="key"><svg viewBox="0 0 26 10" width="26" height="10" aria-hidden="true">'
        '<path class="line {}" d="M1 5L25 5"/></svg>{}</span>'
    )
    return Markup("").join(entry.format(line.style, line.name) for line in lines if line.in_legend)
