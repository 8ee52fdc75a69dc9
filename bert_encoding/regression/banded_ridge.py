"""Banded ridge: one penalty per band of features and voxel.

One penalty for all features shrinks a few strong ones (word rate: one column per delay) as much as thousands of weak
ones (BERT). Banded ridge minimises ``||sum_b X_b w_b - y||^2 + sum_b ridge_alpha_b ||w_b||^2`` (Nunez-Elizalde, Huth
and Gallant 2019, NeuroImage 197, equation 7). With ``ridge_alpha_b = ridge_alpha / gamma_b`` it is plain ridge on the
bands times ``sqrt(gamma_b)`` (Dupre la Tour et al. 2022, NeuroImage 264), so the search covers relative band weights
``gamma`` and, for each, ``ridge_alpha``. There is no intercept: z-score before.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from bert_encoding.core.seeds import generator
from bert_encoding.regression.ridge import RIDGE_ALPHAS, CrossValidatedRidge
from bert_encoding.regression.solvers import Targets, largest_eigenvalue, rows_of_folds

N_CANDIDATES = 5
DECADES = 4.0  # largest difference between the penalties of two bands
CACHED_BYTES = 2**31  # limit for the decompositions of all candidates to be kept between calls


class BandedRidge:
    """Cross-validated banded ridge on given features, for any number of voxels.

    Parameters
    ----------
    X_bands : one array per band, (n_trs, n_features_of_band), z-scored
    folds : (n_trs,) fold of each row; a story must be in one fold
    ridge_alphas : penalties of the band with the largest weight; those of the other bands are as large or larger
    n_candidates : band weights to try; see ``band_weights``
    seed : of the weights of three bands or more
    device : where ridge is computed
    """

    def __init__(
        self,
        X_bands: Sequence[np.ndarray],
        folds: np.ndarray,
        ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
        *,
        n_candidates: int = N_CANDIDATES,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.X_bands = [np.asarray(X, np.float32) for X in X_bands]
        self.folds, self.ridge_alphas, self.device = folds, ridge_alphas, device
        self.band_weights = band_weights(len(X_bands), n_candidates, seed)
        self.largest_eigenvalue = largest_eigenvalue(torch.from_numpy(np.hstack(self.X_bands)))
        self._ridges: dict[int, CrossValidatedRidge] = {}

    def with_alphas(self, ridge_alphas: tuple[float, ...]) -> "BandedRidge":
        """Return banded ridge on the same features with another grid; decompositions are shared."""
        ridge = copy.copy(self)
        ridge.ridge_alphas = ridge_alphas
        return ridge

    def fit_predict(self, Y: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose each voxel's penalties by the mean held-out CC over folds, fit on all rows, and predict other rows.

        As plain ridge, with the bands side by side in ``X``; but ``ridge_alphas`` is (n_bands, n_voxels), and
        ``cv_cc``, (n_alphas, n_voxels), is that of the chosen candidate.
        """
        targets = Targets.prepare(np.asarray(Y, np.float32), rows_of_folds(self.folds), self.device)
        best: tuple[np.ndarray, ...] = ()
        for index, gamma in enumerate(self.band_weights):
            predicted, ridge_alphas, cv_cc = self.candidate(index).fit_predict(targets, X * self.scale(index))
            candidate = predicted, ridge_alphas / gamma[:, None], cv_cc
            best = best or candidate
            better = cv_cc.max(axis=0) > best[2].max(axis=0)
            for old, new in zip(best, candidate, strict=True):
                old[:, better] = new[:, better]
        return best[0], best[1], best[2]

    def candidate(self, index: int) -> CrossValidatedRidge:
        """Return plain ridge on the bands scaled by one candidate's weights; cached if all candidates fit in memory."""
        if index in self._ridges:
            ridge = self._ridges.pop(index).with_alphas(self.ridge_alphas)
        else:
            X = np.hstack(self.X_bands) * self.scale(index)
            ridge = CrossValidatedRidge(X, self.folds, self.ridge_alphas, device=self.device)
        if _bytes_of(ridge) * len(self.band_weights) <= CACHED_BYTES:
            self._ridges[index] = ridge
        return ridge

    def scale(self, index: int) -> np.ndarray:
        """Return the factors of the features in one candidate, (n_features,) float32."""
        return np.repeat(np.sqrt(self.band_weights[index]), [X.shape[1] for X in self.X_bands]).astype(np.float32)


def band_weights(n_bands: int, n_candidates: int, seed: int = 0) -> np.ndarray:
    """Return the relative weights to try, (n_candidates, n_bands); the largest of a candidate is 1.

    The first candidate has equal weights, which is plain ridge. For two bands the others are a regular grid that
    favours either band in turn, by up to ``DECADES``; for more bands they are drawn log-uniformly over this range. For
    one band there is one candidate.
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


def _bytes_of(ridge: CrossValidatedRidge) -> int:
    """Return the memory of ridge at most: products and decompositions of every fold, and the features."""
    n, size = min(ridge.n_rows, ridge.n_features), ridge.dtype.itemsize
    bases = size * (n**2 * (len(ridge.rows) + 1) + ridge.n_rows * n)
    return bases + ridge.eigh_dtype.itemsize * n**2 + (4 + size) * ridge.n_rows * ridge.n_features
