"""A trained classifier on disk: saved by its trial, loaded to predict with the same bits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from transformers import BertForSequenceClassification, BertTokenizerFast

from bert_encoding.core.devices import pick_device
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.files import read_json, write_json
from bert_encoding.datasets.corpus import clean_text
from bert_encoding.language_model.encoder import Encoder, checkpoint_fingerprint, load_encoder, quiet
from bert_encoding.language_model.lora import save_adapter, share_like
from bert_encoding.text_tasks.classifier import assemble, read_logits, read_vectors, text_window
from bert_encoding.text_tasks.task import tokenize_texts

SETTINGS_FILE = "classifier.json"
_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEAD = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")


class ReadingSettings(NamedTuple):
    """How a classifier reads texts."""

    labels: tuple[str, ...]  # in the order of the outputs
    max_length: int  # tokens read, from the end of a text
    precision: str  # of matrix products
    clean: bool  # whether texts are cleaned, as the training texts were


class Classifier(NamedTuple):
    """A trained classifier."""

    model: BertForSequenceClassification
    tokenizer: BertTokenizerFast
    reading: ReadingSettings


def save_classifier(
    folder: Path,
    model: BertForSequenceClassification,
    adapted: PeftModel | None,
    reading: ReadingSettings,
    encoder: Encoder,
) -> None:
    """Write a classifier for ``load_classifier``.

    An adapter is written in PEFT format, together with pooler and classes; without an adapter, all weights and the
    tokenizer, for ``BertForSequenceClassification.from_pretrained``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = reading._asdict() | {"model": encoder.name}
    if adapted is None:
        with quiet():
            model.save_pretrained(str(folder))
            encoder.tokenizer.save_pretrained(str(folder))
    else:
        save_adapter(adapted, folder, encoder.name)
        _add_head(folder, model)
        settings["checkpoint"] = checkpoint_fingerprint(encoder.name)
    write_json(folder / SETTINGS_FILE, settings)


def _add_head(folder: Path, model: BertForSequenceClassification) -> None:
    """Add the head to the adapter's files, under the names that PEFT gives to modules saved whole."""
    state = model.state_dict()
    head = {f"base_model.model.{name}": state[name].detach().cpu().contiguous() for name in _HEAD}
    save_file(load_file(folder / _WEIGHTS) | head, folder / _WEIGHTS, metadata={"format": "pt"})
    share_like(folder / _ADAPTER, folder / _WEIGHTS)
    config = json.loads((folder / _ADAPTER).read_text())
    config |= {"modules_to_save": ["classifier", "pooler"], "task_type": "SEQ_CLS"}
    write_json(folder / _ADAPTER, config)


def load_classifier(folder: Path) -> Classifier:
    """Load what ``save_classifier`` wrote; InputError if it is missing or damaged, or its base model has changed."""
    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{folder}: no {SETTINGS_FILE}; give the folder of a trained classifier")
    settings = read_json(folder / SETTINGS_FILE, required=(*ReadingSettings._fields, "model"))
    load = _load_adapted if (folder / _ADAPTER).is_file() else _load_whole
    try:
        reading = ReadingSettings(*(settings[name] for name in ReadingSettings._fields))
        reading = reading._replace(labels=tuple(reading.labels))
        with quiet():
            model, tokenizer = load(folder, settings)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: the classifier is damaged: {first_line(error)}") from None
    if broken := [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{folder}: the classifier is damaged: {broken[0]} is not finite")
    if model.config.num_labels != len(reading.labels):
        raise InputError(f"{folder}: {len(reading.labels)} labels, but weights for {model.config.num_labels}")
    return Classifier(model.float().eval(), tokenizer, reading)


def _load_adapted(folder: Path, settings: dict[str, Any]) -> tuple[Any, BertTokenizerFast]:
    encoder = load_encoder(settings["model"])
    if checkpoint_fingerprint(encoder.name) != settings.get("checkpoint"):
        raise InputError(f"{folder}: was trained on another {encoder.name}; its files have changed since")
    base = assemble(encoder.copy_model().bert, settings["labels"], seed=0)
    tuned = PeftModel.from_pretrained(base, str(folder))
    saved = set(load_file(folder / _WEIGHTS))
    if unmatched := sorted(saved ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False))):
        raise ValueError(f"{unmatched[0]} is in only one of file and model")
    return tuned.get_base_model(), encoder.tokenizer


def _load_whole(folder: Path, settings: dict[str, Any]) -> tuple[Any, BertTokenizerFast]:
    model, info = BertForSequenceClassification.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if unmatched := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ValueError(f"{unmatched[0]} is in only one of file and model")
    return model, BertTokenizerFast.from_pretrained(folder)


def class_probabilities(classifier: Classifier, texts: Sequence[str]) -> np.ndarray:
    """Return the probability of each class, (n_texts, n_labels); rows sum to 1.

    The same texts in the same order give the bits of the trial that saved the classifier, on the same processor.
    """
    model, tokenizer, reading = classifier
    if not texts:
        return np.empty((0, len(reading.labels)))
    device = pick_device()
    texts = [clean_text(text) for text in texts] if reading.clean else texts
    windows = [text_window(tokens, reading.max_length, tokenizer) for tokens in tokenize_texts(texts, tokenizer)]
    vectors = read_vectors(model, windows, tokenizer.pad_token_id, reading.precision, device)
    return np.exp(log_softmax(read_logits(model, vectors, device), axis=1))
