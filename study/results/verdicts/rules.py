"""Does a higher rank help or overfit, and does fine-tuning help at all? The rules of the verdicts.

An *effect* is a difference in CC with an interval over trials (other seeds) and stories, see ``slopes.py``: of rank
over the range of ranks tried, of tuning compared with the frozen encoder. ``delta`` is the smallest effect that
matters, set in advance. CC is the mean over stories of the CC inside each; only the adaptation gap is over joined TRs.

The answer is *cannot tell*, whatever the numbers, with fewer than two ranks, fewer than ``MIN_DF`` residual degrees of
freedom, fewer than two validation stories, or a rank that varies together with a nuisance. Otherwise the first rule
that holds decides:

1. **no effect**: the 90% interval is within +-delta (two one-sided tests at 5%), on at least ``MIN_STORIES`` stories.
   For rank also: CC does not bend over it (its middle ranks do not differ from both ends by more than delta and beyond
   the 95% interval of that difference), and its effect does not differ by more than delta between the lowest and the
   highest learning rate (beyond the 95% interval of the difference) or between two scaling rules (beyond a 99%
   interval, as there may be several pairs). Otherwise opposite effects could cancel in the mean.
2. **helps**: the 95% interval is above 0.
3. **overfits**: the 95% interval is below 0, *and* that of the adaptation gap is above 0: fine-tuning gains on the
   stories that it read compared with those that it did not read. A fall without a widening gap is harm of another kind
   and is not called overfitting. The gap is the gain on seen minus that on unseen stories, so a fall on unseen ones,
   also by chance, widens it by itself; therefore CC on the *seen* stories must not fall either: its 95% interval is not
   below 0.
4. **cannot tell**, together with a command for the runs that could decide.

The effect of rank is adjusted for nuisances (learning rate, scaling rule, targets, steps); in a full grid that equals
the plain effect, with a narrower interval. An adaptive search tries more settings where it has seen high scores, which
is not a design: its answer is called exploratory, and rules 2 and 3 must hold with 99% intervals, with and without
adjustment. Early stopping makes a search adaptive too: the trials that ran to the end were chosen by their scores.

The effect of tuning is, after the confirm phase, that of the winner on the test stories, which chose nothing, with an
interval over stories if there are at least ``MIN_STORIES``. With fewer, the interval is over time inside these stories
only, of CC over their joined TRs, and the answer stands (*on just these stories*) only if the mean trial on the
validation stories, with its own interval over other seeds and stories, points the same way, and for *helps* the
winner's fresh validation CC too. Before the confirm phase it is that of the mean trial on the validation stories, of at
least ``MIN_DF`` trials: the best trial is chosen by its luck too.
"""

from typing import NamedTuple

import numpy as np

from study.results.slopes import half_width

MIN_DF = 6
MIN_STORIES = 3
HELPS, OVERFITS, NO_EFFECT, CANNOT_TELL = "helps", "overfits", "no effect", "cannot tell"


class Effect(NamedTuple):
    """A difference in CC with its intervals, NaN if there are none."""

    estimate: float
    low: float  # 95%
    high: float
    low_90: float  # for the test of equivalence
    high_90: float
    n_trials: int
    n_stories: int
    covers: str  # what the intervals cover, in words
    low_99: float = float("nan")  # for adaptive searches
    high_99: float = float("nan")

    def __str__(self) -> str:
        """Return estimate and 95% interval."""
        if not np.isfinite(self.low):
            return f"{self.estimate:+.4f}"
        return f"{self.estimate:+.4f} (95% interval {self.low:+.4f} to {self.high:+.4f})"

    def with_90(self) -> str:
        """Return estimate, the 90% interval that equivalence is tested by, and the 95% interval."""
        of_90 = f"90% interval {self.low_90:+.4f} to {self.high_90:+.4f}"
        return f"{self.estimate:+.4f} ({of_90}, 95% {self.low:+.4f} to {self.high:+.4f})"


class NextRuns(NamedTuple):
    """What to run next: a shell command, None if nothing would help, and what it would show."""

    command: str | None = None
    text: str = ""


NOTHING_TO_RUN = NextRuns()


class Verdict(NamedTuple):
    """An answer by the rules of this module."""

    question: str
    answer: str  # ``HELPS``, ``OVERFITS``, ``NO_EFFECT`` (none detectable within +-delta) or ``CANNOT_TELL``
    headline: str  # the answer in one sentence with its numbers
    sentences: tuple[str, ...]  # what it is based on, and its limits
    effect: Effect | None  # None if unknown
    delta: float  # CC
    is_exploratory: bool  # the search was adaptive, so the answer needs confirmation by a designed study
    command: str | None  # for the runs that could decide, or for the pending confirm phase; None if nothing is to run


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
    """Return the answer by the rules of this module, except what a mean effect of rank may hide.

    The effects are on held-out CC, on the adaptation gap, on held-out CC without adjustment (``plain``, which must hold
    too in an adaptive search) and on CC of ``seen`` stories; None is unknown. From ``min_stories`` on *no effect* can
    be shown.
    """
    if effect.n_stories >= min_stories and is_none(effect, delta):
        return NO_EFFECT
    judged = [effect] if plain is None or not is_adaptive else [effect, plain]
    if all((e.low_99 if is_adaptive else e.low) > 0 for e in judged):
        return HELPS
    falls = all((e.high_99 if is_adaptive else e.high) < 0 for e in judged)
    widens = gap is not None and (gap.low_99 if is_adaptive else gap.low) > 0
    return OVERFITS if falls and widens and not (seen is not None and seen.high < 0) else CANNOT_TELL


def is_none(effect: Effect, delta: float) -> bool:
    """Whether the 90% interval is within +-delta."""
    return bool(-delta < effect.low_90 and effect.high_90 < delta)


def effect_with_intervals(
    estimate: float, se: tuple[float, int, float, int], n_trials: int, covers: str, n_stories: int | None = None
) -> Effect:
    """Return an effect with its 95, 90 and 99% intervals; ``se`` are the first four arguments of ``half_width``."""
    halves = {level: half_width(*se, level) for level in (0.95, 0.90, 0.99)}
    (low, high), (low_90, high_90), (low_99, high_99) = ((estimate - h, estimate + h) for h in halves.values())
    n = se[3] if n_stories is None else n_stories
    return Effect(estimate, low, high, low_90, high_90, n_trials, n, covers, low_99, high_99)


def cannot_tell_verdict(
    question: str, reason: str, effect: Effect | None, delta: float, is_adaptive: bool, runs: NextRuns
) -> Verdict:
    """Return the verdict where some condition for an answer is not met."""
    headline, sentences = f"Cannot tell from these trials: {reason}.", (runs.text,) if runs.text else ()
    return Verdict(question, CANNOT_TELL, headline, sentences, effect, delta, is_adaptive, runs.command)
