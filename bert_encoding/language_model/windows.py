"""Cut words into overlapping windows of tokens; each token knows its word."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import BertTokenizerFast

MIN_TRAINING_TOKENS = 32  # shorter windows teach the masked LM little, but cost a step


class Tokens(NamedTuple):
    """A story as BERT's tokens, without [CLS] and [SEP]."""

    ids: np.ndarray  # (n_tokens,) vocabulary indices
    word_ids: np.ndarray  # (n_tokens,) index of the word that each token belongs to, not decreasing
    n_words: int  # of the story, including words without tokens


class Window(NamedTuple):
    """A sequence that BERT reads at once."""

    ids: np.ndarray  # (n_tokens + 2,) vocabulary indices, from [CLS] to [SEP]
    word_ids: np.ndarray  # (n_tokens,) word of each token between the two


def tokenize(spoken: Sequence[str], tokenizer: BertTokenizerFast) -> Tokens:
    """Cut words into word pieces; an empty word (``""``) has no token, but counts in ``n_words``."""
    encoded = tokenizer(
        [list(spoken)], is_split_into_words=True, add_special_tokens=False, truncation=False, verbose=False
    )
    return Tokens(np.array(encoded["input_ids"][0]), np.array(encoded.word_ids(0), dtype=int), len(spoken))


def cut_windows(tokens: Tokens, window_tokens: int, stride: int, tokenizer: BertTokenizerFast) -> list[Window]:
    """Cut a story into windows that start ``stride`` tokens apart; together they cover every token.

    Raises ValueError if the stride would leave tokens out or not advance.

    Parameters
    ----------
    window_tokens : length of a window with its [CLS] and [SEP]
    stride : tokens from one start to the next, at most ``window_tokens - 2``
    """
    n_inner = window_tokens - 2
    if not 1 <= stride <= n_inner:
        raise ValueError(f"stride {stride}: must be 1 to {n_inner} for windows of {window_tokens} tokens")
    last_start = max(0, len(tokens.ids) - n_inner)
    starts = range(0, last_start + stride, stride)
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    return [
        Window(np.concatenate([first, tokens.ids[s : s + n_inner], last]), tokens.word_ids[s : s + n_inner])
        for s in starts
    ]


def training_windows(
    stories: Sequence[Tokens], window_tokens: int, stride: int, tokenizer: BertTokenizerFast
) -> list[Window]:
    """Cut each story into windows; windows under 32 tokens are dropped unless all are that short."""
    windows = [w for tokens in stories for w in cut_windows(tokens, window_tokens, stride, tokenizer)]
    long_enough = [window for window in windows if len(window.ids) >= MIN_TRAINING_TOKENS]
    return long_enough or windows


def pad(windows: Sequence[Window], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and attention mask, both (n_windows, longest); the mask is 1 on real tokens."""
    longest = max(len(window.ids) for window in windows)
    ids = np.full((len(windows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(windows), longest), dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    return ids, mask
