"""Static word vectors from a GloVe or word2vec file: a word has the same vector in every context."""

import gzip
import io
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.features.word_rate import normalise

MAX_LINE_BYTES = 2**20  # of a text file; a file of vectors has no longer line
MAX_WORD_BYTES = 2**12  # of a binary file
MAX_DIMS = 100_000
CHUNK_BYTES = 2**20
LINE_FEED, SPACE = b"\n", b" "
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")  # characters of packed numbers, never of text
NOT_VECTORS = {  # first bytes of other kinds of files
    b"\x80": "a Python pickle, which could run code and is never loaded; export it with save_word2vec_format",
    b"PK\x03\x04": "a zip archive; unpack it and give the file of vectors inside",
    b"\x93NUMPY": "a NumPy array without words; export it with save_word2vec_format",
}


@dataclass(frozen=True)
class StaticVectors:
    """Vectors of some words of a file."""

    path: Path
    rows: Mapping[str, int]  # word -> row in ``vectors``
    vectors: np.ndarray  # (n_known, n_dims) float32


def static_vectors(spoken: Sequence[str], table: StaticVectors) -> np.ndarray:
    """Return the vector of every word, (n_words, n_dims) float32; zero for empty and unknown words.

    Raises InputError if no word is known.
    """
    if not coverage(spoken, table):
        raise InputError(f"{table.path}: has none of a story's words; is it in the language of the stories?")
    rows = np.array([table.rows.get(normalise(word), -1) for word in spoken])
    vectors = np.zeros((len(spoken), table.vectors.shape[1]), dtype=np.float32)
    vectors[rows >= 0] = table.vectors[rows[rows >= 0]]
    return vectors


def coverage(spoken: Sequence[str], table: StaticVectors) -> float:
    """Return the share of spoken words that have a vector, 0 to 1; empty words do not count."""
    words = [normalise(word) for word in spoken if word]
    return sum(word in table.rows for word in words) / len(words) if words else 0.0


def read_static_vectors(path: Path, words: set[str]) -> StaticVectors:
    """Read the vectors of some words from a GloVe or word2vec file, text or binary, plain or gzip.

    Gensim would hold the whole file in memory (GoogleNews: 3.6 GB). So the file is read once as a stream, its format
    is checked, and gensim reads only the entries of ``words``. If a word occurs twice, its first vector counts, as in
    gensim. A first line of two fields is a header, so GloVe vectors need at least two dimensions.

    Raises InputError if gensim is not installed, or the file is missing, malformed, or has none of the words.

    Parameters
    ----------
    words : normalised, see ``distinct_words``
    """
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        raise InputError(f"{path}: static vectors need gensim; pip install 'bert-encoding-study[static]'") from None
    try:
        with _open(path) as file:
            layout = _layout(path, file)
            entries = _binary_entries(path, file, layout) if layout.binary else _text_entries(path, file, layout)
            wanted = {word.encode("utf-8", "replace") for word in words if word}
            selected: dict[bytes, Entry] = {}
            for entry in entries:
                if entry.word in wanted:
                    selected.setdefault(entry.word, entry)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({first_line(error)}); download it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    if not selected:
        raise InputError(f"{path}: has none of the {len(words)} words of the stories; is it in their language?")
    return _through_gensim(KeyedVectors.load_word2vec_format, path, layout, selected)


class Layout(NamedTuple):
    """The format of a file; without a header, ``n_vectors`` is None and ``first`` holds the first line."""

    n_dims: int
    n_vectors: int | None
    binary: bool
    first: bytes


class Entry(NamedTuple):
    """A word and its vector as bytes of the file: numbers as text, or packed float32."""

    place: str
    word: bytes
    raw: bytes


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    if not path.exists():
        raise InputError(f"{path}: no such file; give a file of GloVe or word2vec vectors")
    if not path.is_file():
        raise InputError(f"{path}: not a file; give a file of GloVe or word2vec vectors")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")


