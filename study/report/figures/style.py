"""The style of all figures: size, fonts, colours safe for the colour-blind, rank axes, legends above the data.

Text is never parsed as mathematics: names of parameters and trials may contain dollar signs.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from study.results.evidence import Evidence
from study.wording import counted, joined

WIDTH, HEIGHT = 6.6, 4.1  # inches
DPI = 150
MOST_NAMED = 8  # ranks; with more, only some are labelled
INK, GREY = "#111111", "#6b6b6b"
BEST, PLAIN = "#0b5394", "#d9822b"  # blue and orange: safe for the colour-blind, and distinct in grey
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
UNITS = {
    "cc_mean": "mean CC over voxels (correlation)",
    "accuracy": "accuracy (share of held-out texts)",
    "mlm_loss_heldout": "held-out masked-LM loss (nats per token)",
}
RANK = "rank r of the adapter (inner size of B A)"
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
# Dark to bright and legible on white: the last fifth of viridis is too bright for a line.
SEQUENTIAL = ListedColormap(colormaps["viridis"](np.linspace(0, 0.82, 256)), "viridis_on_white")
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class Picture(NamedTuple):
    """A figure, its caption with the numbers of trials, stories and voxels, and its content in words."""

    figure: Figure
    caption: str
    alt: str


class NothingToDraw(ValueError):
    """A study has no data for a figure; the message says why."""


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save figures in one style, whatever the user's own matplotlib settings are."""
    with rc_context(), warnings.catch_warnings():
        rcdefaults()
        rcParams.update(_SETTINGS)
        # a box is drawn instead; the caption names it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(n_columns: int = 1, n_rows: int = 1, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Any]:
    """Return a figure with constrained layout, and its axes, (n_rows, n_columns)."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def image_of(figure: Figure, ending: str, name: str) -> bytes:
    """Return a figure as ``png`` or ``svg``, the same bytes each time; ``name`` prefixes the ids inside an SVG."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is done: the second file need not repeat it
    buffer = io.BytesIO()
    stamp = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format=ending, dpi=DPI, metadata=stamp)
    if ending == "png":
        return buffer.getvalue()
    # matplotlib uses the same ids in every figure
    return re.sub(rb'(\bid="|href="#|url\(#)', rb"\g<1>" + name.encode() + b"-", buffer.getvalue())


def short(name: object, length: int = 22) -> str:
    """Return a name in one line of at most ``length`` characters, shortened in the middle."""
    text, head = one_line(str(name)), (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def one_line(text: str) -> str:
    """Return a text, which may contain names that a user chose, in one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain(value: float) -> str:
    """Return a number in few digits; ``unknown`` for NaN."""
    if pd.isna(value):
        return "unknown"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def cc(value: float, sign: bool = False) -> str:
    """Return a CC, a loss or an accuracy with four decimals; ``unknown`` for NaN."""
    return "unknown" if pd.isna(value) else f"{value:+.4f}" if sign else f"{value:.4f}"


def floats(frame: pd.DataFrame, *columns: str) -> list[np.ndarray]:
    """Return columns, also nullable ones, as float64 with NaN for missing values."""
    numbers = [pd.to_numeric(frame[name], errors="coerce") for name in columns]
    return [column.to_numpy(dtype=float, na_value=np.nan) for column in numbers]


def known(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the rows with finite numbers in all of these columns, and these as float64; none if one is absent."""
    if frame.empty or not set(columns) <= set(frame.columns):
        return frame.iloc[:0]
    frame = frame.assign(**dict(zip(columns, floats(frame, *columns), strict=True)))
    return frame[np.isfinite(frame[list(columns)].to_numpy(float)).all(axis=1)]


def required(frame: pd.DataFrame, *columns: str, otherwise: str) -> pd.DataFrame:
    """Return the rows of `known`; raise NothingToDraw with the reason ``otherwise`` if there are none."""
    rows = known(frame, *columns)
    if rows.empty:
        raise NothingToDraw(otherwise)
    return rows


def rank_colours(ranks: Iterable[float]) -> dict[float, Any]:
    """Return one colour per rank, from dark for the lowest to bright for the highest, by the logarithm of the rank."""
    ranks = sorted(set(ranks))
    logs = np.log2(np.asarray(ranks, float))
    span = np.ptp(logs) or 1.0 if ranks else 1.0
    return {rank: SEQUENTIAL((log - logs[0]) / span) for rank, log in zip(ranks, logs, strict=True)}


def some_of(ranks: Sequence[float]) -> list[float]:
    """Return all ranks if they are few, else the first, the last and some evenly between them."""
    return [ranks[round(i)] for i in np.linspace(0, len(ranks) - 1, min(MOST_NAMED, len(ranks)))]


def rank_axis(axes: Axes, ranks: Sequence[float]) -> None:
    """Make the x axis log2 rank, labelled by the ranks tried, or by powers of two if there are many."""
    logs = np.log2(np.asarray(ranks, float))
    named = sorted(ranks)
    if len(ranks) > MOST_NAMED:
        named = [2.0**power for power in range(math.ceil(logs.min()), math.floor(logs.max()) + 1)]
    axes.set_xticks(np.log2(named), [f"{rank:g}" for rank in named])
    axes.set_xlim(logs.min() - 0.6, logs.max() + 0.6)
    axes.set_xlabel(RANK)


def row_axis(axes: Axes, names: Sequence[str], margin: float = 0.5) -> None:
    """Make the y axis one of named rows, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 1 + margin, -margin)


def draw_intervals(axes: Axes, low: np.ndarray, high: np.ndarray, **look: Any) -> None:
    """Draw the finite ones of some horizontal intervals, one per row."""
    has = np.isfinite(low) & np.isfinite(high)
    reach = (np.zeros(has.sum()), (high - low)[has])
    axes.errorbar(low[has], np.flatnonzero(has), xerr=reach, capsize=4, fmt="none", **look)


def whole_axis(axes: Axes, label: str) -> None:
    """Make the x axis one of integers, and label it."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(label)


def luminance(colour: Any) -> float:
    """Return the relative luminance of a colour, 0 black to 1 white, from which contrasts are computed (WCAG 2)."""
    parts = np.asarray(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def light_grid(axes: Axes, axis: Any = "y") -> None:
    axes.grid(axis=axis, color="#dddddd", linewidth=0.6)


def legend(figure: Figure, axes: Axes, n_columns: int = 2, title: str | None = None) -> None:
    """Put the legend above the axes, where it covers nothing; none without labels."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(n_columns, len(labels)), title=title)


def sample(evidence: Evidence, n_trials: int) -> str:
    """Return the sample of a figure: ``n = 18 trials, 4 validation stories and 1,200 voxels of 1 subject``."""
    facts = evidence.facts
    parts, n_stories = [counted(n_trials, "trial")], len(facts.stories.get("validation", ()))
    if n_stories:
        parts.append(counted(n_stories, "validation story", "validation stories"))
    if facts.n_voxels:
        parts.append(f"{counted(sum(facts.n_voxels.values()), 'voxel')} of {counted(len(facts.n_voxels), 'subject')}")
    return f"n = {joined(parts)}"
