"""The stages after training: vocabularies, plain vectors, and the ridge that scores share."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_trials import design_of_words

from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.trial import pipeline as chain_module
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.scoring import prepare_ridge, score_subject

SUBJECT = "subject2"


def frequent(task: Task, names: tuple[str, ...], n: int) -> list[str]:
    counts = Counter(word for name in names for word in task.dataset.stories[name].words)
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def one_hot(task: Task, name: str, vocabulary: list[str]) -> np.ndarray:
    words = task.dataset.stories[name].words
    return np.array([[float(word == entry) for entry in vocabulary] for word in words], np.float32)


def test_a_bag_of_words_trial_equals_a_plain_recomputation(task: Task) -> None:
    config, split = TrialConfig(method="bag_of_words", vocabulary=9), task.splits[0]
    record = run_trial(config, task, score_test=True)
    assert (record.scores["layer"], record.scores["n_trainable"]) == (None, 0)
    both = tuple(sorted(split.fit + split.validation))  # the final score may learn from both
    for fit, scored, cc in ((split.fit, split.validation, record.cc), (both, split.test, record.cc_test)):
        vectors = {name: one_hot(task, name, frequent(task, fit, 9)) for name in fit + scored}
        design = design_of_words(vectors, task.dataset, fit, scored, config, task.split_seed)
        ridge = prepare_ridge(design, config, torch.device("cpu"))
        expected = score_subject(ridge, design, task.dataset, SUBJECT, fit, scored).cc
        np.testing.assert_allclose(cc[SUBJECT], expected, rtol=0, atol=1e-6)


def test_words_outside_the_fit_stories_enter_no_vocabulary(task: Task) -> None:
    split = task.splits[0]
    stories = dict(task.dataset.stories)
    for name in split.validation:
        stories[name] = replace(stories[name], words=("zebra",) * len(stories[name].words))
    other = task._replace(dataset=replace(task.dataset, stories=stories))
    config = TrialConfig(method="bag_of_words", vocabulary=9)
    vectors = Chain(config, other).vectors(None, split.fit + split.validation, split.fit)
    assert all(not vectors[name].any() for name in split.validation)


def test_static_vectors_are_looked_up_and_their_coverage_is_noted(task: Task, tmp_path: Path) -> None:
    pytest.importorskip("gensim", reason="gensim (extra 'static') is not installed")
    known, rng = frequent(task, task.splits[0].fit, 12), np.random.default_rng(0)
    table = {word: rng.standard_normal(4).astype(np.float32) for word in known}
    file = tmp_path / "glove.txt"
    file.write_text("".join(f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in table.items()))
    config, split = TrialConfig(method="static", static_vectors=str(file)), task.splits[0]
    chain = Chain(config, task)
    names = split.fit + split.validation
    vectors = chain.vectors(None, names, split.fit)
    n_known = n_words = 0
    for name in names:
        words = task.dataset.stories[name].words
        expected = np.array([table.get(word, np.zeros(4)) for word in words], np.float32)
        np.testing.assert_array_equal(vectors[name], expected)
        n_known, n_words = n_known + sum(word in table for word in words), n_words + len(words)
    assert chain.notes == [
        f"glove.txt has a vector for {n_known / n_words:.1%} of the spoken words; the others are zero"
    ]
    assert run_trial(config, task).notes[0] == chain.notes[0]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[CrossValidatedRidge]:
    """Every ridge that is prepared from now on."""
    prepared: list[CrossValidatedRidge] = []

    def listen(*arguments: Any) -> CrossValidatedRidge:
        prepared.append(prepare_ridge(*arguments))
        return prepared[-1]

    monkeypatch.setattr(chain_module, "prepare_ridge", listen)
    return prepared


def bag_chain(task: Task, **changes: Any) -> Chain:
    return Chain(TrialConfig(method="bag_of_words", vocabulary=9, **changes), task)


def test_the_seen_score_has_the_same_bits_with_the_ridge_of_the_score_and_without(
    task: Task, prepared: list[CrossValidatedRidge]
) -> None:
    split = task.splits[0]
    sharing, alone = bag_chain(task), bag_chain(task)
    downsampled = sharing.downsampled(None, split.fit + split.validation, split.fit)
    scored = sharing.score(downsampled, split.fit, split.validation)
    grids = {subject: result.grid for subject, result in scored.items()}
    shared = sharing.score_seen(downsampled, split.fit, grids)
    assert len(prepared) == 1, "the ridge of the score is used again"
    assert sharing.score_seen(downsampled, split.fit, grids).keys() == shared.keys()
    assert len(prepared) == 2, "and then let go"
    np.testing.assert_array_equal(shared[SUBJECT], alone.score_seen(downsampled, split.fit, grids)[SUBJECT])
    again = bag_chain(task)
    again.score(downsampled, split.fit, split.validation)
    again.forget_ridge()
    np.testing.assert_array_equal(shared[SUBJECT], again.score_seen(downsampled, split.fit, grids)[SUBJECT])
    assert len(prepared) == 5


def test_the_seen_score_chooses_from_the_grid_that_the_score_was_widened_to(task: Task) -> None:
    split, narrow = task.splits[0], (1e4, 1e5, 1e6)
    chain = bag_chain(task, ridge_alphas=narrow)
    downsampled = chain.downsampled(None, split.fit + split.validation, split.fit)
    grid = chain.score(downsampled, split.fit, split.validation)[SUBJECT].grid
    assert len(grid) > len(narrow)
    seen = chain.score_seen(downsampled, split.fit, {SUBJECT: grid})[SUBJECT]
    wide = bag_chain(task, ridge_alphas=grid).score_seen(downsampled, split.fit)[SUBJECT]
    np.testing.assert_array_equal(seen, wide)
    assert (seen != bag_chain(task, ridge_alphas=narrow).score_seen(downsampled, split.fit)[SUBJECT]).any()
    record = run_trial(chain.config, task)
    assert record.scores["cc_seen"] == pytest.approx(wide.astype(np.float64).mean(), abs=1e-9)
    assert any("so all were fitted with 100 to 1e+06" in note for note in record.notes)


def test_the_ridge_of_other_vectors_or_other_stories_is_not_used(
    task: Task, prepared: list[CrossValidatedRidge]
) -> None:
    """As where the best epoch is restored, but the last was scored."""
    split = task.splits[0]
    chain = bag_chain(task)
    downsampled = chain.downsampled(None, split.fit + split.validation, split.fit)
    other = {name: rows[:, ::-1] ** 2 for name, rows in downsampled.items()}
    chain.score(other, split.fit, split.validation)
    seen = chain.score_seen(downsampled, split.fit)[SUBJECT]
    np.testing.assert_array_equal(seen, bag_chain(task).score_seen(downsampled, split.fit)[SUBJECT])
    chain.score(downsampled, split.fit, split.validation)
    fewer = chain.score_seen(downsampled, split.fit[1:])[SUBJECT]
    np.testing.assert_array_equal(fewer, bag_chain(task).score_seen(downsampled, split.fit[1:])[SUBJECT])
    assert len(prepared) == 6
