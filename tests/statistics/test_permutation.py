"""The block permutation test and the false discovery rate, against plain loops, SciPy and simulated truth."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.signal import lfilter
from scipy.stats import binom
from scipy.stats import t as student

from bert_encoding.core.seeds import generator
from bert_encoding.statistics import permutation
from bert_encoding.statistics.permutation import benjamini_hochberg, block_permutation_p, count_orders

N_SILENT = 2500


def autocorrelated(lag_1: float, n_rows: int, n_voxels: int, seed: int) -> np.ndarray:
    """Return columns of AR(1) noise."""
    white = np.random.default_rng(seed).standard_normal((n_rows + 60, n_voxels))
    return lfilter([1], [1, -lag_1], white, axis=0)[60:]


def stories(*n_rows: int) -> np.ndarray:
    return np.repeat(np.arange(len(n_rows)), n_rows)


def blocks_of(story_of_row: np.ndarray, block_trs: int) -> list[np.ndarray]:
    """Return the rows of the whole blocks of each story, (n_blocks, block_trs)."""
    stories = [np.flatnonzero(story_of_row == label) for label in sorted(set(story_of_row))]
    return [rows[: len(rows) // block_trs * block_trs].reshape(-1, block_trs) for rows in stories]


def by_moving_rows(
    Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray, n_permutations: int, block_trs: int, seed: int
) -> np.ndarray:
    """Move rows with the same permutations, correlate each time with NumPy, and inflate the result."""
    blocks, rng = blocks_of(story_of_row, block_trs), generator(seed, "block permutation")
    orders = [rng.permuted(np.tile(np.arange(len(rows)), (n_permutations, 1)), axis=1) for rows in blocks]
    cc = np.zeros((1 + n_permutations, Y.shape[1]))
    for index in range(1 + n_permutations):
        moved = np.arange(len(Y))
        for rows, order in zip(blocks, orders, strict=True):
            moved[rows] = rows[order[index - 1]] if index else rows
        cc[index] = [np.corrcoef(Y[:, v], predicted[moved, v])[0, 1] for v in range(Y.shape[1])]
        np.testing.assert_array_equal(story_of_row[moved], story_of_row)
    mean = cc[1:].mean(axis=0)
    widened = mean + np.sqrt(inflation_by_pairs(Y, predicted, blocks)) * (cc[1:] - mean)
    counted = (1 + (widened >= cc[0] - 1e-12).sum(axis=0)) / (1 + n_permutations)
    freedom = sum(len(rows) - 1 for rows in blocks)
    return np.array(
        [
            p if p > 10.5 / (1 + n_permutations) else max(1e-7, tail_by_hand(cc[0, v], widened[:, v], freedom))
            for v, p in enumerate(counted)
        ]
    )


def tail_by_hand(observed: float, permuted: np.ndarray, freedom: int) -> float:
    """The formula in words for one voxel: areas of the t density to the right of two points."""
    sd = math.sqrt(sum((value - permuted.mean()) ** 2 for value in permuted) / len(permuted))
    tenth = sorted(permuted, reverse=True)[9]

    def area(value: float) -> float:
        return quad(lambda x: student.pdf(x, freedom), (value - permuted.mean()) / sd, np.inf, epsabs=0, epsrel=1e-11)[
            0
        ]

    return 11 / (1 + len(permuted)) * area(observed) / area(tenth)


def inflation_by_pairs(Y: np.ndarray, predicted: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """Go through all pairs of rows of a story: once for the autocovariances, once to sum their products."""
    y, p = (values - values.mean(axis=0, dtype=np.float64) for values in (Y, predicted))
    pairs = [  # lag, both rows, whether one block holds both
        (abs(t - u), rows.flat[t], rows.flat[u], t // rows.shape[1] == u // rows.shape[1])
        for rows in blocks
        if len(rows) > 1
        for t in range(rows.size)
        for u in range(rows.size)
        if abs(t - u) <= permutation.LONGEST_LAG_TRS
    ]
    sums, n = np.zeros((2, len(Y), Y.shape[1])), np.zeros((len(Y), 1))
    for lag, t, u, _ in pairs:
        sums[0, lag] += y[t] * y[u]
        sums[1, lag] += p[t] * p[u]
        n[lag] += 1
    c_y, c_p = sums / np.maximum(n, 1)
    total = sum(c_y[lag] * c_p[lag] for lag, *_ in pairs)
    inside = sum(c_y[lag] * c_p[lag] for lag, _, _, together in pairs if together)
    return np.maximum(1, total / inside)


@pytest.mark.table
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_moving_the_rows_and_correlating_again(seed: int, dtype: type[np.floating]) -> None:
    story_of_row = np.roll(stories(47, 60, 14, 19), 11)  # rows of one story need not be contiguous
    Y = (5 + autocorrelated(0.4, 140, 9, seed=1)).astype(dtype)
    predicted = (autocorrelated(0.8, 140, 9, seed=2) - 3 + np.linspace(0, 0.5, 9) * Y).astype(dtype)
    expected = by_moving_rows(Y, predicted, story_of_row, 150, 10, seed)
    p = block_permutation_p(Y, predicted, story_of_row, n_permutations=150, seed=seed)
    np.testing.assert_allclose(p, expected, rtol=1e-7 if dtype is np.float64 else 1e-4)
    assert p.dtype == np.float64 and p.min() < 0.02 and p.max() > 0.2
    inflation = inflation_by_pairs(Y, predicted, blocks_of(story_of_row, 10))
    assert inflation.min() == 1 and inflation.max() > 1.1  # both sides of the bound are covered


def test_units_panels_and_other_voxels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Y, predicted = autocorrelated(0.4, 150, 20, seed=3), autocorrelated(0.8, 150, 20, seed=4)
    all_voxels = block_permutation_p(Y, predicted, stories(80, 70), n_permutations=200)
    other_units = block_permutation_p(100 + 1e3 * Y, 1e-6 * predicted - 7, stories(80, 70), n_permutations=200)
    np.testing.assert_allclose(other_units, all_voxels, rtol=1e-7)
    monkeypatch.setattr(permutation, "WORK_BYTES", 8 * 3 * 500)
    panels = block_permutation_p(Y, predicted, stories(80, 70), n_permutations=200)
    np.testing.assert_allclose(panels, all_voxels, rtol=1e-10)
    part = block_permutation_p(Y[:, 5:9], predicted[:, 5:9], stories(80, 70), n_permutations=200)
    np.testing.assert_allclose(part, all_voxels[5:9], rtol=1e-10)


def test_one_seed_gives_the_same_p_and_another_does_not() -> None:
    Y, predicted = autocorrelated(0.4, 150, 20, seed=3), autocorrelated(0.8, 150, 20, seed=4)
    first, second, other = (block_permutation_p(Y, predicted, stories(80, 70), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    np.testing.assert_allclose(first, other, rtol=0, atol=0.08)


def test_constant_and_non_finite_voxels() -> None:
    Y, predicted = autocorrelated(0.4, 150, 8, seed=3), autocorrelated(0.8, 150, 8, seed=4)
    usual = block_permutation_p(Y, predicted, stories(80, 70))
    Y[:, 1], predicted[:, 2], Y[3, 4], predicted[3, 5] = 0.1, 0.1, np.nan, np.inf
    Y[:, 6] = predicted[:, 6] = 0.1
    p = block_permutation_p(Y, predicted, stories(80, 70))
    expected = [usual[0], np.nan, 1, usual[3], np.nan, np.nan, np.nan, usual[7]]
    np.testing.assert_allclose(p, expected, rtol=1e-10)


def test_a_perfect_prediction_has_the_smallest_p_possible_and_its_opposite_the_largest() -> None:
    Y = autocorrelated(0.4, 300, 5, seed=6)
    np.testing.assert_allclose(block_permutation_p(Y, Y, stories(150, 150)), 1e-7, rtol=1e-12)
    few = block_permutation_p(Y[:70], Y[:70], stories(70))
    np.testing.assert_array_equal(few >= 1 / math.factorial(7), True)
    counted = block_permutation_p(Y, Y, stories(150, 150), n_permutations=99)  # too few for a tail
    np.testing.assert_allclose(counted, 1 / 100, rtol=1e-12)
    np.testing.assert_allclose(block_permutation_p(Y, -Y, stories(150, 150)), 1, rtol=1e-12)


def test_a_course_that_repeats_in_every_block_ties_with_all_its_permutations() -> None:
    """Equal sums, added up in another order, must count as equal."""
    wave = np.tile(np.random.default_rng(0).standard_normal((10, 4)), (20, 1))
    Y = autocorrelated(0.4, 200, 4, seed=7)
    np.testing.assert_array_equal(block_permutation_p(Y, wave, stories(100, 100)), np.ones(4))


def test_the_observed_order_is_all_that_short_stories_have() -> None:
    story_of_row = stories(19, 9, 60)
    assert count_orders(story_of_row) == math.factorial(6)
    assert count_orders(stories(69, 30, 200)) == math.factorial(6) * math.factorial(3) * math.factorial(20)
    assert count_orders(stories(5)) == 1
    with pytest.raises(ValueError, match="720 orders, fewer than 1000"):
        block_permutation_p(np.zeros((88, 2)), np.zeros((88, 2)), story_of_row)
    alone = block_permutation_p(np.random.default_rng(0).random((5, 2)), np.ones((5, 2)), stories(5), n_permutations=1)
    np.testing.assert_array_equal(alone, [1, 1])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((99, 2), (100, 2), 99), "must|expected"),
        (((99, 2), (99, 2), 98), "rows disagree"),
        (((99,), (99,), 99), "one"),
    ],
)
def test_shapes_that_disagree_are_refused(shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_permutation_p(np.zeros(shapes[0]), np.zeros(shapes[1]), np.zeros(shapes[2], int))


def silent(lag_1: float, n_voxels: int = N_SILENT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return responses, smooth predictions that know nothing of them, and their stories; every voxel has its own noise
    and prediction, so that voxels are independent and the binomial band holds."""
    Y, predicted = autocorrelated(lag_1, 969, n_voxels, seed=8), autocorrelated(0.8, 969, n_voxels, seed=9)
    return Y, predicted, stories(291, 348, 330)


