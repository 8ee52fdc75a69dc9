"""Responses in panels of voxels: the same bits with and without a cache, which answers for one data set alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import edit_responses, make_lab, put
from make_trials import design_of_words
from sklearn.preprocessing import StandardScaler

from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.word_rate import word_rate
from bert_encoding.regression import response_panels
from bert_encoding.regression.response_panels import ResponsePanel, cc_max, panels, stack_responses, z_score
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.regression.solvers import Targets
from bert_encoding.statistics.noise_ceiling import noise_ceiling
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.scoring import prepare_ridge, score_subject, seen_cc

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, ALL = torch.device("cpu"), slice(None)
FIT, SCORED = ("alpha", "beta", "delta"), ("gamma", "zeta")
N_VOXELS, BAD = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects; voxel 4 of the first is constant in one story."""
    folder = make_lab(tmp_path_factory.mktemp("data") / "lab", subjects=("a", "b"), n_voxels=N_VOXELS)
    edit_responses(folder, "beta", put(np.s_[:, BAD], 0.5), "a")
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return inspect(open_dataset(folder))


@pytest.fixture
def cache() -> WorkerCache:
    return WorkerCache()


def folds_of(dataset: Dataset, stories: tuple[str, ...] = FIT) -> np.ndarray:
    """One fold per story, in the order of the stories."""
    return np.repeat(range(len(stories)), [len(dataset.stories[name].tr_times_s) - 15 for name in stories])


def read_targets(dataset: Dataset, cache: WorkerCache, **changes: Any) -> Targets:
    options = {"subject": "a", "fit": FIT, "columns": ALL, "folds": folds_of(dataset), "device": CPU} | changes
    folds = options["folds"]
    ridge = CrossValidatedRidge(np.eye(len(folds), 2, dtype=np.float32), folds, device=options["device"])
    panel = ResponsePanel(dataset, options["subject"], options["fit"], (), options["columns"], cache)
    return panel.targets(ridge)


def read_scored(
    dataset: Dataset, cache: WorkerCache, subject: str = "a", scored: tuple[str, ...] = SCORED
) -> np.ndarray:
    return ResponsePanel(dataset, subject, (), scored, ALL, cache).scored_responses()


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


def test_targets_are_z_scored_over_all_rows(dataset: Dataset, folder: Path, cache: WorkerCache) -> None:
    raw = np.delete(np.vstack([np.load(folder / "a" / f"{name}.npy") for name in FIT]), BAD, axis=1)
    expected = StandardScaler().fit_transform(raw.astype(np.float32).astype(np.float64))
    targets = read_targets(dataset, cache)
    assert targets.Y.dtype == torch.float32
    np.testing.assert_allclose(targets.Y.numpy(), expected, rtol=0, atol=1e-6)
    folds = [expected[folds_of(dataset) == fold] for fold in range(len(FIT))]
    norms = [np.linalg.norm(rows - rows.mean(axis=0), axis=0) for rows in folds]
    np.testing.assert_allclose(targets.norms.numpy(), norms, rtol=1e-5)


def test_z_score_uses_the_mean_and_deviation_of_the_first_array_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    Y, other = ((rng.standard_normal((n, 11)) * np.arange(1, 12) + 5).astype(np.float32) for n in (30, 20))
    scaler = StandardScaler().fit(Y.astype(np.float64))
    expected = scaler.transform(Y), scaler.transform(other)
    monkeypatch.setattr(response_panels, "VOXELS_PER_BLOCK", 4)
    scaled = z_score(Y, other)
    assert scaled[0] is Y and scaled[1] is other
    for array, values in zip(scaled, expected, strict=True):
        np.testing.assert_allclose(array, values, rtol=0, atol=1e-6)


def test_scored_responses_are_in_the_units_of_the_file(dataset: Dataset, folder: Path, cache: WorkerCache) -> None:
    raw = np.delete(np.vstack([np.load(folder / "a" / f"{name}.npy") for name in SCORED]), BAD, axis=1)
    panel = ResponsePanel(dataset, "a", FIT, SCORED, slice(2, 9), cache)
    np.testing.assert_array_equal(panel.scored_responses(), raw[:, 2:9].astype(np.float32))


