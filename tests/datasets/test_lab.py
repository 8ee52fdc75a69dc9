"""The lab's format: what is read. What is refused is in ``test_malformed_lab`` and ``test_pickle_attacks``."""

import os
import pickle
import pickletools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_data import LabSequence, make_lab, pickle_as_lab
from make_pickles import as_text
from project import ROOT

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.lab import open_lab, read_transcripts
from bert_encoding.datasets.story import Dataset, Story, spoken_text

MODULES = (  # every spelling in use, typed by hand
    "ridge_utils.DataSequence",
    "utils_ridge.DataSequence",
    "encoding.ridge_utils.DataSequence",
    "neuro.data.data_sequence",
    "neuro1.data.data_sequence",
    "DataSequence",
)


def open_one(folder: Path, written: LabSequence) -> Story:
    """Write a data set of one story, and open it."""
    (folder / "raw_text.pkl").write_bytes(pickle_as_lab({"alpha": written}))
    (folder / "subject2").mkdir()
    np.save(folder / "subject2" / "alpha.npy", np.zeros((5, 3)))
    return open_lab(folder).stories["alpha"]


def sequence(words: list[str] | None = None) -> LabSequence:
    """A transcript of three words over twenty volumes."""
    words = ["i", "walked", "home"] if words is None else words
    return LabSequence(words, np.arange(len(words)) * 0.5 + 0.25, np.arange(20) * 2.0 - 9)


def _with_numpy_core(content: bytes) -> bytes:
    """Spell ``numpy._core`` as NumPy 1 did. FRAME opcodes go, since the new name is a byte shorter."""
    operations = list(pickletools.genops(content))
    parts = []
    for (opcode, value, at), (_, _, end) in zip(operations, [*operations[1:], (None, None, len(content))], strict=True):
        if isinstance(value, str) and value.startswith("numpy._core."):
            old = value.replace("numpy._core.", "numpy.core.")
            parts.append(f"c{old.replace(' ', chr(10))}\n".encode() if opcode.name == "GLOBAL" else as_text(old))
        elif opcode.name != "FRAME":
            parts.append(content[at:end])
    return b"".join(parts)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", MODULES)
def test_reads_every_spelling_protocol_and_numpy_1_and_2(module: str, protocol: int, tmp_path: Path) -> None:
    written, file = sequence(), tmp_path / "raw_text.pkl"
    new = pickle_as_lab({"alpha": written}, module, protocol)
    old = _with_numpy_core(new)
    assert (b"_frombuffer" in new) == (protocol == 5), "the form of the published pickles"
    assert (b"numpy._core." in new, b"numpy.core." in new) == (True, False)
    assert (b"numpy._core." in old, b"numpy.core." in old) == (False, True)
    for content in (new, old):
        file.write_bytes(content)
        read = read_transcripts(file)["alpha"]
        assert (read.data, read.data_times.dtype) == (["i", "walked", "home"], np.float64)
        np.testing.assert_array_equal(read.data_times, written.data_times)
        np.testing.assert_array_equal(read.tr_times, written.tr_times)


def test_plain_lists_and_numpy_scalars_are_read(tmp_path: Path) -> None:
    written = sequence()
    written.data_times, written.tr_times = list(written.data_times), [float(t) for t in written.tr_times]
    story = open_one(tmp_path, written)
    np.testing.assert_array_equal(story.word_times_s, [0.25, 0.75, 1.25])
    assert story.tr_times_s.dtype == np.float64


def test_reading_imports_none_of_the_labs_code(lab: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from bert_encoding.datasets import open_dataset\n"
        "data = open_dataset(Path(sys.argv[1]))\n"
        "modules = [n for n in sys.modules if 'ridge' in n or n.split('.')[-1] == 'DataSequence']\n"
        "print(len(data.stories), modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(lab)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "7 []\n", "")


def test_opens_stories_subjects_and_published_test(tmp_path: Path) -> None:
    folder = make_lab(tmp_path / "lab", subjects=("subject3", "subject2"))
    data = open_dataset(folder)
    assert data.source == str(folder)
    assert list(data.stories) == ["alpha", "beta", "delta", "epsilon", "gamma", "wheretheressmoke", "zeta"]
    assert data.subjects == ("subject2", "subject3")
    assert data.published_test == ("wheretheressmoke",)
    assert data.trim == (10, 5)
    for name, story in data.stories.items():
        assert {s: r.path for s, r in story.responses.items()} == {
            s: folder / s / f"{name}.npy" for s in ("subject2", "subject3")
        }


def test_empty_strings_and_stray_tags_keep_their_row(tmp_path: Path) -> None:
    words = ["so", "", "{cg}", "i", "{ns]", "(br}", "f{ns}", "ran", "."]
    story = open_one(tmp_path, sequence(words))
    assert story.words == tuple(words)
    assert len(story.words) == len(story.word_times_s) == 9
    assert story.spoken == ("so", "", "", "i", "", "", "f", "ran", "")


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        *((word, word) for word in ("walked", "don't", "o'clock", "1984", "café", "(well)")),  # four letters are no tag
        *((tag, "") for tag in ("", "   ", "{cg}", "{ns]", "(br}", "{LG}", "[sp]", "{br}{ls}", "...", "-", "'", "{")),
        *(("f{ns}", "f"), ("{ns}f", "f"), (" home ", "home")),
    ],
)
def test_spoken_text(written: str, spoken: str) -> None:
    assert spoken_text(written) == spoken


def test_what_is_not_a_lab_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    for name, message in (("nothing", "no such data"), ("file", "no known format"), ("folder", "no known format")):
        with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / name))}.*{message}"):
            open_dataset(tmp_path / name)


def test_responses_are_mapped_read_only(lab: Path) -> None:
    with open_dataset(lab).stories["alpha"].responses["subject2"].open() as responses:
        assert isinstance(responses, np.memmap)
        assert responses.mode == "r"
        np.testing.assert_array_equal(responses, np.load(lab / "subject2" / "alpha.npy"))
        with pytest.raises(ValueError, match="read-only"):
            responses[0, 0] = 1.0


def test_a_data_set_travels_as_paths(tmp_path: Path) -> None:
    folder = make_lab(tmp_path / "lab", n_voxels=5000)
    data = open_dataset(folder)
    on_disk = sum(file.stat().st_size for file in (folder / "subject2").glob("*.npy"))
    for story in data.stories.values():
        story.responses["subject2"].read(np.arange(5000)).sum()  # mapping a file must not put it into the object
    travels = pickle.dumps(data)
    assert len(travels) < 100_000 < on_disk / 10
    arrived: Dataset = pickle.loads(travels)  # noqa: S301  # our own bytes
    np.testing.assert_array_equal(
        arrived.stories["beta"].responses["subject2"].read(np.arange(5000)),
        np.load(folder / "subject2" / "beta.npy").astype(np.float32),
    )
