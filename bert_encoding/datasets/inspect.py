"""One pass over transcripts and responses before any fit: what is wrong, which voxels are valid, a fingerprint.

``survey`` goes on after a problem and tells all of them, ``inspect`` raises the first.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.inspect_responses import (
    MAX_SHOWN,
    Hasher,
    ResponseCheck,
    Watch,
    check_subject,
    hash_repeats,
    repeats_of,
)
from bert_encoding.datasets.story import Dataset, Story

MAX_SHARE_OUTSIDE = 0.2  # of a story's words before the first or after the last TR


class TextCheck(NamedTuple):
    """One story's transcript.

    Attributes
    ----------
    n_silent : rows without a spoken word
    share_outside : share of the words before the first or after the last TR; NaN if times are unusable
    problem : why it is unusable, or None
    """

    story: str
    n_words: int
    n_trs: int
    n_silent: int
    share_outside: float
    problem: str | None


class Survey(NamedTuple):
    """What one pass found.

    Attributes
    ----------
    dataset : with its voxel masks and notes, and its fingerprint if nothing is wrong
    left_out : which voxels are masked, a line a subject; also among the data set's notes
    doubts : what speaks against the responses without ruling them out, a line each; also among the notes
    problems : why the data are unusable, a line each, in the order in which they were met
    """

    dataset: Dataset
    texts: tuple[TextCheck, ...]
    responses: tuple[ResponseCheck, ...]
    left_out: tuple[str, ...]
    doubts: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(dataset: Dataset, watch: Watch | None = None) -> Dataset:
    """Return the data set with its voxel masks, fingerprint and notes.

    A voxel is valid if its responses are finite and not constant in every story of the data set, so that the mask
    follows from the responses alone and is the same for every trial.

    Parameters
    ----------
    watch : sees every block of responses as it is read

    Raises
    ------
    InputError
        if a story has the wrong number of rows or voxels, words and times of different length, or no finite
        voxel at all.
    """
    found = survey(dataset, watch)
    if found.problems:
        raise InputError(found.problems[0])
    return found.dataset


def survey(dataset: Dataset, watch: Watch | None = None) -> Survey:
    """Look at every transcript and every response once, whatever is wrong with them.

    Stories without responses of a subject are no problem of that subject. What is unusable is not shown to ``watch``
    and has no say in the masks.
    """
    texts = tuple(_check_text(dataset.source, story) for story in dataset.stories.values())
    problems = [text.problem for text in texts if text.problem]
    left_out: list[str] = []
    checks, masks = [], {}
    usable = {text.story for text in texts if not text.problem}
    with Hasher() as hasher:
        for story in dataset.stories.values():
            hasher.add_text(story)
        for subject in dataset.subjects:
            found, finite, varies = check_subject(dataset, subject, hasher, watch, usable)
            checks += found
            problems += [problem for check in found for problem in check.problems]
            masks[subject] = finite & varies
            if masks[subject].size and not masks[subject].any():
                problems.append(
                    f"{dataset.source}: subject {subject} has no voxel that is finite and varies in every story"
                )
            left_out += _mask_note(subject, finite, varies)
        problems += [problem for problem in (hash_repeats(*of, hasher) for of in repeats_of(dataset)) if problem]
        fingerprint = "" if problems else hasher.result()
        problems += _same_responses(dataset.source, hasher.stories)
    doubts = [doubt for subject in dataset.subjects for doubt in _scale_doubt(subject, checks)]
    notes = (*dataset.notes, *left_out, *doubts, *_silence_note(texts))
    surveyed = replace(dataset, voxel_masks=masks, fingerprint=fingerprint, notes=notes)
    return Survey(surveyed, texts, tuple(checks), tuple(left_out), tuple(doubts), tuple(problems))


def _scale_doubt(subject: str, checks: list[ResponseCheck]) -> list[str]:
    measured = [check for check in checks if check.subject == subject and check.is_z_scored is not None]
    others = [check.story for check in measured if not check.is_z_scored]
    if not others:
        return []
    shown = ", ".join(others[:MAX_SHOWN]) + (", ..." if len(others) > MAX_SHOWN else "")
    return [
        f"{subject}: {len(others)} of {len(measured)} stories are not z-scored (mean 0 and SD 1 of each voxel in each "
        f"story are expected, or differences between stories drown the words): {shown}"
    ]


def _same_responses(source: str, stories: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Refuse copies: one scan cannot be of two stories, or of two people."""
    problems = []
    for same in stories.values():
        for (subject, story), (other, twin) in pairwise(same):
            problems.append(
                f"{source}: subject {other}'s responses to {twin} are those of subject {subject} to {story}, number "
                "for number; take out the copy"
            )
    return problems


def _silence_note(texts: tuple[TextCheck, ...]) -> list[str]:
    n_silent = sum(text.n_silent for text in texts)
    if not n_silent:
        return []
    return [f"{n_silent} rows of the transcripts hold no spoken word (empty or a tag): zero vectors"]


def _mask_note(subject: str, finite: np.ndarray, varies: np.ndarray) -> list[str]:
    n_valid = int((finite & varies).sum())
    if n_valid == finite.size:
        return []
    return [
        f"{subject}: {finite.size - n_valid} of {finite.size} voxels left out "
        f"({(~finite).sum()} non-finite, {(finite & ~varies).sum()} constant in a story)"
    ]


# --- text -------------------------------------------------------------------------------------------------------------


def _check_text(source: str, story: Story) -> TextCheck:
    spoken, share_outside = story.spoken, _share_outside(story)
    complaint = _text_complaint(story, spoken, share_outside)
    return TextCheck(
        story.name,
        len(story.words),
        len(story.tr_times_s),
        sum(word == "" for word in spoken),
        share_outside,
        f"{source}: story {story.name}{complaint}" if complaint else None,
    )


def _share_outside(story: Story) -> float:
    words, trs = story.word_times_s, story.tr_times_s
    if not words.size or not trs.size or not np.isfinite(words).all() or not np.isfinite(trs).all():
        return float("nan")
    return float(np.mean((words < trs[0]) | (words > trs[-1])))


def _text_complaint(story: Story, spoken: Sequence[str], share_outside: float) -> str:
    """Return the first thing that is wrong, to follow the story's name, or nothing."""
    n_words, n_times = len(story.words), len(story.word_times_s)
    if n_words != n_times:
        return f" has {n_words} words but {n_times} word times"
    if not any(spoken):
        return " has no spoken word; leave it out"
    for what, times in (("word", story.word_times_s), ("TR", story.tr_times_s)):
        if not np.isfinite(times).all():
            return f" has non-finite {what} times; mend or leave it out"
        if (np.diff(times) < 0).any():
            at = int(np.argmax(np.diff(times) < 0)) + 1
            return (
                f": {what} times must not decrease, "
                f"but {what} {at} ({times[at]:g} s) comes before {what} {at - 1} ({times[at - 1]:g} s)"
            )
    steps = np.diff(story.tr_times_s)
    if steps.size == 0 or steps.min() <= 0 or steps.max() - steps.min() > 1e-3:
        return ": TR times must be evenly spaced, one volume after the other"
    if share_outside > MAX_SHARE_OUTSIDE:
        return (
            f": {share_outside:.0%} of its words lie outside the scan "
            f"({story.tr_times_s[0]:g} to {story.tr_times_s[-1]:g} s; words {story.word_times_s[0]:g} to "
            f"{story.word_times_s[-1]:g}); word times must be in seconds from the story's start"
        )
    return ""
