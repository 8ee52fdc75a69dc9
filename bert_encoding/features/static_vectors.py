"""Static word vectors from a GloVe or word2vec file: the same vector for a word wherever it stands."""

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

MAX_LINE_BYTES = 2**20  # of a text file; a longer line is not one of vectors
MAX_WORD_BYTES = 2**12  # of a binary file
MAX_DIMS = 100_000
CHUNK_BYTES = 2**20
LINE_FEED, SPACE = b"\n", b" "
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")  # in packed numbers sooner or later, never in text
NOT_VECTORS = {  # how files begin that are given by mistake
    b"\x80": "a Python pickle, which could run code and is never loaded; export it with save_word2vec_format",
    b"PK\x03\x04": "a zip archive; unpack it and give the file of vectors inside",
    b"\x93NUMPY": "a NumPy array without words; export it with save_word2vec_format",
}


@dataclass(frozen=True)
class StaticVectors:
    """Vectors of some words of a file.

    Attributes
    ----------
    rows : word -> its row in ``vectors``
    vectors : (n_known, n_dims) float32
    """

    path: Path
    rows: Mapping[str, int]
    vectors: np.ndarray


def static_vectors(spoken: Sequence[str], table: StaticVectors) -> np.ndarray:
    """Return the vector of every word, (n_words, n_dims) float32; zero for silent rows and unknown words.

    Raises
    ------
    InputError
        if no word is known.
    """
    if not coverage(spoken, table):
        raise InputError(f"{table.path}: it has none of a story's words; the file must be of the story's language")
    found = np.array([table.rows.get(normalise(word), -1) for word in spoken])
    vectors = np.zeros((len(spoken), table.vectors.shape[1]), dtype=np.float32)
    vectors[found >= 0] = table.vectors[found[found >= 0]]
    return vectors


def coverage(spoken: Sequence[str], table: StaticVectors) -> float:
    """Return the share of spoken words that have a vector, 0 to 1; silent rows do not count."""
    said = [normalise(word) for word in spoken if word]
    return sum(word in table.rows for word in said) / len(said) if said else 0.0


def read_static_vectors(path: Path, words: set[str]) -> StaticVectors:
    """Read the vectors of some words from a GloVe or word2vec file, text or binary, plain or gzip.

    Gensim holds a whole file in memory (GoogleNews: 3.6 GB) and can only stop early. So the file is read once as a
    stream, its form is checked, and only the entries of ``words`` go on to gensim. A word that comes twice keeps its
    first vector, as in gensim. A first line of two fields is a header, so GloVe vectors need two dimensions or more.

    Parameters
    ----------
    words : normalised, see ``distinct_words``

    Raises
    ------
    InputError
        if gensim is not installed, the file is missing, malformed or no such file, or it has none of the words.
    """
    load = _gensim_loader(path)
    try:
        with _open(path) as file:
            layout = _layout(path, file)
            entries = _binary_entries(path, file, layout) if layout.binary else _text_entries(path, file, layout)
            kept = _keep(entries, {word.encode("utf-8", "replace") for word in words if word})
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({first_line(error)}); get it anew") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    if not kept:
        raise InputError(f"{path}: it has none of the {len(words)} words asked for; is it of the stories' language?")
    return _through_gensim(load, path, layout, kept)


class Layout(NamedTuple):
    """The form of a file; ``first`` is the first line of a file without header, ``n_vectors`` unknown there."""

    n_dims: int
    n_vectors: int | None
    binary: bool
    first: bytes


class Entry(NamedTuple):
    """A word and its vector as it lies in the file: numbers in text, or packed float32."""

    place: str
    word: bytes
    raw: bytes


def _gensim_loader(path: Path) -> Any:
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        raise InputError(f"{path}: static vectors need gensim; pip install 'bert-encoding-study[static]'") from None
    return KeyedVectors.load_word2vec_format


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


def _keep(entries: Iterator[Entry], wanted: set[bytes]) -> dict[bytes, Entry]:
    kept: dict[bytes, Entry] = {}
    for entry in entries:
        if entry.word in wanted and entry.word not in kept:
            kept[entry.word] = entry
    return kept


