"""Word vectors to scores: features, ridge on the fit stories, CC on stories that ridge never saw."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bert_encoding.core.names import ROI_PREFIX
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.downsampling import downsample_story, lagged_rows
from bert_encoding.regression.response_panels import fit_targets, scored_responses, voxel_panels
from bert_encoding.regression.ridge import (
    DECADES_FURTHER,
    MAX_EDGE_SHARE,
    CrossValidatedRidge,
    alpha_edge_share,
    pressing_share,
    wider_grid,
)
from bert_encoding.statistics.block_bootstrap import Replicates, join_replicates, time_replicates
from bert_encoding.statistics.correlation import correlate, summarise
from bert_encoding.statistics.permutation import N_PERMUTATIONS, benjamini_hochberg, block_permutation_p, count_orders
from bert_encoding.trial.config import TrialConfig

FALSE_DISCOVERY_RATE = 0.05


class PredictionTests(NamedTuple):
    """Tests of one subject's predictions.

    Attributes
    ----------
    p : (n_voxels,) of block permutations; NaN throughout where the stories are too short for them
    replicates : the mean CC over voxels, of the rows as they are and of resamples of their time; the draws depend on
        the rows alone, so that those of two models scored on the same stories are pairs
    """

    p: np.ndarray
    replicates: Replicates

    @property
    def q(self) -> np.ndarray:
        """Benjamini and Hochberg's q, (n_voxels,)."""
        return benjamini_hochberg(self.p)

    @property
    def share_significant(self) -> float | None:
        """The share of voxels with q below ``FALSE_DISCOVERY_RATE``; None where there is no p."""
        return float(np.mean(self.q < FALSE_DISCOVERY_RATE)) if np.isfinite(self.p).any() else None


def examine_predictions(Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray) -> PredictionTests:
    """Test the predictions of some voxels, (n_rows, n_voxels)."""
    enough = count_orders(story_of_row) >= N_PERMUTATIONS
    p = block_permutation_p(Y, predicted, story_of_row) if enough else np.full(Y.shape[1], np.nan)
    return PredictionTests(p, time_replicates(Y, predicted, story_of_row))


def join_tests(parts: Sequence[PredictionTests]) -> PredictionTests:
    """Join the tests of one subject's panels of voxels."""
    return PredictionTests(
        np.concatenate([part.p for part in parts]), join_replicates([part.replicates for part in parts])
    )


class SubjectScores(NamedTuple):
    """How well one subject is predicted on the scored stories.

    Attributes
    ----------
    cc : (n_valid,) over the concatenated rows of the scored stories
    story_cc : story -> (n_valid,) CC inside that story, NaN where a voxel is constant there
    ridge_alphas : (n_valid,)
    n_constant : voxels whose prediction is constant; they score 0
    grid : the alphas to choose from
    pressing : ``ridge.pressing_share``
    rois : region of interest -> its voxels, counted among the valid ones
    tests : where they were asked for
    """

    cc: np.ndarray
    story_cc: dict[str, np.ndarray]
    ridge_alphas: np.ndarray
    n_constant: int
    grid: tuple[float, ...]
    rois: Mapping[str, np.ndarray] = MappingProxyType({})
    tests: PredictionTests | None = None
    pressing: Mapping[str, float] = MappingProxyType({"low": 0.0, "high": 0.0})

    @property
    def edge_share(self) -> dict[str, float]:
        """The share of voxels that chose the smallest and the largest alpha."""
        return alpha_edge_share(self.ridge_alphas, self.grid)

    def summary(self) -> dict[str, float]:
        """Return the summaries over voxels, and the mean CC of each region of interest that has a valid voxel."""
        significant = None if self.tests is None else self.tests.share_significant
        found = {} if significant is None else {"share_significant": significant}
        return summarise(self.cc) | found | self._roi_means(self.cc)

    def story_summary(self, story: str) -> dict[str, float]:
        """Return the mean CC inside one story, of all voxels and of each region of interest."""
        cc = self.story_cc[story]
        return {"cc_mean": float(np.nanmean(cc))} | self._roi_means(cc)

    def _roi_means(self, cc: np.ndarray) -> dict[str, float]:
        means = {ROI_PREFIX + name: cc[voxels] for name, voxels in self.rois.items()}
        return {name: float(np.nanmean(values)) for name, values in means.items() if not np.isnan(values).all()}


