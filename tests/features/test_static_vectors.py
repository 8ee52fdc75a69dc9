"""Static word vectors, against gensim, and files that are none."""

import gzip
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.features.static_vectors import StaticVectors, coverage, read_static_vectors, static_vectors

SPOKEN = ("The", "house", "", "by", "the", "River,", "don't", "", "Nowhere")
WORDS = ("the", "river", "don't", "\u00e9t\u00e9", "New\u00a0York", ".", "house", "by")  # as files hold them
VECTORS = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float32)
HEADER = f"{len(WORDS)} {VECTORS.shape[1]}\n".encode()


@pytest.fixture(scope="module")
def keyed_vectors() -> Any:
    """Gensim's reader; the tests that need it are skipped where it is not installed."""
    return pytest.importorskip("gensim.models", reason="gensim (extra 'static') is not installed").KeyedVectors


@pytest.fixture
def file(tmp_path: Path, keyed_vectors: Any) -> Path:
    """A path in an empty folder, for a test that reads it with gensim."""
    return tmp_path / "vectors.txt"


def text_lines(space_at_end: bool = False, line_end: str = "\n") -> bytes:
    """``WORDS`` in text; nine digits give back every float32."""
    end = (" " if space_at_end else "") + line_end
    rows = (" ".join([word, *(f"{x:.9g}" for x in row)]) for word, row in zip(WORDS, VECTORS, strict=True))
    return "".join(row + end for row in rows).encode()


def packed(between: bytes) -> bytes:
    """``WORDS`` in binary; the first word2vec tool wrote a line feed between vectors, later ones do not."""
    return b"".join(
        word.encode() + b" " + row.astype("<f4").tobytes() + between for word, row in zip(WORDS, VECTORS, strict=True)
    )


FORMS = {  # form -> name, content
    "glove": ("a.txt", text_lines()),
    "glove, CRLF": ("a.txt", text_lines(line_end="\r\n")),
    "word2vec text": ("a.vec", HEADER + text_lines()),
    "word2vec text, spaces at ends": ("a.txt", HEADER + text_lines(space_at_end=True)),
    "word2vec text, no last line end": ("a.txt", (HEADER + text_lines())[:-1]),
    "word2vec binary": ("a.bin", HEADER + packed(b"")),
    "word2vec binary, line feeds": ("a.bin", HEADER + packed(b"\n")),
    "word2vec binary, other name": ("a.vectors", HEADER + packed(b"")),
}


def table(words: tuple[str, ...] = WORDS, vectors: np.ndarray = VECTORS) -> StaticVectors:
    return StaticVectors(Path("a.txt"), {word: row for row, word in enumerate(words)}, vectors)


def refused(path: Path, *parts: str, words: tuple[str, ...] = WORDS) -> None:
    """Check that reading is refused in one line that names the path and ``parts``."""
    with pytest.raises(InputError) as caught:
        read_static_vectors(path, set(words))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in parts:
        assert part in message, message


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- static vectors of a story


def test_static_vectors_are_those_of_the_table() -> None:
    vectors = static_vectors(SPOKEN, table())
    expected = np.zeros((len(SPOKEN), 5), np.float32)
    for row, word in enumerate(SPOKEN):
        if word.lower().rstrip(",") in WORDS:
            expected[row] = VECTORS[WORDS.index(word.lower().rstrip(","))]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected)
    assert (vectors != 0).any(axis=1).tolist() == [True, True, False, True, True, True, True, False, False]


def test_coverage_is_the_share_of_spoken_words() -> None:
    assert coverage(SPOKEN, table()) == pytest.approx(6 / 7, abs=1e-12)
    assert coverage(("zebra",), table()) == 0
    assert coverage(("", ""), table()) == 0


def test_no_word_known() -> None:
    with pytest.raises(InputError, match=r"a\.txt: has none of a story's words"):
        static_vectors(("zebra", ""), table())


# --- files of static vectors


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_gensim_reads(form: str, zipped: bool, tmp_path: Path, keyed_vectors: Any) -> None:
    name, content = FORMS[form]
    path = write(tmp_path / (name + ".gz" * zipped), gzip.compress(content) if zipped else content)
    requested = {"don't", "\u00e9t\u00e9", "house", "New\u00a0York", "zebra", ""}
    read = read_static_vectors(path, requested)
    if "glove" in form:  # with ``no_header`` gensim leaves a file open
        path = write(tmp_path / "b.txt", HEADER + content)
    reference = keyed_vectors.load_word2vec_format(str(path), binary="binary" in form)
    assert set(read.rows) == requested - {"zebra", ""}
    assert read.vectors.dtype == np.float32 and read.vectors.shape == (4, 5)
    for word, row in read.rows.items():
        np.testing.assert_array_equal(read.vectors[row], reference[word])
        np.testing.assert_array_equal(read.vectors[row], VECTORS[WORDS.index(word)])


def test_a_word_that_comes_twice_keeps_its_first_vector(file: Path) -> None:
    write(file, b"2 2\nthe 1 2\nthe 3 4\n")
    np.testing.assert_array_equal(read_static_vectors(file, {"the"}).vectors, np.array([[1, 2]], np.float32))


def test_binary_files_longer_than_a_chunk(file: Path) -> None:
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((3000, 250)).astype(np.float32)  # 3 MB
    rows = (f"w{number}".encode() + b" " + row.tobytes() for number, row in enumerate(vectors))
    write(file, b"3000 250\n" + b"".join(rows))
    read = read_static_vectors(file, {f"w{number}" for number in range(3000)})
    np.testing.assert_array_equal(read.vectors[[read.rows[f"w{number}"] for number in range(3000)]], vectors)


