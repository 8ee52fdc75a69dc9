"""Cross-validated ridge regression: one penalty per voxel, folds made of whole stories.

Weights minimise ``||X b - y||^2 + ridge_alpha ||b||^2`` for each voxel, ridge_alpha in himalaya's and scikit-learn's
units (the Huth-lab code squares its alpha). There is no intercept: z-score ``X`` and ``Y`` before.

Arithmetic is float32. The correlations that choose a penalty need only the norms of predictions, not the predictions;
these norms alone are computed in bfloat16 on processors that support it. Weights of small penalties are refined once by
their residual. The error of float32 eigenvectors grows with the largest eigenvalue / the smallest ridge_alpha: above
one limit the eigenvectors are computed in float64, above another everything is.
"""

import copy
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_encoding.core.devices import resolve_precision
from bert_encoding.regression.solvers import FORMS, Basis, Form, Targets, largest_eigenvalue, rows_of_folds, shrink

RIDGE_ALPHAS = tuple(float(alpha) for alpha in np.logspace(2, 8, 13))
BLOCK_BYTES = 2**28  # working memory of a block of voxels
ROUGH_CONDITION = 3e3  # largest eigenvalue / ridge_alpha above which float32 weights are refined
EIGH_CONDITION = 5e3  # largest eigenvalue / smallest ridge_alpha up to which features are decomposed in float32
WORST_CONDITION = 1e5  # largest eigenvalue / smallest ridge_alpha up to which float32 is accurate enough
MANY_ROWS = 2**19  # values in the held-out rows above which bfloat16 saves time
MAX_EDGE_SHARE = 0.2
MIN_EDGE_GAIN = 1e-3  # CC at an edge of the grid minus CC at its neighbour; below it a wider grid gains nothing
DECADES_FURTHER = 2


class RidgeFit(NamedTuple):
    """A fitted model; ``cv_cc`` is the mean over folds of the held-out CC, whose maximum is biased upwards."""

    weights: np.ndarray  # (n_features, n_voxels) float32
    ridge_alphas: np.ndarray  # (n_voxels,) the chosen penalties
    cv_cc: np.ndarray  # (n_alphas, n_voxels)


