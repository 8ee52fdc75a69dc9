"""The vectors of chosen texts, outside a trial: of every word of stories, or of every occurrence of some words."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import load_adapter, load_whole
from bert_encoding.language_model.windows import tokenize

WINDOW_TOKENS, STRIDE = 512, 256  # a trial's embedding windows, unless it says otherwise
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
    """Return the vector of every word, the same as in a trial with these settings.

    Parameters
    ----------
    source : a data set, or running texts, whose words and punctuation marks become rows
    adapter : folder of a trial's adapter, or of all its weights; None is the pretrained encoder
    layer, window_tokens, stride : as in ``embed_stories``; None is the last layer

    Returns
    -------
    A row a word: ``story`` (of texts: their number from 1), ``word_index`` in it, ``word`` as transcribed, ``time_s``
    (its middle; missing for texts), ``vector`` (n_hidden,) float32, zero where nothing was spoken. All of it is held
    in memory, 4 bytes a word and hidden unit.

    Raises
    ------
    InputError
        if the layer or the windows do not fit the model, or the adapter does not.
    """
    reader = _Reader.make(encoder, adapter, layer, window_tokens, stride)
    return pd.concat([_rows(part, reader) for part in _in_parts(source)], ignore_index=True)


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

    BERT reads the whole text around a word. A word is found where no letter or digit touches it, in upper or lower
    case; ``bank`` is found in ``bank's`` and ``river-bank``, not in ``banks``. Where ``bank`` and
    ``bank holiday`` both fit, the longer one is taken.

    Parameters
    ----------
    adapter, layer, window_tokens, stride : as in ``export_stories``

    Returns
    -------
    occurrences : ``word``, ``text`` (number from 1), ``sentence``, ``position`` (``sentence.split()[position]`` holds
        the word), ``vector`` (n_hidden,) float32: the mean over the word's tokens
    means : ``word``, ``n``, ``vector``; words that were found, in the order given

    Raises
    ------
    InputError
        if no word is found, a word is empty or given twice, or as in ``export_stories``.
    """
    check_words(words)
    longest_first = sorted(words, key=len, reverse=True)  # "New York" before "New"
    pattern = _pattern(longest_first)
    reader = _Reader.make(encoder, adapter, layer, window_tokens, stride)
    found = ((number, text, list(pattern.finditer(text))) for number, text in enumerate(texts, 1))
    rows: list[dict[str, Any]] = []
    for part in _batched((place for place in found if place[2]), TEXTS_AT_ONCE):
        pieces = {str(number): _cut(text, matches) for number, text, matches in part}
        vectors = reader.vectors(pieces)
        for number, text, matches in part:
            for match, vector in zip(matches, vectors[str(number)][1::2], strict=True):
                word = longest_first[int(match.lastindex or 0) - 1]
                rows.append({"word": word, "text": number, **_context(text, match.start()), "vector": vector})
    if not rows:
        raise InputError(f"--words {','.join(words)}: none of them is in the text")
    occurrences = pd.DataFrame(rows)
    return occurrences, _means(occurrences, words)


def check_words(words: Sequence[str]) -> None:
    """Refuse words that cannot be looked for.

    Raises
    ------
    InputError
        if there is none, one is empty, or one is given twice.
    """
    if not words or not all(word.strip() for word in words):
        raise InputError(f"--words {','.join(words)}: a word is empty; give words with commas between, as in talk,walk")
    if len({word.lower() for word in words}) < len(words):
        raise InputError(f"--words {','.join(words)}: a word is given twice")


