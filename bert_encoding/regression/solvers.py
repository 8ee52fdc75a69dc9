"""The two forms of the ridge equations; products over the rows of each fold are computed once.

Leaving folds out then costs one subtraction and one eigendecomposition, which serves every ridge_alpha.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch


class Basis(NamedTuple):
    """The eigenvectors in which ridge on some folds is solved for every ridge_alpha at once."""

    folds: tuple[int, ...]
    eigenvalues: torch.Tensor  # (n,)
    vectors: torch.Tensor  # (n_features, n) or (n_trs, n)


class Form(Protocol):
    """One form of the equations.

    Parameters
    ----------
    X : (n_trs, n_features), in the type of the products with responses
    rows : row numbers of each fold
    dtype : type of the products of features with features, and of their decompositions
    """

    def __init__(self, X: torch.Tensor, rows: list[np.ndarray], dtype: torch.dtype) -> None: ...

    def basis(self, folds: tuple[int, ...]) -> Basis:
        """Decompose the training rows of some folds."""

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        """Return the rows of another fold in the basis, (n_fold_rows, n)."""

    def products(self, Y: torch.Tensor) -> list[torch.Tensor]:
        """Return the input of ``project`` for some voxels, (n_trs, n_voxels): one product per fold."""

    def project(self, basis: Basis, products: list[torch.Tensor]) -> torch.Tensor:
        """Return the responses of the training rows in the basis, (n, n_voxels)."""

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        """Return weights of the features, (n_features, n_voxels)."""

    def invert(self, basis: Basis, right: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        """Return ``(X'X + alpha)^-1 right`` over the rows of ``basis``, (n_features, n_voxels)."""


class PrimalForm:
    """``X'X = V S V'`` gives ``b = V (S + alpha)^-1 V'X'y``; for more rows than features."""

    def __init__(self, X: torch.Tensor, rows: list[np.ndarray], dtype: torch.dtype) -> None:
        self.X, self.rows, self.dtype = X, rows, dtype
        self.gram = self._gram(X)

    def basis(self, folds: tuple[int, ...]) -> Basis:
        gram = self.gram.clone()
        for fold in set(range(len(self.rows))) - set(folds):
            gram -= self._gram(self.X[self.rows[fold]])
        return Basis(folds, *_eigh(gram, self.X.dtype))

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        return self.X[self.rows[fold]] @ basis.vectors

    def products(self, Y: torch.Tensor) -> list[torch.Tensor]:
        return [self.X[rows].T @ Y[rows].to(self.X) for rows in self.rows]

    def project(self, basis: Basis, products: list[torch.Tensor]) -> torch.Tensor:
        return basis.vectors.T @ sum((products[f] for f in basis.folds), torch.zeros_like(products[0]))

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        return basis.vectors @ shrunk

    def invert(self, basis: Basis, right: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        return basis.vectors @ shrink(basis, basis.vectors.T @ right, alphas)

    def _gram(self, X: torch.Tensor) -> torch.Tensor:
        X = X.to(self.dtype)
        return X.T @ X


class KernelForm:
    """``XX' = U S U'`` gives ``b = X'U (S + alpha)^-1 U'y``; for more features than rows."""

    def __init__(self, X: torch.Tensor, rows: list[np.ndarray], dtype: torch.dtype) -> None:
        self.X, self.rows = X, rows
        X = X.to(dtype)
        self.kernel = X @ X.T

    def basis(self, folds: tuple[int, ...]) -> Basis:
        train = _rows(self.rows, folds)
        return Basis(folds, *_eigh(self.kernel[train][:, train], self.X.dtype))

    def held_out(self, basis: Basis, fold: int) -> torch.Tensor:
        kernel = self.kernel[self.rows[fold]][:, _rows(self.rows, basis.folds)]
        return (kernel @ basis.vectors.to(kernel)).to(self.X)

    def products(self, Y: torch.Tensor) -> list[torch.Tensor]:
        return [Y[rows].to(self.X) for rows in self.rows]

    def project(self, basis: Basis, products: list[torch.Tensor]) -> torch.Tensor:
        return basis.vectors.T @ torch.cat([products[f] for f in basis.folds])

    def weights(self, basis: Basis, shrunk: torch.Tensor) -> torch.Tensor:
        return self.X[_rows(self.rows, basis.folds)].T @ (basis.vectors @ shrunk)

    def invert(self, basis: Basis, right: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        X = self.X[_rows(self.rows, basis.folds)]
        inside = basis.vectors @ shrink(basis, basis.vectors.T @ (X @ right), alphas)
        return (right - X.T @ inside) / alphas.to(right)  # Woodbury's identity


FORMS: dict[str, type[Form]] = {"primal": PrimalForm, "kernel": KernelForm}


def shrink(basis: Basis, projected: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Divide by ``eigenvalue + alpha`` of each voxel, (n, n_voxels)."""
    return projected / (basis.eigenvalues[:, None] + alphas.to(projected))


def largest_eigenvalue(X: torch.Tensor, n_steps: int = 30) -> float:
    """Return the largest eigenvalue of ``X'X`` by power iteration, accurate to a few percent from below."""
    vector = torch.ones(X.shape[1], dtype=X.dtype, device=X.device) + torch.linspace(0, 1, X.shape[1]).to(X)
    eigenvalue = 0.0
    for _ in range(n_steps):
        vector = vector / torch.linalg.vector_norm(vector).clamp(min=torch.finfo(X.dtype).tiny)
        vector = X.T @ (X @ vector)
        eigenvalue = float(torch.linalg.vector_norm(vector))
    return eigenvalue


def _rows(rows: list[np.ndarray], folds: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([rows[fold] for fold in folds])


def _eigh(symmetric: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return eigenvalues.clamp(min=0).to(dtype), vectors.to(dtype)


class Targets(NamedTuple):
    """Responses of some voxels to the rows that ridge fits, on the device where ridge computes."""

    Y: torch.Tensor  # (n_trs, n_voxels) float32 or float64
    norms: torch.Tensor  # (n_folds, n_voxels) norms of the centred rows of each fold; 0 in constant voxels

    @classmethod
    def prepare(cls, Y: np.ndarray, rows: list[np.ndarray], device: torch.device | None = None) -> "Targets":
        """Check responses, (n_trs, n_voxels), against the rows of each fold, and move them to the device."""
        n_rows = sum(map(len, rows))
        if len(Y) != n_rows:
            raise ValueError(f"rows disagree: X {n_rows}, Y {len(Y)}")
        if not np.isfinite(Y).all():
            raise ValueError("Y has non-finite values")
        moved = torch.from_numpy(Y).to(device or "cpu")
        return cls(moved, torch.stack([_centred_norms(moved[fold]) for fold in rows]))

    def blocks(self, n_columns: int) -> Iterator["Targets"]:
        """Yield the voxels ``n_columns`` at a time."""
        for start in range(0, self.Y.shape[1], n_columns):
            columns = slice(start, start + n_columns)
            yield Targets(self.Y[:, columns], self.norms[:, columns])

    @property
    def n_bytes(self) -> int:
        return self.Y.nbytes + self.norms.nbytes


def rows_of_folds(folds: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each fold label, (n_trs,)."""
    return [np.flatnonzero(folds == label) for label in np.unique(folds)]


def _centred_norms(Y: torch.Tensor) -> torch.Tensor:
    centred = Y - Y.mean(dim=0)
    norms = centred.square_().sum(dim=0).sqrt()
    norms[Y.amax(dim=0) == Y.amin(dim=0)] = 0  # the mean of equal values is rounded
    return norms
