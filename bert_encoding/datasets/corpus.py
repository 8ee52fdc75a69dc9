"""Text without brain data, for classification and for adapting a masked LM to a domain.

Contract
--------
``*.txt``
    One text per line, UTF-8; blank lines are skipped.
``*.csv``, ``*.parquet``
    A column ``text`` and optionally a column ``label``. A CSV is UTF-8, separated by commas, with a first row of names.
a folder
    Two or more sub-folders of ``.txt`` files; a sub-folder's name is the label of each file in it, a file is one text.

Opening reads everything once, to check and to count; texts are not kept in memory. Labels are text.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.seeds import generator
from bert_encoding.datasets.responses import read_file

FORMATS = "a .txt, .csv or .parquet file, or a folder with a sub-folder of .txt files for each label"
MAX_LABELS = 1000  # a column with more values does not name classes
PARQUET_ROWS = 1024  # decoded at a time
TEXT_TYPES = ("string", "large_string", "string_view")  # names of Arrow types


class Example(NamedTuple):
    """One text and its class; None in a corpus without labels."""

    text: str
    label: str | None


class Row(NamedTuple):
    """One text of a file, before it is checked; ``where`` names it in messages."""

    where: str
    text: str
    label: str | None


@dataclass(frozen=True)
class Corpus:
    """Texts on disk; each iteration reads them again and yields every ``Example``, in the order of the files."""

    path: Path
    labels: tuple[str, ...]  # every class, in alphabetical order; empty if there are none
    counts: Mapping[str, int]  # label -> number of texts used; 0 for a class that is not in the sample
    n_texts: int  # used
    n_words: int  # of the texts used; words are separated by white space
    n_left_out: int  # texts without content, before or after cleaning, in all of ``path``
    fingerprint: str  # hash of all content used, in order, independent of the file format
    notes: tuple[str, ...] = ()  # what a user should know about this text, one line each
    clean: bool = False
    # a byte for every text that is not left out, 1 if it is in the sample; None if all are used
    mask: bytes | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Example]:
        """Yield each text; at the end, raise ``InputError`` if the content has changed since the corpus was opened."""
        tally = _Tally()
        yield from tally.passing(_used(self.path, self.clean, self.mask))
        if tally.fingerprint != self.fingerprint:
            raise InputError(f"{self.path}: its content has changed since it was opened; start again")


def recognises(path: Path) -> bool:
    """Whether a path looks like text that ``open_corpus`` reads."""
    if path.is_dir():
        return len(_label_folders(path)) > 1
    return path.is_file() and path.suffix.lower() in _READERS


def open_corpus(path: Path, *, clean: bool = False, n_examples: int | None = None, seed: int = 0) -> Corpus:
    """Open a corpus, whatever its format: read it once, check and count it.

    With ``clean``, every text passes through ``clean_text``. Of more than ``n_examples`` texts, a uniform sample drawn
    without replacement is used, in file order.

    Raises InputError if the format is unknown, a file is missing, damaged or not UTF-8, a row has a wrong number of
    values or a text that is none, labels are missing in part or are all the same, no text is left, or ``n_examples`` is
    below 1.
    """
    if n_examples is not None and n_examples < 1:
        raise InputError(f"{path}: {n_examples} examples requested; it must be 1 or more")
    check_path(path)
    everything, n_left_out = _Tally(), 0
    with closing(_checked(path, clean)) as examples:
        for example in examples:
            if example is None:
                n_left_out += 1
            else:
                everything.add(example)
                _check_number_of_labels(path, everything)
    _check_classes(path, everything, n_left_out)
    mask = _sample(everything.n_texts, n_examples, seed)
    used = everything
    if mask is not None:
        used = _Tally()
        for _ in used.passing(_used(path, clean, mask)):
            pass
    return Corpus(
        path=path,
        labels=tuple(sorted(everything.counts)),
        counts={label: used.counts[label] for label in sorted(everything.counts)},
        n_texts=used.n_texts,
        n_words=used.n_words,
        n_left_out=n_left_out,
        fingerprint=used.fingerprint,
        notes=(*_folder_notes(path), *_notes(everything, used, n_left_out, n_examples, seed)),
        clean=clean,
        mask=mask,
    )


def describe(corpus: Corpus) -> list[str]:
    """Return lines to print: numbers of texts and words, shares of the classes, notes."""
    lines = [f"{corpus.path}: {corpus.n_texts} texts, {corpus.n_words} words"]
    shares = ", ".join(f"{label} {n} ({n / corpus.n_texts:.1%})" for label, n in corpus.counts.items())
    return [*lines, f"classes: {shares or 'none'}", *corpus.notes]


def clean_text(text: str) -> str:
    """Return a text without emoji and all other non-ASCII characters, and with single spaces for white space."""
    ascii_only = " ".join(text.split()).encode("ascii", "ignore").decode("ascii")
    return " ".join(ascii_only.split())


class _Tally:
    """Counts and hashes examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.n_texts = self.n_words = 0
        self._digest = hashlib.sha256()

    def add(self, example: Example) -> None:
        self.n_texts += 1
        self.n_words += len(example.text.split())
        if example.label is not None:
            self.counts[example.label] += 1
        self._digest.update(json.dumps([example.label, example.text]).encode() + b"\n")

    def passing(self, examples: Iterator[Example]) -> Iterator[Example]:
        """Add each example and yield it."""
        for example in examples:
            self.add(example)
            yield example

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()[:16]


