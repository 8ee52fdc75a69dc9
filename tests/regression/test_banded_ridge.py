"""Banded ridge against plain ridge, himalaya, the normal equations, and a case where one penalty is not enough."""

import numpy as np
import pytest
from himalaya.kernel_ridge import solve_multiple_kernel_ridge_random_search
from himalaya.ridge import solve_group_ridge_random_search
from himalaya.scoring import correlation_score
from make_trials import fit_ridge
from sklearn.model_selection import PredefinedSplit

from bert_encoding.regression import banded_ridge
from bert_encoding.regression.banded_ridge import DECADES, BandedRidge, band_weights
from bert_encoding.regression.ridge import RidgeFit

pytestmark = pytest.mark.usefixtures("one_thread", "no_bfloat16")

GRID = tuple(float(alpha) for alpha in np.logspace(0, 4, 5))
N_TRS, N_VOXELS = 240, 15
FOLDS = np.repeat(np.arange(4), N_TRS // 4)


def make_bands(n_features: tuple[int, ...], seed: int = 0, n_trs: int = N_TRS) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n_trs, n)).astype(np.float32) for n in n_features]


def make_responses(bands: list[np.ndarray], seed: int = 1) -> np.ndarray:
    """Return responses to the first two columns of each band, and as much noise."""
    rng = np.random.default_rng(seed)
    signal = sum(X[:, :2] @ rng.standard_normal((2, N_VOXELS)) for X in bands)
    Y = signal + 1.5 * rng.standard_normal((len(bands[0]), N_VOXELS))
    return ((Y - Y.mean(axis=0)) / Y.std(axis=0)).astype(np.float32)


def fit(bands: list[np.ndarray], Y: np.ndarray) -> RidgeFit:
    """Return weights, penalties of each band, and the highest CC of each candidate."""
    model = BandedRidge(bands, FOLDS, GRID)
    weights, ridge_alphas, _ = model.fit_predict(Y, np.eye(sum(X.shape[1] for X in bands), dtype=np.float32))
    cv_cc = [model.candidate(index).fit(Y).cv_cc.max(axis=0) for index in range(len(model.band_weights))]
    return RidgeFit(weights, ridge_alphas, np.stack(cv_cc))


def himalaya_fit(Xs: list[np.ndarray], Y: np.ndarray) -> RidgeFit:
    """Search the same penalties with himalaya: by features if they are fewer than rows, else by one kernel per band."""
    settings = {"n_iter": band_weights(len(Xs), 5).astype(np.float32), "alphas": np.asarray(GRID, np.float32)}
    settings |= {"cv": PredefinedSplit(FOLDS), "score_func": correlation_score, "progress_bar": False}
    if sum(X.shape[1] for X in Xs) <= len(Y):
        fitted = solve_group_ridge_random_search(Xs, Y, return_weights=True, warn=False, **settings)
    else:
        kernels = np.stack([X @ X.T for X in Xs])  # (n_bands, n_trs, n_trs)
        fitted = solve_multiple_kernel_ridge_random_search(kernels, Y, return_weights="primal", Xs=Xs, **settings)
    deltas, weights, cv_cc = fitted
    return RidgeFit(weights, np.exp(-deltas), cv_cc)


@pytest.mark.parametrize("n_features", [30, 300])  # fewer than rows, and more
def test_one_band_is_plain_ridge(n_features: int) -> None:
    bands = make_bands((n_features,))
    Y = make_responses(bands)
    banded, plain = fit(bands, Y), fit_ridge(bands[0], Y, FOLDS, GRID)
    np.testing.assert_allclose(banded.weights, plain.weights, atol=2e-5)
    np.testing.assert_allclose(banded.ridge_alphas, plain.ridge_alphas[None], rtol=1e-5)
    np.testing.assert_allclose(banded.cv_cc, plain.cv_cc.max(axis=0)[None], atol=2e-5)


@pytest.mark.parametrize("n_features", [(40, 3), (400, 3), (20, 4, 10)])
def test_weights_solve_the_normal_equations(n_features: tuple[int, ...]) -> None:
    bands = make_bands(n_features)
    Y = make_responses(bands)
    banded = fit(bands, Y)
    X = np.hstack(bands).astype(np.float64)
    penalties = np.repeat(banded.ridge_alphas, n_features, axis=0)  # (n_features, n_voxels)
    expected = np.stack(
        [np.linalg.solve(X.T @ X + np.diag(penalties[:, v]), X.T @ Y[:, v]) for v in range(N_VOXELS)], axis=1
    )
    np.testing.assert_allclose(banded.weights, expected, atol=5e-5)
    assert len(np.unique(np.round(banded.ridge_alphas[0] / banded.ridge_alphas[1], 4))) > 1, "all chose one candidate"


@pytest.mark.parametrize("n_features", [(40, 3), (400, 3)])
def test_choices_equal_himalayas(n_features: tuple[int, ...]) -> None:
    bands = make_bands(n_features, seed=3)
    Y = make_responses(bands, seed=4)
    himalaya, own = himalaya_fit(bands, Y), fit(bands, Y)
    np.testing.assert_allclose(himalaya.cv_cc, own.cv_cc, atol=2e-5)
    np.testing.assert_allclose(himalaya.ridge_alphas, own.ridge_alphas, rtol=1e-4)
    np.testing.assert_allclose(himalaya.weights, own.weights, atol=5e-5)


