"""How much of a voxel's variance does each feature space explain alone, and how much do several share?

Ridge is fitted on every subset of the spaces, and set arithmetic over the scores of these nested fits answers
(Lescroart et al. 2015, Frontiers in Computational Neuroscience 9:135; de Heer et al. 2017, Journal of Neuroscience
37:6539).

Explained variance is here the squared CC with its sign, ``cc |cc|``: what a prediction explains at its best scale, and
below 0 if it is upside down, so that voxels of noise average to 0. Why not R2, which is reported too:
docs/variance_partitioning.md.

In return the squared CC of two uncorrelated spaces adds up only where the joint fit weighs them against each other as
well as each is worth. One penalty for all need not: what the joint fit loses by it is missing from the unique parts and
counted as shared. One penalty per space (``regression/banded_ridge.py``) mends that. On held-out rows parts can be
negative; cutting them off at 0 would make noise count as explained.

Whether a space tells of a voxel what the others do not is tested by ``unique_p``.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_encoding.core.errors import InputError
from bert_encoding.regression.banded_ridge import BandedRidge
from bert_encoding.regression.ridge import CrossValidatedRidge, extend_alphas, share_beyond_grid
from bert_encoding.statistics.correlation import VOXELS_PER_BLOCK, correlate
from bert_encoding.statistics.permutation import N_PERMUTATIONS, block_permutation_p, count_orders
from bert_encoding.trial.scoring import Design

NOTHING_LEFT = 1e-6  # of a prediction's norm: what is left is rounding


class Chance(NamedTuple):
    """How chance is told from success: stories of the scored rows, permutations and their seed."""

    story_of_row: np.ndarray
    n_permutations: int
    seed: int

    def p(self, Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Return p of each voxel's CC, NaN where the stories are too short; see ``block_permutation_p``."""
        if count_orders(self.story_of_row) < self.n_permutations:
            return np.full(Y.shape[1], np.nan)
        options = {"n_permutations": self.n_permutations, "seed": self.seed}
        return block_permutation_p(Y, predicted, self.story_of_row, **options)


def unique_p(Y: np.ndarray, joint: np.ndarray, without: np.ndarray, chance: Chance) -> np.ndarray:
    """Return p of what the joint prediction knows and the one without a space does not, one-sided, (n_voxels,).

    The statistic is the partial CC of response and joint prediction given the other prediction: the CC of what least
    squares on the latter leaves of both. Blocks of what is left of the joint prediction are permuted (Kennedy 1995,
    Journal of Business & Economic Statistics 13:85). So neither prediction's scale matters. Why not a plain
    difference, and the measured calibration: docs/variance_partitioning.md.

    Parameters
    ----------
    Y, joint, without : (n_rows, n_voxels) responses, predictions by all spaces, and by all but one
    """
    p = np.empty(Y.shape[1])
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        p[block] = chance.p(*(what_is_left(values[:, block], without[:, block]) for values in (Y, joint)))
    return p


