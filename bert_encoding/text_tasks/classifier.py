"""BERT as a classifier of texts: [CLS] -> pooler -> classes.

The pooler is the checkpoint's if it has one, else a new one, which always trains. ``frozen`` trains the head alone, on
the [CLS] vectors of the base model.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from scipy.special import log_softmax
from transformers import BertForSequenceClassification, BertModel, BertTokenizerFast
from transformers.models.bert.modeling_bert import BertPooler

from bert_encoding.core.devices import autocast
from bert_encoding.core.names import FULL, PARTIAL, RANDOM
from bert_encoding.core.seeds import derive_seed
from bert_encoding.language_model.encoder import Encoder, quiet
from bert_encoding.language_model.finetuning_methods import prepare_model
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.windows import Tokens, Window, pad
from bert_encoding.trial.config import TrialConfig

READ_BATCH = 32  # texts; the other texts of a batch may change a probability by a rounding error


def prepare_classifier(
    config: TrialConfig, encoder: Encoder, labels: Sequence[str]
) -> tuple[BertForSequenceClassification, PeftModel | None]:
    """Return a copy of the pristine encoder with a new head, ready for the method, and PEFT's wrapper around it if any.

    The encoder trains as for a masked LM (see ``prepare_model``, which refuses blocks that the model lacks); the
    classes always train, the pooler if it is new or the method trains whole weights.
    """
    prepared = prepare_model(replace(config.tuning, layer=None), encoder)
    model = assemble(masked_lm(prepared).bert, labels, config.seed)
    pretrained = {} if config.method == RANDOM else pooler_weights(encoder)
    if pretrained:
        model.bert.pooler.dense.load_state_dict(pretrained)
    model.bert.pooler.requires_grad_(not pretrained or config.method in (FULL, PARTIAL))
    if config.hidden_dropout is not None:
        model.dropout.p = config.hidden_dropout
    return model, prepared if isinstance(prepared, PeftModel) else None


def assemble(bert: BertModel, labels: Sequence[str], seed: int) -> BertForSequenceClassification:
    """Add a new pooler and new classes to an encoder, which is not copied."""
    config = copy.deepcopy(bert.config)
    config.id2label = dict(enumerate(labels))  # this also sets their number
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    with quiet(), torch.device("meta"):  # its own weights are never used
        model: BertForSequenceClassification = BertForSequenceClassification(config)
    n_hidden, spread = config.hidden_size, config.initializer_range
    bert.pooler = BertPooler(config)
    bert.pooler.dense = _new_linear(n_hidden, n_hidden, spread, derive_seed(seed, "pooler"))
    model.bert = bert
    model.classifier = _new_linear(n_hidden, len(labels), spread, derive_seed(seed, "classes"))
    return model


def pooler_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint's pooler; empty without one."""
    head, prefix = encoder.next_sentence or {}, "bert.pooler.dense."
    return {name.removeprefix(prefix): weights for name, weights in head.items() if name.startswith(prefix)}


