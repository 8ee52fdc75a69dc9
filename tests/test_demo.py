"""The demo's planted truth comes back out of the chain."""

import numpy as np
import pytest

from bert_encoding.chain import Task
from bert_encoding.config import TrialConfig
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.demo import N_VOXELS, SUBJECT, TEST, Truth, demo_stories, simulate_listener
from bert_encoding.records import FROZEN, WORD_RATE
from bert_encoding.trial import run_trial

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def heard() -> tuple[Task, Truth]:
    dataset, truth = simulate_listener(demo_stories())
    train, test = choose_stories(dataset, dataset.subjects, None, None, seed=0)
    return Task(dataset, split_stories(train, test, 0, 1), 0), truth


@pytest.fixture(scope="module")
def frozen(heard: tuple[Task, Truth]) -> tuple[np.ndarray, np.ndarray]:
    """CC of the frozen encoder on validation and on test stories, (n_voxels,) each."""
    record = run_trial(TrialConfig(method=FROZEN, model="minilm"), heard[0], score_test=True)
    return record.cc[SUBJECT], record.cc_test[SUBJECT]


def test_stories_are_whole() -> None:
    dataset = demo_stories()
    assert len(dataset.stories) == 16
    assert set(TEST) < set(dataset.stories)
    for story in dataset.stories.values():
        assert len(story.words) == len(story.word_times_s) > 500
        assert (np.diff(story.word_times_s) > 0).all()
        assert 2 < len(story.words) / story.word_times_s[-1] < 4, "words a second, as people speak"
        rows = dataset.trim.rows(len(story.tr_times_s))
        assert story.tr_times_s[rows.stop - 1] >= story.word_times_s[-1], "the responses outlast the last word"


def test_language_voxels_come_near_their_ceiling(heard: tuple[Task, Truth], frozen: tuple[np.ndarray, ...]) -> None:
    truth = heard[1]
    language = truth.kind == "language"
    for cc, ceiling in zip(frozen, (truth.ceiling, truth.ceiling_test), strict=True):
        share = cc[language].mean() / ceiling[language].mean()
        assert 0.8 < share < 1.02
        assert np.corrcoef(cc[language], ceiling[language])[0, 1] > 0.7


def test_silent_voxels_score_about_zero(heard: tuple[Task, Truth], frozen: tuple[np.ndarray, ...]) -> None:
    silent = heard[1].kind == "silent"
    for cc in frozen:
        assert abs(cc[silent].mean()) < 0.03
        assert np.abs(cc[silent]).max() < 0.35


def test_word_rate_predicts_rate_voxels_alone(heard: tuple[Task, Truth]) -> None:
    task, truth = heard
    cc = run_trial(TrialConfig(method=WORD_RATE, model="minilm"), task).cc[SUBJECT]
    rate = truth.kind == "rate"
    assert 0.85 < cc[rate].mean() / truth.ceiling[rate].mean() < 1.05
    assert abs(cc[truth.kind == "language"].mean()) < 0.05
    assert cc.shape == (N_VOXELS,)


def test_words_of_another_story_predict_nothing(heard: tuple[Task, Truth]) -> None:
    """Give every story the word vectors' order of a shuffle: the score must vanish."""
    from dataclasses import replace

    task, truth = heard
    rng = np.random.default_rng(0)
    shuffled = {n: replace(s, words=tuple(rng.permutation(s.words))) for n, s in task.dataset.stories.items()}
    dataset = replace(task.dataset, stories=shuffled, fingerprint="shuffled")
    cc = run_trial(TrialConfig(method=FROZEN, model="minilm"), task._replace(dataset=dataset)).cc[SUBJECT]
    assert cc[truth.kind == "language"].mean() < 0.1


def test_simulation_is_the_same_twice(heard: tuple[Task, Truth]) -> None:
    again = simulate_listener(demo_stories())[0]
    first = heard[0].dataset
    assert again.fingerprint == first.fingerprint
    for name in first.stories:
        np.testing.assert_array_equal(again.valid_responses(name, SUBJECT), first.valid_responses(name, SUBJECT))
