"""Ridge, against scikit-learn, himalaya, the Huth lab's code, closed forms and plain loops."""

from functools import partial
from itertools import product
from typing import NamedTuple

import make_trials
import numpy as np
import pytest
from himalaya.ridge import solve_ridge_cv_svd
from himalaya.scoring import correlation_score
from ridge_utils.ridge import ridge as huth_ridge
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit

from bert_encoding.regression import ridge
from bert_encoding.regression.ridge import RIDGE_ALPHAS, CrossValidatedRidge, RidgeFit
from bert_encoding.regression.solvers import FORMS

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = tuple(float(alpha) for alpha in np.logspace(-1, 4, 9))
FOLD_SIZES = (30, 17, 22, 25)  # stories differ in length
SHAPES = {"tall": 12, "wide": 150}  # n_features with 94 rows


fit_ridge = partial(make_trials.fit_ridge, precision="float64")


def cross_validated_predictions(
    X: np.ndarray, Y: np.ndarray, folds: np.ndarray, ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS, form: str = "auto"
) -> np.ndarray:
    return CrossValidatedRidge(X, folds, ridge_alphas, form, precision="float64").predict_left_out(Y)


class Problem(NamedTuple):
    X: np.ndarray  # (n_trs, n_features)
    Y: np.ndarray  # (n_trs, n_voxels)
    folds: np.ndarray  # (n_trs,)


def make_problem(n_features: int, n_voxels: int = 24, seed: int = 0) -> Problem:
    """Voxels from pure noise to almost pure signal, so that they want different alphas; rows of folds interleave."""
    rng = np.random.default_rng(seed)
    folds = rng.permutation(np.repeat(np.arange(len(FOLD_SIZES)), FOLD_SIZES))
    X = rng.standard_normal((len(folds), n_features)) * np.logspace(0, -1, n_features)
    weights = rng.standard_normal((n_features, n_voxels)) * np.logspace(-2, 1, n_voxels)
    Y = X @ weights + rng.standard_normal((len(folds), n_voxels))
    return Problem(*(((a - a.mean(0)) / a.std(0)).astype(np.float32) for a in (X, Y)), folds)


@pytest.fixture(params=list(SHAPES))
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(SHAPES[request.param])


every_form = pytest.mark.parametrize("form", list(FORMS))


@every_form
@pytest.mark.parametrize("alpha", [0.01, 10.0, 1e4])
def test_weights_at_one_alpha_equal_scikit_learns_and_the_closed_form(
    problem: Problem, form: str, alpha: float
) -> None:
    X, Y = problem.X.astype(np.float64), problem.Y.astype(np.float64)
    fit = fit_ridge(*problem, (alpha,), form)
    np.testing.assert_array_equal(fit.ridge_alphas, np.full(Y.shape[1], alpha))
    closed_form = np.linalg.solve(X.T @ X + alpha * np.eye(X.shape[1]), X.T @ Y)
    for expected in (Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(X, Y).coef_.T, closed_form):
        np.testing.assert_allclose(fit.weights, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def himalaya_fit(problem: Problem, grid: tuple[float, ...]) -> RidgeFit:
    """Himalaya's solver on the same folds; its table of scores, an alpha at a time."""
    X, Y = problem.X.astype(np.float64), problem.Y.astype(np.float64)

    def solve(alphas: tuple[float, ...]) -> tuple[np.ndarray, ...]:
        cv = PredefinedSplit(problem.folds)
        return solve_ridge_cv_svd(
            X, Y, np.array(alphas), score_func=correlation_score, cv=cv, local_alpha=True, warn=False
        )

    best_alphas, weights, _ = solve(grid)
    cv_cc = np.vstack([solve((alpha,))[2].reshape(1, -1) for alpha in grid])
    return RidgeFit(weights, best_alphas, cv_cc)


@every_form
def test_alphas_weights_and_cv_scores_equal_himalayas(problem: Problem, form: str) -> None:
    expected = himalaya_fit(problem, GRID)
    assert np.unique(expected.ridge_alphas).size >= 4  # or the choice would hardly be tested
    fit = fit_ridge(*problem, GRID, form)
    np.testing.assert_allclose(fit.ridge_alphas, expected.ridge_alphas, rtol=1e-12)  # theirs took a logarithm
    np.testing.assert_allclose(fit.cv_cc, expected.cv_cc, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fit.weights, expected.weights, rtol=1e-4, atol=1e-6)


@every_form
def test_the_huth_labs_alpha_is_the_root_of_ours(problem: Problem, form: str) -> None:
    fit = fit_ridge(*problem, GRID, form)
    X, Y = problem.X.astype(np.float64), problem.Y.astype(np.float64)
    expected = huth_ridge(X, Y, np.sqrt(fit.ridge_alphas))
    np.testing.assert_allclose(fit.weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "form"), [("tall", "primal"), ("wide", "kernel")])
