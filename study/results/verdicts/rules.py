"""Does a higher rank help or overfit, and does fine-tuning help at all? Answers from rules that are stated here.

An *effect* is a difference in CC with an interval over trials (other seeds) and stories, see ``slopes.py``: of rank
over the range of ranks tried, of tuning against the frozen encoder. ``delta`` is the effect that matters, set in
advance.

CC is meant as the mean over stories of CC inside each; see ``slopes.py``. The adaptation gap alone is over joined TRs.

Cannot be told, whatever the numbers: fewer than two ranks, fewer than ``MIN_DF`` residual degrees of freedom, fewer
than two validation stories, or a rank that moves together with a nuisance. Otherwise the first rule that holds decides:

1. **no effect**: the 90% interval lies within +-delta (two one-sided tests at 5%), on ``MIN_STORIES`` stories at least.
   Of rank besides: CC does not bend over it (its middle ranks do not stand out from both ends by more than delta and
   beyond its own 95% interval), and its effect does not differ by more than delta between the lowest and the highest
   learning rate (beyond the 95% interval of the difference) or between two scaling rules (beyond a 99% interval, as
   there may be several pairs): else it depends on these, and opposite effects only cancel in the mean.
2. **helps**: the 95% interval lies above 0.
3. **overfits**: the 95% interval lies below 0, *and* that of the adaptation gap lies above 0: what fine-tuning read
   gains on what it has not read. A fall without a widening gap is harm of another kind, and is not called overfitting.
   The gap is the gain on seen less that on unseen stories, so that a fall on unseen ones, also by chance, widens it by
   itself; so CC on the *seen* stories must not fall either: its 95% interval does not lie below 0.
4. **cannot tell**, with the runs that would.

The effect of rank is the one adjusted for nuisances (learning rate, scaling rule, targets, steps); in a full grid that
is the plain one, only surer. An adaptive search tries more where it has seen more, which is no design: its answer is
called exploratory, and rules 2 and 3 must hold with 99% intervals, with and without adjustment. Early stopping makes a
search adaptive too: the trials that ran to the end were chosen by their scores.

The effect of tuning is, after the confirm phase, that of the winner on the test stories, which chose nothing, with an
interval over stories if there are ``MIN_STORIES``. Fewer tell nothing of others: theirs is over time inside these
alone, of CC over their joined TRs, and its answer stands (*on just these stories*) only if the mean trial on the
validation stories, with its own interval over other seeds and stories, points the same way, and for *helps* the
winner's fresh validation CC too. Before the confirm phase it is that of the mean trial on the validation stories, of
``MIN_DF`` trials at least: the best one is chosen by its luck too.
"""

from typing import NamedTuple

import numpy as np

from study.results.slopes import half_width

MIN_DF = 6
MIN_STORIES = 3
HELPS, OVERFITS, NO_EFFECT, CANNOT_TELL = "helps", "overfits", "no effect", "cannot tell"


class Effect(NamedTuple):
    """A difference and where it may lie.

    Attributes
    ----------
    estimate, low, high : CC; the 95% interval, NaN where there is nothing to go by
    low_90, high_90 : the 90% interval, by which equivalence is tested
    n_trials, n_stories : what it goes by
    covers : in words, what the interval speaks of
    low_99, high_99 : the 99% interval, by which an adaptive search is judged
    """

    estimate: float
    low: float
    high: float
    low_90: float
    high_90: float
    n_trials: int
    n_stories: int
    covers: str
    low_99: float = float("nan")
    high_99: float = float("nan")

    def __str__(self) -> str:
        """Say estimate and 95% interval."""
        if not np.isfinite(self.low):
            return f"{self.estimate:+.4f}"
        return f"{self.estimate:+.4f} (95% interval {self.low:+.4f} to {self.high:+.4f})"

    def with_90(self) -> str:
        """Say estimate, the 90% interval that equivalence goes by, and the 95% one."""
        told = f"90% interval {self.low_90:+.4f} to {self.high_90:+.4f}, 95% {self.low:+.4f} to {self.high:+.4f}"
        return f"{self.estimate:+.4f} ({told})"


class Verdict(NamedTuple):
    """An answer by the rules of this module.

    Attributes
    ----------
    question : in words
    answer : ``helps``, ``overfits``, ``no effect`` (none detectable within +-delta) or ``cannot tell``
    headline : the answer in one sentence with its numbers
    sentences : what it rests on, and what it does not tell
    effect : CC; of rank over the range of ranks tried, of tuning against frozen. None where there is none
    delta : CC
    is_exploratory : the search was adaptive, so that the answer needs a designed study to hold
    command : runs that would tell, or the confirm phase that has not run, ready for a shell; None where there is
        nothing to run or the answer is known
    """

    question: str
    answer: str
    headline: str
    sentences: tuple[str, ...]
    effect: Effect | None
    delta: float
    is_exploratory: bool
    command: str | None


def decide(
    effect: Effect,
    gap: Effect | None,
    delta: float,
    is_adaptive: bool = False,
    plain: Effect | None = None,
    *,
    seen: Effect | None = None,
    min_stories: int = MIN_STORIES,
) -> str:
    """Return the answer by the rules of this module, what rank depends on aside.

    Parameters
    ----------
    effect : on held-out CC
    gap : on the adaptation gap; None if unknown
    plain : the effect without adjustment, which an adaptive search is judged by too
    seen : on CC of stories that fine-tuning read; None if unknown
    min_stories : from which no effect can be shown
    """
    if effect.n_stories >= min_stories and is_none(effect, delta):
        return NO_EFFECT
    judged = [effect] if not is_adaptive else [one for one in (effect, plain) if one is not None]
    lows = [one.low_99 if is_adaptive else one.low for one in judged]
    highs = [one.high_99 if is_adaptive else one.high for one in judged]
    if all(low > 0 for low in lows):
        return HELPS
    widens = gap is not None and (gap.low_99 if is_adaptive else gap.low) > 0
    if all(high < 0 for high in highs) and widens and not (seen is not None and seen.high < 0):
        return OVERFITS
    return CANNOT_TELL


def is_none(effect: Effect, delta: float) -> bool:
    """Whether the 90% interval lies within +-delta."""
    return bool(-delta < effect.low_90 and effect.high_90 < delta)


def with_bounds(
    estimate: float, se: tuple[float, int, float, int], n_trials: int, covers: str, n_stories: int | None = None
) -> Effect:
    """Return an effect with the bounds that ``half_width`` gives; ``se`` is its first four arguments."""
    halves = {level: half_width(*se, level) for level in (0.95, 0.90, 0.99)}
    (low, high), (low_90, high_90), (low_99, high_99) = ((estimate - h, estimate + h) for h in halves.values())
    n = se[3] if n_stories is None else n_stories
    return Effect(estimate, low, high, low_90, high_90, n_trials, n, covers, low_99, high_99)


def untold(
    question: str, why: str, effect: Effect | None, delta: float, is_adaptive: bool, command: str | None, further: str
) -> Verdict:
    headline = f"Cannot tell from these trials: {why}."
    return Verdict(question, CANNOT_TELL, headline, (further,) if further else (), effect, delta, is_adaptive, command)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
