"""A fixed subset of the voxels, for a search that need not predict the whole brain.

It is chosen once, before any trial: the voxels that the frozen encoder predicts best by cross-validation inside the fit
stories. Validation and test responses are not used.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.files import content_key
from bert_encoding.core.names import FROZEN
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets.rois import as_voxels, read_arrays
from bert_encoding.datasets.story import Dataset
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task


def choose_voxels(config: TrialConfig, task: Task, n: int) -> dict[str, np.ndarray]:
    """Return the ``n`` voxels of each subject that the frozen encoder predicts best, subject -> ascending indices.

    Ties go to the lower index. Only the fit stories of the first split are used.
    """
    chain = Chain(replace(config, method=FROZEN), task)
    fit = task.splits[0].fit
    seen = chain.score_seen(chain.downsampled(chain.bert_encoder.copy_model().bert, fit, fit), fit)
    masks = task.dataset.voxel_masks
    assert masks is not None
    best = {subject: np.argsort(-cc, kind="stable")[:n] for subject, cc in seen.items()}
    return {subject: np.sort(np.flatnonzero(masks[subject])[indices]) for subject, indices in best.items()}


def keep_voxels(dataset: Dataset, voxels: Mapping[str, np.ndarray]) -> Dataset:
    """Return the data set with all other voxels masked out; voxels that cannot be scored stay masked."""
    assert dataset.voxel_masks is not None
    masks = dataset.voxel_masks.items()
    return replace(dataset, voxel_masks={s: mask & np.isin(np.arange(mask.size), voxels[s]) for s, mask in masks})


def voxels_key(dataset: Dataset) -> str:
    """Return a hash of the voxels that are scored."""
    assert dataset.voxel_masks is not None
    return content_key({s: np.flatnonzero(mask).tolist() for s, mask in dataset.voxel_masks.items()})


def write_voxels(file: Path, voxels: Mapping[str, np.ndarray]) -> None:
    """Write subject -> indices as ``.npz``."""
    with atomic_path(file) as temporary, temporary.open("wb") as raw:
        np.savez(raw, **voxels)  # type: ignore[arg-type]  # its stub confuses names with allow_pickle


def read_voxels(file: Path, dataset: Dataset) -> dict[str, np.ndarray]:
    """Read the voxels to keep: ``.npy`` with indices or a mask for one subject, ``.npz`` with one array per subject.

    InputError if the file is damaged, lacks a subject, or names voxels that do not exist or none that can be scored.
    """
    assert dataset.voxel_masks is not None
    arrays = read_arrays(file) if file.suffix == ".npz" else _read_npy(file, dataset.subjects)
    voxels = {}
    for subject in dataset.subjects:
        if subject not in arrays:
            raise InputError(f"{file}: no voxels of subject {subject}; it holds {', '.join(sorted(arrays)) or 'none'}")
        mask = dataset.voxel_masks[subject]
        voxels[subject] = as_voxels(arrays[subject], mask.size, f"{file}: subject {subject}")
        if not mask[voxels[subject]].any():
            raise InputError(f"{file}: subject {subject}: none of these voxels is finite and varies in every story")
    return voxels


def _read_npy(file: Path, subjects: tuple[str, ...]) -> dict[str, np.ndarray]:
    if len(subjects) > 1:
        raise InputError(
            f"{file}: one list of voxels for {len(subjects)} subjects; give an .npz file with one array per subject: "
            f"{', '.join(subjects)}"
        )
    try:
        with file.open("rb") as raw:
            return {subjects[0]: np.lib.format.read_array(raw, allow_pickle=False)}
    except Exception as error:  # a damaged header is parsed as Python and may raise any exception
        raise InputError(f"{file}: not a readable .npy array ({first_line(error)})") from None
