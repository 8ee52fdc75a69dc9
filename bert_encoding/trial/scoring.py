"""From word vectors to scores: features, ridge on the fit stories, CC on stories that ridge was not fitted on."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bert_encoding.core.names import ROI_PREFIX
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.downsampling import delayed_features
from bert_encoding.regression.response_panels import ResponsePanel, panels
from bert_encoding.regression.ridge import DECADES_FURTHER, MAX_EDGE_SHARE, CrossValidatedRidge, share_beyond_grid
from bert_encoding.statistics.block_bootstrap import Replicates, join_replicates, time_replicates
from bert_encoding.statistics.correlation import correlate, summarise
from bert_encoding.statistics.permutation import N_PERMUTATIONS, benjamini_hochberg, block_permutation_p, count_orders
from bert_encoding.trial.config import TrialConfig

FALSE_DISCOVERY_RATE = 0.05


class PredictionTests(NamedTuple):
    """Tests of one subject's predictions.

    ``replicates`` are the mean CC over voxels, of all rows and of resamples of their time. The draws depend on the rows
    alone, so that those of two models scored on the same stories are pairs.
    """

    p: np.ndarray  # (n_voxels,) of block permutations; all NaN if the stories are too short for them
    replicates: Replicates

    @property
    def q(self) -> np.ndarray:
        """Benjamini and Hochberg's q, (n_voxels,)."""
        return benjamini_hochberg(self.p)

    @property
    def share_significant(self) -> float | None:
        """The share of voxels with q below ``FALSE_DISCOVERY_RATE``; None without p."""
        return float(np.mean(self.q < FALSE_DISCOVERY_RATE)) if np.isfinite(self.p).any() else None


def examine_predictions(Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray) -> PredictionTests:
    """Test the predictions of some voxels, (n_rows, n_voxels)."""
    enough = count_orders(story_of_row) >= N_PERMUTATIONS
    p = block_permutation_p(Y, predicted, story_of_row) if enough else np.full(Y.shape[1], np.nan)
    return PredictionTests(p, time_replicates(Y, predicted, story_of_row))


class SubjectScores(NamedTuple):
    """How well one subject is predicted on the scored stories."""

    cc: np.ndarray  # (n_valid,) over the concatenated rows of the scored stories
    story_cc: dict[str, np.ndarray]  # story -> (n_valid,), NaN for a voxel that is constant there
    ridge_alphas: np.ndarray  # (n_valid,)
    n_constant: int  # voxels whose prediction is constant; they score 0
    grid: tuple[float, ...]  # the ridge_alphas to choose from
    rois: Mapping[str, np.ndarray] = MappingProxyType({})  # name -> its voxels, counted among the valid ones
    tests: PredictionTests | None = None
    beyond_grid: Mapping[str, float] = MappingProxyType({"low": 0.0, "high": 0.0})  # ``share_beyond_grid``

    @property
    def edge_share(self) -> dict[str, float]:
        """The share of voxels that chose the smallest and the largest ridge_alpha."""
        edges = {"low": min(self.grid), "high": max(self.grid)}
        return {edge: float(np.mean(self.ridge_alphas == ridge_alpha)) for edge, ridge_alpha in edges.items()}

    def summary(self) -> dict[str, float]:
        """Return the summaries over voxels, and the mean CC of each region of interest that has a valid voxel."""
        significant = None if self.tests is None else self.tests.share_significant
        tested = {} if significant is None else {"share_significant": significant}
        return summarise(self.cc) | tested | self._roi_means(self.cc)

    def story_summary(self, story: str) -> dict[str, float]:
        """Return the mean CC inside one story, of all voxels and of each region of interest."""
        cc = self.story_cc[story]
        return {"cc_mean": float(np.nanmean(cc))} | self._roi_means(cc)

    def _roi_means(self, cc: np.ndarray) -> dict[str, float]:
        means = {ROI_PREFIX + name: cc[voxels] for name, voxels in self.rois.items()}
        return {name: float(np.nanmean(values)) for name, values in means.items() if not np.isnan(values).all()}


class Design(NamedTuple):
    """Features of fit and scored stories, z-scored by mean and deviation of the fit rows."""

    fit: np.ndarray  # (n_fit_rows, n_features)
    scored: np.ndarray  # (n_scored_rows, n_features)
    folds: np.ndarray  # (n_fit_rows,)
    scored_story: np.ndarray  # (n_scored_rows,) index into the scored stories
    constants: ZScore


