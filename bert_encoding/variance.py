"""How much of a voxel's variance does each feature space explain alone, and how much do several share?

Ridge is fitted on every subset of the spaces, and set arithmetic over the scores of these nested fits answers
(Lescroart et al. 2015, Frontiers in Computational Neuroscience 9:135; de Heer et al. 2017, Journal of Neuroscience
37:6539).

Explained variance is here the squared CC with its sign, ``cc |cc|``: what a prediction explains at its best scale, and
below 0 if it is upside down, so that voxels of noise average to 0. The other candidate, R2 = 1 - residual / total
variance, minds the scale of predictions, but penalties are chosen by CC, which does not: of a real listener (20 fit
stories) R2 was -0.030 where CC was 0.13, and its parts would tell of scale alone. R2 is kept beside it.

In return the squared CC of two uncorrelated spaces adds up only where the joint fit weighs them against each other as
well as each is worth. One penalty for all need not: what the joint fit loses by it is missing from the unique parts and
counted as shared. A penalty a space (``banded.py``) mends that. On held-out rows parts can be negative; cutting them
off at 0 would make noise count as explained.

Whether a space tells of a voxel what the others do not is tested apart, in ``unique.py``.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_encoding.banded import BandedRidge
from bert_encoding.errors import InputError
from bert_encoding.evaluate import Design
from bert_encoding.ridge import CrossValidatedRidge, wider_grid
from bert_encoding.scores import VOXELS_PER_BLOCK, correlate
from bert_encoding.significance import N_PERMUTATIONS
from bert_encoding.unique import Chance, unique_p

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
    grid : penalties that could be chosen
    p_unique : (n_voxels,) of one space, what it tells beyond all others together; None of several spaces
    """

    cc: np.ndarray
    r2: np.ndarray
    story_cc: np.ndarray
    p: np.ndarray
    ridge_alphas: np.ndarray
    grid: tuple[float, ...]
    p_unique: np.ndarray | None = None

    @property
    def explained(self) -> np.ndarray:
        """Explained variance, (n_voxels,): the squared CC with its sign."""
        return np.asarray(self.cc * np.abs(self.cc), np.float64)

    @property
    def edge_share(self) -> dict[str, float]:
        """Share of voxels whose penalty (of banded ridge the smallest) lies at either edge of the grid."""
        return _edge_share(self.ridge_alphas, self.grid)


class Fitting(NamedTuple):
    """How ridge is fitted: its grid, whether with a penalty a space (then by which solver), and where it runs."""

    ridge_alphas: tuple[float, ...]
    banded: str | None = None
    seed: int = 0
    device: torch.device | None = None


Panels = Callable[[], Iterator[Panel]]


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

    Where more than a fifth of a subject's voxels choose a penalty at an edge of the grid, it is extended once, if that
    can help (``ridge.wider_grid``).

    Parameters
    ----------
    designs : features a space; all have the same rows and folds
    panels : subject -> function that yields its voxels part by part; called once or twice a subset
    folder : where predictions are kept meanwhile, 4 bytes a scored row and voxel, of the responses and of at most
        ``len(designs) + 1`` subsets; by default the system's folder of temporary files

    Returns
    -------
    subject -> subset -> scores

    Raises
    ------
    InputError
        if there is no room for predictions.
    """
    found: dict[str, dict[Subset, NestedScores]] = {subject: {} for subject in panels}
    spaces = tuple(designs)
    chance = Chance(designs[spaces[0]].scored_story, n_permutations, fitting.seed)
    with tempfile.TemporaryDirectory(dir=folder, prefix="predictions-") as name:
        kept = {subject: Kept(Path(name), at) for at, subject in enumerate(panels)}
        for subset in subsets_of(spaces):
            ridge = _make_ridge([designs[space] for space in subset], fitting)  # decomposed once for all subjects
            X = np.hstack([designs[space].scored for space in subset])
            for subject, parts in panels.items():
                alphas, grid = _predict(ridge, X, parts, kept[subject], subset)
                found[subject][subset] = _score(kept[subject], subset, chance, alphas, grid)
                if len(subset) < len(spaces) - 1:
                    kept[subject].drop(subset)
        for subject in panels if len(spaces) > 1 else ():
            for space, p in _unique_p(kept[subject], spaces, chance).items():
                found[subject][(space,)] = found[subject][(space,)]._replace(p_unique=p)
    return found


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
    if fitting.banded is not None and len(X) > 1:
        options: dict[str, Any] = {"seed": fitting.seed, "solver": fitting.banded, "device": fitting.device}
        return BandedRidge(X, folds, fitting.ridge_alphas, **options)
    return CrossValidatedRidge(np.hstack(X), folds, fitting.ridge_alphas, device=fitting.device)


def _predict(
    ridge: CrossValidatedRidge | BandedRidge, X: np.ndarray, parts: Panels, kept: Kept, subset: Subset
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Fit every panel, keep its predictions, and return its penalties, (1 or n_spaces, n_voxels), and their grid."""
    alphas = _predict_panels(ridge, X, parts, kept, subset)
    wider = wider_grid(ridge.ridge_alphas, _edge_share(alphas, ridge.ridge_alphas), ridge.largest_eigenvalue)
    if wider is None:
        return alphas, ridge.ridge_alphas
    return _predict_panels(ridge.with_alphas(wider), X, parts, kept, subset), wider


def _predict_panels(
    ridge: CrossValidatedRidge | BandedRidge, X: np.ndarray, parts: Panels, kept: Kept, subset: Subset
) -> np.ndarray:
    alphas = []
    for at, panel in enumerate(parts()):
        predicted, chosen = ridge.fit_predict(panel.fit, X)
        kept.save(subset, at, predicted)
        kept.save(RESPONSES, at, panel.scored)
        alphas.append(np.atleast_2d(chosen))
    return np.concatenate(alphas, axis=1)


def _edge_share(ridge_alphas: np.ndarray, grid: tuple[float, ...]) -> dict[str, float]:
    """Return the share of voxels whose smallest penalty is the grid's first and last; himalaya rounds it."""
    smallest = ridge_alphas.min(axis=0)
    edges = {"low": min(grid), "high": max(grid)}
    return {name: float(np.mean(np.isclose(smallest, edge, rtol=1e-3))) for name, edge in edges.items()}


def _score(kept: Kept, subset: Subset, chance: Chance, alphas: np.ndarray, grid: tuple[float, ...]) -> NestedScores:
    """Score the predictions of one subset, a panel at a time."""
    stories = [chance.story_of_row == story for story in np.unique(chance.story_of_row)]
    panels = []
    for at in range(kept.n_panels(subset)):
        Y, predicted = kept.load(RESPONSES, at), kept.load(subset, at)
        story_cc = np.stack([correlate(Y[rows], predicted[rows]) for rows in stories])
        panels.append((correlate(Y, predicted), r2_score(Y, predicted), story_cc, chance.p(Y, predicted)))
    cc, r2, story_cc, p = (np.concatenate(part, axis=-1) for part in zip(*panels, strict=True))
    return NestedScores(cc, r2, story_cc, p, alphas, grid)


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
