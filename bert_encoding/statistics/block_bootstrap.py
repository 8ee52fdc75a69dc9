"""Intervals of a mean CC, or of the difference between two models, over time inside given stories.

Every story is cut into blocks of rows (the last may be shorter), and as many as it has are drawn from them with
replacement: responses and predictions together, all voxels together. The CC over all rows drawn is computed for every
voxel, then averaged over voxels; bounds are percentiles of the resamples. CCs come from each block's sums of y, p, yy,
pp and yp, so a resample is a weighted sum. The interval describes other moments of *these* stories; other stories may
vary more. Measured coverage: docs/statistics.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bert_encoding.core.seeds import generator
from bert_encoding.statistics.story_intervals import LEVEL, TIME, Interval

BLOCK_TRS = 10
N_RESAMPLES = 2000
WORK_BYTES = 2**26  # of resampled sums in memory


@dataclass(frozen=True, eq=False)
class Replicates:
    """CC summed over voxels, for the original rows and for resamples; see ``join_replicates``."""

    total: np.ndarray  # (1 + n_resamples,), first for the original rows; (1,) if no story has two blocks to draw from
    used: np.ndarray  # (n_columns,) bool, voxels that have a CC and are in the sums
    n_blocks: int  # in all stories
    draws: str  # hash of the rows, their blocks and the draws; replicates with the same hash are paired

    @property
    def n_voxels(self) -> int:
        return int(self.used.sum())

    @property
    def mean(self) -> np.ndarray:
        """Mean CC over the voxels used, (1 + n_resamples,); ValueError if there are none."""
        if self.n_voxels == 0:
            raise ValueError("no voxel has finite, varying responses and finite predictions")
        return self.total / self.n_voxels


def time_replicates(
    Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Replicates:
    """Resample the CC of one model and one panel of voxels.

    A brain that does not fit in memory is passed panel by panel, and the replicates are joined. The draws depend only
    on the rows of the stories, ``n_resamples`` and ``seed``, so panels and models share them.

    Raises ValueError if shapes disagree.

    Parameters
    ----------
    Y, predicted : (n_rows, n_voxels); voxels that are constant or not finite in Y, or not finite in the prediction, are
        left out; a prediction that is constant in a resample scores 0 there
    story_of_row : (n_rows,) label of each row's story; rows of a story are in order of time
    """
    if Y.shape != predicted.shape or Y.ndim != 2:
        raise ValueError(f"responses {Y.shape} and predictions {predicted.shape}: expected one (n_rows, n_voxels)")
    if story_of_row.shape != Y.shape[:1] or not len(Y):
        raise ValueError(f"rows disagree: responses {len(Y)}, story_of_row {story_of_row.shape}")
    starts, story_of_block, order = _blocks(story_of_row)
    if np.unique(story_of_block).size == story_of_block.size:  # a story of one block has nothing to draw from
        n_resamples = 0
    weights = _draws(story_of_block, n_resamples, generator(seed, "time interval"))
    n_columns = max(1, WORK_BYTES // (8 * (8 * len(weights) + 6 * len(Y))))
    total, used = np.zeros(len(weights)), np.zeros(Y.shape[1], bool)
    for first in range(0, Y.shape[1], n_columns):
        columns = slice(first, first + n_columns)
        cc, used[columns] = _summed_cc(Y[order, columns], predicted[order, columns], starts, weights)
        total += cc
    return Replicates(total, used, len(starts), _digest(order, starts, weights))


def join_replicates(panels: Sequence[Replicates]) -> Replicates:
    """Join the panels of one brain, in the order of their voxels.

    Raises ValueError if there are none, or their draws differ.
    """
    if not panels:
        raise ValueError("there are no replicates")
    _check_paired(panels)
    total = np.sum([panel.total for panel in panels], axis=0)
    return replace(panels[0], total=total, used=np.concatenate([panel.used for panel in panels]))


def mean_replicates(subjects: Sequence[Replicates]) -> Replicates:
    """Return the mean over subjects; each counts as one voxel, whatever its number of voxels.

    Subjects with the same rows share the draws; the draws of a subject that lacks a story are treated as independent.

    Raises ValueError if there are none, one has no voxel, or their numbers of resamples differ.
    """
    if not subjects:
        raise ValueError("there are no replicates")
    n_resamples = {len(subject.total) - 1 for subject in subjects}
    if len(n_resamples) > 1:
        raise ValueError(f"subjects have {sorted(n_resamples)} resamples of time; expected one number")
    draws = _digest(*(np.frombuffer(subject.draws.encode(), np.uint8) for subject in subjects))
    n_blocks = min(subject.n_blocks for subject in subjects)
    total = np.sum([subject.mean for subject in subjects], axis=0)
    return Replicates(total, np.ones(len(subjects), bool), n_blocks, draws)


def replicates_interval(replicates: Replicates) -> Interval:
    """Return the mean CC over all voxels of the replicates, and its interval over time.

    Raises ValueError if no voxel has a CC.
    """
    return _interval_of_means(replicates.mean, replicates.n_blocks)


def difference_interval(a: Replicates, b: Replicates) -> Interval:
    """Return the mean CC of model a minus that of model b, and its interval over time, resample by resample.

    Raises ValueError if draws or voxels differ, or no voxel has a CC.
    """
    _check_paired([a, b])
    if not np.array_equal(a.used, b.used):
        raise ValueError(
            f"the models have a CC in different voxels: a in {a.n_voxels} of {a.used.size}, b in {b.n_voxels} of "
            f"{b.used.size}; leave out voxels that are missing in one of them"
        )
    return _interval_of_means(a.mean - b.mean, a.n_blocks)


def _check_paired(parts: Sequence[Replicates]) -> None:
    if len({part.draws for part in parts}) > 1:
        raise ValueError("replicates differ in rows or draws; use the same rows and seed for all panels and models")


def _interval_of_means(means: np.ndarray, n_blocks: int) -> Interval:
    low = high = np.nan
    if len(means) > 1:
        low, high = np.quantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(means[0]), float(low), float(high), LEVEL, n_blocks, TIME)


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _blocks(story_of_row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first row and the story of each block, (n_blocks,), in rows sorted by story, and that order."""
    order = np.argsort(story_of_row, kind="stable")
    _, first_rows, n_rows = np.unique(story_of_row[order], return_index=True, return_counts=True)
    starts = [first + np.arange(0, n, BLOCK_TRS) for first, n in zip(first_rows, n_rows, strict=True)]
    story_of_block = np.repeat(np.arange(len(starts)), [len(of_story) for of_story in starts])
    return np.concatenate(starts), story_of_block, order


