"""The verdict on rank, by the rules of ``rules.py``."""

import numpy as np
import pandas as pd

from study.results.slopes import ALL, BEND, BY_LR, BY_RULE, NONE, NUISANCE, PAIR, SEEN, find_slope, rate_name
from study.results.verdicts import rules
from study.results.verdicts.rules import Effect, NextRuns, Verdict
from study.setup.delta import DELTA
from study.wording import capitalised, counted, joined

RANK_QUESTION = "Does a higher LoRA rank help or overfit?"


def rank_verdict(
    slopes: pd.DataFrame,
    used: pd.DataFrame,
    *,
    delta: float = DELTA,
    is_adaptive: bool = False,
    left_out: str = "",
    next_runs: NextRuns = rules.NOTHING_TO_RUN,
) -> Verdict:
    """Return the verdict on rank, from the results of ``slope_table`` and ``used_trials``."""
    reason, effect = _missing(slopes, used), _effect(slopes, "cc_mean")
    if reason or effect is None:
        return rules.cannot_tell_verdict(RANK_QUESTION, reason, effect, delta, is_adaptive, next_runs)
    gap, plain, seen = _effect(slopes, "adaptation_gap"), _effect(slopes, "cc_mean", NONE), _effect(slopes, SEEN)
    answer = rules.decide(effect, gap, delta, is_adaptive, plain, seen=seen)
    hidden = _hidden(slopes, delta) if answer in (rules.NO_EFFECT, rules.CANNOT_TELL) else ""
    if answer == rules.NO_EFFECT and hidden:
        answer = rules.CANNOT_TELL
    is_near_0 = effect.n_stories < rules.MIN_STORIES and rules.is_none(effect, delta)
    if not hidden and answer == rules.CANNOT_TELL and is_near_0:
        stories = counted(effect.n_stories, "validation story", "validation stories")
        hidden = f"{stories} cannot show that rank has no effect; at least {rules.MIN_STORIES} are needed"
    ranks = f"from rank {used['rank'].min():g} to {used['rank'].max():g}"
    headline = capitalised("exploratory: " * is_adaptive + _headline(answer, ranks, effect, gap, seen, delta, hidden))
    sentences = _sentences(slopes, used, effect, left_out, is_adaptive)
    runs = next_runs if answer == rules.CANNOT_TELL else rules.NOTHING_TO_RUN
    sentences += [runs.text] if runs.text else []
    return Verdict(RANK_QUESTION, answer, headline, tuple(sentences), effect, delta, is_adaptive, runs.command)


def _missing(slopes: pd.DataFrame, used: pd.DataFrame) -> str:
    """Return which condition for an answer is not met, in words; empty if all are."""
    n = len(used)
    if not n:
        return "no LoRA trial has finished yet"
    if used["rank"].nunique() < 2:
        return f"only one rank was tried ({counted(n, 'LoRA trial')}); at least 2 are needed"
    row = find_slope(slopes, "cc_mean")
    if row is None or not np.isfinite(row["effect"]):
        others = "" if row is None else joined([name for name in str(row["adjusted_for"]).split(", ") if name])
        return f"rank and {others or 'other settings'} varied together, so their effects cannot be separated"
    if row["df"] < rules.MIN_DF:
        left = f"{counted(n, 'trial')} leave {counted(int(row['df']), 'degree')} of freedom"
        return f"{left}; at least {rules.MIN_DF} are needed to estimate the noise"
    if row["n_stories"] < 2:
        stories = counted(int(row["n_stories"]), "validation story", "validation stories")
        return f"only {stories}; at least 2 are needed to estimate how much stories differ"
    return ""


def _effect(slopes: pd.DataFrame, outcome: str, adjustment: str = NUISANCE, subset: str = ALL) -> Effect | None:
    """Return the effect of rank on an outcome over the range of ranks; None if not estimated."""
    row = find_slope(slopes, outcome, adjustment, subset)
    if row is None or not np.isfinite(row["effect"]):
        return None
    n_stories = int(row["n_stories"])
    covers = f"other seeds and other stories, from {n_stories} validation stories" if n_stories > 1 else "other seeds"
    bounds = {name: float(row[name]) for name in ("low", "high", "low_90", "high_90", "low_99", "high_99")}
    return Effect(float(row["effect"]), n_trials=int(row["n_trials"]), n_stories=n_stories, covers=covers, **bounds)