@pytest.mark.parametrize("binary", [False, True])
def test_only_the_words_asked_for_are_held(binary: bool, file: Path) -> None:
    n, n_dims = 10_000, 200
    row = np.full(n_dims, 1.25, np.float32)  # 8 MB in all, however written
    end = row.tobytes() if binary else b" ".join([b"1.25"] * n_dims) + b"\n"
    write(file, b"%d %d\n" % (n, n_dims) + b"".join(b"w%d " % number + end for number in range(n)))
    read_static_vectors(file, {"w0"})
    tracemalloc.start()
    read = read_static_vectors(file, {"w1", "w9999", "other"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.rows == {"w1": 0, "w9999": 1} and read.vectors.shape == (2, n_dims)
    assert peak < 4e6


def test_nothing_is_left_in_the_temporary_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    write(file, text_lines())
    assert read_static_vectors(file, {"the"}).rows == {"the": 0}
    write(file, text_lines().replace(b"by ", b"by x"))
    refused(file)
    assert list(temporary.iterdir()) == []
    temporary.rmdir()
    refused(write(file, text_lines()), "no temporary file", "TMPDIR")


def test_without_gensim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gensim", None)
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    refused(write(tmp_path / "a.txt", text_lines()), "pip install 'bert-encoding-study[static]'")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "the file is empty"),
        (b"\n", "line 1 is neither a header"),
        (b"the\n", "line 1 is neither a header"),
        (b"the\t1\t2\n", "line 1 is neither a header"),
        (b"once upon a time\n", "line 1: 'once' has 'upon' among its numbers"),
        (b"the 1\n", "line 1: the header 'the 1' must be two whole numbers"),
        (b"2 -3\nthe 1 2\n", "line 1: the header '2 -3'"),
        (b"2 2.5\nthe 1 2\n", "line 1: the header '2 2.5'"),
        (b"0 3\n", "a header of 0 vectors with 3 dimensions"),
        (b"3 0\n", "a header of 3 vectors with 0 dimensions"),
        (b"3 999999999\nthe 1\n", "a header of 3 vectors with 999999999 dimensions"),
        (b"2 2\nthe 1 2\n", "its header says 2 vectors, it holds 1"),
        (b"1 2\nthe 1 2\nby 3 4\n", "its header says 1 vectors, it holds 2"),
        (b"2 3\nthe 1 2\nby 3 4\n", "line 2: 'the' has 2 numbers, expected 3"),
        (b"2 2\nthe 1 2\nby 3 4 5\n", "line 3: 'by' has 3 numbers, expected 2"),
        (b"the 1 2\nby 3\n", "line 2: 'by' has 1 numbers, expected 2"),
        (b"the 1 2\nunasked 3 4 5\n", "line 2: 'unasked' has 3 numbers, expected 2"),
        (b"the 1 2\n\nby 3 x4\n", "line 3: 'by' has 'x4' among its numbers"),
        (b"the 1 2\nby 3 \xff\n", "line 2: 'by' has '\ufffd' among its numbers"),
        (b"the 1 2\nby nan 4\n", "line 2: 'by' has the value nan"),
        (b"the 1 2\nby 3 -inf\n", "line 2: 'by' has the value -inf"),
        (b"the 1 2\nby 3 1e50\n", "line 2: 'by' has the value inf"),
        (b"zebra 1 2\n", "has none of the 8 words"),
        (b"the " + b"1" * 2**20, "line 1"),
        (b"the 1 2\nby " + b"1 " * 2**20, "line 2 is longer than 1048576 bytes"),
        (pickle.dumps({"the": 1}), "a Python pickle, which could run code and is never loaded"),
        (b"PK\x03\x04rest", "a zip archive; unpack it"),
        (b"\x93NUMPY\x01\x00rest", "a NumPy array without words"),
        (bytes(range(256)) * 9, "line 1 is neither a header"),
        (gzip.compress(text_lines())[:-20], "damaged gzip file"),
        (b"\x1f\x8b" + b"rest of nothing", "damaged gzip file"),
    ],
)
def test_bad_text(content: bytes, part: str, file: Path) -> None:
    refused(write(file, content), part)


def test_bad_bytes_inside_gzip(file: Path) -> None:
    content = bytearray(gzip.compress(text_lines() * 50, mtime=0))
    content[30:60] = bytes(30)
    refused(write(file, bytes(content)), "damaged gzip file")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ((HEADER + packed(b""))[:-1], "it ends in vector 8 of 8"),
        ((HEADER + packed(b""))[:20], "it ends in vector 1 of 8"),
        (HEADER.replace(b"8", b"9") + packed(b"\n"), "it ends in vector 9 of 9"),
        (HEADER.replace(b"8", b"7") + packed(b""), "its header says 7 vectors, but more follows"),
        (HEADER + b"\0" * 10_000, "vector 1 has no word"),
        (packed(b""), "line 1 is neither a header"),
        (b"1 2\nthe " + np.array([np.nan, 1], "<f4").tobytes(), "vector 1: 'the' has the value nan"),
    ],
)
def test_bad_binary(content: bytes, part: str, tmp_path: Path, keyed_vectors: Any) -> None:
    refused(write(tmp_path / "a.bin", content), part)


def test_no_such_file(tmp_path: Path, keyed_vectors: Any) -> None:
    refused(tmp_path / "none.txt", "no such file")
    refused(tmp_path, "not a file")


def test_no_right_to_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by a stand-in, since no file is closed to root."""

    def deny(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    write(file, text_lines())
    monkeypatch.setattr("bert_encoding.features.static_vectors.Path.open", deny)
    refused(file, "cannot be read (Permission denied)")


def test_surrogates_in_a_word_do_no_harm(file: Path) -> None:
    assert read_static_vectors(write(file, text_lines()), {"the", "\udcff"}).rows == {"the": 0}
