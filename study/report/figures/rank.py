"""Figures of rank: the score, and the adaptation gap."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from study.report.figures import style
from study.results.evidence import Evidence
from study.wording import capitalised, counted, joined

MOST_MEANS = 12  # ranks
MOST_RULES = 4  # scaling rules with a marker each
MEAN_SHIFT = 0.27  # of a mean to the right of its rank, as a share of the distance to the next rank
SEEDS_ONLY = "seeds only, not stories"


def draw_ranks(evidence: Evidence) -> style.Picture:
    """Draw the score against rank: trials as points, means with intervals, baselines and noise ceiling as lines."""
    facts, levels = evidence.facts, evidence.levels
    figure, axes = style.canvas()
    trials, means = _against_rank(axes[0, 0], evidence, facts.metric.column)
    lines = [
        ("frozen baseline", levels.frozen, 1),
        ("word rate", levels.word_rate, 3),
        ("noise ceiling", levels.ceiling, 2),
    ]
    _levels(axes[0, 0], lines, np.concatenate([trials[facts.metric.column], means["mean"]]))
    axes[0, 0].set_ylabel(style.UNITS.get(facts.metric.column, facts.metric.label))
    style.legend(figure, axes[0, 0], 3)
    label = capitalised(facts.metric.label)
    caption = f"{label} against LoRA rank. {_points(evidence, trials, means)} {style.sample(evidence, len(trials))}."
    levels_text = joined([f"{name} {style.cc(value)}" for name, value, _ in lines if value is not None])
    alt = f"{label} by rank. {_means_text(means, trials, facts.metric.column)}"
    return style.Picture(figure, caption, f"{alt} {capitalised(levels_text)}." if levels_text else alt)


def draw_gaps(evidence: Evidence) -> style.Picture:
    """Draw the adaptation gap against rank."""
    figure, axes = style.canvas()
    trials, means = _against_rank(axes[0, 0], evidence, "adaptation_gap")
    axes[0, 0].axhline(0, color=style.GREY, linestyle="--", linewidth=1.4, label="no gap")
    axes[0, 0].set_ylabel("adaptation gap (difference in CC)")
    style.legend(figure, axes[0, 0], 3)
    caption = (
        "Adaptation gap against LoRA rank: the gain in CC over the frozen baseline on the stories that fine-tuning "
        "read, minus that on the validation stories. Above 0, the adapter learned these stories rather than language. "
        f"{_points(evidence, trials, means)} {style.sample(evidence, len(trials))}."
    )
    return style.Picture(figure, caption, f"Adaptation gap by rank. {_means_text(means, trials, 'adaptation_gap')}")


def _against_rank(axes: Axes, evidence: Evidence, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw trials and means against rank, and return the rows of both."""
    used = style.required(evidence.used, "rank", otherwise="no searched LoRA trial is complete")
    trials = style.required(used, column, otherwise=f"no trial has a value of {column}")
    means = style.known(evidence.by_rank[evidence.by_rank["outcome"] == column], "rank", "mean")
    if len(means) > MOST_MEANS:  # a sampler hardly tries the same rank twice
        means = means.iloc[:0]
    ranks = sorted({*trials["rank"], *means["rank"]})
    style.rank_axis(axes, ranks)
    style.light_grid(axes)
    x = np.log2(trials["rank"]) + _shifts(trials, ranks)
    hollow: dict[str, Any] = {"color": style.GREY, "markersize": 4.5, "markerfacecolor": "none"}
    for (name, rows), marker in zip(_rules(trials).items(), style.MARKERS, strict=False):
        axes.plot(x[rows], trials[column][rows], marker, label=name, **hollow)
    if len(means):
        x_means = np.log2(means["rank"]) + MEAN_SHIFT * _spacing(ranks)
        bars = style.known(means, "low", "high")
        is_narrow = len(bars) > 0 and _covers(means) == [SEEDS_ONLY]
        label = f"mean of a rank{' (bars: seeds only)' if is_narrow else ''}"
        axes.plot(x_means, means["mean"], "D", color=style.INK, markersize=6, label=label, zorder=4)
        reach = (np.zeros(len(bars)), bars["high"] - bars["low"])
        look: dict[str, Any] = {"color": style.INK, "capsize": 4, "linewidth": 1.6, "fmt": "none", "zorder": 3}
        axes.errorbar(x_means[bars.index], bars["low"], yerr=reach, **look)
    return trials, means


