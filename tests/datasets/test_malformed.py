"""Data sets with one thing wrong: a study and the check refuse each of them in words, and write nothing into it.

Each case makes one change to a good data set. ``study/run.py --dry-run`` must end with exit code 2 and one line that
names the file or the folder, the story where there is one, and the value; ``python -m bert_encoding check`` must end
with exit code 2 and name the same. Attacks on the unpickler are here too; random ones are in ``test_fuzz_pickle.py``.
"""

import json
import os
import pickle
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from make_data import LabSequence, edit_responses, edit_text, make_lab, make_tiny_bert
from make_lebel import DIALECTS, make_lebel
from nobody import open_to_all, run_as_nobody

import bert_encoding.__main__ as commands
import bert_encoding.analyses.data_report
from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset, safe_pickle
from bert_encoding.datasets.lab import read_transcripts
from study import run

pytestmark = pytest.mark.usefixtures("no_ray")

STORY = "beta"  # the story that is changed


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    error: str


class Case(NamedTuple):
    """One change, and what must be said of it.

    Attributes
    ----------
    change : takes the folder of the data
    said : what each of the messages holds; ``{data}`` is the folder
    """

    change: Callable[[Path], object]
    said: tuple[str, ...]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``check`` puts its figure under the current folder; to draw it takes longer than all else here."""
    monkeypatch.setattr(bert_encoding.analyses.data_report, "draw_lags", lambda report, file: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def study(data: Path, model: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Ended:
    """Plan a study, as ``study/run.py --dry-run`` does."""
    out = str(Path.cwd() / "out")
    capsys.readouterr()
    arguments = ["--dry-run", "--space", "smoke", "--data", str(data), "--model", str(model), "--out", out, *options]
    return Ended(run_app(run.app, arguments), *capsys.readouterr())


def check(data: Path, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Check a folder, as ``python -m bert_encoding check`` does."""
    capsys.readouterr()
    return Ended(run_app(commands.app, ["check", str(data)]), *capsys.readouterr())


def content(folder: Path) -> dict[str, object]:
    """Return everything in a folder: the bytes of files, where links lead, and what else there is."""

    def of(path: Path) -> object:
        if path.is_symlink():
            return path.readlink()
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(path.relative_to(folder)): of(path) for path in sorted(folder.rglob("*"))}


def assert_refused(ended: Ended, said: tuple[str, ...]) -> None:
    """Assert that a study ended with exit code 2 and one line that holds what it should."""
    assert ended.code == 2, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.error), ended.error
    assert ended.out == "", "nothing may look like a plan"
    for part in said:
        assert part in ended.error


def assert_not_usable(ended: Ended, said: tuple[str, ...]) -> None:
    """Assert that a check ended with exit code 2 and said why: in its verdict, or in one line of error."""
    assert ended.code == 2, ended
    lines = ended.out.splitlines()
    if ended.error:
        assert re.fullmatch(r"error: [^\n]+\n", ended.error), ended.error
        assert "verdict" not in ended.out
        because = ended.error
    else:
        assert "verdict: not usable" in lines
        because = "\n".join(line for line in lines if line.startswith("  because "))
    assert "Traceback" not in ended.out + ended.error
    for part in said:
        assert part in because


