"""Which stories may see what: no story twice, none lost, the same for the same seed."""

import heapq
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split, choose_stories, choose_subjects, split_stories, story_folds
from bert_encoding.datasets.story import Dataset, Story

SUBJECTS = ("subject2", "subject3")


def names(n: int) -> list[str]:
    return [f"story{at:03}" for at in range(n)]


def make_dataset(stories: Mapping[str, Sequence[str]], published: tuple[str, ...] = ()) -> Dataset:
    """A data set in memory: story -> subjects with responses to it."""
    made = {
        name: Story(
            name, ("word",), np.zeros(1), np.arange(20) * 2.0, {s: Responses(array=np.zeros((5, 1))) for s in heard}
        )
        for name, heard in sorted(stories.items())
    }
    return Dataset("the/source", made, SUBJECTS, published)


@pytest.fixture
def dataset() -> Dataset:
    """Twelve stories that both subjects heard, one that a single one heard; the last two are published tests."""
    both = names(12)
    return make_dataset({**dict.fromkeys(both, SUBJECTS), "partial": SUBJECTS[:1]}, tuple(both[-2:]))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("ab", "b", "c"), "story b is in both fit and validation"),
        (("ab", "c", "a"), "story a is in both fit and test"),
        (("ab", "cd", "d"), "story d is in both validation and test"),
    ],
)
def test_split_refuses_a_story_with_two_roles(roles: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Split(*map(tuple, roles))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("n_stories", [4, 5, 7, 8, 12, 13, 20, 26, 83, 100])
def test_one_split_covers_the_training_stories_once_with_a_fifth_for_validation(n_stories: int, seed: int) -> None:
    train = names(n_stories)
    (split,) = split_stories(train, ["test_b", "test_a"], seed, 1)
    assert sorted(split.fit + split.validation) == train
    assert split.test == ("test_a", "test_b")
    assert (sorted(split.fit), sorted(split.validation)) == (list(split.fit), list(split.validation))
    assert len(split.validation) >= 1
    assert abs(len(split.validation) - 0.2 * n_stories) <= 0.5


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("n_stories", "n_folds"), [(4, 4), (6, 2), (10, 5), (11, 5), (13, 2), (20, 20), (83, 10)])
def test_outer_folds_rotate_every_training_story_through_validation_once(
    n_stories: int, n_folds: int, seed: int
) -> None:
    train = names(n_stories)
    splits = split_stories(train, ["test"], seed, n_folds)
    assert len(splits) == n_folds
    assert sorted(name for split in splits for name in split.validation) == train
    for split in splits:
        assert sorted(split.fit + split.validation) == train
        assert split.test == ("test",)
        assert all(type(name) is str for name in split.validation)
    sizes = [len(split.validation) for split in splits]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n_folds", [1, 4])
def test_splits_follow_the_seed_and_nothing_else(n_folds: int) -> None:
    train, test = names(15), ["test"]
    assert split_stories(train, test, 3, n_folds) == split_stories(train, test, 3, n_folds)
    assert len({split_stories(train, test, seed, n_folds)[0].validation for seed in range(30)}) > 20
    assert (train, test) == (names(15), ["test"])
    assert split_stories(train[::-1], ["b", "a"], 0, n_folds) == split_stories(train, ["a", "b"], 0, n_folds)


def test_every_story_is_as_likely_to_validate_as_any_other() -> None:
    """Counts over seeds are binomial: 2 of 10 stories per seed."""
    train, n_seeds = names(10), 600
    chosen = [name for seed in range(n_seeds) for name in split_stories(train, ["test"], seed, 1)[0].validation]
    counts = np.array([chosen.count(name) for name in train])
    assert np.abs(counts - 0.2 * n_seeds).max() < 4 * np.sqrt(n_seeds * 0.2 * 0.8)


