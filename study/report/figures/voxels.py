"""Figures of voxels: CC of the best trial and of the frozen baseline, as histograms and next to each other."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from study.report.figures import style
from study.results.evidence import Evidence
from study.wording import counted

MOST_POINTS = 3000  # voxels of a subject; with more, the density is drawn
MOST_SUBJECTS = 6  # one panel each
PER_ROW = 3
UNIT = "CC of a voxel (correlation)"


def draw_histograms(evidence: Evidence) -> style.Picture:
    """Draw the distribution of CC over voxels, best trial and frozen baseline, one panel per subject."""
    subjects = _subjects(evidence)
    figure, panels = _panels(len(subjects), 3.6)
    names = ("frozen baseline", f"best trial {style.short(evidence.best_id)}")
    for axes, (subject, rows) in zip(panels, subjects.items(), strict=True):
        both = (rows["frozen"], rows["best"])
        edges = _edges(np.concatenate(both))
        for values, name, colour, line in zip(both, names, (style.PLAIN, style.BEST), ("--", "-"), strict=True):
            axes.hist(values, edges, histtype="step", linewidth=1.8, color=colour, linestyle=line, label=name)
            axes.axvline(values.mean(), linewidth=1.0, color=colour, linestyle=line)
        _dress(axes, subject, len(subjects))
        axes.set_xlabel(UNIT)
        axes.set_ylabel(f"voxels (in bins of {edges[1] - edges[0]:.2g})")
    style.legend(figure, panels[0], 2)
    caption = f"CC over voxels on the validation stories; vertical lines are the means. {_size(evidence, subjects)}"
    return style.Picture(figure, caption, f"Distribution of CC over voxels. {_alt(subjects)}")


def draw_scatter(evidence: Evidence) -> style.Picture:
    """Draw CC of the best trial against the frozen baseline, voxel by voxel, one panel per subject."""
    subjects = _subjects(evidence)
    figure, panels = _panels(len(subjects), 4.6, 5.6)
    is_dense = any(len(rows) > MOST_POINTS for rows in subjects.values())
    drawn = [_draw_pairs(axes, rows, is_dense) for axes, rows in zip(panels, subjects.values(), strict=True)]
    for axes, subject in zip(panels, subjects, strict=True):
        _dress(axes, subject, len(subjects))
        axes.set_xlabel("frozen: CC (correlation)")
        axes.set_ylabel(f"trial {style.short(evidence.best_id, 12)}: CC (correlation)")
    if is_dense:
        highest = max(cells.get_array().max() for cells in drawn)
        for cells in drawn:
            cells.set_norm(LogNorm(1, max(highest, 2)))
        bar = figure.colorbar(drawn[0], ax=list(panels), label="voxels per cell", shrink=0.85)
        bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        bar.ax.minorticks_off()
    style.legend(figure, panels[0], 1)
    marks = "Cells are coloured by their number of voxels" if is_dense else "Each point is a voxel"
    caption = (
        f"CC of the best trial against the frozen baseline on the validation stories. {marks}; above the line, "
        f"fine-tuning gains. {_size(evidence, subjects)}"
    )
    return style.Picture(figure, caption, f"Best trial against frozen baseline, by voxel. {_alt(subjects)}")


def _subjects(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """Return the voxels that both trials score, one table per subject, for the first few subjects."""
    if evidence.facts.task != "encoding":
        raise style.NothingToDraw("text-only studies have no voxels")
    if evidence.best_id is None:
        raise style.NothingToDraw("no searched trial is complete")
    needs = "best trial and frozen baseline share no scored voxel"
    rows = style.required(evidence.voxels, "frozen", "best", otherwise=needs)
    groups = {str(subject): group for subject, group in rows.groupby("subject", sort=False)}
    return dict(list(groups.items())[:MOST_SUBJECTS])


def _panels(n: int, height: float, width: float = style.WIDTH) -> tuple[Figure, Any]:
    n_columns = min(n, PER_ROW)
    n_rows = -(-n // PER_ROW)
    figure, axes = style.canvas(n_columns, n_rows, max(width, 3.0 * n_columns), height if n == 1 else 3.1 * n_rows)
    for unused in axes.flat[n:]:
        unused.remove()
    return figure, axes.flat[:n]


def _edges(values: np.ndarray) -> np.ndarray:
    """Return bin edges of one round width that cover all values; more bins for more values."""
    width = max(float(np.ptp(values)) / np.clip(np.sqrt(values.size), 10, 50), 1e-3)
    width = float(f"{width:.1g}")
    first = np.floor(values.min() / width)
    return np.arange(first, np.ceil(values.max() / width) + 1.5) * width


def _dress(axes: Axes, subject: str, n: int) -> None:
    style.light_grid(axes, "both")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if n > 1:
        axes.set_title(style.short(subject, 16))


def _draw_pairs(axes: Axes, rows: pd.DataFrame, is_dense: bool) -> Any:
    x, y = rows["frozen"], rows["best"]
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    edge = 0.04 * (high - low) or 0.01
    limits = (low - edge, high + edge)
    if is_dense:
        colours = style.SEQUENTIAL.reversed()
        drawn: Any = axes.hexbin(x, y, gridsize=40, mincnt=1, cmap=colours, extent=(*limits, *limits))
    else:
        drawn = axes.plot(x, y, "o", markersize=3, markerfacecolor="none", color=style.BEST, markeredgewidth=0.7)
    axes.plot(limits, limits, color=style.INK, linestyle="--", linewidth=1.2, label="no difference")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    return drawn


def _size(evidence: Evidence, subjects: dict[str, pd.DataFrame]) -> str:
    stories = len(evidence.facts.stories.get("validation", ()))
    n = ", ".join(f"{counted(len(rows), 'voxel')} of {subject}" for subject, rows in subjects.items())
    n_all = evidence.voxels["subject"].nunique()
    rest = f" {counted(n_all - len(subjects), 'further subject')} not drawn." if n_all > len(subjects) else ""
    return f"n = {n}; {counted(stories, 'validation story', 'validation stories')}.{rest}"


def _alt(subjects: dict[str, pd.DataFrame]) -> str:
    parts = []
    for subject, rows in subjects.items():
        frozen, best = rows["frozen"], rows["best"]
        parts.append(
            f"{subject}, {counted(len(rows), 'voxel')}: mean {style.cc(frozen.mean())} frozen, "
            f"{style.cc(best.mean())} best; highest {style.cc(frozen.max())} frozen, {style.cc(best.max())} best; "
            f"best above frozen in {(best > frozen).mean():.0%}"
        )
    return f"{'. '.join(parts)}."