def assert_both_refuse(case: Case, data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.change(data)
    before = content(data)
    said = tuple(part.replace("{data}", str(data)) for part in case.said)
    assert_refused(study(data, model, capsys), said)
    assert not Path("out").exists()
    assert_not_usable(check(data, capsys), said)
    assert content(data) == before, "the data are not ours to change"


# --- what is changed --------------------------------------------------------------------------------------------------


def npy(edit: Callable[[np.ndarray], np.ndarray], story: str = STORY) -> Callable[[Path], object]:
    """Return a change of the responses to one story, in the lab's format."""
    return lambda data: edit_responses(data, story, edit)


def raw(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Return a change of the bytes of a file."""
    return lambda data: (data / name).write_bytes(edit((data / name).read_bytes()))


def npy_header(text: str) -> Callable[[Path], object]:
    """Return a change of the header of a ``.npy`` file."""
    head = text.encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    return raw("subject2/beta.npy", lambda old: content + old[128:])


def every_story(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    def change(data: Path) -> None:
        for file in (data / "subject2").iterdir():
            np.save(file, edit(np.load(file)))

    return change


def text(edit: Callable[[LabSequence], object]) -> Callable[[Path], object]:
    """Return a change of one transcript, in the lab's format."""
    return lambda data: edit_text(data, STORY, edit)


def setting(attribute: str, at: int, value: object) -> Callable[[Path], object]:
    """Return a change of one word or one time."""
    return text(lambda story: getattr(story, attribute).__setitem__(at, value))


def replacing(attribute: str, make: Callable[[Any], object]) -> Callable[[Path], object]:
    """Return a change of all words or all times."""
    return text(lambda story: setattr(story, attribute, make(getattr(story, attribute))))


def an_archive(data: Path) -> None:
    with (data / "subject2" / "beta.npy").open("wb") as file:
        np.savez(file, np.zeros((40, 12)))


def named_otherwise(name: str) -> Callable[[Path], object]:
    return lambda data: (data / "subject2" / "beta.npy").rename(data / "subject2" / f"{name}.npy")


def hf5(edit: Callable[[h5py.File, np.ndarray, Path], object]) -> Callable[[Path], object]:
    """Return a change of the responses to one story, in the format of ds003020: the file is written anew."""

    def change(data: Path) -> None:
        file = data / HF5
        with h5py.File(file) as old:
            rows = old["data"][:]
        with h5py.File(file, "w") as new:
            edit(new, rows, data)

    return change


def _external(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    (data.parent / "raw.bin").write_bytes(rows.tobytes())
    file.create_dataset("data", rows.shape, "f8", external=[(str(data.parent / "raw.bin"), 0, rows.nbytes)])


def _other_file(data: Path, rows: np.ndarray) -> Path:
    with h5py.File(data.parent / "other.hf5", "w") as other:
        other["data"] = rows
    return data.parent / "other.hf5"


def _external_link(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file["data"] = h5py.ExternalLink(str(_other_file(data, rows)), "data")


def _soft_link(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file["elsewhere"] = rows
    file["data"] = h5py.SoftLink("/elsewhere")


def _virtual(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    layout = h5py.VirtualLayout(rows.shape, "f8")
    layout[:] = h5py.VirtualSource(str(_other_file(data, rows)), "data", rows.shape)
    file.create_virtual_dataset("data", layout)


def _compound(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file["data"] = np.zeros(rows.shape, [("a", "f4"), ("b", "f4")])


def _texts(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file.create_dataset("data", data=rows.astype(str).astype(object), dtype=h5py.string_dtype())


def _empty_dataset(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file["data"] = h5py.Empty("f8")


def hf5_rows(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return hf5(lambda file, rows, _: file.create_dataset("data", data=edit(rows)))


def lengths(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return a change of ``respdict.json``."""

    def change(data: Path) -> None:
        volumes = json.loads((data / LENGTHS).read_text())
        edit(volumes)
        (data / LENGTHS).write_text(json.dumps(volumes))

    return change


def grid(content: bytes) -> Callable[[Path], object]:
    return lambda data: (data / GRID).write_bytes(content)


def words(*rows: tuple[float, float, str], dialect: str = "short") -> bytes:
    """Return a TextGrid with one phone and some words."""
    return DIALECTS[dialect]([("phone", [(0.0, 90.0, "AH0")]), ("word", list(rows))]).encode()


def linked_to_itself(name: str) -> Callable[[Path], object]:
    def change(data: Path) -> None:
        path = data / name
        if path.is_dir():
            path.rename(data.parent / "moved away")
        else:
            path.unlink()
        path.symlink_to(path.name)

    return change


def a_file_instead(data: Path) -> None:
    (data / "subject2").rename(data.parent / "moved away")
    (data / "subject2").write_text("not a folder\n")


def a_pipe(name: str) -> Callable[[Path], object]:
    def change(data: Path) -> None:
        (data / name).unlink()
        os.mkfifo(data / name)

    return change


def with_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda data: (data / name).write_text(text)


HF5 = "derivative/preprocessed_data/UTS03/beta.hf5"
GRID = "derivative/TextGrids/beta.TextGrid"
LENGTHS = "derivative/respdict.json"
NPY = "{data}/subject2/beta.npy"
TEXT = "{data}/raw_text.pkl"
LAB_ROWS = (NPY, "story beta, subject subject2: ")
MAKE_40 = "its 55 TR times less 15 trimmed make 40; text and responses must belong to the same cut"
NUMBERS = "expected numbers (rows, voxels)"
LEBEL_ROWS = ("{data}/" + HF5, "story beta", "subject UTS03")
LEBEL_GRID = "{data}/" + GRID
LEBEL_LENGTHS = "{data}/" + LENGTHS
LAB_STORY = ("{data}", "story beta")

RESPONSES = {
    "an extra TR": Case(npy(lambda y: np.vstack([y, y[:1]])), (*LAB_ROWS, f"has 41 rows; {MAKE_40}")),
    "one TR less": Case(npy(lambda y: y[1:]), (*LAB_ROWS, f"has 39 rows; {MAKE_40}")),
    "no rows": Case(npy(lambda y: y[:0]), (*LAB_ROWS, f"has 0 rows; {MAKE_40}")),
    "no voxels": Case(npy(lambda y: y[:, :0]), (*LAB_ROWS, "has 0 voxels", "have 12")),
    "transposed": Case(
        npy(lambda y: y.T),
        (*LAB_ROWS, "has 12 rows and 40 columns; its 55 TR times less 15 trimmed make 40: it looks transposed; save ("),
    ),
    "another number of voxels": Case(
        npy(lambda y: y[:, :-1]), (*LAB_ROWS, "has 11 voxels, other stories of subject2 have 12; all must agree")
    ),
    "one dimension": Case(npy(lambda y: y[:, 0]), (*LAB_ROWS, "shape (40,)", NUMBERS)),
    "three dimensions": Case(npy(lambda y: y[None]), (*LAB_ROWS, "shape (1, 40, 12)")),
    "no dimension": Case(npy(lambda y: y[0, 0]), (*LAB_ROWS, "shape ()")),
    "no dimension, beside regions": Case(
        lambda data: (npy(lambda y: y[0, 0], "alpha")(data), with_file("subject2/rois.json", '{"V1": [3]}')(data)),
        ("{data}/subject2/rois.json: region V1: no voxel 3",),
    ),
    "texts": Case(npy(lambda y: y.astype("U8")), (*LAB_ROWS, "is <U8", NUMBERS)),
    "complex": Case(npy(lambda y: y * 1j), (*LAB_ROWS, "is complex128", NUMBERS)),
    "true and false": Case(npy(lambda y: y > 0), (*LAB_ROWS, "is bool", NUMBERS)),
    "dates": Case(npy(lambda y: y.astype("i8").astype("M8[s]")), (*LAB_ROWS, "datetime64")),
    "objects": Case(npy(lambda y: y.astype(object)), (NPY, "not a readable .npy array", "Python objects")),
    "cut short": Case(raw("subject2/beta.npy", lambda b: b[:-100]), (NPY, "not a readable .npy array")),
    "its header cut short": Case(raw("subject2/beta.npy", lambda b: b[:50]), (NPY, "not a readable .npy array")),
    "a bare pickle": Case(raw("subject2/beta.npy", lambda b: pickle.dumps([1.0])), (NPY, "not a readable .npy array")),
    "an archive": Case(an_archive, (NPY, "an archive of several")),
    "text instead of an array": Case(raw("subject2/beta.npy", lambda b: b"0.1, 0.2\n"), (NPY, "not a readable .npy")),
    "an empty npy": Case(raw("subject2/beta.npy", lambda b: b""), (NPY, "not a readable .npy")),
    "a negative shape": Case(npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-40, 12)}"), (NPY, "npy")),
    "a shape beyond all memory": Case(
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 12)}"), (NPY, "npy")
    ),
    "a shape beyond all numbers": Case(
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (10**9, 1%s)}" % ("0" * 40)), (NPY, "npy")
    ),
    "a shape of forty digits": Case(
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1%s, 12)}" % ("0" * 40)), (NPY, "npy")
    ),
    "a header that is no Python": Case(npy_header("{'descr': ((((((((((('''"), (NPY, "npy")),
    "a header of brackets": Case(npy_header("(" * 110), (NPY, "npy")),
    "a dtype of no size": Case(npy_header("{'descr': '|V0', 'fortran_order': False, 'shape': (40, 12)}"), (NPY,)),
    "nothing finite in a story": Case(
        npy(lambda y: y * np.nan), (*LAB_ROWS, "has no finite voxel; leave the story out or mend the file")
    ),
    "infinite": Case(npy(lambda y: y * np.inf), (*LAB_ROWS, "has no finite voxel")),
    "beyond float32": Case(npy(lambda y: y * 1e300), (*LAB_ROWS, "has no finite voxel")),
    "every voxel NaN somewhere": Case(
        every_story(lambda y: np.where(np.arange(len(y))[:, None] == 3, np.nan, y)),
        ("{data}", "subject2", "has no finite voxel"),
    ),
    "every voxel constant": Case(
        every_story(lambda y: np.full_like(y, 0.5)),
        ("{data}/subject2/alpha.npy: story alpha, subject subject2: has no voxel that is finite and varies",),
    ),
    "constant in one story": Case(
        npy(lambda y: np.full_like(y, 7.0)), (*LAB_ROWS, "has no voxel that is finite and varies")
    ),
    "without text": Case(named_otherwise("unheard"), ("{data}/subject2/unheard.npy: story unheard has no text",)),
    "a trailing space": Case(named_otherwise("beta "), ("{data}/subject2/beta .npy: story 'beta ' has no text",)),
    "another case": Case(named_otherwise("Beta"), ("{data}/subject2/Beta.npy: story Beta has no text",)),
    "a name with a line break": Case(named_otherwise("be\nta"), ("{data}/subject2/be ta.npy: story 'be\\nta' has no",)),
    "a name that is no UTF-8": Case(
        lambda data: (data / "subject2/beta.npy").rename(data / "subject2" / os.fsdecode(b"\xff.npy")),
        (r"{data}/subject2: the name '\udcff.npy' in it is not UTF-8",),
    ),
    "a link to itself": Case(linked_to_itself("subject2/beta.npy"), (NPY, "symbolic links")),
    "a link to nothing": Case(
        lambda data: (
            (linked_to_itself("subject2/beta.npy")(data), (data / "subject2/beta.npy").unlink())
            and (data / "subject2/beta.npy").symlink_to("nowhere")
        ),
        (NPY, "no such file"),
    ),
    "a pipe": Case(a_pipe("subject2/beta.npy"), (NPY, "not a file but a pipe")),
    "a folder of that name": Case(
        lambda data: ((data / "subject2/beta.npy").unlink(), (data / "subject2/beta.npy").mkdir()),
        (NPY, "not a readable .npy array", "directory"),
    ),
    "a subject that links to itself": Case(linked_to_itself("subject2"), ("{data}: no responses", "<subject>/<story>")),
    "a subject whose name is no UTF-8": Case(
        lambda data: (data / "subject2").rename(data / os.fsdecode(b"\xff")),
        (r"{data}: the name '\udcff' in it is not UTF-8",),
    ),
    "a subject that is a file": Case(a_file_instead, ("{data}: no responses", "<subject>/<story>.npy")),
}

TEXTS = {
    "no words": Case(
        text(lambda s: (setattr(s, "data", []), setattr(s, "data_times", np.zeros(0)))),
        (*LAB_STORY, "has no spoken word"),
    ),
    "tags and marks alone": Case(
        replacing("data", lambda w: [("{cg}", "", "...", "(br}")[at % 4] for at in range(len(w))]),
        (*LAB_STORY, "has no spoken word"),
    ),
    "a NaN word time": Case(setting("data_times", 5, np.nan), (*LAB_STORY, "non-finite word times")),
    "an infinite word time": Case(setting("data_times", 5, np.inf), (*LAB_STORY, "non-finite word times")),
    "a NaN TR time": Case(setting("tr_times", 5, np.nan), (*LAB_STORY, "non-finite TR times")),
    "words long before the scan": Case(
        replacing("data_times", lambda t: t - 1e6), (*LAB_STORY, "100% of its words lie outside the scan")
    ),
    "times in milliseconds": Case(replacing("data_times", lambda t: t * 1000), (*LAB_STORY, "lie outside the scan")),
    "a word before the last": Case(
        setting("data_times", 20, -4.0), (*LAB_STORY, "word times must not decrease", "word 20 (-4 s)", "word 19 (")
    ),
    "words in disorder": Case(setting("data_times", 5, 50.0), (*LAB_STORY, "word 5 (50 s)", "word 6")),
    "TRs that decrease": Case(replacing("tr_times", lambda t: t[::-1]), (*LAB_STORY, "TR times must not decrease")),
    "a TR before the last": Case(
        setting("tr_times", 4, -20.0), (*LAB_STORY, "TR times must not decrease", "TR 4 (-20 s)", "TR 3 (-3 s)")
    ),
    "a TR too late": Case(setting("tr_times", 4, -0.5), (*LAB_STORY, "TR times must be evenly spaced")),
    "two TRs at once": Case(setting("tr_times", 4, -3.0), (*LAB_STORY, "TR times must be evenly spaced")),
    "TRs all at once": Case(replacing("tr_times", lambda t: t * 0), (*LAB_STORY, "TR times must be evenly spaced")),
    "a TR left out": Case(
        replacing("tr_times", lambda t: np.delete(t, 9)), (*LAB_STORY, "TR times must be evenly spaced")
    ),
    "no TRs": Case(replacing("tr_times", lambda t: t[:0]), (*LAB_STORY, "TR times must be evenly spaced")),
    "no more TRs than are trimmed": Case(replacing("tr_times", lambda t: t[:12]), LAB_STORY),
    "fewer times than words": Case(
        replacing("data_times", lambda t: t[:-1]), (*LAB_STORY, "has 157 words but 156 word times")
    ),
    "fewer words than times": Case(replacing("data", lambda w: w[1:]), (*LAB_STORY, "156 words but 157 word times")),
    "a word that is a number": Case(setting("data", 5, 7), (TEXT, "story beta", "word 5 is int")),
    "a word that is bytes": Case(setting("data", 5, b"the"), (TEXT, "story beta", "word 5 is bytes")),
    "a word that is NaN": Case(setting("data", 5, float("nan")), (TEXT, "story beta", "word 5 is float")),
    "lists of words": Case(
        replacing("data", lambda w: [w[:9], w[9:]]), (TEXT, "story beta", "word 0 is list, expected text")
    ),
    "nothing for words": Case(replacing("data", lambda w: None), (TEXT, "story beta", "NoneType")),
    "a number for words": Case(replacing("data", lambda w: 5), (TEXT, "story beta", "int")),
    "one text": Case(replacing("data", " ".join), (TEXT, "story beta", "its words are str, expected a list")),
    "half a character": Case(setting("data", 5, "wo\ud83d"), (TEXT, "story beta", r"word 5 ('wo\ud83d')")),
    "times as texts": Case(
        replacing("data_times", lambda t: [str(v) for v in t]),
        (TEXT, "story beta", "word times are not numbers: number 0 is '"),
    ),
    "times as an array of texts": Case(
        replacing("data_times", lambda t: t.astype("U9")), (TEXT, "story beta", "word times are not numbers but <U9")
    ),
    "complex times": Case(replacing("tr_times", lambda t: t + 0j), (TEXT, "refused: ", "complex128")),
    "no time at all": Case(replacing("data_times", lambda t: None), (TEXT, "story beta", "word times have shape ()")),
    "a time that is none": Case(
        replacing("data_times", lambda t: [None, *t[1:]]),
        (TEXT, "story beta", "word times are not numbers: number 0 is of type NoneType"),
    ),
    "a time beyond all numbers": Case(
        replacing("data_times", lambda t: [10**400, *t[1:].tolist()]),
        (TEXT, "story beta", "word times are not numbers"),
    ),
    "one time": Case(replacing("tr_times", lambda t: 3.0), (TEXT, "story beta", "TR times have shape ()")),
    "TR times as texts": Case(
        replacing("tr_times", lambda t: ["x"]), (TEXT, "story beta", "TR times are not numbers: number 0 is '")
    ),
    "times in columns": Case(replacing("data_times", lambda t: t[:, None]), (TEXT, "story beta", "shape (157, 1)")),
    "lists of times": Case(
        replacing("tr_times", lambda t: [t.tolist(), t.tolist()]),
        (TEXT, "story beta", "TR times are not numbers: number 0 is of type list"),
    ),
    "regions beyond the voxels": Case(
        with_file("subject2/rois.json", '{"V1": [3, 12]}'),
        ("{data}/subject2/rois.json: region V1: no voxel 12", "0 to 11"),
    ),
    "regions beyond all numbers": Case(
        with_file("rois.json", '{"V1": [1%s]}' % ("0" * 30)), ("{data}/rois.json: region V1",)
    ),
    "regions a hundred thousand deep": Case(with_file("rois.json", "[" * 100_000), ("{data}/rois.json: not readable",)),
}

PICKLES = {
    "an empty file": Case(raw("raw_text.pkl", lambda b: b""), (TEXT, "refused: ")),
    "not a pickle": Case(raw("raw_text.pkl", lambda b: b"once upon a time"), (TEXT, "refused: ")),
    "half of it": Case(raw("raw_text.pkl", lambda b: b[: len(b) // 2]), (TEXT, "refused: ")),
    "a dict without stories": Case(raw("raw_text.pkl", lambda b: pickle.dumps({})), (TEXT, "dict of stories")),
    "a list": Case(raw("raw_text.pkl", lambda b: pickle.dumps([1])), (TEXT, "dict of stories, found list")),
    "os.system": Case(
        raw("raw_text.pkl", lambda b: b"cos\nsystem\n(S'touch canary'\ntR."), (TEXT, "it asks for os.system")
    ),
    "a story's name half a character": Case(
        raw("raw_text.pkl", lambda b: b.replace(b"zeta", b"z\xed\xa0\xbd")), (TEXT, r"story 'z\ud", "half a character")
    ),
}

HDF5 = {
    "cut short": Case(raw(HF5, lambda b: b[: len(b) // 2]), ("{data}/" + HF5, "not a readable HDF5 file")),
    "its end alone cut off": Case(raw(HF5, lambda b: b[:-8]), ("{data}/" + HF5,)),
    "empty": Case(raw(HF5, lambda b: b""), ("{data}/" + HF5, "not a readable HDF5 file")),
    "garbage": Case(raw(HF5, lambda b: bytes(range(256)) * 9), ("{data}/" + HF5, "not a readable HDF5 file")),
    "its directory overwritten": Case(
        raw(HF5, lambda b: b.replace(b"SNOD", b"\0\0\0\0").replace(b"TREE", b"\0\0\0\0")),
        ("{data}/" + HF5, "cannot be read"),
    ),
    "another key": Case(
        hf5(lambda file, rows, _: file.create_dataset("zdata", data=rows)),
        ("{data}/" + HF5, "no data set 'data'; it holds zdata"),
    ),
    "no key": Case(hf5(lambda file, rows, _: None), ("{data}/" + HF5, "no data set 'data'; it holds nothing")),
    "a group": Case(
        hf5(lambda file, rows, _: file.create_dataset("data/rows", data=rows)),
        ("{data}/" + HF5, "'data' is a group, expected an array"),
    ),
    "a named type": Case(
        hf5(lambda file, rows, _: file.__setitem__("data", np.dtype("f8"))),
        ("{data}/" + HF5, "'data' is a datatype, expected an array"),
    ),
    "an external link": Case(hf5(_external_link), ("{data}/" + HF5, "'data' is a link to somewhere else")),
    "a soft link": Case(hf5(_soft_link), ("{data}/" + HF5, "'data' is a link to somewhere else")),
    "external storage": Case(hf5(_external), ("{data}/" + HF5, "'data' keeps its values in other files")),
    "a virtual data set": Case(hf5(_virtual), ("{data}/" + HF5, "'data' keeps its values in other files")),
    "structures": Case(hf5(_compound), (*LEBEL_ROWS, "'a'")),
    "texts": Case(hf5(_texts), (*LEBEL_ROWS, "object")),
    "without a shape": Case(hf5(_empty_dataset), ("{data}/" + HF5, "without a shape")),
    "transposed": Case(hf5_rows(lambda y: y.T), (*LEBEL_ROWS, "has 12 rows and 40 columns", "transposed")),
    "an extra TR": Case(hf5_rows(lambda y: np.vstack([y, y[:1]])), (*LEBEL_ROWS, "has 41 rows", "make 40")),
    "one TR less": Case(hf5_rows(lambda y: y[:-1]), (*LEBEL_ROWS, "has 39 rows", "make 40")),
    "another number of voxels": Case(hf5_rows(lambda y: y[:, :5]), (*LEBEL_ROWS, "has 5 voxels", "have 12")),
    "one dimension": Case(hf5_rows(lambda y: y[:, 0]), (*LEBEL_ROWS, "shape (40,)")),
    "nothing finite": Case(hf5_rows(lambda y: y * np.nan), (*LEBEL_ROWS, "has no finite voxel")),
    "a pipe": Case(a_pipe(HF5), ("{data}/" + HF5, "not a file but a pipe")),
    "without text": Case(
        lambda data: (data / HF5).rename((data / HF5).with_name("unheard.hf5")),
        ("preprocessed_data/UTS03/unheard.hf5", "story unheard has no text"),
    ),
    "another case": Case(
        lambda data: (data / HF5).rename((data / HF5).with_name("Beta.hf5")),
        ("preprocessed_data/UTS03/Beta.hf5", "story Beta has no text"),
    ),
    "a trailing space": Case(
        lambda data: (data / HF5).rename((data / HF5).with_name("beta .hf5")),
        ("preprocessed_data/UTS03/beta .hf5", "story 'beta ' has no text"),
    ),
    "a name that is no UTF-8": Case(
        lambda data: (data / HF5).rename((data / HF5).with_name(os.fsdecode(b"\xff.hf5"))),
        (r"preprocessed_data/UTS03: the name '\udcff.hf5' in it is not UTF-8",),
    ),
}

GRIDS = {
    "words that overlap": Case(
        grid(words((1.0, 3.0, "a"), (2.0, 4.0, "b"))), (LEBEL_GRID, "interval 2 ('b', 2 to 4 s) overlaps interval 1")
    ),
    "cut short": Case(raw(GRID, lambda b: b[: len(b) // 2]), (LEBEL_GRID, "cut short")),
    "a count too large": Case(
        grid(words((1.0, 2.0, "a")).replace(b"\n1\n1.0\n2.0", b"\n2\n1.0\n2.0")),
        (LEBEL_GRID, "a count in it is too large"),
    ),
    "a count too small": Case(
        grid(words((1.0, 2.0, "a"), (3.0, 4.0, "b")).replace(b"\n2\n1.0\n2.0", b"\n1\n1.0\n2.0")),
        (LEBEL_GRID, "a count in it is too small"),
    ),
    "a huge number of tiers": Case(
        grid(words((1.0, 2.0, "a")).replace(b"<exists>\n2\n", b"<exists>\n%d\n" % 10**18)), (LEBEL_GRID, "tier 3")
    ),
    "a count of hundreds of digits": Case(
        grid(words((1.0, 2.0, "a")).replace(b"<exists>\n2\n", b"<exists>\n%s\n" % (b"9" * 400))),
        (LEBEL_GRID, "the number of tiers: expected a number"),
    ),
    "a pipe": Case(a_pipe(GRID), (LEBEL_GRID, "not a file but a pipe")),
    "words after the scan": Case(
        grid(words(*((500.0 + i, 500.5 + i, "a") for i in range(9)))), ("{data}: story beta", "lie outside the scan")
    ),
    "lengths missing": Case(lambda data: (data / LENGTHS).unlink(), (LEBEL_LENGTHS, "no such file")),
    "lengths a pipe": Case(a_pipe(LENGTHS), (LEBEL_LENGTHS, "not a file but a pipe")),
    "a negative length": Case(lengths(lambda v: v.update(beta=-60)), (LEBEL_LENGTHS, "story beta", "'-60'")),
    "a story without length": Case(
        lengths(lambda v: v.pop("beta")), ("UTS03/beta.hf5: story beta has no length in {data}/" + LENGTHS,)
    ),
    "a story too long by a volume": Case(
        lengths(lambda v: v.update(beta=v["beta"] + 1)), (*LEBEL_ROWS, "has 40 rows", "make 41")
    ),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.table
@pytest.mark.parametrize("name", RESPONSES)
def test_responses_of_the_lab(name: str, lab: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_both_refuse(RESPONSES[name], lab, model, capsys)


@pytest.mark.table
@pytest.mark.parametrize("name", TEXTS)
def test_text_and_regions(name: str, lab: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_both_refuse(TEXTS[name], lab, model, capsys)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, lab: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_both_refuse(PICKLES[name], lab, model, capsys)
    assert not Path("canary").exists()


@pytest.mark.table
@pytest.mark.parametrize("name", HDF5)
def test_hdf5(name: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_both_refuse(HDF5[name], make_lebel(tmp_path / "ds", subjects=("UTS03",)), model, capsys)


@pytest.mark.table
@pytest.mark.parametrize("name", GRIDS)
def test_textgrids_and_lengths(name: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_both_refuse(GRIDS[name], make_lebel(tmp_path / "ds", subjects=("UTS03",)), model, capsys)


def test_the_data_sets_are_fine_before_they_are_changed(
    lab: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else each case above could be refused for a reason of its own."""
    for data in (lab, make_lebel(tmp_path / "ds", subjects=("UTS03",))):
        planned = study(data, model, capsys)
        assert (planned.code, planned.error) == (0, "")
        assert "beta" in planned.out
        checked = check(data, capsys)
        assert (checked.code, checked.error) == (0, ""), checked.out
        assert "verdict: usable" in checked.out.splitlines()


# --- options, and names of folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("beyond.npy", np.array([3, 12]), "no voxel 12; the responses have 12: 0 to 11"),
        ("before.npy", np.array([-1, 3]), "no voxel -1"),
        ("short.npy", np.ones(11, bool), "the mask has 11 voxels, the responses have 12"),
        ("half.npy", np.array([0.5]), "float64"),
        ("other.npz", np.array([3]), "no voxels of subject subject2; it holds arr_0"),
    ],
)
def test_a_file_of_voxels(
    name: str, values: np.ndarray, said: str, lab: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(name).resolve()
    np.save(file, values) if name.endswith(".npy") else np.savez(file, values)
    assert_refused(study(lab, model, capsys, "--voxels", str(file)), (str(file), said))


@pytest.mark.parametrize("name", ["two\nlines", "\N{SNAIL}\N{VARIATION SELECTOR-16} data", "tab\tand  spaces", "[red]"])
def test_a_folder_of_any_name(name: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_lab(tmp_path / name)
    assert study(data, model, capsys).code == 0
    assert check(data, capsys).code == 0
    npy(lambda y: y[1:])(data)
    said = (" ".join(str(data).split()), "story beta", "has 39 rows")
    assert_refused(study(data, model, capsys), said)
    ended = check(data, capsys)
    assert ended.code == 2
    assert "has 39 rows" in ended.out


def test_one_word_is_a_story(lab: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is useless, but nothing is wrong with it: it is fitted like any other."""

    def edit(story: LabSequence) -> None:
        story.data, story.data_times = story.data[40:41], story.data_times[40:41]

    text(edit)(lab)
    ended = study(lab, model, capsys)
    assert (ended.code, ended.error) == (0, "")
    assert "beta" in ended.out
    ended = check(lab, capsys)
    assert (ended.code, ended.error) == (0, "")
    assert re.search(r"^beta +subject2 +1 +0 ", ended.out, re.MULTILINE)


def test_a_story_that_links_to_itself_was_not_fetched(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this format a link that leads nowhere is what git-annex leaves: the story stays out, with a note."""
    data = make_lebel(tmp_path / "ds", subjects=("UTS03",))
    linked_to_itself(HF5)(data)
    for ended in (study(data, model, capsys), check(data, capsys)):
        assert (ended.code, ended.error) == (0, "")
        assert "note" in ended.out and "UTS03: responses to 1 of 7 stories left out" in ended.out


def test_a_data_folder_that_links_to_itself(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(study(tmp_path / "loop", model, capsys), (str(tmp_path / "loop"),))
    assert_not_usable(check(tmp_path / "loop", capsys), (str(tmp_path / "loop"),))


# --- pickles that attack ----------------------------------------------------------------------------------------------


def a_text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def a_name(module: str, name: str) -> bytes:
    return a_text(module) + a_text(name) + b"\x93"  # STACK_GLOBAL


def a_number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def transcript(content: bytes) -> bytes:
    """Return a pickle of ``{"alpha": content}``."""
    return b"\x80\x04}" + a_text("alpha") + content + b"s."


def with_words(content: bytes) -> bytes:
    """Return a pickle of a DataSequence with such words and good times."""
    rest = a_text("data_times") + b"](G\0\0\0\0\0\0\0\0e" + a_text("tr_times") + b"](G\0\0\0\0\0\0\0\0e"
    return transcript(SEQUENCE + b")\x81}(" + a_text("data") + content + rest + b"ub")


def doubled(empty: bytes, pair: Callable[[bytes], bytes], n: int = 60) -> bytes:
    """Return what makes an object that holds an object twice, which holds one twice, and so on."""
    steps = [empty + b"\x940"]  # made, memorised, and taken off the stack
    for at in range(n):
        steps.append(pair(b"h" + bytes([at])) + b"\x940")
    return b"".join(steps) + b"h" + bytes([n])


def an_array(dtype: str, raw: bytes, shape: bytes) -> bytes:
    """Return what makes an array of a shape, itself given as a pickle."""
    of = a_name("numpy", "dtype") + a_text(dtype) + b"\x85R"
    data = b"B" + struct.pack("<I", len(raw)) + raw
    return a_name("numpy._core.numeric", "_frombuffer") + b"(" + data + of + shape + a_text("C") + b"tR"


SEQUENCE = a_name("ridge_utils.DataSequence", "DataSequence")
TUPLES = doubled(b")", lambda get: get + get + b"\x86")
LISTS = doubled(b"]", lambda get: b"](" + get + get + b"e")
MANY = b"h\x00" * 2000
LARGE = 2**21  # characters of one text that is then used again and again

BOMBS = {
    "a key that is a tuple of tuples": b"\x80\x04" + doubled(b")", lambda g: g + g + b"\x86") + b"N0}h\x3cNs.",
    "words that are lists of lists": with_words(LISTS),
    "words that are tuples of tuples": with_words(TUPLES),
    "times that are lists of lists": transcript(
        SEQUENCE
        + b")\x81}("
        + a_text("data")
        + b"]("
        + a_text("a")
        + b"e"
        + a_text("data_times")
        + LISTS
        + a_text("tr_times")
        + LISTS
        + b"ub"
    ),
    "a dtype that is lists of lists": transcript(a_name("numpy", "dtype") + LISTS + b"\x85R"),
    "the order of a dtype": transcript(a_name("numpy", "dtype") + a_text("f8") + b"\x85R(K\x03" + LISTS + b"tb"),
    "a shape of lists of lists": with_words(an_array("f8", bytes(16), LISTS)),
    "a memo of a thousand million": b"\x80\x04Nr\xff\xff\xff\x3f.",
    "a memo beyond all numbers": b"\x80\x04Np" + b"9" * 4000 + b"\n.",
    "bytes that are not there": b"\x80\x05\x8e" + struct.pack("<Q", 10**12) + b".",
    "a bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".",
    "a text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b".",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b".",
    "a number that is not there": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "an array of 10**12 numbers": with_words(
        an_array("f8", bytes(16), b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")
    ),
    "an array of -1 numbers": transcript(an_array("f8", bytes(16), a_number(-7) + b"\x85")),
    "an array of 10**40 numbers": transcript(
        an_array("f8", bytes(16), b"\x8a\x14" + (10**40).to_bytes(20, "little") + b"\x85")
    ),
    "an array of texts of 10**9 letters": transcript(an_array("U999999999", bytes(16), b"K\x01\x85")),
    "an array of texts without letters": transcript(an_array("U0", bytes(16), b"K\x01\x85")),
    "a text encoded again and again": transcript(
        a_text("a" * LARGE) + b"\x940](" + (a_name("_codecs", "encode") + b"h\x00\x85R") * 2000 + b"e"
    ),
    "one array for a thousand stories": (
        b"\x80\x04"
        + b"B"
        + struct.pack("<I", LARGE)
        + bytes(LARGE)
        + b"\x940"
        + b"]("
        + (
            a_name("numpy._core.numeric", "_frombuffer")
            + b"(h\x00"
            + a_name("numpy", "dtype")
            + a_text("u1")
            + b"\x85R"
            + a_number(LARGE)
            + b"\x85"
            + a_text("C")
            + b"tR"
        )
        * 2000
        + b"e."
    ),
    "one word of two million letters a thousand times": with_words(a_text("a" * LARGE) + b"\x940](" + MANY + b"e"),
    "a thousand stories of the same words": (
        b"\x80\x04]("
        + b"N" * LARGE
        + b"e\x940"
        + b"}("
        + b"".join(a_text(f"s{at}") + SEQUENCE + b")\x81}" + a_text("data") + b"h\x00sb" for at in range(2000))
        + b"u."
    ),
    "more than any transcript holds": b"\x80\x04" + b"N" * (2**26),
}

TRICKS = {
    "a persistent id": (b"\x80\x04U\x01aQ.", "persistent id"),
    "a persistent id of protocol 0": (b"Pelsewhere\n.", "persistent id"),
    "getattr by its old name": (b"c__builtin__\ngetattr\n.", "it asks for __builtin__.getattr"),
    "OBJ": (b"(cos\nsystem\nS'touch canary'\no.", "it asks for os.system"),
    "EXT1": (b"\x80\x02\x82\x07.", "unregistered extension code 7"),
    "EXT4": (b"\x80\x02\x84\xff\xff\xff\x7f.", "unregistered extension code"),
    "EXT4 below 0": (b"\x80\x02\x84\xff\xff\xff\xff.", "code <= 0"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "out-of-band"),
    "a protocol to come": (b"\x80\x63N.", "unsupported pickle protocol: 99"),
    "a set": (b"\x80\x04\x8f.", "found set"),
    "an unknown opcode": (b"\x80\x04\xee.", "invalid load key"),
    "no object": (b"\x80\x04.", "underflow"),
    "BUILD of a class": (transcript(SEQUENCE + b"N}" + a_text("data") + a_number(1) + b"s\x86b"), "__setstate__"),
    "BUILD of a function": (
        transcript(a_name("_codecs", "encode") + b"N}" + a_text("__defaults__") + b")s\x86b"),
        "expected DataSequence",
    ),
    "BUILD with slots": (
        transcript(SEQUENCE + b")\x81N}" + a_text("__class__") + a_name("numpy", "ndarray") + b"s\x86b"),
        "the state of a DataSequence is tuple",
    ),
    "a key that is no text": (b"\x80\x04}G\0\0\0\0\0\0\0\0Ns.", "story 0.0 is NoneType"),
    "a key of thousands of digits": (b"\x80\x04}\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000 + b"Ns.", "digits"),
    "items of an array": (transcript(an_array("f8", bytes(16), b"K\x02\x85") + b"K\x00K\x01s"), "item assignment"),
    "an array of objects": (with_words(an_array("O", bytes(16), b"K\x02\x85")), "an array of object is not allowed"),
    "an array of dates": (with_words(an_array("M8", bytes(16), b"K\x02\x85")), "datetime64 is not allowed"),
    "an array of structures": (with_words(an_array("f8,O", bytes(16), b"K\x01\x85")), "not a letter and a size"),
    "an array in another array": (
        with_words(
            an_array("f8", bytes(16), b"K\x02\x85") + b"(K\x01K\x02\x85" + a_name("numpy", "dtype") + b"\x89C\x00tb"
        ),
        "no attribute 'code'",
    ),
    "NEWOBJ with arguments": (transcript(a_name("numpy", "dtype") + a_text("O") + b"\x85\x81"), "alpha' is Dtype"),
    "NEWOBJ of no class": (transcript(a_name("_codecs", "encode") + b")\x81"), "must be a type"),
    "a class that is called": (transcript(SEQUENCE + a_text("x") + b"\x85R"), "DataSequence() takes no arguments"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused_by_name(name: str, lab: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = TRICKS[name]
    case = Case(raw("raw_text.pkl", lambda old: content), (TEXT, "refused: ", said))
    assert_both_refuse(case, lab, model, capsys)
    assert not Path("canary").exists()


def test_a_class_that_a_pickle_named_cannot_become_another(tmp_path: Path) -> None:
    """``__class__`` in the state of an object is a name like any other, and dropped."""
    state = b"}" + a_text("__class__") + a_name("numpy", "ndarray") + b"s"
    (tmp_path / "raw_text.pkl").write_bytes(transcript(SEQUENCE + b")\x81" + state + b"b"))
    (read,) = read_transcripts(tmp_path / "raw_text.pkl").values()
    assert vars(read) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_and_in_little_memory(name: str, tmp_path: Path) -> None:
    make_lab(tmp_path, stories=("alpha",))
    (tmp_path / "raw_text.pkl").write_bytes(BOMBS[name])
    before = time.process_time()
    with pytest.raises(InputError) as refused:
        open_dataset(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/")
    assert len(str(refused.value)) < 1000
    assert time.process_time() - before < 5


def test_a_pickle_that_fills_memory_meets_the_limit(tmp_path: Path) -> None:
    (tmp_path / "raw_text.pkl").write_bytes(BOMBS["a memo of a thousand million"])
    with pytest.raises(InputError, match="takes more memory"):
        read_transcripts(tmp_path / "raw_text.pkl")


def test_opcodes_are_checked_where_memory_cannot_be_limited() -> None:
    for name in ("a memo of a thousand million", "bytes that are not there", "a bytearray that is not there"):
        with pytest.raises(ValueError, match=r"numbers an object|expected \d+ bytes"):
            safe_pickle.check_opcodes(BOMBS[name])
    safe_pickle.check_opcodes(pickle.dumps({"alpha": ["once", "upon", "a", "time"] * 100}, protocol=2))


# --- what may not be read ---------------------------------------------------------------------------------------------

CLOSED = {  # what is closed -> what must be named
    "lab/subject2": "{data}/subject2: cannot be read (Permission denied)",
    "lab/subject2/beta.npy": "{data}/subject2/beta.npy",
    "lab/raw_text.pkl": "{data}/raw_text.pkl: cannot be read (Permission denied)",
    "lab/rois.json": "{data}/rois.json",
    "lab": "{data}",
    "ds/derivative/preprocessed_data/UTS03": "UTS03",
    f"ds/{HF5}": "{data}/" + HF5,
    "ds/derivative/TextGrids": "TextGrids",
    f"ds/{GRID}": LEBEL_GRID,
    f"ds/{LENGTHS}": LEBEL_LENGTHS,
    "ds": "{data}",
}


@pytest.mark.slow
def test_what_may_not_be_read_is_named(open_folder: Path) -> None:
    model = make_tiny_bert(open_folder / "model")
    made = {
        "lab": make_lab(open_folder / "lab", subjects=("subject2", "subject3")),
        "ds": make_lebel(open_folder / "ds"),
    }
    (made["lab"] / "rois.json").write_text('{"subject2/V1": [3]}')
    copies = [
        shutil.copytree(made[closed.partition("/")[0]], open_folder / str(at)) for at, closed in enumerate(CLOSED)
    ]
    work = open_folder / "work"
    work.mkdir()
    open_to_all(open_folder)
    for copy, closed in zip(copies, CLOSED, strict=True):
        (copy / closed.partition("/")[2]).chmod(0)
    before = content(open_folder) if os.geteuid() == 0 else {}

    def both(data: Path) -> list[list[str]]:
        options = ["--space", str(open_folder / "smoke.py"), "--model", str(model), "--out", "out"]
        return [
            ["study.run", "--dry-run", "--data", str(data), *options],
            ["bert_encoding.__main__", "check", str(data)],
        ]

    rehearsals, cases = ([command for data in chosen for command in both(data)] for chosen in (made.values(), copies))
    ends = run_as_nobody(rehearsals, cases, work)
    expected = [said.replace("{data}", str(copy)) for copy, said in zip(copies, CLOSED.values(), strict=True)]
    wrong = [
        (closed, code, told)
        for at, (closed, said) in enumerate(zip(CLOSED, expected, strict=True))
        for told, code in ends[2 * at : 2 * at + 2]
        if code != 2 or said not in told or "Error:" in told
    ]
    assert wrong == []
    if before:
        after = content(open_folder)
        unchanged = [name for name in before if not name.startswith("work")]
        assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
