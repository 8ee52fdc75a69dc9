"""What a study tells of rank, by the rules of ``verdict.py``."""

import numpy as np
import pandas as pd

from study.results.rank_tables import LeftOut
from study.results.slopes import ALL, BEND, BY_LR, BY_RULE, NONE, NUISANCE, PAIR, SEEN, find_slope, rate_name
from study.results.verdicts.rules import (
    CANNOT_TELL,
    HELPS,
    MIN_DF,
    MIN_STORIES,
    NO_EFFECT,
    OVERFITS,
    Effect,
    Verdict,
    capital,
    decide,
    is_none,
    untold,
)
from study.setup.delta import DELTA
from study.wording import counted, joined

RANK_QUESTION = "Does a higher LoRA rank help or overfit?"


def rank_verdict(
    slopes: pd.DataFrame,
    used: pd.DataFrame,
    *,
    delta: float = DELTA,
    is_adaptive: bool = False,
    left_out: LeftOut | None = None,
    command: str | None = None,
    what_would_tell: str = "",
) -> Verdict:
    """Return what a study tells of rank.

    Parameters
    ----------
    slopes : of ``slopes.slope_table``
    used : of ``rank_tables.used_trials``
    command, what_would_tell : runs that would tell, for a shell and in words; used where the answer is that it cannot
        be told
    """
    why = why_not(slopes, used)
    effect = effect_of(slopes, "cc_mean")
    if why or effect is None:
        return untold(RANK_QUESTION, why, effect, delta, is_adaptive, command, what_would_tell)
    gap, plain = effect_of(slopes, "adaptation_gap"), effect_of(slopes, "cc_mean", NONE)
    seen = effect_of(slopes, SEEN)
    answer = decide(effect, gap, delta, is_adaptive, plain, seen=seen)
    hidden = what_hides(slopes, delta) if answer in (NO_EFFECT, CANNOT_TELL) else ""
    if answer == NO_EFFECT and hidden:
        answer = CANNOT_TELL
    if not hidden and answer == CANNOT_TELL and effect.n_stories < MIN_STORIES and is_none(effect, delta):
        heard = counted(effect.n_stories, "validation story", "validation stories")
        hidden = f"{heard} cannot show that rank does nothing, {MIN_STORIES} are the least"
    ranks = f"from rank {used['rank'].min():g} to {used['rank'].max():g}"
    headline = _rank_headline(answer, ranks, effect, gap, seen, delta, is_adaptive, hidden)
    sentences = _rank_sentences(slopes, used, effect, gap, plain, left_out, is_adaptive)
    is_open = answer == CANNOT_TELL
    told = (*sentences, what_would_tell) if is_open and what_would_tell else sentences
    return Verdict(RANK_QUESTION, answer, headline, told, effect, delta, is_adaptive, command if is_open else None)


def why_not(slopes: pd.DataFrame, used: pd.DataFrame) -> str:
    """Return why nothing can be told of rank, in words; empty if something can."""
    n_ranks = used["rank"].nunique()
    if n_ranks < 2:
        tells = "tells" if len(used) == 1 else "tell"
        return f"{counted(len(used), 'complete LoRA trial')} of {counted(n_ranks, 'rank')} {tells} nothing of rank"
    found = find_slope(slopes, "cc_mean", NUISANCE, ALL)
    if found is None or not np.isfinite(found["effect"]):
        return f"rank and what was changed beside it ({_moved(slopes)}) moved together and cannot be told apart"
    if found["df"] < MIN_DF:
        left = f"{counted(len(used), 'trial')} leave {counted(int(found['df']), 'degree')} of freedom"
        return f"{left}, and {MIN_DF} are the least from which noise is judged"
    if found["n_stories"] < 2:
        heard = counted(int(found["n_stories"]), "validation story", "validation stories")
        return f"with {heard} nothing is known of other stories"
    return ""


def effect_of(slopes: pd.DataFrame, outcome: str, adjustment: str = NUISANCE, subset: str = ALL) -> Effect | None:
    """Return the effect of rank on an outcome over the range of ranks; None if not estimated."""
    row = find_slope(slopes, outcome, adjustment, subset)
    if row is None or not np.isfinite(row["effect"]):
        return None
    n_stories = int(row["n_stories"])
    covers = f"other seeds and other stories, by {n_stories} validation stories" if n_stories > 1 else "other seeds"
    bounds = {name: float(row[name]) for name in ("low", "high", "low_90", "high_90", "low_99", "high_99")}
    return Effect(float(row["effect"]), n_trials=int(row["n_trials"]), n_stories=n_stories, covers=covers, **bounds)