def _draws(story_of_block: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each block is drawn, (1 + n_resamples, n_blocks) float64; in the first row, once each."""
    weights = np.ones((1 + n_resamples, story_of_block.size))
    for story in np.unique(story_of_block):
        blocks = np.flatnonzero(story_of_block == story)
        weights[1:, blocks] = rng.multinomial(blocks.size, np.full(blocks.size, 1 / blocks.size), size=n_resamples)
    return weights


def _summed_cc(
    Y: np.ndarray, predicted: np.ndarray, starts: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the CC summed over voxels, (1 + n_resamples,), and which voxels it includes, (n_voxels,)."""
    used = np.isfinite(Y).all(axis=0) & (Y[0] != Y).any(axis=0) & np.isfinite(predicted).all(axis=0)
    sizes = weights @ np.diff(np.append(starts, len(Y)))[:, None].astype(np.float64)  # (1 + n_resamples, 1)
    y, y_mean, y_power = _centred_sums(Y[:, used], starts, weights, sizes)
    p, p_mean, p_power = _centred_sums(predicted[:, used], starts, weights, sizes)
    product = _resampled(y * p, starts, weights) / sizes - y_mean * p_mean
    varies = (p_power > 1e-20) & (y_power > 0)  # below is rounding; as in correlate, a constant prediction scores 0
    norms = np.sqrt(np.where(varies, y_power * p_power, 1))
    return np.where(varies, product / norms, 0).clip(-1, 1).sum(axis=1), used


def _centred_sums(
    values: np.ndarray, starts: np.ndarray, weights: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values minus their mean in float64, so that sums of squares lose no digits, and the mean and variance of
    each resample, (1 + n_resamples, n_voxels)."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    mean = _resampled(centred, starts, weights) / sizes
    return centred, mean, _resampled(centred**2, starts, weights) / sizes - mean**2


def _resampled(values: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the sum over rows of each resample, (1 + n_resamples, n_voxels)."""
    return weights @ np.add.reduceat(values, starts, axis=0)
