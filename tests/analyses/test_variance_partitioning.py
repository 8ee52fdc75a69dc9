"""Variance partitioning: planted truths, a slow reference for every fit, and the test of a unique part."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score as sklearn_r2

from bert_encoding.analyses.partition_tables import doubts, notes_on_grids, table_of
from bert_encoding.analyses.variance_partitioning import (
    NestedScores,
    PermutationSettings,
    RidgeSettings,
    nested_scores,
    partition_variance,
    r2_score,
    residual,
    subsets_of,
    unique_p,
)
from bert_encoding.core.errors import InputError
from bert_encoding.core.zscore import ZScore
from bert_encoding.regression.banded_ridge import BandedRidge
from bert_encoding.regression.ridge import CrossValidatedRidge, extend_alphas, share_beyond_grid
from bert_encoding.statistics.correlation import correlate
from bert_encoding.statistics.permutation import block_permutation_p
from bert_encoding.trial.scoring import Design

pytestmark = pytest.mark.usefixtures("one_thread", "no_bfloat16")

A, B, AB = ("a",), ("b",), ("a", "b")
WEAK = RidgeSettings(ridge_alphas=(1e-3, 1.0))  # nearly no penalty


@pytest.mark.parametrize("n_spaces", [2, 3])
def test_parts_are_recovered_from_their_unions(n_spaces: int) -> None:
    spaces = tuple("abc"[:n_spaces])
    rng = np.random.default_rng(0)
    planted = {part: rng.uniform(-0.1, 0.3, 7) for part in subsets_of(spaces)}
    r2 = {u: sum(value for part, value in planted.items() if set(part) & set(u)) for u in subsets_of(spaces)}
    parts = partition_variance(r2)
    assert list(parts) == list(planted)
    for part, value in planted.items():
        np.testing.assert_allclose(parts[part], value, atol=1e-14)
    np.testing.assert_allclose(sum(parts.values()), r2[spaces], atol=1e-14)
    scores = NestedScores(np.array([0.5, -0.2]), *np.zeros((4, 1, 2)), (1.0,))
    np.testing.assert_allclose(scores.explained, [0.25, -0.04], atol=1e-15)
    if n_spaces == 2:  # the published formulas
        for part, formula in ((A, r2[AB] - r2[B]), (B, r2[AB] - r2[A]), (AB, r2[A] + r2[B] - r2[AB])):
            np.testing.assert_allclose(parts[part], formula, atol=1e-15)


def test_r2_equals_scikit_learn_and_ignores_means() -> None:
    rng = np.random.default_rng(1)
    Y = rng.standard_normal((50, 4)).astype(np.float32)
    predicted = (0.4 * Y + rng.standard_normal((50, 4))).astype(np.float32)
    centred = predicted - predicted.mean(axis=0) + Y.mean(axis=0)
    expected = sklearn_r2(Y, centred, multioutput="raw_values")
    np.testing.assert_allclose(r2_score(Y, predicted), expected, atol=1e-6)
    np.testing.assert_allclose(r2_score(Y + 3, predicted - 5), expected, atol=1e-5)
    assert r2_score(Y, np.zeros_like(Y)).tolist() == [0, 0, 0, 0]
    flat = np.where(np.arange(4) == 2, np.float32(0.1), Y)
    assert np.isnan(r2_score(flat, predicted)).tolist() == [False, False, True, False]


def make_designs(
    features: dict[str, np.ndarray], n_fit: int, n_folds: int = 4, n_stories: int = 2
) -> dict[str, Design]:
    n = len(next(iter(features.values())))
    folds, story = np.arange(n_fit) * n_folds // n_fit, np.arange(n - n_fit) * n_stories // (n - n_fit)
    return {
        name: Design(X[:n_fit], X[n_fit:], folds, story, ZScore(np.zeros(X.shape[1]), np.ones(X.shape[1])))
        for name, X in ((name, X.astype(np.float32)) for name, X in features.items())
    }


def score(
    features: dict[str, np.ndarray], Y: np.ndarray, n_fit: int, fitting: RidgeSettings, n_permutations: int = 20
) -> dict[tuple[str, ...], NestedScores]:
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    panels = {"s": lambda: iter([(Y[:n_fit], Y[n_fit:])])}
    return nested_scores(make_designs(features, n_fit), panels, fitting, n_permutations)["s"]


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_planted_shares_are_found(correlation: float) -> None:
    """Voxels that follow a, b, both, their difference, and nothing; half of the variance is signal.

    The truth is in closed form: with unit variances and correlation c, a voxel that follows ``u`` is explained by a to
    ``cov(u, a)^2 / var(y)``, and by both as the squared length of ``u``'s projection on them.
    """
    n_fit, n = 4000, 8000
    rng = np.random.default_rng(3)
    a = rng.standard_normal(n)
    b = correlation * a + np.sqrt(1 - correlation**2) * rng.standard_normal(n)
    covariance = np.array([[1, correlation], [correlation, 1]])
    weights = np.array([[1, 0], [0, 1], [1, 1], [1, -0.5], [0, 0]], float).T  # (2, n_voxels)
    signal_power = np.einsum("iv,ij,jv->v", weights, covariance, weights)
    total = signal_power + np.where(signal_power > 0, signal_power, 1)
    Y = np.stack([a, b], axis=1) @ weights + rng.standard_normal((n, 5)) * np.sqrt(total - signal_power)
    useless = rng.standard_normal((2, n, 4))
    features = {"a": np.column_stack([a, *useless[0].T]), "b": np.column_stack([b, *useless[1].T])}
    scores = score(features, Y, n_fit, WEAK)
    with_a, with_b = np.square(covariance @ weights) / total
    both = signal_power / total
    parts = partition_variance({subset: fit.explained for subset, fit in scores.items()})
    for subset, expected in ((A, with_a), (B, with_b), (AB, both)):
        np.testing.assert_allclose(scores[subset].explained, expected, atol=0.03)
        np.testing.assert_allclose(scores[subset].r2, expected, atol=0.03)
    np.testing.assert_allclose(parts[A], both - with_b, atol=0.03)
    np.testing.assert_allclose(parts[B], both - with_a, atol=0.03)
    np.testing.assert_allclose(parts[AB], with_a + with_b - both, atol=0.03)
    np.testing.assert_allclose(sum(parts.values()), scores[AB].explained, atol=1e-12)
    np.testing.assert_allclose(scores[AB].cc, np.sqrt(both), atol=0.04)
    driven = signal_power > 0
    assert (scores[AB].p[driven] < 0.05).all() and scores[AB].p[~driven] > 0.05


def test_every_nested_fit_equals_a_slow_loop() -> None:
    n_fit, n, grid = 120, 200, (1.0, 30.0, 1000.0)
    rng = np.random.default_rng(4)
    features = {name: rng.standard_normal((n, p)) for name, p in (("a", 6), ("b", 3), ("c", 9))}
    Y = sum(X[:, :2] @ rng.standard_normal((2, 4)) for X in features.values()) + 2 * rng.standard_normal((n, 4))
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    scores = score(features, Y, n_fit, RidgeSettings(grid))
    assert len(scores) == 7
    folds, story = make_designs(features, n_fit)["a"][2:4]
    slow = {}
    for subset, fit in scores.items():
        slow[subset] = np.empty((n - n_fit, 4))
        X = np.hstack([features[space] for space in subset])
        for v in range(4):
            alpha, predicted = slow_ridge(X[:n_fit], Y[:n_fit, v], folds, fit.grid, X[n_fit:])
            slow[subset][:, v] = predicted
            assert fit.ridge_alphas[0, v] == alpha
            truth = Y[n_fit:, v]
            np.testing.assert_allclose(fit.cc[v], np.corrcoef(truth, predicted)[0, 1], atol=1e-5)
            shifted = predicted - predicted.mean() + truth.mean()
            np.testing.assert_allclose(fit.r2[v], sklearn_r2(truth, shifted), atol=1e-5)
            in_stories = [np.corrcoef(truth[story == s], predicted[story == s])[0, 1] for s in (0, 1)]
            np.testing.assert_allclose(fit.story_cc[:, v], in_stories, atol=1e-5)
    for space, others in (("a", ("b", "c")), ("b", ("a", "c")), ("c", ("a", "b"))):
        expected = unique_p(Y[n_fit:], slow["a", "b", "c"], slow[others], PermutationSettings(story, 20, 0))
        np.testing.assert_array_equal(scores[(space,)].p_unique, expected)
    assert all(fit.p_unique is None for subset, fit in scores.items() if len(subset) > 1)


@pytest.mark.parametrize("banded", [False, True])
def test_a_grid_that_ends_too_early_is_extended_once(banded: bool) -> None:
    """A strong signal needs small penalties; all voxels decide together, whatever their panels.

    Features of unlike strength make the CC depend on the penalty.
    """
    n_fit, n = 200, 300
    rng = np.random.default_rng(13)
    features = {name: rng.standard_normal((n, 3)) * [1, 3, 9] for name in "ab"}
    joint = np.hstack(list(features.values())).astype(np.float32)
    Y = joint / joint.std(axis=0) @ rng.standard_normal((6, 8)) + rng.standard_normal((n, 8))
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    panels = {"s": lambda: iter([(Y[:n_fit, part], Y[n_fit:, part]) for part in (slice(1), slice(1, 8))])}
    designs = make_designs(features, n_fit)
    narrow, wide = (1e3, 1e4, 1e5), (1e1, 1e2, 1e3, 1e4, 1e5)
    scores = nested_scores(designs, panels, RidgeSettings(narrow, banded), 20)["s"]
    if not banded:
        ridge: CrossValidatedRidge | BandedRidge = CrossValidatedRidge(joint[:n_fit], designs["a"].folds, wide)
    else:
        ridge = BandedRidge([design.fit for design in designs.values()], designs["a"].folds, wide)
    predicted, ridge_alphas, _ = ridge.fit_predict(Y[:n_fit], joint[n_fit:])
    np.testing.assert_allclose(scores[AB].grid, wide, rtol=1e-9)
    assert scores[AB].ridge_alphas.shape == ((2, 8) if banded else (1, 8))
    assert (scores[AB].ridge_alphas.min(axis=0) < 900).mean() > 0.5
    np.testing.assert_allclose(scores[AB].ridge_alphas, np.atleast_2d(ridge_alphas), rtol=1e-5)
    np.testing.assert_allclose(scores[AB].cc, correlate(Y[n_fit:], predicted), atol=1e-6)
    (note,) = notes_on_grids({"s": scores}, narrow)
    assert "s: in some fits more than 20% of voxels needed a ridge_alpha beyond 1000 to 100000" in note
    assert "repeated with 10 to 100000" in note
    assert notes_on_grids({"s": scores}, scores[AB].grid) == []


@pytest.mark.parametrize("banded", [False, True])
def test_all_subsets_of_a_subject_are_fitted_on_the_union_of_their_grids(banded: bool) -> None:
    """One space needs smaller penalties, the other larger ones; a constant second subject needs neither."""
    n_fit, n, narrow = 200, 300, (1e2, 1e3, 1e4)
    rng = np.random.default_rng(20)
    steep = rng.standard_normal((n, 3)) * [1, 3, 9]
    weak = 30 * rng.standard_normal((n, 150))
    Y = steep / [1, 3, 9] @ rng.standard_normal((3, 10)) + weak @ rng.standard_normal((150, 10)) / 300
    Y = Y + 1.5 * rng.standard_normal(Y.shape)
    Y = (Y / Y.std(axis=0)).astype(np.float32)
    silent = rng.standard_normal((n, 40)).astype(np.float32)
    panels = {"s": lambda: iter([(Y[:n_fit], Y[n_fit:])]), "t": lambda: iter([(0 * silent[:n_fit], silent[n_fit:])])}
    designs = make_designs({"a": steep, "b": weak}, n_fit)
    alone = {}
    for space, design in designs.items():
        ridge = CrossValidatedRidge(design.fit, design.folds, narrow)
        share = share_beyond_grid(ridge.fit(Y[:n_fit]).cv_cc)
        alone[space] = extend_alphas(narrow, share, ridge.largest_eigenvalue)
    assert alone["a"] is not None and min(alone["a"]) < min(narrow) and max(alone["a"]) == max(narrow)
    assert alone["b"] is not None and max(alone["b"]) > max(narrow) and min(alone["b"]) == min(narrow)
    union = tuple(sorted({*alone["a"], *alone["b"]}))
    scores = nested_scores(designs, panels, RidgeSettings(narrow, banded), 20)
    assert {fit.grid for fit in scores["s"].values()} == {union}
    assert {fit.grid for fit in scores["t"].values()} == {narrow}
    assert [note[:2] for note in notes_on_grids(scores, narrow)] == ["s:"]
    for space, design in designs.items():
        predicted, alphas, _ = CrossValidatedRidge(design.fit, design.folds, union).fit_predict(
            Y[:n_fit], design.scored
        )
        np.testing.assert_array_equal(scores["s"][(space,)].ridge_alphas[0], alphas)
        np.testing.assert_allclose(scores["s"][(space,)].cc, correlate(Y[n_fit:], predicted), atol=1e-6)


def test_an_edge_without_a_gain_extends_no_grid() -> None:
    """Features alike in strength and uncorrelated: the CC is nearly the same for every penalty."""
    n_fit, n, narrow = 400, 500, (1e-2, 1e-1, 1.0)
    rng = np.random.default_rng(21)
    features = {name: rng.standard_normal((n, 1)) for name in "ab"}
    Y = features["a"] + rng.standard_normal((n, 8)) / 2
    scores = score(features, Y, n_fit, RidgeSettings(narrow), 20)
    assert max(max(fit.edge_share.values()) for fit in scores.values()) > 0.2
    assert {fit.grid for fit in scores.values()} == {narrow}
    rows = table_of({"s": scores})
    assert doubts(rows) == []
    rows[0] |= {"pressing_low": 0.25}
    assert doubts(rows)[0] == "s, a: 25% of voxels need a ridge_alpha below the smallest, 0.01"


def test_temporary_predictions_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {name: np.random.default_rng(14).standard_normal((60, 2)) for name in "abc"}
    Y = np.random.default_rng(15).standard_normal((60, 3)).astype(np.float32)
    arguments = make_designs(features, 40), {"s": lambda: iter([(Y[:40], Y[40:])])}, WEAK
    sizes, save = [], np.save

    def counting(*args: object) -> None:
        save(*args)
        sizes.append(len(list(tmp_path.glob("predictions-*/*.npy"))))

    monkeypatch.setattr(np, "save", counting)
    nested_scores(*arguments, folder=tmp_path)
    assert max(sizes) == 8, "responses and seven subsets"
    assert not list(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        InputError, match=r"predictions-.*: no room for 0 MiB of predictions \(No space left on device\)"
    ):
        nested_scores(*arguments, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def slow_ridge(
    X: np.ndarray, y: np.ndarray, folds: np.ndarray, grid: tuple[float, ...], X_new: np.ndarray
) -> tuple[float, np.ndarray]:
    def fitted(alpha: float, rows: np.ndarray) -> Ridge:
        return Ridge(alpha=alpha, fit_intercept=False).fit(X[rows], y[rows])

    cc = [
        np.mean([np.corrcoef(y[folds == f], fitted(alpha, folds != f).predict(X[folds == f]))[0, 1] for f in range(4)])
        for alpha in grid
    ]
    alpha = grid[int(np.argmax(cc))]
    return alpha, fitted(alpha, folds >= 0).predict(X_new)


def test_banded_ridge_is_used_only_in_joint_fits() -> None:
    """If few columns are informative and many are not, banded ridge keeps what the few explain."""
    n_fit, n = 200, 500
    rng = np.random.default_rng(5)
    features = {"a": rng.standard_normal((n, 120)), "b": rng.standard_normal((n, 2))}
    Y = features["b"] @ rng.standard_normal((2, 12)) + 1.5 * rng.standard_normal((n, 12))
    grid = tuple(np.logspace(0, 4, 5))
    plain, banded = (score(features, Y, n_fit, RidgeSettings(grid, banded=is_banded)) for is_banded in (False, True))
    for space in (A, B):
        np.testing.assert_array_equal(plain[space].r2, banded[space].r2)
    assert plain[AB].ridge_alphas.shape == (1, 12)
    assert banded[AB].ridge_alphas.shape == (2, 12)
    parts = (partition_variance({s: v.explained for s, v in scores.items()}) for scores in (plain, banded))
    lost_by_plain, lost_by_banded = (-part[A].mean() for part in parts)
    assert lost_by_plain > 0.05 and lost_by_banded < lost_by_plain / 2


N_FIT, N_SCORED, N_VOXELS = 700, 400, 400  # voxels to which the space adds nothing; the same number to which it adds
STORY_OF_ROW = np.arange(N_SCORED) * 2 // N_SCORED
PERMUTATION = PermutationSettings(STORY_OF_ROW, 200, 0)


def make_predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return responses, and predictions by both spaces and by the known one, (n_rows, 2 * N_VOXELS).

    All voxels follow the known space (4 slow columns), the second half also a new, similar space (40 columns). With one
    penalty for both, the joint fit shrinks the known part differently from the fit on it alone.
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
        CrossValidatedRidge(X[:N_FIT], folds, grid).fit_predict(Y[:N_FIT], X[N_FIT:])[0] for X in (joint, known)
    )
    return Y[N_FIT:], by_joint, by_known


def smooth(white: np.ndarray) -> np.ndarray:
    """Return autoregressive columns (coefficient 0.6) of unit variance."""
    slow = white.copy()
    for t in range(1, len(slow)):
        slow[t] = 0.6 * slow[t - 1] + 0.8 * white[t]
    return slow


def test_unique_p_is_calibrated_and_detects_a_new_space() -> None:
    """Within 4.4 binomial SDs of 5%; with the plain residual and difference it would be 24%."""
    Y, joint, known = make_predictions()
    p = unique_p(Y, joint, known, PERMUTATION)
    assert 0.02 < (p[:N_VOXELS] < 0.05).mean() < 0.098
    np.testing.assert_allclose(np.quantile(p[:N_VOXELS], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.1)
    assert (p[N_VOXELS:] < 0.05).mean() > 0.85
    plain = block_permutation_p(Y - known, joint - known, STORY_OF_ROW, n_permutations=200)
    assert (plain[:N_VOXELS] < 0.05).mean() > 0.15


def test_unique_p_is_that_of_the_least_squares_residuals() -> None:
    rng = np.random.default_rng(1)
    Y, joint, known = rng.standard_normal((3, N_SCORED, 5))
    joint += 0.1 * Y + known
    left = [np.empty_like(Y), np.empty_like(Y)]
    for v in range(5):
        A = np.column_stack([np.ones(N_SCORED), known[:, v]])
        for values, out in zip((Y, joint), left, strict=True):
            out[:, v] = values[:, v] - A @ np.linalg.lstsq(A, values[:, v], rcond=None)[0]
    np.testing.assert_allclose(residual(joint, known), left[1], atol=1e-12)
    expected = block_permutation_p(*left, STORY_OF_ROW, n_permutations=200)
    np.testing.assert_allclose(unique_p(Y, joint, known, PERMUTATION), expected, rtol=1e-10)
    assert np.unique(expected).size > 1
    rescaled = unique_p(3 * Y - 1, 0.01 * joint + 5 * known + 2, 7 * known - 3, PERMUTATION)
    np.testing.assert_allclose(rescaled, expected, rtol=1e-8)


def test_unique_p_is_1_where_nothing_is_new_and_nan_in_short_stories() -> None:
    rng = np.random.default_rng(3)
    Y, known = rng.standard_normal((2, N_SCORED, 3)).astype(np.float32)
    assert unique_p(Y, np.float32(0.3) * known + np.float32(0.1), known, PERMUTATION).tolist() == [1, 1, 1]
    flat = np.zeros_like(known)
    expected = block_permutation_p(Y, known, STORY_OF_ROW, n_permutations=200)
    np.testing.assert_allclose(unique_p(Y, known, flat, PERMUTATION), expected, rtol=1e-10)  # the plain CC
    short = PermutationSettings(np.zeros(40), 200, 0)  # 4 blocks have 24 orders
    assert np.isnan(unique_p(*rng.standard_normal((3, 40, 2)), short)).all()
