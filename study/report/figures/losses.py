"""The figure of losses by epoch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from study.report.figures.style import (
    GREY,
    LINES,
    MARKERS,
    MOST_NAMED,
    Picture,
    canvas,
    floats,
    known,
    legend,
    light_grid,
    rank_colours,
    sample,
    some_of,
    whole_axis,
)
from study.results.evidence import Evidence

MOST_LINES = 24  # trials whose losses are drawn as they are; of more, thin, and the mean of a rank thick
LOSSES = (("mlm_loss_train", "mlm_loss_heldout"), ("loss_train", "loss_heldout"))  # of a masked LM; of a classifier


def lacks_losses(evidence: Evidence) -> str:
    """Say why no losses can be drawn."""
    return "" if len(_epochs(evidence)) else "no trial that was searched reports a loss by epoch"


def _epochs(evidence: Evidence) -> pd.DataFrame:
    """Return the epochs to draw: of the trials that analyses of rank use; without those, of all searched ones."""
    for pair in LOSSES:
        rows = evidence.epochs
        if rows.empty or not {"epoch", "phase"} <= set(rows):
            return rows.iloc[:0]
        rows = rows[rows["phase"] == "search"]
        used = rows[rows["is_used"].fillna(False).astype(bool)] if "is_used" in rows else rows
        rows = used if len(used) else rows
        present = [name for name in pair if len(known(rows, "epoch", name))]
        if present:
            return rows
    return rows.iloc[:0]


def draw_losses(evidence: Evidence) -> Picture:
    """Draw training and held-out loss by epoch, coloured by rank, on one scale."""
    rows = _epochs(evidence).assign(rank=lambda frame: floats(frame["rank"]) if "rank" in frame else np.nan)
    pair = next(pair for pair in LOSSES if any(len(known(rows, "epoch", name)) for name in pair))
    present = [
        (name, where) for name, where in zip(pair, ("training", "held-out"), strict=True) if len(known(rows, name))
    ]
    figure, axes = canvas(len(present))
    unit = "masked-LM loss (nats a token)" if pair == LOSSES[0] else "loss (nats a text)"
    groups = _groups(rows)
    n_trials = rows["trial_id"].nunique()
    are_many = n_trials > MOST_LINES and len(groups) <= MOST_NAMED
    told = []
    for panel, (column, where) in zip(axes[0], present, strict=True):
        told += [f"{where} loss: {_draw_loss(panel, rows, column, groups, are_many)}"]
        whole_axis(panel, "epoch (passes over the text)")
        panel.set_title(where)
        panel.set_ylabel(unit)
        light_grid(panel)
    lows, highs = zip(*(panel.get_ylim() for panel in axes[0]), strict=True)
    for panel in axes[0]:
        panel.set_ylim(min(lows), max(highs))
    legend(figure, axes[0, 0], 4, "rank" if len(groups) > 1 or not np.isnan(next(iter(groups))) else None)
    thick = " Thin lines are trials, thick ones the mean of a rank." if are_many else " A line is a trial."
    places = " and ".join(where for _, where in present)
    unmarked = " Learning rates are not marked: a rank's lines differ by them too." * (len(_rates(rows)) > 1)
    caption = f"Loss by epoch ({places}), coloured by rank.{thick}{unmarked} {sample(evidence, n_trials)}."
    return Picture(
        figure, caption, f"Loss by epoch, mean of each rank from the first to the last epoch; {'; '.join(told)}."
    )


def _rates(rows: pd.DataFrame) -> set[float]:
    """Return the learning rates that are known."""
    return set(floats(known(rows, "lr")["lr"])) if "lr" in rows else set()


def _groups(rows: pd.DataFrame) -> dict[float, tuple[str, Any]]:
    """Return name and colour of each rank; NaN is what has no rank."""
    ranks = sorted(set(floats(rows["rank"])[np.isfinite(floats(rows["rank"]))]))
    named = some_of(ranks)
    found = {rank: (f"{rank:g}" if rank in named else "", colour) for rank, colour in rank_colours(ranks).items()}
    return found | ({float("nan"): ("no rank", GREY)} if rows["rank"].isna().any() else {})


def _draw_loss(
    axes: Axes, rows: pd.DataFrame, column: str, groups: dict[float, tuple[str, Any]], are_many: bool
) -> str:
    """Draw one loss, and return its mean in words, of each rank that has a name."""
    rows = known(rows, "epoch", column)
    told = []
    for i, (rank, (name, colour)) in enumerate(groups.items()):
        group = rows[rows["rank"].isna() if np.isnan(rank) else rows["rank"] == rank]
        if group.empty:
            continue
        look: dict[str, Any] = {
            "color": colour,
            "linestyle": LINES[i % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        lines = [
            np.column_stack([floats(one["epoch"]), floats(one[column])])
            for _, one in group.sort_values("epoch").groupby("trial_id")
        ]
        mean = group.assign(loss=floats(group[column])).groupby(floats(group["epoch"]))["loss"].mean()
        if are_many:
            axes.add_collection(LineCollection(lines, linewidths=0.5, alpha=0.45, colors=[colour]))
            axes.plot(mean.index, mean, **look, linewidth=2.2, markersize=5)
        else:
            for one in lines:
                axes.plot(*one.T, **look, markersize=4)
        axes.plot([], [], **look, label=name or "_")
        if name:
            of = f"rank {rank:g}" if np.isfinite(rank) else name
            told.append(f"{of} {mean.iloc[0]:.3f} to {mean.iloc[-1]:.3f}")
    return ", ".join(told)
