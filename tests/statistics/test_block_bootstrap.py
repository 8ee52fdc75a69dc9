"""Intervals over stories and over time, against plain loops with the same draws, SciPy, and known truth."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from bert_encoding.core.seeds import generator
from bert_encoding.statistics import block_bootstrap as time_intervals
from bert_encoding.statistics.block_bootstrap import (
    Replicates,
    difference_interval,
    join_replicates,
    mean_replicates,
    replicates_interval,
    time_interval,
    time_replicates,
)
from bert_encoding.statistics.story_intervals import STORIES, STORY_METHODS, TIME, paired_difference, story_interval

# --- paired differences -----------------------------------------------------------------------------------------------


def test_differences_are_paired_by_story_name() -> None:
    rng = np.random.default_rng(0)
    a = {name: rng.random(5).astype(np.float32) for name in ("x", "y", "z")}
    b = {name: rng.random(5).astype(np.float32) for name in ("z", "x", "y")}  # in another order
    a["y"][1] = b["z"][1] = np.nan
    a["x"][2] = a["y"][2] = b["z"][2] = np.nan
    found = paired_difference(a, b)
    assert found.stories == ("x", "y", "z")
    expected = [[float(a[s][v]) - float(b[s][v]) for v in range(5)] for s in "xyz"]
    np.testing.assert_array_equal(found.difference, expected)
    np.testing.assert_array_equal(found.n_stories, [3, 1, 0, 3, 3])
    np.testing.assert_allclose(found.mean[[0, 3, 4]], np.mean(expected, axis=0)[[0, 3, 4]], rtol=1e-12)
    np.testing.assert_array_equal(found.mean[1:3], [expected[0][1], np.nan])


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="only one model has: w, y"):
        paired_difference({"x": np.ones(2), "y": np.ones(2)}, {"x": np.ones(2), "w": np.ones(2)})
    with pytest.raises(ValueError, match="2 voxels, model b 3"):
        paired_difference({"x": np.ones(2)}, {"x": np.ones(3)})
    with pytest.raises(ValueError, match="no stories"):
        paired_difference({}, {})


# --- over stories -----------------------------------------------------------------------------------------------------


def test_the_t_interval_is_scipys() -> None:
    values = np.random.default_rng(1).normal(0.05, 0.02, 7)
    found = story_interval(values, level=0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=1e-12)
    assert found.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert (found.level, found.n, found.unit) == (0.9, 7, STORIES)


def test_the_bootstrap_equals_a_plain_loop_with_the_same_draws_and_scipys() -> None:
    values = np.random.default_rng(2).normal(0.05, 0.02, 8)
    found = story_interval(values, "bootstrap", n_resamples=999, seed=3)
    drawn = generator(3, "story interval").integers(8, size=(999, 8))
    means = sorted(sum(float(values[i]) for i in row) / 8 for row in drawn)
    expected = [  # 0.025 x 998 = 24.95
        means[24] + 0.95 * (means[25] - means[24]),
        means[973] + 0.05 * (means[974] - means[973]),
    ]
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-10)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    np.testing.assert_allclose([found.low, found.high], [theirs.low, theirs.high], rtol=0, atol=0.002)


@pytest.mark.parametrize("method", STORY_METHODS)
def test_voxels_are_averaged_inside_a_story_first(method: str) -> None:
    table = np.random.default_rng(4).random((6, 30))
    table[2, 5:] = np.nan
    assert story_interval(table, method) == story_interval(np.array([np.nanmean(row) for row in table]), method)


@pytest.mark.parametrize("method", STORY_METHODS)
def test_one_story_has_a_mean_and_no_interval(method: str) -> None:
    found = story_interval(np.array([0.3]), method)
    assert found.estimate == 0.3 and np.isnan([found.low, found.high]).all() and found.n == 1


@pytest.mark.parametrize("values", [np.array([]), np.array([0.1, np.nan]), np.array([[0.1, 0.2], [np.nan, np.nan]])])
def test_a_story_without_a_value_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"no value|no stories"):
        story_interval(values)


@pytest.mark.parametrize(("method", "n", "low", "high"), [("t", 5, 0.93, 0.97), ("t", 20, 0.93, 0.97)])
def test_coverage_over_stories_is_as_stated(method: str, n: int, low: float, high: float) -> None:
    assert low <= _story_coverage(method, n) <= high


def test_the_bootstrap_is_near_its_level_at_20_stories_and_too_narrow_at_5() -> None:
    assert 0.90 <= _story_coverage("bootstrap", 20) <= 0.96
    assert 0.79 <= _story_coverage("bootstrap", 5) <= 0.88


def _story_coverage(method: str, n: int, n_samples: int = 800) -> float:
    rng = np.random.default_rng(5)
    found = [story_interval(rng.normal(0.1, 0.03, n), method, n_resamples=400, seed=at) for at in range(n_samples)]
    return float(np.mean([interval.low <= 0.1 <= interval.high for interval in found]))


# --- over time inside stories -----------------------------------------------------------------------------------------


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
    """Copy the rows of every block as often as it is drawn, and ask NumPy for the correlation."""
    blocks = []
    for story in (0, 1, 2):
        rows = np.flatnonzero(story_of_row == story)
        blocks += [(story, rows[start : start + 10]) for start in range(0, len(rows), 10)]
    draws = time_intervals._draws(
        np.array([story for story, _ in blocks]), n_resamples, generator(seed, "time interval")
    )
    means = []
    for counts in draws:
        rows = np.concatenate([np.tile(block, int(count)) for (_, block), count in zip(blocks, counts, strict=True)])
        cc = [[np.corrcoef(Y[rows, v], model[rows, v])[0, 1] for v in range(Y.shape[1])] for model in models]
        means.append(np.mean(cc[0]) - (np.mean(cc[1]) if len(cc) == 2 else 0))
    assert (draws @ [story == 1 for story, _ in blocks] == 5).all()  # each story keeps its number of blocks
    return np.array(means)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_models", [1, 2])
def test_equals_copying_the_rows_and_correlating_anew(n_models: int, dtype: type[np.floating]) -> None:
    Y, a, story_of_row, b = (part.astype(dtype) if part.ndim == 2 else part for part in example())
    expected = by_moving_rows(Y, [a, b][:n_models], story_of_row, 120, seed=4)
    found = time_interval(Y, a, story_of_row, b if n_models == 2 else None, n_resamples=120, seed=4, level=0.9)
    low, high = np.quantile(expected[1:], [0.05, 0.95])
    np.testing.assert_allclose(found[:3], [expected[0], low, high], rtol=1e-6 if dtype == np.float32 else 1e-10)
    assert (found.level, found.n, found.unit) == (0.9, 5 + 5 + 1, TIME)
    assert found.low < found.estimate < found.high


def test_the_size_of_panels_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Y, a, story_of_row, b = example()
    whole = time_interval(Y, a, story_of_row, b, n_resamples=100)
    monkeypatch.setattr(time_intervals, "WORK_BYTES", 1)
    np.testing.assert_allclose(time_interval(Y, a, story_of_row, b, n_resamples=100)[:3], whole[:3], rtol=1e-12)


def test_offsets_and_units_change_nothing() -> None:
    Y, a, story_of_row, b = example()
    expected = time_interval(Y, a, story_of_row, b, n_resamples=100)
    found = time_interval(1e3 * Y - 1e4, 1e-6 * a + 3, story_of_row, 1e4 + b, n_resamples=100)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-6)


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
    found = time_interval(Y[:16], a[:16], np.repeat([0, 1], 8))
    assert found.estimate == pytest.approx(np.mean([np.corrcoef(Y[:16, v], a[:16, v])[0, 1] for v in range(6)]))
    assert np.isnan([found.low, found.high]).all() and found.n == 2


def test_shapes_that_disagree_and_no_voxel_left_are_refused() -> None:
    Y, a, story_of_row, b = example()
    with pytest.raises(ValueError, match=r"\(100, 6\) and predictions \(100, 5\)"):
        time_interval(Y, a, story_of_row, b[:, 1:])
    with pytest.raises(ValueError, match="rows disagree"):
        time_interval(Y, a, story_of_row[1:])
    with pytest.raises(ValueError, match="no voxel"):
        time_interval(np.ones_like(Y), a, story_of_row)


def test_coverage_over_time_is_as_stated() -> None:
    """The truth is a closed form: the CC of a signal with half of it plus noise; words are drawn anew each time."""
    rng, hits = np.random.default_rng(7), []
    story_of_row, truth = np.repeat([0, 1, 2], 200), 0.5 / math.sqrt(0.25 + 1)
    for at in range(300):
        signal = slow(0.5, 600, 1, rng)
        Y = 0.5 * signal + slow(0.4, 600, 5, rng)
        found = time_interval(Y, np.repeat(signal, 5, axis=1), story_of_row, n_resamples=200, seed=at)
        hits.append(found.low <= truth <= found.high)
    assert 0.88 <= np.mean(hits) <= 0.98


def test_a_better_model_is_told_from_its_copy_with_noise() -> None:
    Y, a, story_of_row, b = example()
    assert time_interval(Y, a, story_of_row, b).low > 0
    same = time_interval(Y, a, story_of_row, a)
    assert same[:3] == (0, 0, 0)


# --- replicates -------------------------------------------------------------------------------------------------------


def panel_by_panel(Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray, seed: int = 4) -> Replicates:
    panels = [slice(0, 1), slice(1, 4), slice(4, 6)]
    return join_replicates(
        [time_replicates(Y[:, at], predicted[:, at], story_of_row, n_resamples=100, seed=seed) for at in panels]
    )


def test_replicates_are_the_means_of_moved_rows() -> None:
    Y, a, story_of_row, _ = example()
    found = time_replicates(Y, a, story_of_row, n_resamples=100, seed=4)
    np.testing.assert_allclose(found.mean, by_moving_rows(Y, [a], story_of_row, 100, seed=4), rtol=1e-10)
    np.testing.assert_allclose(found.total, 6 * found.mean, rtol=1e-12)


def test_joined_panels_equal_one_call() -> None:
    Y, a, story_of_row, _ = example()
    Y[:, 0] = 3.0  # a panel of its own, without any voxel to use
    whole = time_replicates(Y, a, story_of_row, n_resamples=100, seed=4)
    joined = panel_by_panel(Y, a, story_of_row)
    np.testing.assert_allclose(joined.total, whole.total, rtol=1e-12)
    np.testing.assert_array_equal(joined.used, [False, True, True, True, True, True])
    assert (joined.n_voxels, joined.n_blocks, joined.draws) == (5, 11, whole.draws)
    expected = time_interval(Y, a, story_of_row, n_resamples=100, seed=4, level=0.9)
    found = replicates_interval(joined, level=0.9)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-12)
    assert found[3:] == expected[3:] == (0.9, 11, TIME)


def test_the_difference_of_two_models_panels_is_that_of_moved_rows() -> None:
    Y, a, story_of_row, b = example()
    found = difference_interval(panel_by_panel(Y, a, story_of_row), panel_by_panel(Y, b, story_of_row), level=0.9)
    expected = by_moving_rows(Y, [a, b], story_of_row, 100, seed=4)
    np.testing.assert_allclose(found[:3], [expected[0], *np.quantile(expected[1:], [0.05, 0.95])], rtol=1e-10)
    at_once = time_interval(Y, a, story_of_row, b, n_resamples=100, seed=4, level=0.9)
    np.testing.assert_allclose(found[:3], at_once[:3], rtol=1e-11)


def test_a_voxel_that_one_model_lacks_is_left_out_of_their_difference() -> None:
    Y, a, story_of_row, b = example()
    expected = time_interval(Y[:, 2:], a[:, 2:], story_of_row, b[:, 2:], n_resamples=100)
    a[3, 0], b[5, 1] = np.nan, np.inf
    np.testing.assert_allclose(time_interval(Y, a, story_of_row, b, n_resamples=100)[:3], expected[:3], rtol=1e-12)
    with pytest.raises(ValueError, match="model a has a CC in 5 of 6 voxels, model b in 5 of 6, not the same"):
        difference_interval(time_replicates(Y, a, story_of_row), time_replicates(Y, b, story_of_row))


def test_the_mean_over_subjects_counts_each_once() -> None:
    Y, a, story_of_row, b = example()
    small, large = (slice(0, 2), slice(2, 6))
    of_a, of_b = (
        [time_replicates(Y[:, at], p[:, at], story_of_row, n_resamples=100, seed=4) for at in (small, large)]
        for p in (a, b)
    )
    found = mean_replicates(of_a)
    loops = [by_moving_rows(Y[:, at], [a[:, at]], story_of_row, 100, seed=4) for at in (small, large)]
    np.testing.assert_allclose(found.mean, (loops[0] + loops[1]) / 2, rtol=1e-10)
    both = [by_moving_rows(Y[:, at], [a[:, at], b[:, at]], story_of_row, 100, seed=4) for at in (small, large)]
    low_high = np.quantile((both[0] + both[1])[1:] / 2, [0.025, 0.975])
    np.testing.assert_allclose(difference_interval(found, mean_replicates(of_b))[1:3], low_high, rtol=1e-10)


def test_replicates_that_are_no_pairs_are_refused() -> None:
    Y, a, story_of_row, _ = example()
    one = time_replicates(Y, a, story_of_row, n_resamples=20)
    others = [
        time_replicates(Y, a, story_of_row, n_resamples=20, seed=1),
        time_replicates(Y, a, story_of_row, n_resamples=20, block_trs=9),
        time_replicates(Y, a, story_of_row, n_resamples=21),
        time_replicates(Y, a, np.roll(story_of_row, 1), n_resamples=20),
        time_replicates(Y[:-1], a[:-1], story_of_row[:-1], n_resamples=20),
    ]
    for other in others:
        with pytest.raises(ValueError, match="other rows or other draws"):
            join_replicates([one, other])
        with pytest.raises(ValueError, match="other rows or other draws"):
            difference_interval(one, other)
    with pytest.raises(ValueError, match=r"\[20, 21\] resamples"):
        mean_replicates([one, others[2]])
    for combine in (join_replicates, mean_replicates):
        with pytest.raises(ValueError, match="no replicates"):
            combine([])
