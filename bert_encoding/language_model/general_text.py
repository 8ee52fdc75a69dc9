"""Text that is not stories: a probe of what fine-tuning makes BERT forget, and a control to train on instead.

The bundled text, ``data/general``, was written for this project: half of its files are the probe, the other half the
control; they share no text. A user's own file is read by ``datasets.corpus``.
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
MAX_ONCE_TOKENS = 1_000_000  # of a user's file that is read once
_BUNDLED = Path(__file__).parent / "data" / "general"


class ControlText(NamedTuple):
    """Text to train on."""

    windows: list[Window]
    n_tokens: int  # in all windows, overlaps counted once
    n_passes: float  # how often the windows hold each token of the text; above 1 if the text is too short


def probe_windows(tokenizer: BertTokenizerFast, window_tokens: int, file: Path | None = None) -> list[Window]:
    """Return non-overlapping windows of text for measuring the masked-LM loss before and after fine-tuning.

    Raises InputError if the file cannot be read, or holds no text in the tokenizer's vocabulary.

    Parameters
    ----------
    window_tokens : length of a window with its [CLS] and [SEP]
    file : a user's corpus, of which the first 100,000 tokens are used; None is the bundled probe
    """
    n_inner = window_tokens - 2
    documents = _documents(_read_texts("probe", file, None, MAX_PROBE_TOKENS, tokenizer), n_inner)
    return training_windows(documents, window_tokens, n_inner, tokenizer)


def control_text(
    tokenizer: BertTokenizerFast,
    window_tokens: int,
    stride: int,
    n_tokens: int | None,
    file: Path | None = None,
    seed: int = 0,
) -> ControlText:
    """Return windows of general text with a given number of tokens, cut like stories.

    The seed determines where reading starts in the file and, for each pass, the order of its documents. They are read
    as one stream, so that windows are as long as those of stories.

    Raises InputError if the file cannot be read, or holds no text in the tokenizer's vocabulary.

    Parameters
    ----------
    window_tokens, stride : as in ``cut_windows``
    n_tokens : the text is repeated if it is shorter; None is all of it once, at most a million tokens
    file : a user's corpus; None is the bundled control text
    """
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"n_tokens {n_tokens}: must be 1 or more")
    max_tokens = MAX_ONCE_TOKENS if n_tokens is None else n_tokens
    documents = _documents(_read_texts("control", file, seed, max_tokens, tokenizer), window_tokens - 2)
    n_available = _count_tokens(documents)
    n_tokens = min(n_available, max_tokens) if n_tokens is None else n_tokens
    passes: list[Tokens] = []
    for number in range(-(-n_tokens // n_available)):
        order = generator(seed, "control", number).permutation(len(documents))
        passes.extend(documents[i] for i in order)
    stream = _join(passes)
    word_ids = stream.word_ids[:n_tokens]
    text = Tokens(stream.ids[:n_tokens], word_ids, int(word_ids[-1]) + 1)
    return ControlText(training_windows([text], window_tokens, stride, tokenizer), n_tokens, n_tokens / n_available)


def describe_control(text: ControlText, file: Path | None = None) -> str:
    """Return a note on the text for the trial's record."""
    source = "the bundled control text" if file is None else str(file)
    note = f"trained on {text.n_tokens} tokens of {source}, not of stories"
    return note if text.n_passes <= 1 else f"{note}; the text is short and was repeated {text.n_passes:.1f} times"


def _read_texts(
    part: str, file: Path | None, seed: int | None, max_tokens: int, tokenizer: BertTokenizerFast
) -> list[Tokens]:
    """Return all bundled texts of a part, or texts of a file until they have at least ``max_tokens`` tokens."""
    if file is None:
        return [
            _tokenize(path.read_text(encoding="utf-8"), tokenizer) for path in sorted(_BUNDLED.glob(f"{part}_*.txt"))
        ]
    texts: list[Tokens] = []
    n_tokens = 0
    for text in _texts_of_file(file, seed):
        if n_tokens >= max_tokens:
            break
        texts.append(_tokenize(text, tokenizer))
        n_tokens += len(texts[-1].ids)
    if not n_tokens:
        raise InputError(f"{file}: none of its text is in this model's vocabulary; give another file")
    return texts


def _texts_of_file(file: Path, seed: int | None) -> Iterator[str]:
    """Yield every text of a corpus once: from the start or, with a seed, from a random text and around the end."""
    corpus = open_corpus(file)
    first = 0 if seed is None else int(generator(seed, "control start").integers(corpus.n_texts))
    for examples in (islice(corpus, first, None), islice(corpus, first)):
        for example in examples:
            yield example.text


def _tokenize(text: str, tokenizer: BertTokenizerFast) -> Tokens:
    """Cut running text into word pieces; punctuation marks are words of their own."""
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    word_ids = np.array(encoded.word_ids(), dtype=int)
    return Tokens(np.array(encoded["input_ids"], dtype=int), word_ids, int(word_ids.max(initial=-1)) + 1)


def _count_tokens(texts: Sequence[Tokens]) -> int:
    return sum(len(text.ids) for text in texts)


def _documents(texts: Sequence[Tokens], n_inner: int) -> list[Tokens]:
    """Join short texts with the following ones until they fill a window: a line of a file is often shorter."""
    documents: list[Tokens] = []
    waiting: list[Tokens] = []
    for text in texts:
        waiting.append(text)
        if _count_tokens(waiting) >= n_inner:
            documents.append(_join(waiting))
            waiting = []
    return [*documents, _join(waiting)] if waiting else documents


def _join(texts: Sequence[Tokens]) -> Tokens:
    """Concatenate texts."""
    starts = np.cumsum([0, *(text.n_words for text in texts)])
    word_ids = [text.word_ids + start for text, start in zip(texts, starts, strict=False)]
    return Tokens(np.concatenate([text.ids for text in texts]), np.concatenate(word_ids), int(starts[-1]))
