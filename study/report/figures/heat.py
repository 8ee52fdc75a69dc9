"""The figure of CC by rank and learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from study.report.figures import style
from study.results.evidence import Evidence

MOST_RATES, MOST_CELLS = 12, 60  # of a heat map; more rates are drawn as points, more cells without numbers
MOST_ACROSS = 8  # ranks whose cells have room for a number


def draw_heat(evidence: Evidence) -> style.Picture:
    """Draw CC by rank and learning rate: a heat map for a few rates, else one point per trial."""
    needs = "no complete searched LoRA trial has a CC"
    rows = style.required(evidence.rank_by_lr, "rank", "lr", "cc_mean", otherwise=needs).sort_values(["rank", "lr"])
    if rows["rank"].nunique() < 2 and rows["lr"].nunique() < 2:
        raise style.NothingToDraw("only one rank and one learning rate were tried")
    ranks, rates, scores = style.floats(rows, "rank", "lr", "cc_mean")
    figure, axes = style.canvas()
    margin = 0.0 if np.ptp(scores) else 1e-3
    norm = Normalize(scores.min() - margin, scores.max() + margin)
    is_grid = rows["lr"].nunique() <= MOST_RATES
    drawn = (_cells if is_grid else _scatter)(axes[0, 0], rows, norm)
    axes[0, 0].set_ylabel("learning rate")
    figure.colorbar(drawn, ax=axes[0, 0], label=style.UNITS["cc_mean"])
    mark = "each cell is the mean of the trials with that rank and rate" if is_grid else "each point is a trial"
    n_trials = int(rows["n_trials"].sum())
    caption = f"Mean CC by rank and learning rate; {mark}. {style.sample(evidence, n_trials)}."
    best = int(np.argmax(scores))
    setting = f"rank {ranks[best]:g}, learning rate {style.plain(rates[best])}"
    alt = f"Mean CC by rank and learning rate. Highest: {style.cc(scores[best])} at {setting}."
    if len(rows) <= MOST_CELLS:
        cells = zip(ranks, rates, scores, strict=True)
        alt += " " + "; ".join(f"rank {r:g}, rate {style.plain(lr)}: {style.cc(score)}" for r, lr, score in cells)
    return style.Picture(figure, caption, alt)


def _cells(axes: Axes, rows: pd.DataFrame, norm: Normalize) -> ScalarMappable:
    """Draw a heat map, with a number in each cell if there is room."""
    table = rows.pivot(index="lr", columns="rank", values="cc_mean")
    image, ranks = table.to_numpy(float), list(table.columns)  # (n_rates, n_ranks)
    drawn = axes.imshow(image, origin="lower", aspect="auto", cmap=style.SEQUENTIAL, norm=norm)
    if len(ranks) <= MOST_ACROSS and image.size <= MOST_CELLS:
        for (y, x), score in np.ndenumerate(image):
            if np.isfinite(score):
                light = style.luminance(style.SEQUENTIAL(norm(score))) + 0.05
                colour = "white" if 1.05 / light > light / 0.05 else style.INK  # the higher contrast
                axes.text(x, y, f"{score:.4f}", ha="center", va="center", fontsize=8, color=colour)
    shown = [int(i) for i in style.some_of(range(len(ranks)))]
    axes.set_xticks(shown, [f"{ranks[i]:g}" for i in shown])
    axes.set_yticks(range(len(table)), [style.plain(lr) for lr in table.index])
    axes.set_xlabel(style.RANK)
    return drawn


def _scatter(axes: Axes, rows: pd.DataFrame, norm: Normalize) -> ScalarMappable:
    ranks, rates, scores = style.floats(rows, "rank", "lr", "cc_mean")
    style.rank_axis(axes, sorted(set(ranks)))
    drawn = axes.scatter(np.log2(ranks), rates, c=scores, cmap=style.SEQUENTIAL, norm=norm, s=36)
    low, high = rates.min(), rates.max()
    axes.set_yscale("log")
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    style.light_grid(axes, "both")
    return drawn