def _used(path: Path, clean: bool, mask: bytes | None) -> Iterator[Example]:
    examples = (example for example in _checked(path, clean) if example is not None)
    return examples if mask is None else compress(examples, mask)


def _checked(path: Path, clean: bool) -> Generator[Example | None, None, None]:
    """Yield every example, or None in place of one whose text is empty."""
    first: Row | None = None
    with closing(read_rows(path)) as rows:
        for row in rows:
            text = clean_text(row.text) if clean else row.text
            if not text.strip():
                yield None
                continue
            first = first or row
            if (row.label is None) != (first.label is None):
                without, labelled = (row, first) if row.label is None else (first, row)
                raise InputError(
                    f"{without.where} has no label, but {labelled.label!r} labels another; label all or none"
                )
            yield Example(text, row.label)


def _sample(n_texts: int, n_examples: int | None, seed: int) -> bytes | None:
    if n_examples is None or n_examples >= n_texts:
        return None
    mask = np.zeros(n_texts, dtype=np.uint8)
    mask[generator(seed, "corpus examples").choice(n_texts, n_examples, replace=False, shuffle=False)] = 1
    return mask.tobytes()


def check_path(path: Path) -> None:
    """Raise ``InputError`` unless a path is in one of the ``FORMATS``."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {FORMATS}")
    if path.is_dir():
        folders = _label_folders(path)
        if len(folders) < 2:
            labels = f"only {next(iter(folders))!r} contains" if folders else "none contains"
            raise InputError(f"{path}: of its sub-folders {labels} .txt files; give two labels or more")
    elif not path.is_file() or path.suffix.lower() not in _READERS:
        raise InputError(f"{path}: no known format; give {FORMATS}")


def _check_number_of_labels(path: Path, everything: _Tally) -> None:
    if len(everything.counts) > MAX_LABELS:
        raise InputError(
            f"{path}: column 'label' has more than {MAX_LABELS} different values, "
            f"the last {next(reversed(everything.counts))!r}; it must name classes"
        )


def _check_classes(path: Path, everything: _Tally, n_left_out: int) -> None:
    if not everything.n_texts:
        raise InputError(
            f"{path}: no text to use: " + (f"all {n_left_out} texts are empty" if n_left_out else "it is empty")
        )
    if len(everything.counts) == 1:
        (label,) = everything.counts
        raise InputError(
            f"{path}: all {everything.n_texts} texts have the label {label!r}; give two labels or more, or none"
        )


def _notes(everything: _Tally, used: _Tally, n_left_out: int, n_examples: int | None, seed: int) -> Iterator[str]:
    if n_left_out:
        yield f"{n_left_out} of {n_left_out + everything.n_texts} texts left out: empty, or empty after cleaning"
    if n_examples is not None and n_examples > everything.n_texts:
        yield f"{n_examples} examples requested, but there are {everything.n_texts}: all are used"
    if used is not everything:
        yield f"a sample of {used.n_texts} of {everything.n_texts} texts (seed {seed})"
    missed = sorted(set(everything.counts) - set(used.counts))
    if missed:
        yield f"the sample contains no text of {', '.join(missed)}; request more examples"


def read_rows(path: Path) -> Generator[Row, None, None]:
    """Yield every text of a file or folder, unchecked."""
    return _folder_rows(path) if path.is_dir() else _READERS[path.suffix.lower()](path)


def _lines(path: Path) -> Generator[str, None, None]:
    """Yield the lines of a text file with their ends; a byte-order mark is dropped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _decode(f"{path}: line {number}", line, is_start=number == 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(where: str, raw: bytes, *, is_start: bool) -> str:
    try:
        text = raw.decode("utf-8-sig" if is_start else "utf-8")
    except UnicodeDecodeError as error:
        index = error.start + len(raw) - len(error.object)  # a byte-order mark is not part of ``object``
        raise InputError(f"{where}: byte {index} (0x{raw[index]:02x}) is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where} contains a zero byte, so this is not UTF-8 text; save it as UTF-8")
    return text


def _txt_rows(path: Path) -> Generator[Row, None, None]:
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(f"{path}: line {number}", line.rstrip("\r\n"), None)


def _csv_rows(path: Path) -> Generator[Row, None, None]:
    """Read row by row with Python's own reader, which guesses no types and knows the line of a bad row."""
    with closing(_lines(path)) as lines:  # at once, not when garbage is collected
        reader = csv.reader(lines, strict=True)
        rows = filter(None, reader)
        try:
            names = next(rows, None)
            if names is None:
                return
            text_index, label_index = _columns(path, names)
            for number, row in enumerate(rows, 1):
                where = f"{path}: row {number} (line {reader.line_num})"
                if len(row) != len(names):
                    raise InputError(
                        f"{where} has {len(row)} values, the first row names {len(names)}; quote texts with commas"
                    )
                yield Row(where, row[text_index], None if label_index is None else row[label_index].strip() or None)
        except csv.Error as error:
            raise InputError(
                f"{path}: line {reader.line_num}: {first_line(error)}; close every quote, double those inside a text, "
                "and give very long texts as Parquet"
            ) from None


def _columns(path: Path, names: list[str]) -> tuple[int, int | None]:
    """Return the indices of the columns ``text`` and ``label``; None if there is no label."""
    if "text" not in names:
        raise InputError(f"{path}: no column 'text'; its columns are {', '.join(names)}")
    for name in ("text", "label"):
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are named {name!r}; leave one")
    return names.index("text"), names.index("label") if "label" in names else None


def _parquet_rows(path: Path) -> Generator[Row, None, None]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _parquet_columns(path, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns, use_threads=False):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    number += 1
                    yield _parquet_row(f"{path}: row {number}", *values)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(error)}); get the file again") from None