def what_is_left(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return what least squares on one known course leaves of each column, (n_rows, n_voxels) float64 of mean 0.

    Parameters
    ----------
    values, known : (n_rows, n_voxels); a constant column of ``known`` tells nothing
    """
    y, x = (array - array.mean(axis=0, dtype=np.float64) for array in (values, known))
    power = np.einsum("tv,tv->v", x, x)
    slope = np.divide(np.einsum("tv,tv->v", x, y), power, out=np.zeros_like(power), where=power > 0)
    left = y - slope * x
    left[:, np.linalg.norm(left, axis=0) <= NOTHING_LEFT * np.linalg.norm(y, axis=0)] = 0
    return left


Subset = tuple[str, ...]
RESPONSES: Subset = ()  # under which responses are kept beside predictions


class Panel(NamedTuple):
    """The responses of some voxels, z-scored by constants of the fit rows.

    Attributes
    ----------
    fit, scored : (n_fit_rows, n_columns) and (n_scored_rows, n_columns)
    """

    fit: np.ndarray
    scored: np.ndarray


class NestedScores(NamedTuple):
    """How well one subset of the feature spaces predicts one subject.

    Attributes
    ----------
    cc, r2 : (n_voxels,) on the scored rows
    story_cc : (n_scored_stories, n_voxels) CC inside each; NaN where a response is constant there
    p : (n_voxels,) of the CC; NaN where the scored stories are too short for a permutation test
    ridge_alphas : (1, n_voxels), or (n_spaces, n_voxels) of banded ridge
    grid : penalties that could be chosen, the same in all subsets of a subject
    pressing_low : share of voxels that want a penalty below the grid (``ridge.share_beyond_grid``)
    p_unique : (n_voxels,) of one space, what it tells beyond all others together; None of several spaces
    """

    cc: np.ndarray
    r2: np.ndarray
    story_cc: np.ndarray
    p: np.ndarray
    ridge_alphas: np.ndarray
    grid: tuple[float, ...]
    pressing_low: float = 0.0
    p_unique: np.ndarray | None = None

    @property
    def explained(self) -> np.ndarray:
        """Explained variance, (n_voxels,): the squared CC with its sign."""
        return np.asarray(self.cc * np.abs(self.cc), np.float64)

    @property
    def edge_share(self) -> dict[str, float]:
        """Share of voxels whose penalty (of banded ridge the smallest) lies at either edge of the grid."""
        smallest = self.ridge_alphas.min(axis=0)
        edges = {"low": min(self.grid), "high": max(self.grid)}
        return {name: float(np.mean(np.isclose(smallest, edge, rtol=1e-3))) for name, edge in edges.items()}


class Fitting(NamedTuple):
    """How ridge is fitted: its grid, whether with one penalty per space in the joint fits, and where it runs."""

    ridge_alphas: tuple[float, ...]
    banded: bool = False
    seed: int = 0
    device: torch.device | None = None


class Fit(NamedTuple):
    """How the fit of one subset to one subject went; its predictions lie in files.

    Attributes
    ----------
    ridge_alphas : (1, n_voxels), or (n_spaces, n_voxels) of banded ridge
    grid, wanted : penalties that could be chosen, and the wider grid that the voxels ask for, if any
    pressing_low : as in ``NestedScores``
    """

    ridge_alphas: np.ndarray
    grid: tuple[float, ...]
    wanted: tuple[float, ...] | None
    pressing_low: float


Panels = Callable[[], Iterator[Panel]]
Fits = dict[tuple[str, Subset], Fit]  # by subject and subset


class Kept:
    """Predictions and scored responses of one subject, panel by panel, in files: together they may exceed memory.

    Parameters
    ----------
    folder : where
    subject : number of the subject
    """

    def __init__(self, folder: Path, subject: int) -> None:
        self.folder, self.subject = folder, subject

    def save(self, subset: Subset, panel: int, values: np.ndarray) -> None:
        try:
            np.save(self._file(subset, panel), values)
        except OSError as error:
            size = f"{values.nbytes / 2**20:.0f} MiB of predictions"
            raise InputError(f"{self.folder}: no room for {size} ({error.strerror or error}); make some") from None

    def load(self, subset: Subset, panel: int) -> np.ndarray:
        return np.asarray(np.load(self._file(subset, panel)))

    def drop(self, subset: Subset) -> None:
        for panel in range(self.n_panels(subset)):
            self._file(subset, panel).unlink()

    def n_panels(self, subset: Subset) -> int:
        return sum(1 for _ in self.folder.glob(f"{self.subject}.{'+'.join(subset)}.*.npy"))

    def _file(self, subset: Subset, panel: int) -> Path:
        return self.folder / f"{self.subject}.{'+'.join(subset)}.{panel}.npy"


def nested_scores(
    designs: Mapping[str, Design],
    panels: Mapping[str, Panels],
    fitting: Fitting,
    n_permutations: int = N_PERMUTATIONS,
    folder: Path | None = None,
) -> dict[str, dict[Subset, NestedScores]]:
    """Fit ridge on every non-empty subset of the feature spaces and score its predictions.

    All subsets of a subject are fitted on one grid of penalties, for a difference of grids would be counted as unique
    or shared. Where more than a fifth of its voxels want a penalty beyond an edge of the grid in any subset
    (``ridge.extend_alphas``), all are fitted once more, on all penalties that any subset asks for.

    Parameters
    ----------
    designs : features a space; all have the same rows and folds
    panels : subject -> function that yields its voxels part by part; called once or twice a subset
    folder : where predictions are kept meanwhile, 4 bytes a scored row and voxel, of the responses and of every subset;
        by default the system's folder of temporary files

    Returns
    -------
    subject -> subset -> scores

    Raises
    ------
    InputError
        if there is no room for predictions.
    """
    spaces = tuple(designs)
    chance = Chance(designs[spaces[0]].scored_story, n_permutations, fitting.seed)
    with tempfile.TemporaryDirectory(dir=folder, prefix="predictions-") as name:
        kept = {subject: Kept(Path(name), at) for at, subject in enumerate(panels)}
        fits = _fit_subsets(designs, panels, fitting, kept, dict.fromkeys(panels, fitting.ridge_alphas))
        fits |= _fit_subsets(designs, panels, fitting, kept, _wider_grids(fits))
        return {subject: _score_subject(kept[subject], subject, spaces, fits, chance) for subject in panels}


def subsets_of(spaces: Subset) -> list[Subset]:
    """Return every non-empty subset, small ones first, in the order of ``spaces``."""
    return [subset for size in range(1, len(spaces) + 1) for subset in combinations(spaces, size)]


def partition_variance(explained: Mapping[Subset, np.ndarray]) -> dict[Subset, np.ndarray]:
    """Return what each subset of the spaces explains and no other space does, subset -> (n_voxels,).

    What a set T of spaces explains together is the sum of all parts that one of them has a share in. So the parts that
    lie wholly inside T sum to ``E(all) - E(all but T)``, and inclusion and exclusion gives each single part:

        part(T) = sum over S in T of (-1)^(|T| - |S|) (E(all) - E(all but S))

    Of two spaces: ``part(A) = E(A, B) - E(B)`` is unique to A, ``part(A, B) = E(A) + E(B) - E(A, B)`` shared. All parts
    add up to E(all).

    Parameters
    ----------
    explained : every non-empty subset -> E, the variance that it explains, (n_voxels,)
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

    Means are taken out since ridge has no intercept, and CC ignores them too. NaN where a response is constant.

    Parameters
    ----------
    Y, predicted : (n_rows, n_voxels)
    """
    r2 = np.full(Y.shape[1], np.nan)
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        y, p = (values[:, block] - values[:, block].mean(axis=0, dtype=np.float64) for values in (Y, predicted))
        varies = np.ptp(Y[:, block], axis=0) > 0
        r2[block][varies] = 1 - np.square(y - p).sum(axis=0)[varies] / np.square(y).sum(axis=0)[varies]
    return r2


def _make_ridge(designs: Sequence[Design], fitting: Fitting) -> CrossValidatedRidge | BandedRidge:
    X, folds = [design.fit for design in designs], designs[0].folds
    if fitting.banded and len(X) > 1:
        options: dict[str, Any] = {"seed": fitting.seed, "device": fitting.device}
        return BandedRidge(X, folds, fitting.ridge_alphas, **options)
    return CrossValidatedRidge(np.hstack(X), folds, fitting.ridge_alphas, device=fitting.device)


def _fit_subsets(
    designs: Mapping[str, Design],
    panels: Mapping[str, Panels],
    fitting: Fitting,
    kept: Mapping[str, Kept],
    grids: Mapping[str, tuple[float, ...]],
) -> Fits:
    """Fit every subset to the subjects that have a grid, on that grid."""
    fits: Fits = {}
    for subset in subsets_of(tuple(designs)) if grids else ():
        chosen = [designs[space] for space in subset]
        ridge = _make_ridge(chosen, fitting)  # decomposed once for all subjects
        X = np.hstack([design.scored for design in chosen])
        for subject, grid in grids.items():
            fits[subject, subset] = _fit_panels(ridge.with_alphas(grid), X, panels[subject], kept[subject], subset)
    return fits


def _fit_panels(
    ridge: CrossValidatedRidge | BandedRidge, X: np.ndarray, parts: Panels, kept: Kept, subset: Subset
) -> Fit:
    """Fit a subject panel by panel, and keep the predictions of the rows ``X``."""
    found = []
    for at, panel in enumerate(parts()):
        predicted, alphas, cv_cc = ridge.fit_predict(panel.fit, X)
        kept.save(subset, at, predicted)
        kept.save(RESPONSES, at, panel.scored)
        found.append((np.atleast_2d(alphas), cv_cc))
    ridge_alphas, cv_cc = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    share = share_beyond_grid(cv_cc)
    wanted = extend_alphas(ridge.ridge_alphas, share, ridge.largest_eigenvalue)
    return Fit(ridge_alphas, ridge.ridge_alphas, wanted, share["low"])


def _wider_grids(fits: Fits) -> dict[str, tuple[float, ...]]:
    """Return, of each subject that asks for more penalties in any subset, all that it asks for."""
    wanted: dict[str, set[float]] = {}
    for (subject, _), fit in fits.items():
        wanted.setdefault(subject, set()).update(fit.wanted or ())
    return {subject: tuple(sorted(grid)) for subject, grid in wanted.items() if grid}


def _score_subject(kept: Kept, subject: str, spaces: Subset, fits: Fits, chance: Chance) -> dict[Subset, NestedScores]:
    """Score every subset from the predictions kept; those that are not needed again make room."""
    found = {}
    for subset in subsets_of(spaces):
        found[subset] = _score(kept, subset, chance, fits[subject, subset])
        if len(subset) < len(spaces) - 1:
            kept.drop(subset)
    for space, p in _unique_p(kept, spaces, chance).items() if len(spaces) > 1 else ():
        found[(space,)] = found[(space,)]._replace(p_unique=p)
    for subset in (RESPONSES, *subsets_of(spaces)):
        kept.drop(subset)
    return found


def _score(kept: Kept, subset: Subset, chance: Chance, fit: Fit) -> NestedScores:
    """Score the predictions of one subset, a panel at a time."""
    stories = [chance.story_of_row == story for story in np.unique(chance.story_of_row)]
    panels = []
    for at in range(kept.n_panels(subset)):
        Y, predicted = kept.load(RESPONSES, at), kept.load(subset, at)
        story_cc = np.stack([correlate(Y[rows], predicted[rows]) for rows in stories])
        panels.append((correlate(Y, predicted), r2_score(Y, predicted), story_cc, chance.p(Y, predicted)))
    cc, r2, story_cc, p = (np.concatenate(part, axis=-1) for part in zip(*panels, strict=True))
    return NestedScores(cc, r2, story_cc, p, fit.ridge_alphas, fit.grid, fit.pressing_low)


def _unique_p(kept: Kept, spaces: Subset, chance: Chance) -> dict[str, np.ndarray]:
    """Return, of each space, p of what it tells beyond all others together."""
    found = {}
    for space in spaces:
        rest = tuple(other for other in spaces if other != space)
        p = []
        for at in range(kept.n_panels(spaces)):
            Y, joint, without = (kept.load(of, at) for of in (RESPONSES, spaces, rest))
            p.append(unique_p(Y, joint, without, chance))
        found[space] = np.concatenate(p)
    return found
