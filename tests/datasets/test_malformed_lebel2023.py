"""Data in the format of ds003020 with one thing wrong: a study and ``check`` refuse each case in words."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from make_lebel import DIALECTS, make_lebel
from refusals import Case, Change, Commands, a_pipe, change_bytes, linked_to_itself

HF5 = "derivative/preprocessed_data/UTS03/beta.hf5"
GRID = "derivative/TextGrids/beta.TextGrid"
LENGTHS = "derivative/respdict.json"
FILE = "{data}/" + HF5
LEBEL_ROWS = (FILE, "story beta", "subject UTS03")
LEBEL_GRID = "{data}/" + GRID
LEBEL_LENGTHS = "{data}/" + LENGTHS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_lebel(tmp_path / "ds", subjects=("UTS03",))


def hf5(edit: Callable[[h5py.File, np.ndarray, Path], object]) -> Change:
    """Return a change of the responses to one story, in the format of ds003020: the file is written."""

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


def _texts(file: h5py.File, rows: np.ndarray, data: Path) -> None:
    file.create_dataset("data", data=rows.astype(str).astype(object), dtype=h5py.string_dtype())


def written(edit: Callable[[h5py.File, np.ndarray, Path], object], *parts: str) -> Case:
    return Case(hf5(edit), (FILE, *parts))


def rows(edit: Callable[[np.ndarray], np.ndarray], *parts: str) -> Case:
    return Case(hf5(lambda file, rows, _: file.create_dataset("data", data=edit(rows))), (*LEBEL_ROWS, *parts))


def damaged(edit: Callable[[bytes], bytes], *parts: str) -> Case:
    return Case(change_bytes(HF5, edit), (FILE, *parts))


def renamed(name: str, message: str) -> Case:
    return Case(lambda data: (data / HF5).rename((data / HF5).with_name(name)), (message,))


def lengths(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Return a change of ``respdict.json``."""

    def change(data: Path) -> None:
        volumes = json.loads((data / LENGTHS).read_text())
        edit(volumes)
        (data / LENGTHS).write_text(json.dumps(volumes))

    return change


def grid(content: bytes) -> Change:
    return lambda data: (data / GRID).write_bytes(content)


def words(*rows: tuple[float, float, str], dialect: str = "short") -> bytes:
    """Return a TextGrid with one phone and some words."""
    return DIALECTS[dialect]([("phone", [(0.0, 90.0, "AH0")]), ("word", list(rows))]).encode()


HDF5 = {
    "cut short": damaged(lambda b: b[: len(b) // 2], "not a readable HDF5 file"),
    "its end alone cut off": damaged(lambda b: b[:-8]),
    "empty": damaged(lambda b: b"", "not a readable HDF5 file"),
    "garbage": damaged(lambda b: bytes(range(256)) * 9, "not a readable HDF5 file"),
    "its directory overwritten": damaged(
        lambda b: b.replace(b"SNOD", b"\0\0\0\0").replace(b"TREE", b"\0\0\0\0"), "cannot be read"
    ),
    "another key": written(
        lambda file, rows, _: file.create_dataset("zdata", data=rows), "no data set 'data'; it holds zdata"
    ),
    "no key": written(lambda file, rows, _: None, "no data set 'data'; it holds nothing"),
    "a group": written(
        lambda file, rows, _: file.create_dataset("data/rows", data=rows), "'data' is a group, expected an array"
    ),
    "a named type": written(
        lambda file, rows, _: file.__setitem__("data", np.dtype("f8")), "'data' is a datatype, expected an array"
    ),
    "an external link": written(_external_link, "'data' is a link to somewhere else"),
    "a soft link": written(_soft_link, "'data' is a link to somewhere else"),
    "external storage": written(_external, "'data' keeps its values in other files"),
    "a virtual data set": written(_virtual, "'data' keeps its values in other files"),
    "structures": rows(lambda y: np.zeros(y.shape, [("a", "f4"), ("b", "f4")]), "'a'"),
    "texts": Case(hf5(_texts), (*LEBEL_ROWS, "object")),
    "without a shape": written(
        lambda file, rows, _: file.create_dataset("data", data=h5py.Empty("f8")), "without a shape"
    ),
    "an extra TR": rows(lambda y: np.vstack([y, y[:1]]), "has 41 rows", "make 40"),
    "one dimension": rows(lambda y: y[:, 0], "shape (40,)"),
    "a pipe": Case(a_pipe(HF5), (FILE, "not a file but a pipe")),
    "without text": renamed("unheard.hf5", "data/UTS03/unheard.hf5: story unheard has no text"),
    "another case": renamed("Beta.hf5", "data/UTS03/Beta.hf5: story Beta has no text"),
    "a trailing space": renamed("beta .hf5", "data/UTS03/beta .hf5: story 'beta ' has no text"),
    "no UTF-8": renamed(os.fsdecode(b"\xff.hf5"), r"data/UTS03: the name '\udcff.hf5' in it is not UTF-8"),
}

GRIDS = {
    "words that overlap": Case(
        grid(words((1.0, 3.0, "a"), (2.0, 4.0, "b"))), (LEBEL_GRID, "interval 2 ('b', 2 to 4 s) overlaps interval 1")
    ),
    "cut short": Case(change_bytes(GRID, lambda b: b[: len(b) // 2]), (LEBEL_GRID, "cut short")),
    "a pipe": Case(a_pipe(GRID), (LEBEL_GRID, "not a file but a pipe")),
    "words after the scan": Case(
        grid(words(*((500.0 + i, 500.5 + i, "a") for i in range(9)))), ("{data}: story beta", "outside the scan")
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


@pytest.mark.table
@pytest.mark.parametrize("name", HDF5)
def test_malformed_hdf5_is_refused(name: str, root: Path, both: Commands) -> None:
    both.assert_both_refuse(HDF5[name], root)


@pytest.mark.table
@pytest.mark.parametrize("name", GRIDS)
def test_malformed_textgrids_and_lengths_are_refused(name: str, root: Path, both: Commands) -> None:
    both.assert_both_refuse(GRIDS[name], root)


def test_a_file_that_links_to_itself_counts_as_not_fetched(root: Path, both: Commands) -> None:
    """In this format a link to nothing is what git-annex leaves: the story is left out, with a note."""
    linked_to_itself(HF5)(root)
    for ended in (both.study(root), both.check(root)):
        assert (ended.code, ended.error) == (0, "")
        assert "note" in ended.out and "UTS03: responses to 1 of 7 stories left out" in ended.out
