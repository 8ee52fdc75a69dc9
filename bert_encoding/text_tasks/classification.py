"""A classifier trained on labelled texts and evaluated on held-out texts."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_encoding.core.devices import pick_device, resolve_precision
from bert_encoding.core.names import RANDOM, TUNED
from bert_encoding.core.seeds import generator
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.language_model.lora import check_applied
from bert_encoding.language_model.training import Progress, train
from bert_encoding.text_tasks.classifier import (
    Classification,
    pooler_weights,
    prepare_classifier,
    read_logits,
    read_vectors,
    score_classes,
    text_window,
)
from bert_encoding.text_tasks.saved_classifier import ReadingSettings, save_classifier
from bert_encoding.text_tasks.task import TextTask, class_names, pick, read_texts, resolve_max_length
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import cached_encoder, timed

N_EXAMPLES = 10
EXAMPLE_CHARACTERS = 120
TRAIN_SAMPLE = 200  # training texts, at most, whose loss is read after every epoch


class ClassifyRun:
    """A classifier trained on labelled texts."""

    def __init__(self, config: TrialConfig, task: TextTask, cache: WorkerCache) -> None:
        self.config, self.task, self.device = config, task, pick_device()
        self.encoder = cached_encoder(config.model, cache)
        self.max_length = resolve_max_length(task, config, self.encoder)
        self.precision = resolve_precision(config.precision, self.device)
        self.labels = class_names(task.corpus)
        self.model, self.adapted = prepare_classifier(config, self.encoder, self.labels)
        self.texts = read_texts(task.corpus, self.encoder, cache)
        tokenizer = self.encoder.tokenizer
        self.windows = [text_window(tokens, self.max_length, tokenizer) for tokens in self.texts.tokens]
        index = {label: number for number, label in enumerate(self.labels)}
        self.classes = np.array([index[example.label or ""] for example in self.texts.examples])  # (n_texts,)
        self.seconds = {"train": 0.0}
        self.notes = list(self._notes())
        self._vectors_of: dict[bytes, torch.Tensor] = {}

    def _notes(self) -> Iterator[str]:
        name, (most, n) = self.encoder.name, Counter(self.classes[self.task.heldout].tolist()).most_common(1)[0]
        yield f"always predicting {self.labels[most]!r} has a held-out accuracy of {n / len(self.task.heldout):.3f}"
        n_cut = sum(len(tokens.ids) > self.max_length - 2 for tokens in self.texts.tokens)
        if n_cut:
            n_texts = len(self.windows)
            yield f"{n_cut} of {n_texts} texts are longer than {self.max_length} tokens; only their end is read"
        is_pretrained = pooler_weights(self.encoder) and self.config.method != RANDOM
        yield f"the pooler {f'of {name} is used' if is_pretrained else 'is randomly initialised and trained'}"

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train and yield scores; with patience, until this many epochs were no better than an earlier one."""
        self.before = self._logits(self.task.heldout)
        sample = generator(self.task.split_seed, "training loss").permutation(self.task.train)[:TRAIN_SAMPLE]
        texts, pad_id = self.task.train, self.encoder.tokenizer.pad_token_id
        vectors = None if self.config.method in TUNED else self._vectors(texts)
        objective = Classification(pick(self.windows, texts), self.classes[texts], pad_id, vectors)
        ranks: list[tuple[float, ...]] = []
        steps = train(self.model, objective, self.config.training, self.config.seed, self.device)
        for progress in timed(steps, self.seconds):
            scores = self._read(progress, sample)
            ranks.append(self.rank(scores))
            yield scores
            if self.config.patience and len(ranks) - 1 - ranks.index(max(ranks)) >= self.config.patience:
                return

    def _read(self, progress: Progress, sample: np.ndarray) -> dict[str, float]:
        """Return the scores on held-out texts, and the loss on a sample of the training texts."""
        heldout = score_classes(self._logits(self.task.heldout), self.classes[self.task.heldout])
        train_loss = score_classes(self._logits(sample), self.classes[sample])["loss"]
        counts = {name: float(value) for name, value in progress._asdict().items()}
        return counts | {"loss_train": train_loss, "loss_heldout": heldout.pop("loss")} | heldout

    def rank(self, epoch: dict[str, float]) -> tuple[float, ...]:
        """Return accuracy, then loss for ties: confident mistakes may raise the loss while accuracy rises."""
        return epoch["accuracy"], -epoch["loss_heldout"]

    def finish(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the scores of the untrained head, and ten held-out texts with their predictions."""
        if self.config.method in TUNED:
            check_applied(self.encoder, self.model.bert, "fine-tuning")
        true = self.classes[self.task.heldout]
        scores = {f"{name}_before": value for name, value in score_classes(self.before, true).items()}
        before, after = self.before.argmax(axis=1), self._logits(self.task.heldout).argmax(axis=1)
        shown = np.sort(generator(self.task.split_seed, "examples").permutation(len(true))[:N_EXAMPLES])
        texts = pick(self.texts.examples, self.task.heldout[shown])
        return scores, [
            {
                "text": shorten(example.text),
                "label": example.label,
                "predicted_before": self.labels[before[index]],
                "predicted_after": self.labels[after[index]],
            }
            for example, index in zip(texts, shown, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write the classifier for ``load_classifier``."""
        reading = ReadingSettings(self.labels, self.max_length, self.precision, self.task.corpus.clean)
        save_classifier(folder, self.model, self.adapted, reading, self.encoder)

    def _logits(self, indices: np.ndarray) -> np.ndarray:
        return read_logits(self.model, self._vectors(indices), self.device)

    def _vectors(self, indices: np.ndarray) -> torch.Tensor:
        """Return [CLS] vectors, (n_texts, n_hidden); cached if BERT does not train."""
        key = indices.tobytes()
        if key in self._vectors_of:
            return self._vectors_of[key]
        pad_id = self.encoder.tokenizer.pad_token_id
        vectors = read_vectors(self.model, pick(self.windows, indices), pad_id, self.precision, self.device)
        if self.config.method not in TUNED:
            self._vectors_of[key] = vectors
        return vectors


def shorten(text: str) -> str:
    """Return the end of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else "..." + line[3 - EXAMPLE_CHARACTERS :]