def what_hides(slopes: pd.DataFrame, delta: float) -> str:
    """Return why a mean effect near 0 does not mean that rank does nothing, in words; empty if nothing hides in it."""
    bend, by_lr = effect_of(slopes, BEND), effect_of(slopes, BY_LR)
    if by_lr is not None and abs(by_lr.estimate) > delta and (by_lr.low > 0 or by_lr.high < 0):
        return "what rank does depends on the learning rate"
    for pair in slopes.loc[slopes["outcome"] == BY_RULE, "subset"]:
        by_rule = effect_of(slopes, BY_RULE, subset=pair)
        if by_rule is not None and abs(by_rule.estimate) > delta and (by_rule.low_99 > 0 or by_rule.high_99 < 0):
            return f"what rank does depends on the scaling rule ({pair.replace(PAIR, ' or ')})"
    if bend is not None and abs(bend.estimate) > delta and (bend.low > 0 or bend.high < 0):
        return "CC does not simply rise or fall with rank"
    return ""


def _rank_headline(
    answer: str,
    ranks: str,
    effect: Effect,
    gap: Effect | None,
    seen: Effect | None,
    delta: float,
    is_adaptive: bool,
    hidden: str,
) -> str:
    held = "exploratory: " if is_adaptive else ""
    if answer == NO_EFFECT:
        told = f"{held}no detectable effect of rank within +-{delta:g} CC"
        return capital(f"{told}: {ranks}, CC changes by {effect.with_90()}.")
    if answer == HELPS:
        return capital(f"{held}a higher rank helps: {ranks}, CC rises by {effect}.")
    if answer == OVERFITS:
        return capital(
            f"{held}a higher rank overfits: {ranks}, CC falls by {effect} and the adaptation gap widens by {gap}."
        )
    if hidden:
        return capital(f"{held}cannot tell: {hidden}; {ranks}, CC changes by {effect}.")
    if effect.high < 0 and gap is not None and gap.low > 0:
        return capital(
            f"{held}cannot tell whether a higher rank overfits: {ranks}, CC falls by {effect}, but on the stories that "
            f"fine-tuning read it falls too{'' if seen is None else f': {seen}'}."
        )
    if effect.high < 0:
        return capital(
            f"{held}cannot tell whether a higher rank overfits: {ranks}, CC falls by {effect}, but the adaptation gap "
            f"is not shown to widen{'' if gap is None else f': {gap}'}."
        )
    return capital(f"{held}cannot tell from these trials: {ranks}, CC changes by {effect}.")


def _rank_sentences(
    slopes: pd.DataFrame,
    used: pd.DataFrame,
    effect: Effect,
    gap: Effect | None,
    plain: Effect | None,
    left_out: LeftOut | None,
    is_adaptive: bool,
) -> tuple[str, ...]:
    row = find_slope(slopes, "cc_mean", NUISANCE, ALL)
    assert row is not None
    out = f"; {left_out} left out" if left_out is not None and left_out.n else ""
    adjusted = f", adjusted for {joined(row['adjusted_for'].split(', '))}" if row["adjusted_for"] else ""
    lines = [
        f"It goes by {counted(effect.n_trials, 'trial')} of {counted(int(row['n_ranks']), 'rank')}{adjusted}{out}.",
        f"CC is meant inside each story, mean over stories; the interval speaks of {effect.covers}.",
        _by_rate_line(slopes, used),
    ]
    if plain is not None:
        lines.append(f"Without adjustment for anything but seeds the effect is {plain}.")
    if gap is not None:
        lines.append(f"The adaptation gap changes by {gap} over the same ranks.")
    lines += [_loss_line(slopes, outcome, name) for outcome, name in _LOSSES]
    bend = effect_of(slopes, BEND)
    if bend is not None and (bend.low > 0 or bend.high < 0):
        lines.append(f"The ranks in the middle differ from both ends by {bend}: look at CC by rank.")
    if is_adaptive:
        lines.append(
            "The search was adaptive: it tried more where it had seen more, so that ranks were not compared on equal "
            "terms. Run a grid to hold on to this."
        )
    return tuple(line for line in lines if line)


def _by_rate_line(slopes: pd.DataFrame, used: pd.DataFrame) -> str:
    """Say the effect of rank at each learning rate, and how far the extreme ones differ; of one rate nothing."""
    differs = effect_of(slopes, BY_LR)
    if differs is None:
        return ""
    effects = [(f"{rate:g}", effect_of(slopes, "cc_mean", subset=rate_name(rate))) for rate in np.unique(used["lr"])]
    each = [f"{one.estimate:+.4f} at {rate}" for rate, one in effects if one is not None]
    told = f"By learning rate the effect is {joined(each)}; from" if each else "From"
    low, high = (f"{rate:g}" for rate in (used["lr"].min(), used["lr"].max()))
    return f"{told} a rate of {low} to {high} it changes by {differs}."


_LOSSES = (("mlm_loss_heldout", "Held-out masked-LM loss"), ("loss_gap", "Held-out less training loss"))


def _loss_line(slopes: pd.DataFrame, outcome: str, name: str) -> str:
    effect = effect_of(slopes, outcome)
    return "" if effect is None else f"{name} changes by {effect} nats; that interval speaks of other seeds."


def _moved(slopes: pd.DataFrame) -> str:
    row = find_slope(slopes, "cc_mean", NUISANCE, ALL)
    return "other settings" if row is None else str(row["adjusted_for"]) or "other settings"
