"""Text without brain data, for classification and for adapting a masked LM to a domain.

Contract
--------
``*.txt``
    One text a line, UTF-8; blank lines separate and are skipped.
``*.csv``, ``*.parquet``
    A column ``text`` and perhaps a column ``label``. A CSV has a first row of names and commas, UTF-8.
a folder
    Two or more sub-folders of ``.txt`` files; a sub-folder's name is the label of each file in it, a file is one text.

Opening reads everything once, to check and to count; a corpus never holds its texts. Labels are text.
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

FORMATS = "a .txt, .csv or .parquet file, or a folder with a sub-folder of .txt files for each label"
MAX_LABELS = 1000  # more are a column of something else, and would be held in memory
PARQUET_ROWS = 1024  # decoded at a time
TEXT_TYPES = ("string", "large_string", "string_view")  # names of Arrow's


class Example(NamedTuple):
    """One text and its class; None in a corpus without labels."""

    text: str
    label: str | None


class Row(NamedTuple):
    """One text as it lies in a file, before it is checked."""

    where: str
    text: str
    label: str | None


@dataclass(frozen=True)
class Corpus:
    """Texts on disk; iterating yields each ``Example``, in the order of the files, again and again.

    Attributes
    ----------
    path : the file or folder
    labels : every class found there, in alphabetical order; empty if there are none
    counts : label -> number of texts used; 0 for a class that a sample missed
    n_texts, n_words : used; words are what white space separates
    n_left_out : texts that were empty, or that cleaning emptied, in all of ``path``
    fingerprint : hash of all content used, in order; the same whatever file format holds it
    notes : what a user should know of this text, a line each
    clean : whether texts are cleaned, see ``clean_text``
    mask : a byte for every text that is not left out, 1 if it is in the sample; None if all are used
    """

    path: Path
    labels: tuple[str, ...]
    counts: Mapping[str, int]
    n_texts: int
    n_words: int
    n_left_out: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    clean: bool = False
    mask: bytes | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Example]:
        """Yield each text.

        Raises
        ------
        InputError
            at the end, if the content is no longer what it was when the corpus was opened.
        """
        seen = _Tally()
        for example in _used(self.path, self.clean, self.mask):
            seen.add(example)
            yield example
        if seen.fingerprint != self.fingerprint:
            raise InputError(f"{self.path}: its content has changed since it was opened; start again")


def recognises(path: Path) -> bool:
    """Whether a path looks like text that ``open_corpus`` reads."""
    if path.is_dir():
        return len(_label_folders(path)) > 1
    return path.is_file() and path.suffix.lower() in _READERS


def open_corpus(path: Path, *, clean: bool = False, n_examples: int | None = None, seed: int = 0) -> Corpus:
    """Open a corpus, whatever its format: read it once, check and count it.

    Parameters
    ----------
    clean : pass every text through ``clean_text``
    n_examples : use a uniform sample of so many texts, without replacement, kept in file order; all if there are fewer
    seed : of the sample

    Raises
    ------
    InputError
        if nothing there is recognised, a file is missing, damaged or not UTF-8, a row is ragged or its text is none,
        labels are missing in part or are all the same, no text is left, or ``n_examples`` is below 1.
    """
    if n_examples is not None and n_examples < 1:
        raise InputError(f"{path}: {n_examples} examples asked for; it must be 1 or more")
    check_path(path)
    whole, n_left_out = _Tally(), 0
    with closing(_kept(path, clean)) as examples:
        for example in examples:
            if example is None:
                n_left_out += 1
            else:
                whole.add(example)
                _check_number_of_labels(path, whole)
    _check_classes(path, whole, n_left_out)
    mask = _sample(whole.n_texts, n_examples, seed)
    used = whole if mask is None else _tally(_used(path, clean, mask))
    return Corpus(
        path=path,
        labels=tuple(sorted(whole.counts)),
        counts={label: used.counts[label] for label in sorted(whole.counts)},
        n_texts=used.n_texts,
        n_words=used.n_words,
        n_left_out=n_left_out,
        fingerprint=used.fingerprint,
        notes=(*_folder_notes(path), *_notes(whole, used, n_left_out, n_examples, seed)),
        clean=clean,
        mask=mask,
    )


def describe(corpus: Corpus) -> list[str]:
    """Return a few lines for people: how many texts and words, the balance of classes, the notes."""
    lines = [f"{corpus.path}: {corpus.n_texts} texts, {corpus.n_words} words"]
    if corpus.labels:
        shares = (f"{label} {n} ({n / corpus.n_texts:.1%})" for label, n in corpus.counts.items())
        lines.append(f"classes: {', '.join(shares)}")
    else:
        lines.append("classes: none")
    return [*lines, *corpus.notes]


def clean_text(text: str) -> str:
    """Return a text without emoji and all other non-ASCII characters, and with single spaces for white space."""
    ascii_only = " ".join(text.split()).encode("ascii", "ignore").decode("ascii")
    return " ".join(ascii_only.split())


class _Tally:
    """Counts and hashes examples as they pass."""

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

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()[:16]


def _tally(examples: Iterator[Example]) -> _Tally:
    tally = _Tally()
    for example in examples:
        tally.add(example)
    return tally


def _used(path: Path, clean: bool, mask: bytes | None) -> Iterator[Example]:
    kept = (example for example in _kept(path, clean) if example is not None)
    return kept if mask is None else compress(kept, mask)


def _kept(path: Path, clean: bool) -> Generator[Example | None, None, None]:
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
                without, other = (row, first) if row.label is None else (first, row)
                raise InputError(f"{without.where} has no label, but {other.label!r} labels another; label all or none")
            yield Example(text, row.label)


def _sample(n_texts: int, n_examples: int | None, seed: int) -> bytes | None:
    if n_examples is None or n_examples >= n_texts:
        return None
    mask = np.zeros(n_texts, dtype=np.uint8)
    mask[generator(seed, "corpus examples").choice(n_texts, n_examples, replace=False, shuffle=False)] = 1
    return mask.tobytes()


def check_path(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {FORMATS}")
    if path.is_dir():
        folders = _label_folders(path)
        if len(folders) < 2:
            found = f"only {next(iter(folders))!r}" if folders else "none"
            raise InputError(f"{path}: of its sub-folders with .txt files there is {found}; give two labels or more")
    elif not path.is_file() or path.suffix.lower() not in _READERS:
        raise InputError(f"{path}: no known format; give {FORMATS}")


def _check_number_of_labels(path: Path, whole: _Tally) -> None:
    if len(whole.counts) > MAX_LABELS:
        raise InputError(
            f"{path}: column 'label' has more than {MAX_LABELS} different values, "
            f"the last {next(reversed(whole.counts))!r}; it must name classes"
        )


def _check_classes(path: Path, whole: _Tally, n_left_out: int) -> None:
    if not whole.n_texts:
        why = f"all {n_left_out} texts are empty" if n_left_out else "there is none in it"
        raise InputError(f"{path}: no text to use: {why}")
    if len(whole.counts) == 1:
        (label,) = whole.counts
        raise InputError(
            f"{path}: all {whole.n_texts} texts have the label {label!r}; give two labels or more, or none"
        )


def _notes(whole: _Tally, used: _Tally, n_left_out: int, n_examples: int | None, seed: int) -> Iterator[str]:
    if n_left_out:
        yield f"{n_left_out} of {n_left_out + whole.n_texts} texts left out: nothing in them, or nothing once cleaned"
    if n_examples is not None and n_examples > whole.n_texts:
        yield f"{n_examples} examples asked for, but there are {whole.n_texts}: all are used"
    if used is not whole:
        yield f"a sample of {used.n_texts} of {whole.n_texts} texts (seed {seed})"
    missed = sorted(set(whole.counts) - set(used.counts))
    if missed:
        yield f"the sample holds no text of {', '.join(missed)}; ask for more examples"


def read_rows(path: Path) -> Generator[Row, None, None]:
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
        at = error.start + len(raw) - len(error.object)  # a byte-order mark is not part of ``object``
        raise InputError(f"{where}: byte {at} (0x{raw[at]:02x}) is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where} holds a zero byte, so this is not UTF-8 text; save it as UTF-8")
    return text


def _txt_rows(path: Path) -> Generator[Row, None, None]:
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(f"{path}: line {number}", line.rstrip("\r\n"), None)


def _csv_rows(path: Path) -> Generator[Row, None, None]:
    """Read row by row with Python's own reader: no guessed types, and the number of a bad row is known."""
    with closing(_lines(path)) as lines:  # now, not when the garbage is collected
        yield from _parsed_csv(path, csv.reader(lines, strict=True))