class _Reader(NamedTuple):
    """A model and how it reads."""

    encoder: Encoder
    bert: BertModel
    layer: int | tuple[int, ...]
    window_tokens: int
    stride: int

    @classmethod
    def make(
        cls,
        encoder: Encoder,
        adapter: Path | None,
        layer: int | tuple[int, ...] | None,
        window_tokens: int,
        stride: int,
    ) -> "_Reader":
        chosen = encoder.n_layers if layer is None else layer
        _check_fits(encoder, (chosen,) if isinstance(chosen, int) else chosen, window_tokens, stride)
        return cls(encoder, _load_bert(encoder, adapter), chosen, window_tokens, stride)

    def vectors(self, pieces: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """Return name -> (n_pieces, n_hidden)."""
        return embed_stories(
            self.bert,
            {name: tokenize(parts, self.encoder.tokenizer) for name, parts in pieces.items()},
            self.encoder.tokenizer,
            layer=self.layer,
            window_tokens=self.window_tokens,
            stride=self.stride,
            precision="float32",
            device=pick_device(),
        )


def _load_bert(encoder: Encoder, adapter: Path | None) -> BertModel:
    """Return what reads: the pretrained encoder, or what a trial saved, which is an adapter or all weights."""
    if adapter is None:
        return encoder.copy_model().bert
    is_whole = (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file()
    return load_whole(encoder, adapter) if is_whole else load_adapter(encoder, adapter)


def _check_fits(encoder: Encoder, layers: tuple[int, ...], window_tokens: int, stride: int) -> None:
    for layer in layers:
        if not 0 <= layer <= encoder.n_layers:
            raise InputError(f"--layer {layer}: {encoder.name} has layers 0 (embeddings) to {encoder.n_layers}")
    if len(set(layers)) < len(layers):
        raise InputError(f"--layer {','.join(map(str, layers))}: a layer is named twice")
    if not 3 <= window_tokens <= encoder.max_tokens:
        raise InputError(f"--window-tokens {window_tokens}: must be 3 to {encoder.max_tokens}, what the model reads")
    if not 1 <= stride <= window_tokens - 2:
        raise InputError(f"--stride {stride}: must be 1 to {window_tokens - 2} for windows of {window_tokens} tokens")


class _Part(NamedTuple):
    """Some stories: their rows, and what BERT reads in each."""

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


def _rows(part: _Part, reader: _Reader) -> pd.DataFrame:
    vectors = reader.vectors(part.spoken)
    return pd.DataFrame(
        {
            "story": [name for name, words in part.words.items() for _ in words],
            "word_index": [at for words in part.words.values() for at in range(len(words))],
            "word": [word for words in part.words.values() for word in words],
            "time_s": np.concatenate(list(part.times_s.values())),
            "vector": [row for name in part.words for row in vectors[name]],
        }
    )


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return what finds any of the words; the number of its group tells which. The first that fits is taken."""
    groups = [re.escape(word).replace("'", "['\u2019]").replace(r"\ ", r"\s+") for word in words]
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({group})' for group in groups)})(?!\w)", re.IGNORECASE)


def _cut(text: str, matches: Sequence[re.Match[str]]) -> list[str]:
    """Return the text in pieces; every second one, from the second on, is a word that was looked for."""
    pieces, at = [], 0
    for match in matches:
        pieces += [text[at : match.start()], match.group()]
        at = match.end()
    return [*pieces, text[at:]]


def _context(text: str, at: int) -> dict[str, Any]:
    """Return the sentence around a place in a text, and which of its words stands there."""
    starts = [0, *(end.end() for end in _SENTENCE_END.finditer(text))]
    which = bisect_right(starts, at) - 1
    end = starts[which + 1] if which + 1 < len(starts) else len(text)
    before = text[starts[which] : at]
    inside_a_word = bool(before) and not before[-1].isspace()
    return {"sentence": " ".join(text[starts[which] : end].split()), "position": len(before.split()) - inside_a_word}


def _means(occurrences: pd.DataFrame, words: Sequence[str]) -> pd.DataFrame:
    rows = []
    for word in words:
        vectors = occurrences.loc[occurrences["word"] == word, "vector"].to_list()
        if vectors:
            mean = np.mean(vectors, axis=0, dtype=np.float64).astype(np.float32)
            rows.append({"word": word, "n": len(vectors), "vector": mean})
    return pd.DataFrame(rows)
