"""The verdict on fine-tuning compared with the frozen encoder, by the rules of ``rules.py``."""

import numpy as np
import pandas as pd

from study.results.rank_tables import story_gains
from study.results.slopes import find_slope
from study.results.verdicts import rules
from study.results.verdicts.rules import Effect, NextRuns, Verdict
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
    next_runs: NextRuns = rules.NOTHING_TO_RUN,
    frozen_seen: float | None = None,
) -> Verdict:
    """Return the verdict on fine-tuning, from ``used_trials``, ``rows_frame``, ``confirmed_table``, ``slope_table``.

    ``frozen_id`` is the trial of the frozen baseline, ``frozen_seen`` its CC on the stories that fine-tuning read; None
    if unknown. ``confirmed`` has no rows before the confirm phase.
    """
    mean, gap = _mean_gain(used, stories, frozen_id, slopes), mean_gap(used, stories, frozen_id)
    tested = gain_on_test(confirmed, stories)
    effect, is_tested = tested or mean, tested is not None
    reason = _missing(effect, is_tested, used, frozen_id)
    if reason or effect is None:
        return rules.cannot_tell_verdict(TUNING_QUESTION, reason, effect, delta, is_adaptive, next_runs)
    seen = seen_gain(used, frozen_seen)
    if is_tested:
        answer = rules.decide(effect, gap, delta, seen=seen, min_stories=0)
    else:
        answer = rules.decide(effect, gap, delta, is_adaptive, seen=seen)
    is_few = is_tested and effect.n_stories < rules.MIN_STORIES
    if is_few and not _is_supported(answer, mean, confirmed, delta, is_adaptive):
        answer = rules.CANNOT_TELL
    sentences = _sentences(effect, is_few, mean if is_tested else None, gap, seen)
    if next_runs.text and answer == rules.CANNOT_TELL:
        sentences.append(next_runs.text)
    headline = _headline(answer, _scope(effect, is_tested), effect, gap, delta)
    command = next_runs.command if answer == rules.CANNOT_TELL or not is_tested else None
    is_exploratory = is_adaptive and not is_tested
    return Verdict(TUNING_QUESTION, answer, headline, tuple(sentences), effect, delta, is_exploratory, command)


def _missing(effect: Effect | None, is_tested: bool, used: pd.DataFrame, frozen_id: str | None) -> str:
    """Return which condition for an answer is not met, in words; empty if all are."""
    if effect is not None and np.isfinite(effect.low):
        if is_tested or effect.n_trials >= rules.MIN_DF:
            return ""
        few = f"{counted(effect.n_trials, 'trial')} are too few to estimate the average effect of fine-tuning"
        return f"{few}; at least {rules.MIN_DF} are needed"
    if is_tested:
        return "the test stories are too few and too short for an interval"
    if not len(used):
        return "no LoRA trial has finished yet"
    if frozen_id is None:
        return "there is no frozen baseline to compare with"
    if effect is None:
        return "a comparison with the frozen encoder needs at least 2 validation stories"
    return "a single trial does not show how much trials with other seeds differ"


def _is_supported(answer: str, mean: Effect | None, confirmed: pd.DataFrame, delta: float, is_adaptive: bool) -> bool:
    """Whether the mean trial on the validation stories agrees with the winner on too few test stories.

    For *helps* the winner's CC with fresh seeds must also be above that of the frozen baseline there.
    """
    if mean is None or not np.isfinite(mean.low):
        return False
    if answer == rules.NO_EFFECT:
        return mean.n_stories >= rules.MIN_STORIES and rules.is_none(mean, delta)
    if answer == rules.OVERFITS:
        return bool((mean.high_99 if is_adaptive else mean.high) < 0)
    winner = _winner(confirmed)
    rises = winner is not None and bool(winner["cc_confirmed"] > winner["cc_frozen"])
    return rises and bool((mean.low_99 if is_adaptive else mean.low) > 0)


def _scope(effect: Effect, is_tested: bool) -> str:
    if not is_tested:
        return BEFORE_CONFIRM
    stories = counted(effect.n_stories, "test story", "test stories")
    if effect.n_stories >= rules.MIN_STORIES:
        return f"the winner, on {stories}"
    return f"the winner, on just {'this' if effect.n_stories == 1 else 'these'} {stories}"


def _sentences(effect: Effect, is_few: bool, mean: Effect | None, gap: Effect | None, seen: Effect | None) -> list[str]:
    """Return what the answer is based on; ``mean`` is given after the confirm phase."""
    cc = "over the joined rows of these stories" if is_few else "inside each story and averaged over stories"
    lines = [f"CC is computed {cc}; the interval covers {effect.covers}."]
    if is_few:
        lines.append(
            f"Fewer than {rules.MIN_STORIES} test stories say nothing about other stories: an answer stands only if "
            "the mean trial on the validation stories points the same way."
        )
    if mean is not None:
        trials = "the only LoRA trial" if mean.n_trials == 1 else f"all {mean.n_trials} LoRA trials"
        lines.append(f"The mean of {trials} on the validation stories differs from frozen by {mean}.")
    if gap is not None:
        lines.append(
            "The adaptation gap (gain in CC on the stories that fine-tuning read, minus that on validation stories) is"
            f" {gap}, mean over {gap.n_trials} trials; that interval covers {gap.covers}."
        )
    if seen is not None:
        lines.append(f"On the stories that fine-tuning read, CC differs from frozen by {seen} (same trials).")
    return lines


