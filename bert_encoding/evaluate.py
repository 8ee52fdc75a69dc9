"""Word vectors to scores: features, ridge on the fit stories, CC on stories that ridge never saw."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import Dataset
from bert_encoding.features import ZScore, story_features
from bert_encoding.ridge import alpha_edge_share, cross_validated_predictions, fit_ridge
from bert_encoding.scores import correlate, summarise

MAX_EDGE_SHARE = 0.2


class SubjectScores(NamedTuple):
    """How well one subject is predicted on the scored stories.

    Attributes
    ----------
    cc : (n_valid,) over the concatenated rows of the scored stories
    story_cc : story -> mean over voxels of the CC inside that story
    ridge_alphas : (n_valid,)
    n_constant : voxels whose prediction is constant; they score 0
    """

    cc: np.ndarray
    story_cc: dict[str, float]
    ridge_alphas: np.ndarray
    n_constant: int


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
    """Turn word vectors, story -> (n_words, n_hidden), into features.

    Raises
    ------
    RuntimeError
        if a story's features are not finite.
    """
    X = {name: _features(vectors[name], name, dataset, config) for name in (*fit, *scored)}
    constants = ZScore.learn(np.vstack([X[name] for name in fit]))
    folds = story_folds({name: len(X[name]) for name in fit}, config.n_folds, fold_seed)
    fold_of = {name: label for label, names in enumerate(folds) for name in names}
    return Design(
        fit=constants.apply(np.vstack([X[name] for name in fit])),
        scored=constants.apply(np.vstack([X[name] for name in scored])),
        folds=np.concatenate([np.full(len(X[name]), fold_of[name]) for name in fit]),
        scored_story=np.concatenate([np.full(len(X[name]), at) for at, name in enumerate(scored)]),
    )


def score_subject(
    design: Design,
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    config: TrialConfig,
    device: torch.device,
) -> SubjectScores:
    """Fit ridge on the fit stories and correlate its predictions with the responses to the scored stories."""
    Y_fit = stack_responses(dataset, subject, fit)
    Y_scored = stack_responses(dataset, subject, scored)
    model = fit_ridge(design.fit, ZScore.learn(Y_fit).apply(Y_fit), design.folds, config.ridge_alphas, device=device)
    predicted = model.predict(design.scored)
    story_cc = {}
    for at, name in enumerate(scored):
        rows = design.scored_story == at
        story_cc[name] = float(np.nanmean(correlate(Y_scored[rows], predicted[rows])))
    n_constant = int((predicted.std(axis=0) <= 1e-10).sum())
    return SubjectScores(correlate(Y_scored, predicted), story_cc, model.ridge_alphas, n_constant)


def score_seen(
    design: Design, dataset: Dataset, subject: str, fit: Sequence[str], config: TrialConfig, device: torch.device
) -> float:
    """Return the mean cross-validated CC inside the fit stories: an adapter has read their words, ridge has not seen
    the rows that it predicts."""
    Y = stack_responses(dataset, subject, fit)
    scaled = ZScore.learn(Y).apply(Y)
    predicted = cross_validated_predictions(design.fit, scaled, design.folds, config.ridge_alphas, device=device)
    return summarise(correlate(Y, predicted))["cc_mean"]


def stack_responses(dataset: Dataset, subject: str, stories: Sequence[str]) -> np.ndarray:
    """Return the valid responses to several stories, one below the other, (n_rows, n_valid) float32."""
    return np.vstack([dataset.valid_responses(name, subject) for name in stories])


def merge_subjects(scores: Mapping[str, SubjectScores], ridge_alphas: tuple[float, ...]) -> dict[str, float]:
    """Return the summaries of a trial: each the mean over subjects of the mean over voxels."""
    per_subject = [summarise(subject.cc) for subject in scores.values()]
    merged = {name: float(np.mean([summary[name] for summary in per_subject])) for name in per_subject[0]}
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


def _features(vectors: np.ndarray, name: str, dataset: Dataset, config: TrialConfig) -> np.ndarray:
    X = story_features(vectors, dataset.stories[name], config.delays, dataset.trim)
    if not np.isfinite(X).all():
        raise RuntimeError(f"story {name}: its features are not finite")
    return X
