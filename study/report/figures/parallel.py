"""Parallel coordinates: each searched trial as a line through its hyperparameters and its score."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from study.report.figures import style
from study.results.evidence import Evidence
from study.wording import counted, joined

MOST_AXES = 7  # hyperparameters; more names would not fit on a screen
MOST_TICKS = 6
LOG_FROM = 8  # a parameter whose highest value is this many times its lowest gets a logarithmic scale


class Scale(NamedTuple):
    """A parameter on its own axis."""

    name: str
    places: np.ndarray  # (n_trials,) from 0 to 1, NaN for trials without a value
    ticks: tuple[tuple[float, str], ...]  # position and text of each label


def _rows(evidence: Evidence) -> pd.DataFrame:
    """Return the trials that analyses of rank include, or without those all complete searched trials."""
    column, trials = evidence.facts.metric.column, evidence.trials
    used = style.known(evidence.used, column)
    if len(used):
        return used
    complete = trials[(trials["phase"] == "search") & (trials["status"] == "COMPLETE")]
    return style.required(complete, column, otherwise="no searched trial is complete")


def draw_parallel(evidence: Evidence) -> style.Picture:
    """Draw parallel coordinates: one line per trial, darker for better, thick for the best."""
    facts, rows = evidence.facts, _rows(evidence)
    rows = rows.sort_values(facts.metric.column, ascending=facts.metric.is_gain, kind="stable")
    score = rows[facts.metric.column].to_numpy()
    varied = [name for name in evidence.varied if name in rows]
    names = [name for name in varied if rows[name].notna().any()][:MOST_AXES]
    if not names:
        raise style.NothingToDraw("the search varied no hyperparameter")
    scales = [
        *(scale_of(name, rows[name]) for name in names),
        scale_of(facts.metric.label, rows[facts.metric.column], True),
    ]
    figure, axes = style.canvas(width=max(6.6, 1.35 * len(scales)), height=4.4)
    plot = axes[0, 0]
    _lines(plot, scales, score if facts.metric.is_gain else -score)
    _draw_axes(plot, scales)
    beyond = len(varied) - len(names)
    rest = f" {counted(beyond, 'further parameter')} not drawn." if beyond else ""
    best = rows.iloc[-1]
    settings = joined([f"{name} {_value(best[name])}" for name in names])
    caption = (
        f"Each complete searched trial as a line through its hyperparameters to its {facts.metric.label}; every axis "
        f"has its own scale. Darker lines are better; thick: the best trial.{rest} {style.sample(evidence, len(rows))}."
    )
    alt = (
        f"Parallel coordinates of {counted(len(rows), 'trial')} over {joined(names)}; {facts.metric.label} from "
        f"{style.cc(score.min())} to {style.cc(score.max())}. Best trial {best['trial_id']}: {facts.metric.label} "
        f"{style.cc(float(best[facts.metric.column]))} with {settings}."
    )
    return style.Picture(figure, caption, alt)


def scale_of(name: str, values: pd.Series, is_score: bool = False) -> Scale:
    """Place values on an axis from 0 to 1: numbers by value or logarithm, other values evenly."""
    has_flags = values.map(lambda value: isinstance(value, bool)).any()
    numbers = np.full(len(values), np.nan) if has_flags else style.floats(values.to_frame(name), name)[0]
    if np.isfinite(numbers).any() and np.isfinite(numbers).sum() == values.notna().sum():
        is_log = not is_score and np.nanmin(numbers) > 0 and np.nanmax(numbers) >= LOG_FROM * np.nanmin(numbers)
        return _number_scale(f"{name} (log)" if is_log else name, numbers, is_log, is_score)
    texts = values.astype("string")
    levels = sorted(texts.dropna().unique())
    places = {level: i / (len(levels) - 1) if len(levels) > 1 else 0.5 for i, level in enumerate(levels)}
    ticks = tuple((place, style.short(level, 16)) for level, place in places.items())
    of_trials = np.array([places.get(text, np.nan) if not pd.isna(text) else np.nan for text in texts], float)
    return Scale(name, of_trials, ticks if len(ticks) <= 2 * MOST_TICKS else (ticks[0], ticks[-1]))


def _number_scale(name: str, numbers: np.ndarray, is_log: bool, is_score: bool) -> Scale:
    logs = np.log(numbers) if is_log else numbers
    low, high = np.nanmin(logs), np.nanmax(logs)
    span = high - low
    places = (logs - low) / span if span else np.where(np.isfinite(logs), 0.5, np.nan)
    values = np.unique(numbers[np.isfinite(numbers)])
    positions = np.unique(places[np.isfinite(places)])
    if len(values) > MOST_TICKS or (len(positions) > 1 and np.diff(positions).min() < 0.07):
        middle = np.exp((low + high) / 2) if is_log else (low + high) / 2
        if (values == np.round(values)).all():  # label an existing rank or layer
            middle = values[np.argmin(np.abs((np.log(values) if is_log else values) - (low + high) / 2))]
        values = np.array([values[0], middle, values[-1]])
        positions = ((np.log(values) if is_log else values) - low) / span
    text = style.cc if is_score else style.plain
    return Scale(name, places, tuple((float(p), text(value)) for p, value in zip(positions, values, strict=True)))


def _lines(axes: Axes, scales: list[Scale], goodness: np.ndarray) -> None:
    """Draw one line per trial, the best last (``goodness`` ascends); lines break at missing values."""
    span = np.ptp(goodness) or 1.0
    for i, good in enumerate(goodness):
        is_best = i == len(goodness) - 1
        y = [scale.places[i] for scale in scales]
        # bright for the worst, so that the best stand out on white
        colour = style.INK if is_best else style.SEQUENTIAL(1 - (good - goodness[0]) / span)
        axes.plot(
            y, color=colour, linewidth=2.4 if is_best else 0.9, alpha=1 if is_best else 0.6, marker=".", markersize=3
        )


def _draw_axes(axes: Axes, scales: list[Scale]) -> None:
    """Draw and label one axis per scale, every second label one line lower to make room."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
    for x, scale in enumerate(scales):
        axes.axvline(x, color=style.GREY, linewidth=0.8, zorder=0)
        for place, text in scale.ticks:
            axes.text(x - 0.06, place, text, ha="right", va="center", fontsize=7.5, color=style.INK, bbox=box, zorder=5)
    axes.set(xlim=(-0.75, len(scales) - 0.9), ylim=(-0.06, 1.06))
    axes.set_yticks([])
    axes.set_xticks(range(len(scales)), [style.short(scale.name, 20) for scale in scales])
    for tick in axes.xaxis.get_major_ticks()[1::2]:
        tick.set_pad(18)
    axes.set_xlabel("hyperparameters, and the score last")
    axes.set_ylabel("lowest to highest value tried (each axis its own)")
    axes.tick_params(axis="x", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _value(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return style.plain(float(value)) if isinstance(value, int | float | np.number) else str(value)
