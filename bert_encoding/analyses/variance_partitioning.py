"""Variance partitioning: the variance of a voxel that each feature space explains alone, and that several share.

Ridge is fitted on every subset of the spaces, and inclusion and exclusion over the scores of these nested fits gives
the parts (Lescroart et al. 2015, Frontiers in Computational Neuroscience 9:135; de Heer et al. 2017, Journal of
Neuroscience 37:6539). Explained variance is the squared CC with its sign, ``cc |cc|``. Why not R2, what one penalty for
all spaces costs, and how the test of a unique part is calibrated: docs/variance_partitioning.md.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_encoding.core.errors import InputError
from bert_encoding.regression.banded_ridge import BandedRidge
from bert_encoding.regression.ridge import CrossValidatedRidge, extend_alphas, share_beyond_grid
from bert_encoding.statistics.correlation import VOXELS_PER_BLOCK, correlate
from bert_encoding.statistics.permutation import N_PERMUTATIONS, block_permutation_p, count_orders
from bert_encoding.trial.scoring import Design

ROUNDING = 1e-6  # of a prediction's norm: a smaller residual is rounding error


class PermutationSettings(NamedTuple):
    """Stories of the scored rows, number of permutations, and seed of a block permutation test."""

    story_of_row: np.ndarray
    n_permutations: int
    seed: int

    def p(self, Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Return p of each voxel's CC, NaN where the stories are too short; see ``block_permutation_p``."""
        if count_orders(self.story_of_row) < self.n_permutations:
            return np.full(Y.shape[1], np.nan)
        return block_permutation_p(Y, predicted, self.story_of_row, n_permutations=self.n_permutations, seed=self.seed)


def unique_p(Y: np.ndarray, joint: np.ndarray, without: np.ndarray, permutation: PermutationSettings) -> np.ndarray:
    """Return one-sided p of what the joint prediction adds to a prediction without one space, (n_voxels,).

    The statistic is the partial CC of response and joint prediction given the other prediction, so the scale of neither
    prediction matters. Blocks of the joint prediction's residual are permuted (Kennedy 1995, Journal of Business &
    Economic Statistics 13:85). ``Y``, ``joint`` and ``without`` are (n_rows, n_voxels).
    """
    p = np.empty(Y.shape[1])
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        p[block] = permutation.p(*(residual(values[:, block], without[:, block]) for values in (Y, joint)))
    return p


def residual(values: np.ndarray, regressors: np.ndarray) -> np.ndarray:
    """Return the residual of each column of ``values`` after least squares on that column of ``regressors``.

    All arrays are (n_rows, n_voxels); the residual has mean 0. A constant regressor explains nothing.
    """
    y, x = (array - array.mean(axis=0, dtype=np.float64) for array in (values, regressors))
    power = np.einsum("tv,tv->v", x, x)
    slope = np.divide(np.einsum("tv,tv->v", x, y), power, out=np.zeros_like(power), where=power > 0)
    rest = y - slope * x
    rest[:, np.linalg.norm(rest, axis=0) <= ROUNDING * np.linalg.norm(y, axis=0)] = 0
    return rest


Subset = tuple[str, ...]
RESPONSES: Subset = ()  # the key of responses in the cache of predictions


class NestedScores(NamedTuple):
    """Scores of one subset of the feature spaces in one subject, on the scored rows."""

    cc: np.ndarray  # (n_voxels,)
    r2: np.ndarray  # (n_voxels,)
    story_cc: np.ndarray  # (n_scored_stories, n_voxels) CC inside each; NaN where a response is constant there
    p: np.ndarray  # (n_voxels,) of the CC; NaN where the scored stories are too short for a permutation test
    ridge_alphas: np.ndarray  # (1, n_voxels), or (n_spaces, n_voxels) of banded ridge
    grid: tuple[float, ...]  # of penalties to choose from, the same in all subsets of a subject
    pressing_low: float = 0.0  # share of voxels that want a penalty below the grid (``ridge.share_beyond_grid``)
    p_unique: np.ndarray | None = None  # (n_voxels,) of what one space adds to all others; None for several spaces

    @property
    def explained(self) -> np.ndarray:
        """Explained variance, (n_voxels,): the squared CC with its sign."""
        return np.asarray(self.cc * np.abs(self.cc), np.float64)

    @property
    def edge_share(self) -> dict[str, float]:
        """Share of voxels whose penalty (of banded ridge the smallest) is at an edge of the grid."""
        smallest = self.ridge_alphas.min(axis=0)
        edges = {"low": min(self.grid), "high": max(self.grid)}
        return {name: float(np.mean(np.isclose(smallest, edge, rtol=1e-3))) for name, edge in edges.items()}


