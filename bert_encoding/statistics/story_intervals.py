"""Intervals of a mean CC, or of the difference between two models, over stories (over time: ``block_bootstrap.py``)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

STORIES, TIME = "stories", "time inside these stories"
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its confidence interval.

    Attributes
    ----------
    low, high : bounds; NaN with only one story or block
    level : confidence level
    n : number of stories or blocks of time
    unit : the units of the random sample. ``stories``: the interval is about new stories of this kind; ``time inside
        these stories``: about more listening to these stories
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    unit: str


def paired_difference(cc_by_story_a: Mapping[str, np.ndarray], cc_by_story_b: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return CC of model a minus CC of model b, (n_stories, n_voxels) float64, NaN if a CC is missing.

    Raises ValueError if the stories or voxels of the models differ.

    Parameters
    ----------
    cc_by_story_a, cc_by_story_b : story -> (n_voxels,); the same stories, as in ``SubjectScores.story_cc``
    """
    if set(cc_by_story_a) != set(cc_by_story_b) or not cc_by_story_a:
        unpaired = sorted(set(cc_by_story_a) ^ set(cc_by_story_b))
        raise ValueError(
            f"stories that only one model has: {', '.join(unpaired)}" if unpaired else "there are no stories"
        )
    stories = tuple(cc_by_story_a)
    a, b = (np.stack([table[name] for name in stories]).astype(np.float64) for table in (cc_by_story_a, cc_by_story_b))
    if a.shape != b.shape:
        raise ValueError(f"model a scores {a.shape[1]} voxels, model b {b.shape[1]}")
    return a - b


def story_interval(values: np.ndarray) -> Interval:
    """Return the mean over stories and its interval ``mean -+ t(n - 1) s / sqrt(n)``, with stories as the sample.

    Student's t, since the bootstrap is too narrow with few stories (measured coverage: docs/statistics.md).

    Raises ValueError if a story has no value, or there is no story.

    Parameters
    ----------
    values : (n_stories,), or (n_stories, n_voxels) to be averaged over the voxels that have a value; paired differences
        for a comparison
    """
    if not len(values):
        raise ValueError("there are no stories")
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    has_value = ~np.isnan(table)
    if not has_value.any(axis=1).all():
        raise ValueError("a story has no value")
    means = np.where(has_value, table, 0).sum(axis=1) / has_value.sum(axis=1)  # (n_stories,)
    estimate, n = float(means.mean()), means.size
    if n < 2:
        return Interval(estimate, np.nan, np.nan, LEVEL, n, STORIES)
    reach = float(student.ppf((1 + LEVEL) / 2, n - 1) * means.std(ddof=1) / np.sqrt(n))
    return Interval(estimate, estimate - reach, estimate + reach, LEVEL, n, STORIES)
