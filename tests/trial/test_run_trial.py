"""A whole trial: compared with a plain chain of other libraries; seeds, epochs, splits, records, refused settings."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from make_data import edit_responses, make_lab, put
from make_trials import PEFT_WARNS, make_task
from make_trials import quick_config as config
from peft import PeftModel
from plain_chain import SUBJECT, PlainChain
from project import ROOT
from transformers import BertForMaskedLM, BertModel

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import COMPLETE, STOPPED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.responses import Responses
from bert_encoding.language_model import masked_lm as finetune_module
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.masked_lm import Probes
from bert_encoding.language_model.windows import Window
from bert_encoding.trial import run as module
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.run import run_trial

METHODS = ("word_rate", "frozen", "lora")
N_SPECIAL = 5  # [PAD] [UNK] [CLS] [SEP] [MASK], the first ids of the tiny vocabulary

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


@pytest.fixture(scope="module")
def rotating_task(lab_folder: Path) -> Task:
    return make_task(open_dataset(lab_folder), n_outer_folds=3)


@pytest.fixture(scope="module")
def spelt_task(lab_folder: Path) -> Task:
    """Every story is spelt with its own letters, so that each token identifies its story."""
    dataset = open_dataset(lab_folder)
    stories = {}
    for at, (name, story) in enumerate(dataset.stories.items()):
        rng, letters = np.random.default_rng(at), list("abcdefghijklmnopqrstuvwxyz"[3 * at : 3 * at + 3])
        words = tuple("".join(rng.choice(letters, rng.integers(1, 5))) for _ in story.words)
        stories[name] = replace(story, words=words)
    return make_task(replace(dataset, stories=stories))


@pytest.fixture(scope="module")
def uneven_task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Rows without speech in two stories, and two voxels that cannot be scored."""
    folder = make_lab(tmp_path_factory.mktemp("data") / "uneven", seed=3)
    edit_responses(folder, "beta", put((7, 3), np.nan))
    edit_responses(folder, "wheretheressmoke", put(np.s_[:, 5], 0.7))
    dataset = open_dataset(folder)
    stories = dict(dataset.stories)
    for name in ("alpha", "gamma"):
        words = list(stories[name].words)
        words[5], words[6], words[60] = "", "{cg}", "--"
        stories[name] = replace(stories[name], words=tuple(words))
    return make_task(replace(dataset, stories=stories))


def assert_same_bits(first: TrialRecord, second: TrialRecord) -> None:
    assert first.cc.keys() == second.cc.keys()
    for subject in first.cc:
        assert np.array_equal(first.cc[subject], second.cc[subject], equal_nan=True)
    assert first.scores == second.scores
    assert without_seconds(first) == without_seconds(second)
    assert first.stories == second.stories


