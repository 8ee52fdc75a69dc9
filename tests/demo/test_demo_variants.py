"""The demos' listeners: what they share, what their voxels follow, and how they are opened."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import DEMO, DEMO_HELPS, DEMO_NULL, DEMOS
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.datasets.story import Dataset
from bert_encoding.demo import open_data
from bert_encoding.demo import simulated_listeners as listeners
from bert_encoding.demo import stories as demo
from bert_encoding.demo.simulated_listeners import Followed
from bert_encoding.demo.stories import N_DIRECTIONS, N_LANGUAGE, N_VOXELS, SUBJECT, demo_stories, simulate_listener
from bert_encoding.features.downsampling import downsample_story
from bert_encoding.language_model.encoder import MINILM, load_encoder
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.run import run_trial
from study.results.locked_stories import check_looks
from study.setup.resolve import model_of

LANGUAGE, OTHERS = slice(0, N_LANGUAGE), slice(N_LANGUAGE, N_VOXELS)
N_LOWER = 64  # language voxels of demo-null that follow a lower layer
N_LAST = N_LANGUAGE - N_LOWER  # and the last one


@pytest.mark.parametrize("name", DEMOS)
def test_demos_are_opened_by_name_and_need_neither_model_nor_permission(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "simulate_listener", lambda dataset: (replace(dataset, notes=("simulated",)), None))
    for simulate, notes in ((True, ("simulated",)), (False, ())):
        dataset = open_data(name, simulate=simulate)
        assert (dataset.source, dataset.notes) == (name, notes)
        assert [story.words for story in dataset.stories.values()] == [s.words for s in demo_stories().stories.values()]
    assert model_of({"data": name}, {}) == model_of({}, {"data": name}) == MINILM
    options: Any = SimpleNamespace(data=name)
    check_looks(options, look=2, heard={}, is_again=False)  # the test stories of a demo may be scored again


def test_an_unknown_demo_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(InputError, match="no such data; give a folder, or one of demo, demo-null, demo-helps"):
        open_data("demo-hurts")


def test_fingerprints_of_listeners_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = {name: demo._fingerprint(demo_stories(name)) for name in DEMOS}
    assert fingerprints[DEMO] == "demo-1-31d1edf0", "as in every version"
    assert len(set(fingerprints.values())) == len(DEMOS)
    monkeypatch.setattr(demo, "hidden_weights", lambda name: b"others" if name == DEMO_HELPS else b"")
    others = {name: demo._fingerprint(demo_stories(name)) for name in DEMOS}
    assert [name for name in DEMOS if others[name] != fingerprints[name]] == [DEMO_HELPS]


def _toy(n_hidden: int) -> tuple[Dataset, dict[str, np.ndarray], dict[str, slice], np.random.Generator]:
    """Return the stories, each one's word rate, the rows kept, and a generator."""
    dataset = demo_stories()
    rate = {n: downsample_story(np.ones((len(s.spoken), 1)), s) for n, s in dataset.stories.items()}
    return dataset, rate, {n: dataset.trim.rows(len(r)) for n, r in rate.items()}, np.random.default_rng(n_hidden)


def test_strongest_directions_are_the_eigenvectors_of_what_is_left() -> None:
    _, rate, kept, rng = _toy(20)
    mixing = rng.standard_normal((20, 20)) * np.geomspace(1, 0.05, 20)[:, None]
    X = {n: rng.standard_normal((len(r), 20)) @ mixing + 3 * r for n, r in rate.items()}
    known = demo._known(rate)
    K, Z = (np.vstack([values[n][kept[n]] for n in X]) for values in (known, X))
    left = Z - K @ np.linalg.pinv(K) @ Z
    variances, vectors = np.linalg.eigh(left.T @ left)
    _, scale, axes = demo._strongest(X, known, kept)
    np.testing.assert_allclose(scale, np.sqrt(variances[::-1][:N_DIRECTIONS]), rtol=1e-9)
    cosines = (axes * vectors[:, ::-1].T[:N_DIRECTIONS]).sum(axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)
    result = np.vstack([d[kept[n]] for n, d in demo._directions(X, rate, kept).items()])
    np.testing.assert_allclose(result.T @ result / len(result), np.eye(N_DIRECTIONS), atol=1e-9)
    np.testing.assert_allclose(result.T @ K / len(result), 0, atol=1e-9)


def test_voxels_follow_only_the_directions_that_differ() -> None:
    """Vectors that differ in the first eight of twenty coordinates: the other twelve must not be heard."""
    dataset, rate, kept, rng = _toy(21)
    words = {n: rng.standard_normal((len(s.spoken), 20)) for n, s in dataset.stories.items()}
    words = {n: np.hstack([w[:, :8], 100 * w[:, 8:]]) for n, w in words.items()}
    before = {n: np.hstack([rng.standard_normal((len(w), 8)), w[:, 8:]]) for n, w in words.items()}
    followed = demo._downsampled(dataset, Followed(words, N_LANGUAGE, differs_from=before), rate, kept)
    for name, story in dataset.stories.items():
        heard = downsample_story(words[name], story)[:, :8]  # (n_trs, n_directions), to be turned
        turn = np.linalg.lstsq(heard, followed[name], rcond=None)[0]
        np.testing.assert_allclose(heard @ turn, followed[name], atol=1e-7)
        np.testing.assert_allclose(turn.T @ turn, np.eye(N_DIRECTIONS), atol=1e-7)


