"""Cross-validated ridge regression: an alpha a voxel, folds made of whole stories.

Weights minimise ``||X b - y||^2 + ridge_alpha ||b||^2`` for each voxel, ridge_alpha in himalaya's and scikit-learn's
units (the Huth-lab code squares its alpha). There is no intercept: z-score ``X`` and ``Y`` before.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bert_encoding.scores import correlate

RIDGE_ALPHAS = tuple(float(alpha) for alpha in np.logspace(2, 8, 13))
VOXELS_PER_BLOCK = 4096


class RidgeFit(NamedTuple):
    """A fitted model.

    Attributes
    ----------
    weights : (n_features, n_voxels) float32
    ridge_alphas : (n_voxels,) the chosen penalties
    cv_cc : (n_alphas, n_voxels) mean over folds of the held-out CC that chose them (do not report its maximum)
    """

    weights: np.ndarray
    ridge_alphas: np.ndarray
    cv_cc: np.ndarray

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return predicted responses, (n_trs, n_voxels) float32."""
        return X @ self.weights


class Path(NamedTuple):
    """The ridge solutions of one set of training rows for every alpha.

    ``weights(alpha) = left @ ((right @ Y) / (eigenvalues + alpha)[:, None])``
    """

    eigenvalues: torch.Tensor  # (n,)
    left: torch.Tensor  # (n_features, n)
    right: torch.Tensor  # (n, n_trs)


def fit_ridge(
    X: np.ndarray,
    Y: np.ndarray,
    folds: np.ndarray,
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
    form: str = "auto",
    device: torch.device | None = None,
) -> RidgeFit:
    """Choose each voxel's alpha by the mean held-out CC over folds, then fit on all rows.

    Parameters
    ----------
    X : (n_trs, n_features), z-scored
    Y : (n_trs, n_voxels), z-scored
    folds : (n_trs,) fold of each row; a story must lie in one fold
    form : ``primal`` (n_features x n_features), ``kernel`` (n_trs x n_trs), or ``auto``: the smaller

    Raises
    ------
    ValueError
        if shapes disagree, values are not finite, or there are fewer than two folds.
    """
    _check(X, Y, folds)
    X64 = torch.from_numpy(np.ascontiguousarray(X)).to(device or "cpu", torch.float64)
    decompose = FORMS[form if form != "auto" else ("kernel" if X.shape[0] < X.shape[1] else "primal")]
    cv_cc = np.zeros((len(ridge_alphas), Y.shape[1]))
    labels = np.unique(folds)
    for label in labels:
        inside = torch.from_numpy(folds != label)
        path = decompose(X64[inside])
        held_out = X64[~inside] @ path.left  # (n_held_out, n)
        for columns in _blocks(Y.shape[1]):
            targets = path.right @ _to(Y[folds != label, columns], X64)  # (n, n_columns)
            truth = Y[folds == label, columns]
            for row, alpha in enumerate(ridge_alphas):
                predicted = held_out @ (targets / (path.eigenvalues + alpha)[:, None])
                cv_cc[row, columns] += correlate(truth, predicted.cpu().numpy()) / len(labels)
    # A voxel that is constant in a fold has no CC there; the smallest alpha would win by default.
    best = np.nan_to_num(cv_cc, nan=-1.0).argmax(axis=0)
    chosen = np.asarray(ridge_alphas)[best]
    weights = np.empty((X.shape[1], Y.shape[1]), np.float32)
    path = decompose(X64)
    for columns in _blocks(Y.shape[1]):
        targets = path.right @ _to(Y[:, columns], X64)
        shrunk = targets / (path.eigenvalues[:, None] + _to(chosen[columns], X64))
        weights[:, columns] = (path.left @ shrunk).cpu().numpy()
    return RidgeFit(weights, chosen, cv_cc)


def cross_validated_predictions(
    X: np.ndarray,
    Y: np.ndarray,
    folds: np.ndarray,
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
    form: str = "auto",
    device: torch.device | None = None,
) -> np.ndarray:
    """Predict each fold from the others, (n_trs, n_voxels) float32; alphas are chosen inside those others alone.

    Choosing alphas on the fold that is then scored raises the CC of pure noise.
    """
    predicted = np.empty(Y.shape, np.float32)
    for label in np.unique(folds):
        out = folds == label
        predicted[out] = fit_ridge(X[~out], Y[~out], folds[~out], ridge_alphas, form, device).predict(X[out])
    return predicted


def alpha_edge_share(ridge_alphas: np.ndarray, grid: tuple[float, ...] = RIDGE_ALPHAS) -> dict[str, float]:
    """Return the share of voxels whose alpha is the grid's smallest and largest."""
    return {"low": float(np.mean(ridge_alphas == min(grid))), "high": float(np.mean(ridge_alphas == max(grid)))}


def _decompose_primal(X: torch.Tensor) -> Path:
    """From ``X'X = V S V'``: ``b = V (S + alpha)^-1 V'X' y``."""
    eigenvalues, V = torch.linalg.eigh(X.T @ X)
    return Path(eigenvalues.clamp(min=0), V, (X @ V).T)


def _decompose_kernel(X: torch.Tensor) -> Path:
    """From ``XX' = U S U'``: ``b = X'U (S + alpha)^-1 U'y``."""
    eigenvalues, U = torch.linalg.eigh(X @ X.T)
    return Path(eigenvalues.clamp(min=0), X.T @ U, U.T)


FORMS: dict[str, Callable[[torch.Tensor], Path]] = {"primal": _decompose_primal, "kernel": _decompose_kernel}


def _check(X: np.ndarray, Y: np.ndarray, folds: np.ndarray) -> None:
    if not len(X) == len(Y) == len(folds):
        raise ValueError(f"rows disagree: X {len(X)}, Y {len(Y)}, folds {len(folds)}")
    if np.unique(folds).size < 2:
        raise ValueError("ridge needs at least two folds to choose an alpha")
    for name, values in (("X", X), ("Y", Y)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has non-finite values")


def _blocks(n_voxels: int) -> list[slice]:
    return [slice(start, min(start + VOXELS_PER_BLOCK, n_voxels)) for start in range(0, n_voxels, VOXELS_PER_BLOCK)]


def _to(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)
