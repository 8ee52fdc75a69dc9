"""Figures of rank: the score, and the adaptation gap."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from study.report.figures.style import (
    GREY,
    INK,
    LINES,
    MARKERS,
    UNITS,
    Picture,
    canvas,
    cc,
    floats,
    known,
    legend,
    light_grid,
    rank_axis,
    sample,
    sentence,
    short,
)
from study.results.evidence import Evidence
from study.wording import counted, joined

MOST_MEANS = 12  # ranks
MOST_RULES = 4  # of scaling that get a marker each
MEAN_ASIDE = 0.27  # how far to the right of its rank a mean stands, as a share of the way to the next rank
SEEDS_ONLY = "seeds only, not stories"
GAP = "adaptation gap (difference in CC)"


def lacks_ranks(evidence: Evidence) -> str:
    """Say why no score can be drawn against rank."""
    return _lacks(evidence, evidence.facts.metric)


def lacks_gaps(evidence: Evidence) -> str:
    """Say why no adaptation gap can be drawn against rank."""
    return _lacks(evidence, "adaptation_gap")


def _lacks(evidence: Evidence, column: str) -> str:
    if known(evidence.used, "rank").empty:
        return "no complete LoRA trial was searched"
    return "" if len(known(evidence.used, "rank", column)) else f"no trial has a value of {column}"


def draw_ranks(evidence: Evidence) -> Picture:
    """Draw the score against rank: trials as points, means with intervals, baselines and noise ceiling as lines."""
    facts, levels = evidence.facts, evidence.levels
    figure, axes = canvas()
    trials, means = _against_rank(axes[0, 0], evidence, facts.metric)
    lines = [
        ("frozen baseline", levels.frozen, 1),
        ("word rate", levels.word_rate, 3),
        ("noise ceiling", levels.ceiling, 2),
    ]
    _levels(axes[0, 0], lines, floats(trials[facts.metric]), floats(means["mean"]))
    axes[0, 0].set_ylabel(UNITS.get(facts.metric, facts.metric_label))
    legend(figure, axes[0, 0], 3)
    label = sentence(facts.metric_label)
    caption = f"{label} against LoRA rank. {_points(evidence, trials, means)} {sample(evidence, len(trials))}."
    beside = joined([f"{name} {cc(value)}" for name, value, _ in lines if value is not None])
    told = f"{label} by rank. {_told(means, trials, facts.metric)}"
    return Picture(figure, caption, f"{told} {sentence(beside)}." if beside else told)


def draw_gaps(evidence: Evidence) -> Picture:
    """Draw the adaptation gap against rank: how much more tuning gains on the stories that the adapter has read."""
    figure, axes = canvas()
    trials, means = _against_rank(axes[0, 0], evidence, "adaptation_gap")
    axes[0, 0].axhline(0, color=GREY, linestyle="--", linewidth=1.4, label="no gap")
    axes[0, 0].set_ylabel(GAP)
    legend(figure, axes[0, 0], 3)
    caption = (
        "Adaptation gap against LoRA rank: the gain in CC over the frozen baseline on the stories that the adapter has "
        "read, less that on the validation stories. Above zero the adapter fits what it has read. "
        f"{_points(evidence, trials, means)} {sample(evidence, len(trials))}."
    )
    return Picture(figure, caption, f"Adaptation gap by rank. {_told(means, trials, 'adaptation_gap')}")


def _against_rank(axes: Axes, evidence: Evidence, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw trials and means against rank, and return the rows of both."""
    trials = known(evidence.used, "rank", column)
    means = known(evidence.by_rank[evidence.by_rank["outcome"] == column], "rank", "mean")
    if len(means) > MOST_MEANS:  # of a sampler, where hardly two trials share a rank
        means = means.iloc[:0]
    ranks = sorted(set(floats(trials["rank"])) | set(floats(means["rank"])))
    rank_axis(axes, ranks)
    light_grid(axes)
    x = np.log2(floats(trials["rank"])) + _aside(trials, ranks)
    y, rules = floats(trials[column]), _rules(trials)
    for i, (name, rows) in enumerate(rules.items()):
        axes.plot(x[rows], y[rows], MARKERS[i], color=GREY, markersize=4.5, markerfacecolor="none", label=name)
    at = np.log2(floats(means["rank"])) + MEAN_ASIDE * _near(ranks)
    if len(means):
        axes.plot(at, floats(means["mean"]), "D", color=INK, markersize=6, label=_mean_name(means), zorder=4)
    low, high = floats(means["low"]), floats(means["high"])
    has = np.isfinite(low) & np.isfinite(high)
    span = (np.zeros(has.sum()), (high - low)[has])
    axes.errorbar(at[has], low[has], yerr=span, color=INK, capsize=4, linewidth=1.6, fmt="none", zorder=3)
    return trials, means


