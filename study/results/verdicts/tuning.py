"""What a study tells of fine-tuning against the frozen encoder, by the rules of ``verdict.py``."""

import numpy as np
import pandas as pd

from study.results.rank_tables import story_table
from study.results.slopes import ALL, NUISANCE, find_slope
from study.results.verdicts.rules import (
    CANNOT_TELL,
    HELPS,
    MIN_DF,
    MIN_STORIES,
    NO_EFFECT,
    OVERFITS,
    Effect,
    Verdict,
    decide,
    is_none,
    untold,
    with_bounds,
)
from study.setup.delta import DELTA
from study.wording import counted

TUNING_QUESTION = "Does fine-tuning predict the brain better than the frozen encoder?"
BEFORE_CONFIRM = "the mean of all LoRA trials, on the validation stories"


def tuning_verdict(
    used: pd.DataFrame,
    stories: pd.DataFrame,
    frozen_id: str | None,
    confirmed: pd.DataFrame,
    slopes: pd.DataFrame,
    *,
    delta: float = DELTA,
    is_adaptive: bool = False,
    command: str | None = None,
    what_would_tell: str = "",
    frozen_seen: float | None = None,
) -> Verdict:
    """Return what a study tells of fine-tuning against the frozen encoder.

    Parameters
    ----------
    used : of ``rank_tables.used_trials``
    stories : of ``tables.stories_frame``
    frozen_id : trial of the frozen baseline; None without one
    confirmed : of ``evidence.confirmed_table``; without rows before the confirm phase
    slopes : of ``slopes.slope_table``
    command : what to run next, ready for a shell: the confirm phase, or runs that would tell
    what_would_tell : the same in words
    frozen_seen : CC of the frozen baseline on the stories that fine-tuning read; None if unknown
    """
    mean, gap = mean_gain(used, stories, frozen_id, slopes), mean_gap(used, stories, frozen_id)
    tested = gain_on_test(confirmed, stories)
    effect = tested or mean
    why = _why_not(effect, tested is not None, used, frozen_id)
    if why or effect is None:
        return untold(TUNING_QUESTION, why, effect, delta, is_adaptive, command, what_would_tell)
    seen = seen_gain(used, frozen_seen)
    if tested is None:
        answer = decide(effect, gap, delta, is_adaptive, seen=seen)
    else:
        answer = decide(effect, gap, delta, seen=seen, min_stories=0)
    is_few = tested is not None and effect.n_stories < MIN_STORIES
    if is_few and not _is_borne_out(answer, mean, confirmed, delta, is_adaptive):
        answer = CANNOT_TELL
    headline = _tuning_headline(answer, _what(effect, tested is not None), effect, gap, delta)
    lines = _lines(effect, tested is not None, mean, gap, seen)
    lines += [what_would_tell] if what_would_tell and answer == CANNOT_TELL else []
    is_exploratory = is_adaptive and tested is None
    told = command if answer == CANNOT_TELL or tested is None else None
    return Verdict(TUNING_QUESTION, answer, headline, tuple(lines), effect, delta, is_exploratory, told)


def _why_not(effect: Effect | None, is_tested: bool, used: pd.DataFrame, frozen_id: str | None) -> str:
    """Return why nothing can be told of fine-tuning, in words; empty if something can."""
    if effect is not None and np.isfinite(effect.low):
        few = not is_tested and effect.n_trials < MIN_DF
        return f"{counted(effect.n_trials, 'trial')} tell little of the mean trial, {MIN_DF} are the least" * few
    if is_tested:
        return "the few test stories have no interval over time"
    if not len(used):
        return "no complete LoRA trial to compare with the frozen encoder"
    if frozen_id is None:
        return "no frozen baseline to compare with"
    if effect is None:
        return "a comparison with the frozen encoder needs two validation stories"
    return "one trial has no spread, so that nothing is known of other seeds"