def make_design(
    downsampled: Mapping[str, np.ndarray],
    dataset: Dataset,
    fit: Sequence[str],
    scored: Sequence[str],
    config: TrialConfig,
    fold_seed: int,
) -> Design:
    """Turn downsampled word vectors, story -> (n_trs, n_hidden), into features, which must be finite."""
    X = {name: delayed_features(downsampled[name], config.delays, dataset.trim) for name in (*fit, *scored)}
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
        scored_story=np.concatenate([np.full(len(X[name]), index) for index, name in enumerate(scored)]),
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
    cache: WorkerCache | None = None,
) -> SubjectScores:
    """Fit ridge on the fit stories and correlate its predictions with the responses to the scored stories.

    Responses are read, fitted and scored one panel of voxels at a time. If more than a fifth of the voxels would gain
    from a ridge_alpha beyond an edge of the grid, all are fitted once more with a wider grid. ``with_tests`` also
    computes one p value per voxel, and resamples of time.
    """

    def score(ridge: CrossValidatedRidge) -> SubjectScores:
        n_rows = 2 * max(len(design.fit), len(design.scored))
        parts = [
            _score_panel(ridge, design, panel, with_tests)
            for panel in panels(dataset, subject, fit, scored, n_rows, cache)
        ]
        return _join_panels(parts, dataset.valid_rois(subject))

    scores = score(ridge)
    extended = ridge.extended(scores.beyond_grid)
    return scores if extended is None else score(extended)


def _score_panel(ridge: CrossValidatedRidge, design: Design, panel: ResponsePanel, with_tests: bool) -> SubjectScores:
    predicted, ridge_alphas, cv_cc = ridge.fit_predict(panel.targets(ridge), design.scored)
    Y = panel.scored_responses()
    rows = {name: design.scored_story == index for index, name in enumerate(panel.scored)}
    return SubjectScores(
        cc=correlate(Y, predicted),
        story_cc={name: correlate(Y[in_story], predicted[in_story]) for name, in_story in rows.items()},
        ridge_alphas=ridge_alphas,
        n_constant=int((predicted.std(axis=0) <= 1e-10).sum()),
        grid=ridge.ridge_alphas,
        beyond_grid=share_beyond_grid(cv_cc, min(ridge.ridge_alphas) > ridge.largest_eigenvalue),
        tests=examine_predictions(Y, predicted, design.scored_story) if with_tests else None,
    )


def _join_panels(parts: Sequence[SubjectScores], rois: Mapping[str, np.ndarray]) -> SubjectScores:
    sizes = [part.cc.size for part in parts]
    tests = [part.tests for part in parts if part.tests is not None]
    replicates = join_replicates([test.replicates for test in tests]) if tests else None
    return SubjectScores(
        cc=np.concatenate([part.cc for part in parts]),
        story_cc={name: np.concatenate([part.story_cc[name] for part in parts]) for name in parts[0].story_cc},
        ridge_alphas=np.concatenate([part.ridge_alphas for part in parts]),
        n_constant=sum(part.n_constant for part in parts),
        grid=parts[0].grid,
        rois=rois,
        tests=None if replicates is None else PredictionTests(np.concatenate([test.p for test in tests]), replicates),
        beyond_grid={
            edge: float(np.average([part.beyond_grid[edge] for part in parts], weights=sizes))
            for edge in ("low", "high")
        },
    )


def seen_cc(
    ridge: CrossValidatedRidge, dataset: Dataset, subject: str, fit: Sequence[str], cache: WorkerCache | None = None
) -> np.ndarray:
    """Return the cross-validated CC inside the fit stories, (n_valid,): an adapter has read their words, but ridge was
    not fitted on the rows that it predicts."""
    parts = []
    for panel in panels(dataset, subject, fit, (), 2 * ridge.n_rows, cache):
        targets = panel.targets(ridge)
        parts.append(correlate(targets.Y.cpu().numpy(), ridge.predict_left_out(targets)))
    return np.concatenate(parts)


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
    """Say where the configured grid of ridge_alphas was widened, and where it is still too narrow; each once.

    ``scores_of_role`` maps the beginning of a note to the scores of one or more splits, by subject.
    """
    notes = [
        role + note
        for role, splits in scores_of_role.items()
        for scores in splits
        for subject, result in scores.items()
        for note in _edge_notes(subject, result, grid)
    ]
    return list(dict.fromkeys(notes))


def _edge_notes(subject: str, result: SubjectScores, configured: tuple[float, ...]) -> list[str]:
    notes, grid = [], f"{min(result.grid):g} to {max(result.grid):g}"
    if result.grid != configured:
        notes.append(
            f"{subject}: many voxels wanted a ridge_alpha beyond {min(configured):g} to {max(configured):g}, so all "
            f"were fitted with {grid}"
        )
    if result.beyond_grid["low"] > MAX_EDGE_SHARE:
        notes.append(
            f"{subject}: {result.beyond_grid['low']:.0%} of voxels want a ridge_alpha below {grid}; set ridge_alphas "
            f"in the search space to a grid from {min(result.grid) / 10**DECADES_FURTHER:g}"
        )
    if result.edge_share["high"] > MAX_EDGE_SHARE:
        notes.append(
            f"{subject}: {result.edge_share['high']:.0%} of voxels chose the largest ridge_alpha of {grid}: no "
            "feature predicts these voxels (expected outside language areas)"
        )
    return notes
