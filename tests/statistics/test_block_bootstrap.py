"""Intervals over time, against plain loops with the same draws and known truth."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter

from bert_encoding.core.seeds import generator
from bert_encoding.statistics import block_bootstrap
from bert_encoding.statistics.block_bootstrap import (
    difference_interval,
    join_replicates,
    mean_replicates,
    replicates_interval,
    time_replicates,
)
from bert_encoding.statistics.story_intervals import TIME, Interval


def time_interval(
    Y: np.ndarray, a: np.ndarray, story_of_row: np.ndarray, b: np.ndarray | None = None, **options: Any
) -> Interval:
    """Return the interval of one model, or of the difference of two."""
    of_a = time_replicates(Y, a, story_of_row, **options)
    if b is None:
        return replicates_interval(of_a)
    return difference_interval(of_a, time_replicates(Y, b, story_of_row, **options))


def slow(lag_1: float, n_rows: int, n_voxels: int, rng: np.random.Generator) -> np.ndarray:
    """Return columns of AR(1) noise of variance 1."""
    white = math.sqrt(1 - lag_1**2) * rng.standard_normal((n_rows + 60, n_voxels))
    return lfilter([1], [1, -lag_1], white, axis=0)[60:]


def example(n_voxels: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    drive = slow(0.8, 100, n_voxels, rng)
    Y = 4 + drive + slow(0.4, 100, n_voxels, rng)
    return Y, drive - 2, np.repeat([1, 0, 2], [43, 50, 7]), drive + 0.5 * slow(0.8, 100, n_voxels, rng)


def by_moving_rows(
    Y: np.ndarray, models: list[np.ndarray], story_of_row: np.ndarray, n_resamples: int, seed: int
) -> np.ndarray:
    """Copy the rows of every block as often as it is drawn, and correlate with NumPy."""
    rng, blocks, draws = generator(seed, "time interval"), [], []
    for story in (0, 1, 2):
        rows = np.flatnonzero(story_of_row == story)
        n = -(-len(rows) // 10)
        blocks += [rows[start : start + 10] for start in range(0, len(rows), 10)]
        draws.append(np.vstack([np.ones((1, n)), rng.multinomial(n, [1 / n] * n, size=n_resamples)]))
    means = []
    for counts in np.hstack(draws):
        rows = np.concatenate([np.tile(block, int(count)) for block, count in zip(blocks, counts, strict=True)])
        cc = [[np.corrcoef(Y[rows, v], model[rows, v])[0, 1] for v in range(Y.shape[1])] for model in models]
        means.append(np.mean(cc[0]) - (np.mean(cc[1]) if len(cc) == 2 else 0))
    return np.array(means)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_models", [1, 2])
def test_interval_equals_copying_rows_and_correlating_again(n_models: int, dtype: type[np.floating]) -> None:
    Y, a, story_of_row, b = (part.astype(dtype) if part.ndim == 2 else part for part in example())
    expected = by_moving_rows(Y, [a, b][:n_models], story_of_row, 120, seed=4)
    interval = time_interval(Y, a, story_of_row, b if n_models == 2 else None, n_resamples=120, seed=4)
    low, high = np.quantile(expected[1:], [0.025, 0.975])
    np.testing.assert_allclose(interval[:3], [expected[0], low, high], rtol=1e-6 if dtype == np.float32 else 1e-10)
    assert (interval.level, interval.n, interval.unit) == (0.95, 5 + 5 + 1, TIME)
    assert interval.low < interval.estimate < interval.high


def test_units_and_the_size_of_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Y, a, story_of_row, b = example()
    expected = time_interval(Y, a, story_of_row, b, n_resamples=100)
    interval = time_interval(1e3 * Y - 1e4, 1e-6 * a + 3, story_of_row, 1e4 + b, n_resamples=100)
    np.testing.assert_allclose(interval[:3], expected[:3], rtol=1e-6)
    monkeypatch.setattr(block_bootstrap, "WORK_BYTES", 1)
    np.testing.assert_allclose(time_interval(Y, a, story_of_row, b, n_resamples=100)[:3], expected[:3], rtol=1e-12)


def test_unusable_voxels_are_left_out_and_a_constant_prediction_scores_0() -> None:
    Y, a, story_of_row, _ = example()
    expected = time_interval(Y[:, 3:], a[:, 3:], story_of_row, n_resamples=100)
    Y[:, 0], Y[4, 1], a[4, 2] = 0.1, np.nan, np.inf
    np.testing.assert_allclose(time_interval(Y, a, story_of_row, n_resamples=100)[:3], expected[:3], rtol=1e-12)
    flat = np.full_like(a, 0.1)
    assert time_interval(Y[:, 3:], flat[:, 3:], story_of_row, n_resamples=100)[:3] == (0, 0, 0)
    against_flat = time_interval(Y[:, 3:], a[:, 3:], story_of_row, flat[:, 3:], n_resamples=100)
    np.testing.assert_allclose(against_flat[:3], expected[:3], rtol=1e-12)


def test_one_block_a_story_gives_no_interval() -> None:
    Y, a, _, _ = example()
    interval = time_interval(Y[:16], a[:16], np.repeat([0, 1], 8))
    assert interval.estimate == pytest.approx(np.mean([np.corrcoef(Y[:16, v], a[:16, v])[0, 1] for v in range(6)]))
    assert np.isnan([interval.low, interval.high]).all() and interval.n == 2


def test_shapes_that_disagree_and_no_voxel_left_are_refused() -> None:
    Y, a, story_of_row, b = example()
    with pytest.raises(ValueError, match=r"\(100, 6\) and predictions \(100, 5\)"):
        time_interval(Y, b[:, 1:], story_of_row)
    with pytest.raises(ValueError, match="rows disagree"):
        time_interval(Y, a, story_of_row[1:])
    with pytest.raises(ValueError, match="no voxel"):
        time_interval(np.ones_like(Y), a, story_of_row)


def test_coverage_over_time_is_as_stated() -> None:
    """The truth is a closed form: the CC of a signal with half of it plus noise; words differ in every sample."""
    rng, hits = np.random.default_rng(7), []
    story_of_row, truth = np.repeat([0, 1, 2], 200), 0.5 / math.sqrt(0.25 + 1)
    for sample in range(300):
        signal = slow(0.5, 600, 1, rng)
        Y = 0.5 * signal + slow(0.4, 600, 5, rng)
        interval = time_interval(Y, np.repeat(signal, 5, axis=1), story_of_row, n_resamples=200, seed=sample)
        hits.append(interval.low <= truth <= interval.high)
    assert 0.88 <= np.mean(hits) <= 0.98


def test_joined_panels_equal_one_call() -> None:
    Y, a, story_of_row, _ = example()
    Y[:, 0] = 3.0  # a panel of its own, without any voxel to use
    all_voxels = time_replicates(Y, a, story_of_row, n_resamples=100, seed=4)
    panels = [slice(0, 1), slice(1, 4), slice(4, 6)]
    joined = join_replicates(
        [time_replicates(Y[:, part], a[:, part], story_of_row, n_resamples=100, seed=4) for part in panels]
    )
    np.testing.assert_allclose(joined.total, all_voxels.total, rtol=1e-12)
    np.testing.assert_array_equal(joined.used, [False, True, True, True, True, True])
    assert (joined.n_voxels, joined.n_blocks, joined.draws) == (5, 11, all_voxels.draws)
    expected, interval = replicates_interval(all_voxels), replicates_interval(joined)
    np.testing.assert_allclose(interval[:3], expected[:3], rtol=1e-12)
    assert interval[3:] == expected[3:] == (0.95, 11, TIME)


def test_models_with_cc_in_different_voxels_are_refused() -> None:
    Y, a, story_of_row, b = example()
    a[3, 0], b[5, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="a in 5 of 6, b in 5 of 6"):
        time_interval(Y, a, story_of_row, b)


def test_the_mean_over_subjects_counts_each_once() -> None:
    Y, a, story_of_row, b = example()
    small, large = (slice(0, 2), slice(2, 6))
    of_a, of_b = (
        [
            time_replicates(Y[:, columns], p[:, columns], story_of_row, n_resamples=100, seed=4)
            for columns in (small, large)
        ]
        for p in (a, b)
    )
    mean = mean_replicates(of_a)
    loops = [by_moving_rows(Y[:, columns], [a[:, columns]], story_of_row, 100, seed=4) for columns in (small, large)]
    np.testing.assert_allclose(mean.mean, (loops[0] + loops[1]) / 2, rtol=1e-10)
    both = [
        by_moving_rows(Y[:, columns], [a[:, columns], b[:, columns]], story_of_row, 100, seed=4)
        for columns in (small, large)
    ]
    low_high = np.quantile((both[0] + both[1])[1:] / 2, [0.025, 0.975])
    np.testing.assert_allclose(difference_interval(mean, mean_replicates(of_b))[1:3], low_high, rtol=1e-10)


def test_replicates_of_other_rows_or_draws_are_refused() -> None:
    Y, a, story_of_row, _ = example()
    first = time_replicates(Y, a, story_of_row, n_resamples=20)
    others = [
        time_replicates(Y, a, story_of_row, n_resamples=20, seed=1),
        time_replicates(Y, a, story_of_row, n_resamples=21),
        time_replicates(Y, a, np.roll(story_of_row, 1), n_resamples=20),
        time_replicates(Y[:-1], a[:-1], story_of_row[:-1], n_resamples=20),
    ]
    for other in others:
        with pytest.raises(ValueError, match="differ in rows or draws"):
            join_replicates([first, other])
        with pytest.raises(ValueError, match="differ in rows or draws"):
            difference_interval(first, other)
    with pytest.raises(ValueError, match=r"\[20, 21\] resamples"):
        mean_replicates([first, others[1]])
    for combine in (join_replicates, mean_replicates):
        with pytest.raises(ValueError, match="no replicates"):
            combine([])
