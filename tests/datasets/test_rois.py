"""Regions of interest: their files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import make_lab

from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset

N_VOXELS = 12


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_lab(tmp_path / "two", subjects=("a", "b"), n_voxels=N_VOXELS)


def lists(rois: Any) -> dict[str, dict[str, list[int]]]:
    return {s: {name: voxels.tolist() for name, voxels in regions.items()} for s, regions in rois.items()}


def test_without_files_there_are_none(lab: Path) -> None:
    assert open_dataset(lab).rois == {}


def test_regions_of_the_only_subject_may_be_next_to_its_folder(lab: Path) -> None:
    (lab / "rois.json").write_text(json.dumps({"V1": [7, 3, 11], "AC": [0]}))
    assert lists(open_dataset(lab).rois) == {"subject2": {"V1": [3, 7, 11], "AC": [0]}}


def test_regions_of_a_subject_may_be_in_its_folder(two: Path) -> None:
    mask = np.zeros(N_VOXELS, bool)
    mask[[2, 5]] = True
    np.savez(two / "a" / "rois.npz", masked=mask, listed=np.array([9, 1], np.int16))
    (two / "b" / "rois.json").write_text('{"listed": [4]}')
    rois = lists(open_dataset(two).rois)
    assert rois == {"a": {"masked": [2, 5], "listed": [1, 9]}, "b": {"listed": [4]}}


def test_one_file_may_hold_the_regions_of_several_subjects(two: Path) -> None:
    np.savez(two / "rois.npz", **{"a/V1": [1], "b/V1": [2, 3], "b/V2": [4]})  # type: ignore[arg-type]
    assert lists(open_dataset(two).rois) == {"a": {"V1": [1]}, "b": {"V1": [2, 3], "V2": [4]}}


BAD_JSON = {
    "text": ("no json", "not readable JSON"),
    "list": ("[1, 2]", "expected {region"),
    "strings": ('{"V1": ["1"]}', "region V1: expected a list of whole numbers"),
    "halves": ('{"V1": [1.5]}', "region V1: expected a list of whole numbers"),
    "truths": ('{"V1": [true]}', "region V1: expected a list of whole numbers"),
    "number": ('{"V1": 3}', "region V1: expected a list of whole numbers"),
    "none": ('{"V1": []}', "region V1: expected voxel indices or a mask"),
    "negative": ('{"V1": [2, -1]}', "region V1: no voxel -1; the responses have 12"),
    "beyond": ('{"V1": [12]}', "region V1: no voxel 12; the responses have 12: 0 to 11"),
    "twice": ('{"V1": [3, 4, 3]}', "region V1: voxel 3 is named twice"),
}


@pytest.mark.parametrize(("text", "message"), list(BAD_JSON.values()), ids=list(BAD_JSON))
def test_a_bad_json_file_is_named(lab: Path, text: str, message: str) -> None:
    (lab / "rois.json").write_text(text)
    with pytest.raises(InputError) as refused:
        open_dataset(lab)
    assert str(lab / "rois.json") in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_NPZ = {
    "short mask": (np.ones(11, bool), "the mask has 11 voxels, the responses have 12"),
    "empty mask": (np.zeros(12, bool), "the mask selects no voxel"),
    "floats": (np.array([1.0, 2.0]), "expected voxel indices or a mask, got float64"),
    "table": (np.array([[1, 2]]), "of shape (1, 2)"),
}


@pytest.mark.parametrize(("values", "message"), list(BAD_NPZ.values()), ids=list(BAD_NPZ))
def test_a_bad_array_is_named(lab: Path, values: np.ndarray, message: str) -> None:
    np.savez(lab / "subject2" / "rois.npz", V1=values)
    with pytest.raises(InputError) as refused:
        open_dataset(lab)
    assert str(refused.value).startswith(f"{lab / 'subject2' / 'rois.npz'}: region V1: ")
    assert message in str(refused.value)


def test_objects_and_damage_are_refused(lab: Path) -> None:
    file = lab / "subject2" / "rois.npz"
    np.savez(file, V1=np.array([{}], dtype=object), allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"rois\.npz: not a readable \.npz file"):
        open_dataset(lab)
    file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"rois\.npz: not a readable \.npz file"):
        open_dataset(lab)


def test_a_region_of_no_subject_is_refused(two: Path) -> None:
    (two / "rois.json").write_text('{"V1": [1]}')
    with pytest.raises(InputError, match="region V1: with several subjects call it <subject>/V1"):
        open_dataset(two)
