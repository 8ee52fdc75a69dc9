"""Maps as pictures: values in colours that all can tell apart, over a grey background, with a colour bar."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from bert_encoding.analyses.brain_maps.values import GREY, Values

PICTURES = (".png", ".svg", ".pdf")
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"  # safe for the colour-blind; the first also reads in grey
OPACITY = 0.8  # of colours over the background
DPI = 128  # a power of two: inches times dots give whole pixels again
MIN_WIDTH = 640  # of a picture, in pixels


def scale(found: Values) -> tuple[float, float]:
    """Return which values get the first and the last colour; 1 in 200 may lie beyond either."""
    known = found.values[np.isfinite(found.values)]
    if found.is_difference:
        limit = float(np.percentile(np.abs(known), 99.5)) or 1.0
        return -limit, limit
    low, high = (0.0, float(np.percentile(known, 99.5))) if found.is_cc else np.percentile(known, [0.5, 99.5]).tolist()
    return low, high if high > low else low + 1.0


def paint(image: np.ndarray, background: np.ndarray, limits: tuple[float, float], colours: str) -> np.ndarray:
    """Return colours, (height, width, 3) from 0 to 1: the image over its grey background, white outside.

    Parameters
    ----------
    image : (height, width) values, NaN where there are none
    background : (height, width) from 0 to 1, NaN outside
    """
    grey = np.repeat(np.where(np.isfinite(background), background, 1.0)[..., None], 3, axis=2)
    known = np.isfinite(image)
    place = (np.where(known, image, limits[0]) - limits[0]) / (limits[1] - limits[0])
    colour = colormaps[colours](np.clip(place, 0, 1))[..., :3]
    return np.where(known[..., None], OPACITY * colour + (1 - OPACITY) * grey, grey)


def draw(image: np.ndarray, background: np.ndarray, found: Values, file: Path, ending: str) -> None:
    """Write a picture with title and colour bar; each pixel of the image becomes a square of whole pixels.

    Parameters
    ----------
    image, background : (height, width), as for ``paint``
    ending : ".png", ".svg" or ".pdf"
    """
    limits, colours = scale(found), DIVERGING if found.is_difference else SEQUENTIAL
    painted = paint(image, background, limits, colours)
    figure, axes, bar = _canvas(painted.shape[0], painted.shape[1])
    axes.imshow(painted, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    figure.suptitle(found.title, y=1 - 8 / (DPI * figure.get_figheight()), parse_math=False)
    seen = (1 - OPACITY) * GREY + OPACITY * colormaps[colours](np.linspace(0, 1, 256))[:, :3]
    known = found.values[np.isfinite(found.values)]
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    extend = beyond[bool((known < limits[0]).any()), bool((known > limits[1]).any())]
    colour = ScalarMappable(Normalize(*limits), ListedColormap(seen))
    figure.colorbar(colour, cax=bar, orientation="horizontal", extend=extend).set_label(found.unit, parse_math=False)
    stamp = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[ending.lower()]
    with rc_context({"svg.hashsalt": "map"}):  # the same map gives the same file
        figure.savefig(file, format=ending[1:].lower(), dpi=DPI, metadata=stamp)


def _canvas(height: int, width: int) -> tuple[Figure, Any, Any]:
    """Return a figure, and its axes for the picture and for the colour bar."""
    by = int(np.ceil(MIN_WIDTH / width))
    n_y, n_x, above, below = by * height, by * width, 40, 88
    total = n_y + above + below
    figure = Figure(figsize=(n_x / DPI, total / DPI))
    axes = figure.add_axes((0, below / total, 1, n_y / total))
    return figure, axes, figure.add_axes((0.25, 64 / total, 0.5, 12 / total))
