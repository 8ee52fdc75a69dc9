"""Windows against a plain loop: every token is covered, and each knows its word."""

import numpy as np
import pytest
from transformers import BertTokenizerFast

from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.windows import Tokens, Window, cut_windows, pad, tokenize, training_windows

FIRST_ID = 1000  # of made-up tokens; no special token of the tiny vocabulary is that high
SHAPES = [(n, w) for n in (0, 1, 2, 5, 6, 7, 29, 30, 31, 60, 61, 100, 257) for w in (8, 32, 33, 64, 512)]
WORDS = ["The", "house", "xylophone", "", "didn't", "", "", "a", "Mother", "hippopotamus", "o'clock", ""]


@pytest.fixture
def tokenizer(tiny_encoder: Encoder) -> BertTokenizerFast:
    return tiny_encoder.tokenizer


def numbered(n_tokens: int, first_id: int = FIRST_ID) -> Tokens:
    """Different tokens, three in each word, before one word without any."""
    return Tokens(np.arange(n_tokens) + first_id, np.arange(n_tokens) // 3, n_tokens // 3 + 2)


def plain_spans(n_tokens: int, n_inner: int, stride: int) -> list[list[int]]:
    """Slide along, one stride at a time, until the end of the story has been seen."""
    spans, start = [], 0
    while True:
        spans.append([index for index in range(start, start + n_inner) if index < n_tokens])
        if start + n_inner >= n_tokens:
            return spans
        start += stride


@pytest.mark.parametrize(("n_tokens", "window_tokens"), SHAPES)
def test_windows_equal_a_plain_loop_and_cover_every_token(
    n_tokens: int, window_tokens: int, tokenizer: BertTokenizerFast
) -> None:
    n_inner = window_tokens - 2
    tokens = numbered(n_tokens)
    for stride in sorted({1, 3, n_inner // 2, n_inner - 1, n_inner}):
        windows = cut_windows(tokens, window_tokens, stride, tokenizer)
        spans = plain_spans(n_tokens, n_inner, stride)
        assert len(windows) == len(spans)
        for window, span in zip(windows, spans, strict=True):
            inner = [FIRST_ID + index for index in span]
            assert window.ids.tolist() == [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
            assert window.word_ids.tolist() == [index // 3 for index in span]
            assert len(window.ids) <= window_tokens
        covered = {int(i) for window in windows for i in window.ids[1:-1]}
        assert covered == set(range(FIRST_ID, FIRST_ID + n_tokens))


@pytest.mark.parametrize("stride", [-1, 0, 31, 32, 1000])
def test_stride_that_leaves_tokens_out_is_refused(stride: int, tokenizer: BertTokenizerFast) -> None:
    with pytest.raises(ValueError, match=f"stride {stride}: must be 1 to 30"):
        cut_windows(numbered(100), 32, stride, tokenizer)


def test_tokens_equal_those_of_each_word_alone(tokenizer: BertTokenizerFast) -> None:
    tokens = tokenize(WORDS, tokenizer)
    assert tokens.n_words == len(WORDS)
    one_by_one = [
        (i, index) for index, word in enumerate(WORDS) for i in tokenizer.encode(word, add_special_tokens=False)
    ]
    assert list(zip(tokens.ids.tolist(), tokens.word_ids.tolist(), strict=True)) == one_by_one


def test_long_story_is_not_truncated(tokenizer: BertTokenizerFast) -> None:
    n_words = 3 * tokenizer.model_max_length if tokenizer.model_max_length < 10_000 else 2000
    assert len(tokenize(["the"] * n_words, tokenizer).ids) == n_words


@pytest.mark.parametrize("spoken", [[], [""], ["", "", ""]])
def test_story_without_tokens_keeps_its_rows(spoken: list[str], tokenizer: BertTokenizerFast) -> None:
    tokens = tokenize(spoken, tokenizer)
    assert (tokens.ids.size, tokens.word_ids.size, tokens.n_words) == (0, 0, len(spoken))
    (window,) = cut_windows(tokens, 32, 10, tokenizer)
    assert window.ids.tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_training_windows_stay_inside_their_story_and_short_ones_are_dropped(tokenizer: BertTokenizerFast) -> None:
    stories = [numbered(70, 1000), numbered(10, 2000), numbered(109, 3000)]
    windows = training_windows(stories, 42, 40, tokenizer)
    # 70 = 40 + 30 tokens, the last window just long enough with [CLS] and [SEP]; 109 = 40 + 40 + 29, which is too short
    spans = [(1000, 1040), (1040, 1070), (3000, 3040), (3040, 3080)]
    assert [window.ids[1:-1].tolist() for window in windows] == [list(range(*span)) for span in spans]
    kept_elsewhere = [window for tokens in stories for window in cut_windows(tokens, 42, 40, tokenizer)]
    assert [len(window.ids) for window in kept_elsewhere] == [42, 32, 12, 42, 42, 31]


def test_short_windows_stay_where_there_is_no_other(tokenizer: BertTokenizerFast) -> None:
    windows = training_windows([numbered(10, 1000), numbered(5, 2000)], 64, 62, tokenizer)
    assert [len(window.ids) for window in windows] == [12, 7]


def test_pad_equals_transformers(tokenizer: BertTokenizerFast) -> None:
    lengths = (5, 12, 2, 9)
    windows = [Window(np.arange(n) + 7, np.zeros(max(n - 2, 0), int)) for n in lengths]
    ids, mask = pad(windows, tokenizer.pad_token_id)
    expected = tokenizer.pad({"input_ids": [window.ids.tolist() for window in windows]}, return_tensors="np")
    assert ids.tolist() == expected["input_ids"].tolist()
    assert mask.tolist() == expected["attention_mask"].tolist()
    assert ids.dtype == mask.dtype == np.int64
