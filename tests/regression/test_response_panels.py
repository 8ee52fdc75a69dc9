"""Responses that trials share: the bits of fresh ones, of this data set alone, and no more than there is room for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import make_lab
from sklearn.preprocessing import StandardScaler

from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.word_rate import word_rate
from bert_encoding.regression import response_panels
from bert_encoding.regression.response_panels import (
    cc_max,
    fit_targets,
    scored_responses,
    stack_responses,
    voxel_panels,
    z_score,
)
from bert_encoding.regression.solvers import Targets
from bert_encoding.statistics.noise_ceiling import noise_ceiling
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import make_design, prepare_ridge, score_subject, seen_cc

pytestmark = pytest.mark.usefixtures("one_blas_thread")

CPU, ALL = torch.device("cpu"), slice(None)
FIT, SCORED = ("alpha", "beta", "delta"), ("gamma", "zeta")
N_VOXELS, BAD = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects; voxel 4 of the first is constant in one story."""
    made = make_lab(tmp_path_factory.mktemp("data") / "lab", subjects=("a", "b"), n_voxels=N_VOXELS)
    responses = np.load(made / "a" / "beta.npy")
    responses[:, BAD] = 0.5
    np.save(made / "a" / "beta.npy", responses)
    return made


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return inspect(open_dataset(folder))


def rows_of(dataset: Dataset, stories: tuple[str, ...] = FIT) -> list[np.ndarray]:
    """One fold a story."""
    sizes = [len(dataset.stories[name].tr_times_s) - 15 for name in stories]
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def targets(dataset: Dataset, **changes: Any) -> Targets:
    asked = {"subject": "a", "stories": FIT, "columns": ALL, "rows": rows_of(dataset), "device": CPU} | changes
    return fit_targets(dataset, **asked)


def changed(dataset: Dataset, fingerprint: str) -> Dataset:
    """Other responses under the same names."""
    rng = np.random.default_rng(7)
    stories = {
        name: replace(
            story, responses={s: Responses(array=rng.standard_normal(r.check()[0])) for s, r in story.responses.items()}
        )
        for name, story in dataset.stories.items()
    }
    return replace(dataset, stories=stories, fingerprint=fingerprint)


def arrays(value: Targets | np.ndarray) -> list[np.ndarray]:
    return [value.Y.numpy(), value.norms.numpy()] if isinstance(value, Targets) else [value]


