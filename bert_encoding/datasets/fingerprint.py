"""The hash of all that a data set holds: texts, responses and repeats."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.errors import first_line

ROWS_OF_REPEATS = 16  # read at a time: some MB of a whole brain


class Hasher:
    """The hash of all content, in order; responses are hashed in a thread while the block is looked at."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self.stories: dict[str, list[tuple[str, str]]] = {}  # hash of responses -> the (subject, story) that have them

    def __enter__(self) -> "Hasher":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def add_text(self, story: Story) -> None:
        self._digest.update("\0".join((story.name, *story.words)).encode())
        self._digest.update(np.ascontiguousarray(story.word_times_s, dtype="<f8").tobytes())
        self._digest.update(np.ascontiguousarray(story.tr_times_s, dtype="<f8").tobytes())

    def add(self, block: np.ndarray) -> None:
        self._digest.update(np.ascontiguousarray(block).data)

    def add_header(self, subject: str, story: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._digest.update(f"{subject}/{story}/{shape}/{dtype.str}".encode())

    @contextmanager
    def adding(self, block: np.ndarray) -> Iterator[None]:
        """Hash a block while the body runs."""
        hashing = self._pool.submit(self.add, block)
        try:
            yield
        finally:
            hashing.result()

    def result(self) -> str:
        return self._digest.hexdigest()[:16]


def repeats_of(dataset: Dataset) -> list[tuple[str, str, Responses]]:
    return [
        (story.name, subject, story.repeats[subject])
        for story in dataset.stories.values()
        for subject in dataset.subjects
        if subject in story.repeats
    ]


def hash_repeats(story: str, subject: str, repeats: Responses, hasher: Hasher) -> str:
    """Let the repeats of a story enter the fingerprint; return what is wrong with them, if anything."""
    try:
        with repeats.open() as source:
            hasher.add_header(subject, f"{story}/repeats", source.shape, source.dtype)
            for repeat in range(source.shape[0]):
                for start in range(0, source.shape[1], ROWS_OF_REPEATS):
                    hasher.add(source[repeat, start : start + ROWS_OF_REPEATS])
    except (OSError, RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"story {story}, subject {subject}: its repeats cannot be read ({first_line(error)}); get them anew"
    return ""
