"""Data in the lab's format with one thing wrong: a study and ``check`` refuse each case in words, and write nothing.

Each message names the file or folder, the story where there is one, and the value.
"""

import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import LabSequence, edit_responses, edit_text, make_lab, make_tiny_bert
from make_lebel import make_lebel
from nobody import open_to_all, run_as_nobody
from refusals import Case, Change, Commands, a_pipe, assert_not_usable, change_bytes, content, linked_to_itself
from run_commands import assert_refused

STORY = "beta"  # the story that is changed
NPY = "{data}/subject2/beta.npy"
TEXT = "{data}/raw_text.pkl"
LAB_ROWS = (NPY, "story beta, subject subject2: ")
MAKE_40 = "its 55 TR times less 15 trimmed make 40; text and responses must be of the same part of the scan"
NUMBERS = "expected numbers (rows, voxels)"


def npy(edit: Callable[[np.ndarray], np.ndarray], story: str = STORY) -> Change:
    """Return a change of the responses to one story, in the lab's format."""
    return lambda data: edit_responses(data, story, edit)


def rows(edit: Callable[[np.ndarray], np.ndarray], *parts: str) -> Case:
    return Case(npy(edit), (*LAB_ROWS, *parts))


def npy_bytes(edit: Callable[[bytes], bytes]) -> Case:
    """Return a change of a ``.npy`` file that makes it unreadable."""
    return Case(change_bytes("subject2/beta.npy", edit), (NPY, "not a readable .npy array"))


def npy_header(text: str) -> Case:
    head = text.encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    return Case(change_bytes("subject2/beta.npy", lambda old: content + old[128:]), (NPY,))


def of_shape(shape: str) -> Case:
    return npy_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}")


def story(change: Change, *parts: str) -> Case:
    return Case(change, ("{data}", "story beta", *parts))


def transcript(change: Change, *parts: str) -> Case:
    return Case(change, (TEXT, "story beta", *parts))


