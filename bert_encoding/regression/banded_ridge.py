"""Banded ridge: a penalty for each band of features, chosen for each voxel.

One penalty for all features shrinks a few strong ones (word rate: a column a delay) as much as thousands of weak ones
(BERT). Banded ridge minimises ``||sum_b X_b w_b - y||^2 + sum_b ridge_alpha_b ||w_b||^2`` (Nunez-Elizalde, Huth and
Gallant 2019, NeuroImage 197, equation 7). With ``ridge_alpha_b = ridge_alpha / gamma_b`` it is plain ridge on the bands
times ``sqrt(gamma_b)`` (Dupre la Tour et al. 2022, NeuroImage 264), so the search goes over relative band weights
``gamma`` and, for each, over ``ridge_alpha``. There is no intercept: z-score before.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.regression.ridge import BLOCK_BYTES, RIDGE_ALPHAS, CrossValidatedRidge, Prediction
from bert_encoding.regression.solvers import Targets, largest_eigenvalue, rows_of_folds

HIMALAYA, OWN = "himalaya", "own"
N_CANDIDATES = 5
DECADES = 4.0  # penalties of two bands differ by at most so many
KEPT_BYTES = 2**31  # what decompositions of all candidates may take, to serve several calls
VOXELS_A_BATCH, ALPHAS_A_BATCH = 1000, 1  # himalaya's fastest on a CPU


Attempt = tuple[np.ndarray, np.ndarray, np.ndarray]


class BandedFit(NamedTuple):
    """A fitted model.

    Attributes
    ----------
    weights : (n_features, n_voxels) float32, of the bands side by side
    ridge_alphas : (n_bands, n_voxels) the chosen penalties
    cv_cc : (n_candidates, n_voxels) mean over folds of the held-out CC, of each candidate's best ridge_alpha (do not
        report its maximum)
    """

    weights: np.ndarray
    ridge_alphas: np.ndarray
    cv_cc: np.ndarray

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return predicted responses, (n_trs, n_voxels) float32; ``X`` is the bands side by side."""
        return X @ self.weights


class BandedRidge:
    """Cross-validated banded ridge on given features, for any number of voxels.

    Parameters
    ----------
    X_bands : a band each, (n_trs, n_features_of_band), z-scored
    folds : (n_trs,) fold of each row; a story must lie in one fold
    ridge_alphas : penalty of the band of the largest weight; the others' is as large or larger
    n_candidates : band weights to try; see ``band_weights``
    seed : settles the weights of three bands or more
    solver : ``own``: ``ridge.py`` on scaled bands; or ``himalaya``, which finds the same and takes longer
    device : of ``own``; himalaya computes on the CPU

    Raises
    ------
    InputError
        if himalaya is asked for and not installed.
    ValueError
        if shapes disagree, values are not finite, or there are fewer than two folds.
    """

    def __init__(
        self,
        X_bands: Sequence[np.ndarray],
        folds: np.ndarray,
        ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
        *,
        n_candidates: int = N_CANDIDATES,
        seed: int = 0,
        solver: str = OWN,
        device: torch.device | None = None,
    ) -> None:
        check_solver(solver)
        _check_features(X_bands, folds)
        self.X_bands = [np.asarray(X, np.float32) for X in X_bands]
        self.folds, self.ridge_alphas, self.device = folds, ridge_alphas, device
        self.band_weights = band_weights(len(X_bands), n_candidates, seed)
        self.largest_eigenvalue = largest_eigenvalue(torch.from_numpy(np.hstack(self.X_bands)))
        self._solver = SOLVERS[solver]
        self._ridges: dict[int, CrossValidatedRidge] = {}

    def with_alphas(self, ridge_alphas: tuple[float, ...]) -> "BandedRidge":
        """Return banded ridge on the same features with another grid; what is computed already is shared."""
        other = copy.copy(self)
        other.ridge_alphas = ridge_alphas
        return other

    def fit(self, Y: np.ndarray) -> BandedFit:
        """Choose each voxel's penalties by the mean held-out CC over folds, then fit on all rows.

        Parameters
        ----------
        Y : (n_trs, n_voxels), z-scored

        Raises
        ------
        ValueError
            if rows disagree or values are not finite.
        """
        return self._solver.fit(self, self._checked(Y))

    def fit_predict(self, Y: np.ndarray, X: np.ndarray) -> Prediction:
        """Fit, and predict other rows; the weights, which may be large, are not kept.

        Parameters
        ----------
        Y : as in ``fit``
        X : (n_rows, n_features), the bands side by side

        Returns
        -------
        as of plain ridge, but ``ridge_alphas`` is (n_bands, n_voxels), and ``cv_cc``, (n_alphas, n_voxels), is that of
        the chosen candidate. himalaya tells it of the chosen alpha alone, so that the others have -1 there.
        """
        return self._solver.fit_predict(self, self._checked(Y), X)

    def candidate(self, at: int) -> CrossValidatedRidge:
        """Return plain ridge on the bands scaled by one candidate's weights; kept if all candidates fit in memory."""
        if at in self._ridges:
            ridge = self._ridges.pop(at).with_alphas(self.ridge_alphas)
        else:
            X = np.hstack(self.X_bands) * self.scale(at)
            ridge = CrossValidatedRidge(X, self.folds, self.ridge_alphas, device=self.device)
        if _bytes_of(ridge) * len(self.band_weights) <= KEPT_BYTES:
            self._ridges[at] = ridge
        return ridge

    def _checked(self, Y: np.ndarray) -> np.ndarray:
        if len(Y) != len(self.folds):
            raise ValueError(f"rows disagree: X {len(self.folds)}, Y {len(Y)}")
        if not np.isfinite(Y).all():
            raise ValueError("Y has non-finite values")
        return np.asarray(Y, np.float32)

    def scale(self, at: int) -> np.ndarray:
        """Return what features are multiplied by in a candidate, (n_features,) float32."""
        return np.repeat(np.sqrt(self.band_weights[at]), [X.shape[1] for X in self.X_bands]).astype(np.float32)


