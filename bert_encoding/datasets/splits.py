"""The role of each story: fit, validation or test."""

from dataclasses import dataclass

import numpy as np

from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.datasets.story import Dataset

VALIDATION_SHARE = 0.2
MIN_FIT_STORIES = 3  # when one is predicted, two remain to choose penalties


@dataclass(frozen=True)
class Split:
    """Story names by role; no story has two roles."""

    fit: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for first, second in (("fit", "validation"), ("fit", "test"), ("validation", "test")):
            shared = sorted(set(getattr(self, first)) & set(getattr(self, second)))
            if shared:
                raise InputError(f"story {shared[0]} is in both {first} and {second}")


def choose_subjects(dataset: Dataset, names: list[str] | None) -> tuple[str, ...]:
    """Return the subjects to study, all by default; raise ``InputError`` if a name is unknown."""
    for name in names or ():
        if name not in dataset.subjects:
            raise InputError(f"{dataset.source}: no subject {name}; it has {', '.join(dataset.subjects)}")
    return tuple(dict.fromkeys(names)) if names else dataset.subjects


def choose_stories(
    dataset: Dataset, subjects: tuple[str, ...], test_stories: list[str] | None, n_train_stories: int | None, seed: int
) -> tuple[list[str], list[str]]:
    """Return (training stories, test stories); training stories are later divided into fit and validation.

    Stories without responses of a chosen subject are left out, also among the published test stories. With
    ``n_train_stories``, that many are drawn at random from the others.

    Raises InputError if a test story does not exist or lacks responses, there is none, or there are fewer than
    ``n_train_stories``.
    """
    with_responses = [n for n, story in dataset.stories.items() if all(s in story.responses for s in subjects)]
    published = [name for name in dataset.published_test if name in with_responses]
    test = list(dict.fromkeys(test_stories)) if test_stories else published
    for name in test:
        if name not in dataset.stories:
            raise InputError(f"{dataset.source}: test story {name!r} not found")
        if name not in with_responses:
            lacking = next(s for s in subjects if s not in dataset.stories[name].responses)
            raise InputError(f"{dataset.source}: test story {name} has no responses of subject {lacking}")
    if not test:
        raise InputError(
            f"{dataset.source}: contains none of the published test stories heard by {', '.join(subjects)}; "
            "name yours with --test-stories"
        )
    rest = [name for name in with_responses if name not in test]
    if n_train_stories is None:
        return rest, test
    if not 1 <= n_train_stories <= len(rest):
        raise InputError(
            f"--train-stories {n_train_stories}: {dataset.source} has {len(rest)} that are not test stories"
        )
    chosen = generator(seed, "train stories").permutation(len(rest))[:n_train_stories]
    return sorted(rest[i] for i in chosen), test


def split_stories(train: list[str], test: list[str], seed: int, n_outer_folds: int) -> tuple[Split, ...]:
    """Divide the training stories into fit and validation, once or in rotating folds; too few raise InputError."""
    shuffled = [sorted(train)[i] for i in generator(seed, "split").permutation(len(train))]
    n_validation = max(1, round(VALIDATION_SHARE * len(train)))
    if n_outer_folds == 1:
        parts = [shuffled[:n_validation]]
    elif 2 <= n_outer_folds <= len(train):
        parts = [list(part) for part in np.array_split(np.array(shuffled, dtype=object), n_outer_folds)]
    else:
        raise InputError(f"--outer-folds {n_outer_folds}: must be 1 to {len(train)}, the number of training stories")
    if len(train) - max(map(len, parts)) < MIN_FIT_STORIES:
        raise InputError(
            f"too few stories to split: {len(train)} training stories, of which {max(map(len, parts))} for validation; "
            f"at least {MIN_FIT_STORIES} must remain to fit"
        )
    return tuple(
        Split(tuple(sorted(set(train) - set(part))), tuple(sorted(part)), tuple(sorted(test))) for part in parts
    )


def story_folds(n_rows: dict[str, int], n_folds: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Return folds of whole stories with about equal rows: longest first, each into the smallest fold.

    With fewer stories than folds, each story is a fold. ``seed`` settles the order of equally long stories.
    """
    order = generator(seed, "folds").permutation(len(n_rows))
    names = sorted((sorted(n_rows)[i] for i in order), key=lambda name: -n_rows[name])
    folds: list[list[str]] = [[] for _ in range(min(n_folds, len(names)))]
    for name in names:
        min(folds, key=lambda fold: sum(n_rows[other] for other in fold)).append(name)
    return tuple(tuple(sorted(fold)) for fold in folds)