class CrossValidatedRidge:
    """Ridge on given features; what depends on the features alone is computed once for all voxels.

    Parameters
    ----------
    X : (n_trs, n_features), z-scored
    folds : (n_trs,) fold of each row; a story must be in one fold
    form : ``primal`` (n_features x n_features), ``kernel`` (n_trs x n_trs), or ``auto``: the smaller
    precision : ``auto``, or ``float64`` for all arithmetic

    Raises
    ------
    ValueError
        if rows disagree, values are not finite, or there are fewer than two folds, also when it is fitted.
    """

    def __init__(
        self,
        X: np.ndarray,
        folds: np.ndarray,
        ridge_alphas: tuple[float, ...] = RIDGE_ALPHAS,
        form: str = "auto",
        device: torch.device | None = None,
        precision: str = "auto",
    ) -> None:
        if len(X) != len(folds):
            raise ValueError(f"rows disagree: X {len(X)}, folds {len(folds)}")
        if not np.isfinite(X).all():
            raise ValueError("X has non-finite values")
        self.rows = rows_of_folds(folds)
        self._every = range(len(self.rows))
        _check_n_folds(len(self.rows), 2)
        self.device = device or torch.device("cpu")
        self.ridge_alphas, self._precision = ridge_alphas, precision
        self.n_rows, self.n_features = X.shape
        self._form_name = ("kernel" if X.shape[0] < X.shape[1] else "primal") if form == "auto" else form
        self._X = torch.from_numpy(X).to(self.device, torch.float32)
        self.largest_eigenvalue = largest_eigenvalue(self._X)
        self._prepare()

    def with_alphas(self, ridge_alphas: tuple[float, ...]) -> "CrossValidatedRidge":
        """Return ridge on the same features with another grid; decompositions are shared."""
        ridge = copy.copy(self)
        ridge.ridge_alphas = ridge_alphas
        if ridge._dtypes() != (self.dtype, self.eigh_dtype):
            ridge._prepare()
        return ridge

    def extended(self, beyond: Mapping[str, float]) -> "CrossValidatedRidge | None":
        """Return ridge with the grid that ``extend_alphas`` returns, None if the grid is wide enough."""
        ridge_alphas = extend_alphas(self.ridge_alphas, beyond, self.largest_eigenvalue)
        return None if ridge_alphas is None else self.with_alphas(ridge_alphas)

    def fit(self, Y: np.ndarray | Targets) -> RidgeFit:
        """Choose each voxel's ridge_alpha by the mean held-out CC over folds, then fit on all rows.

        ``Y``, (n_trs, n_voxels), is z-scored; or prepared, if several fits share it.
        """
        return RidgeFit(*self._fit(Y, lambda weights: weights))

    def fit_predict(self, Y: np.ndarray | Targets, X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit, and predict other rows, (n_rows, n_features), without keeping the weights, which may be large.

        Returns predictions, (n_rows, n_voxels) float32, and ``ridge_alphas`` and ``cv_cc`` as in ``RidgeFit``.
        """
        rows = torch.from_numpy(X).to(self.device, torch.float32)
        return self._fit(Y, lambda weights: rows @ weights)

    def _fit(self, Y: np.ndarray | Targets, read: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        parts = [
            (read(weights.to(torch.float32)).cpu().numpy(), alphas, cv_cc)
            for weights, alphas, cv_cc in map(self._fit_block, self._blocks(Y))
        ]
        return tuple(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))

    def predict_left_out(self, Y: np.ndarray | Targets) -> np.ndarray:
        """Predict each fold from the other folds, (n_trs, n_voxels) float32; ridge_alphas are chosen inside these.

        Choosing them on the fold that is then scored would raise the CC of pure noise. A fit without folds j and k is
        used twice: it scores j when k is predicted, and k when j is. At least three folds are needed.
        """
        _check_n_folds(len(self._every), 3)
        return np.concatenate([self._left_out_block(block).cpu().numpy() for block in self._blocks(Y)], axis=1)

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the types of products with responses and of the features' decompositions."""
        if self._precision != "auto" or self.largest_eigenvalue > WORST_CONDITION * min(self.ridge_alphas):
            return torch.float64, torch.float64
        trusted = self.largest_eigenvalue <= EIGH_CONDITION * min(self.ridge_alphas)
        return torch.float32, torch.float32 if trusted else torch.float64

    def _prepare(self) -> None:
        self.dtype, self.eigh_dtype = self._dtypes()
        self._form: Form = FORMS[self._form_name](self._X.to(self.dtype), self.rows, self.eigh_dtype)
        self._bases: dict[tuple[int, ...], Basis] = {}
        self._held_out: dict[int, torch.Tensor] = {}

    def _blocks(self, Y: np.ndarray | Targets) -> list[Targets]:
        targets = Targets.prepare(Y, self.rows, self.device) if isinstance(Y, np.ndarray) else Y
        size = block_bytes_per_voxel(self.n_rows, self.n_features, len(self._every), self.dtype.itemsize)
        return list(targets.blocks(max(1, BLOCK_BYTES // size)))

    def _fit_block(self, block: Targets) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Return weights, alphas and CC of one block of voxels."""
        products = self._form.products(block.Y)
        cc = torch.stack([self._cc_without(block, products, (fold,))[0] for fold in self._every]).mean(dim=0)
        alphas = _best_alphas(cc, self.ridge_alphas)
        full = self._basis(())
        weights = self._form.weights(full, shrink(full, self._form.project(full, products), alphas))
        self._refine(weights, block.Y, alphas)
        return weights, alphas.cpu().numpy(), cc.cpu().numpy()

    def _refine(self, weights: torch.Tensor, Y: torch.Tensor, alphas: torch.Tensor) -> None:
        """Correct in place, by their residual, the weights of voxels whose ridge_alpha is small for float32."""
        rough = self.largest_eigenvalue > ROUGH_CONDITION * alphas
        if self.dtype == torch.float64 or not rough.any():
            return
        first, X, alphas = weights[:, rough], self._X, alphas[rough]
        residual = X.T @ (Y[:, rough].to(X) - X @ first) - alphas.to(X) * first
        weights[:, rough] = first + self._form.invert(self._basis(()), residual, alphas)

    def _left_out_block(self, block: Targets) -> torch.Tensor:
        """Return predictions of one block of voxels, each row by a model fitted without its fold."""
        products = self._form.products(block.Y)
        inner: list[list[torch.Tensor]] = [[] for _ in self._every]
        for first, second in combinations(self._every, 2):
            cc = self._cc_without(block, products, (first, second))
            inner[second].append(cc[0])
            inner[first].append(cc[1])
        predicted = torch.empty(block.Y.shape, dtype=torch.float32, device=self.device)
        for fold in self._every:
            alphas, basis = _best_alphas(torch.stack(inner[fold]).mean(dim=0), self.ridge_alphas), self._basis((fold,))
            shrunk = shrink(basis, self._form.project(basis, products), alphas)
            predicted[self.rows[fold]] = (self._form.held_out(basis, fold) @ shrunk).to(torch.float32)
        return predicted

    def _basis(self, out: tuple[int, ...]) -> Basis:
        """Decompose all folds except ``out``, once."""
        if out not in self._bases:
            self._bases[out] = self._form.basis(tuple(fold for fold in self._every if fold not in out))
        return self._bases[out]

    def _cc_without(self, block: Targets, products: list[torch.Tensor], out: tuple[int, ...]) -> list[torch.Tensor]:
        """Fit without the folds ``out`` and return the CC in each of them, (n_alphas, n_voxels) float64."""
        basis = self._basis(out)
        projected = self._form.project(basis, products)
        return [self._cc_in_fold(basis, projected, block, fold) for fold in out]

    def _cc_in_fold(self, basis: Basis, projected: torch.Tensor, block: Targets, fold: int) -> torch.Tensor:
        """Return the CC of a fold for every ridge_alpha; 0 in constant voxels, so that other folds choose.

        With ``p_a = H D_a P`` for the centred rows ``H`` of the fold, ``y'p_a`` is ``D_a`` times ``(H'y) * P`` summed
        over the basis, and only ``||p_a||`` needs the product.
        """
        rows = self._centred(basis, fold)
        Y = block.Y[self.rows[fold]].to(rows)
        shrinkage = 1 / (basis.eigenvalues + torch.tensor(self.ridge_alphas).to(rows)[:, None])  # (n_alphas, n)
        numerators = shrinkage @ ((rows.T @ Y) * projected)
        norms = self._norms(rows, shrinkage, projected)
        cc = (numerators / (norms * block.norms[fold].to(norms))).to(torch.float64)
        is_flat = norms <= 1e-10 * np.sqrt(len(rows))
        return torch.where(is_flat | (block.norms[fold] == 0), 0.0, cc)

    def _centred(self, basis: Basis, fold: int) -> torch.Tensor:
        """Return the rows of a fold in the basis, centred; cached if only that fold is left out."""
        if fold in self._held_out and self._bases.get((fold,)) is basis:
            return self._held_out[fold]
        rows = self._form.held_out(basis, fold)
        rows -= rows.mean(dim=0)
        if self._bases.get((fold,)) is basis:
            self._held_out[fold] = rows
        return rows

    def _norms(self, rows: torch.Tensor, shrinkage: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the norm of each voxel's prediction for every ridge_alpha, (n_alphas, n_voxels)."""
        fast = rows.dtype  # with few rows, bfloat16 would lose accuracy and save no time
        if self._precision != "float64" and rows.numel() >= MANY_ROWS:
            fast = torch.bfloat16 if resolve_precision("auto", self.device) == "bfloat16" else torch.float32
        projected = projected.to(fast)
        predicted = ((rows * shrunk).to(fast) @ projected for shrunk in shrinkage)
        exact = (part if part.dtype == torch.float64 else part.float() for part in predicted)
        return torch.stack([part.square().sum(dim=0).sqrt() for part in exact]).to(rows)


def block_bytes_per_voxel(n_rows: int, n_features: int, n_folds: int, itemsize: int) -> int:
    """Return the working memory per voxel: products of each fold, their sum, projections, and a fold's prediction."""
    n = min(n_rows, n_features)
    return itemsize * (n * (n_folds + 4) + 3 * n_rows // n_folds) + 4 * n_rows


def share_beyond_grid(cv_cc: np.ndarray, over_smoothed: bool = False) -> dict[str, float]:
    """Return the share of voxels that would gain from a ridge_alpha beyond the low and the high edge of the grid.

    Parameters
    ----------
    cv_cc : (n_alphas, n_voxels), ridge_alphas ascending
    over_smoothed : every ridge_alpha exceeds the largest eigenvalue, so predictions differ in scale alone
    """
    if len(cv_cc) < 2:
        return {"low": 0.0, "high": 0.0}
    best = cv_cc.argmax(axis=0)
    low = (best == 0) & (over_smoothed | (cv_cc[0] - cv_cc[1] > MIN_EDGE_GAIN))
    high = (best == len(cv_cc) - 1) & (cv_cc[-1] - cv_cc[-2] > MIN_EDGE_GAIN)
    return {"low": float(low.mean()), "high": float(high.mean())}


def extend_alphas(
    grid: tuple[float, ...], share: Mapping[str, float], largest_eigenvalue: float
) -> tuple[float, ...] | None:
    """Return the grid extended by two decades beyond each edge that limits more than a fifth of the voxels, else None.

    Values are added above only up to ten times the largest eigenvalue: beyond, predictions change in scale alone, and
    rounding would decide. A grid of one value is never extended.
    """
    ordered = sorted(grid)
    if len(ordered) < 2:
        return None
    step = np.log10(ordered[-1] / ordered[0]) / (len(ordered) - 1)
    n_added = max(1, round(DECADES_FURTHER / step))
    further = 10 ** np.linspace(DECADES_FURTHER / n_added, DECADES_FURTHER, n_added)
    lower = tuple((ordered[0] / further).tolist()) if share["low"] > MAX_EDGE_SHARE else ()
    may_rise = share["high"] > MAX_EDGE_SHARE and ordered[-1] < 10 * largest_eigenvalue
    upper = tuple((ordered[-1] * further).tolist()) if may_rise else ()
    return (*lower[::-1], *ordered, *upper) if lower or upper else None


def _best_alphas(cc: torch.Tensor, ridge_alphas: tuple[float, ...]) -> torch.Tensor:
    """Return the ridge_alpha of the highest CC, (n_voxels,)."""
    return torch.tensor(ridge_alphas, dtype=torch.float64, device=cc.device)[cc.argmax(dim=0)]


def _check_n_folds(n_folds: int, n_least: int) -> None:
    if n_folds < n_least:
        raise ValueError(
            f"{n_folds} folds: at least {n_least} are needed to choose ridge_alphas on rows that are not scored"
        )