def n_kept_bytes() -> int:
    """What is really held, counted anew."""
    return sum(array.nbytes for value, _ in response_panels._KEPT.values() for array in arrays(value))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stories that are read from now on."""
    read: list[str] = []
    valid = Dataset.valid_responses

    def watch(self: Dataset, story: str, subject: str, columns: slice = ALL) -> np.ndarray:
        read.append(story)
        return valid(self, story, subject, columns)

    monkeypatch.setattr(Dataset, "valid_responses", watch)
    return read


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_targets_are_z_scored_over_all_rows(dataset: Dataset, folder: Path) -> None:
    raw = np.delete(np.vstack([np.load(folder / "a" / f"{name}.npy") for name in FIT]), BAD, axis=1)
    expected = StandardScaler().fit_transform(raw.astype(np.float32).astype(np.float64))
    found = targets(dataset)
    assert found.Y.dtype == torch.float32
    np.testing.assert_allclose(found.Y.numpy(), expected, rtol=0, atol=1e-6)
    norms = [np.linalg.norm(expected[rows] - expected[rows].mean(axis=0), axis=0) for rows in rows_of(dataset)]
    np.testing.assert_allclose(found.norms.numpy(), norms, rtol=1e-5)


def test_z_score_works_in_place_and_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    Y = (np.random.default_rng(0).standard_normal((30, 11)) * np.arange(1, 12) + 5).astype(np.float32)
    expected = StandardScaler().fit_transform(Y.astype(np.float64))
    monkeypatch.setattr(response_panels, "VOXELS_PER_BLOCK", 4)
    assert z_score(Y) is Y
    np.testing.assert_allclose(Y, expected, rtol=0, atol=1e-6)


def test_scored_responses_are_raw(dataset: Dataset, folder: Path) -> None:
    raw = np.delete(np.vstack([np.load(folder / "a" / f"{name}.npy") for name in SCORED]), BAD, axis=1)
    np.testing.assert_array_equal(scored_responses(dataset, "a", SCORED, slice(2, 9)), raw[:, 2:9].astype(np.float32))


def test_panels_hold_every_valid_voxel_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * 100 * 5 + 4 * 99)  # five voxels of 100 rows and a rest
    assert voxel_panels(dataset, "a", 100) == [slice(0, 5), slice(5, 10), slice(10, 11)]
    assert voxel_panels(dataset, "b", 10_000)[:2] == [slice(0, 1), slice(1, 2)], "never less than one"


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_kept_responses_are_read_once_and_the_same_bits_as_fresh_ones(dataset: Dataset, reads: list[str]) -> None:
    first, scored = targets(dataset), scored_responses(dataset, "a", SCORED, ALL)
    assert reads == [*FIT, *SCORED]
    assert targets(dataset) is first
    assert scored_responses(dataset, "a", SCORED, ALL) is scored
    assert reads == [*FIT, *SCORED], "nothing was read again"
    fresh = Targets.prepare(z_score(stack_responses(dataset, "a", FIT)), rows_of(dataset))
    np.testing.assert_array_equal(first.Y, fresh.Y)
    np.testing.assert_array_equal(first.norms, fresh.norms)
    np.testing.assert_array_equal(scored, stack_responses(dataset, "a", SCORED))


def other_mask(dataset: Dataset) -> Dataset:
    assert dataset.voxel_masks is not None
    mask = np.roll(dataset.voxel_masks["a"], 1)  # as many voxels, others
    return replace(dataset, voxel_masks={**dataset.voxel_masks, "a": mask})


def two_folds(dataset: Dataset) -> list[np.ndarray]:
    first, second, third = rows_of(dataset)
    return [np.concatenate([first, second]), third]


OTHERS: dict[str, Callable[[Dataset], tuple[Dataset, dict[str, Any]]]] = {
    "data set": lambda d: (changed(d, "other"), {}),
    "voxel mask": lambda d: (other_mask(d), {}),
    "fold layout": lambda d: (d, {"rows": two_folds(d)}),
    "fold order": lambda d: (d, {"rows": rows_of(d)[::-1]}),
    "story order": lambda d: (d, {"stories": FIT[::-1], "rows": rows_of(d, FIT[::-1])}),
    "subject": lambda d: (d, {"subject": "b"}),
    "columns": lambda d: (d, {"columns": slice(1, 12)}),
    "device": lambda d: (d, {"device": torch.device("cpu", 0)}),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_what_was_kept_for_one_question_answers_no_other(dataset: Dataset, what: str) -> None:
    first = targets(dataset)
    other, changes = OTHERS[what](dataset)
    found = targets(other, **changes)
    assert found is not first
    response_panels._KEPT.clear()
    fresh = targets(other, **changes)
    np.testing.assert_array_equal(found.Y, fresh.Y)
    np.testing.assert_array_equal(found.norms, fresh.norms)


@pytest.mark.parametrize("what", ["data set", "voxel mask", "subject"])
def test_scored_responses_of_one_question_answer_no_other(dataset: Dataset, what: str) -> None:
    first = scored_responses(dataset, "a", SCORED, ALL)
    other, changes = OTHERS[what](dataset)
    found = scored_responses(other, changes.get("subject", "a"), SCORED, ALL)
    np.testing.assert_array_equal(found, stack_responses(other, changes.get("subject", "a"), SCORED))
    assert found.shape != first.shape or (found != first).any()
    assert (scored_responses(dataset, "a", SCORED[::-1], ALL)[0] == stack_responses(dataset, "a", ("zeta",))[0]).all()


def test_targets_and_scored_responses_of_the_same_stories_are_kept_apart(dataset: Dataset) -> None:
    other = changed(dataset, "other")  # not z-scored as they come
    raw, found = scored_responses(other, "a", FIT, ALL), targets(other)
    assert np.abs(raw - found.Y.numpy()).max() > 1e-3
    np.testing.assert_array_equal(scored_responses(other, "a", FIT, ALL), stack_responses(other, "a", FIT))


def test_nothing_is_kept_without_a_fingerprint(dataset: Dataset) -> None:
    kept = targets(dataset)
    nameless = changed(dataset, "")
    first, second = targets(nameless), targets(nameless)
    assert response_panels._KEPT == {}, "nor is what belongs to another data set"
    assert first is not second
    np.testing.assert_array_equal(first.Y, second.Y)
    assert (first.Y != kept.Y).any()


def test_a_data_set_that_comes_back_is_read_again(dataset: Dataset, reads: list[str]) -> None:
    before = targets(dataset).Y.clone()
    targets(changed(dataset, "other"))
    np.testing.assert_array_equal(targets(dataset).Y, before)
    assert reads == 3 * list(FIT)


def test_what_is_kept_stays_within_its_budget_and_is_not_pushed_out(
    dataset: Dataset, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials ask for the same in turn: what does not fit is read each time, what does fit only once."""
    panels = [slice(0, 4), slice(4, 8), slice(8, 11)]
    size = targets(dataset, columns=panels[0]).n_bytes
    response_panels._KEPT.clear()
    monkeypatch.setattr(response_panels, "KEPT_BYTES", int(2.5 * size))
    rounds = [[targets(dataset, columns=columns) for columns in panels] for _ in range(3)]
    assert [first is last for first, last in zip(rounds[0], rounds[-1], strict=True)] == [True, True, False]
    assert reads[3:] == 3 * list(FIT) + 2 * list(FIT), "three panels, then twice the last"
    assert n_kept_bytes() == 2 * size <= response_panels.KEPT_BYTES
    np.testing.assert_array_equal(rounds[0][2].Y, rounds[2][2].Y)


