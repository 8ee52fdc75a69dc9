"""The figure of CC by rank and learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from study.report.figures import style
from study.results.evidence import Evidence

MOST_RATES, MOST_CELLS = 12, 60  # of a heat map; more rates are drawn as points, more cells without numbers
MOST_ACROSS = 8  # ranks whose cells have room for a number


def lacks_heat(evidence: Evidence) -> str:
    """Return why CC by rank and learning rate cannot be drawn."""
    rows = style.known(evidence.rank_by_lr, "rank", "lr", "cc_mean")
    if rows.empty:
        return "no complete searched LoRA trial has a CC"
    if rows["rank"].nunique() < 2 and rows["lr"].nunique() < 2:
        return "only one rank and one learning rate were tried"
    return ""


def draw_heat(evidence: Evidence) -> style.Picture:
    """Draw CC by rank and learning rate: a heat map for a few rates, else one point per trial."""
    rows = style.known(evidence.rank_by_lr, "rank", "lr", "cc_mean").sort_values(["rank", "lr"])
    figure, axes = style.canvas()
    norm = Normalize(*_spread(style.floats(rows["cc_mean"])))
    is_grid = rows["lr"].nunique() <= MOST_RATES
    (_cells if is_grid else _scatter)(figure, axes[0, 0], rows, norm)
    n = int(style.floats(rows["n_trials"]).sum()) if "n_trials" in rows else len(rows)
    best = rows.iloc[int(np.argmax(style.floats(rows["cc_mean"])))]
    mark = "each cell is the mean of the trials with that rank and rate" if is_grid else "each point is a trial"
    caption = f"Mean CC by rank and learning rate; {mark}. {style.sample(evidence, n)}."
    cells = zip(style.floats(rows["rank"]), style.floats(rows["lr"]), style.floats(rows["cc_mean"]), strict=True)
    values = "; ".join(f"rank {r:g}, rate {style.plain(lr)}: {style.cc(score)}" for r, lr, score in cells)
    if len(rows) > MOST_CELLS:
        values = ""
    setting = f"rank {float(best['rank']):g}, learning rate {style.plain(best['lr'])}"
    highest = f"Highest: {style.cc(float(best['cc_mean']))} at {setting}."
    return style.Picture(figure, caption, f"Mean CC by rank and learning rate. {highest} {values}".strip())


def _spread(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 1e-3, high + 1e-3)


def _cells(figure: Figure, axes: Axes, rows: pd.DataFrame, norm: Normalize) -> None:
    """Draw a heat map, with a number in each cell if there is room."""
    rates, ranks = sorted(set(style.floats(rows["lr"]))), sorted(set(style.floats(rows["rank"])))
    image = np.full((len(rates), len(ranks)), np.nan)
    image[np.searchsorted(rates, style.floats(rows["lr"])), np.searchsorted(ranks, style.floats(rows["rank"]))] = (
        style.floats(rows["cc_mean"])
    )
    drawn = axes.imshow(image, origin="lower", aspect="auto", cmap=style.SEQUENTIAL, norm=norm)
    figure.colorbar(drawn, ax=axes, label=style.UNITS["cc_mean"])
    if len(ranks) <= MOST_ACROSS and image.size <= MOST_CELLS:
        for (y, x), score in np.ndenumerate(image):
            if np.isfinite(score):
                colour = _on(style.SEQUENTIAL(norm(score)))
                axes.text(x, y, f"{score:.4f}", ha="center", va="center", fontsize=8, color=colour)
    shown = style.some_of([float(i) for i in range(len(ranks))])
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{ranks[int(i)]:g}" for i in shown]))
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(rates)))))
    axes.yaxis.set_major_formatter(FixedFormatter([style.plain(lr) for lr in rates]))
    axes.set_xlabel("rank r of the adapter (inner size of B A)")
    axes.set_ylabel("learning rate")


def _on(colour: tuple[float, ...]) -> str:
    """Return the text colour with the higher contrast on a colour."""
    return "white" if 1.05 / (style.luminance(colour) + 0.05) > (style.luminance(colour) + 0.05) / 0.05 else style.INK


def _scatter(figure: Figure, axes: Axes, rows: pd.DataFrame, norm: Normalize) -> None:
    style.rank_axis(axes, sorted(set(style.floats(rows["rank"]))))
    drawn = axes.scatter(
        np.log2(style.floats(rows["rank"])),
        style.floats(rows["lr"]),
        c=style.floats(rows["cc_mean"]),
        cmap=style.SEQUENTIAL,
        norm=norm,
        s=36,
    )
    rate_axis(axes, style.floats(rows["lr"]))
    style.light_grid(axes, "both")
    figure.colorbar(drawn, ax=axes, label=style.UNITS["cc_mean"])


def rate_axis(axes: Axes, rates: np.ndarray) -> None:
    """Make the y axis one of learning rates, logarithmic."""
    axes.set_yscale("log")
    low, high = rates.min(), rates.max()
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("learning rate")
