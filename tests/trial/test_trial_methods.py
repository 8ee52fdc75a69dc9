"""Every method of adapting BERT, in a whole trial."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_trials import quick_config
from transformers.models.bert.modeling_bert import BertEmbeddings

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import STOPPED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.splits import split_stories
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.lora import load_adapter
from bert_encoding.trial import run as trial_module
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task, cached_encoder
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.tables import trials_frame
from bert_encoding.trial.training_data import TrainingData

SUBJECT = "subject2"


def config(encoder: Encoder, **changes: Any) -> TrialConfig:
    return quick_config(encoder, **{"epochs": 1, "frozen_blocks": 1, "probe_tokens": 200} | changes)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True, "lora_scaling": "rslora"},
    "pissa": {"lora_init": "pissa"},
    "full": {"method": "full", "lr": 1e-3},
    "full but embeddings": {"method": "full", "lr": 1e-3, "train_embeddings": False},
    "partial": {"method": "partial", "lr": 1e-3},
    "whole words": {"whole_words": True},
    "next sentences": {"objective": "mlm_nsp"},
    "control text": {"mlm_text": "control"},
    "replay and l2": {"replay": 0.3, "l2_sp": 0.1},
    "cosine": {"schedule": "cosine", "accumulation": 2},
    "dropout": {"target_modules": "all", "lr": 0.1, "hidden_dropout": 0.5},
}


@pytest.mark.table
@pytest.mark.parametrize("changes", list(METHODS.values()), ids=list(METHODS))
def test_every_method_changes_the_vectors_and_leaves_the_cached_encoder_unchanged(
    task: Task, tiny_encoder: Encoder, changes: dict[str, Any]
) -> None:
    cache = WorkerCache()
    resident = cached_encoder(tiny_encoder.name, cache)
    before = weights_fingerprint(resident.model)
    record = run_trial(config(tiny_encoder, **changes), task, cache=cache)
    assert weights_fingerprint(resident.model) == before
    assert not any(part.training for part in resident.model.modules())
    assert {part.p for part in resident.model.modules() if isinstance(part, torch.nn.Dropout)} == {0.1}
    frozen = run_trial(config(tiny_encoder, method="frozen"), task, cache=cache)
    assert np.abs(record.cc[SUBJECT] - frozen.cc[SUBJECT]).max() > 1e-6
    assert record.scores["delta_norm"] > 0
    assert 1 <= record.scores["stable_rank"] <= 32
    assert record.scores["n_trainable"] > 0
    assert record.scores["probe_loss_after"] != record.scores["probe_loss_before"]
    again = run_trial(config(tiny_encoder, **changes), task, cache=cache)
    np.testing.assert_array_equal(again.cc[SUBJECT], record.cc[SUBJECT])


def test_a_failing_trial_leaves_the_cached_encoder_unchanged(
    task: Task, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = WorkerCache()
    resident = cached_encoder(tiny_encoder.name, cache)
    before = weights_fingerprint(resident.model)
    monkeypatch.setattr(trial_module, "check_applied", lambda *args: 1 / 0)
    for changes in ({"method": "full"}, {"lora_init": "pissa"}):
        with pytest.raises(ZeroDivisionError):
            run_trial(config(tiny_encoder, **changes), task, cache=cache)
    assert weights_fingerprint(resident.model) == before


def test_with_patience_the_epoch_of_the_lowest_held_out_loss_counts(
    task: Task, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    kept, split = set(), task.splits[0]
    for seed in range(3):
        settings, folder = config(tiny_encoder, epochs=6, lr=0.05, patience=2, seed=seed), tmp_path / str(seed)
        record = run_trial(settings, task, adapter_folder=folder)
        chain = Chain(settings, task)
        downsampled = chain.downsampled(load_adapter(tiny_encoder, folder), split.fit + split.validation, split.fit)
        saved = chain.score(downsampled, split.fit, split.validation)[SUBJECT].cc
        np.testing.assert_allclose(saved, record.cc[SUBJECT], rtol=0, atol=1e-5, err_msg="another epoch was saved")
        losses = [epoch["mlm_loss_heldout"] for epoch in record.epochs]
        best = int(np.argmin(losses))
        assert record.scores["epoch_kept"] == best + 1
        assert record.scores["mlm_loss_heldout"] == losses[best]
        assert record.scores["cc_mean"] == record.epochs[best]["cc_mean"]
        assert float(np.nanmean(record.cc[SUBJECT])) == pytest.approx(record.epochs[best]["cc_mean"], abs=1e-6)
        assert len(losses) in (min(6, best + 3), 6)
        assert record.scores["epochs_done"] == len(losses)
        assert any(f"epoch {best + 1} of the lowest held-out loss is restored" in note for note in record.notes)
        kept.add(best + 1 < len(losses))
    assert True in kept, "or nothing was restored"


def test_epochs_that_are_not_scored_change_nothing_else(task: Task, tiny_encoder: Encoder) -> None:
    settings = config(tiny_encoder, epochs=5, lr=0.05)
    every = run_trial(settings, task)
    some = run_trial(replace(settings, score_every=2), task)
    assert [epoch["epoch"] for epoch in some.epochs if "cc_mean" in epoch] == [2, 4, 5]
    assert [epoch["epoch"] for epoch in some.epochs] == [1, 2, 3, 4, 5]
    for row, full in zip(some.epochs, every.epochs, strict=True):
        expected = {name: full[name] for name in row if name != "seconds"}
        assert {name: value for name, value in row.items() if name != "seconds"} == expected
        assert {"mlm_loss_train", "mlm_loss_heldout", "optimizer_steps"} < set(row)
    of_best = ("cc_best", "epoch_best")
    scores, expected = ({k: v for k, v in one.scores.items() if k not in of_best} for one in (some, every))
    assert scores == expected
    assert some.scores["cc_best"] == max(row["cc_mean"] for row in some.epochs if "cc_mean" in row)
    assert np.array_equal(some.cc[SUBJECT], every.cc[SUBJECT], equal_nan=True)


def test_a_trial_that_is_stopped_after_an_unscored_epoch_is_scored_there(task: Task, tiny_encoder: Encoder) -> None:
    settings = config(tiny_encoder, epochs=4, lr=0.05)

    def until_third(scores: dict[str, float]) -> bool:
        return scores["epoch"] < 3

    every = run_trial(settings, task, until_third)
    for rarely in (2, 4):  # scored before, and never scored
        some = run_trial(replace(settings, score_every=rarely), task, until_third)
        assert (some.status, some.scores["epochs_done"], some.scores["epoch_kept"]) == (STOPPED, 3, 3)
        assert some.scores["cc_mean"] == every.scores["cc_mean"] == some.epochs[-1]["cc_mean"]
        assert some.scores["cc_seen"] == every.scores["cc_seen"]
        assert some.scores["cc_best"] == max(row["cc_mean"] for row in some.epochs if "cc_mean" in row)


def test_random_weights_are_a_baseline_without_losses(task: Task, tiny_encoder: Encoder) -> None:
    record = run_trial(config(tiny_encoder, method="random"), task, score_test=True)
    other = run_trial(config(tiny_encoder, method="random", seed=1), task)
    assert "mlm_loss_train" not in record.scores
    assert record.scores["n_trainable"] == 0
    assert np.abs(record.cc[SUBJECT] - other.cc[SUBJECT]).max() > 1e-6
    assert "cc_test" in record.scores


def test_cached_layers_are_the_single_layers_from_one_pass(
    task: Task, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, cache = [], WorkerCache()
    forward = BertEmbeddings.forward

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertEmbeddings, "forward", count)
    n_passes = []
    for layer in (0, 1, 2, (0, 2)):
        passes.clear()
        settings = config(tiny_encoder, method="frozen", layer=layer, keep_layers=True)
        chain, split = Chain(settings, task, cache), task.splits[0]
        bert = tiny_encoder.copy_model().bert
        vectors = chain.downsampled(bert, split.fit, split.fit)
        n_passes.append(len(passes))
        plain = Chain(config(tiny_encoder, method="frozen", layer=layer), task).downsampled(bert, split.fit, split.fit)
        for name in split.fit:
            np.testing.assert_allclose(vectors[name], plain[name], rtol=0, atol=1e-5)
    assert n_passes[0] > 0
    assert n_passes[1:] == [0, 0, 0]


def test_control_text_is_as_long_as_the_stories_and_none_of_them(task: Task, tiny_encoder: Encoder) -> None:
    chain = Chain(config(tiny_encoder, mlm_text="control", stride=62), task)
    data = TrainingData(chain, task.splits[0])
    windows = data.windows(62)
    stories = sum(len(tokens.ids) for tokens in chain.tokens(task.splits[0].fit).values())
    assert sum(len(window.ids) - 2 for window in windows) == stories
    assert any("not of stories" in note for note in data.notes)


def test_matched_steps_are_those_of_windows_without_overlap(task: Task, tiny_encoder: Encoder) -> None:
    steps = {
        stride: run_trial(config(tiny_encoder, stride=stride, match_steps=True), task).scores["optimizer_steps"]
        for stride in (20, 40, 62)
    }
    plain = run_trial(config(tiny_encoder, stride=62), task).scores["optimizer_steps"]
    assert set(steps.values()) == {plain}
    assert run_trial(config(tiny_encoder, stride=20), task).scores["optimizer_steps"] > plain


def test_a_users_probe_text_is_read(task: Task, tiny_encoder: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "probe.txt"
    file.write_text("the old river and the little house in the morning\n" * 40)
    own = run_trial(config(tiny_encoder), task._replace(probe_text=file))
    bundled = run_trial(config(tiny_encoder), task)
    assert own.scores["probe_loss_before"] != bundled.scores["probe_loss_before"]
    assert own.scores["cc_mean"] == bundled.scores["cc_mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": (1, 5)}, "layer 5"),
        ({"layer": 3}, r"layer 3: .* has layers 0 \(embeddings\) to 2"),
        ({"layer": 3, "method": "frozen"}, r"layer 3: .* has layers 0 \(embeddings\) to 2"),
        ({"window_tokens": 513}, "window_tokens 513: .* reads at most 512"),
        ({"embed_window_tokens": 513}, "embed_window_tokens 513: .* reads at most 512"),
        ({"objective": "mlm_nsp", "mlm_text": "control"}, "mlm_text 'control': not with objective 'mlm_nsp'"),
        ({"objective": "mlm_nsp", "replay": 0.5}, "replay 0.5: not with objective 'mlm_nsp'"),
        ({"patience": 2, "mlm_text": "all"}, "patience: with mlm_text 'all' no story is held out"),
    ],
)
def test_settings_that_the_model_does_not_support_are_refused(
    task: Task, tiny_encoder: Encoder, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_trial(config(tiny_encoder, **changes), task)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"epochs": 4, "lr": 0.05, "patience": 1}], ids=["plain", "patience"])
def test_folds_of_unequal_length_make_one_row_of_the_table(
    task: Task, tiny_encoder: Encoder, changes: dict[str, Any]
) -> None:
    train = task.splits[0].fit + task.splits[0].validation
    rotating = task._replace(splits=split_stories(list(train), list(task.splits[0].test), 0, 4))
    record = run_trial(config(tiny_encoder, stride=17, batch_size=3, **changes), rotating)
    record.trial_id, record.phase = "0001", "search"
    row = trials_frame([record]).iloc[0]
    assert row["tokens_seen"] == round(record.scores["tokens_seen"])
    assert row["epochs_done"] >= 1
    record.scores["tokens_seen"] += 0.5  # as an older version wrote it
    assert trials_frame([record])["tokens_seen"].dtype == "Int64"
