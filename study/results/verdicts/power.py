"""Which effect of rank a study can detect, and the smallest runs that could decide."""

from typing import NamedTuple

import numpy as np
from scipy.stats import chi2, norm

from study.results.slopes import half_width

POWER = 0.8
SURE = 0.8  # probability that a spread is not larger than its upper bound
MAX_FOLDS = 5


class Spread(NamedTuple):
    """What makes an effect of rank uncertain, CC."""

    sd_trial: float  # of a trial around the fit
    sd_story: float  # of the effect over the range of ranks, between stories


class Grid(NamedTuple):
    """A search space that compares ranks."""

    space: str  # its name in ``search_spaces``
    n_trials: int
    variance: float  # of log2 rank over its trials, the range taken as 1
    n_columns: int  # of the fit


def _variance(ranks: tuple[int, ...]) -> float:
    x = np.log2(ranks)
    return float(((x - x.min()) / np.ptp(x)).var())


GRIDS = (
    Grid("lora_rank_small", 12, _variance((4, 16, 64)), 4),
    Grid("lora_rank", 162, _variance((2, 4, 8, 16, 32, 64)), 8),
)


class Runs(NamedTuple):
    """The smallest runs that could decide."""

    grid: Grid
    n_folds: int  # outer folds; 1 if the validation stories of a single split suffice
    n_stories: int  # validation stories in all folds
    half_90: float  # half the expected 90% interval, CC
    is_enough: bool  # an effect of 0 would be distinguished from one of delta with a probability of ``POWER``


def upper_sd(sd: float, df: int) -> float:
    """Return an upper bound of an SD that holds with a probability of ``SURE``, from an estimate with ``df``.

    sd sqrt(df / q), q the lower quantile of chi-squared: with one degree of freedom, from two stories, 4 times as much.
    """
    return float(sd * np.sqrt(df / chi2.ppf(1 - SURE, df)))


def standard_errors(spread: Spread, grid: Grid, n_stories: int) -> tuple[float, float]:
    """Return the standard error of the effect over the range of ranks, by trials and by stories."""
    se_trials = spread.sd_trial / np.sqrt(grid.n_trials * grid.variance)
    return float(se_trials), spread.sd_story / np.sqrt(n_stories) if n_stories else np.nan


def _expected_half(spread: Spread, grid: Grid, n_stories: int, level: float) -> float:
    se_trials, se_stories = standard_errors(spread, grid, n_stories)
    return half_width(se_trials, grid.n_trials - grid.n_columns, se_stories, n_stories, level)


def equivalence_power(delta: float, spread: Spread, grid: Grid, n_stories: int) -> float:
    """Return the probability that the 90% interval of no effect is within +-delta.

    The half width is taken as known and the estimate as normal: slightly optimistic with few trials and stories.
    """
    half = _expected_half(spread, grid, n_stories, 0.90)
    return float(max(0.0, 2 * norm.cdf((delta - half) / np.hypot(*standard_errors(spread, grid, n_stories))) - 1))


def detectable(spread: Spread, grid: Grid, n_stories: int) -> float:
    """Return the smallest effect over the range of ranks whose 95% interval excludes 0 with a probability of ``POWER``.

    In CC; approximate like ``equivalence_power``.
    """
    half = _expected_half(spread, grid, n_stories, 0.95)
    return float(half + norm.ppf(POWER) * np.hypot(*standard_errors(spread, grid, n_stories)))


def smallest_runs(delta: float, spread: Spread, n_stories: int, n_fitted: int, n_folds: int = 1) -> Runs:
    """Return the cheapest runs that would tell no effect from one of delta; the most precise ones if none would.

    More seeds reduce the error from trials, only more stories that from stories; outer folds, which validate every
    story once, use more stories of the same data. The study has ``n_stories`` validation stories in all its
    ``n_folds`` outer folds, and can rotate ``n_fitted``: fit and validation.
    """
    known = Spread(spread.sd_trial, spread.sd_story if np.isfinite(spread.sd_story) else delta)
    folds = (n_folds,) if n_folds > 1 or n_fitted <= n_stories else (1, min(MAX_FOLDS, n_fitted))
    runs = []
    for grid, n in sorted(((g, n) for g in GRIDS for n in folds), key=lambda pair: pair[0].n_trials * pair[1]):
        stories = n_stories if n == n_folds else n_fitted
        half = _expected_half(known, grid, stories, 0.90)
        is_enough = stories > 1 and equivalence_power(delta, known, grid, stories) >= POWER
        runs.append(Runs(grid, n, stories, half, is_enough))
    return next((r for r in runs if r.is_enough), min(runs, key=lambda r: (r.n_stories < 2, r.half_90)))


def seeds_needed(delta: float, spread: Spread, grid: Grid, n_stories: int, most: int = 50) -> int | None:
    """Return how often a grid must run, with other seeds each time, to tell no effect from one of delta.

    None if even ``most`` times are not enough: then only more stories help.
    """
    for times in range(1, most + 1):
        larger = grid._replace(n_trials=grid.n_trials * times)
        if n_stories > 1 and equivalence_power(delta, spread, larger, n_stories) >= POWER:
            return times
    return None