def _parsed_csv(path: Path, reader: Any) -> Iterator[Row]:
    try:
        names = next(filter(None, reader), None)
        if names is None:
            return
        text_at, label_at = _columns(path, names)
        for number, row in enumerate(filter(None, reader), 1):
            where = f"{path}: row {number} (line {reader.line_num})"
            if len(row) != len(names):
                raise InputError(
                    f"{where} has {len(row)} values, the names above are {len(names)}; quote a text that holds commas"
                )
            yield Row(where, row[text_at], None if label_at is None else row[label_at].strip() or None)
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num}: {first_line(error)}; close every quote, double those inside a text, "
            "and give very long texts as Parquet"
        ) from None


def _columns(path: Path, names: list[str]) -> tuple[int, int | None]:
    """Return where ``text`` and ``label`` are among the columns; None if there is no label."""
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
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(error)}); get it anew") from None


def _parquet_columns(path: Path, schema: Any) -> list[str]:
    _, label_at = _columns(path, schema.names)
    for name in ("text", "label") if label_at is not None else ("text",):
        kind = schema.field(name).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_null(plain) or str(plain) in TEXT_TYPES:
            continue
        if name == "text" or not (pa.types.is_integer(plain) or pa.types.is_boolean(plain)):
            wanted = "text" if name == "text" else "text or whole numbers"
            raise InputError(f"{path}: column {name!r} is {kind}; it must be {wanted}")
    return ["text"] if label_at is None else ["text", "label"]


