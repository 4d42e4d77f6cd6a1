"""What every picture has: a font, text in any direction, and the PNG of its pixels."""

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
"""[H, W, 3]."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_PX, LINE_PX = 11, 13
BACKGROUND_RGB, TEXT_RGB = (255, 255, 255), (40, 40, 40)


@functools.lru_cache(maxsize=1)
def font() -> Font:
    """Return the font of all texts."""
    return ImageFont.load_default(FONT_PX)


def text_width(text: str) -> int:
    """Return the width of a text in pixels."""
    return int(np.ceil(font().getlength(text)))


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text between its words, each at most `width` pixels wide; one word may be wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str = "la") -> None:
    """Write a text; `anchor` is Pillow's: horizontal l, m or r, then vertical a (top) or m (middle)."""
    draw.text((x, y), text, TEXT_RGB, font(), anchor=anchor)


def write_upwards(image: Image.Image, x: int, middle: int, text: str) -> None:
    """Write a text that reads from bottom to top, centered at the height `middle`, with its left edge at x."""
    line = Image.new("RGB", (text_width(text), LINE_PX), BACKGROUND_RGB)
    write(ImageDraw.Draw(line), 0, LINE_PX // 2, text, "lm")
    turned = line.rotate(90, expand=True)
    image.paste(turned, (x, middle - turned.height // 2))


def encode_png(pixels: Pixels) -> bytes:
    """Return a picture as a PNG that is quick to make rather than small."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG", compress_level=3)
    return png.getvalue()