def _aside(trials: pd.DataFrame, ranks: list[float]) -> np.ndarray:
    """Return how far each trial stands from its rank, in doublings of rank: from low learning rates to high ones.

    All stand to the left of the mean, which none may hide.
    """
    rates = np.log(floats(trials["lr"])) if "lr" in trials else np.full(len(trials), np.nan)
    span = np.ptp(rates[np.isfinite(rates)]) if np.isfinite(rates).any() else 0.0
    if not span:
        return np.full(len(trials), -MEAN_ASIDE / 2)
    centred = (rates - np.nanmin(rates)) / span - 0.5
    return (0.44 * np.nan_to_num(centred) - 0.12) * _near(ranks)


def _near(ranks: list[float]) -> float:
    """Return how far apart the nearest ranks are, at most one doubling."""
    return float(min([1.0, *np.diff(np.log2(ranks))]))


def _rules(trials: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return which trials have which rule of scaling, if a few rules were tried; else all of them as one."""
    rules = trials["scaling_rule"].astype("string").fillna("another rule") if "scaling_rule" in trials else pd.Series()
    names = sorted({str(name) for name in rules})
    if not 1 < len(names) <= MOST_RULES:
        return {"a trial": np.ones(len(trials), bool)}
    return {short(name): (rules == name).to_numpy() for name in names}


def _levels(axes: Axes, lines: list[tuple[str, float | None, int]], *values: np.ndarray) -> None:
    """Draw horizontal lines; one so far off that the points would shrink below a third is only named."""
    data = np.concatenate([*values, *([[lines[0][1]]] if lines[0][1] is not None else [])])
    low, high = float(np.nanmin(data)), float(np.nanmax(data))
    reach = 2 * max(high - low, 0.1 * abs(high), 1e-9)
    for name, value, style in lines:
        if value is None or not np.isfinite(value):
            continue
        look: dict[str, Any] = {"color": GREY, "linestyle": LINES[style], "linewidth": 1.6}
        if low - reach <= value <= high + reach:
            axes.axhline(value, **look, label=name)
        else:
            axes.plot([], [], **look, label=f"{name} {cc(value)}, {'above' if value > high else 'below'}")


def _points(evidence: Evidence, trials: pd.DataFrame, means: pd.DataFrame) -> str:
    """Say what the points and bars are."""
    is_spread = "lr" in trials and trials["lr"].nunique() > 1
    told = [f"A point is a trial{'; inside a rank the learning rate grows to the right' if is_spread else ''}."]
    if len(means):
        covers = _covers(means)
        bars = f", bars its 95% interval{f' ({joined(covers)})' if covers else ''}" if _has_bars(means) else ""
        told.append(f"Diamonds are the mean of a rank{bars}.")
    if evidence.facts.is_adaptive:
        told.append("The search was adaptive: exploratory.")
    return " ".join(told)


def _mean_name(means: pd.DataFrame) -> str:
    """Return what the legend calls the means; it says where bars leave out what other stories would change."""
    is_narrow = _has_bars(means) and _covers(means) == [SEEDS_ONLY]
    return f"mean of a rank{' (bars: seeds only)' if is_narrow else ''}"


def _has_bars(means: pd.DataFrame) -> bool:
    return bool(np.isfinite(floats(means["low"])).any())


def _covers(means: pd.DataFrame) -> list[str]:
    """Return what the intervals speak of, in words."""
    found = sorted({str(one) for one in means["covers"].dropna()} - {""})
    return [SEEDS_ONLY if one == "seeds" else one for one in found]


def _told(means: pd.DataFrame, trials: pd.DataFrame, column: str) -> str:
    """Say the mean and interval of each rank; without means, the range of the trials."""
    if means.empty:
        values = floats(trials[column])
        return f"{counted(len(values), 'trial')} from {cc(values.min())} to {cc(values.max())}."
    rows = means.sort_values("rank")
    told = []
    for rank, mean, low, high in zip(*(floats(rows[name]) for name in ("rank", "mean", "low", "high")), strict=True):
        interval = f" ({cc(low)} to {cc(high)})" if np.isfinite([low, high]).all() else ""
        told.append(f"rank {rank:g}: {cc(mean)}{interval}")
    return f"{'; '.join(told)}."