def _parquet_row(where: str, text: Any, label: Any = None) -> Row:
    try:
        label = None if label is None or label.as_py() is None else str(label.as_py()).strip()
        return Row(where, text.as_py() or "", label or None)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; write it as UTF-8") from None


def _folder_rows(path: Path) -> Generator[Row, None, None]:
    for label, files in _label_folders(path).items():
        for file in files:
            yield Row(str(file), _decode(str(file), _content(file), is_start=True), label)


def _content(file: Path) -> bytes:
    if not file.is_file():  # a pipe would wait for ever
        raise InputError(f"{file}: not a file that can be read; take it out of the folder")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _label_folders(path: Path) -> dict[str, list[Path]]:
    """Return label -> its .txt files, both in alphabetical order; never looks deeper, so links cannot lead it round."""
    folders = [entry for entry in _visible(path) if entry.is_dir()]
    files = {folder.name: [file for file in _visible(folder) if file.suffix.lower() == ".txt"] for folder in folders}
    return {label: found for label, found in files.items() if found}


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None


def _folder_notes(path: Path) -> Iterator[str]:
    if not path.is_dir():
        return
    labels = _label_folders(path)
    beside = [entry.name for entry in _visible(path) if entry.name not in labels]
    if beside:
        yield f"not labels, left out: {', '.join(beside)}"
    for label, files in labels.items():
        n_others = len(_visible(path / label)) - len(files)
        if n_others:
            yield f"{label}: {n_others} entries that are not .txt files left out"


_READERS = {".txt": _txt_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
