"""How sure is a mean CC, or a difference between two models? Over stories; ``block_bootstrap.py`` over time."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from bert_encoding.core.seeds import generator

STORIES, TIME = "stories", "time inside these stories"
LEVEL = 0.95
N_RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and where it may lie.

    Attributes
    ----------
    low, high : bounds; NaN where there is only one story or block to go by
    level : share of such intervals that should hold the truth
    n : how many stories or blocks of time were there
    unit : what was taken to be a random sample. ``stories``: the interval speaks of new stories of this kind; ``time
        inside these stories``: of more listening to just these
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    unit: str


class PairedDifference(NamedTuple):
    """CC of one model minus CC of another.

    Attributes
    ----------
    stories : names, in the order of the rows
    difference : (n_stories, n_voxels) float64, NaN where either CC is
    mean : (n_voxels,) over the stories that have one, NaN where none has
    n_stories : (n_voxels,) how many have one
    """

    stories: tuple[str, ...]
    difference: np.ndarray
    mean: np.ndarray
    n_stories: np.ndarray


def paired_difference(
    cc_by_story_a: Mapping[str, np.ndarray], cc_by_story_b: Mapping[str, np.ndarray]
) -> PairedDifference:
    """Subtract, voxel by voxel and story by story, what model b scores from what model a scores.

    Parameters
    ----------
    cc_by_story_a, cc_by_story_b : story -> (n_voxels,); the same stories, as in ``SubjectScores.story_cc``

    Raises
    ------
    ValueError
        if stories or voxels differ: a difference between means over unlike sets is not one of models.
    """
    if set(cc_by_story_a) != set(cc_by_story_b) or not cc_by_story_a:
        unpaired = sorted(set(cc_by_story_a) ^ set(cc_by_story_b))
        raise ValueError(f"stories that only one model has: {', '.join(unpaired) or 'none, but there are no stories'}")
    stories = tuple(cc_by_story_a)
    a, b = (np.stack([table[name] for name in stories]).astype(np.float64) for table in (cc_by_story_a, cc_by_story_b))
    if a.shape != b.shape:
        raise ValueError(f"model a scores {a.shape[1]} voxels, model b {b.shape[1]}")
    difference = a - b
    n_stories = np.count_nonzero(~np.isnan(difference), axis=0)
    total = np.nansum(difference, axis=0)
    mean = np.divide(total, n_stories, out=np.full(total.shape, np.nan), where=n_stories > 0)
    return PairedDifference(stories, difference, mean, n_stories)


def story_interval(
    values: np.ndarray, method: str = "t", *, level: float = LEVEL, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean over stories and its interval, stories being the sample.

    ``t`` is ``mean -+ t(n - 1) s / sqrt(n)``; ``bootstrap`` resamples stories with replacement and takes percentiles of
    the mean. ``t`` is the default: the bootstrap is too narrow with few
    stories (measured coverage: docs/statistics.md).

    Parameters
    ----------
    values : (n_stories,), or (n_stories, n_voxels) to be averaged over the voxels that have a value; of a comparison,
        paired differences

    Raises
    ------
    ValueError
        if a story has no value, or there is no story.
    """
    of_story = _mean_of_stories(values)
    estimate, n = float(of_story.mean()), of_story.size
    if n < 2:
        return Interval(estimate, np.nan, np.nan, level, n, STORIES)
    low, high = STORY_METHODS[method](of_story, level, n_resamples, seed)
    return Interval(estimate, low, high, level, n, STORIES)


def percentiles(resampled: np.ndarray, level: float) -> tuple[float, float]:
    """Return the bounds between which the middle ``level`` of the resamples lies."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean_of_stories(values: np.ndarray) -> np.ndarray:
    """Return a value for each story, (n_stories,) float64."""
    if not len(values):
        raise ValueError("there are no stories")
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    has_value = ~np.isnan(table)
    if not has_value.any(axis=1).all():
        raise ValueError("a story has no value")
    return np.where(has_value, table, 0).sum(axis=1) / has_value.sum(axis=1)


def _t_bounds(of_story: np.ndarray, level: float, n_resamples: int, seed: int) -> tuple[float, float]:
    n = of_story.size
    reach = student.ppf((1 + level) / 2, n - 1) * of_story.std(ddof=1) / np.sqrt(n)
    return float(of_story.mean() - reach), float(of_story.mean() + reach)


def _bootstrap_bounds(of_story: np.ndarray, level: float, n_resamples: int, seed: int) -> tuple[float, float]:
    n = of_story.size
    drawn = generator(seed, "story interval").integers(n, size=(n_resamples, n))
    return percentiles(of_story[drawn].mean(axis=1), level)


STORY_METHODS: dict[str, Callable[[np.ndarray, float, int, int], tuple[float, float]]] = {
    "t": _t_bounds,
    "bootstrap": _bootstrap_bounds,
}
