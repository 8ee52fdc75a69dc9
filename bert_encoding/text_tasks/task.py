"""The data of a text-only study: a corpus, split into training and held-out texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import BertTokenizerFast

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import CLASSIFICATION
from bert_encoding.core.seeds import generator
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.datasets.corpus import Corpus, Example
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.windows import Tokens
from bert_encoding.trial.config import TrialConfig

SHARE_HELDOUT = 0.2
MIN_LENGTH = 8  # tokens, as of a window
TOKENIZED_AT_ONCE = 256

Item = TypeVar("Item")


class TextTask(NamedTuple):
    """The data that all trials of a text-only study share; each process reads the texts itself, once."""

    kind: str  # ``classification``, or ``adapt`` (masked LM on the texts alone)
    corpus: Corpus
    train: np.ndarray  # (n_train,) indices into the corpus, ascending
    heldout: np.ndarray  # (n_heldout,) all other texts
    split_seed: int  # of the split, the examples shown and the masks on which losses are read
    max_length: int | None = None  # tokens read at once, with [CLS] and [SEP]; None is the trial's ``window_tokens``
    probe_text: Path | None = None  # for ``adapt``: files of general text, instead of the bundled ones
    control_text: Path | None = None


def make_text_task(
    kind: str, corpus: Corpus, seed: int, *, n_train: int | None = None, max_length: int | None = None
) -> TextTask:
    """Split a corpus for one kind of task; refuse one without the classes that the task needs."""
    if kind == CLASSIFICATION and not corpus.labels:
        raise InputError(
            f"{corpus.path}: has no labels to learn; add a column 'label', or give a folder with a sub-folder of "
            ".txt files for each"
        )
    if max_length is not None and max_length < MIN_LENGTH:
        raise InputError(f"--max-length {max_length}: must be {MIN_LENGTH} tokens or more")
    train, heldout = split_corpus(corpus, seed, n_train)
    return TextTask(kind, corpus, train, heldout, seed, max_length)


def split_corpus(corpus: Corpus, seed: int, n_train: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw indices of training texts and of held-out texts, both in the class proportions of the corpus.

    Without ``n_train``, ``SHARE_HELDOUT`` of all texts are held out. InputError if a part would be empty or lack a
    class.
    """
    if n_train is None:
        n_train = corpus.n_texts - max(1, round(SHARE_HELDOUT * corpus.n_texts))
    if not 1 <= n_train < corpus.n_texts:
        raise InputError(
            f"{corpus.path}: {n_train} of {corpus.n_texts} training texts leave nothing to train on or to evaluate; "
            "give --train-examples from 1 to one less than the number of texts"
        )
    labels = np.array([example.label or "" for example in corpus])
    counts = Counter(labels.tolist())
    _check_classes(corpus, counts, n_train)
    train = np.zeros(len(labels), dtype=bool)
    for label, n in _share_out(counts, n_train).items():
        indices = np.flatnonzero(labels == label)
        train[generator(seed, "text split", label).permutation(indices)[:n]] = True
    return np.flatnonzero(train), np.flatnonzero(~train)


def _check_classes(corpus: Corpus, counts: Counter[str], n_train: int) -> None:
    if len(counts) == 1 and corpus.labels:
        raise InputError(
            f"{corpus.path}: all {corpus.n_texts} texts used have the label {next(iter(counts))!r}; use more texts"
        )
    rare = [label for label in sorted(counts) if counts[label] < 2]
    if rare:
        raise InputError(
            f"{corpus.path}: class {rare[0]!r} has one text, but needs one for training and one for evaluation; "
            "add texts, or remove the class"
        )
    smaller = min(n_train, corpus.n_texts - n_train)
    if smaller < len(counts):
        raise InputError(
            f"{corpus.path}: {n_train} of {corpus.n_texts} training texts leave {smaller} in one part, "
            f"fewer than the {len(counts)} classes; change --train-examples or add texts"
        )


def _share_out(counts: Counter[str], n_train: int) -> dict[str, int]:
    """Divide ``n_train`` among classes in proportion to their size; each class has a text in both parts."""
    total = sum(counts.values())
    exact = {label: n_train * counts[label] / total for label in sorted(counts)}
    shares = {label: min(max(int(exact[label]), 1), counts[label] - 1) for label in exact}
    while (left := n_train - sum(shares.values())) != 0:
        step = 1 if left > 0 else -1
        free = [label for label in shares if 1 <= shares[label] + step < counts[label]]
        shares[max(free, key=lambda label: step * (exact[label] - shares[label]))] += step
    return shares


def class_names(corpus: Corpus) -> tuple[str, ...]:
    """Return the classes that occur, in alphabetical order; a class is an index into them."""
    return tuple(label for label in corpus.labels if corpus.counts[label])


class Texts(NamedTuple):
    """A corpus in memory."""

    examples: tuple[Example, ...]
    tokens: tuple[Tokens, ...]


def read_texts(corpus: Corpus, encoder: Encoder, cache: WorkerCache) -> Texts:
    """Read and tokenise all texts; the last corpus is cached."""

    def read() -> Texts:
        examples = tuple(corpus)
        return Texts(examples, tuple(tokenize_texts([e.text for e in examples], encoder.tokenizer)))

    return cache.get("texts", (corpus.fingerprint, encoder.name), read, max_values=1)


def tokenize_texts(texts: Sequence[str], tokenizer: BertTokenizerFast) -> Iterator[Tokens]:
    """Cut whole texts into BERT's word pieces, without [CLS] and [SEP]; punctuation marks are words of their own."""
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = list(texts[start : start + TOKENIZED_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, truncation=False, verbose=False)
        for index, ids in enumerate(encoded["input_ids"]):
            words = np.array(encoded.word_ids(index), dtype=np.int32)
            yield Tokens(np.array(ids, dtype=np.int32), words, int(words[-1]) + 1 if len(words) else 0)


def resolve_max_length(task: TextTask, config: TrialConfig, encoder: Encoder) -> int:
    """Return the number of tokens read per text; refuse more than the model reads."""
    name, length = ("--max-length", task.max_length) if task.max_length else ("window_tokens", config.window_tokens)
    if length > encoder.max_tokens:
        raise InputError(f"{name} {length}: {encoder.name} reads at most {encoder.max_tokens} tokens")
    return length


def pick(items: Sequence[Item], indices: np.ndarray) -> list[Item]:
    """Return the items at some indices."""
    return [items[index] for index in indices]


def split_notes(task: TextTask, examples: Sequence[Example]) -> Iterator[str]:
    """Describe the size of the parts and of their classes, and texts that are in both."""
    train, heldout = pick(examples, task.train), pick(examples, task.heldout)
    for name, part in (("train", train), ("held out", heldout)):
        counts = Counter(example.label for example in part if example.label is not None)
        classes = ", ".join(f"{label} {counts[label]} ({counts[label] / len(part):.1%})" for label in sorted(counts))
        yield f"{name}: {len(part)} texts" + (f", {classes}" if classes else "")
    seen = {example.text for example in train}
    n_seen = sum(example.text in seen for example in heldout)
    if n_seen:
        yield f"{n_seen} of {len(heldout)} held-out texts are identical to a training text"