def _shifts(trials: pd.DataFrame, ranks: list[float]) -> np.ndarray:
    """Return the shift of each trial from its rank, in doublings of rank, by learning rate.

    All are to the left of the mean, so that none hides it.
    """
    rates = np.log(style.floats(trials, "lr")[0])
    if np.unique(rates[np.isfinite(rates)]).size < 2:
        return np.full(len(trials), -MEAN_SHIFT / 2)
    centred = (rates - np.nanmin(rates)) / (np.nanmax(rates) - np.nanmin(rates)) - 0.5
    return (0.44 * np.nan_to_num(centred) - 0.12) * _spacing(ranks)


def _spacing(ranks: list[float]) -> float:
    """Return the distance of the nearest ranks in doublings, at most 1."""
    return float(min([1.0, *np.diff(np.log2(ranks))]))


def _rules(trials: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the trials of each scaling rule if a few rules were tried, else all trials under one name."""
    rules = trials["scaling_rule"].astype("string").fillna("another rule")
    names = sorted({str(name) for name in rules})
    if not 1 < len(names) <= MOST_RULES:
        return {"a trial": np.ones(len(trials), bool)}
    return {style.short(name): (rules == name).to_numpy() for name in names}


def _levels(axes: Axes, lines: list[tuple[str, float | None, int]], values: np.ndarray) -> None:
    """Draw horizontal lines; one so far away that the points would shrink below a third is only in the legend."""
    frozen = lines[0][1]
    values = values if frozen is None else np.append(values, frozen)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    reach = 2 * max(high - low, 0.1 * abs(high), 1e-9)
    for name, value, pattern in lines:
        if value is None or not np.isfinite(value):
            continue
        look: dict[str, Any] = {"color": style.GREY, "linestyle": style.LINES[pattern], "linewidth": 1.6}
        if low - reach <= value <= high + reach:
            axes.axhline(value, **look, label=name)
        else:
            axes.plot([], [], **look, label=f"{name} {style.cc(value)}, {'above' if value > high else 'below'}")


def _points(evidence: Evidence, trials: pd.DataFrame, means: pd.DataFrame) -> str:
    """Describe points and bars."""
    is_spread = trials["lr"].nunique() > 1
    sentences = [f"Points are trials{'; within a rank, learning rate increases to the right' if is_spread else ''}."]
    if len(means):
        covers = f" ({joined(_covers(means))})" if _covers(means) else ""
        bars = f", bars its 95% interval{covers}" if len(style.known(means, "low")) else ""
        sentences.append(f"Diamonds are the mean of each rank{bars}.")
    if evidence.facts.is_adaptive:
        sentences.append("The search was adaptive: exploratory.")
    return " ".join(sentences)


def _covers(means: pd.DataFrame) -> list[str]:
    """Return what the intervals cover, in words."""
    covers = sorted({str(text) for text in means["covers"].dropna()} - {""})
    return [SEEDS_ONLY if text == "seeds" else text for text in covers]


def _means_text(means: pd.DataFrame, trials: pd.DataFrame, column: str) -> str:
    """Return mean and interval of each rank in words; without means, the range of the trials."""
    if means.empty:
        values = trials[column]
        return f"{counted(len(values), 'trial')} from {style.cc(values.min())} to {style.cc(values.max())}."
    parts = []
    columns = style.floats(means.sort_values("rank"), "rank", "mean", "low", "high")
    for rank, mean, low, high in zip(*columns, strict=True):
        interval = f" ({style.cc(low)} to {style.cc(high)})" if np.isfinite([low, high]).all() else ""
        parts.append(f"rank {rank:g}: {style.cc(mean)}{interval}")
    return f"{'; '.join(parts)}."