@pytest.fixture(scope="module")
def word_vectors() -> dict[str, dict[int, listeners.Vectors]]:
    """What the frozen and the adapted encoder make of the stories, layer -> story -> (n_words, n_hidden)."""
    encoder = load_encoder(MINILM)
    berts = {"frozen": encoder.model.bert, "adapted": load_adapter(encoder, listeners._ADAPTED)}
    layers = (encoder.n_layers, listeners.LOWER_LAYER)
    return {which: listeners._embed(demo_stories(), encoder, bert, *layers) for which, bert in berts.items()}


@pytest.fixture(scope="module")
def heard(word_vectors: dict[str, dict[int, listeners.Vectors]]) -> Iterator[dict[str, Dataset]]:
    """The responses of every listener; each encoder has read the stories once for all of them."""

    def look_up(dataset: Dataset, encoder: Any, bert: Any, *layers: int) -> dict[int, listeners.Vectors]:
        return word_vectors["frozen" if bert is encoder.model.bert else "adapted"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listeners, "_embed", look_up)
        patch.setattr(listeners, "load_encoder", functools.cache(load_encoder))
        yield {name: simulate_listener(demo_stories(name))[0] for name in DEMOS}


@pytest.fixture(scope="module")
def task(heard: dict[str, Dataset]) -> Task:
    """All listeners as one, their voxels side by side."""
    first = heard[DEMO]
    stories = {}
    for name, story in first.stories.items():
        side_by_side = np.hstack([heard[who].valid_responses(name, SUBJECT) for who in DEMOS])
        stories[name] = replace(story, responses={SUBJECT: Responses(array=side_by_side)}, repeats={})
    dataset = replace(inspect(replace(first, stories=stories, voxel_masks=None)), fingerprint="all listeners")
    train, test = choose_stories(dataset, dataset.subjects, None, None, seed=0)
    return Task(dataset, split_stories(train, test, 0, 1), 0)


def by_listener(cc: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(DEMOS, np.split(cc, len(DEMOS)), strict=True))


@pytest.mark.slow
@pytest.mark.demo
def test_listeners_differ_only_in_language_voxels(heard: dict[str, Dataset]) -> None:
    for story in ("bakery", "ferry"):
        plain, null, helps = (heard[name].valid_responses(story, SUBJECT) for name in DEMOS)
        np.testing.assert_array_equal(null[:, OTHERS], plain[:, OTHERS])
        np.testing.assert_array_equal(helps[:, OTHERS], plain[:, OTHERS])
        np.testing.assert_allclose(null[:, :N_LAST], plain[:, :N_LAST], atol=1e-4)
        for other in (null[:, N_LAST:N_LANGUAGE], helps[:, :N_LOWER]):
            alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(other.T, plain[:, N_LAST:N_LANGUAGE].T, strict=True)]
            assert np.mean(alike) < 0.95
        assert np.isfinite(helps).all()


@pytest.mark.slow
@pytest.mark.demo
def test_the_adapted_encoder_is_nearer_to_the_listener_of_demo_helps(
    task: Task, word_vectors: dict[str, dict[int, listeners.Vectors]]
) -> None:
    """What fine-tuning would reach if it recovered the hidden encoder itself, by the study's own ridge and score."""
    split, stories = task.splits[0], task.dataset.stories
    chain, ccs = Chain(TrialConfig(method="frozen", model=MINILM), task), {}
    for which, layers in word_vectors.items():
        downsampled = {n: downsample_story(layers[6][n], stories[n]) for n in split.fit + split.validation}
        ccs[which] = by_listener(chain.score(downsampled, split.fit, split.validation)[SUBJECT].cc)
    gain = {name: ccs["adapted"][name] - ccs["frozen"][name] for name in DEMOS}
    assert gain[DEMO_HELPS][LANGUAGE].mean() > 0.015
    assert gain[DEMO][LANGUAGE].mean() < -0.005
    assert gain[DEMO_NULL][:N_LAST].mean() < -0.005
    assert gain[DEMO_NULL][N_LAST:N_LANGUAGE].mean() > 0.001
    assert abs(gain[DEMO_NULL].mean()) < 0.003


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute where nothing else runs
def test_lora_changes_cc_as_each_demo_plants_it(task: Task) -> None:
    """A strong trial of ``lora_rank_small``; one training is scored on every listener."""
    settings: dict[str, Any] = {"lora_alpha": 6.0, "lora_scaling": "rslora", "epochs": 5}
    tuned = run_trial(TrialConfig(method="lora", model=MINILM, rank=16, lr=1e-3, seed=7, **settings), task)
    frozen = run_trial(TrialConfig(method="frozen", model=MINILM), task)
    after, before = by_listener(tuned.cc[SUBJECT]), by_listener(frozen.cc[SUBJECT])
    gain = {name: float((after[name] - before[name]).mean()) for name in DEMOS}
    assert gain[DEMO_HELPS] > 0.007
    assert abs(gain[DEMO_NULL]) < 0.004
    assert gain[DEMO] < gain[DEMO_NULL]