def test_what_is_larger_than_the_budget_is_not_kept(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_panels, "KEPT_BYTES", targets(dataset).n_bytes - 1)
    response_panels._KEPT.clear()
    targets(dataset)
    assert n_kept_bytes() == 0


def test_the_sizes_that_are_counted_are_those_held(dataset: Dataset) -> None:
    targets(dataset), scored_responses(dataset, "a", SCORED, ALL)
    assert sum(size for _, size in response_panels._KEPT.values()) == n_kept_bytes() > 0


def test_scoring_leaves_what_is_kept_as_it_was_and_gives_the_same_bits_again(dataset: Dataset) -> None:
    config = TrialConfig(method="word_rate", n_folds=3, ridge_alphas=(1.0, 10.0, 100.0))
    vectors = {name: word_rate(story.spoken) for name, story in dataset.stories.items()}
    design = make_design(vectors, dataset, FIT, SCORED, config, 0)

    def score() -> tuple[np.ndarray, np.ndarray]:
        ridge = prepare_ridge(design, config, CPU)
        tested = score_subject(ridge, design, dataset, "a", FIT, SCORED, with_tests=True)
        return tested.cc, seen_cc(ridge, dataset, "a", FIT)

    first = score()
    kept = dict(response_panels._KEPT)
    assert len(kept) == 2, "the responses to fit, shared with the seen score, and those to score"
    copies = {key: [array.copy() for array in arrays(value)] for key, (value, _) in kept.items()}
    again = score()
    for key, (value, _) in kept.items():
        assert response_panels._KEPT[key][0] is value
        for array, copy in zip(arrays(value), copies[key], strict=True):
            np.testing.assert_array_equal(array, copy)
    response_panels._KEPT.clear()
    fresh = score()
    for one, other, third in zip(first, again, fresh, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)


# --- noise ceilings ---------------------------------------------------------------------------------------------------


def with_repeats(dataset: Dataset, seed: int, story: str = "zeta") -> Dataset:
    """A story that subject a heard four times: half of the variance of one scan is signal."""
    rng = np.random.default_rng(seed)
    shape = dataset.stories[story].responses["a"].check()[0]
    repeats = rng.standard_normal(shape) + rng.standard_normal((4, *shape))
    heard = replace(dataset.stories[story], repeats={"a": Responses(array=repeats.astype(np.float32))})
    return replace(dataset, stories={**dataset.stories, story: heard})


def test_the_ceiling_is_that_of_the_valid_voxels(dataset: Dataset) -> None:
    heard = with_repeats(dataset, 0)
    repeats = heard.stories["zeta"].repeats["a"].array
    assert repeats is not None
    found = cc_max(heard, "a", "zeta")
    assert found is not None
    np.testing.assert_allclose(found, noise_ceiling(np.delete(repeats, BAD, axis=2)).cc_max, rtol=1e-6)
    assert 0.7 < found.mean() < 1  # sqrt(1 / (1 + 1 / 4)) is 0.89
    assert cc_max(heard, "a", "zeta") is found


def test_without_repeats_there_is_no_ceiling(dataset: Dataset) -> None:
    heard = with_repeats(dataset, 0)
    assert cc_max(heard, "a", "gamma") is None
    assert cc_max(heard, "b", "zeta") is None


def test_other_repeats_are_another_data_set(dataset: Dataset) -> None:
    """Or a ceiling that was kept, and a study that is resumed, would speak of repeats that are gone."""
    one, other = (inspect(with_repeats(dataset, seed)) for seed in (1, 2))
    assert one.fingerprint != other.fingerprint
    first, second = cc_max(one, "a", "zeta"), cc_max(other, "a", "zeta")
    assert first is not None and second is not None
    assert (first != second).any()
