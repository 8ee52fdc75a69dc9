"""Text corpora: every format gives the same texts, bad input is named, texts are not kept in memory."""

import csv
import hashlib
import json
import os
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import corpus as module
from bert_encoding.datasets.corpus import Corpus, Example, clean_text, describe, open_corpus, recognises

EXAMPLES = (  # in the order of a folder: labels, then file names
    Example('a dull film, "they" said', "neg"),
    Example("two lines\nand a second one", "neg"),
    Example("NA", "neg"),
    Example("caf\u00e9 au lait \U0001f600", "pos"),
    Example("  spaces  stay ", "pos"),
)
TEXTS = tuple(example.text for example in EXAMPLES if "\n" not in example.text)


def write_csv(path: Path, examples: tuple[Example, ...] = EXAMPLES, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerows([("id", "label", "text"), *((at, e.label, e.text) for at, e in enumerate(examples))])
    return path


def write_parquet(path: Path, text: object, label: object = None, row_group_size: int = 2) -> Path:
    columns = {"id": pa.array(range(len(text))), "text": text}  # type: ignore[arg-type]
    pq.write_table(
        pa.table(columns if label is None else {"label": label, **columns}), path, row_group_size=row_group_size
    )
    return path


def write_folder(path: Path, examples: tuple[Example, ...] = EXAMPLES) -> Path:
    for at, example in enumerate(examples):
        (path / str(example.label)).mkdir(parents=True, exist_ok=True)
        (path / str(example.label) / f"{at:03}.txt").write_text(example.text, encoding="utf-8", newline="")
    return path


def write_any(folder: Path, form: str, examples: tuple[Example, ...] = EXAMPLES) -> Path:
    """Write labelled examples in one of the forms that hold labels."""
    if form == "csv":
        return write_csv(folder / "reviews.csv", examples)
    if form == "folder":
        return write_folder(folder / "reviews", examples)
    texts, labels = pa.array([e.text for e in examples]), pa.array([e.label for e in examples])
    return write_parquet(folder / "reviews.parquet", texts, labels)


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, *parts: str, **options: object) -> None:
    """Check that opening is refused in one line that names the path and ``parts``."""
    with pytest.raises(InputError) as caught:
        open_corpus(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(part in message for part in parts), message


# --- what is read


@pytest.mark.parametrize("form", ["csv", "parquet", "folder"])
def test_every_labelled_form_gives_the_same_corpus(form: str, tmp_path: Path) -> None:
    path = write_any(tmp_path, form)
    corpus = open_corpus(path)
    assert recognises(path)
    assert tuple(corpus) == EXAMPLES
    assert tuple(corpus) == EXAMPLES  # again
    content = b"".join(json.dumps([e.label, e.text]).encode() + b"\n" for e in EXAMPLES)
    assert corpus == Corpus(
        path=path,
        labels=("neg", "pos"),
        counts={"neg": 3, "pos": 2},
        n_texts=5,
        n_words=5 + 6 + 1 + 4 + 2,
        n_left_out=0,
        fingerprint=hashlib.sha256(content).hexdigest()[:16],
    )


@pytest.mark.parametrize("form", ["txt", "csv", "parquet"])
def test_every_unlabelled_form_gives_the_same_texts(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{form}"
    if form == "txt":
        raw(path, ("\n\n" + "\r\n \t\n".join(TEXTS)).encode())
    elif form == "csv":
        raw(path, "\n".join(["text", *('"' + text.replace('"', '""') + '"' for text in TEXTS)]).encode())
    else:
        write_parquet(path, pa.array(TEXTS))
    corpus = open_corpus(path)
    assert list(corpus) == [Example(text, None) for text in TEXTS]
    assert (corpus.labels, corpus.counts, corpus.n_texts, corpus.n_left_out) == ((), {}, 4, 0)
    assert describe(corpus) == [f"{path}: 4 texts, 12 words", "classes: none"]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert list(open_corpus(raw(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n"))) == [("one", None), ("two", None)]
    assert tuple(open_corpus(write_csv(tmp_path / "a.csv", encoding="utf-8-sig"))) == EXAMPLES
    folder = write_folder(tmp_path / "reviews")
    raw(folder / "neg" / "000.txt", b"\xef\xbb\xbfdull")
    assert next(iter(open_corpus(folder))).text == "dull"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array(["0", "1", "1"]), ["0", "1", "1"]),
        (pa.array(["0", " 1", "1 "]).cast(pa.large_string()), ["0", "1", "1"]),
        (pa.array([0, 1, 1], pa.int8()), ["0", "1", "1"]),
        (pa.array(["0", "1", "1"]).dictionary_encode(), ["0", "1", "1"]),
        (pa.array([True, False, False]), ["True", "False", "False"]),
    ],
)
def test_parquet_labels_of_every_plain_type_become_text(labels: pa.Array, expected: list[str], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["x", "y", "z"]).cast(pa.large_string()), labels)
    assert [e.label for e in open_corpus(path)] == expected


def test_a_null_text_is_left_out_and_an_empty_label_column_counts_as_none(tmp_path: Path) -> None:
    corpus = open_corpus(write_parquet(tmp_path / "a.parquet", pa.array(["x", None, "y"]), pa.array(["0", None, "1"])))
    assert (list(corpus), corpus.n_left_out) == ([("x", "0"), ("y", "1")], 1)
    for path in (
        raw(tmp_path / "a.csv", b"text,label\nx,\ny, \n"),
        write_parquet(tmp_path / "a.parquet", pa.array(["x", "y"]), pa.nulls(2)),
    ):
        assert list(open_corpus(path)) == [("x", None), ("y", None)]


def test_other_files_in_a_folder_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "reviews")
    (folder / "unsup").mkdir()
    raw(folder / "README.txt", b"about")
    raw(folder / "pos" / "urls.lst", b"x")
    for hidden in (folder / ".cache", folder / "pos" / ".hidden"):
        hidden.mkdir()
        raw(hidden / "a.txt", b"hidden")
    raw(folder / "pos" / ".draft.txt", b"hidden")
    raw(folder / "pos" / "upper.TXT", b"last")
    corpus = open_corpus(folder)
    assert list(corpus) == [*EXAMPLES, ("last", "pos")]
    assert corpus.notes == (
        "not labels, left out: README.txt, unsup",
        "pos: 1 entries that are not .txt files left out",
    )