def _new_linear(n_in: int, n_out: int, spread: float, seed: int) -> torch.nn.Linear:
    """Return a layer initialised as in BERT: normal weights, zero bias (Devlin et al. 2019, published code)."""
    linear = torch.nn.Linear(n_in, n_out)
    torch.nn.init.normal_(linear.weight, 0.0, spread, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(linear.bias)
    return linear


def text_window(tokens: Tokens, max_length: int, tokenizer: BertTokenizerFast) -> Window:
    """Return [CLS] text [SEP] of at most ``max_length`` tokens: the end of a longer text, where reviews state their
    verdict."""
    n = max_length - 2
    ids = np.concatenate([[tokenizer.cls_token_id], tokens.ids[-n:], [tokenizer.sep_token_id]])
    return Window(ids, tokens.word_ids[-n:])


class TextBatch(NamedTuple):
    """Texts with their classes."""

    windows: list[Window]  # each text from [CLS] to [SEP]
    labels: np.ndarray  # (n_texts,) classes
    vectors: torch.Tensor | None  # (n_texts, n_hidden) of [CLS], if BERT itself does not train


class Classification:
    """The objective of ``train``: cross-entropy, in nats per text; texts as in ``TextBatch``."""

    def __init__(
        self, windows: Sequence[Window], labels: np.ndarray, pad_id: int, vectors: torch.Tensor | None = None
    ) -> None:
        self.windows, self.labels, self.pad_id, self.vectors = windows, labels, pad_id, vectors

    @property
    def n_items(self) -> int:
        return len(self.windows)

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> TextBatch:
        """Return these texts sorted by length, so that micro-batches need little padding."""
        order = sorted(indices, key=lambda index: len(self.windows[index].ids))
        vectors = None if self.vectors is None else self.vectors[order]
        return TextBatch([self.windows[index] for index in order], self.labels[order], vectors)

    def split(self, batch: TextBatch, size: int) -> list[TextBatch]:
        parts = [slice(start, start + size) for start in range(0, len(batch.windows), size)]
        vectors = batch.vectors
        return [TextBatch(batch.windows[p], batch.labels[p], None if vectors is None else vectors[p]) for p in parts]

    def n_terms(self, batch: TextBatch) -> dict[str, int]:
        return {"class": len(batch.windows)}

    def losses(
        self, model: BertForSequenceClassification, batch: TextBatch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        with autocast(precision, device):
            if batch.vectors is None:
                vectors = _first_vectors(model, batch.windows, self.pad_id, device)
            else:
                vectors = batch.vectors.to(device)
            logits = _head(model, vectors)  # (n_texts, n_labels)
        labels = torch.from_numpy(batch.labels).to(device)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return {"class": (loss, len(batch.windows))}

    def n_tokens(self, batch: TextBatch) -> int:
        return sum(len(window.ids) for window in batch.windows)


def read_vectors(
    model: BertForSequenceClassification, windows: Sequence[Window], pad_id: int, precision: str, device: torch.device
) -> torch.Tensor:
    """Return the [CLS] vector of each text, (n_texts, n_hidden) float32 on the CPU, in eval mode.

    Texts of similar length share a batch; the same texts give the same bits in every process.
    """
    model.to(device).eval()
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].ids))
    vectors = torch.empty(len(windows), model.config.hidden_size)
    with torch.no_grad(), autocast(precision, device):
        for start in range(0, len(order), READ_BATCH):
            batch = order[start : start + READ_BATCH]
            vectors[batch] = _first_vectors(model, [windows[index] for index in batch], pad_id, device).float().cpu()
    return vectors


def read_logits(model: BertForSequenceClassification, vectors: torch.Tensor, device: torch.device) -> np.ndarray:
    """Return the logits of the classes for the vectors of ``read_vectors``, (n_texts, n_labels) float64."""
    model.to(device).eval()
    with torch.no_grad():
        logits: np.ndarray = _head(model, vectors.to(device)).double().cpu().numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError("the logits of the classes are not finite; lower lr")
    return logits


def _first_vectors(
    model: BertForSequenceClassification, windows: Sequence[Window], pad_id: int, device: torch.device
) -> torch.Tensor:
    ids, attention = (torch.from_numpy(array).to(device) for array in pad(windows, pad_id))
    hidden: torch.Tensor = model.bert(ids, attention_mask=attention).last_hidden_state  # (n_texts, longest, n_hidden)
    return hidden[:, 0]


def _head(model: BertForSequenceClassification, vectors: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.classifier(model.dropout(model.bert.pooler(vectors[:, None])))
    return logits


def score_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return ``accuracy``, ``macro_f1`` and ``loss`` (mean cross-entropy in nats).

    F1 of a class is 2 TP / (2 TP + FP + FN), 0 for a class that neither occurs nor is predicted; macro is the mean over
    classes.
    """
    predicted = logits.argmax(axis=1)
    classes = range(logits.shape[1])
    hits = [int(((predicted == c) & (labels == c)).sum()) for c in classes]
    sizes = [int((predicted == c).sum() + (labels == c).sum()) for c in classes]  # 2 TP + FP + FN
    f1 = [2 * hit / size if size else 0.0 for hit, size in zip(hits, sizes, strict=True)]
    loss = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()
    return {"accuracy": sum(hits) / len(labels), "macro_f1": float(np.mean(f1)), "loss": float(loss)}
