"""Figures of voxels: CC of the best trial and of the frozen baseline, as histograms and beside each other."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from study.report.figures.style import (
    BEST,
    INK,
    LINES,
    PLAIN,
    SEQUENTIAL,
    WIDTH,
    Picture,
    canvas,
    cc,
    floats,
    known,
    legend,
    light_grid,
    short,
)
from study.results.evidence import Evidence
from study.wording import counted

MOST_POINTS = 3000  # voxels of a subject; of more the density is drawn
MOST_SUBJECTS = 6  # a panel each
PER_ROW = 3
UNIT = "CC of a voxel (correlation)"


def lacks_voxels(evidence: Evidence) -> str:
    """Say why no CC of voxels can be drawn."""
    if evidence.facts.task != "encoding":
        return "a study of text has no voxels"
    if evidence.best_id is None:
        return "no searched trial is complete"
    return (
        "" if len(known(evidence.voxels, "frozen", "best")) else "best trial and frozen baseline share no scored voxel"
    )


def draw_histograms(evidence: Evidence) -> Picture:
    """Draw how CC is distributed over voxels, of the best trial and of the frozen baseline, a panel a subject."""
    subjects = _subjects(evidence)
    figure, panels = _panels(len(subjects), 3.6)
    for axes, (subject, rows) in zip(panels, subjects.items(), strict=True):
        both = (floats(rows["frozen"]), floats(rows["best"]))
        edges = _edges(np.concatenate(both))
        for values, look in zip(both, _looks(evidence), strict=True):
            axes.hist(values, edges, histtype="step", linewidth=1.8, **look)
            axes.axvline(values.mean(), linewidth=1.0, **{k: v for k, v in look.items() if k != "label"})
        _dress(axes, subject, len(subjects))
        axes.set_xlabel(UNIT)
        axes.set_ylabel(f"voxels (in bins of {edges[1] - edges[0]:.2g})")
    legend(figure, panels[0], 2)
    caption = f"CC over voxels on the validation stories; upright lines are the means. {_size(evidence, subjects)}"
    return Picture(figure, caption, f"Distribution of CC over voxels. {_told(subjects)}")


def draw_scatter(evidence: Evidence) -> Picture:
    """Draw CC of the best trial against the frozen baseline, voxel by voxel, a panel a subject."""
    subjects = _subjects(evidence)
    figure, panels = _panels(len(subjects), 4.6, 5.6)
    is_dense = any(len(rows) > MOST_POINTS for rows in subjects.values())
    drawn = [_draw_pairs(axes, rows, is_dense) for axes, rows in zip(panels, subjects.values(), strict=True)]
    for axes, subject in zip(panels, subjects, strict=True):
        _dress(axes, subject, len(subjects))
        axes.set_xlabel("frozen: CC (correlation)")
        axes.set_ylabel(f"trial {short(evidence.best_id, 12)}: CC (correlation)")
    if is_dense:
        highest = max(one.get_array().max() for one in drawn)
        for one in drawn:
            one.set_norm(LogNorm(1, max(highest, 2)))
        bar = figure.colorbar(drawn[0], ax=list(panels), label="voxels in a cell", shrink=0.85)
        bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        bar.ax.minorticks_off()
    legend(figure, panels[0], 1)
    what = "Cells are coloured by how many voxels they hold" if is_dense else "A point is a voxel"
    caption = (
        f"CC of the best trial against the frozen baseline on the validation stories. {what}; above the line tuning "
        f"gains. {_size(evidence, subjects)}"
    )
    return Picture(figure, caption, f"Best trial against frozen baseline, by voxel. {_told(subjects)}")


def _subjects(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """Return the voxels that both models score, a table a subject, of the first few subjects."""
    rows = known(evidence.voxels, "frozen", "best")
    groups = {str(subject): group for subject, group in rows.groupby("subject", sort=False)}
    return dict(list(groups.items())[:MOST_SUBJECTS])


def _panels(n: int, height: float, width: float = WIDTH) -> tuple[Figure, Any]:
    n_columns = min(n, PER_ROW)
    n_rows = -(-n // PER_ROW)
    figure, axes = canvas(n_columns, n_rows, max(width, 3.0 * n_columns), height if n == 1 else 3.1 * n_rows)
    for unused in axes.flat[n:]:
        unused.remove()
    return figure, axes.flat[:n]


def _looks(evidence: Evidence) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"color": PLAIN, "linestyle": LINES[1], "label": "frozen baseline"},
        {"color": BEST, "linestyle": LINES[0], "label": f"best trial {short(evidence.best_id)}"},
    )


def _edges(values: np.ndarray) -> np.ndarray:
    """Return edges of bins, of one round width, that hold all values; more bins for more values."""
    width = max(float(np.ptp(values)) / np.clip(np.sqrt(values.size), 10, 50), 1e-3)
    width = float(f"{width:.1g}")
    first = np.floor(values.min() / width)
    return np.arange(first, np.ceil(values.max() / width) + 1.5) * width


def _dress(axes: Axes, subject: str, n: int) -> None:
    light_grid(axes, "both")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if n > 1:
        axes.set_title(short(subject, 16))


def _draw_pairs(axes: Axes, rows: pd.DataFrame, is_dense: bool) -> Any:
    x, y = floats(rows["frozen"]), floats(rows["best"])
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    edge = 0.04 * (high - low) or 0.01
    limits = (low - edge, high + edge)
    if is_dense:
        drawn: Any = axes.hexbin(x, y, gridsize=40, mincnt=1, cmap=SEQUENTIAL.reversed(), extent=(*limits, *limits))
    else:
        drawn = axes.plot(x, y, "o", markersize=3, markerfacecolor="none", color=BEST, markeredgewidth=0.7)
    axes.plot(limits, limits, color=INK, linestyle="--", linewidth=1.2, label="no difference")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    return drawn


def _size(evidence: Evidence, subjects: dict[str, pd.DataFrame]) -> str:
    stories = len(evidence.facts.stories.get("validation", ()))
    n = ", ".join(f"{counted(len(rows), 'voxel')} of {subject}" for subject, rows in subjects.items())
    n_all = evidence.voxels["subject"].nunique()
    rest = f" {counted(n_all - len(subjects), 'further subject')} not drawn." if n_all > len(subjects) else ""
    return f"n = {n}; {counted(stories, 'validation story', 'validation stories')}.{rest}"


def _told(subjects: dict[str, pd.DataFrame]) -> str:
    told = []
    for subject, rows in subjects.items():
        frozen, best = floats(rows["frozen"]), floats(rows["best"])
        told.append(
            f"{subject}, {counted(len(rows), 'voxel')}: mean {cc(frozen.mean())} frozen, {cc(best.mean())} best; "
            f"highest {cc(frozen.max())} frozen, {cc(best.max())} best; "
            f"best above frozen in {(best > frozen).mean():.0%}"
        )
    return f"{'. '.join(told)}."