@pytest.mark.timeout(20)
def test_links_in_a_circle_do_not_hang(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "reviews")
    (folder / "pos" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    assert tuple(open_corpus(folder)) == EXAMPLES
    refused_link = folder / "pos" / "zzz.txt"
    refused_link.symlink_to(refused_link)
    with pytest.raises(InputError, match=r"zzz\.txt: cannot be read"):
        open_corpus(folder)
    refused_link.unlink()
    os.mkfifo(refused_link)  # reading it would wait for ever
    with pytest.raises(InputError, match=r"zzz\.txt: not a file but a pipe"):
        open_corpus(folder)
    refused(folder / "self", "no such file")


def test_recognises_known_formats_only(tmp_path: Path) -> None:
    (tmp_path / "one" / "pos").mkdir(parents=True)
    raw(tmp_path / "one" / "pos" / "a.txt", b"x")
    assert not any(map(recognises, (tmp_path / "one", tmp_path / "none.csv", raw(tmp_path / "a.json", b"[]"))))
    assert recognises(raw(tmp_path / "A.CSV", b"text\nx\n"))


# --- cleaning, and texts left out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", "plain words"),
        ("  a\t b\n\nc ", "a b c"),
        ("good \U0001f600\ufe0f film \u2764", "good film"),
        ("na\u00efve \u201cquote\u201d", "nave quote"),
        ("no\u00a0break\u2003space", "no break space"),
        ("\U0001f600\u2026\u00a0", ""),
    ],
)
def test_clean_text(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@pytest.mark.parametrize("form", ["csv", "parquet", "folder"])
def test_texts_that_are_empty_are_left_out_and_counted(form: str, tmp_path: Path) -> None:
    texts = ("\U0001f600", "fine", " \t", "caf\u00e9", "", "bad")
    path = write_any(tmp_path, form, tuple(Example(t, "ab"[at > 2]) for at, t in enumerate(texts)))
    as_is, cleaned = open_corpus(path), open_corpus(path, clean=True)
    assert list(as_is) == [("\U0001f600", "a"), ("fine", "a"), ("caf\u00e9", "b"), ("bad", "b")]
    assert as_is.n_left_out == 2
    assert list(cleaned) == [("fine", "a"), ("caf", "b"), ("bad", "b")]
    assert (cleaned.n_left_out, cleaned.n_texts, cleaned.n_words, cleaned.counts) == (3, 3, 3, {"a": 1, "b": 2})
    assert cleaned.notes == ("3 of 6 texts left out: empty, or empty after cleaning",)
    assert cleaned.fingerprint != as_is.fingerprint


# --- samples


def many(n: int = 400) -> tuple[Example, ...]:
    return tuple(Example(f"text {at}", "neg" if at < n // 4 else "pos") for at in range(n))


@pytest.mark.parametrize("form", ["csv", "parquet", "folder"])
def test_a_sample_is_the_same_in_every_form_and_keeps_order(form: str, tmp_path: Path) -> None:
    examples = many(60)
    corpus = open_corpus(write_any(tmp_path, form, examples), n_examples=20, seed=3)
    drawn = list(corpus)
    at = [examples.index(example) for example in drawn]
    assert at == sorted(set(at)) and len(at) == corpus.n_texts == 20
    assert list(corpus) == drawn
    assert drawn == list(open_corpus(write_csv(tmp_path / "b.csv", examples), n_examples=20, seed=3))
    assert corpus.counts == dict(sorted(Counter(e.label for e in drawn).items()))
    assert corpus.n_words == 40
    assert corpus.notes == ("a sample of 20 of 60 texts (seed 3)",)
    assert describe(corpus)[0].endswith(": 20 texts, 40 words")


def test_samples_are_uniform(tmp_path: Path) -> None:
    """Each text is drawn with probability 1/4: over 400 seeds, 100 times with SD sqrt(400 * 1/4 * 3/4) = 8.7."""
    path = write_csv(tmp_path / "a.csv", many(12))
    drawn = Counter(e.text for seed in range(400) for e in open_corpus(path, n_examples=3, seed=seed))
    counts = np.array([drawn[e.text] for e in many(12)])
    assert counts.sum() == 1200
    assert np.abs(counts - 100).max() < 4 * np.sqrt(75)


def test_other_seeds_and_sizes_have_other_fingerprints(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", many())
    sizes_and_seeds = ((None, 0), (9, 0), (9, 1), (10, 0))
    prints = [open_corpus(path, n_examples=n, seed=seed).fingerprint for n, seed in sizes_and_seeds]
    assert len(set(prints)) == 4
    assert open_corpus(path, clean=True).fingerprint == prints[0], "there was nothing to clean"


def test_a_sample_larger_than_the_corpus_is_all_of_it_with_a_note(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")
    whole = open_corpus(path)
    assert open_corpus(path, n_examples=5) == whole
    note = "6 examples requested, but there are 5: all are used"
    assert open_corpus(path, n_examples=6) == replace(whole, notes=(note,))


def test_a_sample_without_a_class_keeps_its_name_with_a_note(tmp_path: Path) -> None:
    examples = (*(Example(f"t{at}", "many") for at in range(99)), Example("rare", "one"))
    corpus = open_corpus(write_csv(tmp_path / "a.csv", examples), n_examples=1)
    assert (corpus.labels, corpus.counts) == (("many", "one"), {"many": 1, "one": 0})
    assert corpus.notes[-1] == "the sample contains no text of one; request more examples"
    assert describe(corpus)[1] == "classes: many 1 (100.0%), one 0 (0.0%)"


def test_empty_texts_do_not_count_for_a_sample(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.csv", b"id,text\n" + b"".join(b"%d,%s\n" % (n, b"x" * (n % 2)) for n in range(40)))
    corpus = open_corpus(path, n_examples=15)
    assert ([e.text for e in corpus], corpus.n_left_out) == (["x"] * 15, 20)


# --- streaming


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "csv", "parquet"])
def test_texts_are_not_kept_in_memory(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARQUET_ROWS", 20)
    path, n, length = tmp_path / f"a.{form}", 1000, 2000
    texts = [f"{at:4} " * (length // 5) for at in range(n)]
    if form == "parquet":
        write_parquet(path, pa.array(texts), row_group_size=20)
    else:
        path.write_text(("text\n" if form == "csv" else "") + "\n".join(texts))
    open_corpus(path, n_examples=1)  # what the libraries keep once
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    corpus = open_corpus(path, n_examples=n // 2)
    of_arrow = [pa.total_allocated_bytes() - before for _ in corpus]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(of_arrow) == n // 2
    assert peak + max(of_arrow) < n * length / 4


@pytest.mark.parametrize("form", ["csv", "parquet", "folder"])
def test_content_that_changes_after_opening_is_noticed(form: str, tmp_path: Path) -> None:
    corpus = open_corpus(write_any(tmp_path, form), n_examples=4)
    write_any(tmp_path, form, tuple(Example(e.text + "!", e.label) for e in EXAMPLES))
    with pytest.raises(InputError, match="has changed since it was opened"):
        list(corpus)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text to use: it is empty"),
        ("a.txt", b"\xef\xbb\xbf", "no text to use: it is empty"),
        ("a.csv", b"", "no text to use: it is empty"),
        ("a.csv", b"text,label\n", "no text to use"),
        ("a.parquet", b"", "cannot be read as Parquet"),
        ("a.txt", b"fine\nna\xefve\n", "line 2: byte 2 (0xef) is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfna\xefve\n", "line 1: byte 5 (0xef) is not UTF-8"),
        ("a.txt", b"fine\nzero\0\n", "line 2 contains a zero byte"),
        ("a.csv", b"review,stars\nx,1\n", "no column 'text'; its columns are review, stars"),
        ("a.csv", b"text;label\nx;1\n", "no column 'text'; its columns are text;label"),
        ("a.csv", b"text,text\nx,y\n", "2 columns are named 'text'"),
        ("a.csv", b"text,label,label\nx,0,1\n", "2 columns are named 'label'"),
        ("a.csv", b'text,label\n"a\nb",0\nx, y,1\n', "row 2 (line 4) has 3 values, the first row names 2"),
        ("a.csv", b"text,label\nx,0\ny\n", "row 2 (line 3) has 1 values"),
        ("a.csv", b'text,label\nx,0\n"y,1\n', "line 3: unexpected end of data"),
        ("a.csv", b'text,label\nx,0\n"y"z,1\n', "line 3: ',' expected"),
        ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", "line 2: field larger than field limit"),
        ("a.csv", b"text,label\r\nx,0\r\ncaf\xe9,1\r\n", "line 3: byte 3 (0xe9) is not UTF-8"),
        ("a.csv", "text,label\nx,0\n".encode("utf-16"), "line 1: byte 0 (0xff) is not UTF-8"),
        ("a.csv", "text,label\nx,0\n".encode("utf-16-le"), "line 1 contains a zero byte"),
        ("a.csv", b"text,label\nx,0\ny,\n", "row 2 (line 3) has no label, but '0' labels another"),
        ("a.csv", b"text,label\nx,\ny,0\n", "row 1 (line 2) has no label, but '0' labels another"),
        ("a.csv", b"text,label\nx,0\ny, 0\n", "all 2 texts have the label '0'"),
        (
            "a.csv",
            b"text,label\n" + b"".join(b"x,%d\n" % n for n in range(1001)),
            "more than 1000 different values, the last '1000'",
        ),
    ],
)
def test_malformed_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    refused(raw(tmp_path / name, content), message)


def test_options_that_leave_no_text_are_refused(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.txt", "\u00e9\n\u00e8\n".encode())
    refused(path, "all 2 texts are empty", clean=True)
    for n_examples in (0, -3):
        refused(path, f"{n_examples} examples requested", n_examples=n_examples)


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"review": ["x"]}, "no column 'text'; its columns are review"),
        ({"text": [1, 2]}, "column 'text' is int64; it must be text"),
        ({"text": [b"x"]}, "column 'text' is binary; it must be text"),
        ({"text": [["x"]]}, "column 'text' is list<"),
        ({"text": ["x", "y"], "label": [0.0, 1.0]}, "column 'label' is double; it must be text or whole numbers"),
        ({"text": ["x", "y"], "label": [0, None]}, "row 2 has no label, but '0' labels another"),
        ({"text": ["x", "y"], "label": [7, 7]}, "all 2 texts have the label '7'"),
        ({"text": ["", None]}, "all 2 texts are empty"),
        ({"text": pa.array([], pa.string())}, "no text to use"),
    ],
)
def test_wrong_parquet_columns_are_refused(columns: dict[str, list[object]], part: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", part)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"na\xefve"], pa.binary()).view(pa.string())
    refused(write_parquet(tmp_path / "a.parquet", text), "row 2: byte 2 is not UTF-8")
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(500)]}), path, write_page_checksum=False)
    content = path.read_bytes()
    for damaged in (content[:3], content[:100], content[:-1], content[:4] + b"\xff" * 56 + content[60:]):
        refused(raw(path, damaged), "cannot be read as Parquet")


