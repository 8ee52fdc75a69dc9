"""Intervals over stories, against SciPy and known truth."""

import numpy as np
import pytest
from scipy import stats

from bert_encoding.statistics.story_intervals import LEVEL, STORIES, paired_difference, story_interval


def test_differences_are_paired_by_story_name() -> None:
    rng = np.random.default_rng(0)
    a = {name: rng.random(5).astype(np.float32) for name in ("x", "y", "z")}
    b = {name: rng.random(5).astype(np.float32) for name in ("z", "x", "y")}  # in another order
    a["y"][1] = b["z"][2] = np.nan
    expected = [[float(a[story][v]) - float(b[story][v]) for v in range(5)] for story in "xyz"]
    np.testing.assert_array_equal(paired_difference(a, b), expected)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"x": 2, "y": 2}, {"x": 2, "w": 2}, "only one model has: w, y"),
        ({"x": 2}, {"x": 3}, "2 voxels, model b 3"),
        ({}, {}, "no stories"),
    ],
)
def test_models_with_different_stories_or_voxels_are_refused(
    a: dict[str, int], b: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(*({name: np.ones(n) for name, n in sizes.items()} for sizes in (a, b)))


def test_interval_equals_scipys_t_interval() -> None:
    values = np.random.default_rng(1).normal(0.05, 0.02, 7)
    interval = story_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], rtol=1e-12)
    assert interval.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert (interval.level, interval.n, interval.unit) == (LEVEL, 7, STORIES)


def test_voxels_are_averaged_inside_a_story_first() -> None:
    table = np.random.default_rng(4).random((6, 30))
    table[2, 5:] = np.nan
    assert story_interval(table) == story_interval(np.array([np.nanmean(row) for row in table]))


def test_one_story_has_a_mean_and_no_interval() -> None:
    interval = story_interval(np.array([0.3]))
    assert interval.estimate == 0.3 and np.isnan([interval.low, interval.high]).all() and interval.n == 1


@pytest.mark.parametrize("values", [np.array([]), np.array([0.1, np.nan]), np.array([[0.1, 0.2], [np.nan, np.nan]])])
def test_a_story_without_a_value_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"no value|no stories"):
        story_interval(values)


@pytest.mark.parametrize("n", [5, 20])
def test_coverage_over_stories_is_as_stated(n: int) -> None:
    rng = np.random.default_rng(5)
    intervals = [story_interval(rng.normal(0.1, 0.03, n)) for _ in range(800)]
    assert 0.93 <= np.mean([interval.low <= 0.1 <= interval.high for interval in intervals]) <= 0.97
