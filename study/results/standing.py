"""Where the best trial stands, compared with the baselines."""

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
from bert_encoding.trial.record import TrialRecord

HELD_OUT = {ENCODING: "validation stories", CLASSIFICATION: "held-out texts", ADAPT: "held-out texts"}


class Standing(NamedTuple):
    """The best searched trial beside the frozen baseline; None where there is none."""

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
        """Best less frozen."""
        return None if self.best is None or self.frozen is None else self.best - self.frozen


def standing(trials: pd.DataFrame, task: str = ENCODING) -> Standing:
    """Compare the best complete searched trial with the frozen baseline, both on what was held out."""
    metric = METRICS[task]
    others = trials[trials["phase"] != CONFIRM]
    complete = others[others["status"] == COMPLETE]
    baselines = complete[complete["phase"] == BASELINE].set_index("method")
    searched = complete[complete["phase"] == SEARCH]
    ordered = searched.sort_values(metric.column, ascending=not metric.is_gain)
    best = ordered.iloc[0] if len(searched) else None
    return Standing(
        frozen=_score(baselines, FROZEN, metric.column),
        frozen_test=_score(baselines, FROZEN, "cc_test"),
        word_rate=_score(baselines, WORD_RATE, metric.column),
        word_rate_test=_score(baselines, WORD_RATE, "cc_test"),
        best=float(best[metric.column]) if best is not None else None,
        best_id=str(best["trial_id"]) if best is not None else None,
        test_was_read=bool(others["cc_test"].notna().any() or (others["mlm_text"] == "all").any()),
        n_complete=int(searched["repeat_of"].isna().sum()),
        n_failed=int((trials["status"] == FAILED).sum()),
        task=task,
        is_confirmed=bool(trials.loc[trials["phase"] == CONFIRM, "cc_test"].notna().any()),
    )


def _score(baselines: pd.DataFrame, method: str, column: str) -> float | None:
    """Return a baseline's score, None where it has none."""
    value = baselines[column].get(method)
    return None if value is None or pd.isna(value) else float(value)


def gain_over_stories(stories: pd.DataFrame, best_id: str, frozen_id: str = "baseline-frozen") -> Interval | None:
    """Return the mean CC of a trial less that of the frozen baseline, paired by validation story, with its interval.

    Subjects and splits are averaged inside a story first. None where the two share no story.
    """
    if stories.empty:
        return None
    rows = stories[(stories["role"] == "validation") & stories["trial_id"].isin([best_id, frozen_id])]
    of_story = rows.groupby(["story", "trial_id"])["cc_mean"].mean().unstack("trial_id")
    if not {best_id, frozen_id} <= set(of_story.columns):
        return None
    gain = (of_story[best_id] - of_story[frozen_id]).dropna().to_numpy(float)
    return story_interval(gain) if gain.size else None


def cc_by_rank(trials: pd.DataFrame) -> pd.DataFrame:
    """Return count, mean and best ``cc_mean`` of complete searched trials, a row a rank; repeats are not counted."""
    searched = trials[
        (trials["phase"] == SEARCH)
        & (trials["status"] == COMPLETE)
        & trials["rank"].notna()
        & trials["repeat_of"].isna()
    ]
    grouped = searched.groupby("rank")["cc_mean"].agg(["count", "mean", "max"])
    return grouped.rename(columns={"count": "n_trials", "mean": "cc_mean", "max": "cc_max"}).reset_index()


def notes_of(records: list[TrialRecord]) -> dict[str, list[str]]:
    """Return the notes of trials that have some: trial -> notes."""
    return {record.trial_id: record.notes for record in records if record.notes}


def verdict_lines(found: Standing, gain: Interval | None = None) -> list[str]:
    """Say in words what the comparison can and cannot tell.

    Parameters
    ----------
    gain : the difference of the two over validation stories
    """
    if found.frozen is None:
        return ["No frozen baseline yet: nothing to compare with."]
    label, held_out = METRICS[found.task].label, HELD_OUT[found.task]
    if found.task != ENCODING:
        beside = "" if found.best is None else f"; best trial {found.best_id}: {found.best:.4f} ({found.gain:+z.4f})"
        caveat = [f"The best of {found.n_complete} trials, chosen on the texts that judge it, looks better than it is."]
        told = [f"Frozen encoder: {label} {found.frozen:.4f} on the {held_out}{beside}."]
        return told if found.best is None else told + caveat
    if found.best is None or found.gain is None:
        return [_baseline_line("validation", found.frozen, found.word_rate)] + (
            [_baseline_line("test", found.frozen_test, found.word_rate_test)] if found.frozen_test is not None else []
        )
    return [
        f"Best trial {found.best_id}: CC {found.best:.4f}; frozen baseline: CC {found.frozen:.4f}; "
        f"difference {found.gain:+z.4f} on the validation stories.",
        *_gain_lines(gain),
        f"The best of {found.n_complete} noisy trials looks better than it is; " + _who_read(found),
    ]


def _who_read(found: Standing) -> str:
    if found.test_was_read:
        return "some trial has read the test stories."
    return "the search did not read the test stories." if found.is_confirmed else "the test stories have not been read."


def _gain_lines(gain: Interval | None) -> list[str]:
    if gain is None or math.isnan(gain.low):
        return []
    return [
        f"Story by story the difference is {gain.estimate:+z.4f}, {gain.level:.0%} interval over {gain.n} stories "
        f"{gain.low:+z.4f} to {gain.high:+z.4f}."
    ]


def _baseline_line(role: str, frozen: float, word_rate: float | None) -> str:
    beside = "" if word_rate is None else f", word rate {word_rate:.4f}"
    return f"Mean CC on the {role} stories: frozen encoder {frozen:.4f}{beside}."
