"""The best trial compared with the baselines."""

import math
from typing import NamedTuple

import pandas as pd

from bert_encoding.core.names import (
    ADAPT,
    BASELINE,
    CLASSIFICATION,
    COMPLETE,
    CONFIRM,
    ENCODING,
    FAILED,
    FROZEN,
    METRICS,
    SEARCH,
    WORD_RATE,
)
from bert_encoding.statistics.story_intervals import Interval, story_interval
from study.results.rank_tables import story_gains

HELD_OUT = {ENCODING: "validation stories", CLASSIFICATION: "held-out texts", ADAPT: "held-out texts"}


class Standing(NamedTuple):
    """The best searched trial and the baselines, as in ``summary.json``; None for what does not exist."""

    frozen: float | None
    frozen_test: float | None
    word_rate: float | None
    word_rate_test: float | None
    best: float | None
    best_id: str | None
    test_was_read: bool
    n_complete: int
    n_failed: int

    task: str = ENCODING
    is_confirmed: bool = False

    @property
    def gain(self) -> float | None:
        """Best minus frozen."""
        return None if self.best is None or self.frozen is None else self.best - self.frozen


def standing(trials: pd.DataFrame, task: str = ENCODING) -> Standing:
    """Compare the best complete searched trial with the baselines."""
    metric = METRICS[task].column
    before_confirm, best_id = trials[trials["phase"] != CONFIRM], best_trial(trials, task)
    searched = trials[(trials["phase"] == SEARCH) & (trials["status"] == COMPLETE)]
    return Standing(
        frozen=baseline_score(trials, FROZEN, metric),
        frozen_test=baseline_score(trials, FROZEN, "cc_test"),
        word_rate=baseline_score(trials, WORD_RATE, metric),
        word_rate_test=baseline_score(trials, WORD_RATE, "cc_test"),
        best=None if best_id is None else float(trials.set_index("trial_id")[metric][best_id]),
        best_id=best_id,
        test_was_read=bool(before_confirm["cc_test"].notna().any() or (before_confirm["mlm_text"] == "all").any()),
        n_complete=int(searched["repeat_of"].isna().sum()),
        n_failed=int((trials["status"] == FAILED).sum()),
        task=task,
        is_confirmed=is_confirmed(trials),
    )


def is_confirmed(trials: pd.DataFrame) -> bool:
    """Whether some finalist was scored on the test stories."""
    return bool(trials.loc[trials["phase"] == CONFIRM, "cc_test"].notna().any())


def best_trial(trials: pd.DataFrame, task: str) -> str | None:
    """Return the best complete searched trial, of equal ones the first; None if there is none."""
    metric = METRICS[task]
    scored = trials[metric.column].notna()
    searched = trials[(trials["phase"] == SEARCH) & (trials["status"] == COMPLETE) & scored]
    if searched.empty:
        return None
    return str(searched.sort_values(metric.column, ascending=not metric.is_gain, kind="stable").iloc[0]["trial_id"])


def baseline_score(trials: pd.DataFrame, method: str, column: str) -> float | None:
    """Return a score of a complete baseline, None if it has none."""
    is_baseline = (trials["phase"] == BASELINE) & (trials["method"] == method) & (trials["status"] == COMPLETE)
    values = trials.loc[is_baseline, column].dropna()
    return float(values.iloc[0]) if len(values) else None


def gain_over_stories(stories: pd.DataFrame, best_id: str, frozen_id: str = f"baseline-{FROZEN}") -> Interval | None:
    """Return the mean CC of a trial minus that of the frozen baseline, paired by validation story, with its interval.

    Subjects and outer folds are averaged within each story first. None if the two share no story.
    """
    gains = story_gains(stories, [best_id], frozen_id)[0]
    return story_interval(gains) if gains.size else None


def cc_by_rank(trials: pd.DataFrame) -> pd.DataFrame:
    """Return number, mean and highest ``cc_mean`` of complete searched trials, one row per rank; repeats excluded."""
    is_searched = (trials["phase"] == SEARCH) & (trials["status"] == COMPLETE) & trials["repeat_of"].isna()
    ranks = trials[is_searched & trials["rank"].notna()].groupby("rank")["cc_mean"]
    return ranks.agg(n_trials="count", cc_mean="mean", cc_highest="max").reset_index()


def verdict_lines(result: Standing, gain: Interval | None = None) -> list[str]:
    """Return the comparison with the baselines in words; ``gain`` is of ``gain_over_stories``."""
    if result.frozen is None:
        return ["No frozen baseline yet: nothing to compare with."]
    label, held_out = METRICS[result.task].label, HELD_OUT[result.task]
    bias = f"The best of {result.n_complete} noisy trials is biased upwards"
    if result.best is None or result.gain is None:
        if result.task != ENCODING:
            return [f"Frozen encoder: {label} {result.frozen:.4f} on the {held_out}."]
        lines = [_baseline_line("validation", result.frozen, result.word_rate)]
        tested = result.frozen_test is not None
        return [*lines, _baseline_line("test", result.frozen_test, result.word_rate_test)] if tested else lines
    if result.task != ENCODING:
        best = f"best trial {result.best_id}: {result.best:.4f} ({result.gain:+z.4f})"
        return [
            f"Frozen encoder: {label} {result.frozen:.4f} on the {held_out}; {best}.",
            f"{bias}, because it was chosen on the texts that evaluate it.",
        ]
    lines = [
        f"Best trial {result.best_id}: CC {result.best:.4f}; frozen baseline: CC {result.frozen:.4f}; "
        f"difference {result.gain:+z.4f} on the {held_out}."
    ]
    if gain is not None and not math.isnan(gain.low):
        lines.append(
            f"Story by story the difference is {gain.estimate:+z.4f}, {gain.level:.0%} interval over {gain.n} stories "
            f"{gain.low:+z.4f} to {gain.high:+z.4f}."
        )
    unused = "search did not use the test stories" if result.is_confirmed else "test stories have not been scored yet"
    return [*lines, f"{bias}; {'some trial has used the test stories' if result.test_was_read else f'the {unused}'}."]


def _baseline_line(role: str, frozen: float | None, word_rate: float | None) -> str:
    rate = "" if word_rate is None else f", word rate {word_rate:.4f}"
    return f"Mean CC on the {role} stories: frozen encoder {frozen:.4f}{rate}."