def _parquet_columns(path: Path, schema: Any) -> list[str]:
    _, label_index = _columns(path, schema.names)
    for name in ("text", "label") if label_index is not None else ("text",):
        kind = schema.field(name).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_null(plain) or str(plain) in TEXT_TYPES:
            continue
        if name == "text" or not (pa.types.is_integer(plain) or pa.types.is_boolean(plain)):
            wanted = "text" if name == "text" else "text or whole numbers"
            raise InputError(f"{path}: column {name!r} is {kind}; it must be {wanted}")
    return ["text"] if label_index is None else ["text", "label"]


def _parquet_row(where: str, text: Any, label: Any = None) -> Row:
    try:
        label = None if label is None or label.as_py() is None else str(label.as_py()).strip()
        return Row(where, text.as_py() or "", label or None)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; write it as UTF-8") from None


def _folder_rows(path: Path) -> Generator[Row, None, None]:
    for label, files in _label_folders(path).items():
        for file in files:
            yield Row(str(file), _decode(str(file), read_file(file), is_start=True), label)


def _label_folders(path: Path) -> dict[str, list[Path]]:
    """Return label -> its .txt files, both in alphabetical order; deeper folders are ignored."""
    folders = [entry for entry in _visible(path) if entry.is_dir()]
    files = {folder.name: [file for file in _visible(folder) if file.suffix.lower() == ".txt"] for folder in folders}
    return {label: texts for label, texts in files.items() if texts}


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None


def _folder_notes(path: Path) -> Iterator[str]:
    if not path.is_dir():
        return
    labels = _label_folders(path)
    others = [entry.name for entry in _visible(path) if entry.name not in labels]
    if others:
        yield f"not labels, left out: {', '.join(others)}"
    for label, files in labels.items():
        n_others = len(_visible(path / label)) - len(files)
        if n_others:
            yield f"{label}: {n_others} entries that are not .txt files left out"


_READERS = {".txt": _txt_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
