"""A trial's scores as its record holds them: rows of tables, columns, and arrays over the whole brain."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.story import Dataset
from bert_encoding.regression.response_panels import cc_max
from bert_encoding.statistics.block_bootstrap import mean_replicates, replicates_interval
from bert_encoding.statistics.noise_ceiling import CC_MAX_FLOOR, summarise_normalised
from bert_encoding.trial.scoring import SubjectScores, merge_subjects

Scores = Mapping[str, SubjectScores]  # by subject
Ceilings = Mapping[tuple[str, str], np.ndarray]  # (subject, story) -> (n_valid,)


def noise_ceilings(scored: Iterable[Scores], dataset: Dataset, cache: WorkerCache) -> Ceilings:
    """Return the noise ceilings of the scored stories that have repeats."""
    pairs = {(subject, story): None for scores in scored for subject in scores for story in scores[subject].story_cc}
    ceilings = {pair: cc_max(dataset, *pair, cache) for pair in pairs}
    return {pair: ceiling for pair, ceiling in ceilings.items() if ceiling is not None}


def story_rows(scores: Scores, split: int, role: str) -> list[dict[str, Any]]:
    """Return one row per subject and scored story."""
    return [
        {"split": split, "role": role, "subject": subject, "story": story} | result.story_summary(story)
        for subject, result in scores.items()
        for story in result.story_cc
    ]


def subject_rows(scores: Scores, split: int, role: str) -> list[dict[str, Any]]:
    """Return one row per subject."""
    return [{"split": split, "role": role, "subject": subject} | result.summary() for subject, result in scores.items()]


def mean_cc(dataset: Dataset, splits: Sequence[Scores]) -> dict[str, np.ndarray]:
    """Return the mean CC over splits, subject -> (n_voxels,) float32, NaN where a voxel is masked out."""
    return {
        subject: whole_brain(dataset, subject, np.mean([scores[subject].cc for scores in splits], axis=0))
        for subject in dataset.subjects
    }


def voxel_details(dataset: Dataset, scores_of_role: Mapping[str, Scores], ceilings: Ceilings) -> dict[str, np.ndarray]:
    """Return further arrays over the whole brain, and resamples of time.

    Names are ``<role>/story/<story>/<subject>`` for the CC inside a story; if predictions were tested
    ``<role>/p/<subject>`` and ``<role>/replicates/<subject>``, (1 + n_resamples,) mean CCs; and
    ``<role>/cc_max/<story>/<subject>`` if a story has repeats.
    """
    details: dict[str, np.ndarray] = {}
    for role, scores in scores_of_role.items():
        for subject, result in scores.items():
            for story, cc in result.story_cc.items():
                details[f"{role}/story/{story}/{subject}"] = whole_brain(dataset, subject, cc)
                if (subject, story) in ceilings:
                    ceiling = ceilings[subject, story]
                    details[f"{role}/cc_max/{story}/{subject}"] = whole_brain(dataset, subject, ceiling)
            if result.tests is not None:
                details[f"{role}/p/{subject}"] = whole_brain(dataset, subject, result.tests.p)
                details[f"{role}/replicates/{subject}"] = result.tests.replicates.mean
    return details


def columns_of_test(scores: Scores, ceilings: Ceilings) -> dict[str, Any]:
    """Return ``cc_test``, its interval over time inside these stories, and ``cc_norm``.

    ``cc_norm`` is the mean of CC / CC_max over the voxels whose ceiling is high enough, over the stories that have
    repeats, and over subjects; None without repeats.
    """
    interval = replicates_interval(
        mean_replicates([r.tests.replicates for r in scores.values() if r.tests is not None])
    )
    low, high = (None if np.isnan(limit) else limit for limit in (interval.low, interval.high))  # records are JSON
    cc_norm = [values["cc_norm"] for values in _normalised(scores, ceilings).values()]
    normalised = [value for value in cc_norm if value is not None]
    return {
        "cc_test": merge_subjects(scores)["cc_mean"],
        "cc_test_low": low,
        "cc_test_high": high,
        "cc_norm": float(np.mean(normalised)) if normalised else None,
    }


def ceiling_notes(scores: Scores, ceilings: Ceilings) -> list[str]:
    """Say how many voxels ``cc_norm`` is the mean of."""
    return [
        f"{subject}, {story}: cc_norm is of {values['n_cc_norm']} voxels; {values['n_below_floor']} have a noise "
        f"ceiling below {CC_MAX_FLOOR}"
        for (subject, story), values in _normalised(scores, ceilings).items()
    ]


def whole_brain(dataset: Dataset, subject: str, values: np.ndarray) -> np.ndarray:
    """Return (n_voxels,) float32 with NaN where a voxel is masked out."""
    assert dataset.voxel_masks is not None
    whole = np.full(dataset.voxel_masks[subject].size, np.nan, np.float32)
    whole[dataset.voxel_masks[subject]] = values
    return whole


def _normalised(scores: Scores, ceilings: Ceilings) -> dict[tuple[str, str], dict[str, float | None]]:
    """Return the summary of normalised CC, (subject, story) -> values, for stories with repeats."""
    return {
        (subject, story): summarise_normalised(cc, ceilings[subject, story])
        for subject, result in scores.items()
        for story, cc in result.story_cc.items()
        if (subject, story) in ceilings
    }
