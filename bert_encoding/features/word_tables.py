"""Tables of word vectors: of every word of stories or texts, or of every occurrence of some words."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from transformers import BertModel

from bert_encoding.core.devices import pick_device
from bert_encoding.core.errors import InputError
from bert_encoding.datasets.story import Dataset
from bert_encoding.features.bert_embeddings import embed_stories
from bert_encoding.language_model.encoder import Encoder, check_layers
from bert_encoding.language_model.lora import load_adapter, load_whole
from bert_encoding.language_model.windows import tokenize

WINDOW_TOKENS, STRIDE = 512, 256  # the defaults of a trial's embedding windows
TEXTS_AT_ONCE = 64
_WORD_OR_MARK = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*\s+")

_T = TypeVar("_T")


def export_stories(
    source: Dataset | Iterable[str],
    encoder: Encoder,
    *,
    adapter: Path | None = None,
    layer: int | tuple[int, ...] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    stride: int = STRIDE,
) -> pd.DataFrame:
    """Return the vector of every word, as in a trial with these settings.

    Raises InputError if the layer or the windows do not fit the model, or the adapter does not.

    Parameters
    ----------
    source : a data set, or running texts, whose words and punctuation marks become rows
    adapter : folder of a trial's adapter, or of all its weights; None is the pretrained encoder
    layer, window_tokens, stride : as in ``embed_stories``; None is the last layer

    Returns
    -------
    One row per word: ``story`` (for texts their number from 1), ``word_index`` in it, ``word`` as transcribed,
    ``time_s`` (its middle; missing for texts), ``vector`` (n_hidden,) float32, zero where nothing was spoken. The table
    is held in memory, 4 bytes per word and hidden unit.
    """
    embed = _embedding(encoder, adapter, layer, window_tokens, stride)
    return pd.concat([_rows(part, embed(part.spoken)) for part in _in_parts(source)], ignore_index=True)


def export_words(
    texts: Iterable[str],
    words: Sequence[str],
    encoder: Encoder,
    *,
    adapter: Path | None = None,
    layer: int | tuple[int, ...] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    stride: int = STRIDE,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the vector of every occurrence of some words, and the mean of each word.

    BERT reads the whole text around a word. Matches are whole words in upper or lower case: ``bank`` matches in
    ``bank's`` and ``river-bank``, not in ``banks``. Where ``bank`` and ``bank holiday`` both match, the longer one
    counts.

    Raises InputError if no word occurs, a word is empty or given twice, or as in ``export_stories``.

    Parameters
    ----------
    adapter, layer, window_tokens, stride : as in ``export_stories``

    Returns
    -------
    occurrences : ``word``, ``text`` (number from 1), ``sentence``, ``position`` (``sentence.split()[position]`` holds
        the word), ``vector`` (n_hidden,) float32: the mean over the word's tokens
    means : ``word``, ``n``, ``vector`` of each word that occurs, in the order of ``words``
    """
    check_words(words)
    longest_first = sorted(words, key=len, reverse=True)  # "New York" before "New"
    pattern = _pattern(longest_first)
    embed = _embedding(encoder, adapter, layer, window_tokens, stride)
    matched = ((number, text, list(pattern.finditer(text))) for number, text in enumerate(texts, 1))
    rows: list[dict[str, Any]] = []
    for part in _batched((item for item in matched if item[2]), TEXTS_AT_ONCE):
        vectors = embed({str(number): _cut(text, matches) for number, text, matches in part})
        for number, text, matches in part:
            for match, vector in zip(matches, vectors[str(number)][1::2], strict=True):
                word = longest_first[int(match.lastindex or 0) - 1]
                rows.append({"word": word, "text": number, **_context(text, match.start()), "vector": vector})
    if not rows:
        raise InputError(f"--words {','.join(words)}: none of them occurs in the text")
    occurrences = pd.DataFrame(rows)
    return occurrences, _means(occurrences, words)


def check_words(words: Sequence[str]) -> None:
    """Raise an InputError if there is no word to search for, one is empty, or one is given twice."""
    if not words or not all(word.strip() for word in words):
        raise InputError(f"--words {','.join(words)}: a word is empty; give words with commas between, as in talk,walk")
    if len({word.lower() for word in words}) < len(words):
        raise InputError(f"--words {','.join(words)}: a word is given twice")


