"""Heat maps of the load as inline SVG: the image of `load_maps`, its axes, and the color scale."""

from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup

from dist_moe.observe.pictures.scale import ABOVE_RGB, MAX_RATIO, NO_TOKENS_RGB, TICKS, position
from dist_moe.observe.report.load_maps import FIRST, LAST, LoadMap, png
from dist_moe.observe.report.svg import ticks

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 62, 14, 4, 36
ROW, LOWEST, HIGHEST = 9, 72, 330
"""Height of a row, and the least and the greatest height of a map."""
BAR_WIDTH, BAR_HEIGHT = 300, 14
MOST_LABELS = 6


def draw_map(load_map: LoadMap) -> Markup:
    """Draw one heat map with its axes."""
    width, height = WIDTH - LEFT - RIGHT, max(LOWEST, min(HIGHEST, ROW * load_map.rows))
    bottom = TOP + height
    parts = [
        Markup(
            '<image class="pixels" x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>'
            '<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>'
        ).format(LEFT, TOP, width, height, load_map.image, LEFT, TOP, width, height),
        *_row_labels(load_map, height),
        *_column_labels(load_map.steps, width, bottom),
        _text("axis", (LEFT + WIDTH - RIGHT) / 2, bottom + 32, "step"),
    ]
    return Markup(
        '<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="{}" data-run="{}" data-rows="{}" data-row="{}">'
        "{}</svg>"
    ).format(
        *(WIDTH, bottom + BOTTOM, load_map.title, load_map.run, load_map.rows, load_map.row_name),
        Markup("").join(parts),
    )


def _row_labels(load_map: LoadMap, height: int) -> Iterator[Markup]:
    middle = Markup('<text class="axis" x="{}" y="{}" text-anchor="middle" transform="rotate(-90 {} {})">{}</text>')
    x, y = 14, TOP + height / 2
    yield middle.format(x, y, x, y, load_map.row_name)
    rows = ticks(0, load_map.rows - 1, most=height // 24, whole=True) if load_map.rows > 1 else [0]
    for row in rows:
        place = TOP + (row + 0.5) / load_map.rows * height
        yield _text("tick", LEFT - 7, place, f"{row:.0f}", anchor="end", dy="0.35em")


def _column_labels(steps: Sequence[int], width: int, bottom: int) -> Iterator[Markup]:
    for column in spread(len(steps), MOST_LABELS):
        yield _text("tick", LEFT + (column + 0.5) / len(steps) * width, bottom + 16, f"{steps[column]:,}")


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers from 0 to `count` - 1, evenly spread, with the first and the last."""
    shown = max(1, min(count, most))
    return sorted({round(index * (count - 1) / max(1, shown - 1)) for index in range(shown)})


def draw_scale() -> Markup:
    """Draw the color scale with its numbers, and the colors outside it."""
    bar = png(np.arange(FIRST, LAST + 1, dtype=np.uint8)[None])
    places = {tick: BAR_WIDTH * float(position(np.array(tick))) for tick in TICKS}
    above = f"over {MAX_RATIO:g}"
    parts = [
        Markup(
            '<image class="pixels" x="4" y="0" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>'
        ).format(BAR_WIDTH, BAR_HEIGHT, bar),
        *(_text("tick", 4 + place, BAR_HEIGHT + 14, f"{tick:g}") for tick, place in places.items()),
        *_swatch(BAR_WIDTH + 24, ABOVE_RGB, above),
        *_swatch(BAR_WIDTH + 110, NO_TOKENS_RGB, "no tokens"),
    ]
    return Markup('<svg class="scale" viewBox="0 0 {} {}" role="img" aria-label="colors of the load">{}</svg>').format(
        WIDTH, BAR_HEIGHT + 20, Markup("").join(parts)
    )


def _swatch(x: int, color: Sequence[int], text: str) -> Iterator[Markup]:
    red, green, blue = color
    yield Markup('<rect x="{}" y="0" width="14" height="{}" fill="rgb({} {} {})"/>').format(
        x, BAR_HEIGHT, red, green, blue
    )
    yield Markup('<rect class="frame" x="{}" y="0" width="14" height="{}"/>').format(x, BAR_HEIGHT)
    yield _text("tick", x + 20, BAR_HEIGHT / 2, text, anchor="start", dy="0.35em")


def _text(style: str, x: float, y: float, text: object, anchor: str = "middle", dy: str = "0") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" dy="{}" text-anchor="{}">{}</text>').format(
        style, f"{x:.1f}", f"{y:.1f}", dy, anchor, text
    )
