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


def test_regions_of_the_only_subject_may_be_next_to_its_folder(lab: Path) -> None:
    assert open_dataset(lab).rois == {}
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


BAD: dict[str, tuple[str | bytes | np.ndarray, str]] = {
    "text": ("no json", "not readable JSON ("),
    "list": ("[1, 2]", "expected {region: [indices]}"),
    "strings": ('{"V1": ["1"]}', "region V1: expected a list of whole numbers"),
    "halves": ('{"V1": [1.5]}', "region V1: expected a list of whole numbers"),
    "truths": ('{"V1": [true]}', "region V1: expected a list of whole numbers"),
    "number": ('{"V1": 3}', "region V1: expected a list of whole numbers"),
    "none": ('{"V1": []}', "region V1: expected voxel indices or a mask"),
    "negative": ('{"V1": [2, -1]}', "region V1: no voxel -1; the responses have 12"),
    "beyond": ('{"V1": [12]}', "region V1: no voxel 12; the responses have 12: 0 to 11"),
    "beyond all numbers": ('{"V1": [1%s]}' % ("0" * 30), "region V1"),
    "twice": ('{"V1": [3, 4, 3]}', "region V1: voxel 3 is named twice"),
    "short mask": (np.ones(11, bool), "region V1: the mask has 11 voxels, the responses have 12"),
    "empty mask": (np.zeros(12, bool), "region V1: the mask selects no voxel"),
    "floats": (np.array([1.0, 2.0]), "region V1: expected voxel indices or a mask, got float64"),
    "table": (np.array([[1, 2]]), "region V1: expected voxel indices or a mask, got int64 of shape (1, 2)"),
    "damaged": (b"PK\x03\x04 nothing", "not a readable .npz file"),
    "objects": (np.array([{}], dtype=object), "not a readable .npz file"),
}


@pytest.mark.parametrize(("content", "message"), list(BAD.values()), ids=list(BAD))
def test_a_bad_file_is_named(lab: Path, content: str | bytes | np.ndarray, message: str) -> None:
    file = lab / "subject2" / ("rois.json" if isinstance(content, str) else "rois.npz")
    if isinstance(content, str):
        file.write_text(content)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, V1=content, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(InputError) as refused:
        open_dataset(lab)
    assert str(refused.value).startswith(f"{file}: {message}")
    assert "\n" not in str(refused.value)


def test_a_region_of_no_subject_is_refused(two: Path) -> None:
    (two / "rois.json").write_text('{"V1": [1]}')
    with pytest.raises(InputError, match="region V1: with several subjects call it <subject>/V1"):
        open_dataset(two)