def band(n_voxels: int) -> tuple[float, float]:
    """Return where 99% of the shares of p < 0.05 lie, of independent voxels that pass with probability 0.05."""
    low, high = binom.ppf([0.005, 0.995], n_voxels, 0.05) / n_voxels
    return low, high


@pytest.mark.table
@pytest.mark.parametrize("lag_1", [0.0, 0.4, 0.8])
def test_one_silent_voxel_in_twenty_passes(lag_1: float) -> None:
    p = block_permutation_p(*silent(lag_1))
    low, high = band(N_SILENT)
    assert low <= np.mean(p < 0.05) <= high
    assert abs(p.mean() - 0.5) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("lag_1", "block_trs", "n_voxels"), [(0.4, 1, 600), (0.8, 10, N_SILENT)])
def test_without_inflation_chance_would_pass_for_success(
    lag_1: float, block_trs: int, n_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail: rows that are permuted one by one keep nothing of a slow course, and blocks too little
    of a very slow one."""
    monkeypatch.setattr(permutation, "LONGEST_LAG_TRS", 0)
    monkeypatch.setattr(permutation, "BLOCK_TRS", block_trs)
    p = block_permutation_p(*silent(lag_1, n_voxels), n_permutations=400)
    assert np.mean(p < 0.05) > band(n_voxels)[1]


@pytest.mark.slow
@pytest.mark.parametrize("lag_1", [0.0, 0.4])
def test_far_out_no_more_silent_voxels_pass_than_chance_lets(lag_1: float) -> None:
    """At the upper ends of the 99.5% binomial bands; the lower ends do not bind, as the tail is careful."""
    n_voxels, story_of_row = 16_000, stories(150, 140)
    Y, predicted = autocorrelated(lag_1, 290, n_voxels, seed=12), autocorrelated(0.8, 290, n_voxels, seed=13)
    p = block_permutation_p(Y, predicted, story_of_row)
    for level in (1e-2, 1e-3, 1e-4):
        assert (p < level).sum() <= binom.ppf(0.995, n_voxels, level), level
    assert np.mean(p < 1e-2) > 0.006 and (p < 1 / 1001).any()


def test_the_tail_joins_the_counts_without_a_jump_and_falls() -> None:
    permuted = np.random.default_rng(5).standard_normal((1000, 1)) * 3
    permuted -= permuted.mean()
    tenth = np.sort(permuted[:, 0])[-10]
    observed = np.append(tenth * (1 + 1e-12), tenth + np.linspace(0, 20, 50)[1:])
    p = permutation._tail_p(observed, np.repeat(permuted, 50, axis=1), 90)
    assert p[0] == pytest.approx(11 / 1001, rel=1e-9)
    assert (np.diff(p) < 0).all() and p[-1] > 0
    np.testing.assert_allclose(p[::7], [tail_by_hand(v, permuted[:, 0], 90) for v in observed[::7]], rtol=1e-7)


def test_a_small_region_is_detected_among_many_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 of 2000 voxels with a true CC of 0.9: counts alone put no q below 0.05, however well they are predicted."""
    Y, predicted, story_of_row = silent(0.4, 2000)
    Y, predicted = Y / Y.std(axis=0), predicted / predicted.std(axis=0)
    planted = np.arange(2000) < 30
    Y = np.where(planted, 0.9 * predicted + math.sqrt(1 - 0.81) * Y, Y)
    q = benjamini_hochberg(block_permutation_p(Y, predicted, story_of_row))
    assert (q[planted] < 0.001).all() and (q[~planted] < 0.05).sum() <= 5  # 1.5 expected, binomial band
    monkeypatch.setattr(permutation, "TAIL_REACHED", 0)
    assert not (benjamini_hochberg(block_permutation_p(Y, predicted, story_of_row)) < 0.05).any()


@pytest.mark.slow
def test_the_false_discovery_rate_of_permutation_p_is_kept() -> None:
    """40 mixes of 300 silent and 10 weakly planted voxels: the mean share of false ones is at most 0.1 x 300 / 310."""
    Y, predicted, story_of_row = silent(0.4, 40 * 310)
    Y, predicted = Y / Y.std(axis=0), predicted / predicted.std(axis=0)
    planted = np.arange(40 * 310) % 310 < 10
    p = block_permutation_p(Y + 0.2 * planted * predicted, predicted, story_of_row)
    significant = np.array([benjamini_hochberg(mix) < 0.1 for mix in p.reshape(40, 310)])
    shares = significant[:, 10:].sum(axis=1) / np.maximum(1, significant.sum(axis=1))
    assert np.mean(shares) < 0.1 * 300 / 310 + 2.6 * np.std(shares) / math.sqrt(40)
    assert significant[:, :10].mean() > 0.5


def test_inflation_costs_little_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voxels predicted weakly: a few in a hundred are lost, most of which chance had brought."""
    Y, predicted, story_of_row = silent(0.4, 1000)
    Y = Y / Y.std(axis=0) + 0.12 * predicted / predicted.std(axis=0)
    widened = np.mean(block_permutation_p(Y, predicted, story_of_row) < 0.05)
    monkeypatch.setattr(permutation, "LONGEST_LAG_TRS", 0)
    assert 0 <= np.mean(block_permutation_p(Y, predicted, story_of_row) < 0.05) - widened < 0.04
    assert widened > 0.75


def stepwise(p: list[float]) -> list[float]:
    """Benjamini and Hochberg in words: the smallest p_(j) n / j among those at least as large."""
    n, ordered = len(p), sorted(p)
    return [min(1.0, *(ordered[j] * n / (j + 1) for j in range(n) if ordered[j] >= value)) for value in p]


def test_q_equals_a_plain_loop() -> None:
    p = np.random.default_rng(0).beta(0.5, 1, 60).round(2)  # with ties
    np.testing.assert_allclose(benjamini_hochberg(p), stepwise(p.tolist()), rtol=1e-12)


def test_voxels_without_p_stay_so_and_do_not_count() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.5, np.nan])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.03, np.nan, 0.06, 0.5, np.nan], rtol=1e-12)
    np.testing.assert_array_equal(benjamini_hochberg(np.full(3, np.nan)), np.full(3, np.nan))
    assert benjamini_hochberg(np.array([])).shape == (0,)
