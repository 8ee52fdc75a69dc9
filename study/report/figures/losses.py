"""The figure of losses by epoch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from study.report.figures import style
from study.results.evidence import Evidence

MOST_LINES = 24  # trials with a line each; with more, trials are thin and the mean of each rank thick
NO_LOSS = "no searched trial reports a loss per epoch"
MLM_LOSSES = {"mlm_loss_train": "training", "mlm_loss_heldout": "held-out"}
LOSSES = MLM_LOSSES | {"loss_train": "training", "loss_heldout": "held-out"}  # the latter of a classifier


def _epochs(evidence: Evidence) -> pd.DataFrame:
    """Return the epochs of the trials that analyses of rank include, or without those of all searched trials."""
    rows = style.required(evidence.epochs, "epoch", otherwise=NO_LOSS)
    rows = rows[rows["phase"] == "search"]
    used = rows[rows["is_used"].fillna(False).astype(bool)]
    return used if len(used) else rows


def draw_losses(evidence: Evidence) -> style.Picture:
    """Draw training and held-out loss by epoch, coloured by rank, on one scale."""
    rows = _epochs(evidence)
    rows = rows.assign(rank=style.floats(rows, "rank")[0])
    present = [(name, where) for name, where in LOSSES.items() if len(style.known(rows, "epoch", name))][:2]
    if not present:
        raise style.NothingToDraw(NO_LOSS)
    figure, axes = style.canvas(len(present))
    unit = "masked-LM loss (nats per token)" if present[0][0] in MLM_LOSSES else "loss (nats per text)"
    groups = _groups(rows)
    n_trials = rows["trial_id"].nunique()
    are_many = n_trials > MOST_LINES and len(groups) <= style.MOST_NAMED
    means = []
    for panel, (column, where) in zip(axes[0], present, strict=True):
        means += [f"{where} loss: {_draw_loss(panel, rows, column, groups, are_many)}"]
        style.whole_axis(panel, "epoch (passes over the text)")
        panel.set_title(where)
        panel.set_ylabel(unit)
        style.light_grid(panel)
    lows, highs = zip(*(panel.get_ylim() for panel in axes[0]), strict=True)
    for panel in axes[0]:
        panel.set_ylim(min(lows), max(highs))
    style.legend(figure, axes[0, 0], 4, "rank" if len(groups) > 1 or not np.isnan(next(iter(groups))) else None)
    thick = " Thin lines are trials, thick ones the mean of each rank." if are_many else " Each line is a trial."
    unmarked = " Learning rates are not marked; lines of one rank differ by them too." * (rows["lr"].nunique() > 1)
    shown = " and ".join(where for _, where in present)
    caption = f"Loss by epoch ({shown}), coloured by rank.{thick}{unmarked} {style.sample(evidence, n_trials)}."
    alt = f"Loss by epoch, mean of each rank from the first to the last epoch; {'; '.join(means)}."
    return style.Picture(figure, caption, alt)


def _groups(rows: pd.DataFrame) -> dict[float, tuple[str, Any]]:
    """Return label and colour of each rank; NaN stands for no rank."""
    ranks = sorted(rows["rank"].dropna().unique())
    named = style.some_of(ranks)
    colours = style.rank_colours(ranks).items()
    groups = {rank: (f"{rank:g}" if rank in named else "", colour) for rank, colour in colours}
    return groups | ({float("nan"): ("no rank", style.GREY)} if rows["rank"].isna().any() else {})


def _draw_loss(
    axes: Axes, rows: pd.DataFrame, column: str, groups: dict[float, tuple[str, Any]], are_many: bool
) -> str:
    """Draw one loss, and return the mean of each labelled rank in words."""
    rows = style.known(rows, "epoch", column)
    means = []
    for i, (rank, (name, colour)) in enumerate(groups.items()):
        group = rows[rows["rank"].isna() if np.isnan(rank) else rows["rank"] == rank]
        if group.empty:
            continue
        line, marker = style.LINES[i % len(style.LINES)], style.MARKERS[i % len(style.MARKERS)]
        look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker}
        lines = [trial[["epoch", column]].to_numpy() for _, trial in group.sort_values("epoch").groupby("trial_id")]
        mean = group.groupby("epoch")[column].mean()
        if are_many:
            axes.add_collection(LineCollection(lines, linewidths=0.5, alpha=0.45, colors=[colour]))
            axes.plot(mean.index, mean, **look, linewidth=2.2, markersize=5)
        else:
            for points in lines:
                axes.plot(*points.T, **look, markersize=4)
        axes.plot([], [], **look, label=name or "_")
        if name:
            of = f"rank {rank:g}" if np.isfinite(rank) else name
            means.append(f"{of} {mean.iloc[0]:.3f} to {mean.iloc[-1]:.3f}")
    return ", ".join(means)