def band_weights(n_bands: int, n_candidates: int, seed: int = 0) -> np.ndarray:
    """Return the relative weights to try, (n_candidates, n_bands); the largest of a candidate is 1.

    The first is equal weights, which is plain ridge. Of two bands the others are a regular grid that favours one and
    the other in turn, by up to ``DECADES``; of more they are drawn log-uniformly over as much. One band has one.

    Raises
    ------
    ValueError
        if there is no band or no candidate.
    """
    if n_bands < 1 or n_candidates < 1:
        raise ValueError(f"{n_bands} bands and {n_candidates} candidates: there must be at least one of each")
    if n_bands == 1:
        return np.ones((1, 1))
    exponents = np.zeros((n_candidates, n_bands))
    if n_bands == 2:
        steps = np.arange(1, n_candidates)
        sizes = np.ceil(steps / 2) * DECADES / max(1, np.ceil((n_candidates - 1) / 2))
        exponents[steps, steps % 2] = -sizes
    else:
        exponents[1:] = -generator(seed, "band weights").uniform(0, DECADES, (n_candidates - 1, n_bands))
    return 10 ** (exponents - exponents.max(axis=1, keepdims=True))


def check_solver(solver: str) -> None:
    """Refuse a solver that is unknown or not installed.

    Raises
    ------
    InputError
        saying what to do.
    """
    if solver not in SOLVERS:
        raise InputError(f"--banded-solver {solver}: must be one of {', '.join(SOLVERS)}")
    if solver == HIMALAYA:
        _himalaya("ridge")


def _solve_himalaya(model: BandedRidge, Y: np.ndarray) -> BandedFit:
    """Search with himalaya: by features if they are fewer than rows, else by a kernel a band."""
    Xs, numpy_backend = model.X_bands, _himalaya("backend")
    settings = {
        "n_iter": model.band_weights.astype(np.float32),
        "alphas": np.asarray(model.ridge_alphas, np.float32),
        "cv": _himalaya("sklearn").PredefinedSplit(model.folds),
        "score_func": _himalaya("scoring").correlation_score,
        "n_targets_batch": VOXELS_A_BATCH,
        "n_alphas_batch": ALPHAS_A_BATCH,
        "progress_bar": False,
    }
    before = numpy_backend.get_backend()
    numpy_backend.set_backend("numpy")  # a global setting: left as it was found
    try:
        if sum(X.shape[1] for X in Xs) <= len(Y):
            search = _himalaya("ridge").solve_group_ridge_random_search
            deltas, weights, cv_cc = search(Xs, Y, return_weights=True, warn=False, **settings)
        else:
            search = _himalaya("kernel_ridge").solve_multiple_kernel_ridge_random_search
            kernels = np.stack([X @ X.T for X in Xs])  # (n_bands, n_trs, n_trs)
            deltas, weights, cv_cc = search(kernels, Y, return_weights="primal", Xs=Xs, **settings)
    finally:
        numpy_backend.set_backend(before)
    return BandedFit(weights, np.exp(-deltas), cv_cc)