def without_seconds(record: TrialRecord) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record.epochs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The arguments of the real training, once per split, and the adapters before it."""
    calls: list[SimpleNamespace] = []
    real = module.finetune

    def record(model: BertForMaskedLM, objective: Any, probes: Probes, *args: Any, **kwargs: Any) -> Any:
        adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        calls.append(SimpleNamespace(windows=list(objective.windows), probes=probes, adapters=adapters))
        return real(model, objective, probes, *args, **kwargs)

    monkeypatch.setattr(module, "finetune", record)
    return calls


@pytest.mark.parametrize(
    ("method", "layer", "window_tokens", "stride"),
    [*((method, None, 512, 256) for method in METHODS), ("frozen", 1, 40, 15), ("lora", None, 50, 48)],
)
def test_scores_equal_a_plain_chain_of_other_libraries(
    method: str, layer: int | None, window_tokens: int, stride: int, uneven_task: Task, tiny_encoder: Encoder,
    tiny_bert: Path, tmp_path: Path,
) -> None:  # fmt: skip
    alpha, (split,) = 300.0, uneven_task.splits
    settings = config(tiny_encoder, method=method, layer=layer, ridge_alphas=(alpha,))
    settings = replace(settings, embed_window_tokens=window_tokens, embed_stride=stride)
    untuned = method != "lora"
    record = run_trial(settings, uneven_task, adapter_folder=tmp_path / "adapter", score_test=untuned)

    bert: Any = None
    if method == "frozen":
        bert = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).eval()
    if method == "lora":  # the adapter that the trial saved, in transformers and PEFT alone
        frozen = run_trial(replace(settings, method="frozen"), uneven_task)
        assert np.nanmax(np.abs(frozen.cc[SUBJECT] - record.cc[SUBJECT])) > 1e-3, "else a pretrained BERT would pass"
        whole = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tiny_bert), tmp_path / "adapter")
        bert = whole.eval().get_base_model().bert
    chain = PlainChain(uneven_task, bert, tiny_encoder, 2 if layer is None else layer, window_tokens, stride)
    valid = np.array([v not in (3, 5) for v in range(12)])
    expected = np.full(12, np.nan)
    expected[valid] = chain.cc(split.fit, split.validation, alpha, valid)
    np.testing.assert_allclose(record.cc[SUBJECT], expected, rtol=0, atol=1e-4)
    assert record.scores["cc_mean"] == pytest.approx(float(np.nanmean(expected)), abs=1e-4)
    assert record.scores["cc_median"] == pytest.approx(float(np.nanmedian(expected)), abs=1e-4)
    seen = chain.cc_seen(split.fit, alpha, valid)
    assert record.scores["cc_seen"] == pytest.approx(float(seen.mean()), abs=1e-4)
    (row,) = [row for row in record.stories if row["role"] == "validation"]
    assert (row["story"], row["subject"], row["split"]) == (split.validation[0], SUBJECT, 0)
    assert row["cc_mean"] == pytest.approx(float(np.nanmean(expected)), abs=1e-4)
    if untuned:
        expected[valid] = chain.cc(tuple(sorted(split.fit + split.validation)), split.test, alpha, valid)
        np.testing.assert_allclose(record.cc_test[SUBJECT], expected, rtol=0, atol=1e-4)
        assert record.scores["cc_test"] == pytest.approx(float(np.nanmean(expected)), abs=1e-4)


def test_frozen_losses_are_those_before_the_first_step(task: Task, tiny_encoder: Encoder) -> None:
    frozen = run_trial(config(tiny_encoder, method="frozen"), task)
    barely_tuned = run_trial(config(tiny_encoder, lr=1e-9, epochs=1, rank=2), task)
    for name in ("mlm_loss_train", "mlm_loss_heldout"):
        assert frozen.scores[name] == pytest.approx(barely_tuned.scores[name], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_same_trial_twice_gives_the_same_bits(method: str, task: Task, tiny_encoder: Encoder) -> None:
    settings = config(tiny_encoder, method=method)
    first = run_trial(settings, task)
    torch.rand(3)
    np.random.default_rng().random(3)
    assert_same_bits(first, run_trial(settings, task))


def test_the_seed_determines_the_new_adapter(task: Task, tiny_encoder: Encoder, calls: list[SimpleNamespace]) -> None:
    records = [run_trial(config(tiny_encoder, seed=seed, epochs=1), task) for seed in (0, 0, 1)]
    assert not np.array_equal(records[0].cc[SUBJECT], records[2].cc[SUBJECT])
    assert records[0].scores["mlm_loss_train"] != records[2].scores["mlm_loss_train"]
    first, again, other = (call.adapters for call in calls)
    A = [name for name in first if "lora_A" in name]
    assert len(A) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in A)


IN_A_FRESH_PROCESS = """
import json
import sys
from pathlib import Path
import numpy as np
import torch
from bert_encoding.trial.config import TrialConfig
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.run import run_trial