class Design(NamedTuple):
    """Features of the fit stories, and of the scored ones, z-scored by constants of the fit rows alone."""

    fit: np.ndarray  # (n_fit_rows, n_features)
    scored: np.ndarray  # (n_scored_rows, n_features)
    folds: np.ndarray  # (n_fit_rows,)
    scored_story: np.ndarray  # (n_scored_rows,) index into the scored stories
    constants: ZScore


def make_design(
    vectors: Mapping[str, np.ndarray],
    dataset: Dataset,
    fit: Sequence[str],
    scored: Sequence[str],
    config: TrialConfig,
    fold_seed: int,
) -> Design:
    """Turn word vectors, story -> (n_words, n_hidden), into features; see ``design_on_trs``."""
    downsampled = {name: downsample_story(vectors[name], dataset.stories[name]) for name in (*fit, *scored)}
    return design_on_trs(downsampled, dataset, fit, scored, config, fold_seed)


def design_on_trs(
    downsampled: Mapping[str, np.ndarray],
    dataset: Dataset,
    fit: Sequence[str],
    scored: Sequence[str],
    config: TrialConfig,
    fold_seed: int,
) -> Design:
    """Turn word vectors on the scanner's clock, story -> (n_trs, n_hidden), into features.

    Raises
    ------
    RuntimeError
        if a story's features are not finite.
    """
    X = {name: lagged_rows(downsampled[name], config.delays, dataset.trim) for name in (*fit, *scored)}
    for name, features in X.items():
        if not np.isfinite(features).all():
            raise RuntimeError(f"story {name}: its features are not finite")
    constants = ZScore.learn(np.vstack([X[name] for name in fit]))
    folds = story_folds({name: len(X[name]) for name in fit}, config.n_folds, fold_seed)
    fold_of = {name: label for label, names in enumerate(folds) for name in names}
    return Design(
        fit=constants.apply(np.vstack([X[name] for name in fit])),
        scored=constants.apply(np.vstack([X[name] for name in scored])),
        folds=np.concatenate([np.full(len(X[name]), fold_of[name]) for name in fit]),
        scored_story=np.concatenate([np.full(len(X[name]), at) for at, name in enumerate(scored)]),
        constants=constants,
    )


def prepare_ridge(design: Design, config: TrialConfig, device: torch.device) -> CrossValidatedRidge:
    """Return ridge on the fit rows, ready for the voxels of every subject."""
    return CrossValidatedRidge(design.fit, design.folds, config.ridge_alphas, device=device)


def score_subject(
    ridge: CrossValidatedRidge,
    design: Design,
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    *,
    with_tests: bool = False,
) -> SubjectScores:
    """Fit ridge on the fit stories and correlate its predictions with the responses to the scored stories.

    Responses are read, fitted and scored a panel of voxels at a time, so that they need not fit in memory. Where more
    than a fifth of the voxels want an alpha beyond an edge of the grid, all are fitted once more with a wider one.

    Parameters
    ----------
    with_tests : also compute a p value a voxel, and resamples of time
    """
    found = _score_panels(ridge, design, dataset, subject, fit, scored, with_tests)
    grid = wider_grid(ridge.ridge_alphas, found.pressing, ridge.largest_eigenvalue)
    if grid is None:
        return found
    return _score_panels(ridge.with_alphas(grid), design, dataset, subject, fit, scored, with_tests)


def _score_panels(
    ridge: CrossValidatedRidge,
    design: Design,
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    with_tests: bool,
) -> SubjectScores:
    panels = [
        _score_panel(ridge, design, dataset, subject, fit, scored, columns, with_tests)
        for columns in voxel_panels(dataset, subject, 2 * max(len(design.fit), len(design.scored)))
    ]
    tests = [panel.tests for panel in panels if panel.tests is not None]
    return SubjectScores(
        cc=np.concatenate([panel.cc for panel in panels]),
        story_cc={name: np.concatenate([panel.story_cc[name] for panel in panels]) for name in scored},
        ridge_alphas=np.concatenate([panel.ridge_alphas for panel in panels]),
        n_constant=sum(panel.n_constant for panel in panels),
        grid=ridge.ridge_alphas,
        pressing=_mean_pressing(panels),
        rois=dataset.valid_rois(subject),
        tests=join_tests(tests) if tests else None,
    )