def test_cached_decompositions_serve_other_voxels_and_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    bands = make_bands((40, 3))
    X, Y, other = np.hstack(bands), make_responses(bands), make_responses(bands, seed=9)
    cached = BandedRidge(bands, FOLDS, GRID)
    cached.fit_predict(Y, X)
    for grid in (GRID, (0.1, *GRID)):
        reused = cached.with_alphas(grid).fit_predict(other, X)
        assert len(cached._ridges) == 5
        with monkeypatch.context() as patch:
            patch.setattr(banded_ridge, "CACHED_BYTES", 0)
            fresh = BandedRidge(bands, FOLDS, grid)
            for values, expected in zip(reused, fresh.fit_predict(other, X), strict=True):
                np.testing.assert_array_equal(values, expected)
        assert not fresh._ridges
    assert cached.largest_eigenvalue == pytest.approx(np.linalg.eigvalsh(X.T @ X)[-1], rel=0.1)


def test_the_cc_of_every_alpha_is_that_of_the_chosen_candidate() -> None:
    bands = make_bands((20, 3))
    Y = make_responses(bands)
    model = BandedRidge(bands, FOLDS, GRID)
    _, ridge_alphas, cv_cc = model.fit_predict(Y, np.hstack(bands))
    scaled = [np.hstack(bands) * np.repeat(np.sqrt(gamma), (20, 3)).astype(np.float32) for gamma in band_weights(2, 5)]
    every = np.stack([fit_ridge(X, Y, FOLDS, GRID).cv_cc for X in scaled])  # (n_candidates, n_alphas, n_voxels)
    best = every.max(axis=1).argmax(axis=0)
    assert len(np.unique(best)) > 1
    np.testing.assert_allclose(cv_cc, every[best, :, np.arange(N_VOXELS)].T, atol=1e-6)
    np.testing.assert_allclose(ridge_alphas[0] / ridge_alphas[1], (band_weights(2, 5)[best] ** -1 @ [1, 0]) /
                               (band_weights(2, 5)[best] ** -1 @ [0, 1]), rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("n_features", [(40, 3), (400, 3)])
@pytest.mark.parametrize(("condition", "sizes"), [(1e3, (4, 4)), (3e4, (4, 8)), (1e9, (8, 8))])
def test_the_memory_of_a_candidate_is_forecast(
    n_features: tuple[int, int], condition: float, sizes: tuple[int, int]
) -> None:
    bands = make_bands(n_features)
    smallest = BandedRidge(bands, FOLDS).largest_eigenvalue / condition
    model = BandedRidge(bands, FOLDS, (smallest, 10 * smallest), n_candidates=1)
    model.fit_predict(make_responses(bands), np.hstack(bands))
    ridge = model._ridges[0]
    assert (ridge.dtype.itemsize, ridge.eigh_dtype.itemsize) == sizes
    form = ridge._form
    arrays = {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in (ridge._X, form.X)}  # type: ignore[attr-defined]
    product = form.gram if hasattr(form, "gram") else form.kernel
    bases = [tensor for basis in ridge._bases.values() for tensor in (basis.vectors, basis.eigenvalues)]
    n_bytes = sum(arrays.values()) + sum(tensor.nbytes for tensor in (product, *bases, *ridge._held_out.values()))
    assert 0.5 * banded_ridge._bytes_of(ridge) < n_bytes < 1.05 * banded_ridge._bytes_of(ridge)


def test_candidates_of_two_bands_are_a_grid_with_plain_ridge_first() -> None:
    expected = [[1, 1], [1, 1e-2], [1e-2, 1], [1, 1e-4], [1e-4, 1]]
    np.testing.assert_allclose(band_weights(2, 5), expected, rtol=1e-12)
    assert band_weights(1, 7).tolist() == [[1.0]]
    assert band_weights(2, 1).tolist() == [[1.0, 1.0]]


def test_candidates_of_three_bands_are_drawn_by_the_seed() -> None:
    drawn = band_weights(3, 20, seed=1)
    np.testing.assert_array_equal(drawn, band_weights(3, 20, seed=1))
    assert (drawn[1:] != band_weights(3, 20, seed=2)[1:]).any(axis=1).all()
    assert drawn[0].tolist() == [1, 1, 1]
    np.testing.assert_allclose(drawn.max(axis=1), 1)
    assert 10**-DECADES <= drawn.min() < 1e-2


def test_bad_arrays_are_refused() -> None:
    bands = make_bands((5, 2))
    Y = make_responses(bands)
    broken = [bands[0], np.where(bands[1] > 2, np.nan, bands[1])]
    for wrong, message in (
        (lambda: BandedRidge([bands[0][:-1], bands[1]], FOLDS, GRID), "dimension"),
        (lambda: fit(broken, Y), "X has non-finite values"),
        (lambda: BandedRidge(bands, 0 * FOLDS, GRID).candidate(0), "1 folds: at least 2"),
        (lambda: BandedRidge([], FOLDS, GRID), "0 bands"),
        (lambda: fit(bands, Y[:-1]), "rows disagree: X 240, Y 239"),
        (lambda: fit(bands, np.where(Y > 2, np.inf, Y)), "Y has non-finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
