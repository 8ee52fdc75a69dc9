"""Word vectors to features, against the Huth lab's code, SciPy and plain loops."""

import math

import numpy as np
import pytest
from ridge_utils.interpdata import lanczosinterp2D
from ridge_utils.util import make_delayed
from scipy.stats import zscore

from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.story import TRIMS, Story, Trim
from bert_encoding.features.downsampling import delay, lanczos_downsample, story_features


def clock(n_trs: int, tr_s: float = 2.0) -> np.ndarray:
    """TR times that start before the story, as the scanner's do."""
    return np.arange(n_trs) * tr_s - 9.0


def word_times(rng: np.random.Generator, tr_times_s: np.ndarray, n_words: int) -> np.ndarray:
    """Irregular times beyond both ends of the scan, with two words at one time and one exactly at a TR."""
    times = rng.uniform(tr_times_s[0] - 8, tr_times_s[-1] + 8, n_words)
    times[:3] = tr_times_s[7], times[4], tr_times_s[2]
    return np.sort(times)


def make_story(times_s: np.ndarray, tr_times_s: np.ndarray, name: str = "alpha") -> Story:
    return Story(name, ("word",) * len(times_s), times_s, tr_times_s, {})


def published_downsample(vectors: np.ndarray, times_s: np.ndarray, tr_times_s: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # ridge_utils divides 0 by 0 at a word exactly at a TR, then mends it
        return lanczosinterp2D(vectors, times_s, tr_times_s, window=3)


@pytest.mark.parametrize("tr_s", [2.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_lanczos_equals_the_huth_labs_code(seed: int, tr_s: float) -> None:
    rng = np.random.default_rng(seed)
    tr_times_s = clock(40, tr_s)
    times_s = word_times(rng, tr_times_s, 170)
    vectors = rng.standard_normal((170, 6))
    expected = published_downsample(vectors, times_s, tr_times_s)
    np.testing.assert_allclose(lanczos_downsample(vectors, times_s, tr_times_s), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("delays", [(1, 2, 3, 4), (0,), (0, 3), (4, 1), (0, 1, 2, 5, 9)])
def test_delay_equals_the_huth_labs_code(delays: tuple[int, ...], dtype: type[np.floating]) -> None:
    X = np.random.default_rng(5).standard_normal((12, 3)).astype(dtype)
    np.testing.assert_array_equal(delay(X, delays), make_delayed(X, delays))


def test_a_negative_delay_is_refused_by_its_value() -> None:
    with pytest.raises(ValueError, match="delay -2"):
        delay(np.zeros((5, 1)), [1, -2])


@pytest.mark.parametrize("trs", [5, 6, 8, 9, 10, 30])
def test_a_delay_as_long_as_the_story_or_longer_gives_zeros(trs: int) -> None:
    np.testing.assert_array_equal(delay(np.ones((5, 2)), [trs]), np.zeros((5, 2)))


@pytest.mark.parametrize("trim", [*TRIMS.values(), Trim(0, 0)])
@pytest.mark.parametrize("delays", [(1, 2, 3, 4), (0, 2)])
def test_story_features_equal_the_published_pipeline(trim: Trim, delays: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    tr_times_s = clock(40)
    times_s = word_times(rng, tr_times_s, 150)
    vectors = rng.standard_normal((150, 5)).astype(np.float32)
    untrimmed = make_delayed(published_downsample(vectors, times_s, tr_times_s), delays)
    expected = untrimmed[trim.start_trs : 40 - trim.end_trs]
    for array in (vectors, times_s, tr_times_s):
        array.setflags(write=False)  # the input is not modified
    features = story_features(vectors, make_story(times_s, tr_times_s), delays, trim)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-6)


def test_the_trims_are_10_and_5_published_and_5_and_10_in_the_course() -> None:
    volumes = np.arange(40)
    np.testing.assert_array_equal(volumes[TRIMS["published"].rows(40)], volumes[10:-5])
    np.testing.assert_array_equal(volumes[TRIMS["course"].rows(40)], volumes[5:-10])


@pytest.mark.parametrize("n_vectors", [9, 11])
def test_one_vector_a_word_or_an_error_that_names_the_story(n_vectors: int) -> None:
    story = make_story(np.arange(10.0), clock(30), "gamma")
    with pytest.raises(ValueError, match=rf"story gamma: {n_vectors} vectors for 10 words"):
        story_features(np.ones((n_vectors, 2)), story, (1,), TRIMS["published"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_zscore_equals_scipys(dtype: type[np.floating], offset: float) -> None:
    rng = np.random.default_rng(12)
    X = (offset + rng.standard_normal((200, 7)) * np.logspace(-1, 2, 7)).astype(dtype)
    X.setflags(write=False)  # the input is not modified
    scores = ZScore.learn(X).apply(X)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, zscore(X.astype(np.float64), axis=0, ddof=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4 + 0.1])  # in float64, the mean of many of these is rounded
def test_a_constant_column_becomes_0_and_leaves_the_others_alone(value: float, dtype: type[np.floating]) -> None:
    X = np.random.default_rng(14).standard_normal((301, 3)).astype(dtype)
    X[:, 1] = value
    scores = ZScore.learn(X).apply(X)
    np.testing.assert_allclose(scores[:, 1], np.zeros(301), rtol=0, atol=1e-9)
    np.testing.assert_allclose(scores[:, [0, 2]], zscore(X[:, [0, 2]].astype(np.float64), axis=0), rtol=0, atol=2e-6)


def test_zscore_applies_what_it_learnt_to_other_rows() -> None:
    rng = np.random.default_rng(13)
    fitted, applied = rng.standard_normal((50, 3)), 5 + 9 * rng.standard_normal((20, 3))
    expected = np.empty((20, 3))
    for column in range(3):
        values = fitted[:, column].tolist()
        mean = math.fsum(values) / 50
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / 50)
        expected[:, column] = [(value - mean) / std for value in applied[:, column]]
    np.testing.assert_allclose(ZScore.learn(fitted).apply(applied), expected, rtol=1e-5)