def _hidden(slopes: pd.DataFrame, delta: float) -> str:
    """Return what a mean effect near 0 hides, in words; empty if nothing."""
    bend, by_lr = _effect(slopes, BEND), _effect(slopes, BY_LR)
    if by_lr is not None and abs(by_lr.estimate) > delta and (by_lr.low > 0 or by_lr.high < 0):
        return "the effect of rank depends on the learning rate"
    for pair in slopes.loc[slopes["outcome"] == BY_RULE, "subset"]:
        by_rule = _effect(slopes, BY_RULE, subset=pair)
        if by_rule is not None and abs(by_rule.estimate) > delta and (by_rule.low_99 > 0 or by_rule.high_99 < 0):
            return f"the effect of rank depends on the scaling rule ({pair.replace(PAIR, ' or ')})"
    if bend is not None and abs(bend.estimate) > delta and (bend.low > 0 or bend.high < 0):
        return "CC does not simply rise or fall with rank"
    return ""


def _headline(
    answer: str, ranks: str, effect: Effect, gap: Effect | None, seen: Effect | None, delta: float, hidden: str
) -> str:
    if answer == rules.NO_EFFECT:
        return f"no detectable effect of rank within +-{delta:g} CC: {ranks}, CC changes by {effect.with_90()}."
    if answer == rules.HELPS:
        return f"a higher rank helps: {ranks}, CC rises by {effect}."
    if answer == rules.OVERFITS:
        return f"a higher rank overfits: {ranks}, CC falls by {effect} and the adaptation gap widens by {gap}."
    if hidden:
        return f"cannot tell: {hidden}; {ranks}, CC changes by {effect}."
    if effect.high >= 0:
        return f"cannot tell from these trials: {ranks}, CC changes by {effect}."
    if gap is not None and gap.low > 0:
        but = "it also falls on the stories that fine-tuning read" + ("" if seen is None else f": {seen}")
    else:
        but = "the adaptation gap is not shown to widen" + ("" if gap is None else f": {gap}")
    return f"cannot tell whether a higher rank overfits: {ranks}, CC falls by {effect}, but {but}."


def _sentences(slopes: pd.DataFrame, used: pd.DataFrame, effect: Effect, left_out: str, is_adaptive: bool) -> list[str]:
    """Return what the answer is based on, and its limits."""
    row, bend = find_slope(slopes, "cc_mean"), _effect(slopes, BEND)
    assert row is not None
    adjusted = f", adjusted for {joined(row['adjusted_for'].split(', '))}" if row["adjusted_for"] else ""
    excluded = f"; excluded: {left_out}" if left_out else ""
    trials = f"{counted(effect.n_trials, 'trial')} of {counted(int(row['n_ranks']), 'rank')}"
    lines = [
        f"The effect is estimated from {trials}{adjusted}{excluded}.",
        f"CC is computed inside each story and averaged over stories; the interval covers {effect.covers}.",
        *_by_rate(slopes, used),
    ]
    further = {
        ("cc_mean", NONE): "Adjusted for seeds only, the effect is {}.",
        ("adaptation_gap", NUISANCE): "The adaptation gap changes by {} over the same ranks.",
        ("mlm_loss_heldout", NUISANCE): "Held-out masked-LM loss changes by {} nats; that interval covers other seeds.",
        ("loss_gap", NUISANCE): "Held-out minus training loss changes by {} nats; that interval covers other seeds.",
    }
    effects = {sentence: _effect(slopes, *key) for key, sentence in further.items()}
    lines += [sentence.format(value) for sentence, value in effects.items() if value is not None]
    if bend is not None and (bend.low > 0 or bend.high < 0):
        lines.append(f"The middle ranks differ from the mean of both ends by {bend}: see CC by rank.")
    if is_adaptive:
        lines.append(
            "The search was adaptive: it tried more settings where it had seen high scores, so ranks were not compared "
            "on equal terms. Run a grid to confirm this."
        )
    return lines


def _by_rate(slopes: pd.DataFrame, used: pd.DataFrame) -> list[str]:
    """Return the effect of rank at each learning rate, and how far the extreme ones differ; nothing with one rate."""
    difference = _effect(slopes, BY_LR)
    if difference is None:
        return []
    effects = {rate: _effect(slopes, "cc_mean", subset=rate_name(rate)) for rate in np.unique(used["lr"])}
    each = [f"{e.estimate:+.4f} at {rate:g}" for rate, e in effects.items() if e is not None]
    start = f"By learning rate the effect is {joined(each)}; from" if each else "From"
    return [f"{start} a rate of {used['lr'].min():g} to {used['lr'].max():g} it changes by {difference}."]
