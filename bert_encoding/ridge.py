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
    """Fit ridge on arrays at once; see ``CrossValidatedRidge``, which also takes voxels in parts."""
    return CrossValidatedRidge(X, folds, ridge_alphas, form, device).fit(Y)


def cross_validated_predictions(
    X: np.ndarray,
    Y: np.ndarray,
    folds: np.ndarray,
    ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
    form: str = "auto",
    device: torch.device | None = None,
) -> np.ndarray:
    """Predict each fold from the others; see ``CrossValidatedRidge.predict_left_out``."""
    return CrossValidatedRidge(X, folds, ridge_alphas, form, device).predict_left_out(Y)


class CrossValidatedRidge:
    """Ridge on given features, for any number of voxels: what depends on the features alone is computed once.

    Parameters
    ----------
    X : (n_trs, n_features), z-scored
    folds : (n_trs,) fold of each row; a story must lie in one fold
    form : ``primal`` (n_features x n_features), ``kernel`` (n_trs x n_trs), or ``auto``: the smaller

    Raises
    ------
    ValueError
        if shapes disagree, values are not finite, or there are fewer than two folds.
    """

    def __init__(
        self,
        X: np.ndarray,
        folds: np.ndarray,
        ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
        form: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        self.rows = _rows_of_folds(X, folds)
        self.ridge_alphas, self.n_features = ridge_alphas, X.shape[1]
        self.every = tuple(range(len(self.rows)))
        self._solver = _make_solver(X, self.rows, form, device)
        self._bases: dict[tuple[int, ...], Basis] = {}

    def fit(self, Y: np.ndarray) -> RidgeFit:
        """Choose each voxel's alpha by the mean held-out CC over folds, then fit on all rows.

        Parameters
        ----------
        Y : (n_trs, n_voxels), z-scored

        Raises
        ------
        ValueError
            if rows disagree or values are not finite.
        """
        _check_responses(Y, self.rows)
        cv_cc = np.zeros((len(self.ridge_alphas), Y.shape[1]))
        chosen = np.empty(Y.shape[1])
        weights = np.empty((self.n_features, Y.shape[1]), np.float32)
        for columns in _blocks(Y.shape[1]):
            targets = self._solver.prepare([Y[rows, columns] for rows in self.rows])
            for fold in self.every:
                cv_cc[:, columns] += self._cc_without(Y, columns, targets, (fold,))[0] / len(self.rows)
            chosen[columns] = _best_alphas(cv_cc[:, columns], self.ridge_alphas)
            full = self._basis(())
            shrunk = _shrink(full, self._solver.project(full, targets), chosen[columns])
            weights[:, columns] = self._solver.weights(full, shrunk).cpu().numpy()
        return RidgeFit(weights, chosen, cv_cc)

    def predict_left_out(self, Y: np.ndarray) -> np.ndarray:
        """Predict each fold from the others, (n_trs, n_voxels) float32; alphas are chosen inside those others alone.

        Choosing alphas on the fold that is then scored raises the CC of pure noise. A fit without folds j and k serves
        twice: it scores j when k is predicted, and k when j is.

        Raises
        ------
        ValueError
            as ``fit``, and if there are fewer than three folds.
        """
        _check_responses(Y, self.rows)
        _check_n_folds(len(self.rows), 3)
        predicted = np.empty(Y.shape, np.float32)
        for columns in _blocks(Y.shape[1]):
            targets = self._solver.prepare([Y[rows, columns] for rows in self.rows])
            inner_cc = np.zeros((len(self.rows), len(self.ridge_alphas), columns.stop - columns.start))
            for pair in combinations(self.every, 2):
                inner_cc[list(pair[::-1])] += self._cc_without(Y, columns, targets, pair)
            for fold in self.every:
                alphas, basis = _best_alphas(inner_cc[fold], self.ridge_alphas), self._basis((fold,))
                shrunk = _shrink(basis, self._solver.project(basis, targets), alphas)
                predicted[self.rows[fold], columns] = (self._solver.held_out(basis, fold) @ shrunk).cpu().numpy()
        return predicted

    def _basis(self, out: tuple[int, ...]) -> "Basis":
        """Decompose all folds but ``out``, once."""
        if out not in self._bases:
            self._bases[out] = self._solver.basis(tuple(fold for fold in self.every if fold not in out))
        return self._bases[out]

    def _cc_without(
        self, Y: np.ndarray, columns: slice, targets: list[torch.Tensor], out: tuple[int, ...]
    ) -> np.ndarray:
        """Fit without the folds ``out`` and return the CC in each of them, (n_out, n_alphas, n_columns); 0 where a
        voxel is constant in a fold, so that the other folds choose for it."""
        basis = self._basis(out)
        projected = self._solver.project(basis, targets)
        cc = np.empty((len(out), len(self.ridge_alphas), columns.stop - columns.start))
        for at, fold in enumerate(out):
            held_out, truth = self._solver.held_out(basis, fold), Y[self.rows[fold], columns]
            for row, alpha in enumerate(self.ridge_alphas):
                cc[at, row] = correlate(truth, (held_out @ _shrink(basis, projected, alpha)).cpu().numpy())
        return np.nan_to_num(cc, nan=0.0)


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


def _shrink(basis: Basis, projected: torch.Tensor, alphas: np.ndarray | float) -> torch.Tensor:
    """Divide by ``eigenvalue + alpha``; alphas is one, or one a voxel."""
    return projected / (basis.eigenvalues[:, None] + torch.as_tensor(alphas).to(projected))


def _best_alphas(cc: np.ndarray, ridge_alphas: tuple[float, ...]) -> np.ndarray:
    """Return the alpha of the highest CC, (n_voxels,)."""
    return np.asarray(ridge_alphas)[cc.argmax(axis=0)]


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return eigenvalues.clamp(min=0), vectors


def _rows_of_folds(X: np.ndarray, folds: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each fold, after checking the features."""
    if len(X) != len(folds):
        raise ValueError(f"rows disagree: X {len(X)}, folds {len(folds)}")
    if not np.isfinite(X).all():
        raise ValueError("X has non-finite values")
    labels = np.unique(folds)
    _check_n_folds(labels.size, 2)
    return [np.flatnonzero(folds == label) for label in labels]


def _check_n_folds(n_folds: int, n_least: int) -> None:
    if n_folds < n_least:
        raise ValueError(f"{n_folds} folds: at least {n_least} are needed to choose alphas on rows that are not scored")


def _check_responses(Y: np.ndarray, rows: list[np.ndarray]) -> None:
    n_rows = sum(len(fold) for fold in rows)
    if len(Y) != n_rows:
        raise ValueError(f"rows disagree: X {n_rows}, Y {len(Y)}")
    if not np.isfinite(Y).all():
        raise ValueError("Y has non-finite values")


def _blocks(n_voxels: int) -> list[slice]:
    return [slice(start, min(start + VOXELS_PER_BLOCK, n_voxels)) for start in range(0, n_voxels, VOXELS_PER_BLOCK)]


def _like(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like)