def _mean_gain(used: pd.DataFrame, stories: pd.DataFrame, frozen_id: str | None, slopes: pd.DataFrame) -> Effect | None:
    """Return the CC of the mean trial minus that of the frozen baseline, paired by validation story.

    The spread between trials is that of the residuals of the rank fit, or else their SD.
    """
    gains = story_gains(stories, used["trial_id"].tolist(), frozen_id)  # (n_trials, n_stories)
    n_trials, n = gains.shape
    if not n_trials or n < 2:
        return None
    per_story, row = gains.mean(axis=0), find_slope(slopes, "cc_mean")
    sd, df = (np.nan, 0) if row is None else (float(row["sd_trial"]), int(row["df"]))
    if df < 1:
        sd, df = float(gains.mean(axis=1).std(ddof=1)) if n_trials > 1 else np.nan, n_trials - 1
    se = (sd / np.sqrt(n_trials), df, float(per_story.std(ddof=1) / np.sqrt(n)), n)
    covers = f"other seeds and other stories, from {n} validation stories"
    return rules.effect_with_intervals(float(per_story.mean()), se, n_trials, covers)


def mean_gap(used: pd.DataFrame, stories: pd.DataFrame, frozen_id: str | None) -> Effect | None:
    """Return the mean adaptation gap of the trials, its interval over trials and validation stories.

    The gap is the gain on seen minus that on unseen stories; the spread of the latter between stories is what other
    stories would change, seen stories are taken as fixed. With fewer than two stories the interval is over trials only.
    """
    known = used[np.isfinite(used["adaptation_gap"].to_numpy(float))]
    gaps, n_trials = known["adaptation_gap"].to_numpy(float), len(known)
    if n_trials < 2:
        return None
    per_story = story_gains(stories, known["trial_id"].tolist(), frozen_id).mean(axis=0)
    n = len(per_story)
    se_stories = float(per_story.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    covers = "other seeds and other validation stories" if n > 1 else "other seeds"
    se = (float(gaps.std(ddof=1) / np.sqrt(n_trials)), n_trials - 1, se_stories, n)
    return rules.effect_with_intervals(float(gaps.mean()), se, n_trials, covers)


def seen_gain(used: pd.DataFrame, frozen_seen: float | None) -> Effect | None:
    """Return the CC of the mean trial minus that of the frozen baseline on the stories that fine-tuning read.

    Its interval is over trials: it covers these stories only. None if unknown.
    """
    if frozen_seen is None or "cc_seen" not in used:
        return None
    gains = used["cc_seen"].dropna().to_numpy(float) - frozen_seen
    if len(gains) < 2:
        return None
    se = (float(gains.std(ddof=1) / np.sqrt(len(gains))), len(gains) - 1, np.nan, 0)
    return rules.effect_with_intervals(float(gains.mean()), se, len(gains), "other seeds", n_stories=0)


def _winner(confirmed: pd.DataFrame) -> pd.Series | None:
    """Return the winner of the first evaluation that scored it on the test stories; None without one."""
    winners = confirmed[confirmed["is_winner"].astype(bool) & confirmed["gain_test"].notna()]
    return None if winners.empty else winners.iloc[0]


def gain_on_test(confirmed: pd.DataFrame, stories: pd.DataFrame) -> Effect | None:
    """Return the winner's CC minus that of the frozen baseline on the test stories; None if it was not scored.

    Of several evaluations the first that scored a winner counts. With ``MIN_STORIES``: CC inside each story, mean over
    stories, interval over stories by Student's t. With fewer: CC over their joined TRs, interval over time inside them,
    the 90% and 99% bounds scaled from the 95% ones as for a normal distribution.
    """
    winner = _winner(confirmed)
    if winner is None:
        return None
    gains = story_gains(stories, [str(winner["test_id"])], str(winner["frozen_test_id"]), "test")[0]
    n = len(gains)
    if n >= rules.MIN_STORIES:
        se = (0.0, 1, float(gains.std(ddof=1) / np.sqrt(n)), n)
        return rules.effect_with_intervals(float(gains.mean()), se, 1, f"other stories, from {n} test stories")
    estimate, low, high = (float(winner[name]) for name in ("gain_test", "low", "high"))
    half = (high - low) / 2
    bounds = [estimate + sign * half * ratio for ratio in (0.8392, 1.3142) for sign in (-1, 1)]  # z of 90, 99 over 95%
    covers = f"more recordings of just {'this' if n == 1 else 'these'} {counted(n, 'test story', 'test stories')}"
    return Effect(estimate, low, high, bounds[0], bounds[1], 1, n, covers, bounds[2], bounds[3])


def _headline(answer: str, scope: str, effect: Effect, gap: Effect | None, delta: float) -> str:
    if answer == rules.NO_EFFECT:
        none = f"No detectable effect of fine-tuning within +-{delta:g} CC ({scope})"
        return f"{none}: it differs from frozen by {effect.with_90()}."
    if answer == rules.HELPS:
        return f"Fine-tuning helps ({scope}): CC differs from frozen by {effect}."
    if answer == rules.OVERFITS:
        return f"Fine-tuning overfits ({scope}): CC differs from frozen by {effect}, and the adaptation gap is {gap}."
    if effect.high < 0 and effect.n_stories >= rules.MIN_STORIES:
        return f"Fine-tuning harms, but overfitting is not shown ({scope}): CC differs from frozen by {effect}."
    return f"Cannot tell whether fine-tuning helps ({scope}): CC differs from frozen by {effect}."