def _is_borne_out(answer: str, mean: Effect | None, confirmed: pd.DataFrame, delta: float, is_adaptive: bool) -> bool:
    """Whether the mean trial, on the validation stories, says what the winner does on too few test stories.

    Of *helps* the winner's CC with fresh seeds must besides lie above that of the frozen baseline there.
    """
    if mean is None or not np.isfinite(mean.low):
        return False
    if answer == NO_EFFECT:
        return mean.n_stories >= MIN_STORIES and is_none(mean, delta)
    if answer == OVERFITS:
        return bool((mean.high_99 if is_adaptive else mean.high) < 0)
    winner = _winner(confirmed)
    rises = winner is not None and bool(winner["cc_confirmed"] > winner["cc_frozen"])
    return rises and bool((mean.low_99 if is_adaptive else mean.low) > 0)


def _what(effect: Effect, is_tested: bool) -> str:
    if not is_tested:
        return BEFORE_CONFIRM
    on = counted(effect.n_stories, "test story", "test stories")
    return (
        f"the winner, on just {'this' if effect.n_stories == 1 else 'these'} {on}"
        if effect.n_stories < MIN_STORIES
        else f"the winner, on {on}"
    )


def _lines(effect: Effect, is_tested: bool, mean: Effect | None, gap: Effect | None, seen: Effect | None) -> list[str]:
    """Return the sentences of the verdict."""
    is_few = is_tested and effect.n_stories < MIN_STORIES
    meant = "CC over their joined TRs" if is_few else "CC inside each story, mean over stories"
    lines = [f"It is {meant}; the interval speaks of {effect.covers}."]
    if is_few:
        lines.append(
            f"Fewer than {MIN_STORIES} test stories tell nothing of others: an answer stands only if the mean trial on "
            "the validation stories points the same way."
        )
    if is_tested and mean is not None:
        trials = "the one LoRA trial" if mean.n_trials == 1 else f"all {mean.n_trials} LoRA trials"
        lines.append(f"The mean of {trials} on the validation stories differs from frozen by {mean}.")
    if gap is not None:
        lines.append(
            f"The adaptation gap (CC gained on the stories that fine-tuning read, less that gained on others) is {gap}"
            f", mean over {gap.n_trials} trials; that interval speaks of {gap.covers}."
        )
    if seen is not None:
        lines.append(f"On the stories that fine-tuning read CC differs from frozen by {seen}, mean of the same trials.")
    return lines


def mean_gain(used: pd.DataFrame, stories: pd.DataFrame, frozen_id: str | None, slopes: pd.DataFrame) -> Effect | None:
    """Return the CC of the mean trial less that of the frozen baseline, paired by validation story.

    Between stories by their spread, between trials by the residuals of the fit of rank, or else their SD.
    """
    ids = used["trial_id"].tolist()
    if not ids or frozen_id is None:
        return None
    table = story_table(stories, [*ids, frozen_id])
    if table.shape[1] < 2:
        return None
    gains = (table.loc[ids] - table.loc[frozen_id]).to_numpy(float)  # (n_trials, n_stories)
    per_story, n = gains.mean(axis=0), gains.shape[1]
    row = find_slope(slopes, "cc_mean", NUISANCE, ALL)
    sd, df = (np.nan, 0) if row is None else (float(row["sd_trial"]), int(row["df"]))
    if df < 1:
        sd, df = float(gains.mean(axis=1).std(ddof=1)) if len(ids) > 1 else np.nan, len(ids) - 1
    se = (sd / np.sqrt(len(ids)), df, float(per_story.std(ddof=1) / np.sqrt(n)), n)
    return with_bounds(
        float(per_story.mean()), se, len(ids), f"other seeds and other stories, by {n} validation stories"
    )


