"""Text-only trials: the split, the classifier, what each method learns and leaves alone, and adapting a masked LM."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from make_texts import make_text_bert, negated_texts, write_texts
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import BertForSequenceClassification

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import ADAPT, CLASSIFICATION, COMPLETE, STOPPED
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.corpus import Corpus, Example, open_corpus
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.lora import load_adapter, load_whole
from bert_encoding.text_tasks import domain_adaptation as adapt
from bert_encoding.text_tasks.classification import EXAMPLE_CHARACTERS, shorten
from bert_encoding.text_tasks.classifier import (
    Classification,
    pooler_weights,
    prepare_classifier,
    read_logits,
    read_vectors,
    score_classes,
    text_window,
)
from bert_encoding.text_tasks.domain_adaptation import text_windows
from bert_encoding.text_tasks.run import run_text_trial
from bert_encoding.text_tasks.task import (
    TextTask,
    class_names,
    make_text_task,
    read_texts,
    split_corpus,
    split_notes,
    tokenize_texts,
)
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import cached_encoder
from study.setup.spaces import load_space, quiet_study, to_trial_config

CPU = torch.device("cpu")
LABELS = ("neg", "pos")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_text_bert(tmp_path_factory.mktemp("text") / "bert"))


@pytest.fixture(scope="module")
def cache() -> WorkerCache:
    return WorkerCache()


@pytest.fixture(scope="module")
def encoder(bert: str, cache: WorkerCache) -> Encoder:
    return cached_encoder(bert, cache)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write_texts(tmp_path_factory.mktemp("texts") / "negated.csv", negated_texts(400)))


@pytest.fixture(scope="module")
def task(corpus: Corpus) -> TextTask:
    return make_text_task(CLASSIFICATION, corpus, seed=0, max_length=32)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Corpus]:
    """Open a corpus of some texts, each "word number", with these labels."""

    def write_corpus(*labels: str | None) -> Corpus:
        examples = [Example(f"film {index}", label) for index, label in enumerate(labels)]
        return open_corpus(write_texts(tmp_path / "few.csv", examples))

    return write_corpus


def settings(model: str, **changes: Any) -> TrialConfig:
    """Settings with which a tiny BERT learns in a second or two."""
    tiny = {"lr": 2e-3, "epochs": 4, "batch_size": 16, "warmup_epochs": 1, "frozen_blocks": 1, "hidden_dropout": 0.0}
    adapter = {"target_modules": "all", "rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0}
    return TrialConfig(model=model, precision="float32", **{**tiny, **adapter, **changes})


def test_a_split_is_stratified_complete_and_seeded(corpus: Corpus) -> None:
    labels = np.array([example.label for example in corpus])
    train, heldout = split_corpus(corpus, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, heldout])), np.arange(400))
    assert Counter(labels[train]) == {"neg": 160, "pos": 160}
    assert Counter(labels[heldout]) == {"neg": 40, "pos": 40}
    assert np.array_equal(train, split_corpus(corpus, seed=3)[0])
    assert not np.array_equal(train, split_corpus(corpus, seed=4)[0])
    assert np.array_equal(np.diff(train) > 0, np.ones(319, dtype=bool))


@pytest.mark.parametrize(
    ("counts", "n_train", "expected"),
    [
        ({"a": 70, "b": 30}, 10, {"a": 7, "b": 3}),
        ({"a": 90, "b": 8, "c": 2}, 50, {"a": 45, "b": 4, "c": 1}),
        ({"a": 97, "b": 3}, 10, {"a": 9, "b": 1}),  # b would get 0.3 of a text
        ({"a": 97, "b": 3}, 95, {"a": 93, "b": 2}),  # b would get 2.85 and judge with none
        ({"a": 5, "b": 5, "c": 5}, 7, {"a": 3, "b": 2, "c": 2}),
        ({None: 10}, 7, {None: 7}),
    ],
)
def test_classes_are_shared_out_to_the_nearest_text(
    write: Callable[..., Corpus], counts: dict[str | None, int], n_train: int, expected: dict[str | None, int]
) -> None:
    corpus = write(*(label for label, n in counts.items() for _ in range(n)))
    labels = [example.label for example in corpus]
    train, heldout = split_corpus(corpus, 0, n_train)
    assert Counter(labels[index] for index in train) == expected
    assert np.array_equal(np.sort(np.concatenate([train, heldout])), np.arange(len(labels)))


@pytest.mark.parametrize(
    ("labels", "n_train", "message"),
    [
        (("a", "b", "a", "b"), 0, "0 of 4 training texts"),
        (("a", "b", "a", "b"), 4, "4 of 4 training texts"),
        (("a", "b", "a", "b"), 1, "leave 1 in one part, fewer than the 2 classes"),
        (("a", "b", "a", "b"), 3, "leave 1 in one part, fewer than the 2 classes"),
        (("a", "b", "a", "a"), None, "class 'b' has one text"),
        ((None,), None, "0 of 1 training texts"),
    ],
)
def test_an_impossible_split_is_refused(
    write: Callable[..., Corpus], labels: tuple[str, ...], n_train: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        split_corpus(write(*labels), 0, n_train)
    assert "few.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_of_one_class_and_texts_without_labels_cannot_be_classified(write: Callable[..., Corpus]) -> None:
    corpus = open_corpus(write("b", *39 * ["a"]).path, n_examples=5)
    assert class_names(corpus) == ("a",)
    with pytest.raises(InputError, match="all 5 texts used have the label 'a'"):
        split_corpus(corpus, 0)
    with pytest.raises(InputError, match=r"few.csv: has no labels to learn; add a column 'label'"):
        make_text_task(CLASSIFICATION, write(None, None), 0)
    assert make_text_task(ADAPT, write(None, None), 0).train.size == 1


def test_the_notes_state_sizes_classes_and_repeated_texts(tmp_path: Path) -> None:
    examples = [Example("the same", "a"), Example("the same", "a"), Example("b one", "b"), Example("b two", "b")]
    task = make_text_task(CLASSIFICATION, open_corpus(write_texts(tmp_path / "few.csv", examples)), 0, n_train=2)
    assert list(split_notes(task, examples)) == [
        "train: 2 texts, a 1 (50.0%), b 1 (50.0%)",
        "held out: 2 texts, a 1 (50.0%), b 1 (50.0%)",
        "1 of 2 held-out texts are identical to a training text",
    ]


@pytest.mark.parametrize("max_length", [8, 11, 32])
def test_the_end_of_a_long_text_is_read_as_transformers_truncates(encoder: Encoder, max_length: int) -> None:
    texts = ["the film was not good", "i think the plot was weak, but we found the cast great at all", "fine", " "]
    reference = type(encoder.tokenizer).from_pretrained(encoder.name, truncation_side="left")
    expected = reference(texts, truncation=True, max_length=max_length)["input_ids"]
    windows = [text_window(t, max_length, encoder.tokenizer) for t in tokenize_texts(texts, encoder.tokenizer)]
    assert [window.ids.tolist() for window in windows] == expected
    assert [len(window.word_ids) for window in windows] == [len(ids) - 2 for ids in expected]
    assert encoder.tokenizer.truncation_side == "right", "the resident tokenizer is as it was"


def test_tokens_know_their_words(encoder: Encoder) -> None:
    (tokens,) = tokenize_texts(["the films, not"], encoder.tokenizer)
    assert encoder.tokenizer.convert_ids_to_tokens(tokens.ids) == "the film ##s [UNK] not".split()
    assert tokens.word_ids.tolist() == [0, 1, 1, 2, 3]
    assert tokens.n_words == 4


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, true = 3 * rng.standard_normal((50, 4)), rng.integers(0, 3, 50)
    logits[:, 3] = -9  # a class that is neither there nor predicted
    predicted, scores = logits.argmax(axis=1), score_classes(logits, true)
    assert scores["accuracy"] == accuracy_score(true, predicted)
    expected = f1_score(true, predicted, average="macro", labels=range(4), zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected, abs=1e-12)
    probabilities = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    assert scores["loss"] == pytest.approx(log_loss(true, probabilities, labels=range(4)), abs=1e-12)


def windows_of(texts: list[str], encoder: Encoder) -> list[Any]:
    return [text_window(tokens, 32, encoder.tokenizer) for tokens in tokenize_texts(texts, encoder.tokenizer)]


def test_the_classifier_is_transformers_own_on_the_pristine_encoder(encoder: Encoder, bert: str) -> None:
    model, _ = prepare_classifier(settings(bert, method="full"), encoder, LABELS)
    texts = [example.text for example in negated_texts(40)]
    reference = BertForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    reference.bert.pooler.load_state_dict(model.bert.pooler.state_dict())
    reference.classifier.load_state_dict(model.classifier.state_dict())
    batch = encoder.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = reference(**batch).logits.numpy()
    vectors = read_vectors(model, windows_of(texts, encoder), encoder.tokenizer.pad_token_id, "float32", CPU)
    assert np.allclose(read_logits(model, vectors, CPU), expected, rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "neg", 1: "pos"}


def test_a_checkpoints_pooler_is_used(encoder: Encoder, bert: str) -> None:
    known = {"bert.pooler.dense.weight": torch.full((32, 32), 0.5), "bert.pooler.dense.bias": torch.ones(32)}
    with_pooler = replace(encoder, next_sentence=known | {"cls.seq_relationship.weight": torch.ones(2, 32)})
    assert set(pooler_weights(with_pooler)) == {"weight", "bias"}
    for method, trains in {"frozen": False, "lora": False, "partial": True, "full": True}.items():
        pooler = prepare_classifier(settings(bert, method=method), with_pooler, LABELS)[0].bert.pooler
        assert torch.equal(pooler.dense.weight, known["bert.pooler.dense.weight"])
        assert pooler.dense.weight.requires_grad == trains
    assert pooler_weights(encoder) == {}


HEAD = {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}


def test_each_method_trains_exactly_its_parameters(encoder: Encoder, bert: str, subtests: pytest.Subtests) -> None:
    everything = {f"bert.{name}" for name, _ in encoder.model.bert.named_parameters()}
    blocks = {name for name in everything if ".layer.1." in name}
    adapters = {
        f"bert.encoder.layer.{block}.attention.self.{part}.lora_{factor}.default.weight"
        for block in (0, 1)
        for part in ("query", "key")
        for factor in "AB"
    }
    expected = {"frozen": set(), "random": set(), "lora": adapters, "partial": blocks, "full": everything}
    for method, names in expected.items():
        with subtests.test(method):
            config = settings(bert, method=method, target_modules="q,k", rank=4)
            model, _ = prepare_classifier(config, encoder, LABELS)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == names | HEAD


@pytest.mark.parametrize("method", ["full", "lora", "partial", "frozen"])
def test_one_step_equals_a_plain_transformers_loop(method: str, encoder: Encoder, bert: str) -> None:
    """Gradients of one step, accumulated over micro-batches of unequal length, within 1e-6."""
    examples = negated_texts(10)
    windows, labels = windows_of([e.text for e in examples], encoder), np.array([e.label == "pos" for e in examples])
    model: Any = prepare_classifier(settings(bert, method=method), encoder, LABELS)[0]
    pad_id = encoder.tokenizer.pad_token_id
    vectors = read_vectors(model, windows, pad_id, "float32", CPU) if method == "frozen" else None
    objective = Classification(windows, labels.astype(np.int64), pad_id, vectors)
    step = objective.draw(range(10), np.random.default_rng(0))
    assert [len(w.ids) for w in step.windows] == sorted(len(w.ids) for w in windows)
    for part in objective.split(step, 4):
        loss, n = objective.losses(model, part, "float32", CPU)["class"]
        (loss / objective.n_terms(step)["class"]).backward()
        assert n == len(part.windows)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    batch = encoder.tokenizer([e.text for e in examples], return_tensors="pt", padding=True)
    model(**batch, labels=torch.from_numpy(labels.astype(np.int64))).loss.backward()
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(gradients[name], p.grad, rtol=0, atol=1e-6), name
    assert objective.n_tokens(step) == int(batch["attention_mask"].sum())


@pytest.mark.slow
def test_bert_learns_what_no_bag_of_words_can(corpus: Corpus, task: TextTask, bert: str) -> None:
    texts, labels = zip(*corpus, strict=True)
    counts, labels = CountVectorizer().fit_transform(texts), np.array(labels)
    bag = LogisticRegression().fit(counts[task.train], labels[task.train])
    assert bag.score(counts[task.heldout], labels[task.heldout]) < 0.6
    rates = {"frozen": 2e-3, "full": 2e-3, "lora": 5e-3, "partial": 2e-3}
    frozen, full, lora, partial = (
        run_text_trial(settings(bert, method=m, lr=lr, epochs=6), task).scores for m, lr in rates.items()
    )
    assert min(lora["accuracy"], partial["accuracy"]) > 0.9
    assert min(lora["delta_norm"], partial["delta_norm"]) > 0
    assert full["accuracy"] > 0.95
    assert full["accuracy"] > frozen["accuracy"] + 0.25
    assert full["accuracy_before"] == frozen["accuracy_before"]
    assert abs(full["accuracy_before"] - 0.5) < 0.2


def test_fields_of_a_classification_record(task: TextTask, bert: str, corpus: Corpus) -> None:
    seen: list[dict[str, float]] = []
    record = run_text_trial(settings(bert, method="frozen"), task, lambda scores: seen.append(scores) or True)
    assert (record.status, record.method) == (COMPLETE, "frozen")
    assert seen == record.epochs
    assert [epoch["epoch"] for epoch in seen] == [1, 2, 3, 4]
    assert [epoch["optimizer_steps"] for epoch in seen] == [20, 40, 60, 80]
    most = max(epoch["accuracy"] for epoch in seen)
    best = min((epoch for epoch in seen if epoch["accuracy"] == most), key=lambda epoch: epoch["loss_heldout"])
    for name in ("accuracy", "macro_f1", "loss_train", "loss_heldout"):
        assert record.scores[name] == best[name]
    assert record.scores["epoch_best"] == record.scores["epoch_kept"] == best["epoch"]
    assert record.scores["epochs_done"] == 4
    assert record.scores["n_trainable"] == 32 * 32 + 32 + 2 * 32 + 2
    assert set(record.seconds) == {"train", "total"}
    assert record.notes[:4] == [
        "train: 320 texts, neg 160 (50.0%), pos 160 (50.0%)",
        "held out: 80 texts, neg 40 (50.0%), pos 40 (50.0%)",
        "always predicting 'pos' has a held-out accuracy of 0.500",
        "the pooler is randomly initialised and trained",
    ]
    shown = [(e["text"], e["label"]) for e in record.examples]
    heldout = {tuple(example) for index, example in enumerate(corpus) if index in set(task.heldout)}
    assert len(shown) == 10 == len(set(shown))
    assert set(shown) <= heldout
    assert {e[f"predicted_{when}"] for e in record.examples for when in ("before", "after")} <= set(LABELS)


def test_the_predictions_of_the_examples_match_the_scores(tmp_path: Path, bert: str) -> None:
    """With ten held-out texts all of them are shown, so that their hits are the accuracy."""
    corpus = open_corpus(write_texts(tmp_path / "some.csv", negated_texts(130)))
    task = make_text_task(CLASSIFICATION, corpus, 0, n_train=120, max_length=32)
    record = run_text_trial(settings(bert, method="full"), task)
    for when, name in {"before": "accuracy_before", "after": "accuracy"}.items():
        assert np.mean([e["label"] == e[f"predicted_{when}"] for e in record.examples]) == record.scores[name]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    """Texts whose classes are random: a model that memorises them soon gets worse on other texts."""
    rng = np.random.default_rng(0)
    examples = [Example(text, LABELS[rng.integers(2)]) for text, _ in negated_texts(120)]
    corpus = open_corpus(write_texts(tmp_path_factory.mktemp("noise") / "noise.csv", examples))
    return make_text_task(CLASSIFICATION, corpus, seed=0, max_length=32)


@pytest.mark.table
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_epoch_is_restored_bit_for_bit(method: str, noise: TextTask, bert: str, tmp_path: Path) -> None:
    """Trained just up to the best epoch, the model is the same."""
    config = settings(bert, method=method, lr=5e-3, epochs=8, warmup_epochs=0)
    long = run_text_trial(config, noise, adapter_folder=tmp_path / "long")
    best = int(long.scores["epoch_best"])
    assert 1 <= best < 8
    assert long.epochs[-1]["accuracy"] < long.scores["accuracy"]
    assert f"epoch {best}, the best on held-out texts, is restored" in long.notes
    short = run_text_trial(replace(config, epochs=best), noise, adapter_folder=tmp_path / "short")
    assert short.scores["epoch_best"] == best
    (file,) = (tmp_path / "long").glob("*.safetensors")
    assert file.read_bytes() == (tmp_path / "short" / file.name).read_bytes()
    assert (long.scores["accuracy"], long.examples) == (short.scores["accuracy"], short.examples)


@pytest.mark.parametrize("method", ["frozen", "random", "lora", "partial", "full"])
def test_the_cached_encoder_stays_unchanged(
    method: str, noise: TextTask, bert: str, encoder: Encoder, cache: WorkerCache
) -> None:
    before = weights_fingerprint(encoder.model)
    config = settings(bert, method=method, epochs=1)
    first, second = (run_text_trial(config, noise, cache=cache) for _ in range(2))
    assert weights_fingerprint(encoder.model) == before
    assert encoder.model.bert.pooler is None
    assert read_texts(noise.corpus, encoder, cache) is read_texts(noise.corpus, encoder, cache)
    assert first.scores == second.scores, "the same seed gives the same bits in one process"
    assert first.examples == second.examples
    other = run_text_trial(replace(config, seed=1), noise)
    assert other.scores["loss_heldout"] != first.scores["loss_heldout"]


def test_a_failure_leaves_the_cached_encoder_unchanged(
    noise: TextTask, bert: str, encoder: Encoder, cache: WorkerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, losses, calls = weights_fingerprint(encoder.model), Classification.losses, []

    def not_finite_at_the_third(*arguments: Any) -> Any:
        calls.append(1)
        ((total, n),) = losses(*arguments).values()
        return {"class": (total * (torch.nan if len(calls) == 3 else 1), n)}

    monkeypatch.setattr(Classification, "losses", not_finite_at_the_third)
    with pytest.raises(FloatingPointError, match="step 3 of epoch 1"):
        run_text_trial(settings(bert, method="full"), noise, cache=cache)
    assert weights_fingerprint(encoder.model) == before


def test_a_trial_can_be_stopped_and_keeps_its_best_epoch(noise: TextTask, bert: str) -> None:
    record = run_text_trial(settings(bert, method="lora"), noise, lambda scores: scores["epoch"] < 2)
    assert (record.status, len(record.epochs)) == (STOPPED, 2)
    assert record.scores["epochs_done"] == 2
    last = run_text_trial(settings(bert, method="lora", epochs=2), noise, lambda scores: scores["epoch"] < 2)
    assert last.status == COMPLETE, "it was at its end anyway"
    assert last.scores["loss_heldout"] == record.scores["loss_heldout"]


def test_patience_ends_training(noise: TextTask, bert: str) -> None:
    record = run_text_trial(settings(bert, method="full", lr=5e-3, epochs=30, patience=2), noise)
    ranks = [(epoch["accuracy"], -epoch["loss_heldout"]) for epoch in record.epochs]
    assert record.status == COMPLETE
    assert len(ranks) < 30
    assert ranks.index(max(ranks)) == len(ranks) - 3
    assert record.scores["epoch_best"] == len(ranks) - 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "word_rate"}, "method 'word_rate': has no BERT to read texts; use frozen, random, lora"),
        ({"objective": "mlm_nsp"}, "objective 'mlm_nsp': not available in task 'classification'; leave it 'mlm'"),
        ({"mlm_text": "all"}, "mlm_text 'all': not available"),
        ({"replay": 0.5}, "replay 0.5: not available"),
        ({"match_steps": True}, "match_steps True: not available"),
        ({"method": "partial", "frozen_blocks": 2}, "frozen_blocks 2: .* has 2 blocks"),
        ({"max_length": 65}, r"--max-length 65: .*bert reads at most 64 tokens"),
        ({"max_length": None}, r"window_tokens 512: .*bert reads at most 64 tokens"),
        ({"max_length": 7}, "--max-length 7: must be 8 tokens or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, corpus: Corpus, bert: str) -> None:
    changes = {"max_length": 32} | changes
    max_length = changes.pop("max_length")
    with pytest.raises(InputError, match=message):
        run_text_trial(settings(bert, **changes), make_text_task(CLASSIFICATION, corpus, 0, max_length=max_length))


def test_long_texts_are_counted_and_example_texts_cut(tmp_path: Path, bert: str) -> None:
    long = [Example(("so " * 60) + e.text, e.label) for e in negated_texts(40)]
    corpus = open_corpus(write_texts(tmp_path / "long.csv", long))
    task = make_text_task(CLASSIFICATION, corpus, 0, max_length=16)
    record = run_text_trial(settings(bert, method="frozen", epochs=1), task)
    assert "40 of 40 texts are longer than 16 tokens; only their end is read" in record.notes
    assert {len(e["text"]) for e in record.examples} == {EXAMPLE_CHARACTERS}
    assert all(e["text"].startswith("...") for e in record.examples)
    assert shorten("two\n lines") == "two lines"


def test_three_classes_are_distinguished(tmp_path: Path, bert: str) -> None:
    examples = [Example(f"{word} film {index}", word) for index in range(30) for word in ("good", "bad", "dull")]
    corpus = open_corpus(write_texts(tmp_path / "three.csv", examples))
    record = run_text_trial(settings(bert, method="full"), make_text_task(CLASSIFICATION, corpus, 0, max_length=32))
    assert record.scores["accuracy"] == 1
    assert record.scores["macro_f1"] == 1


@pytest.fixture(scope="module")
def domain(corpus: Corpus) -> TextTask:
    return make_text_task(ADAPT, corpus, seed=0, max_length=32)


def test_adapting_learns_the_domain(domain: TextTask, bert: str, encoder: Encoder) -> None:
    before = weights_fingerprint(encoder.model)
    record = run_text_trial(settings(bert, method="full", probe_tokens=200), domain)
    assert record.scores["mlm_loss_heldout_before"] > 3
    assert record.scores["mlm_loss_heldout"] < 2
    assert record.scores["mlm_loss_heldout"] == min(epoch["mlm_loss_heldout"] for epoch in record.epochs)
    assert record.scores["perplexity"] == pytest.approx(np.exp(record.scores["mlm_loss_heldout"]), rel=1e-12)
    assert record.scores["probe_loss_after"] != record.scores["probe_loss_before"]
    assert "320 windows of at most 32 tokens to train on" in record.notes, "a short text is a window"
    assert weights_fingerprint(encoder.model) == before


def test_a_frozen_model_is_read_once(domain: TextTask, bert: str) -> None:
    frozen = run_text_trial(settings(bert, method="frozen", probe_tokens=200), domain)
    lora = run_text_trial(settings(bert, method="lora", epochs=1, probe_tokens=200), domain)
    assert [epoch["epoch"] for epoch in frozen.epochs] == [0]
    assert frozen.scores["mlm_loss_heldout"] == lora.scores["mlm_loss_heldout_before"]
    assert frozen.scores["probe_loss_after"] == frozen.scores["probe_loss_before"]
    assert frozen.scores["n_trainable"] == 0
    assert "delta_norm" not in frozen.scores


@pytest.mark.slow
def test_adapting_restores_and_saves_the_best_epoch(
    domain: TextTask, bert: str, encoder: Encoder, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for method, load in {"lora": load_adapter, "full": load_whole}.items():
        with subtests.test(method):
            config = settings(bert, method=method, lr=2e-2, warmup_epochs=0, batch_size=64, probe_tokens=100)
            folder = tmp_path / method
            long = run_text_trial(config, domain, adapter_folder=folder)
            best = int(long.scores["epoch_best"])
            short = run_text_trial(replace(config, epochs=best), domain, adapter_folder=tmp_path / f"{method}-short")
            file = next(folder.glob("*.safetensors"))
            assert file.read_bytes() == (tmp_path / f"{method}-short" / file.name).read_bytes()
            assert long.scores["probe_loss_after"] == short.scores["probe_loss_after"]
            load(encoder, folder)  # raises if it changed nothing
    run_text_trial(settings(bert, method="frozen", probe_tokens=50), domain, adapter_folder=tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()


def test_adapting_has_patience(domain: TextTask, bert: str) -> None:
    wild = run_text_trial(settings(bert, method="full", probe_tokens=50, lr=0.05, epochs=20, patience=1), domain)
    losses = [epoch["mlm_loss_heldout"] for epoch in wild.epochs]
    assert wild.status == COMPLETE
    assert losses[-1] >= min(losses) == wild.scores["mlm_loss_heldout"]
    assert len(losses) < 20


def test_a_long_text_becomes_several_windows_and_a_short_one_stays(encoder: Encoder) -> None:
    texts = list(tokenize_texts(["film " * 100, "good", "", "bad film"], encoder.tokenizer))
    windows = text_windows(texts, length=42, stride=40, encoder=encoder)
    assert [len(window.ids) for window in windows] == [42, 42, 3, 4], "the rest of 20 tokens teaches little"
    assert [len(w.ids) for w in text_windows(texts, 42, 30, encoder)] == [42, 42, 42, 3, 4]
    with pytest.raises(InputError, match="none of 1 texts has a token"):
        text_windows([texts[2]], 42, 40, encoder)


def test_strides_are_equalised_and_general_text_is_replayed(tmp_path: Path, bert: str) -> None:
    corpus = open_corpus(write_texts(tmp_path / "long.csv", [Example("the film was good " * 40, None)] * 5))
    task = make_text_task(ADAPT, corpus, seed=0, max_length=42)
    config = settings(bert, method="full", stride=10, epochs=1, batch_size=4, probe_tokens=50)
    overlapping, apart, replayed = (
        run_text_trial(replace(config, **changes), task).scores
        for changes in ({}, {"match_steps": True}, {"match_steps": True, "replay": 0.75})
    )
    assert overlapping["optimizer_steps"] == 13  # 4 texts of 160 tokens, 13 windows each, 4 a step
    assert apart["optimizer_steps"] == replayed["optimizer_steps"] == 4  # 4 windows each, side by side
    assert replayed["mlm_loss_heldout"] > apart["mlm_loss_heldout"], "three in four windows were of other text"
    assert replayed["probe_loss_after"] < apart["probe_loss_after"]


def test_a_model_without_a_head_cannot_adapt(
    domain: TextTask, bert: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "cached_encoder", lambda name, cache: replace(encoder, has_head=False))
    with pytest.raises(InputError, match="has no trained masked-LM head to adapt"):
        run_text_trial(settings(bert), domain)
    with pytest.raises(InputError, match="mlm_text 'control': not available in task 'adapt'"):
        run_text_trial(settings(bert, mlm_text="control"), domain)


def test_sentiment_lora_starts_at_the_course_s_point_and_sets_the_methods_side_by_side() -> None:
    space = load_space("sentiment_lora")
    base = TrialConfig(epochs=space.epochs or 0)
    lora, full, frozen = (to_trial_config(space.suggest(optuna.trial.FixedTrial(p)), base) for p in space.start)
    names = "method target_modules rank lora_alpha lora_dropout lr batch_size epochs weight_decay".split()
    assert [getattr(lora, name) for name in names] == ["lora", "q,k", 4, 32, 0.01, 1e-3, 8, 3, 0.01]
    assert (full.method, frozen.method) == ("full", "frozen")
    assert {config.epochs for config in (lora, full, frozen)} == {3}
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    drawn = [to_trial_config(space.suggest(study.ask()), base) for _ in range(200)]
    assert {config.method for config in drawn} == {"lora", "full", "frozen"}
    assert {config.rank for config in drawn if config.method == "lora"} == {2, 4, 8, 16, 32}
    highest_lora, highest_full = (max(c.lr for c in drawn if c.method == method) for method in ("lora", "full"))
    assert highest_full <= 5e-4 < highest_lora, "all weights want smaller steps than an adapter"