def _embedding(
    encoder: Encoder, adapter: Path | None, layer: int | tuple[int, ...] | None, window_tokens: int, stride: int
) -> Callable[[Mapping[str, Sequence[str]]], dict[str, np.ndarray]]:
    """Check the settings, load the model, and return a function from name -> words to name -> (n_words, n_hidden)."""
    layer = encoder.n_layers if layer is None else layer
    check_layers(layer, encoder.name, encoder.n_layers)
    if isinstance(layer, tuple) and len(set(layer)) < len(layer):
        raise InputError(f"--layer {','.join(map(str, layer))}: a layer is named twice")
    if not 3 <= window_tokens <= encoder.max_tokens:
        raise InputError(f"--window-tokens {window_tokens}: must be 3 to {encoder.max_tokens} for this model")
    if not 1 <= stride <= window_tokens - 2:
        raise InputError(f"--stride {stride}: must be 1 to {window_tokens - 2} for windows of {window_tokens} tokens")
    bert = _load_bert(encoder, adapter)

    def embed(words: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        return embed_stories(
            bert,
            {name: tokenize(parts, encoder.tokenizer) for name, parts in words.items()},
            encoder.tokenizer,
            layer=layer,
            window_tokens=window_tokens,
            stride=stride,
            precision="float32",
            device=pick_device(),
        )

    return embed


def _load_bert(encoder: Encoder, adapter: Path | None) -> BertModel:
    """Load the pretrained encoder, or what a trial saved: an adapter or all weights."""
    if adapter is None:
        return encoder.copy_model().bert
    is_whole = (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file()
    return load_whole(encoder, adapter) if is_whole else load_adapter(encoder, adapter)


class _Part(NamedTuple):
    """Some stories: words as transcribed, words that BERT reads, and times."""

    words: dict[str, Sequence[str]]
    spoken: dict[str, Sequence[str]]
    times_s: dict[str, np.ndarray]


def _in_parts(source: Dataset | Iterable[str]) -> Iterator[_Part]:
    if isinstance(source, Dataset):
        for name, story in source.stories.items():
            yield _Part({name: story.words}, {name: story.spoken}, {name: story.word_times_s})
        return
    for part in _batched(enumerate(source, 1), TEXTS_AT_ONCE):
        words: dict[str, Sequence[str]] = {str(number): _WORD_OR_MARK.findall(text) for number, text in part}
        yield _Part(words, words, {name: np.full(len(row), np.nan) for name, row in words.items()})


def _batched(items: Iterable[_T], n: int) -> Iterator[list[_T]]:
    """Yield lists of at most ``n`` items."""
    remaining = iter(items)
    while batch := list(islice(remaining, n)):
        yield batch


def _rows(part: _Part, vectors: Mapping[str, np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "story": [name for name, words in part.words.items() for _ in words],
            "word_index": [index for words in part.words.values() for index in range(len(words))],
            "word": [word for words in part.words.values() for word in words],
            "time_s": np.concatenate(list(part.times_s.values())),
            "vector": [row for name in part.words for row in vectors[name]],
        }
    )


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the words, each in its own group; the first that matches counts."""
    groups = [re.escape(word).replace("'", "['\u2019]").replace(r"\ ", r"\s+") for word in words]
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({group})' for group in groups)})(?!\w)", re.IGNORECASE)


def _cut(text: str, matches: Sequence[re.Match[str]]) -> list[str]:
    """Cut a text at its matches; every second piece, from the second on, is a match."""
    pieces, start = [], 0
    for match in matches:
        pieces += [text[start : match.start()], match.group()]
        start = match.end()
    return [*pieces, text[start:]]


def _context(text: str, position: int) -> dict[str, Any]:
    """Return the sentence around a position in a text, and the number of its word there."""
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    index = bisect_right(starts[:-1], position) - 1
    sentence, before = text[starts[index] : starts[index + 1]], text[starts[index] : position]
    inside_a_word = bool(before) and not before[-1].isspace()
    return {"sentence": " ".join(sentence.split()), "position": len(before.split()) - inside_a_word}


def _means(occurrences: pd.DataFrame, words: Sequence[str]) -> pd.DataFrame:
    rows = []
    for word in words:
        vectors = occurrences.loc[occurrences["word"] == word, "vector"].to_list()
        if vectors:
            mean = np.mean(vectors, axis=0, dtype=np.float64).astype(np.float32)
            rows.append({"word": word, "n": len(vectors), "vector": mean})
    return pd.DataFrame(rows)
