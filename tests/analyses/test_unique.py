"""What a space tells beyond the others: calibrated where it tells nothing, found where it tells something."""

import numpy as np
import pytest

from bert_encoding.analyses.variance_partitioning import Chance, unique_p, what_is_left
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.statistics.permutation import block_permutation_p

pytestmark = pytest.mark.usefixtures("one_blas_thread", "no_bfloat16")

N_FIT, N_SCORED, N_VOXELS = 700, 400, 400  # voxels to which the space adds nothing, and as many to which it does
STORY = np.arange(N_SCORED) * 2 // N_SCORED
CHANCE = Chance(STORY, 200, 0)


def make_predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return responses, and predictions by both spaces and by the known one, (n_rows, 2 * N_VOXELS).

    All voxels follow the known space (4 slow columns), the second half a new space (40 columns, alike to it) as well.
    One penalty serves both, so the joint fit shrinks what is known otherwise than the fit on it alone.
    """
    rng = np.random.default_rng(0)
    n = N_FIT + N_SCORED
    known = smooth(rng.standard_normal((n, 4)))
    new = smooth(rng.standard_normal((n, 40))) + 0.3 * known @ rng.standard_normal((4, 40))
    Y = known @ rng.standard_normal((4, 2 * N_VOXELS)) + 2 * rng.standard_normal((n, 2 * N_VOXELS))
    Y[:, N_VOXELS:] += new @ rng.standard_normal((40, N_VOXELS)) / 5
    Y, known, joint = (values.astype(np.float32) for values in (Y / Y.std(axis=0), known, np.hstack([known, new])))
    folds, grid = np.arange(N_FIT) * 4 // N_FIT, tuple(np.logspace(0, 4, 9))
    by_joint, by_known = (
        CrossValidatedRidge(X[:N_FIT], folds, grid).fit_predict(Y[:N_FIT], X[N_FIT:]).predicted for X in (joint, known)
    )
    return Y[N_FIT:], by_joint, by_known


def smooth(white: np.ndarray) -> np.ndarray:
    """Return courses in which each row keeps 0.6 of the one before, of unit variance."""
    slow = white.copy()
    for t in range(1, len(slow)):
        slow[t] = 0.6 * slow[t - 1] + 0.8 * white[t]
    return slow


def test_p_is_calibrated_and_finds_what_is_new() -> None:
    """A band of 4.4 binomial standard deviations around 5%; it would be 24% by the plain residual and difference."""
    Y, joint, known = make_predictions()
    p = unique_p(Y, joint, known, CHANCE)
    assert 0.02 < (p[:N_VOXELS] < 0.05).mean() < 0.098
    np.testing.assert_allclose(np.quantile(p[:N_VOXELS], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.1)
    assert (p[N_VOXELS:] < 0.05).mean() > 0.85
    plain = block_permutation_p(Y - known, joint - known, STORY, n_permutations=200)
    assert (plain[:N_VOXELS] < 0.05).mean() > 0.15


def test_p_is_that_of_what_least_squares_leaves() -> None:
    rng = np.random.default_rng(1)
    Y, joint, known = rng.standard_normal((3, N_SCORED, 5))
    joint += 0.1 * Y + known
    left = [np.empty_like(Y), np.empty_like(Y)]
    for v in range(5):
        A = np.column_stack([np.ones(N_SCORED), known[:, v]])
        for values, out in zip((Y, joint), left, strict=True):
            out[:, v] = values[:, v] - A @ np.linalg.lstsq(A, values[:, v], rcond=None)[0]
    np.testing.assert_allclose(what_is_left(joint, known), left[1], atol=1e-12)
    expected = block_permutation_p(*left, STORY, n_permutations=200)
    np.testing.assert_allclose(unique_p(Y, joint, known, CHANCE), expected, rtol=1e-10)
    assert np.unique(expected).size > 1


def test_scale_and_what_is_known_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    Y, joint, known = rng.standard_normal((3, N_SCORED, 30))
    joint += 0.1 * Y
    p = unique_p(Y, joint, known, CHANCE)
    again = unique_p(3 * Y - 1, 0.01 * joint + 5 * known + 2, 7 * known - 3, CHANCE)
    np.testing.assert_allclose(again, p, rtol=1e-8)


def test_nothing_new_has_p_1() -> None:
    rng = np.random.default_rng(3)
    Y, known = rng.standard_normal((2, N_SCORED, 3)).astype(np.float32)
    assert unique_p(Y, np.float32(0.3) * known + np.float32(0.1), known, CHANCE).tolist() == [1, 1, 1]
    flat = np.zeros_like(known)
    expected = block_permutation_p(Y, known, STORY, n_permutations=200)
    np.testing.assert_allclose(unique_p(Y, known, flat, CHANCE), expected, rtol=1e-10)  # nothing is known: the plain CC


def test_short_stories_have_no_p() -> None:
    Y = np.random.default_rng(4).standard_normal((3, 40, 2))
    assert np.isnan(unique_p(*Y, Chance(np.zeros(40), 200, 0))).all()  # 4 blocks have 24 orders
