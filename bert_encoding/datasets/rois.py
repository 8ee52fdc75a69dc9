"""Regions of interest: named sets of voxels, in optional files next to the responses.

``rois.json`` (name -> list of indices) or ``rois.npz`` (name -> indices, or a mask over all voxels) in a subject's
folder, or in the folder above it, where names are ``<subject>/<name>`` unless there is only one subject. Indices count
all voxels of the responses from 0.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset

FILES = ("rois.json", "rois.npz")


def read_rois(dataset: Dataset) -> dict[str, dict[str, np.ndarray]]:
    """Return subject -> region -> ascending voxel indices; raise InputError for a damaged or wrong file."""
    rois: dict[str, dict[str, np.ndarray]] = {}
    first = _first_responses(dataset)
    for subject, responses in first.items():
        assert responses.path is not None
        for file in _files(responses.path.parent):
            rois.setdefault(subject, {}).update(_indices(_read(file), file, responses))
    for folder in sorted({responses.path.parent.parent for responses in first.values() if responses.path}):
        for file in _files(folder):
            for subject, regions in _by_subject(_read(file), file, dataset.subjects).items():
                rois.setdefault(subject, {}).update(_indices(regions, file, first[subject]))
    return rois


def as_voxels(values: Any, n_voxels: int, what: str) -> np.ndarray:
    """Return voxel indices, or a mask over all voxels, as ascending indices; raise InputError for anything else."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biu" or not array.size:
        raise InputError(f"{what}: expected voxel indices or a mask, got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "b" and array.size != n_voxels:
        raise InputError(f"{what}: the mask has {array.size} voxels, the responses have {n_voxels}")
    if array.dtype.kind != "b" and array.size == n_voxels and set(array.tolist()) <= {0, 1}:
        raise InputError(f"{what}: looks like a mask of 0 and 1; save it as booleans")
    voxels = np.flatnonzero(array) if array.dtype.kind == "b" else np.sort(array.astype(np.int64))
    if not voxels.size:
        raise InputError(f"{what}: the mask selects no voxel")
    for bad in voxels[[0, -1]]:
        if not 0 <= bad < n_voxels:
            raise InputError(f"{what}: no voxel {bad}; the responses have {n_voxels}: 0 to {n_voxels - 1}")
    if (twice := voxels[:-1][np.diff(voxels) == 0]).size:
        raise InputError(f"{what}: voxel {twice[0]} is named twice")
    return voxels


def read_arrays(file: Path) -> dict[str, Any]:
    """Return the arrays of an ``.npz`` file; raise ``InputError`` if one is damaged or contains objects."""
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged archive raises almost anything
        raise InputError(f"{file}: not a readable .npz file ({first_line(error)})") from None


def _first_responses(dataset: Dataset) -> dict[str, Responses]:
    """Return subject -> the first of its responses that are files."""
    first: dict[str, Responses] = {}
    for story in dataset.stories.values():
        for subject, responses in story.responses.items():
            if responses.path is not None:
                first.setdefault(subject, responses)
    return first


def _files(folder: Path) -> list[Path]:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if len(files) > 1:
        raise InputError(f"{files[0]}: there is also {files[1].name}; keep one of the two")
    return files


def _indices(regions: dict[str, Any], file: Path, responses: Responses) -> dict[str, np.ndarray]:
    shape, _ = responses.check()
    n_voxels = shape[-1] if shape else 0
    return {name: as_voxels(values, n_voxels, f"{file}: region {name}") for name, values in regions.items()}


def _read(file: Path) -> dict[str, Any]:
    return read_arrays(file) if file.suffix == ".npz" else _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected {{region: [indices]}}, got {type(content).__name__}")
    for name, values in content.items():
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise InputError(f"{file}: region {name}: expected a list of whole numbers")
    return content


def _by_subject(regions: dict[str, Any], file: Path, subjects: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    if len(subjects) == 1:
        return {subjects[0]: {name.removeprefix(f"{subjects[0]}/"): values for name, values in regions.items()}}
    by_subject: dict[str, dict[str, Any]] = {}
    for name, values in regions.items():
        subject, _, region = name.partition("/")
        if subject not in subjects or not region:
            raise InputError(
                f"{file}: region {name}: with several subjects call it <subject>/{name}, or put the file into the "
                "subject's folder"
            )
        by_subject.setdefault(subject, {})[region] = values
    return by_subject