def every_story(edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(data: Path) -> None:
        for file in (data / "subject2").iterdir():
            np.save(file, edit(np.load(file)))

    return change


def text(edit: Callable[[LabSequence], object]) -> Change:
    """Return a change of one transcript, in the lab's format."""
    return lambda data: edit_text(data, STORY, edit)


def setting(attribute: str, at: int, value: object) -> Change:
    """Return a change of one word or one time."""
    return text(lambda story: getattr(story, attribute).__setitem__(at, value))


def replacing(attribute: str, make: Callable[[Any], object]) -> Change:
    """Return a change of all words or all times."""
    return text(lambda story: setattr(story, attribute, make(getattr(story, attribute))))


def an_archive(data: Path) -> None:
    with (data / "subject2" / "beta.npy").open("wb") as file:
        np.savez(file, np.zeros((40, 12)))


def renamed(name: str, message: str) -> Case:
    return Case(lambda data: (data / "subject2/beta.npy").rename(data / "subject2" / name), (message,))


def a_file_instead(data: Path) -> None:
    (data / "subject2").rename(data.parent / "moved away")
    (data / "subject2").write_text("not a folder\n")


def with_file(name: str, text: str) -> Change:
    return lambda data: (data / name).write_text(text)


RESPONSES = {
    "an extra TR": rows(lambda y: np.vstack([y, y[:1]]), f"has 41 rows; {MAKE_40}"),
    "one TR less": rows(lambda y: y[1:], f"has 39 rows; {MAKE_40}"),
    "no rows": rows(lambda y: y[:0], f"has 0 rows; {MAKE_40}"),
    "no voxels": rows(lambda y: y[:, :0], "has 0 voxels", "have 12"),
    "transposed": rows(
        lambda y: y.T,
        "has 12 rows and 40 columns; its 55 TR times less 15 trimmed make 40: it looks transposed; save (",
    ),
    "another number of voxels": rows(
        lambda y: y[:, :-1], "has 11 voxels, other stories of subject2 have 12; all must agree"
    ),
    "one dimension": rows(lambda y: y[:, 0], "shape (40,)", NUMBERS),
    "three dimensions": rows(lambda y: y[None], "shape (1, 40, 12)"),
    "no dimension": rows(lambda y: y[0, 0], "shape ()"),
    "no dimension, with regions": Case(
        lambda data: (npy(lambda y: y[0, 0], "alpha")(data), with_file("subject2/rois.json", '{"V1": [3]}')(data)),
        ("{data}/subject2/rois.json: region V1: no voxel 3",),
    ),
    "texts": rows(lambda y: y.astype("U8"), "is <U8", NUMBERS),
    "complex": rows(lambda y: y * 1j, "is complex128", NUMBERS),
    "true and false": rows(lambda y: y > 0, "is bool", NUMBERS),
    "dates": rows(lambda y: y.astype("i8").astype("M8[s]"), "datetime64"),
    "objects": Case(npy(lambda y: y.astype(object)), (NPY, "not a readable .npy array", "Python objects")),
    "cut short": npy_bytes(lambda b: b[:-100]),
    "its header cut short": npy_bytes(lambda b: b[:50]),
    "a bare pickle": npy_bytes(lambda b: pickle.dumps([1.0])),
    "an archive": Case(an_archive, (NPY, "an archive of several")),
    "text instead of an array": npy_bytes(lambda b: b"0.1, 0.2\n"),
    "an empty npy": npy_bytes(lambda b: b""),
    "a negative shape": of_shape("(-40, 12)"),
    "a shape beyond all memory": of_shape("(1000000000000, 12)"),
    "a shape beyond all numbers": of_shape(f"(10**9, 1{40 * '0'})"),
    "a shape of forty digits": of_shape(f"(1{40 * '0'}, 12)"),
    "a header that is no Python": npy_header("{'descr': ((((((((((('''"),
    "a header of brackets": npy_header("(" * 110),
    "a dtype of no size": npy_header("{'descr': '|V0', 'fortran_order': False, 'shape': (40, 12)}"),
    "nothing finite in a story": rows(
        lambda y: y * np.nan, "has no finite voxel; leave the story out or correct the file"
    ),
    "infinite": rows(lambda y: y * np.inf, "has no finite voxel"),
    "beyond float32": rows(lambda y: y * 1e300, "has no finite voxel"),
    "every voxel NaN somewhere": Case(
        every_story(lambda y: np.where(np.arange(len(y))[:, None] == 3, np.nan, y)),
        ("{data}", "subject2", "has no finite voxel"),
    ),
    "every voxel constant": Case(
        every_story(lambda y: np.full_like(y, 0.5)),
        ("{data}/subject2/alpha.npy: story alpha, subject subject2: has no voxel that is finite and varies",),
    ),
    "constant in one story": rows(lambda y: np.full_like(y, 7.0), "has no voxel that is finite and varies"),
    "without text": renamed("unheard.npy", "{data}/subject2/unheard.npy: story unheard has no text"),
    "a trailing space": renamed("beta .npy", "{data}/subject2/beta .npy: story 'beta ' has no text"),
    "another case": renamed("Beta.npy", "{data}/subject2/Beta.npy: story Beta has no text"),
    "a name with a line break": renamed("be\nta.npy", "{data}/subject2/be ta.npy: story 'be\\nta' has no"),
    "no UTF-8": renamed(os.fsdecode(b"\xff.npy"), r"{data}/subject2: the name '\udcff.npy' in it is not UTF-8"),
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
    "a pickle that calls os.system": Case(
        change_bytes("raw_text.pkl", lambda b: b"cos\nsystem\n(S'touch canary'\ntR."), (TEXT, "it asks for os.system")
    ),
    "a story's name half a character": Case(
        change_bytes("raw_text.pkl", lambda b: b.replace(b"zeta", b"z\xed\xa0\xbd")),
        (TEXT, r"story 'z\ud", "half a character"),
    ),
    **{
        f"without {name}": transcript(text(lambda s, name=name: delattr(s, name)), f"has no {name}")
        for name in ("data", "data_times", "tr_times")
    },
    "no words": story(
        text(lambda s: (setattr(s, "data", []), setattr(s, "data_times", np.zeros(0)))), "has no spoken word"
    ),
    "tags and marks alone": story(
        replacing("data", lambda w: [("{cg}", "", "...", "(br}")[at % 4] for at in range(len(w))]), "has no spoken word"
    ),
    "a NaN word time": story(setting("data_times", 5, np.nan), "non-finite word times"),
    "an infinite word time": story(setting("data_times", 5, np.inf), "non-finite word times"),
    "a NaN TR time": story(setting("tr_times", 5, np.nan), "non-finite TR times"),
    "words long before the scan": story(
        replacing("data_times", lambda t: t - 1e6), "100% of its words are outside the scan"
    ),
    "times in milliseconds": story(replacing("data_times", lambda t: t * 1000), "outside the scan"),
    "a word before the last": story(
        setting("data_times", 20, -4.0), "word times must not decrease", "word 20 (-4 s)", "word 19 ("
    ),
    "words in disorder": story(setting("data_times", 5, 50.0), "word 5 (50 s)", "word 6"),
    "TRs that decrease": story(replacing("tr_times", lambda t: t[::-1]), "TR times must not decrease"),
    "a TR before the last": story(
        setting("tr_times", 4, -20.0), "TR times must not decrease", "TR 4 (-20 s)", "TR 3 (-3 s)"
    ),
    "a TR too late": story(setting("tr_times", 4, -0.5), "TR times must be evenly spaced"),
    "two TRs at once": story(setting("tr_times", 4, -3.0), "TR times must be evenly spaced"),
    "TRs all at once": story(replacing("tr_times", lambda t: t * 0), "TR times must be evenly spaced"),
    "a TR left out": story(replacing("tr_times", lambda t: np.delete(t, 9)), "TR times must be evenly spaced"),
    "no TRs": story(replacing("tr_times", lambda t: t[:0]), "TR times must be evenly spaced"),
    "no more TRs than are trimmed": story(replacing("tr_times", lambda t: t[:12])),
    "fewer times than words": story(replacing("data_times", lambda t: t[:-1]), "has 157 words but 156 word times"),
    "fewer words than times": story(replacing("data", lambda w: w[1:]), "156 words but 157 word times"),
    "a word that is a number": transcript(setting("data", 5, 7), "word 5 is int"),
    "a word that is bytes": transcript(setting("data", 5, b"the"), "word 5 is bytes"),
    "a word that is NaN": transcript(setting("data", 5, float("nan")), "word 5 is float"),
    "lists of words": transcript(replacing("data", lambda w: [w[:9], w[9:]]), "word 0 is list, expected text"),
    "nothing for words": transcript(replacing("data", lambda w: None), "NoneType"),
    "a number for words": transcript(replacing("data", lambda w: 5), "int"),
    "one text": transcript(replacing("data", " ".join), "its words are str, expected a list"),
    "half a character": transcript(setting("data", 5, "wo\ud83d"), r"word 5 ('wo\ud83d')"),
    "times as texts": transcript(
        replacing("data_times", lambda t: [str(v) for v in t]), "word times are not numbers: number 0 is '"
    ),
    "times as an array of texts": transcript(
        replacing("data_times", lambda t: t.astype("U9")), "word times are not numbers but <U9"
    ),
    "complex times": Case(replacing("tr_times", lambda t: t + 0j), (TEXT, "refused: ", "complex128")),
    "no time at all": transcript(replacing("data_times", lambda t: None), "word times have shape ()"),
    "a time that is none": transcript(
        replacing("data_times", lambda t: [None, *t[1:]]), "word times are not numbers: number 0 is of type NoneType"
    ),
    "a time beyond all numbers": transcript(
        replacing("data_times", lambda t: [10**400, *t[1:].tolist()]), "word times are not numbers"
    ),
    "one time": transcript(replacing("tr_times", lambda t: 3.0), "TR times have shape ()"),
    "TR times as texts": transcript(replacing("tr_times", lambda t: ["x"]), "TR times are not numbers: number 0 is '"),
    "times in columns": transcript(replacing("data_times", lambda t: t[:, None]), "shape (157, 1)"),
    "lists of times": transcript(
        replacing("tr_times", lambda t: [t.tolist(), t.tolist()]), "TR times are not numbers: number 0 is of type list"
    ),
    "regions a hundred thousand deep": Case(with_file("rois.json", "[" * 100_000), ("{data}/rois.json: not readable",)),
}


@pytest.mark.table
@pytest.mark.parametrize("name", RESPONSES)
def test_malformed_responses_are_refused(name: str, lab: Path, both: Commands) -> None:
    both.assert_both_refuse(RESPONSES[name], lab)


@pytest.mark.table
@pytest.mark.parametrize("name", TEXTS)
def test_malformed_text_and_regions_are_refused(name: str, lab: Path, both: Commands) -> None:
    both.assert_both_refuse(TEXTS[name], lab)


def test_data_without_a_change_or_with_a_story_of_one_word_are_usable(
    lab: Path, tmp_path: Path, both: Commands
) -> None:
    """Else each case could be refused for another reason."""
    short = make_lab(tmp_path / "short")
    for attribute in ("data", "data_times"):
        replacing(attribute, lambda values: values[40:41])(short)
    for data, beta in ((make_lebel(tmp_path / "ds", subjects=("UTS03",)), ""), (lab, ""), (short, "subject2 +1 +0 ")):
        planned, checked = both.study(data), both.check(data)
        assert (planned.code, planned.error, checked.code, checked.error) == (0, "", 0, ""), checked.out
        assert "beta" in planned.out
        assert "verdict: usable" in checked.out.splitlines()
        assert re.search(f"^beta +{beta}", checked.out, re.MULTILINE)


@pytest.mark.parametrize("name", ["two\nlines", "\N{SNAIL}\N{VARIATION SELECTOR-16} data", "tab\tand  spaces", "[red]"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path, both: Commands) -> None:
    data = make_lab(tmp_path / name)
    assert both.study(data).code == 0
    assert both.check(data).code == 0
    npy(lambda y: y[1:])(data)
    message = (" ".join(str(data).split()), "story beta", "has 39 rows")
    assert_refused(both.study(data), *message)
    ended = both.check(data)
    assert ended.code == 2
    assert "has 39 rows" in ended.out


def test_a_data_folder_that_links_to_itself_is_refused(tmp_path: Path, both: Commands) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(both.study(tmp_path / "loop"), str(tmp_path / "loop"))
    assert_not_usable(both.check(tmp_path / "loop"), (str(tmp_path / "loop"),))


HF5 = "derivative/preprocessed_data/UTS03/beta.hf5"
GRID = "derivative/TextGrids/beta.TextGrid"
LENGTHS = "derivative/respdict.json"
CLOSED = {  # the path without permission -> what the message must contain
    "lab/subject2": "{data}/subject2: cannot be read (Permission denied)",
    "lab/subject2/beta.npy": "{data}/subject2/beta.npy",
    "lab/raw_text.pkl": "{data}/raw_text.pkl: cannot be read (Permission denied)",
    "lab/rois.json": "{data}/rois.json",
    "lab": "{data}",
    "ds/derivative/preprocessed_data/UTS03": "UTS03",
    f"ds/{HF5}": f"{{data}}/{HF5}",
    "ds/derivative/TextGrids": "TextGrids",
    f"ds/{GRID}": f"{{data}}/{GRID}",
    f"ds/{LENGTHS}": f"{{data}}/{LENGTHS}",
    "ds": "{data}",
}


@pytest.mark.slow
def test_a_file_without_read_permission_is_named(open_folder: Path) -> None:
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

    def both_commands(data: Path) -> list[list[str]]:
        options = ["--space", str(open_folder / "smoke.py"), "--model", str(model), "--out", "out"]
        return [
            ["study.run", "--dry-run", "--data", str(data), *options],
            ["bert_encoding.__main__", "check", str(data)],
        ]

    rehearsals, cases = (
        [command for data in chosen for command in both_commands(data)] for chosen in (made.values(), copies)
    )
    ends = run_as_nobody(rehearsals, cases, work)
    expected = [message.replace("{data}", str(copy)) for copy, message in zip(copies, CLOSED.values(), strict=True)]
    wrong = [
        (closed, code, output)
        for at, (closed, message) in enumerate(zip(CLOSED, expected, strict=True))
        for output, code in ends[2 * at : 2 * at + 2]
        if code != 2 or message not in output or "Error:" in output
    ]
    assert wrong == []
    if before:
        after = content(open_folder)
        unchanged = [name for name in before if not name.startswith("work")]
        assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
