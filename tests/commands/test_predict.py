"""Saved classifiers predict as in their trial, with the command and with PEFT and transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from make_texts import make_text_bert, negated_texts, write_texts
from peft import PeftModel
from run_commands import run_command
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertTokenizerFast

from bert_encoding.commands.predict import predict_texts
from bert_encoding.core.errors import InputError
from bert_encoding.core.names import CLASSIFICATION
from bert_encoding.datasets.corpus import Example, open_corpus
from bert_encoding.language_model.encoder import quiet
from bert_encoding.text_tasks.classification import ClassifyRun
from bert_encoding.text_tasks.run import run_text_trial
from bert_encoding.text_tasks.saved_classifier import class_probabilities, load_classifier
from bert_encoding.text_tasks.task import TextTask, make_text_task
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord

VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"method": "frozen"},
    "full": {"method": "full"},
    "partial": {"method": "partial"},
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "dora": True},
    "rslora, biases": {"method": "lora", "lora_scaling": "rslora", "lora_bias": "lora_only"},
    "pissa": {"method": "lora", "lora_init": "pissa", "lr": 1e-3},
}
TEXTS = ["the film was not bad but good", "the plot was not good at all"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_bert(tmp_path_factory.mktemp("predict") / "bert")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    file = write_texts(tmp_path_factory.mktemp("texts") / "negated.csv", negated_texts(120))
    return make_text_task(CLASSIFICATION, open_corpus(file), seed=0, max_length=12)


def settings(bert: Path, changes: dict[str, Any]) -> TrialConfig:
    tiny = {"lr": 5e-3, "epochs": 2, "batch_size": 16, "frozen_blocks": 1, "target_modules": "q,k", "rank": 4}
    return TrialConfig(**{"model": str(bert), "precision": "float32", **tiny, **changes})


class Trained(NamedTuple):
    """A finished trial, and its logits on held-out texts, of the best epoch."""

    folder: Path
    record: TrialRecord
    logits: np.ndarray


@pytest.fixture(scope="module")
def trained(bert: Path, task: TextTask, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Run each variant once."""
    trials: dict[str, Trained] = {}
    compute = ClassifyRun._logits

    def run(variant: str) -> Trained:
        if variant not in trials:
            folder, logits = tmp_path_factory.mktemp("saved") / "adapter", []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ClassifyRun, "_logits", lambda *of: logits.append(compute(*of)) or logits[-1])
                record = run_text_trial(settings(bert, VARIANTS[variant]), task, adapter_folder=folder)
            trials[variant] = Trained(folder, record, logits[-1])
        return trials[variant]

    return run


