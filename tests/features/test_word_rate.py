"""Word rate and bag of words, against counts by hand."""

import numpy as np
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.features.word_rate import bag_of_words, choose_vocabulary, distinct_words, normalise, word_rate

SPOKEN = ("The", "house", "", "by", "the", "River,", "don't", "", "Nowhere")


# --- word rate, words


def test_word_rate_counts_spoken_words() -> None:
    rate = word_rate(SPOKEN)
    assert rate.dtype == np.float32
    np.testing.assert_array_equal(rate, np.array([[1, 1, 0, 1, 1, 1, 1, 0, 1]], np.float32).T)
    assert word_rate(()).shape == (0, 1)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("House", "house"),
        ('"river,"', "river"),
        ("Don\u2019t.", "don't"),
        ("'cause", "cause"),
        ("dogs'", "dogs"),
        ("mother-in-law", "mother-in-law"),
        ("_so_", "so"),
        ("\u00c9t\u00e9!", "\u00e9t\u00e9"),
        ("4:30", "4:30"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(word: str, expected: str) -> None:
    assert normalise(word) == expected


def test_distinct_words() -> None:
    expected = "the house by river don't nowhere end".split()
    assert distinct_words([SPOKEN, ("THE", "'", "end")]) == set(expected)


# --- bag of words


def test_vocabulary_is_the_most_frequent_words_with_ties_in_alphabetical_order() -> None:
    stories = (("b", "a", "", "c", "C", "d"), ["c", "B.", "e", "...", "a"])  # c 3, a 2, b 2, d 1, e 1
    assert choose_vocabulary(stories, 3) == ("c", "a", "b")
    assert choose_vocabulary(reversed(stories), 4) == ("c", "a", "b", "d")
    assert choose_vocabulary(iter(stories), 99) == ("c", "a", "b", "d", "e")


@pytest.mark.parametrize(
    ("stories", "n", "message"),
    [
        ([SPOKEN], 0, "a vocabulary of 0 words"),
        ([SPOKEN], -1, "a vocabulary of -1 words"),
        ([("", "..."), ()], 5, "no spoken word"),
    ],
)
def test_a_vocabulary_without_words_is_refused(stories: list[tuple[str, ...]], n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_vocabulary(stories, n)


def test_bag_of_words_is_one_hot() -> None:
    rows = bag_of_words(SPOKEN, ("the", "don't", "river"))
    expected = [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected)
