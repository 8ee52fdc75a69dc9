"""The figure of rank beside learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from study.report.figures.style import (
    INK,
    SEQUENTIAL,
    UNITS,
    Picture,
    canvas,
    cc,
    floats,
    known,
    light_grid,
    luminance,
    rank_axis,
    rate,
    sample,
    some_of,
)
from study.results.evidence import Evidence

MOST_RATES, MOST_CELLS = 12, 60  # of a heat map; more rates are points, and more cells bear no numbers
MOST_ACROSS = 8  # ranks beside each other whose cells have room for a number


def lacks_heat(evidence: Evidence) -> str:
    """Say why no map of rank and learning rate can be drawn."""
    rows = known(evidence.rank_by_lr, "rank", "lr", "cc_mean")
    if rows.empty:
        return "no complete LoRA trial with a CC was searched"
    if rows["rank"].nunique() < 2 and rows["lr"].nunique() < 2:
        return "only one rank and one learning rate were tried"
    return ""


def draw_heat(evidence: Evidence) -> Picture:
    """Draw CC by rank and learning rate: cells where a few rates were tried, points where each trial has its own."""
    rows = known(evidence.rank_by_lr, "rank", "lr", "cc_mean").sort_values(["rank", "lr"])
    figure, axes = canvas()
    norm = Normalize(*_spread(floats(rows["cc_mean"])))
    is_grid = rows["lr"].nunique() <= MOST_RATES
    (_cells if is_grid else _scatter)(figure, axes[0, 0], rows, norm)
    n = int(floats(rows["n_trials"]).sum()) if "n_trials" in rows else len(rows)
    best = rows.iloc[int(np.argmax(floats(rows["cc_mean"])))]
    what = "the mean of the trials with that rank and rate" if is_grid else "a trial"
    caption = (
        f"Mean CC by rank and learning rate; {'a cell' if is_grid else 'a point'} is {what}. {sample(evidence, n)}."
    )
    cells = zip(floats(rows["rank"]), floats(rows["lr"]), floats(rows["cc_mean"]), strict=True)
    told = (
        "; ".join(f"rank {r:g}, rate {rate(lr)}: {cc(score)}" for r, lr, score in cells)
        if len(rows) <= MOST_CELLS
        else ""
    )
    highest = (
        f"Highest: {cc(float(best['cc_mean']))} at rank {float(best['rank']):g}, learning rate {rate(best['lr'])}."
    )
    return Picture(figure, caption, f"Mean CC by rank and learning rate. {highest} {told}".strip())


def _spread(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 1e-3, high + 1e-3)


def _cells(figure: Figure, axes: Axes, rows: pd.DataFrame, norm: Normalize) -> None:
    """Draw a heat map, its cells numbered where there is room."""
    rates, ranks = sorted(set(floats(rows["lr"]))), sorted(set(floats(rows["rank"])))
    image = np.full((len(rates), len(ranks)), np.nan)
    places = [
        (rates.index(lr), ranks.index(rank)) for lr, rank in zip(floats(rows["lr"]), floats(rows["rank"]), strict=True)
    ]
    for place, score in zip(places, floats(rows["cc_mean"]), strict=True):
        image[place] = score
    drawn = axes.imshow(image, origin="lower", aspect="auto", cmap=SEQUENTIAL, norm=norm)
    figure.colorbar(drawn, ax=axes, label=UNITS["cc_mean"])
    if len(ranks) <= MOST_ACROSS and image.size <= MOST_CELLS:
        for (y, x), score in np.ndenumerate(image):
            if np.isfinite(score):
                colour = _on(SEQUENTIAL(norm(score)))
                axes.text(x, y, f"{score:.4f}", ha="center", va="center", fontsize=8, color=colour)
    shown = some_of([float(i) for i in range(len(ranks))])
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{ranks[int(i)]:g}" for i in shown]))
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(rates)))))
    axes.yaxis.set_major_formatter(FixedFormatter([rate(lr) for lr in rates]))
    axes.set_xlabel("rank r of the adapter (inner size of B A)")
    axes.set_ylabel("learning rate (a step)")


def _on(colour: tuple[float, ...]) -> str:
    """Return which colour of writing stands out more on a colour."""
    return "white" if 1.05 / (luminance(colour) + 0.05) > (luminance(colour) + 0.05) / 0.05 else INK


def _scatter(figure: Figure, axes: Axes, rows: pd.DataFrame, norm: Normalize) -> None:
    rank_axis(axes, sorted(set(floats(rows["rank"]))))
    drawn = axes.scatter(
        np.log2(floats(rows["rank"])), floats(rows["lr"]), c=floats(rows["cc_mean"]), cmap=SEQUENTIAL, norm=norm, s=36
    )
    rate_axis(axes, floats(rows["lr"]))
    light_grid(axes, "both")
    figure.colorbar(drawn, ax=axes, label=UNITS["cc_mean"])


def rate_axis(axes: Axes, rates: np.ndarray) -> None:
    """Make the y axis a logarithmic one of learning rates."""
    axes.set_yscale("log")
    low, high = rates.min(), rates.max()
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("learning rate (a step)")
