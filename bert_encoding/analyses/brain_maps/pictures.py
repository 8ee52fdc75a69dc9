"""Maps as pictures: values in colours safe for the colour-blind, over a grey background, with a colour bar."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from bert_encoding.analyses.brain_maps.values import GREY, Values

PICTURES = (".png", ".svg", ".pdf")
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"  # the first also reads in grey
OPACITY = 0.8  # of colours over the background
DPI = 128  # a power of two: inches times dots give whole pixels again
MIN_WIDTH = 640  # of a picture, in pixels


def scale(voxels: Values) -> tuple[float, float]:
    """Return the values of the first and the last colour; 0.5% of the voxels may be beyond either."""
    known = voxels.values[np.isfinite(voxels.values)]
    if voxels.is_difference:
        limit = float(np.percentile(np.abs(known), 99.5)) or 1.0
        return -limit, limit
    low, high = (0.0, float(np.percentile(known, 99.5))) if voxels.is_cc else np.percentile(known, [0.5, 99.5]).tolist()
    return low, high if high > low else low + 1.0


def paint(image: np.ndarray, background: np.ndarray, limits: tuple[float, float], colours: str) -> np.ndarray:
    """Return colours, (height, width, 3) from 0 to 1: the image over its grey background, white outside.

    Both are (height, width), NaN in the image where there is no value, NaN in the background outside.
    """
    grey = np.repeat(np.where(np.isfinite(background), background, 1.0)[..., None], 3, axis=2)
    known = np.isfinite(image)
    place = (np.where(known, image, limits[0]) - limits[0]) / (limits[1] - limits[0])
    colour = colormaps[colours](np.clip(place, 0, 1))[..., :3]
    return np.where(known[..., None], OPACITY * colour + (1 - OPACITY) * grey, grey)


def draw(image: np.ndarray, background: np.ndarray, voxels: Values, file: Path, ending: str) -> None:
    """Write a picture with title and colour bar; each pixel of the image becomes a square of whole pixels."""
    limits, colours = scale(voxels), DIVERGING if voxels.is_difference else SEQUENTIAL
    painted = paint(image, background, limits, colours)
    figure, axes, bar = _canvas(painted.shape[0], painted.shape[1])
    axes.imshow(painted, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    figure.suptitle(voxels.title, y=1 - 8 / (DPI * figure.get_figheight()), parse_math=False)
    blended = (1 - OPACITY) * GREY + OPACITY * colormaps[colours](np.linspace(0, 1, 256))[:, :3]
    known = voxels.values[np.isfinite(voxels.values)]
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    extend = beyond[bool((known < limits[0]).any()), bool((known > limits[1]).any())]
    colour = ScalarMappable(Normalize(*limits), ListedColormap(blended))
    figure.colorbar(colour, cax=bar, orientation="horizontal", extend=extend).set_label(voxels.unit, parse_math=False)
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[ending.lower()]
    with rc_context({"svg.hashsalt": "map"}):  # the same map gives the same file
        figure.savefig(file, format=ending[1:].lower(), dpi=DPI, metadata=metadata)


def _canvas(height: int, width: int) -> tuple[Figure, Any, Any]:
    """Return a figure, and its axes for the picture and for the colour bar."""
    scale_factor = int(np.ceil(MIN_WIDTH / width))
    n_y, n_x, above, below = scale_factor * height, scale_factor * width, 40, 88
    total = n_y + above + below
    figure = Figure(figsize=(n_x / DPI, total / DPI))
    axes = figure.add_axes((0, below / total, 1, n_y / total))
    return figure, axes, figure.add_axes((0.25, 64 / total, 0.5, 12 / total))