class RidgeSettings(NamedTuple):
    """The grid of penalties, whether joint fits have one penalty per space (banded), the seed and the device."""

    ridge_alphas: tuple[float, ...]
    banded: bool = False
    seed: int = 0
    device: torch.device | None = None


class SubsetFit(NamedTuple):
    """The fit of one subset to one subject, without its predictions, which are cached (see ``NestedScores``)."""

    ridge_alphas: np.ndarray
    grid: tuple[float, ...]
    wider_grid: tuple[float, ...] | None  # that the voxels need
    pressing_low: float


# yields responses of fit and scored rows, z-scored by the fit rows, (n_rows, n_columns) each
Panels = Callable[[], Iterator[tuple[np.ndarray, ...]]]  # called once or twice per subset
Fits = dict[tuple[str, Subset], SubsetFit]  # by subject and subset


class PredictionCache:
    """Predictions and scored responses of one subject, by number, in one file per panel: they may exceed memory."""

    def __init__(self, folder: Path, subject: int) -> None:
        self.folder, self.subject = folder, subject

    def save(self, subset: Subset, panel: int, values: np.ndarray) -> None:
        try:
            np.save(self._file(subset, panel), values)
        except OSError as error:
            size = f"{values.nbytes / 2**20:.0f} MiB of predictions"
            raise InputError(f"{self.folder}: no room for {size} ({error.strerror or error}); free some") from None

    def load(self, subset: Subset, panel: int) -> np.ndarray:
        return np.asarray(np.load(self._file(subset, panel)))

    def n_panels(self, subset: Subset) -> int:
        return sum(1 for _ in self.folder.glob(f"{self.subject}.{'+'.join(subset)}.*.npy"))

    def _file(self, subset: Subset, panel: int) -> Path:
        return self.folder / f"{self.subject}.{'+'.join(subset)}.{panel}.npy"


def nested_scores(
    designs: Mapping[str, Design],
    panels: Mapping[str, Panels],
    settings: RidgeSettings,
    n_permutations: int = N_PERMUTATIONS,
    folder: Path | None = None,
) -> dict[str, dict[Subset, NestedScores]]:
    """Fit ridge on every non-empty subset of the feature spaces, whose designs have the same rows and folds; score it.

    All subsets of a subject share one grid of penalties, because a difference between grids would count as unique or
    shared variance. If the voxels need a wider grid in any subset, all subsets are fitted again on the union of these
    grids. Temporary files take 4 bytes per scored row and voxel, of the responses and of every subset.

    Raises InputError if the disk is full.
    """
    spaces = tuple(designs)
    permutation = PermutationSettings(designs[spaces[0]].scored_story, n_permutations, settings.seed)
    with tempfile.TemporaryDirectory(dir=folder, prefix="predictions-") as name:
        caches = {subject: PredictionCache(Path(name), number) for number, subject in enumerate(panels)}
        fits = _fit_subsets(designs, panels, settings, caches, dict.fromkeys(panels, settings.ridge_alphas))
        fits |= _fit_subsets(designs, panels, settings, caches, _wider_grids(fits))
        return {subject: _score_subject(caches[subject], subject, spaces, fits, permutation) for subject in panels}


def subsets_of(spaces: Subset) -> list[Subset]:
    """Return every non-empty subset, small ones first, in the order of ``spaces``."""
    return [subset for size in range(1, len(spaces) + 1) for subset in combinations(spaces, size)]


def partition_variance(explained: Mapping[Subset, np.ndarray]) -> dict[Subset, np.ndarray]:
    """Return the variance that exactly the spaces of each subset share, subset -> (n_voxels,).

    A set of spaces explains the sum of all parts that any of its spaces shares. So the parts within a set T sum to
    ``E(all) - E(all but T)``, and inclusion and exclusion gives each single part:

        part(T) = sum over S in T of (-1)^(|T| - |S|) (E(all) - E(all but S))

    Of two spaces: ``part(A) = E(A, B) - E(B)`` is unique to A, ``part(A, B) = E(A) + E(B) - E(A, B)`` shared. All parts
    add up to E(all). ``explained`` maps every non-empty subset to E, (n_voxels,).
    """
    everything = max(explained, key=len)
    total = explained[everything].astype(np.float64)

    def inside(part: Subset) -> np.ndarray:
        rest = tuple(space for space in everything if space not in part)
        return total - explained[rest] if rest else total

    return {
        part: np.asarray(sum((-1) ** (len(part) - len(smaller)) * inside(smaller) for smaller in subsets_of(part)))
        for part in subsets_of(everything)
    }


