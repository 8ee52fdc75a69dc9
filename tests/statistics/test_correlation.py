"""CC and its summaries, against SciPy, the statistics module and plain loops."""

import math
import statistics

import numpy as np
import pytest
from scipy.stats import pearsonr

from bert_encoding.statistics.correlation import correlate, summarise


def pearson_columns(Y: np.ndarray, Y_predicted: np.ndarray) -> np.ndarray:
    """SciPy's correlation, one column at a time, in float64."""
    Y, Y_predicted = Y.astype(np.float64), Y_predicted.astype(np.float64)
    return np.array([pearsonr(Y[:, v], Y_predicted[:, v]).statistic for v in range(Y.shape[1])])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_correlate_equals_scipys_pearsonr(dtype: type[np.floating], offset: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    Y = rng.standard_normal((120, 9))
    Y_predicted = np.linspace(-1, 1, 9) * Y + rng.standard_normal((120, 9))
    Y, Y_predicted = (offset + Y).astype(dtype), (offset + scale * Y_predicted).astype(dtype)
    expected = pearson_columns(Y, Y_predicted)
    Y.setflags(write=False), Y_predicted.setflags(write=False)  # the input is not modified
    np.testing.assert_allclose(correlate(Y, Y_predicted), expected, rtol=0, atol=2e-7)


def test_tiny_predictions_score_by_their_shape_not_their_size() -> None:
    """A large penalty shrinks predictions towards 0 without making them constant."""
    rng = np.random.default_rng(1)
    Y, Y_predicted = rng.standard_normal((80, 4)), 1e-8 * rng.standard_normal((80, 4))
    expected = pearson_columns(Y, 1e8 * Y_predicted)
    np.testing.assert_allclose(correlate(Y, Y_predicted), expected, rtol=0, atol=2e-7)


def test_a_perfect_prediction_scores_1_and_its_opposite_minus_1() -> None:
    Y = np.random.default_rng(2).standard_normal((50, 200)).astype(np.float32)
    np.testing.assert_array_equal(correlate(Y, Y), np.ones(200, np.float32))
    np.testing.assert_allclose(correlate(Y, 3 - 0.1 * Y), -np.ones(200), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])  # in float64, the mean of many 0.1 is rounded
def test_a_constant_prediction_scores_0_and_a_constant_response_has_no_cc(
    value: float, dtype: type[np.floating]
) -> None:
    rng = np.random.default_rng(4)
    Y, Y_predicted = rng.standard_normal((301, 5)).astype(dtype), rng.standard_normal((301, 5)).astype(dtype)
    Y[:, [1, 3]] = value
    Y_predicted[:, [3, 4]] = value
    expected = pearson_columns(Y[:, [0, 2]], Y_predicted[:, [0, 2]])
    cc = correlate(Y, Y_predicted)
    assert np.isnan(cc[[1, 3]]).all() and cc[4] == 0
    np.testing.assert_allclose(cc[[0, 2]], expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(10, 2), (9, 3), (10, 1), (1, 3)])
def test_unequal_shapes_are_refused_with_both_named(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\(10, 3\).*\({shape[0]}, {shape[1]}\)"):
        correlate(np.ones((10, 3)), np.ones(shape))


@pytest.mark.parametrize(
    ("n_voxels", "n_top1", "n_top5"), [(1, 1, 1), (3, 1, 1), (40, 1, 2), (160, 2, 8), (1000, 10, 50)]
)
def test_summarise_equals_plain_python(n_voxels: int, n_top1: int, n_top5: int) -> None:
    rng = np.random.default_rng(n_voxels)
    cc = (0.1 + 0.3 * rng.standard_normal(n_voxels)).clip(-1, 1).astype(np.float32)
    cc.setflags(write=False)  # the input is not modified
    values = sorted((float(value) for value in cc), reverse=True)
    expected = {
        "cc_mean": math.fsum(values) / n_voxels,
        "cc_median": statistics.median(values),
        "cc_top1": math.fsum(values[:n_top1]) / n_top1,
        "cc_top5": math.fsum(values[:n_top5]) / n_top5,
        "share_above_0": sum(value > 0 for value in values) / n_voxels,
    }
    assert summarise(cc) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_cc_of_exactly_0_is_not_above_0() -> None:
    assert summarise(np.array([0.0, 0.0, 0.5, -0.5], np.float32))["share_above_0"] == 0.25
