"""One pass over all responses before any fit: shapes, valid voxels, fingerprint."""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.errors import InputError

MAX_SHARE_OUTSIDE = 0.2  # of a story's words before the first or after the last TR
CONSTANT_RANGE = 1e-8  # largest minus smallest response; z-scored responses span several units


class VoxelStatus(NamedTuple):
    """(n_voxels,) flags of one story."""

    finite: np.ndarray
    varies: np.ndarray


def inspect(dataset: Dataset) -> Dataset:
    """Return the data set with its voxel masks, fingerprint and notes.

    A voxel is valid if its responses are finite and not constant in every story of the data set, so that the mask
    follows from the responses alone and is the same for every trial.

    Raises
    ------
    InputError
        if a story has the wrong number of rows or voxels, words and times of different length, or no finite
        voxel at all.
    """
    digest = hashlib.sha256()
    masks: dict[str, np.ndarray] = {}
    notes = list(dataset.notes)
    for story in dataset.stories.values():
        _check_times(dataset.source, story)
        _digest_text(digest, story)
    for subject in dataset.subjects:
        finite, varies = _subject_status(dataset, subject, digest)
        masks[subject] = finite & varies
        if not masks[subject].any():
            raise InputError(
                f"{dataset.source}: subject {subject} has no voxel that is finite and varies in every story"
            )
        if not masks[subject].all():
            notes.append(
                f"{subject}: {(~masks[subject]).sum()} of {masks[subject].size} voxels left out "
                f"({(~finite).sum()} non-finite, {(finite & ~varies).sum()} constant in a story)"
            )
    silent = sum(word == "" for story in dataset.stories.values() for word in story.spoken)
    if silent:
        notes.append(f"{silent} rows of the transcripts hold no spoken word (empty or a tag): zero vectors")
    return replace(dataset, voxel_masks=masks, fingerprint=digest.hexdigest()[:16], notes=tuple(notes))


def _check_times(source: str, story: Story) -> None:
    n_words, n_times = len(story.words), len(story.word_times_s)
    if n_words != n_times:
        raise InputError(f"{source}: story {story.name} has {n_words} words but {n_times} word times")
    if not any(story.spoken):
        raise InputError(f"{source}: story {story.name} has no spoken word; leave it out")
    for what, times in (("word", story.word_times_s), ("TR", story.tr_times_s)):
        if not np.isfinite(times).all():
            raise InputError(f"{source}: story {story.name} has non-finite {what} times; mend or leave it out")
        if (np.diff(times) < 0).any():
            at = int(np.argmax(np.diff(times) < 0)) + 1
            raise InputError(
                f"{source}: story {story.name}: {what} times must not decrease, "
                f"but {what} {at} ({times[at]:g} s) comes before {what} {at - 1} ({times[at - 1]:g} s)"
            )
    steps = np.diff(story.tr_times_s)
    if steps.size == 0 or steps.min() <= 0 or steps.max() - steps.min() > 1e-3:
        raise InputError(f"{source}: story {story.name}: TR times must be evenly spaced, one volume after the other")
    outside = np.mean((story.word_times_s < story.tr_times_s[0]) | (story.word_times_s > story.tr_times_s[-1]))
    if outside > MAX_SHARE_OUTSIDE:
        raise InputError(
            f"{source}: story {story.name}: {outside:.0%} of its words lie outside the scan "
            f"({story.tr_times_s[0]:g} to {story.tr_times_s[-1]:g} s; words {story.word_times_s[0]:g} to "
            f"{story.word_times_s[-1]:g}); word times must be in seconds from the story's start"
        )


def _digest_text(digest: "hashlib._Hash", story: Story) -> None:
    digest.update("\0".join((story.name, *story.words)).encode())
    digest.update(np.ascontiguousarray(story.word_times_s, dtype="<f8").tobytes())
    digest.update(np.ascontiguousarray(story.tr_times_s, dtype="<f8").tobytes())


def _subject_status(dataset: Dataset, subject: str, digest: "hashlib._Hash") -> VoxelStatus:
    totals: VoxelStatus | None = None
    for story in dataset.stories.values():
        status = _story_status(dataset, story, subject, digest)
        if totals is not None and totals.finite.size != status.finite.size:
            raise InputError(
                f"{_where(dataset, story, subject)} has {status.finite.size} voxels, "
                f"other stories of {subject} have {totals.finite.size}; all must agree"
            )
        totals = status if totals is None else VoxelStatus(*(a & b for a, b in zip(totals, status, strict=True)))
    assert totals is not None
    return totals


def _story_status(dataset: Dataset, story: Story, subject: str, digest: "hashlib._Hash") -> VoxelStatus:
    where = _where(dataset, story, subject)
    shape, dtype = story.responses[subject].check()
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise InputError(f"{where} is {dtype} of shape {shape}; expected numbers (rows, voxels)")
    rows = dataset.trim.rows(len(story.tr_times_s))
    expected = rows.stop - rows.start
    if shape[0] != expected:
        raise InputError(
            f"{where} has {shape[0]} rows; its {len(story.tr_times_s)} TR times less "
            f"{sum(dataset.trim)} trimmed make {expected}; text and responses must belong to the same cut"
        )
    digest.update(f"{subject}/{story.name}/{shape}/{dtype.str}".encode())
    finite = np.ones(shape[1], bool)
    low, high = np.full(shape[1], np.inf), np.full(shape[1], -np.inf)
    for block in story.responses[subject].blocks():
        digest.update(np.ascontiguousarray(block).data)
        with np.errstate(over="ignore"):
            ok = np.isfinite(block.astype(np.float32))  # what exceeds float32 is not finite in our arithmetic
        finite &= ok.all(axis=0)
        clean = np.where(ok, block, 0)
        low, high = np.minimum(low, clean.min(axis=0)), np.maximum(high, clean.max(axis=0))
    if not finite.any():
        raise InputError(f"{where} has no finite voxel; leave the story out or mend the file")
    return VoxelStatus(finite, high - low > CONSTANT_RANGE)


def _where(dataset: Dataset, story: Story, subject: str) -> str:
    path = story.responses[subject].path
    return f"{path or dataset.source}: story {story.name}, subject {subject}:"
