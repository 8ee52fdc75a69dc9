"""Ridge in float32 and with bfloat16 norms, compared with float64: scores, ridge_alphas, and the limits of float32."""

import numpy as np
import pytest
import torch

from bert_encoding.regression import ridge
from bert_encoding.regression.ridge import (
    EIGH_CONDITION,
    RIDGE_ALPHAS,
    WORST_CONDITION,
    CrossValidatedRidge,
    extend_alphas,
    share_beyond_grid,
)
from bert_encoding.regression.solvers import FORMS, largest_eigenvalue
from bert_encoding.statistics.correlation import correlate

N_FIT, N_SCORED, N_VOXELS = 900, 300, 240
GRID = tuple(float(alpha) for alpha in np.logspace(0, 6, 13))


def make_problem(n_features: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features with a steep spectrum, slow rows; a third of the voxels is noise alone."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((N_FIT + N_SCORED, n_features))
    latent[1:] = 0.6 * latent[:-1] + 0.8 * latent[1:]
    X = latent * np.arange(1, n_features + 1) ** -0.7 @ rng.standard_normal((n_features, n_features))
    Y = latent @ rng.standard_normal((n_features, N_VOXELS)) / np.sqrt(n_features)
    Y = Y * np.where(np.arange(N_VOXELS) % 3, rng.uniform(0.1, 2, N_VOXELS), 0) + rng.standard_normal(Y.shape)
    X, Y = ((a - a[:N_FIT].mean(0)) / a[:N_FIT].std(0) for a in (X, Y))
    folds = np.arange(N_FIT) // 60 % 5
    return X.astype(np.float32), Y.astype(np.float32), folds


@pytest.fixture
def bfloat16_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on large products and a processor that multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(ridge, "MANY_ROWS", 0)
    monkeypatch.setattr(ridge, "resolve_precision", lambda precision, device: "bfloat16")


@pytest.mark.table
@pytest.mark.parametrize("n_features", [300, 1500], ids=["primal", "kernel"])
@pytest.mark.parametrize("norms", ["float32", "bfloat16"])
def test_scores_and_alphas_are_those_of_float64(
    n_features: int, norms: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar: mean CC within 1e-4; for 99% of voxels the same alpha, or one whose CC is within 1e-4 of the best."""
    X, Y, folds = make_problem(n_features)
    lowest = largest_eigenvalue(torch.from_numpy(X[:N_FIT])) / (0.5 * WORST_CONDITION)
    grid = tuple(float(alpha) for alpha in lowest * np.logspace(0, 5, 11))
    exact = CrossValidatedRidge(X[:N_FIT], folds, grid, precision="float64").fit(Y[:N_FIT])
    if norms == "bfloat16":
        request.getfixturevalue("bfloat16_norms")
    fast = CrossValidatedRidge(X[:N_FIT], folds, grid)
    assert fast.dtype == torch.float32
    fit = fast.fit(Y[:N_FIT])
    cc = [correlate(Y[N_FIT:], X[N_FIT:] @ model.weights) for model in (fit, exact)]
    assert abs(cc[0].mean() - cc[1].mean()) < 1e-4
    chosen = np.searchsorted(grid, fit.ridge_alphas)
    loss = exact.cv_cc.max(axis=0) - exact.cv_cc[chosen, np.arange(N_VOXELS)]
    assert np.mean(loss <= (1e-4 if norms == "float32" else 3e-4)) >= 0.99  # 180 rows per fold: bfloat16 loses accuracy
    assert np.unique(chosen).size >= 4, "one alpha for all would agree by itself"
    same = fit.ridge_alphas == exact.ridge_alphas
    predicted, expected = (X[N_FIT:] @ model.weights[:, same] for model in (fit, exact))
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=5e-3 * expected.std())


def test_bfloat16_affects_only_the_choice_of_ridge_alphas(bfloat16_norms: None) -> None:
    """With one alpha there is nothing to choose: predictions are those of float32, bit for bit."""
    X, Y, folds = make_problem(300)
    rough = CrossValidatedRidge(X[:N_FIT], folds, (100.0,))
    fit = rough.fit(Y[:N_FIT])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge, "resolve_precision", lambda precision, device: "float32")
        exact = CrossValidatedRidge(X[:N_FIT], folds, (100.0,)).fit(Y[:N_FIT])
    np.testing.assert_array_equal(fit.weights, exact.weights)
    assert np.abs(fit.cv_cc - exact.cv_cc).max() > 1e-7, "or bfloat16 was not used"


@pytest.mark.parametrize("form", list(FORMS))
def test_features_that_float32_cannot_solve_are_solved_in_float64(form: str) -> None:
    """Two columns that are equal but for 1e-3, and alphas far below the largest eigenvalue."""
    X, Y, folds = make_problem(40)
    X = np.hstack([X, X[:, :1] + 1e-3 * X[:, 1:2]]).astype(np.float32)
    tiny = (1e-4, 1e-3)
    auto = CrossValidatedRidge(X[:N_FIT], folds, tiny, form)
    assert auto.dtype == torch.float64
    exact = CrossValidatedRidge(X[:N_FIT], folds, tiny, form, precision="float64")
    np.testing.assert_allclose(auto.fit(Y[:N_FIT]).weights, exact.fit(Y[:N_FIT]).weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", list(FORMS))
def test_at_the_worst_condition_that_float32_is_trusted_with_scores_agree(form: str, seed: int) -> None:
    """At both limits. Every processor has the same order of error in ``cv_cc``; which voxels it moves to another alpha,
    and so the error of the mean CC, differs."""
    X, Y, folds = make_problem(300, seed)
    eigenvalue = np.linalg.eigvalsh(X[:N_FIT].astype(np.float64).T @ X[:N_FIT])[-1]
    reference = CrossValidatedRidge(X[:N_FIT], folds, (eigenvalue,), form, precision="float64")
    for limit, eigh_dtype in ((EIGH_CONDITION, torch.float32), (WORST_CONDITION, torch.float64)):
        grid = tuple(float(a) for a in eigenvalue / limit * 1.1 * np.logspace(0, 1, 3))
        auto, exact = CrossValidatedRidge(X[:N_FIT], folds, grid, form), reference.with_alphas(grid)
        assert (auto.dtype, auto.eigh_dtype) == (torch.float32, eigh_dtype)
        fast, expected = (ridge.fit_predict(Y[:N_FIT], X[N_FIT:]) for ridge in (auto, exact))
        assert np.abs(fast[2] - expected[2]).max() < 1e-4
        cc = [correlate(Y[N_FIT:], predicted) for predicted, _, _ in (fast, expected)]
        assert abs(cc[0].mean() - cc[1].mean()) < 1e-4


def test_the_largest_eigenvalue_is_numpys() -> None:
    X = make_problem(300)[0]
    expected = np.linalg.eigvalsh(X.astype(np.float64).T @ X)[-1]
    eigenvalue = largest_eigenvalue(torch.from_numpy(X))
    assert 0.95 * expected < eigenvalue <= expected * (1 + 1e-5)
    assert largest_eigenvalue(torch.zeros(5, 3)) == 0


def test_fit_predict_predicts_with_the_weights_of_fit() -> None:
    X, Y, folds = make_problem(300)
    fitted = CrossValidatedRidge(X[:N_FIT], folds, GRID)
    fit, (predicted, ridge_alphas, _) = fitted.fit(Y[:N_FIT]), fitted.fit_predict(Y[:N_FIT], X[N_FIT:])
    expected = torch.from_numpy(X[N_FIT:]) @ torch.from_numpy(fit.weights)  # NumPy's product differs by up to 2e-5
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ridge_alphas, fit.ridge_alphas)


def test_another_grid_equals_a_new_ridge_and_leaves_the_first_unchanged() -> None:
    X, Y, folds = make_problem(60)
    first = CrossValidatedRidge(X[:N_FIT], folds, GRID)
    before = first.fit(Y[:N_FIT])
    for grid in ((1e-9, *GRID), GRID[3:]):
        other, new = first.with_alphas(grid), CrossValidatedRidge(X[:N_FIT], folds, grid)
        assert (other.dtype, other.eigh_dtype) == (new.dtype, new.eigh_dtype)
        for one, two in zip(other.fit(Y[:N_FIT]), new.fit(Y[:N_FIT]), strict=True):
            np.testing.assert_array_equal(one, two)
    for one, two in zip(first.fit(Y[:N_FIT]), before, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("grid", "share", "eigenvalue", "expected"),
    [
        (RIDGE_ALPHAS, {"low": 0.1, "high": 0.2}, 1e9, None),
        (RIDGE_ALPHAS, {"low": 0.21, "high": 0.0}, 1.0, tuple(np.logspace(0, 8, 17))),
        (RIDGE_ALPHAS, {"low": 0.0, "high": 0.9}, 1e8, tuple(np.logspace(2, 10, 17))),
        (RIDGE_ALPHAS, {"low": 0.0, "high": 0.9}, 9e6, None),  # such alphas only scale the predictions
        (RIDGE_ALPHAS, {"low": 0.4, "high": 0.4}, 1e8, tuple(np.logspace(0, 10, 21))),
        ((1.0, 1e6), {"low": 0.5, "high": 0.0}, 1.0, (1e-2, 1.0, 1e6)),  # two decades, whatever the step
        ((100.0,), {"low": 1.0, "high": 1.0}, 1e9, None),  # a single alpha is never widened
    ],
)
def test_the_grid_is_widened_by_two_decades_where_more_than_a_fifth_chose_an_edge(
    grid: tuple[float, ...], share: dict[str, float], eigenvalue: float, expected: tuple[float, ...] | None
) -> None:
    extended = extend_alphas(grid, share, eigenvalue)
    if expected is None:
        assert extended is None
    else:
        np.testing.assert_allclose(extended, expected, rtol=1e-12)


def test_a_voxel_counts_beyond_the_grid_if_its_edge_gain_exceeds_rounding() -> None:
    cv_cc = np.array([[0.3, 0.3, 0.1, 0.1, 0.0], [0.2, 0.2995, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.25, 0.2005]])
    assert share_beyond_grid(cv_cc) == {"low": 1 / 5, "high": 1 / 5}
    assert share_beyond_grid(cv_cc, over_smoothed=True) == {"low": 2 / 5, "high": 1 / 5}
    assert share_beyond_grid(cv_cc[:1]) == {"low": 0.0, "high": 0.0}