def _layout(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Layout:
    first = file.readline(MAX_LINE_BYTES)
    if not first:
        raise InputError(f"{path}: the file is empty; give a file of GloVe or word2vec vectors")
    for start, what in NOT_VECTORS.items():
        if first.startswith(start):
            raise InputError(f"{path}: {what}")
    fields = first.rstrip().split(SPACE)
    if CONTROL.search(first) or len(fields) < 2:
        raise InputError(f"{path}: line 1 is neither a header 'n_vectors n_dims' nor a word and its numbers")
    if len(fields) > 2:
        _check_numbers(f"{path}: line 1", fields[0], fields[1:])
        return Layout(len(fields) - 1, None, False, first)
    if not all(field.isdigit() and 0 < len(field) < 10 for field in fields):
        raise InputError(f"{path}: line 1: the header {_show(first)} must be two whole numbers: n_vectors n_dims")
    n_vectors, n_dims = map(int, fields)
    if not n_vectors or not 0 < n_dims <= MAX_DIMS:
        raise InputError(f"{path}: line 1: a header of {n_vectors} vectors with {n_dims} dimensions cannot be right")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    binary = suffix == ".bin" or CONTROL.search(file.peek(CHUNK_BYTES)) is not None
    return Layout(n_dims, n_vectors, binary, b"")


def _text_entries(path: Path, file: BinaryIO | gzip.GzipFile, layout: Layout) -> Iterator[Entry]:
    """Yield the entry of every line, ``word number number ...``.

    Only a space separates: words of GloVe can hold no-break spaces.
    """
    n_entries, number = 0, 0 if layout.n_vectors is None else 1
    line = layout.first or file.readline(MAX_LINE_BYTES)
    while line:
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes: not a file of vectors")
        if content := line.rstrip():
            n_entries += 1
            word, _, raw = content.partition(SPACE)
            n_numbers = raw.count(SPACE) + 1 if raw else 0
            if n_numbers != layout.n_dims:
                place = f"{path}: line {number}: {_show(word)}"
                raise InputError(f"{place} has {n_numbers} numbers, expected {layout.n_dims}; download the file again")
            yield Entry(f"line {number}", word, raw)
        line = file.readline(MAX_LINE_BYTES)
    if layout.n_vectors not in (None, n_entries):
        raise InputError(f"{path}: its header says {layout.n_vectors} vectors, it holds {n_entries}; download it again")


def _binary_entries(path: Path, file: BinaryIO | gzip.GzipFile, layout: Layout) -> Iterator[Entry]:
    """Yield every entry of a binary word2vec file: word, space, packed float32, and sometimes a line feed."""
    assert layout.n_vectors is not None
    n_bytes = 4 * layout.n_dims
    chunk, start = b"", 0
    for number in range(1, layout.n_vectors + 1):
        if len(chunk) - start < MAX_WORD_BYTES + n_bytes:
            chunk, start = chunk[start:] + file.read(CHUNK_BYTES + n_bytes), 0
        end = chunk.find(SPACE, start, start + MAX_WORD_BYTES)
        if end < 0 and len(chunk) - start >= MAX_WORD_BYTES:
            raise InputError(f"{path}: vector {number} has no word: neither text nor binary word2vec")
        if end < 0 or len(chunk) - end - 1 < n_bytes:
            raise InputError(f"{path}: it ends in vector {number} of {layout.n_vectors}; download it again")
        yield Entry(f"vector {number}", chunk[start:end].lstrip(LINE_FEED), chunk[end + 1 : end + 1 + n_bytes])
        start = end + 1 + n_bytes
    if (chunk[start:] + file.read(2)).strip():
        raise InputError(f"{path}: its header says {layout.n_vectors} vectors, but more follows; download it again")


def _through_gensim(load: Any, path: Path, layout: Layout, entries: dict[bytes, Entry]) -> StaticVectors:
    """Let gensim read the entries, through a temporary file, since it does not read open files."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".vectors") as file:
            file.write(b"%d %d\n" % (len(entries), layout.n_dims))
            for word, entry in entries.items():
                file.write(word + SPACE + entry.raw + LINE_FEED)
            file.flush()
            with np.errstate(over="ignore"):  # values beyond float32 are refused below
                vectors = load(file.name, binary=layout.binary)
    except OSError as error:
        raise InputError(f"{path}: no temporary file ({first_line(error)}); free some space, or set TMPDIR") from None
    except ValueError as error:
        for entry in entries.values():
            _check_numbers(f"{path}: {entry.place}", entry.word, entry.raw.split(SPACE))
        raise InputError(f"{path}: gensim cannot read it ({first_line(error)})") from None
    table = np.ascontiguousarray(vectors.vectors, dtype=np.float32)  # (n_known, n_dims)
    for entry, row in zip(entries.values(), table, strict=True):
        if not np.isfinite(row).all():
            bad = row[~np.isfinite(row)][0]
            raise InputError(f"{path}: {entry.place}: {_show(entry.word)} has the value {bad}; correct or remove it")
    return StaticVectors(path, dict(vectors.key_to_index), table)


def _check_numbers(line: str, word: bytes, fields: list[bytes]) -> None:
    for text in fields:
        try:
            float(text.decode())
        except ValueError:
            line = f"{line}: {_show(word)}"
            raise InputError(f"{line} has {_show(text)} among its numbers; download the file again") from None


def _show(raw: bytes) -> str:
    return repr(raw.strip().decode("utf-8", "replace")[:40])