def _predict_himalaya(model: BandedRidge, Y: np.ndarray, X: np.ndarray) -> Prediction:
    """Fit and predict a block of voxels at a time: weights are returned for all of them at once."""
    n_columns = max(1, BLOCK_BYTES // (2 * X.shape[1] * np.dtype(np.float32).itemsize))  # two copies at the worst
    parts = []
    for start in range(0, Y.shape[1], n_columns):
        found = _solve_himalaya(model, Y[:, start : start + n_columns])
        parts.append((found.predict(X), found.ridge_alphas, _cc_of_chosen(found, model.ridge_alphas)))
    return Prediction(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))


def _cc_of_chosen(found: BandedFit, grid: tuple[float, ...]) -> np.ndarray:
    """Return the CC of each voxel's chosen alpha, and -1 for the others, (n_alphas, n_voxels)."""
    distances = np.abs(np.log(found.ridge_alphas.min(axis=0)) - np.log(grid)[:, None])
    return np.where(distances == distances.min(axis=0), found.cv_cc.max(axis=0), -1.0)


def _solve_own(model: BandedRidge, Y: np.ndarray) -> BandedFit:
    targets = Targets.prepare(Y, rows_of_folds(model.folds), model.device)

    def attempt(at: int) -> Attempt:
        fitted = model.candidate(at).fit(targets)
        return model.scale(at)[:, None] * fitted.weights, fitted.ridge_alphas, fitted.cv_cc

    (weights, ridge_alphas, _), scores = _best_candidates(model, attempt)
    return BandedFit(weights, ridge_alphas, scores)


def _predict_own(model: BandedRidge, Y: np.ndarray, X: np.ndarray) -> Prediction:
    targets = Targets.prepare(Y, rows_of_folds(model.folds), model.device)
    best, _ = _best_candidates(model, lambda at: model.candidate(at).fit_predict(targets, X * model.scale(at)))
    return Prediction(*best)


def _best_candidates(model: BandedRidge, attempt: Callable[[int], Attempt]) -> tuple[list[np.ndarray], np.ndarray]:
    """Search with plain ridge on scaled bands, a candidate at a time.

    Parameters
    ----------
    attempt : number of a candidate -> weights or predictions, chosen penalties and CC of its ridge

    Returns
    -------
    the same of each voxel's best candidate, penalties by band, and (n_candidates, n_voxels) each one's highest CC
    """
    best: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    for at, gamma in enumerate(model.band_weights):
        values, ridge_alphas, cv_cc = attempt(at)
        found = [values, ridge_alphas / gamma[:, None], cv_cc]
        score = cv_cc.max(axis=0)
        better = score > np.max(scores, axis=0) if scores else np.ones(score.size, bool)
        best = best or found
        for kept, new in zip(best, found, strict=True):
            kept[:, better] = new[:, better]
        scores.append(score)
    return best, np.stack(scores)


def _bytes_of(ridge: CrossValidatedRidge) -> int:
    """Return the most that ridge keeps: products and decompositions of every fold, and the features."""
    n, size = min(ridge.n_rows, ridge.n_features), ridge.dtype.itemsize
    bases = size * (n**2 * (len(ridge.rows) + 1) + ridge.n_rows * n)
    return bases + ridge.eigh_dtype.itemsize * n**2 + (4 + size) * ridge.n_rows * ridge.n_features


class Solver(NamedTuple):
    """What finds the penalties: with the weights, or with predictions of other rows in their stead."""

    fit: Callable[[BandedRidge, np.ndarray], BandedFit]
    fit_predict: Callable[[BandedRidge, np.ndarray, np.ndarray], Prediction]


SOLVERS = {OWN: Solver(_solve_own, _predict_own), HIMALAYA: Solver(_solve_himalaya, _predict_himalaya)}


def _himalaya(part: str) -> Any:
    """Return a part of himalaya, or scikit-learn's, which himalaya requires."""
    name = "sklearn.model_selection" if part == "sklearn" else f"himalaya.{part}"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"--banded-solver {HIMALAYA}: is not installed; pip install 'bert-encoding-study[banded]', or leave it out"
        ) from None


def _check_features(X_bands: Sequence[np.ndarray], folds: np.ndarray) -> None:
    for at, X in enumerate(X_bands):
        if len(X) != len(folds):
            raise ValueError(f"rows disagree: band {at} {len(X)}, folds {len(folds)}")
        if not np.isfinite(X).all():
            raise ValueError(f"band {at} has non-finite values")
    if np.unique(folds).size < 2:
        raise ValueError("1 fold: at least 2 are needed to choose penalties on rows that are not scored")