def test_unknown_paths_and_folders_with_too_few_labels_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "none contains .txt files")
    refused(tmp_path / "none.csv", "no such file", ".parquet")
    refused(raw(tmp_path / "a.json", b"[]"), "no known format")
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", "no known format")
    folder = write_folder(tmp_path / "reviews", EXAMPLES[:2])
    refused(folder, "only 'neg' contains .txt files")
    (folder / "pos").mkdir()
    refused(folder, "only 'neg' contains .txt files")


def test_an_unreadable_file_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "reviews")
    bad = raw(folder / "pos" / "bad.txt", b"line\nna\xefve")
    with pytest.raises(InputError, match=r"pos/bad\.txt: byte 7 \(0xef\) is not UTF-8"):
        open_corpus(folder)
    bad.unlink()
    bad.mkdir()
    with pytest.raises(InputError, match=r"pos/bad\.txt: cannot be read"):
        open_corpus(folder)


def test_a_file_without_read_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by a stand-in, since no file is closed to root."""

    def deny(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    text, folder = raw(tmp_path / "a.txt", b"x"), write_folder(tmp_path / "reviews")
    monkeypatch.setattr(module.Path, "open", deny)
    monkeypatch.setattr(module.Path, "read_bytes", deny)
    refused(text, "cannot be read (Permission denied)")
    with pytest.raises(InputError, match=r"neg/000\.txt: cannot be read \(Permission denied\)"):
        open_corpus(folder)
    monkeypatch.setattr(module.Path, "iterdir", deny)
    refused(folder, "cannot be read (Permission denied)")


def test_a_file_that_was_deleted_after_opening_is_refused(tmp_path: Path) -> None:
    corpus, labelled = open_corpus(raw(tmp_path / "a.txt", b"x\n")), open_corpus(write_folder(tmp_path / "reviews"))
    corpus.path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(corpus)
    shutil.rmtree(labelled.path / "pos")
    with pytest.raises(InputError, match="has changed"):
        list(labelled)


# --- real texts
