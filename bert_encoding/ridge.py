"""Cross-validated ridge regression: an alpha a voxel, folds made of whole stories.

Weights minimise ``||X b - y||^2 + ridge_alpha ||b||^2`` for each voxel, ridge_alpha in himalaya's and scikit-learn's
units (the Huth-lab code squares its alpha). There is no intercept: z-score ``X`` and ``Y`` before.
"""

from itertools import combinations
from typing import NamedTuple, Protocol

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
    rows = _rows_of_folds(X, Y, folds, n_least=2)
    solver = _make_solver(X, rows, form, device)
    every = tuple(range(len(rows)))
    without = [_held_out_basis(solver, every, (fold,)) for fold in every]
    full = solver.basis(every)
    cv_cc = np.zeros((len(ridge_alphas), Y.shape[1]))
    chosen = np.empty(Y.shape[1])
    weights = np.empty((X.shape[1], Y.shape[1]), np.float32)
    for columns in _blocks(Y.shape[1]):
        targets = solver.prepare([Y[r, columns] for r in rows])
        for fold, (basis, held_out) in enumerate(without):
            truth = Y[rows[fold], columns]
            cv_cc[:, columns] += _cc_by_alpha(solver, basis, held_out[0], targets, truth, ridge_alphas) / len(rows)
        chosen[columns] = _best_alphas(cv_cc[:, columns], ridge_alphas)
        shrunk = _shrink(full, solver.project(full, targets), chosen[columns])
        weights[:, columns] = solver.weights(full, shrunk).cpu().numpy()
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

    Choosing alphas on the fold that is then scored raises the CC of pure noise. A fit without folds j and k serves
    twice: it scores j when k is predicted, and k when j is.

    Raises
    ------
    ValueError
        as ``fit_ridge``, and if there are fewer than three folds.
    """
    rows = _rows_of_folds(X, Y, folds, n_least=3)
    solver = _make_solver(X, rows, form, device)
    every = tuple(range(len(rows)))
    pairs = {pair: _held_out_basis(solver, every, pair) for pair in combinations(every, 2)}
    singles = [_held_out_basis(solver, every, (fold,)) for fold in every]
    predicted = np.empty(Y.shape, np.float32)
    for columns in _blocks(Y.shape[1]):
        targets = solver.prepare([Y[r, columns] for r in rows])
        inner_cc = np.zeros((len(rows), len(ridge_alphas), columns.stop - columns.start))
        for pair, (basis, held_out) in pairs.items():
            for scored, left_out, X_scored in zip(pair, pair[::-1], held_out, strict=True):
                truth = Y[rows[scored], columns]
                inner_cc[left_out] += _cc_by_alpha(solver, basis, X_scored, targets, truth, ridge_alphas)
        for fold, (basis, held_out) in enumerate(singles):
            alphas = _best_alphas(inner_cc[fold], ridge_alphas)
            shrunk = _shrink(basis, solver.project(basis, targets), alphas)
            predicted[rows[fold], columns] = (held_out[0] @ shrunk).cpu().numpy()
    return predicted


def alpha_edge_share(ridge_alphas: np.ndarray, grid: tuple[float, ...] = RIDGE_ALPHAS) -> dict[str, float]:
    """Return the share of voxels whose alpha is the grid's smallest and largest."""
    return {"low": float(np.mean(ridge_alphas == min(grid))), "high": float(np.mean(ridge_alphas == max(grid)))}


class Basis(NamedTuple):
    """The eigenvectors in which ridge on some folds is solved for every alpha at once."""

    folds: tuple[int, ...]
    eigenvalues: torch.Tensor  # (n,)
    vectors: torch.Tensor  # (n_features, n) or (n_trs, n)


class Solver(Protocol):
    """One form of the equations. Each is made of products over single folds, computed once: leaving folds out costs an
    eigendecomposition and nothing else. All arithmetic is float64."""

    def __init__(self, X_folds: list[torch.Tensor]) -> None: ...

    def basis(self, folds: tuple[int, ...]) -> Basis:
        """Decompose the training rows of some folds."""

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        """Return the rows of another fold in the basis, (n_fold_rows, n)."""

    def prepare(self, Y_folds: list[np.ndarray]) -> list[torch.Tensor]:
        """Return what ``project`` needs of some voxels, by fold."""

    def project(self, basis: Basis, targets: list[torch.Tensor]) -> torch.Tensor:
        """Return the responses of the training rows in the basis, (n, n_voxels)."""

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        """Return to features, (n_features, n_voxels)."""


