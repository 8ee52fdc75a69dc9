"""One pass over transcripts and responses before any fit: problems, valid voxels and a fingerprint.

``survey`` collects all problems, ``inspect`` raises the first one.
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
)
from bert_encoding.datasets.story import Dataset, Story

MAX_SHARE_OUTSIDE = 0.2  # of a story's words before the first or after the last TR


class TextCheck(NamedTuple):
    """One story's transcript."""

    story: str
    n_words: int
    n_trs: int
    n_silent: int  # rows without a spoken word
    share_outside: float  # of the words, before the first or after the last TR; NaN if times are unusable
    problem: str | None


class Survey(NamedTuple):
    """Results of one pass; ``left_out`` and ``doubts`` are also among the notes of the data set."""

    dataset: Dataset  # with voxel masks, and with a fingerprint if there are no problems
    texts: tuple[TextCheck, ...]
    responses: tuple[ResponseCheck, ...]
    left_out: tuple[str, ...]  # the number of masked voxels, one line per subject
    doubts: tuple[str, ...]  # signs that the responses may be wrong, one line each
    problems: tuple[str, ...]  # why the data are unusable, one line each, in the order of the pass


def inspect(dataset: Dataset, watch: Watch | None = None) -> Dataset:
    """Return the data set with its voxel masks, fingerprint and notes; ``watch`` receives every block of responses.

    A voxel is valid if its responses are finite and not constant in every story of the data set, so that the mask
    follows from the responses alone and is the same for every trial.

    Raises InputError if a story has the wrong number of rows or voxels, words and times of different length, or no
    finite voxel.
    """
    result = survey(dataset, watch)
    if result.problems:
        raise InputError(result.problems[0])
    return result.dataset


def survey(dataset: Dataset, watch: Watch | None = None) -> Survey:
    """Read every transcript and every response once, also after a problem.

    A story may lack responses of a subject. Unusable stories are not passed to ``watch`` and do not affect the masks.
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
            of_subject, finite, varies = check_subject(dataset, subject, hasher, watch, usable)
            checks += of_subject
            problems += [problem for check in of_subject for problem in check.problems]
            masks[subject] = finite & varies
            if masks[subject].size and not masks[subject].any():
                problems.append(
                    f"{dataset.source}: subject {subject} has no voxel that is finite and varies in every story"
                )
            left_out += _mask_note(subject, finite, varies)
        problems += hash_repeats(dataset, hasher)
        fingerprint = "" if problems else hasher.result()
        problems += _same_responses(dataset.source, hasher.stories)
    doubts = [doubt for subject in dataset.subjects for doubt in _scale_doubt(subject, checks)]
    notes = (*dataset.notes, *left_out, *doubts, *_silence_note(texts))
    surveyed = replace(dataset, voxel_masks=masks, fingerprint=fingerprint, notes=notes)
    return Survey(surveyed, texts, tuple(checks), tuple(left_out), tuple(doubts), tuple(problems))


def _scale_doubt(subject: str, checks: list[ResponseCheck]) -> list[str]:
    measured = [check for check in checks if check.subject == subject and check.is_z_scored is not None]
    unscaled = [check.story for check in measured if not check.is_z_scored]
    if not unscaled:
        return []
    shown = ", ".join(unscaled[:MAX_SHOWN]) + (", ..." if len(unscaled) > MAX_SHOWN else "")
    return [
        f"{subject}: {len(unscaled)} of {len(measured)} stories are not z-scored (mean 0 and SD 1 of each voxel within "
        f"each story are expected, or differences between stories mask the effect of words): {shown}"
    ]


def _same_responses(source: str, stories: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Return a problem for each copy: one scan cannot belong to two stories or two subjects."""
    return [
        f"{source}: subject {other}'s responses to {copy} are identical to those of subject {subject} to {story}; "
        "remove the copy"
        for same in stories.values()
        for (subject, story), (other, copy) in pairwise(same)
    ]


def _silence_note(texts: tuple[TextCheck, ...]) -> list[str]:
    n_silent = sum(text.n_silent for text in texts)
    return [f"{n_silent} transcript entries are empty or tags and get zero vectors"] if n_silent else []


def _mask_note(subject: str, finite: np.ndarray, varies: np.ndarray) -> list[str]:
    n_valid = int((finite & varies).sum())
    if n_valid == finite.size:
        return []
    return [
        f"{subject}: {finite.size - n_valid} of {finite.size} voxels left out "
        f"({(~finite).sum()} non-finite, {(finite & ~varies).sum()} constant in a story)"
    ]


def _check_text(source: str, story: Story) -> TextCheck:
    spoken, share_outside = story.spoken, _share_outside(story)
    problem = _text_problem(story, spoken, share_outside)
    return TextCheck(
        story.name,
        len(story.words),
        len(story.tr_times_s),
        sum(word == "" for word in spoken),
        share_outside,
        f"{source}: story {story.name}{problem}" if problem else None,
    )


def _share_outside(story: Story) -> float:
    words, trs = story.word_times_s, story.tr_times_s
    if not all(times.size and np.isfinite(times).all() for times in (words, trs)):
        return float("nan")
    return float(np.mean((words < trs[0]) | (words > trs[-1])))


def _text_problem(story: Story, spoken: Sequence[str], share_outside: float) -> str:
    """Return the first problem, as it follows the story's name in a message, or ``""``."""
    n_words, n_times = len(story.words), len(story.word_times_s)
    if n_words != n_times:
        return f" has {n_words} words but {n_times} word times"
    if not any(spoken):
        return " has no spoken word; leave it out"
    for what, times in (("word", story.word_times_s), ("TR", story.tr_times_s)):
        if not np.isfinite(times).all():
            return f" has non-finite {what} times; correct them, or leave the story out"
        if (np.diff(times) < 0).any():
            index = int(np.argmax(np.diff(times) < 0)) + 1
            return (
                f": {what} times must not decrease, but {what} {index} ({times[index]:g} s) comes before "
                f"{what} {index - 1} ({times[index - 1]:g} s)"
            )
    steps = np.diff(story.tr_times_s)
    if steps.size == 0 or steps.min() <= 0 or steps.max() - steps.min() > 1e-3:
        return ": TR times must be evenly spaced, one volume after the other"
    if share_outside > MAX_SHARE_OUTSIDE:
        return (
            f": {share_outside:.0%} of its words are outside the scan "
            f"({story.tr_times_s[0]:g} to {story.tr_times_s[-1]:g} s; words {story.word_times_s[0]:g} to "
            f"{story.word_times_s[-1]:g}); word times must be in seconds from the story's start"
        )
    return ""