def test_panels_hold_every_valid_voxel_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_panels, "PANEL_BYTES", 4 * 100 * 5 + 4 * 99)  # five voxels of 100 rows and a rest
    columns = [panel.columns for panel in panels(dataset, "a", FIT, SCORED, 100)]
    assert columns == [slice(0, 5), slice(5, 10), slice(10, 11)]
    narrow = [panel.columns for panel in panels(dataset, "b", FIT, SCORED, 10_000)]
    assert narrow[:2] == [slice(0, 1), slice(1, 2)], "never less than one"


def test_cached_responses_are_read_once_and_the_same_bits_as_fresh_ones(
    dataset: Dataset, cache: WorkerCache, reads: list[str]
) -> None:
    first, scored = read_targets(dataset, cache), read_scored(dataset, cache)
    assert reads == [*FIT, *SCORED]
    assert read_targets(dataset, cache) is first
    assert read_scored(dataset, cache) is scored
    assert reads == [*FIT, *SCORED], "nothing was read again"
    fresh = read_targets(dataset, WorkerCache())
    np.testing.assert_array_equal(first.Y, fresh.Y)
    np.testing.assert_array_equal(first.norms, fresh.norms)
    np.testing.assert_array_equal(scored, stack_responses(dataset, "a", SCORED))
    assert cache.n_bytes == first.Y.nbytes + first.norms.nbytes + scored.nbytes


def other_mask(dataset: Dataset) -> Dataset:
    assert dataset.voxel_masks is not None
    mask = np.roll(dataset.voxel_masks["a"], 1)  # as many voxels, others
    return replace(dataset, voxel_masks={**dataset.voxel_masks, "a": mask})