@pytest.fixture
def copied(trained: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a saved classifier, to damage."""
    return lambda variant: Path(shutil.copytree(trained(variant).folder, tmp_path / variant))


def heldout(task: TextTask) -> list[Example]:
    examples = list(task.corpus)
    return [examples[index] for index in task.heldout]


@pytest.mark.table
@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_equal_those_of_the_trial(variant: str, trained: Callable[[str], Trained], task: TextTask) -> None:
    folder, record, logits = trained(variant)
    texts = [example.text for example in heldout(task)]
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.exp(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    probabilities = class_probabilities(load_classifier(folder), texts)
    if variant == "pissa":  # saved as a plain LoRA of twice the rank: the same sum, in another order
        assert np.allclose(probabilities, expected, rtol=0, atol=1e-5)
    else:
        assert np.array_equal(probabilities, expected)
    table = predict_texts(folder, texts)
    hits = [label == example.label for label, example in zip(table["label"], heldout(task), strict=True)]
    assert np.mean(hits) == record.scores["accuracy"]
    assert np.array_equal(table["probability"], probabilities.max(axis=1))
    assert table["text"].tolist() == texts


@pytest.mark.table
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_transformers_read_the_folder(
    variant: str, trained: Callable[[str], Trained], task: TextTask, bert: Path
) -> None:
    folder = trained(variant).folder
    texts = [example.text for example in heldout(task)]
    with quiet():
        if (folder / "adapter_config.json").is_file():
            base = BertForSequenceClassification.from_pretrained(bert, num_labels=2)
            model, tokenizer = PeftModel.from_pretrained(base, folder).eval(), BertTokenizerFast.from_pretrained(bert)
        else:
            model = BertForSequenceClassification.from_pretrained(folder).eval()
            tokenizer = BertTokenizerFast.from_pretrained(folder)
            assert model.config.id2label == {0: "neg", 1: "pos"}
    tokenizer.truncation_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=12)
    with torch.no_grad():
        expected = torch.softmax(model(**batch).logits, dim=1).numpy()
    assert np.allclose(class_probabilities(load_classifier(folder), texts), expected, rtol=0, atol=1e-5)


def test_a_text_alone_has_the_same_probability(trained: Callable[[str], Trained], task: TextTask) -> None:
    classifier = load_classifier(trained("full").folder)
    texts = [example.text for example in heldout(task)]
    alone = np.concatenate([class_probabilities(classifier, [text]) for text in texts])
    assert np.allclose(alone, class_probabilities(classifier, texts), rtol=0, atol=1e-5)
    assert np.allclose(alone.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert class_probabilities(classifier, []).shape == (0, 2)


def test_texts_are_cleaned_as_in_training(bert: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "t.csv", [Example(f"{e.text} \U0001f600", e.label) for e in negated_texts(40)])
    for clean in (True, False):
        task = make_text_task(CLASSIFICATION, open_corpus(file, clean=clean), seed=0, max_length=32)
        config = settings(bert, {"method": "frozen", "epochs": 1})
        run_text_trial(config, task, adapter_folder=tmp_path / str(clean))
        p = [predict_texts(tmp_path / str(clean), [text])["probability"][0] for text in ("good", "good \U0001f600")]
        assert (p[0] == p[1]) == clean


def test_the_command_prints_one_line_per_text(
    trained: Callable[[str], Trained], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = trained("lora").folder
    file = tmp_path / "texts.txt"
    file.write_text("i think the end was\tweak\n\nthe cast was fine\n")
    assert run_command("predict", folder, *TEXTS, "--file", file) == 0
    table = predict_texts(folder, [*TEXTS, "i think the end was\tweak", "the cast was fine"])
    expected = [f"{r.label}\t{r.probability:.4f}\t{' '.join(r.text.split())}" for r in table.itertuples()]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected
    assert captured.err == ""


@pytest.mark.parametrize("form", ["csv", "parquet", "txt"])
def test_the_command_reads_files_and_writes_tables(
    form: str, trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained("full").folder
    file = tmp_path / f"in.{form}"
    if form == "txt":
        file.write_text("\n".join(TEXTS))
    elif form == "csv":
        write_texts(file, [Example(text, "all the same") for text in TEXTS])
    else:
        pd.DataFrame({"text": TEXTS}).to_parquet(file)
    for ending, read in {".csv": pd.read_csv, ".parquet": pd.read_parquet}.items():
        out = tmp_path / f"out{ending}"
        assert run_command("predict", folder, "--file", file, "--to", out) == 0
        pd.testing.assert_frame_equal(read(out), predict_texts(folder, TEXTS), check_exact=True)
        assert capsys.readouterr().out == f"2 predictions are in {out}\n"


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path, bert: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent", bert):
        with pytest.raises(InputError, match=r"no classifier.json; give the folder of a trained classifier"):
            load_classifier(folder)


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_damaged_weights_are_refused(variant: str, copied: Callable[[str], Path]) -> None:
    folder = copied(variant)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    cases = {
        "is not finite": tensors | {name: torch.full_like(tensors[name], torch.nan)},
        "classifier is damaged": {key: value for key, value in tensors.items() if key != name},
        "the classifier is damaged:": tensors | {name: torch.zeros(3, 32)},
    }
    for message, content in cases.items():
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="the classifier is damaged"):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("full", {"labels": ["a", "b", "c"]}, "3 labels, but weights for 2"),
        ("full", {"labels": None}, "damaged"),
        ("lora", {"model": "other"}, "was trained on another .*other; its files have changed since"),
        ("lora", {"model": "gone"}, "--model .*gone"),
    ],
)
def test_damaged_settings_and_another_base_model_are_refused(
    variant: str, changes: dict[str, Any], message: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    file = copied(variant) / "classifier.json"
    if "model" in changes:
        changes = {"model": str(tmp_path / changes["model"])}
        make_text_bert(tmp_path / "other", seed=1)
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(InputError, match=message):
        load_classifier(file.parent)