def test_auto_decomposes_the_smaller_matrix(shape: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name, form_class in FORMS.items():
        monkeypatch.setitem(
            FORMS, name, lambda *arguments, name=name, make=form_class: (used.append(name), make(*arguments))[1]
        )
    problem = make_problem(SHAPES[shape])
    auto = fit_ridge(*problem, GRID)
    assert set(used) == {form}
    np.testing.assert_array_equal(auto.weights, fit_ridge(*problem, GRID, form).weights)


@every_form
def test_a_voxels_fit_does_not_depend_on_its_block(
    problem: Problem, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, predicted = fit_ridge(*problem, GRID, form), cross_validated_predictions(*problem, GRID, form)
    size = ridge.block_bytes_per_voxel(*problem.X.shape, len(FOLD_SIZES), 8)
    monkeypatch.setattr(ridge, "BLOCK_BYTES", 7 * size)  # 24 voxels: three full blocks and a rest
    blocks = fit_ridge(*problem, GRID, form)
    np.testing.assert_allclose(cross_validated_predictions(*problem, GRID, form), predicted, rtol=1e-5, atol=1e-6)
    some = range(0, problem.Y.shape[1], 5)
    alone = [fit_ridge(problem.X, problem.Y[:, [v]], problem.folds, GRID, form) for v in some]
    joined = RidgeFit(*(np.concatenate(parts, axis=-1) for parts in zip(*alone, strict=True)))
    for other, columns in ((blocks, slice(None)), (joined, list(some))):
        np.testing.assert_array_equal(other.ridge_alphas, whole.ridge_alphas[columns])
        np.testing.assert_allclose(other.cv_cc, whole.cv_cc[:, columns], rtol=0, atol=1e-6)
        np.testing.assert_allclose(other.weights, whole.weights[:, columns], rtol=1e-5, atol=1e-7)


@every_form
def test_the_names_of_folds_do_not_matter(problem: Problem, form: str) -> None:
    renamed = np.array([7, 2, 40, -1])[problem.folds]
    fits = (fit_ridge(problem.X, problem.Y, folds, GRID, form) for folds in (problem.folds, renamed))
    for first, second in zip(*fits, strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)  # cv_cc is summed in another order


@every_form
def test_bad_arrays_are_refused(form: str) -> None:
    """One fold leaves no row to choose on; two leave one such fold once the other is predicted."""
    problem = make_problem(12)
    bad = [(problem._replace(**{name: array[:-1]}), f"{name} 93") for name, array in problem._asdict().items()]
    for name, value in product("XY", (np.nan, np.inf, -np.inf)):
        array = getattr(problem, name).copy()
        array[3, 5] = value
        bad.append((problem._replace(**{name: array}), f"^{name} has non-finite"))
    bad.append((problem._replace(folds=0 * problem.folds), "^1 folds: at least 2"))
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            fit_ridge(*wrong, GRID, form)
    with pytest.raises(ValueError, match=r"^2 folds: at least 3"):
        cross_validated_predictions(problem.X, problem.Y, problem.folds % 2, GRID, form)


def nested_loop(problem: Problem, grid: tuple[float, ...]) -> np.ndarray:
    """Strictly nested cross-validation, one voxel, ridge_alpha and fold at a time."""
    X, Y, folds = problem.X.astype(np.float64), problem.Y.astype(np.float64), problem.folds
    predicted = np.full(Y.shape, np.nan)
    for outer in np.unique(folds):
        seen = folds != outer
        scores = np.zeros((len(grid), Y.shape[1]))
        for inner in np.unique(folds[seen]):
            train, held_out = seen & (folds != inner), seen & (folds == inner)
            for row, alpha in enumerate(grid):
                guess = Ridge(alpha=alpha, fit_intercept=False).fit(X[train], Y[train]).predict(X[held_out])
                scores[row] += [pearsonr(Y[held_out, v], guess[:, v]).statistic for v in range(Y.shape[1])]
        alphas = np.array(grid)[scores.argmax(axis=0)]
        predicted[~seen] = Ridge(alpha=alphas, fit_intercept=False).fit(X[seen], Y[seen]).predict(X[~seen])
    return predicted


@pytest.mark.table
@every_form
@pytest.mark.parametrize("n_features", SHAPES.values(), ids=SHAPES.keys())
def test_cross_validated_predictions_equal_a_nested_loop(form: str, n_features: int) -> None:
    problem = make_problem(n_features, n_voxels=5)
    grid = GRID[::2]
    got = cross_validated_predictions(*problem, grid, form)
    np.testing.assert_allclose(got, nested_loop(problem, grid), rtol=1e-4, atol=1e-5)


@every_form
def test_a_folds_predictions_do_not_depend_on_its_responses(problem: Problem, form: str) -> None:
    before = cross_validated_predictions(*problem, GRID, form)
    out = problem.folds == 2
    Y = problem.Y.copy()
    Y[out] = 1e3 * np.random.default_rng(1).standard_normal(Y[out].shape)
    after = cross_validated_predictions(problem.X, Y, problem.folds, GRID, form)
    np.testing.assert_array_equal(after[out], before[out])
    assert np.abs(after[~out] - before[~out]).max() > 1  # the others did see them


def test_the_default_grid_is_13_points_from_1e2_to_1e8() -> None:
    np.testing.assert_allclose(RIDGE_ALPHAS, [10.0 ** (2 + half / 2) for half in range(13)], rtol=1e-12)


@every_form
def test_a_voxel_that_is_constant_in_one_fold_gets_the_ridge_alpha_of_the_other_folds(form: str) -> None:
    """Constant in a fold, it has no CC there; the folds that have one still choose."""
    X, Y, folds = make_problem(12)
    Y = Y.copy()
    Y[folds == 1] = 0.1  # whose mean is rounded
    X64, Y64 = X.astype(np.float64), Y.astype(np.float64)
    scores = np.zeros((len(GRID), Y.shape[1]))
    for label in (0, 2, 3):
        out = folds == label
        for row, alpha in enumerate(GRID):
            guess = Ridge(alpha=alpha, fit_intercept=False).fit(X64[~out], Y64[~out]).predict(X64[out])
            scores[row] += [pearsonr(Y64[out, v], guess[:, v]).statistic for v in range(Y.shape[1])]
    fit = fit_ridge(X, Y, folds, GRID, form)
    np.testing.assert_array_equal(fit.ridge_alphas, np.array(GRID)[scores.argmax(axis=0)])


@pytest.mark.slow
@every_form
def test_nested_choice_of_alpha_scores_0_on_noise_where_the_naive_maximum_does_not(form: str) -> None:
    """The CC inside a fold: its expectation is 0 exactly, since no other fold's scale or mean enters.

    Voxels of one data set share X, so standard errors are taken over data sets.
    """
    honest, naive = [], []
    folds = np.repeat(np.arange(5), 20)
    for seed in range(12):
        rng = np.random.default_rng((1, seed))
        X, Y = rng.standard_normal((100, 60)), rng.standard_normal((100, 50))
        predicted = cross_validated_predictions(X, Y, folds, GRID, form)
        honest.append(np.mean([pearsonr(Y[folds == f], predicted[folds == f]).statistic for f in range(5)]))
        naive.append(fit_ridge(X, Y, folds, GRID, form).cv_cc.max(axis=0).mean())
    assert abs(np.mean(honest)) < 3 * np.std(honest, ddof=1) / np.sqrt(12)
    assert np.mean(naive) > 6 * np.std(naive, ddof=1) / np.sqrt(12)
