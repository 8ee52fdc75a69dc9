"""Word vectors to scores: features, ridge on the fit stories, CC on stories that ridge never saw."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import Dataset
from bert_encoding.features import ZScore, downsample_story, lagged_rows
from bert_encoding.records import ROI_PREFIX
from bert_encoding.ridge import CrossValidatedRidge, alpha_edge_share
from bert_encoding.scores import VOXELS_PER_BLOCK, correlate, summarise

MAX_EDGE_SHARE = 0.2
PANEL_BYTES = 2**29  # of responses in memory at a time


class SubjectScores(NamedTuple):
    """How well one subject is predicted on the scored stories.

    Attributes
    ----------
    cc : (n_valid,) over the concatenated rows of the scored stories
    story_cc : story -> (n_valid,) CC inside that story, NaN where a voxel is constant there
    ridge_alphas : (n_valid,)
    n_constant : voxels whose prediction is constant; they score 0
    rois : region of interest -> its voxels, counted among the valid ones
    """

    cc: np.ndarray
    story_cc: dict[str, np.ndarray]
    ridge_alphas: np.ndarray
    n_constant: int
    rois: Mapping[str, np.ndarray] = MappingProxyType({})

    def summary(self) -> dict[str, float]:
        """Return the summaries over voxels, and the mean CC of each region of interest that has a valid voxel."""
        return summarise(self.cc) | self._roi_means(self.cc)

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
) -> SubjectScores:
    """Fit ridge on the fit stories and correlate its predictions with the responses to the scored stories.

    Responses are read, fitted and scored a panel of voxels at a time, so that they need not fit in memory.
    """
    panels = [
        _score_panel(ridge, design, dataset, subject, fit, scored, columns)
        for columns in voxel_panels(dataset, subject, len(design.fit) + len(design.scored))
    ]
    return SubjectScores(
        cc=np.concatenate([panel.cc for panel in panels]),
        story_cc={name: np.concatenate([panel.story_cc[name] for panel in panels]) for name in scored},
        ridge_alphas=np.concatenate([panel.ridge_alphas for panel in panels]),
        n_constant=sum(panel.n_constant for panel in panels),
        rois=dataset.valid_rois(subject),
    )


def _score_panel(
    ridge: CrossValidatedRidge,
    design: Design,
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    columns: slice,
) -> SubjectScores:
    model = ridge.fit(_z_scored(stack_responses(dataset, subject, fit, columns)))
    predicted = model.predict(design.scored)
    Y = stack_responses(dataset, subject, scored, columns)
    rows = {name: design.scored_story == at for at, name in enumerate(scored)}
    story_cc = {name: correlate(Y[here], predicted[here]) for name, here in rows.items()}
    n_constant = int((predicted.std(axis=0) <= 1e-10).sum())
    return SubjectScores(correlate(Y, predicted), story_cc, model.ridge_alphas, n_constant)


def seen_cc(
    ridge: CrossValidatedRidge, design: Design, dataset: Dataset, subject: str, fit: Sequence[str]
) -> np.ndarray:
    """Return the cross-validated CC inside the fit stories, (n_valid,): an adapter has read their words, ridge has not
    seen the rows that it predicts."""
    panels = []
    for columns in voxel_panels(dataset, subject, 2 * len(design.fit)):
        Y = _z_scored(stack_responses(dataset, subject, fit, columns))
        panels.append(correlate(Y, ridge.predict_left_out(Y)))
    return np.concatenate(panels)


def voxel_panels(dataset: Dataset, subject: str, n_rows: int) -> list[slice]:
    """Divide a subject's valid voxels into panels of ``n_rows`` rows and at most ``PANEL_BYTES`` as float32."""
    n_valid = dataset.n_valid(subject)
    n_columns = max(1, PANEL_BYTES // (4 * n_rows))
    return [slice(start, min(start + n_columns, n_valid)) for start in range(0, n_valid, n_columns)]


def stack_responses(dataset: Dataset, subject: str, stories: Sequence[str], columns: slice = slice(None)) -> np.ndarray:
    """Return valid responses to several stories, one below the other, (n_rows, n_columns) float32."""
    return np.vstack([dataset.valid_responses(name, subject, columns) for name in stories])


def _z_scored(Y: np.ndarray) -> np.ndarray:
    """Z-score each voxel over all rows, in place: a panel is too large to copy."""
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = Y[:, start : start + VOXELS_PER_BLOCK]
        block[:] = ZScore.learn(block).apply(block)
    return Y


def merge_subjects(scores: Mapping[str, SubjectScores], ridge_alphas: tuple[float, ...]) -> dict[str, float]:
    """Return the summaries of a trial: each the mean over subjects of the mean over voxels.

    A region of interest is averaged over the subjects that have it.
    """
    summaries = pd.DataFrame([subject.summary() for subject in scores.values()])
    merged = {str(name): float(value) for name, value in summaries.mean().items()}
    edges = [sum(alpha_edge_share(subject.ridge_alphas, ridge_alphas).values()) for subject in scores.values()]
    return merged | {
        "alpha_edge_share": float(np.mean(edges)),
        "n_constant_predictions": float(sum(subject.n_constant for subject in scores.values())),
    }


def edge_notes(scores: Mapping[str, SubjectScores], ridge_alphas: tuple[float, ...]) -> list[str]:
    """Say so where more than a fifth of the voxels chose an alpha at an edge of the grid."""
    notes = []
    for subject, result in scores.items():
        share = alpha_edge_share(result.ridge_alphas, ridge_alphas)
        if share["low"] > MAX_EDGE_SHARE:
            notes.append(f"{subject}: {share['low']:.0%} of voxels chose the smallest ridge_alpha; try smaller ones")
        if share["high"] > MAX_EDGE_SHARE:
            notes.append(
                f"{subject}: {share['high']:.0%} of voxels chose the largest ridge_alpha: nothing predicts them"
            )
    return notes