def mean_gap(used: pd.DataFrame, stories: pd.DataFrame, frozen_id: str | None) -> Effect | None:
    """Return the mean adaptation gap of the trials, its interval over trials and validation stories.

    The gap is gain on seen less gain on unseen stories, and the spread of the latter between stories is what other
    stories would change; seen stories are taken as they are. With fewer than two stories over trials alone.
    """
    gaps = used["adaptation_gap"].to_numpy(float)
    having = np.isfinite(gaps)
    gaps, n_trials = gaps[having], int(having.sum())
    if n_trials < 2:
        return None
    per_story = _story_gains(used[having], stories, frozen_id)
    n = len(per_story)
    se_stories = float(per_story.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    covers = "other seeds and other validation stories" if n > 1 else "other seeds"
    se = (float(gaps.std(ddof=1) / np.sqrt(n_trials)), n_trials - 1, se_stories, n)
    return with_bounds(float(gaps.mean()), se, n_trials, covers)


def _story_gains(used: pd.DataFrame, stories: pd.DataFrame, frozen_id: str | None) -> np.ndarray:
    """Return CC inside each validation story less that of the frozen baseline, mean over trials, (n_stories,)."""
    if frozen_id is None:
        return np.empty(0)
    ids = used["trial_id"].tolist()
    table = story_table(stories, [*ids, frozen_id])
    return (table.loc[ids] - table.loc[frozen_id]).to_numpy(float).mean(axis=0)


def seen_gain(used: pd.DataFrame, frozen_seen: float | None) -> Effect | None:
    """Return the CC of the mean trial on the stories that it read less that of the frozen baseline; None if unknown.

    Its interval is over trials: it speaks of these stories.
    """
    if frozen_seen is None or "cc_seen" not in used:
        return None
    gains = used["cc_seen"].dropna().to_numpy(float) - frozen_seen
    if len(gains) < 2:
        return None
    se = (float(gains.std(ddof=1) / np.sqrt(len(gains))), len(gains) - 1, np.nan, 0)
    return with_bounds(float(gains.mean()), se, len(gains), "other seeds", n_stories=0)


def _winner(confirmed: pd.DataFrame) -> pd.Series | None:
    """Return the winner of the first look that scored it on the test stories; None without one."""
    winners = confirmed[confirmed["is_winner"].astype(bool) & confirmed["gain_test"].notna()]
    return None if winners.empty else winners.iloc[0]


def gain_on_test(confirmed: pd.DataFrame, stories: pd.DataFrame) -> Effect | None:
    """Return the winner's CC less that of the frozen baseline on the test stories; None if it was not scored.

    Of several looks the first that scored a winner counts. With ``MIN_STORIES`` it is CC inside each story, mean over
    stories, and over stories by Student's t. With fewer it is CC over their joined TRs, over time inside them, the 90%
    and 99% bounds scaled from the 95% ones as of a normal distribution.
    """
    winner = _winner(confirmed)
    if winner is None:
        return None
    gains = test_story_gains(stories, str(winner["test_id"]), str(winner["frozen_test_id"]))
    if len(gains) >= MIN_STORIES:
        se = (0.0, 1, float(gains.std(ddof=1) / np.sqrt(len(gains))), len(gains))
        return with_bounds(float(gains.mean()), se, 1, f"other stories, by {len(gains)} test stories")
    estimate, low, high = (float(winner[name]) for name in ("gain_test", "low", "high"))
    half = (high - low) / 2
    bounds = [estimate + sign * half * ratio for ratio in (0.8392, 1.3142) for sign in (-1, 1)]  # z of 90, 99 over 95%
    covers = f"more listening to just these {counted(len(gains), 'test story', 'test stories')}"
    return Effect(estimate, low, high, bounds[0], bounds[1], 1, len(gains), covers, bounds[2], bounds[3])


def test_story_gains(stories: pd.DataFrame, one: str, frozen: str) -> np.ndarray:
    """Return CC inside each test story less that of the frozen baseline, (n_stories,)."""
    table = story_table(stories, [one, frozen], "test")
    return (table.loc[one] - table.loc[frozen]).to_numpy(float)


def _tuning_headline(answer: str, what: str, effect: Effect, gap: Effect | None, delta: float) -> str:
    if answer == NO_EFFECT:
        told = f"No detectable effect of fine-tuning within +-{delta:g} CC ({what})"
        return f"{told}: it differs from frozen by {effect.with_90()}."
    if answer == HELPS:
        return f"Fine-tuning helps ({what}): CC differs from frozen by {effect}."
    if answer == OVERFITS:
        return f"Fine-tuning overfits ({what}): CC differs from frozen by {effect}, and the adaptation gap is {gap}."
    if effect.high < 0 and effect.n_stories >= MIN_STORIES:
        return f"Fine-tuning harms, but overfitting is not shown ({what}): CC differs from frozen by {effect}."
    return f"Cannot tell whether fine-tuning helps ({what}): CC differs from frozen by {effect}."