def r2_score(Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the explained share of variance, ``1 - sum (y - p)^2 / sum y^2`` with both about their means, (n_voxels,).

    Means are subtracted because ridge has no intercept. NaN where a response is constant.
    """
    r2 = np.full(Y.shape[1], np.nan)
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        y, p = (values[:, block] - values[:, block].mean(axis=0, dtype=np.float64) for values in (Y, predicted))
        varies = np.ptp(Y[:, block], axis=0) > 0
        r2[block][varies] = 1 - np.square(y - p).sum(axis=0)[varies] / np.square(y).sum(axis=0)[varies]
    return r2


def _make_ridge(designs: Sequence[Design], settings: RidgeSettings) -> CrossValidatedRidge | BandedRidge:
    X, folds = [design.fit for design in designs], designs[0].folds
    if settings.banded and len(X) > 1:
        return BandedRidge(X, folds, settings.ridge_alphas, seed=settings.seed, device=settings.device)
    return CrossValidatedRidge(np.hstack(X), folds, settings.ridge_alphas, device=settings.device)


def _fit_subsets(
    designs: Mapping[str, Design],
    panels: Mapping[str, Panels],
    settings: RidgeSettings,
    caches: Mapping[str, PredictionCache],
    grids: Mapping[str, tuple[float, ...]],
) -> Fits:
    """Fit every subset to each subject that has a grid, on that grid."""
    fits: Fits = {}
    for subset in subsets_of(tuple(designs)) if grids else ():
        chosen = [designs[space] for space in subset]
        ridge = _make_ridge(chosen, settings)  # decomposed once for all subjects
        X = np.hstack([design.scored for design in chosen])
        for subject, grid in grids.items():
            fits[subject, subset] = _fit_panels(ridge.with_alphas(grid), X, panels[subject], caches[subject], subset)
    return fits


def _fit_panels(
    ridge: CrossValidatedRidge | BandedRidge, X: np.ndarray, panels: Panels, cache: PredictionCache, subset: Subset
) -> SubsetFit:
    """Fit a subject panel by panel, and cache the predictions for the rows ``X``."""
    fits = []
    for number, (Y, Y_scored) in enumerate(panels()):
        predicted, ridge_alphas, cv_cc = ridge.fit_predict(Y, X)
        cache.save(subset, number, predicted)
        cache.save(RESPONSES, number, Y_scored)
        fits.append((np.atleast_2d(ridge_alphas), cv_cc))
    ridge_alphas, cv_cc = (np.concatenate(parts, axis=1) for parts in zip(*fits, strict=True))
    share = share_beyond_grid(cv_cc)
    wider = extend_alphas(ridge.ridge_alphas, share, ridge.largest_eigenvalue)
    return SubsetFit(ridge_alphas, ridge.ridge_alphas, wider, share["low"])


def _wider_grids(fits: Fits) -> dict[str, tuple[float, ...]]:
    """Return the union of the wider grids of each subject that needs one."""
    unions: dict[str, set[float]] = {}
    for (subject, _), fit in fits.items():
        unions.setdefault(subject, set()).update(fit.wider_grid or ())
    return {subject: tuple(sorted(union)) for subject, union in unions.items() if union}


def _score_subject(
    cache: PredictionCache, subject: str, spaces: Subset, fits: Fits, permutation: PermutationSettings
) -> dict[Subset, NestedScores]:
    """Score every subset from the cached predictions."""
    scores = {subset: _score(cache, subset, permutation, fits[subject, subset]) for subset in subsets_of(spaces)}
    for space in spaces if len(spaces) > 1 else ():
        scores[(space,)] = scores[(space,)]._replace(p_unique=_unique_p(cache, spaces, space, permutation))
    return scores


def _score(cache: PredictionCache, subset: Subset, permutation: PermutationSettings, fit: SubsetFit) -> NestedScores:
    """Score the predictions of one subset, a panel at a time."""
    stories = [permutation.story_of_row == story for story in np.unique(permutation.story_of_row)]
    panels = []
    for number in range(cache.n_panels(subset)):
        Y, predicted = cache.load(RESPONSES, number), cache.load(subset, number)
        story_cc = np.stack([correlate(Y[rows], predicted[rows]) for rows in stories])
        panels.append((correlate(Y, predicted), r2_score(Y, predicted), story_cc, permutation.p(Y, predicted)))
    cc, r2, story_cc, p = (np.concatenate(part, axis=-1) for part in zip(*panels, strict=True))
    return NestedScores(cc, r2, story_cc, p, fit.ridge_alphas, fit.grid, fit.pressing_low)


def _unique_p(cache: PredictionCache, spaces: Subset, space: str, permutation: PermutationSettings) -> np.ndarray:
    """Return p of what one space adds to all others together, (n_voxels,)."""
    rest = tuple(name for name in spaces if name != space)
    p = []
    for number in range(cache.n_panels(spaces)):
        Y, joint, without = (cache.load(key, number) for key in (RESPONSES, spaces, rest))
        p.append(unique_p(Y, joint, without, permutation))
    return np.concatenate(p)
