"""Tests of predictions, against plain loops."""

import numpy as np
import pytest

from bert_encoding.statistics.block_bootstrap import time_replicates
from bert_encoding.statistics.correlation import correlate
from bert_encoding.statistics.permutation import N_PERMUTATIONS, benjamini_hochberg, block_permutation_p
from bert_encoding.trial.scoring import FALSE_DISCOVERY_RATE, PredictionTests, examine_predictions


def simulated(n_rows: tuple[int, ...], n_voxels: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Responses and predictions; the first half of the voxels is well predicted, the others by chance."""
    rng = np.random.default_rng(seed)
    Y, predicted = rng.standard_normal((2, sum(n_rows), n_voxels))
    predicted[:, : n_voxels // 2] += Y[:, : n_voxels // 2]
    return Y.astype(np.float32), predicted.astype(np.float32), np.repeat(np.arange(len(n_rows)), n_rows)


def test_p_and_resamples_are_those_of_the_tests_named() -> None:
    Y, predicted, story = simulated((75, 60))
    tests = examine_predictions(Y, predicted, story)
    np.testing.assert_array_equal(tests.p, block_permutation_p(Y, predicted, story))
    np.testing.assert_array_equal(tests.replicates.total, time_replicates(Y, predicted, story).total)
    assert tests.replicates.mean[0] == pytest.approx(correlate(Y, predicted).mean(dtype=np.float64), abs=1e-6)
    assert (tests.p[:10] < 0.01).all()
    assert tests.p[10:].mean() > 0.2


def test_the_share_of_significant_voxels_is_that_of_q() -> None:
    rng = np.random.default_rng(3)
    p = np.concatenate([rng.uniform(0, 0.01, 30), rng.uniform(0.02, 0.2, 70), [np.nan]])  # the last counts as not
    share = np.mean(benjamini_hochberg(p) < FALSE_DISCOVERY_RATE)
    assert 0.1 < share < np.mean(p < FALSE_DISCOVERY_RATE), "else this could not tell q from p"
    Y = rng.standard_normal((40, p.size))
    replicates = time_replicates(Y, Y, np.zeros(40, int), n_resamples=5)
    assert PredictionTests(p, replicates).share_significant == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n_rows", "has_p"), [((69,), False), ((70,), True), ((49, 49), False), ((50, 49), True)])
def test_stories_too_short_for_a_p_have_none(n_rows: tuple[int, ...], has_p: bool) -> None:
    """Six blocks have 720 orders, seven 5040; 4! 4! are 576, 5! 4! are 2880."""
    Y, predicted, story = simulated(n_rows)
    tests = examine_predictions(Y, predicted, story)
    assert N_PERMUTATIONS == 1000
    assert np.isnan(tests.p).all() != has_p
    assert (tests.share_significant is not None) == has_p
    assert np.isfinite(tests.replicates.mean).all(), "the interval needs no p"
