"""Text that is no story: a probe of what fine-tuning makes BERT forget, and a control to train on instead of stories.

The bundled text, ``data/general``, was written for this project: half of its files are the probe, the other half the
control, and neither shares a text with the other. A user's own file is read as ``datasets.corpus`` reads it.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import BertTokenizerFast

from bert_encoding.core.errors import InputError
from bert_encoding.core.seeds import generator
from bert_encoding.datasets.corpus import open_corpus
from bert_encoding.language_model.windows import Tokens, Window, training_windows

MAX_PROBE_TOKENS = 100_000  # of a user's file; a probe needs a few thousand masked tokens, about a seventh of all
MAX_ONCE_TOKENS = 1_000_000  # of a user's file that is to be read once
_BUNDLED = Path(__file__).parent / "data" / "general"


class ControlText(NamedTuple):
    """Text to train on.

    Attributes
    ----------
    windows : of ``n_tokens`` tokens in all, overlaps counted once
    n_passes : how often each token of the text is among them; above 1 if the text is too short
    """

    windows: list[Window]
    n_tokens: int
    n_passes: float


def probe_windows(tokenizer: BertTokenizerFast, window_tokens: int, file: Path | None = None) -> list[Window]:
    """Return windows without overlap of text on which the masked-LM loss is read before and after fine-tuning.

    Parameters
    ----------
    window_tokens : length of a window with its [CLS] and [SEP]
    file : a user's corpus, of which the first 100,000 tokens are used; None is the bundled probe

    Raises
    ------
    InputError
        if the file cannot be read, or holds nothing that the tokenizer knows.
    """
    n_inner = window_tokens - 2
    documents = _documents(_some_texts("probe", file, None, MAX_PROBE_TOKENS, tokenizer), n_inner)
    return training_windows(documents, window_tokens, n_inner, tokenizer)


def control_windows(
    tokenizer: BertTokenizerFast,
    window_tokens: int,
    stride: int,
    n_tokens: int | None,
    file: Path | None = None,
    seed: int = 0,
) -> list[Window]:
    """Return the windows of ``control_text``."""
    return control_text(tokenizer, window_tokens, stride, n_tokens, file, seed).windows


def control_text(
    tokenizer: BertTokenizerFast,
    window_tokens: int,
    stride: int,
    n_tokens: int | None,
    file: Path | None = None,
    seed: int = 0,
) -> ControlText:
    """Return as many tokens of general text as stories have, cut as stories are.

    The seed settles where in the file to begin and, pass by pass, the order of its documents. They are read one after
    the other as one stream, so that windows are as long as those of stories.

    Parameters
    ----------
    window_tokens, stride : as in ``cut_windows``
    n_tokens : so many, the text repeated if it is shorter; None is all of it once, at most a million tokens
    file : a user's corpus; None is the bundled control text

    Raises
    ------
    InputError
        if the file cannot be read, or holds nothing that the tokenizer knows.
    """
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"n_tokens {n_tokens}: must be 1 or more")
    most = MAX_ONCE_TOKENS if n_tokens is None else n_tokens
    texts = _some_texts("control", file, seed, most, tokenizer)
    documents = _documents(texts, window_tokens - 2)
    n_available = sum(len(document.ids) for document in documents)
    n_tokens = min(n_available, most) if n_tokens is None else n_tokens
    stream = _first(_join(_passes(documents, n_tokens, seed)), n_tokens)
    windows = training_windows([stream], window_tokens, stride, tokenizer)
    return ControlText(windows, n_tokens, n_tokens / n_available)


def describe_control(text: ControlText, file: Path | None = None) -> str:
    """Return a line that says what was trained on, for a trial's notes."""
    source = "the bundled control text" if file is None else str(file)
    line = f"trained on {text.n_tokens} tokens of {source}, not of stories"
    return line if text.n_passes <= 1 else f"{line}: each one is there {text.n_passes:.1f} times, the text being short"


def _some_texts(
    part: str, file: Path | None, seed: int | None, most: int, tokenizer: BertTokenizerFast
) -> list[Tokens]:
    """Return texts that together have ``most`` tokens or more, or all texts if they have fewer or are the bundled."""
    chosen: list[Tokens] = []
    n_tokens = 0
    for text in _bundled(part) if file is None else _from_file(file, seed):
        if file is not None and n_tokens >= most:
            break
        chosen.append(_tokenize(text, tokenizer))
        n_tokens += len(chosen[-1].ids)
    if n_tokens == 0:
        raise InputError(f"{file}: no text in it that this model's vocabulary knows; give another file")
    return chosen


def _bundled(part: str) -> Iterator[str]:
    for path in sorted(_BUNDLED.glob(f"{part}_*.txt")):
        yield path.read_text(encoding="utf-8")


def _from_file(file: Path, seed: int | None) -> Iterator[str]:
    """Yield every text of a corpus once, in its order: from the start, or with a seed from some place and round."""
    corpus = open_corpus(file)
    first = 0 if seed is None else int(generator(seed, "control start").integers(corpus.n_texts))
    for example in islice(corpus, first, None):
        yield example.text
    for example in islice(corpus, first):
        yield example.text


def _tokenize(text: str, tokenizer: BertTokenizerFast) -> Tokens:
    """Cut running text into word pieces; punctuation marks are words of their own."""
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    word_ids = np.array(encoded.word_ids(), dtype=int)
    return Tokens(np.array(encoded["input_ids"], dtype=int), word_ids, int(word_ids.max(initial=-1)) + 1)


def _documents(texts: Sequence[Tokens], n_inner: int) -> list[Tokens]:
    """Join short texts with those that follow, until a window is full: a line of a file is often less than that."""
    documents: list[Tokens] = []
    waiting: list[Tokens] = []
    for text in texts:
        waiting.append(text)
        if sum(len(tokens.ids) for tokens in waiting) >= n_inner:
            documents.append(_join(waiting))
            waiting = []
    return [*documents, *([_join(waiting)] if waiting else [])]


def _passes(documents: Sequence[Tokens], n_tokens: int, seed: int) -> list[Tokens]:
    """Return documents that together have ``n_tokens`` tokens or more, each pass in an order of its own."""
    chosen: list[Tokens] = []
    n_left, n_passes = n_tokens, 0
    while n_left > 0:
        order = generator(seed, "control", n_passes).permutation(len(documents))
        chosen.extend(documents[at] for at in order)
        n_left -= sum(len(document.ids) for document in documents)
        n_passes += 1
    return chosen


def _join(texts: Sequence[Tokens]) -> Tokens:
    """Read texts one after the other."""
    starts = np.cumsum([0, *(text.n_words for text in texts)])
    word_ids = [text.word_ids + start for text, start in zip(texts, starts, strict=False)]
    return Tokens(np.concatenate([text.ids for text in texts]), np.concatenate(word_ids), int(starts[-1]))


def _first(text: Tokens, n_tokens: int) -> Tokens:
    """Return the first tokens of a text."""
    word_ids = text.word_ids[:n_tokens]
    return Tokens(text.ids[:n_tokens], word_ids, int(word_ids[-1]) + 1)
