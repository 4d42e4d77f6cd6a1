"""The color scale of the load, the same in every picture, so that steps, layers and runs can be compared.

A load is shown relative to the mean load of its layer: 0 is blue, 1 is near white, 2 is orange, 5 is purple. A load
above 5 has a color of its own outside the scale, and so has an expert without tokens. Equal lengths of the scale are
equal steps of log2(1 + ratio), so that half the mean and five times the mean are both told from 1.
"""

import numpy as np
from numpy.typing import NDArray

from dist_moe.observe.pictures.canvas import Pixels

MAX_RATIO = 5.0
"""The upper end of the scale, in units of the mean load."""
TICKS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, MAX_RATIO)
NO_TOKENS_RGB = (0, 0, 0)
ABOVE_RGB = (255, 0, 230)
EMPTY_RGB = (214, 214, 214)
"""Of a cell that has no value: a column in which no token was routed at all."""

_STOPS = (0.0, 0.5, 1.0, 2.0, 3.0, MAX_RATIO)
_STOP_RGB = ((33, 60, 150), (120, 165, 215), (247, 247, 247), (244, 150, 95), (214, 40, 40), (125, 0, 95))


def position(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where on the scale a ratio is: 0 for 0, 1 for `MAX_RATIO`, above 1 for larger ones."""
    return np.log2(1.0 + ratio) / np.log2(1.0 + MAX_RATIO)


def ratio_at(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ratio at a place of the scale, the inverse of `position`."""
    return np.exp2(place * np.log2(1.0 + MAX_RATIO)) - 1.0


def colors(ratio: NDArray[np.float64]) -> Pixels:
    """Map load / mean load to colors.

    Args:
        ratio: [...] float64, at least 0; NaN where there is no value.

    Returns:
        [..., 3] uint8.
    """
    channels = np.array(_STOP_RGB, dtype=np.float64).T
    # Colors between two stops are mixed by the position on the scale, so that the color bar is even.
    places, stops = position(np.nan_to_num(ratio)), position(np.array(_STOPS))
    mixed = np.rint(np.stack([np.interp(places, stops, channel) for channel in channels], axis=-1)).astype(np.uint8)
    mixed[ratio == 0] = NO_TOKENS_RGB
    mixed[ratio > MAX_RATIO] = ABOVE_RGB
    mixed[np.isnan(ratio)] = EMPTY_RGB
    return mixed


def scale_colors(places: NDArray[np.float64]) -> Pixels:
    """Return the colors at places of the scale from 0 to 1, for a color bar or a color map."""
    # The lower end is the color of a load just above 0.
    return colors(np.clip(ratio_at(places), 1e-9, MAX_RATIO))
