"""Word vectors without BERT: word rate and bag of words; for those from a file see ``static_vectors.py``.

Like BERT's word vectors, they have one row per row of the transcript, (n_words, n_hidden) float32.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from bert_encoding.core.errors import InputError


def word_rate(spoken: Sequence[str]) -> np.ndarray:
    """Return 1 for every spoken word and 0 for empty rows and tags, (n_words, 1) float32.

    Downsampled, it is the number of words per TR.
    """
    return np.array([[float(word != "")] for word in spoken], dtype=np.float32).reshape(-1, 1)


def normalise(word: str) -> str:
    """Return a word in lower case without surrounding punctuation; apostrophes inside stay, as ``'``.

    ``"Don’t,"`` becomes ``don't`` and ``'cause`` becomes ``cause``; ``""`` if nothing is left. A contraction stays one
    word, as in word2vec files; GloVe's own tokeniser splits it (``do n't``), so there it is unknown.
    """
    return re.sub(r"^[\W_]+|[\W_]+$", "", word.lower().replace("\u2019", "'"))


def distinct_words(stories: Iterable[Sequence[str]]) -> set[str]:
    """Return every normalised word of some stories, for ``read_static_vectors``."""
    return {normalise(word) for spoken in stories for word in spoken} - {""}


def choose_vocabulary(stories: Iterable[Sequence[str]], n: int) -> tuple[str, ...]:
    """Return the ``n`` most frequent normalised words, the most frequent first, ties in alphabetical order.

    Raises InputError if ``n`` is below 1, or nothing is spoken.

    Parameters
    ----------
    stories : spoken words of the fit stories alone, so that no other story shapes a feature
    n : maximal number of words
    """
    if n < 1:
        raise InputError(f"a vocabulary of {n} words: it needs at least 1")
    counts = Counter(normalise(word) for spoken in stories for word in spoken)
    del counts[""]
    if not counts:
        raise InputError("no vocabulary: the fit stories have no spoken word")
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:n])


def bag_of_words(spoken: Sequence[str], vocabulary: tuple[str, ...]) -> np.ndarray:
    """Return a one-hot row for every word, (n_words, len(vocabulary)) float32.

    Empty words and words outside the vocabulary are zero.
    """
    columns = {word: column for column, word in enumerate(vocabulary)}
    vectors = np.zeros((len(spoken), len(vocabulary)), dtype=np.float32)
    for row, word in enumerate(map(normalise, spoken)):
        if word in columns:
            vectors[row, columns[word]] = 1
    return vectors