def _text_entries(path: Path, file: BinaryIO | gzip.GzipFile, layout: Layout) -> Iterator[Entry]:
    """Yield the entry of every line, ``word number number ...``.

    Only a space divides: words of GloVe hold no-break spaces, which must not.
    """
    n_found, number = 0, 0 if layout.n_vectors is None else 1
    line = layout.first or file.readline(MAX_LINE_BYTES)
    while line:
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes: not a file of vectors")
        if content := line.rstrip():
            n_found += 1
            yield _text_entry(path, number, content, layout.n_dims)
        line = file.readline(MAX_LINE_BYTES)
    if layout.n_vectors not in (None, n_found):
        raise InputError(f"{path}: its header says {layout.n_vectors} vectors, it holds {n_found}; get it anew")


def _text_entry(path: Path, number: int, content: bytes, n_dims: int) -> Entry:
    word, _, raw = content.partition(SPACE)
    n_numbers = raw.count(SPACE) + 1 if raw else 0
    if n_numbers != n_dims:
        where = f"{path}: line {number}: {_show(word)}"
        raise InputError(f"{where} has {n_numbers} numbers, expected {n_dims}; get the file anew")
    return Entry(f"line {number}", word, raw)


def _binary_entries(path: Path, file: BinaryIO | gzip.GzipFile, layout: Layout) -> Iterator[Entry]:
    """Yield every entry of a binary word2vec file: the word, a space, packed float32, perhaps a line feed."""
    assert layout.n_vectors is not None
    n_bytes = 4 * layout.n_dims
    chunk, at = b"", 0
    for number in range(1, layout.n_vectors + 1):
        if len(chunk) - at < MAX_WORD_BYTES + n_bytes:
            chunk, at = chunk[at:] + file.read(CHUNK_BYTES + n_bytes), 0
        end = chunk.find(SPACE, at, at + MAX_WORD_BYTES)
        if end < 0 and len(chunk) - at >= MAX_WORD_BYTES:
            raise InputError(f"{path}: vector {number} has no word: neither text nor binary word2vec")
        if end < 0 or len(chunk) - end - 1 < n_bytes:
            raise InputError(f"{path}: it ends in vector {number} of {layout.n_vectors}; get it anew")
        yield Entry(f"vector {number}", chunk[at:end].lstrip(LINE_FEED), chunk[end + 1 : end + 1 + n_bytes])
        at = end + 1 + n_bytes
    if (chunk[at:] + file.read(2)).strip():
        raise InputError(f"{path}: its header says {layout.n_vectors} vectors, but more follows; get it anew")


def _through_gensim(load: Any, path: Path, layout: Layout, kept: dict[bytes, Entry]) -> StaticVectors:
    """Let gensim read the entries kept, through a temporary file: it takes no open ones."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".vectors") as file:
            file.write(b"%d %d\n" % (len(kept), layout.n_dims))
            for word, entry in kept.items():
                file.write(word + SPACE + entry.raw + LINE_FEED)
            file.flush()
            with np.errstate(over="ignore"):  # what exceeds float32 is refused below
                vectors = load(file.name, binary=layout.binary)
    except OSError as error:
        raise InputError(f"{path}: no temporary file ({first_line(error)}); free some space, or set TMPDIR") from None
    except ValueError as error:
        for entry in kept.values():
            _check_numbers(f"{path}: {entry.place}", entry.word, entry.raw.split(SPACE))
        raise InputError(f"{path}: gensim cannot read it ({first_line(error)})") from None
    table = np.ascontiguousarray(vectors.vectors, dtype=np.float32)  # (n_known, n_dims)
    for entry, row in zip(kept.values(), table, strict=True):
        if not np.isfinite(row).all():
            bad = row[~np.isfinite(row)][0]
            raise InputError(f"{path}: {entry.place}: {_show(entry.word)} has the value {bad}; mend or remove it")
    return StaticVectors(path, dict(vectors.key_to_index), table)


def _check_numbers(where: str, word: bytes, fields: list[bytes]) -> None:
    for text in fields:
        if not _is_number(text):
            raise InputError(f"{where}: {_show(word)} has {_show(text)} among its numbers; get the file anew")


def _is_number(text: bytes) -> bool:
    try:
        float(text.decode())
    except ValueError:
        return False
    return True


def _show(raw: bytes) -> str:
    return repr(raw.strip().decode("utf-8", "replace")[:40])