torch.set_num_threads(1)
lab, out, settings = sys.argv[1:]
dataset = inspect(open_dataset(Path(lab)))
train, test = choose_stories(dataset, dataset.subjects, None, None, 0)
task = Task(dataset, split_stories(train, test, 0, 1), 0)
record = run_trial(TrialConfig.from_dict(json.loads(settings)), task)
losses = [[epoch["mlm_loss_train"], epoch["mlm_loss_heldout"]] for epoch in record.epochs]
np.savez(out, cc=record.cc["subject2"], losses=losses, cc_seen=record.scores["cc_seen"])
"""


@pytest.mark.slow
def test_trial_after_others_equals_one_in_a_fresh_process(
    task: Task, lab_folder: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    settings = config(tiny_encoder, target_modules="q,k,v,o", seed=5, hidden_dropout=0.2)
    arguments = [str(lab_folder), str(tmp_path / "out.npz"), json.dumps(asdict(settings))]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments], cwd=ROOT, check=True, timeout=120)
    fresh = np.load(tmp_path / "out.npz")

    for before in ({"method": "frozen", "layer": 1}, {"target_modules": "all", "rank": 8, "epochs": 1, "lr": 0.1}):
        run_trial(config(tiny_encoder, **before), task)
    after = run_trial(settings, task)
    assert np.array_equal(after.cc[SUBJECT], fresh["cc"])
    losses = [[epoch["mlm_loss_train"], epoch["mlm_loss_heldout"]] for epoch in after.epochs]
    assert losses == fresh["losses"].tolist()
    assert after.scores["cc_seen"] == float(fresh["cc_seen"])


def test_other_text_under_the_same_story_names_is_not_taken_from_the_cache(
    task: Task, spelt_task: Task, tiny_encoder: Encoder
) -> None:
    settings, cache = config(tiny_encoder, method="frozen"), WorkerCache()
    first, other = (run_trial(settings, data, cache=cache) for data in (task, spelt_task))
    assert first.scores["mlm_loss_train"] != other.scores["mlm_loss_train"]
    assert not np.array_equal(first.cc[SUBJECT], other.cc[SUBJECT])


def own_ids(task: Task, encoder: Encoder, names: tuple[str, ...]) -> set[int]:
    """Token ids that the words of some stories consist of."""
    text = " ".join(word for name in names for word in task.dataset.stories[name].words)
    return set(encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def window_ids(windows: list[Window]) -> set[int]:
    return {int(i) for window in windows for i in window.ids if i >= N_SPECIAL}


def probe_labels(probes: Probes) -> list[set[int]]:
    return [{int(label) for batch in batches for label in batch.labels} for batches in probes]


@pytest.mark.table
@pytest.mark.parametrize("n_outer_folds", [1, 3])
@pytest.mark.parametrize("mlm_text", ["fit", "all"])
def test_training_reads_only_the_stories_of_mlm_text(
    mlm_text: str, n_outer_folds: int, spelt_task: Task, tiny_encoder: Encoder, calls: list[SimpleNamespace]
) -> None:
    task = make_task(spelt_task.dataset, n_outer_folds)
    run_trial(config(tiny_encoder, mlm_text=mlm_text, epochs=1), task)
    assert len(calls) == n_outer_folds
    for call, split in zip(calls, task.splits, strict=True):
        fit, validation, test = (
            own_ids(task, tiny_encoder, names) for names in (split.fit, split.validation, split.test)
        )
        assert not fit & validation
        assert not (fit | validation) & test
        assert window_ids(call.windows) == (fit if mlm_text == "fit" else fit | validation | test)
        train_labels, heldout_labels = probe_labels(call.probes)
        assert train_labels <= fit
        assert heldout_labels <= validation


def test_losses_are_read_on_the_same_tokens_in_every_trial(
    task: Task, tiny_encoder: Encoder, calls: list[SimpleNamespace]
) -> None:
    other = {"seed": 3, "rank": 2, "mask_probability": 0.3, "window_tokens": 48, "stride": 30, "mlm_text": "all"}
    for changes in ({}, other):
        run_trial(config(tiny_encoder, epochs=1, **changes), task)
    first, second = (call.probes for call in calls)
    for a, b in zip((*first.train, *first.heldout), (*second.train, *second.heldout), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_search_never_reads_test_responses(method: str, task: Task, tiny_encoder: Encoder, tmp_path: Path) -> None:
    (name,) = task.splits[0].test
    gone = Responses(path=tmp_path / "nowhere.npy")
    stories = dict(task.dataset.stories)
    stories[name] = replace(stories[name], responses={SUBJECT: gone})
    without = task._replace(dataset=replace(task.dataset, stories=stories, fingerprint="without"))
    settings = config(tiny_encoder, method=method, mlm_text="all")
    assert_same_bits(run_trial(settings, without), run_trial(settings, task))
    if method != "lora":
        with pytest.raises(InputError, match=r"nowhere\.npy: no such file"):
            run_trial(settings, without, score_test=True)


def test_last_epoch_is_the_score_and_the_best_is_noted(task: Task, tiny_encoder: Encoder) -> None:
    reported: list[dict[str, float]] = []
    best_was_not_last = 0
    for seed in range(8):
        reported.clear()
        settings = config(tiny_encoder, epochs=3, lr=0.05, seed=seed)
        record = run_trial(settings, task, lambda scores: reported.append(scores) is None)
        cc = [epoch["cc_mean"] for epoch in record.epochs]
        assert reported == record.epochs
        assert [epoch["epoch"] for epoch in record.epochs] == [1, 2, 3]
        assert (record.scores["cc_mean"], record.scores["cc_best"]) == (cc[2], max(cc))
        assert record.scores["epoch_best"] == 1 + int(np.argmax(cc))
        assert record.scores["mlm_loss_heldout"] == record.epochs[2]["mlm_loss_heldout"]
        assert float(np.nanmean(record.cc[SUBJECT])) == pytest.approx(cc[2], abs=1e-6)
        assert (record.status, record.scores["epochs_done"]) == (COMPLETE, 3)
        best_was_not_last += max(cc) > cc[2]
    assert best_was_not_last > 0  # else both rules would pass


def test_report_of_false_stops_the_trial_there(task: Task, tiny_encoder: Encoder, tmp_path: Path) -> None:
    settings = config(tiny_encoder, epochs=3)
    whole = run_trial(settings, task)
    stopped = run_trial(settings, task, lambda scores: scores["epoch"] < 2, adapter_folder=tmp_path / "adapter")
    assert (stopped.status, stopped.scores["epochs_done"]) == (STOPPED, 2)
    assert without_seconds(stopped) == without_seconds(whole)[:2]
    assert stopped.scores["cc_mean"] == whole.epochs[1]["cc_mean"]
    assert stopped.scores["optimizer_steps"] == whole.epochs[1]["optimizer_steps"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("method", "n_epochs"), [("word_rate", 0), ("frozen", 0), ("lora", 2)])
def test_false_after_the_last_epoch_has_no_effect(
    method: str, n_epochs: int, task: Task, tiny_encoder: Encoder
) -> None:
    record = run_trial(config(tiny_encoder, method=method), task, lambda scores: 0 < scores["epoch"] < 2)
    assert (record.status, record.scores["epochs_done"]) == (COMPLETE, n_epochs)


def test_notes_name_every_epoch_of_overfitting(
    task: Task, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_module, "OVERFIT_LOSS", math.inf)  # only a rise of the held-out loss matters
    record = run_trial(config(tiny_encoder, epochs=6, lr=0.1), task)
    heldout = [epoch["mlm_loss_heldout"] for epoch in record.epochs]
    rose = [at + 2 for at, (before, after) in enumerate(pairwise(heldout)) if after > before]
    assert 0 < len(rose) < 5  # else both rising and falling would pass
    epochs = [int(match[1]) for note in record.notes if (match := re.match(r"overfitting in epoch (\d+):", note))]
    assert epochs == rose


@pytest.mark.table
@pytest.mark.parametrize("method", METHODS)
def test_scores_over_outer_folds_are_means_of_single_splits(
    method: str, rotating_task: Task, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    settings = config(tiny_encoder, method=method)
    together = run_trial(settings, rotating_task, adapter_folder=tmp_path)
    alone = [run_trial(settings, rotating_task._replace(splits=(split,))) for split in rotating_task.splits]
    assert len(alone) == 3
    assert len({record.scores["cc_mean"] for record in alone}) == 3
    for at, epoch in enumerate(without_seconds(together)):
        assert epoch.keys() == without_seconds(alone[0])[at].keys()
        for name, value in epoch.items():
            assert value == pytest.approx(np.mean([record.epochs[at][name] for record in alone]), abs=1e-12), name
    for name in ("cc_mean", "cc_seen", "alpha_edge_share", "share_above_0"):
        assert together.scores[name] == pytest.approx(np.mean([r.scores[name] for r in alone]), abs=1e-12)
    expected = np.mean([record.cc[SUBJECT] for record in alone], axis=0)
    np.testing.assert_allclose(together.cc[SUBJECT], expected, rtol=0, atol=1e-6)
    rows = [row | {"split": at} for at, record in enumerate(alone) for row in record.stories]
    assert together.stories == rows
    folders = sorted(file.parent.name for file in tmp_path.glob("*/adapter_config.json"))
    assert folders == (["split0", "split1", "split2"] if method == "lora" else [])


def test_splits_of_which_some_are_too_short_for_p_values_are_averaged(tmp_path: Path) -> None:
    """The share is the mean over the splits that have one, as over subjects."""
    names = ("wheretheressmoke", "a", "b", "c", "d", "e", "f")
    task = make_task(open_dataset(make_lab(tmp_path / "lab", names, n_words=153)), n_outer_folds=3)
    settings = TrialConfig(method="word_rate")
    alone = [run_trial(settings, task._replace(splits=(split,))).scores for split in task.splits]
    shares = [scores["share_significant"] for scores in alone if "share_significant" in scores]
    assert 0 < len(shares) < 3, "else there is nothing to average"
    for splits in (task.splits, task.splits[::-1], task.splits[1:] + task.splits[:1]):
        together = run_trial(settings, task._replace(splits=splits)).scores
        assert together["share_significant"] == pytest.approx(np.mean(shares))


TRAITS = {"share_trainable", "delta_norm", "stable_rank", "probe_loss_before", "probe_loss_after"}
SCORES = set(
    "cc_mean cc_median cc_top1 cc_top5 share_above_0 alpha_edge_share n_constant_predictions voxels_are_chosen "
    "epochs_done epoch_kept cc_best epoch_best cc_seen layer n_trainable".split()
)
LOSSES = {"optimizer_steps", "tokens_seen", "mlm_loss_train", "mlm_loss_heldout"}


def test_records_of_methods(task: Task, tiny_encoder: Encoder, calls: list[SimpleNamespace]) -> None:
    own = {"word_rate": set(), "frozen": LOSSES, "lora": LOSSES | TRAITS}
    records = {}
    for method, further in own.items():
        model = "/no/such/model" if method == "word_rate" else tiny_encoder.name  # the first loads none
        settings = config(tiny_encoder, method=method, model=model, target_modules="q,d", batch_size=3, accumulation=2)
        records[method] = record = run_trial(settings, task)
        assert set(record.scores) == SCORES | further
        assert (record.status, record.method, record.cc_test) == (COMPLETE, method, {})
        assert TrialConfig.from_dict(record.config) == settings
        assert len(record.epochs) == (2 if method == "lora" else 1)
        assert set(record.cc) == {SUBJECT}
        assert (record.cc[SUBJECT].shape, record.cc[SUBJECT].dtype) == ((12,), np.float32)
    word_rate, frozen, lora = (record.scores for record in records.values())
    assert (word_rate["layer"], word_rate["n_trainable"], word_rate["epochs_done"]) == (None, 0, 0)
    names = ("layer", "n_trainable", "epochs_done", "optimizer_steps", "tokens_seen")
    assert [frozen[name] for name in names] == [2, 0, 0, 0, 0]
    assert frozen["mlm_loss_train"] == pytest.approx(math.log(103), abs=0.2)  # of an untrained BERT
    windows = calls[0].windows
    n_tokens = sum(len(window.ids) for window in windows)
    n_weights = 2 * (4 * (32 + 32) + 4 * (64 + 32))  # two blocks, rank 4
    assert [lora[name] for name in names] == [2, n_weights, 2, 2 * math.ceil(len(windows) / 6), 2 * n_tokens]
    # the first half of the voxels follows word rate, the others are noise
    cc = records["word_rate"].cc[SUBJECT]
    assert cc[:6].min() > 0.25
    assert cc[:6].mean() > cc[6:].mean() + 0.3


def test_test_stories_are_scored_only_without_tuning(task: Task, tiny_encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="a tuned model's test score belongs to the confirm phase"):
        run_trial(config(tiny_encoder, epochs=1), task, score_test=True)
    for method in ("word_rate", "frozen"):
        record = run_trial(config(tiny_encoder, method=method), task, score_test=True)
        assert record.scores["cc_test"] == pytest.approx(float(np.nanmean(record.cc_test[SUBJECT])), abs=1e-6)
        roles = [(row["role"], row["story"]) for row in record.stories]
        assert roles == [("validation", "alpha"), ("test", "wheretheressmoke")]
        assert "cc_test" not in run_trial(config(tiny_encoder, method=method), task).scores


def test_model_without_a_head_can_only_be_frozen(task: Task, tiny_encoder: Encoder, tmp_path: Path) -> None:
    tiny_encoder.copy_model().bert.save_pretrained(tmp_path)
    tiny_encoder.tokenizer.save_pretrained(tmp_path)
    settings = config(tiny_encoder, model=str(tmp_path))
    with pytest.raises(InputError, match="has no trained masked-LM head to fine-tune; it can only be frozen"):
        run_trial(settings, task)
    headless = run_trial(replace(settings, method="frozen"), task)
    assert set(headless.scores) == SCORES  # no losses
    whole = run_trial(config(tiny_encoder, method="frozen"), task)
    assert np.array_equal(headless.cc[SUBJECT], whole.cc[SUBJECT])


def test_training_that_changes_nothing_is_refused(task: Task, tiny_encoder: Encoder) -> None:
    with pytest.raises(InputError, match="fine-tuning: changes nothing"):
        run_trial(config(tiny_encoder, lr=1e-30, epochs=1), task)
