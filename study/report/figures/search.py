"""Figures of the search: history, importances of parameters, finalists, time per trial."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from study.report.figures import style
from study.results.evidence import Evidence
from study.wording import capitalised, counted, duration, joined

MOST_BARS = 15  # parameters
FEW_TRIALS = 30  # with fewer, the order of importances is unreliable
MOST_FINALISTS = 12
STAGES = {"seconds_train": "training", "seconds_embed": "embedding", "seconds_ridge": "ridge", "seconds_other": "other"}
STAGE_LOOKS = (("#123f66", ""), ("#d9822b", "//"), ("#8ab6d6", ".."), ("#e3e3e3", "xx"))
MOST_HATCHED = 60  # bars; with more, no hatching


def draw_history(evidence: Evidence) -> style.Picture:
    """Draw the score of each trial in the order of the search, the best so far, and the frozen baseline."""
    facts, needs = evidence.facts, "no searched trial is complete"
    rows = style.required(evidence.history, "number", "value", otherwise=needs).sort_values("number")
    figure, axes = style.canvas()
    plot = axes[0, 0]
    x, y, best = style.floats(rows, "number", "value", "best_so_far")
    plot.plot(x, y, "o", color=style.GREY, markersize=4.5, markerfacecolor="none", label="a trial")
    marker = "." if len(x) == 1 else ""
    plot.step(x, best, where="post", color=style.BEST, linewidth=2, label="best so far", marker=marker)
    if evidence.levels.frozen is not None:
        plot.axhline(evidence.levels.frozen, color=style.INK, linestyle="--", linewidth=1.4, label="frozen baseline")
    style.whole_axis(plot, "complete trial, in the order of the search")
    plot.set_ylabel(style.UNITS.get(facts.metric.column, facts.metric.label))
    style.light_grid(plot)
    style.legend(figure, plot, 3)
    frozen = "" if evidence.levels.frozen is None else f", frozen baseline {style.cc(evidence.levels.frozen)}"
    caption = (
        f"{capitalised(facts.metric.label)} of the trials in the order of the search ({facts.sampler}). The best of "
        f"several noisy trials is biased upwards. {style.sample(evidence, len(rows))}."
    )
    name = rows["trial_id"].iloc[int((np.argmax if facts.metric.is_gain else np.argmin)(y))]
    alt = (
        f"{capitalised(facts.metric.label)} of {counted(len(rows), 'trial')}, from {style.cc(y.min())} to "
        f"{style.cc(y.max())}; best {style.cc(best[-1])}, trial {name}{frozen}."
    )
    return style.Picture(figure, caption, alt)


def draw_importances(evidence: Evidence) -> style.Picture:
    """Draw the share of the score's variance that each parameter explains, with its interval."""
    needs = "too few complete trials, or nothing was varied"
    rows = style.required(evidence.importances, "importance", otherwise=needs).head(MOST_BARS)
    shares, low, high = style.floats(rows, "importance", "low", "high")
    figure, axes = style.canvas(height=max(1.9, 0.42 * len(rows) + 1.1))
    plot = axes[0, 0]
    plot.barh(range(len(rows)), shares, color=style.BEST, height=0.6)
    style.draw_intervals(plot, low, high, color=style.PLAIN, linewidth=2.2)
    style.row_axis(plot, [style.short(name) for name in rows["parameter"]])
    plot.set_xlim(0, max(1.0, float(np.nanmax([shares.max(), *high]))))
    plot.set_xlabel(f"share of the variance of {evidence.facts.metric.label} (0 to 1)")
    plot.set_ylabel("hyperparameter")
    style.light_grid(plot, "x")
    n = int(rows["n_trials"].max())
    few = " These are too few trials for a reliable order." if n < FEW_TRIALS else ""
    bars = "; lines are 95% intervals, bootstrapped over trials" if np.isfinite(low).any() else ""
    caption = (
        f"How much of the score's variance each hyperparameter explains (fANOVA){bars}; not in which direction.{few} "
        f"n = {counted(n, 'trial')}."
    )
    parts = [
        f"{name} {share:.2f}" + (f" ({left:.2f} to {right:.2f})" if np.isfinite([left, right]).all() else "")
        for name, share, left, right in zip(rows["parameter"], shares, low, high, strict=True)
    ]
    return style.Picture(figure, caption, f"Importance of hyperparameters: {'; '.join(parts)}.")


def draw_confirmed(evidence: Evidence) -> style.Picture:
    """Draw the finalists: CC when searched and with fresh seeds, and the gain over frozen on the test stories."""
    columns, needs = ("cc_searched", "cc_confirmed"), "no finalist was confirmed"
    rows = style.required(evidence.confirmed, *columns, otherwise=needs).head(MOST_FINALISTS)
    names = [
        style.short(name, 10) + (" (winner)" if won else "")
        for name, won in zip(rows["trial_id"], rows["is_winner"], strict=True)
    ]
    tested = len(style.known(rows, "gain_test")) > 0
    figure, axes = style.canvas(2 if tested else 1, height=max(2.4, 0.45 * len(rows) + 1.5))
    left, y = axes[0, 0], np.arange(len(rows))
    searched, confirmed = style.floats(rows, *columns)
    left.hlines(y, np.minimum(searched, confirmed), np.maximum(searched, confirmed), color="#bbbbbb", zorder=1)
    left.plot(searched, y, "o", color=style.INK, markerfacecolor="white", label="when searched")
    left.plot(confirmed, y, "D", color=style.BEST, label="fresh seeds")
    left.set_xlabel("validation CC (correlation)")
    if evidence.levels.frozen is not None:
        left.axvline(evidence.levels.frozen, color=style.INK, linestyle="--", linewidth=1.4, label="frozen baseline")
    if tested:
        _draw_gains(axes[0, 1], rows)
    for plot in axes[0]:
        style.row_axis(plot, names if plot is left else [""] * len(rows), margin=0.6)
        plot.locator_params(axis="x", nbins=4)
        style.light_grid(plot, "x")
    left.set_ylabel("trial")
    style.legend(figure, left, 3)
    return style.Picture(figure, _confirmed_caption(evidence, rows, tested), _confirmed_alt(rows))