def _mean_pressing(panels: Sequence[SubjectScores]) -> dict[str, float]:
    """Return the share over all voxels of the panels."""
    sizes = [panel.cc.size for panel in panels]
    return {
        edge: float(np.average([panel.pressing[edge] for panel in panels], weights=sizes)) for edge in ("low", "high")
    }


def _score_panel(
    ridge: CrossValidatedRidge,
    design: Design,
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    columns: slice,
    with_tests: bool,
) -> SubjectScores:
    targets = fit_targets(dataset, subject, fit, columns, ridge.rows, ridge.device)
    predicted, ridge_alphas, cv_cc = ridge.fit_predict(targets, design.scored)
    Y = scored_responses(dataset, subject, scored, columns)
    rows = {name: design.scored_story == at for at, name in enumerate(scored)}
    return SubjectScores(
        cc=correlate(Y, predicted),
        story_cc={name: correlate(Y[here], predicted[here]) for name, here in rows.items()},
        ridge_alphas=ridge_alphas,
        n_constant=int((predicted.std(axis=0) <= 1e-10).sum()),
        grid=ridge.ridge_alphas,
        pressing=pressing_share(cv_cc, min(ridge.ridge_alphas) > ridge.largest_eigenvalue),
        tests=examine_predictions(Y, predicted, design.scored_story) if with_tests else None,
    )


def seen_cc(ridge: CrossValidatedRidge, dataset: Dataset, subject: str, fit: Sequence[str]) -> np.ndarray:
    """Return the cross-validated CC inside the fit stories, (n_valid,): an adapter has read their words, ridge has not
    seen the rows that it predicts."""
    panels = []
    for columns in voxel_panels(dataset, subject, 2 * ridge.n_rows):
        targets = fit_targets(dataset, subject, fit, columns, ridge.rows, ridge.device)
        panels.append(correlate(targets.Y.cpu().numpy(), ridge.predict_left_out(targets)))
    return np.concatenate(panels)


def merge_subjects(scores: Mapping[str, SubjectScores]) -> dict[str, float]:
    """Return the summaries of a trial: each the mean over subjects of the mean over voxels.

    A region of interest is averaged over the subjects that have it.
    """
    summaries = pd.DataFrame([subject.summary() for subject in scores.values()])
    merged = {str(name): float(value) for name, value in summaries.mean().items()}
    return merged | {
        "alpha_edge_share": float(np.mean([sum(subject.edge_share.values()) for subject in scores.values()])),
        "n_constant_predictions": float(sum(subject.n_constant for subject in scores.values())),
    }


def edge_notes(
    scores_of_role: Mapping[str, Sequence[Mapping[str, SubjectScores]]], grid: tuple[float, ...]
) -> list[str]:
    """Say where the grid of alphas was widened, and where it is still too narrow; each once.

    Parameters
    ----------
    scores_of_role : how a note begins -> the scores of one or more splits, by subject
    grid : the alphas that were asked for
    """
    notes = [
        role + note
        for role, splits in scores_of_role.items()
        for scores in splits
        for subject, result in scores.items()
        for note in _edge_notes(subject, result, grid)
    ]
    return list(dict.fromkeys(notes))


def _edge_notes(subject: str, result: SubjectScores, asked: tuple[float, ...]) -> list[str]:
    notes, grid = [], f"{min(result.grid):g} to {max(result.grid):g}"
    if result.grid != asked:
        notes.append(
            f"{subject}: many voxels wanted a ridge_alpha beyond {min(asked):g} to {max(asked):g}, so all were fitted "
            f"with {grid}"
        )
    if result.pressing["low"] > MAX_EDGE_SHARE:
        notes.append(
            f"{subject}: {result.pressing['low']:.0%} of voxels want a ridge_alpha below {grid}; set ridge_alphas in "
            f"the search space to a grid from {min(result.grid) / 10**DECADES_FURTHER:g}"
        )
    if result.edge_share["high"] > MAX_EDGE_SHARE:
        notes.append(
            f"{subject}: {result.edge_share['high']:.0%} of voxels chose the largest ridge_alpha of {grid}: nothing "
            "predicts them"
        )
    return notes