@pytest.mark.parametrize(
    ("n_stories", "n_folds", "message"),
    [
        *((n, 1, f"{n} training stories.*at least 3 must remain") for n in range(4)),
        *(
            (n, 2, f"{n} training stories, of which {n_validation} for validation")
            for n, n_validation in ((4, 2), (5, 3))
        ),
        *((10, n_folds, f"--outer-folds {n_folds}: must be 1 to 10") for n_folds in (-1, 0, 11)),
        (10, 1, "story story004 is in both"),
    ],
)
def test_stories_that_cannot_be_split_are_refused(n_stories: int, n_folds: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_stories(names(n_stories), ["story004"], 0, n_folds)


def test_a_part_of_a_data_set_is_sorted_and_leaves_the_whole(dataset: Dataset) -> None:
    part = dataset.only(["story002", "story001"], SUBJECTS[1:])
    assert (list(part.stories), part.subjects) == (["story001", "story002"], SUBJECTS[1:])
    assert len(dataset.stories) == 13


def test_choose_subjects_takes_all_or_those_named_once_each(dataset: Dataset) -> None:
    assert choose_subjects(dataset, None) == SUBJECTS
    assert choose_subjects(dataset, []) == SUBJECTS
    assert choose_subjects(dataset, ["subject3"]) == ("subject3",)
    assert choose_subjects(dataset, ["subject3", "subject2", "subject3"]) == ("subject3", "subject2")
    with pytest.raises(InputError, match="the/source: no subject subject9; it has subject2, subject3"):
        choose_subjects(dataset, ["subject2", "subject9"])


@pytest.mark.parametrize(
    ("subjects", "named", "train", "test"),
    [
        (SUBJECTS, None, names(12)[:-2], names(12)[-2:]),
        (SUBJECTS[:1], None, ["partial", *names(12)[:-2]], names(12)[-2:]),
        (SUBJECTS[:1], ["partial"], names(12), ["partial"]),
        (SUBJECTS, ["story003", "story001", "story003"], sorted({*names(12)} - {"story001", "story003"}), None),
    ],
)
def test_stories_that_all_chosen_subjects_heard_train_except_published_or_named_ones(
    subjects: tuple[str, ...], named: list[str] | None, train: list[str], test: list[str] | None, dataset: Dataset
) -> None:
    assert choose_stories(dataset, subjects, named, None, 0) == (train, test or ["story003", "story001"])


@pytest.mark.parametrize("n_train", [1, 4, 10])
def test_fewer_training_stories_are_a_seeded_choice(dataset: Dataset, n_train: int) -> None:
    everything = names(12)[:-2]
    train, test = choose_stories(dataset, SUBJECTS, None, n_train, 5)
    assert len(train) == len(set(train)) == n_train
    assert set(train) <= set(everything)
    assert train == sorted(train)
    assert test == names(12)[-2:]
    assert choose_stories(dataset, SUBJECTS, None, n_train, 5) == (train, test)
    drawn = {name for seed in range(60) for name in choose_stories(dataset, SUBJECTS, None, n_train, seed)[0]}
    assert drawn == set(everything)


@pytest.mark.parametrize(
    ("test", "n_train", "message"),
    [
        *((None, n, f"--train-stories {n}: the/source has 10 that are not test stories") for n in (-1, 0, 11)),
        (["story001", "nosuch"], None, "the/source: test story 'nosuch' not found"),
        (["partial"], None, "test story partial has no responses of subject subject3"),
    ],
)
def test_stories_that_cannot_be_chosen_are_refused(
    test: list[str] | None, n_train: int | None, message: str, dataset: Dataset
) -> None:
    with pytest.raises(InputError, match=message):
        choose_stories(dataset, SUBJECTS, test, n_train, 0)


def test_without_a_published_test_story_the_user_must_name_one() -> None:
    with pytest.raises(InputError, match=r"the/source: .* name yours with --test-stories"):
        choose_stories(make_dataset(dict.fromkeys(names(5), SUBJECTS)), SUBJECTS, None, None, 0)


def longest_first(n_rows: Mapping[str, int], n_folds: int) -> set[frozenset[str]]:
    """The same rule with a heap; story lengths must differ."""
    heap: list[tuple[int, int, list[str]]] = [(0, at, []) for at in range(n_folds)]
    for name, rows in sorted(n_rows.items(), key=lambda item: item[1], reverse=True):
        total, at, fold = heapq.heappop(heap)
        heapq.heappush(heap, (total + rows, at, [*fold, name]))
    return {frozenset(fold) for _, _, fold in heap}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("n_stories", "n_folds"), [(6, 2), (10, 5), (27, 4), (80, 5)])
def test_story_folds_equal_the_rule_kept_with_a_heap(n_stories: int, n_folds: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).permutation(np.arange(150, 550))[:n_stories]
    n_rows = dict(zip(names(n_stories), map(int, lengths), strict=True))
    folds = story_folds(n_rows, n_folds, seed)
    assert {frozenset(fold) for fold in folds} == longest_first(n_rows, n_folds)


@pytest.mark.parametrize("n_stories", [2, 5, 9, 40])
@pytest.mark.parametrize("n_folds", [2, 3, 5])
@pytest.mark.parametrize("equal", [True, False])
def test_story_folds_are_balanced_and_hold_every_story_once(n_stories: int, n_folds: int, equal: bool) -> None:
    """A fold leads the smallest one by no more than its own shortest story: the last it was given."""
    rng = np.random.default_rng(n_stories)
    n_rows = {name: 300 if equal else int(rng.integers(100, 500)) for name in names(n_stories)}
    folds = story_folds(n_rows, n_folds, 0)
    assert len(folds) == min(n_folds, n_stories)
    assert all(folds)
    assert all(not set(a) & set(b) for a, b in combinations(folds, 2))
    assert sorted(name for fold in folds for name in fold) == names(n_stories)
    rows = [sum(n_rows[name] for name in fold) for fold in folds]
    for fold, total in zip(folds, rows, strict=True):
        assert total - min(rows) <= min(n_rows[name] for name in fold)


def test_story_folds_follow_the_seed_and_not_the_order_of_the_dict() -> None:
    n_rows = dict.fromkeys(names(12), 300)
    reordered = dict(reversed(n_rows.items()))
    assert story_folds(n_rows, 4, 1) == story_folds(reordered, 4, 1) == story_folds(n_rows, 4, 1)
    assert len({frozenset(story_folds(n_rows, 4, seed)) for seed in range(20)}) > 15