def _draw_gains(axes: Axes, rows: pd.DataFrame) -> None:
    gains, low, high = style.floats(rows, "gain_test", "low", "high")
    style.draw_intervals(axes, low, high, color=style.INK, linewidth=1.6)
    axes.plot(gains, range(len(gains)), "s", color=style.PLAIN, markeredgecolor=style.INK, zorder=3)
    axes.axvline(0, color=style.INK, linestyle="--", linewidth=1.4)
    axes.set_xlabel("gain in test CC (correlation)")
    axes.set_ylabel("trial (as on the left)")


def _confirmed_caption(evidence: Evidence, rows: pd.DataFrame, tested: bool) -> str:
    seeds = int(rows["n_seeds"].max())
    units = sorted({str(unit) for unit in rows["unit"].dropna()} - {""}) if tested else []
    right = " Right: gain over the frozen baseline on the test stories" if tested else ""
    bars = f", bars its 95% interval over {units[0]}" if right and len(units) == 1 else ""
    n_test = len(evidence.facts.stories.get("test", ()))
    of_test = f", {counted(n_test, 'test story', 'test stories')}" if tested and n_test else ""
    return (
        f"Finalists, with {counted(seeds, 'fresh seed')} each{'; left' if tested else ''}: validation CC in the "
        f"search, and its mean over fresh seeds.{right}{bars}{'.' if right else ''} "
        f"{style.sample(evidence, len(rows))}{of_test}."
    )


def _confirmed_alt(rows: pd.DataFrame) -> str:
    parts = []
    for row in rows.to_dict("records"):
        won = ", the winner" if row["is_winner"] else ""
        searched, confirmed = style.cc(row["cc_searched"]), style.cc(row["cc_confirmed"])
        text = f"trial {row['trial_id']}{won}: searched {searched}, confirmed {confirmed}"
        if not pd.isna(row["gain_test"]):
            text += f", gain on the test stories {style.cc(row['gain_test'], sign=True)}"
        if not pd.isna(row["low"]):
            text += f" ({style.cc(row['low'], sign=True)} to {style.cc(row['high'], sign=True)})"
        parts.append(text)
    return f"Finalists. {'; '.join(parts)}."


def draw_time(evidence: Evidence) -> style.Picture:
    """Draw the time of each trial as stacked stages, in the order of baselines, search and confirmation."""
    rows = evidence.seconds
    rows = rows[rows.reindex(columns=list(STAGES)).sum(axis="columns") > 0]
    if rows.empty:
        raise style.NothingToDraw("no trial took any time: all took the results of earlier records")
    stages = {name: np.nan_to_num(rows[name]) for name in STAGES}
    seconds = np.sum(list(stages.values()), axis=0)
    unit, size = ("h", 3600.0) if seconds.max() >= 7200 else ("min", 60.0) if seconds.max() >= 120 else ("s", 1.0)
    figure, axes = style.canvas()
    plot = axes[0, 0]
    _bars(plot, {f"{STAGES[name]} {part.sum() / seconds.sum():.0%}": part / size for name, part in stages.items()})
    phases = rows["phase"].astype(str).to_numpy()
    for place in np.flatnonzero(phases[1:] != phases[:-1]):
        plot.axvline(place + 1.5, color=style.GREY, linestyle=style.LINES[2], linewidth=1.4)
    style.whole_axis(plot, "trial: baselines, then search, then confirmation" if len(set(phases)) > 1 else "trial")
    plot.set_xlim(0.4, len(rows) + 0.6)
    plot.set_ylabel(f"time of a trial ({unit})")
    style.legend(figure, plot, 4)
    parts = [f"{STAGES[name]} {part.sum():.0f} s ({part.sum() / seconds.sum():.0%})" for name, part in stages.items()]
    caption = (
        f"Time per trial, {duration(seconds.sum())} in total; repeats took none. "
        f"n = {counted(len(rows), 'trial')} of all phases."
    )
    return style.Picture(figure, caption, f"Time by stage over {counted(len(rows), 'trial')}: {joined(parts)}.")


def _bars(axes: Axes, parts: dict[str, np.ndarray]) -> None:
    """Draw stacked bars, one per trial; many bars without gaps and hatching."""
    below = np.zeros(len(next(iter(parts.values()))))
    for (label, part), (colour, hatch) in zip(parts.items(), STAGE_LOOKS, strict=False):
        if len(part) <= MOST_HATCHED:
            look: dict[str, Any] = {"hatch": hatch, "edgecolor": style.INK, "linewidth": 0.4}
            axes.bar(np.arange(1, len(part) + 1), part, bottom=below, color=colour, label=label, **look)
        else:
            edges = np.arange(len(part) + 1) + 0.5
            axes.stairs(below + part, edges, baseline=below, fill=True, color=colour, label=label)
        below = below + part