class PrimalSolver:
    """``X'X = V S V'`` gives ``b = V (S + alpha)^-1 V'X'y``; for more rows than features."""

    def __init__(self, X_folds: list[torch.Tensor]) -> None:
        self.X = X_folds
        self.grams = [X.T @ X for X in X_folds]

    def basis(self, folds: tuple[int, ...]) -> Basis:
        return Basis(folds, *_eigh(sum((self.grams[f] for f in folds), torch.zeros_like(self.grams[0]))))

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        return self.X[fold] @ basis.vectors

    def prepare(self, Y_folds: list[np.ndarray]) -> list[torch.Tensor]:
        return [X.T @ _like(Y, X) for X, Y in zip(self.X, Y_folds, strict=True)]

    def project(self, basis: Basis, targets: list[torch.Tensor]) -> torch.Tensor:
        return basis.vectors.T @ sum((targets[f] for f in basis.folds), torch.zeros_like(targets[0]))

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        return basis.vectors @ shrunk


class KernelSolver:
    """``XX' = U S U'`` gives ``b = X'U (S + alpha)^-1 U'y``; for more features than rows."""

    def __init__(self, X_folds: list[torch.Tensor]) -> None:
        self.X = X_folds
        self.kernels = [[X @ other.T for other in X_folds] for X in X_folds]

    def basis(self, folds: tuple[int, ...]) -> Basis:
        return Basis(folds, *_eigh(torch.cat([self._kernel(f, folds) for f in folds])))

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        return self._kernel(fold, basis.folds) @ basis.vectors

    def prepare(self, Y_folds: list[np.ndarray]) -> list[torch.Tensor]:
        return [_like(Y, X) for X, Y in zip(self.X, Y_folds, strict=True)]

    def project(self, basis: Basis, targets: list[torch.Tensor]) -> torch.Tensor:
        return basis.vectors.T @ torch.cat([targets[f] for f in basis.folds])

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.X[f] for f in basis.folds]).T @ (basis.vectors @ shrunk)

    def _kernel(self, fold: int, others: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([self.kernels[fold][other] for other in others], dim=1)


FORMS: dict[str, type[Solver]] = {"primal": PrimalSolver, "kernel": KernelSolver}


def _make_solver(X: np.ndarray, rows: list[np.ndarray], form: str, device: torch.device | None) -> Solver:
    if form == "auto":
        form = "kernel" if X.shape[0] < X.shape[1] else "primal"
    return FORMS[form]([torch.from_numpy(X[r]).to(device or "cpu", torch.float64) for r in rows])


def _held_out_basis(solver: Solver, every: tuple[int, ...], out: tuple[int, ...]) -> tuple[Basis, list[torch.Tensor]]:
    """Decompose all folds but ``out``, and express the rows of each of ``out`` in that basis."""
    basis = solver.basis(tuple(fold for fold in every if fold not in out))
    return basis, [solver.held_out(basis, fold) for fold in out]


def _cc_by_alpha(
    solver: Solver,
    basis: Basis,
    held_out: torch.Tensor,
    targets: list[torch.Tensor],
    truth: np.ndarray,
    ridge_alphas: tuple[float, ...],
) -> np.ndarray:
    """Return the held-out CC for every alpha, (n_alphas, n_voxels); 0 where a voxel is constant in the fold, so that
    the other folds choose for it."""
    projected = solver.project(basis, targets)
    predictions = (held_out @ _shrink(basis, projected, alpha) for alpha in ridge_alphas)
    cc = np.stack([correlate(truth, predicted.cpu().numpy()) for predicted in predictions])
    return np.nan_to_num(cc, nan=0.0)


def _shrink(basis: Basis, projected: torch.Tensor, alphas: np.ndarray | float) -> torch.Tensor:
    """Divide by ``eigenvalue + alpha``; alphas is one, or one a voxel."""
    return projected / (basis.eigenvalues[:, None] + torch.as_tensor(alphas).to(projected))


def _best_alphas(cc: np.ndarray, ridge_alphas: tuple[float, ...]) -> np.ndarray:
    """Return the alpha of the highest CC, (n_voxels,)."""
    return np.asarray(ridge_alphas)[cc.argmax(axis=0)]


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return eigenvalues.clamp(min=0), vectors


def _rows_of_folds(X: np.ndarray, Y: np.ndarray, folds: np.ndarray, n_least: int) -> list[np.ndarray]:
    """Return the row numbers of each fold, after checking the input."""
    if not len(X) == len(Y) == len(folds):
        raise ValueError(f"rows disagree: X {len(X)}, Y {len(Y)}, folds {len(folds)}")
    for name, values in (("X", X), ("Y", Y)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has non-finite values")
    labels = np.unique(folds)
    if labels.size < n_least:
        raise ValueError(
            f"{labels.size} folds: at least {n_least} are needed to choose alphas on rows that are not scored"
        )
    return [np.flatnonzero(folds == label) for label in labels]


def _blocks(n_voxels: int) -> list[slice]:
    return [slice(start, min(start + VOXELS_PER_BLOCK, n_voxels)) for start in range(0, n_voxels, VOXELS_PER_BLOCK)]


def _like(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like)
