"""Labelled texts in which negation decides, so that no bag of words tells classes apart; and a tiny BERT for them."""

import csv
import itertools
import string
from pathlib import Path

import numpy as np
from make_data import make_tiny_bert

from bert_encoding.datasets.corpus import Example

GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "weak")
NOUNS = ("film", "plot", "cast", "music", "end")
OPENERS = ("", "i think", "they say", "we found")
WORDS = (
    "the was not but at all i think they say we found film plot cast music end good great fine bad dull weak".split()
)


def negated_texts(n: int, seed: int = 0) -> list[Example]:
    """Return different texts, half of each class: "the film was not good at all", "the plot was not dull but fine".

    A word says nothing by itself: with "not" it counts the other way round, and "not bad but good" holds the words of
    "not good but bad".
    """
    pairs = [(a, b, "pos") for a, b in itertools.product(GOOD, BAD)]
    pairs += [(b, a, "neg") for a, b, _ in pairs]
    texts = []
    for opener, noun, (right, wrong, label) in itertools.product(OPENERS, NOUNS, pairs):
        start = f"{opener} the {noun} was".strip()
        texts.append(Example(f"{start} not {wrong} but {right}", label))
        if (right, wrong) in zip(GOOD + BAD, BAD + GOOD, strict=True):  # once for each word
            texts += [Example(f"{start} {right}", label), Example(f"{start} not {wrong} at all", label)]
    by_class = [[t for t in texts if t.label == label] for label in ("neg", "pos")]
    rng = np.random.default_rng(seed)
    chosen = [part[at] for part in by_class for at in rng.permutation(len(part))[: n // 2]]
    return [chosen[at] for at in rng.permutation(len(chosen))]


def write_texts(file: Path, examples: list[Example]) -> Path:
    """Write a CSV with a column ``label`` if there are labels."""
    labelled = examples[0].label is not None
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(
            [("text", "label"), *examples] if labelled else [("text",), *((t,) for t, _ in examples)]
        )
    return file


def make_text_bert(folder: Path, seed: int = 0) -> Path:
    """Write a BERT with 2 layers of width 32 that knows the words of ``negated_texts`` and reads 64 tokens."""
    wide = 0.1  # initial weights of so narrow a model, so that it learns in seconds
    return make_tiny_bert(
        folder, seed, WORDS, string.ascii_lowercase, max_position_embeddings=64, initializer_range=wide
    )
