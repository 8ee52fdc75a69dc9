"""The demo's planted truth comes back out of the chain."""

import numpy as np
import pytest

from bert_encoding.core.names import FROZEN, WORD_RATE
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.demo import stories as demo
from bert_encoding.demo.stories import N_REPEATS_TEST, N_VOXELS, SUBJECT, TEST, Truth, demo_stories, simulate_listener
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.run import run_trial

pytestmark = pytest.mark.demo

OLD_RESPONSES = {  # rows 0, 50 and the last, voxels 200 to 203
    "bakery": [
        [0.8058928, 0.8952766, 1.9076643, -0.018985],
        [-1.1780108, -0.0066015, 1.2222974, -0.1689305],
        [-0.1285749, -0.4996195, 0.8826967, -0.9179223],
    ],
    "ferry": [
        [-0.5867261, -1.975834, 1.3594947, 1.06085],
        [-0.8425418, -0.703379, 1.5927305, 1.1140248],
        [2.0584671, 0.2984931, 0.0178971, 1.8766507],
    ],
}


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
        assert 2 < len(story.words) / story.word_times_s[-1] < 4, "words per second, as people speak"
        rows = dataset.trim.rows(len(story.tr_times_s))
        assert story.tr_times_s[rows.stop - 1] >= story.word_times_s[-1], "the responses outlast the last word"


def test_language_voxels_come_near_their_ceiling_and_silent_ones_score_about_zero(
    heard: tuple[Task, Truth], frozen: tuple[np.ndarray, ...]
) -> None:
    truth = heard[1]
    language, silent = truth.kind == "language", truth.kind == "silent"
    for cc, ceiling in zip(frozen, (truth.ceiling, truth.ceiling_test), strict=True):
        share = cc[language].mean() / ceiling[language].mean()
        assert 0.8 < share < 1.02
        assert np.corrcoef(cc[language], ceiling[language])[0, 1] > 0.7
        assert abs(cc[silent].mean()) < 0.03
        assert np.abs(cc[silent]).max() < 0.35


def test_word_rate_predicts_rate_voxels_alone(heard: tuple[Task, Truth]) -> None:
    task, truth = heard
    cc = run_trial(TrialConfig(method=WORD_RATE, model="minilm"), task).cc[SUBJECT]
    rate = truth.kind == "rate"
    assert 0.85 < cc[rate].mean() / truth.ceiling[rate].mean() < 1.05
    assert abs(cc[truth.kind == "language"].mean()) < 0.05
    assert cc.shape == (N_VOXELS,)


def test_responses_are_those_of_every_version() -> None:
    """Silent voxels hold noise alone, so their numbers are the same everywhere: these are of version 0.1.0."""
    dataset, truth = demo_stories(), demo._truth()
    for name, expected in OLD_RESPONSES.items():
        silence = np.zeros((len(dataset.stories[name].tr_times_s), N_VOXELS))
        heard = demo._with_responses(dataset, name, silence, truth).responses[SUBJECT].read(np.arange(200, 204))
        np.testing.assert_allclose(heard[[0, 50, -1]], expected, atol=2e-6)


def test_repeats_average_to_the_responses(heard: tuple[Task, Truth]) -> None:
    for name, story in heard[0].dataset.stories.items():
        assert (SUBJECT in story.repeats) == (name in TEST), "only test stories were heard several times"
    for name in TEST:
        story = heard[0].dataset.stories[name]
        repeats, responses = story.repeats[SUBJECT].array, story.responses[SUBJECT].array
        assert repeats is not None and responses is not None
        assert repeats.shape == (N_REPEATS_TEST, *responses.shape)
        np.testing.assert_allclose(repeats.mean(axis=0), responses, atol=2e-6)


def test_noise_of_repeats_is_independent_and_as_large_as_it_should_be() -> None:
    """Each repeat has N times the noise variance of their mean, and no two share any."""
    mean = demo._noise((2000, 20), "noise", "elsewhere")
    noise = demo._repeat_noise(mean, "elsewhere").reshape(N_REPEATS_TEST, -1)
    np.testing.assert_allclose(noise.mean(axis=0), mean.ravel(), atol=1e-12)
    np.testing.assert_allclose(np.cov(noise), N_REPEATS_TEST * np.eye(N_REPEATS_TEST), atol=0.15)


@pytest.mark.slow
def test_ceiling_of_the_repeats_is_the_planted_one(heard: tuple[Task, Truth]) -> None:
    """Signal power of N repeats, (Var(sum) - sum Var) / (N (N - 1)) (Schoppe et al. 2016, eq. 2 and 3), over the
    variance of their mean; the truth is that of the signals heard, whose variance in two short stories is not 1.
    """
    signals, truth = demo._signals(demo_stories()), heard[1]
    share, planted = [], []
    for name in TEST:
        repeats = np.asarray(heard[0].dataset.stories[name].repeats[SUBJECT].array, np.float64)
        n = len(repeats)
        power = (repeats.sum(axis=0).var(axis=0) - repeats.var(axis=1).sum(axis=0)) / (n * (n - 1))
        share.append(power / repeats.mean(axis=0).var(axis=0))
        rows = heard[0].dataset.trim.rows(len(signals[name]))
        loud = truth.ceiling_test**2 * signals[name][rows].var(axis=0)
        planted.append(loud / (loud + 1 - truth.ceiling_test**2))
    for kind, within in (("language", 0.02), ("rate", 0.03), ("silent", 0.04)):
        voxels = truth.kind == kind
        assert np.mean(share, axis=0)[voxels].mean() == pytest.approx(
            np.mean(planted, axis=0)[voxels].mean(), abs=within
        )
    driven = truth.kind != "silent"
    assert np.corrcoef(np.ravel(np.array(share)[:, driven]), np.ravel(np.array(planted)[:, driven]))[0, 1] > 0.85