OTHERS: dict[str, Callable[[Dataset], tuple[Dataset, dict[str, Any]]]] = {
    "data set": lambda d: (changed(d, "other"), {}),
    "voxel mask": lambda d: (other_mask(d), {}),
    "fold layout": lambda d: (d, {"folds": np.maximum(folds_of(d), 1)}),
    "fold order": lambda d: (d, {"folds": -folds_of(d)}),
    "story order": lambda d: (d, {"fit": FIT[::-1], "folds": folds_of(d, FIT[::-1])}),
    "subject": lambda d: (d, {"subject": "b"}),
    "columns": lambda d: (d, {"columns": slice(1, 12)}),
    "device": lambda d: (d, {"device": torch.device("cpu", 0)}),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_cached_responses_answer_only_an_equal_request(dataset: Dataset, cache: WorkerCache, what: str) -> None:
    first, _ = read_targets(dataset, cache), read_scored(dataset, cache)
    other, changes = OTHERS[what](dataset)
    subject = changes.get("subject", "a")
    np.testing.assert_array_equal(read_scored(other, cache, subject), stack_responses(other, subject, SCORED))
    targets, fresh = (read_targets(other, used, **changes) for used in (cache, WorkerCache()))
    assert targets is not first
    np.testing.assert_array_equal(targets.Y, fresh.Y)
    np.testing.assert_array_equal(targets.norms, fresh.norms)
    np.testing.assert_array_equal(read_targets(dataset, cache).Y, first.Y)


def test_targets_and_scored_responses_of_the_same_stories_are_cached_separately(
    dataset: Dataset, cache: WorkerCache
) -> None:
    other = changed(dataset, "other")  # not z-scored
    raw, targets = read_scored(other, cache, scored=FIT), read_targets(other, cache)
    assert np.abs(raw - targets.Y.numpy()).max() > 1e-3
    for order in (FIT, FIT[::-1]):
        np.testing.assert_array_equal(read_scored(other, cache, scored=order), stack_responses(other, "a", order))


def test_nothing_is_cached_without_a_fingerprint(dataset: Dataset, cache: WorkerCache) -> None:
    cached = read_targets(dataset, cache)
    nameless = changed(dataset, "")
    first, second = read_targets(nameless, cache), read_targets(nameless, cache)
    assert cache.n_bytes == 0, "nor is what belongs to another data set"
    assert first is not second
    np.testing.assert_array_equal(first.Y, second.Y)
    assert (first.Y != cached.Y).any()


def test_the_cache_stays_within_its_limit_and_evicts_nothing(dataset: Dataset, reads: list[str]) -> None:
    """Trials request the same in turn: what does not fit is read each time, what does fit only once."""
    columns = [slice(0, 4), slice(4, 8), slice(8, 11)]
    size = read_targets(dataset, WorkerCache(), columns=columns[0]).n_bytes
    cache = WorkerCache(max_bytes=int(2.5 * size))
    rounds = [[read_targets(dataset, cache, columns=part) for part in columns] for _ in range(3)]
    assert [first is last for first, last in zip(rounds[0], rounds[-1], strict=True)] == [True, True, False]
    assert reads[3:] == 3 * list(FIT) + 2 * list(FIT), "three panels, then twice the last"
    assert cache.n_bytes == 2 * size
    np.testing.assert_array_equal(rounds[0][2].Y, rounds[2][2].Y)


def test_scoring_leaves_cached_responses_unchanged_and_gives_the_same_bits_again(dataset: Dataset) -> None:
    config = TrialConfig(method="word_rate", n_folds=3, ridge_alphas=(1.0, 10.0, 100.0))
    vectors = {name: word_rate(story.spoken) for name, story in dataset.stories.items()}
    design = design_of_words(vectors, dataset, FIT, SCORED, config, 0)

    def score(cache: WorkerCache) -> tuple[np.ndarray, np.ndarray]:
        ridge = prepare_ridge(design, config, CPU)
        tested = score_subject(ridge, design, dataset, "a", FIT, SCORED, with_tests=True, cache=cache)
        return tested.cc, seen_cc(ridge, dataset, "a", FIT, cache)

    cache = WorkerCache()
    first, again, fresh = score(cache), score(cache), score(WorkerCache())
    np.testing.assert_array_equal(read_scored(dataset, cache), stack_responses(dataset, "a", SCORED))
    for cc, cc_again, cc_fresh in zip(first, again, fresh, strict=True):
        np.testing.assert_array_equal(cc, cc_again)
        np.testing.assert_array_equal(cc, cc_fresh)


def with_repeats(dataset: Dataset, seed: int, story: str = "zeta") -> Dataset:
    """A story that subject a heard four times: half of the variance of one scan is signal."""
    rng = np.random.default_rng(seed)
    shape = dataset.stories[story].responses["a"].check()[0]
    repeats = rng.standard_normal(shape) + rng.standard_normal((4, *shape))
    heard = replace(dataset.stories[story], repeats={"a": Responses(array=repeats.astype(np.float32))})
    return replace(dataset, stories={**dataset.stories, story: heard})


def test_the_ceiling_is_that_of_the_valid_voxels(dataset: Dataset, cache: WorkerCache) -> None:
    heard = with_repeats(dataset, 0)
    repeats = heard.stories["zeta"].repeats["a"].array
    assert repeats is not None
    ceiling = cc_max(heard, "a", "zeta", cache)
    assert ceiling is not None
    np.testing.assert_allclose(ceiling, noise_ceiling(np.delete(repeats, BAD, axis=2)).cc_max, rtol=1e-6)
    assert 0.7 < ceiling.mean() < 1  # sqrt(1 / (1 + 1 / 4)) is 0.89
    assert cc_max(heard, "a", "zeta", cache) is ceiling
    assert cc_max(heard, "a", "gamma", cache) is cc_max(heard, "b", "zeta", cache) is None, "without repeats"


def test_other_repeats_are_another_data_set(dataset: Dataset, cache: WorkerCache) -> None:
    """Or a ceiling that was kept, and a study that is resumed, would speak of repeats that are gone."""
    one, other = (inspect(with_repeats(dataset, seed)) for seed in (1, 2))
    assert one.fingerprint != other.fingerprint
    first, second = cc_max(one, "a", "zeta", cache), cc_max(other, "a", "zeta", cache)
    assert first is not None and second is not None
    assert (first != second).any()
