"""Responses to several stories, a panel of voxels at a time; what trials share is kept where it is small."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.story import Dataset
from bert_encoding.regression.solvers import Targets
from bert_encoding.statistics.correlation import VOXELS_PER_BLOCK
from bert_encoding.statistics.noise_ceiling import ceiling_of

PANEL_BYTES = 2**29  # of responses in memory at a time
KEPT_BYTES = 2**30  # of responses kept for later trials

_KEPT: dict[tuple[str, ...], Any] = {}
_KEPT_OF = ""  # the data set and the voxels that all of it belongs to


def voxel_panels(dataset: Dataset, subject: str, n_rows: int) -> list[slice]:
    """Divide a subject's valid voxels into panels of ``n_rows`` rows and at most ``PANEL_BYTES`` as float32."""
    n_valid = dataset.n_valid(subject)
    n_columns = max(1, PANEL_BYTES // (4 * n_rows))
    return [slice(start, min(start + n_columns, n_valid)) for start in range(0, n_valid, n_columns)]


def stack_responses(dataset: Dataset, subject: str, stories: Sequence[str], columns: slice = slice(None)) -> np.ndarray:
    """Return valid responses to several stories, one below the other, (n_rows, n_columns) float32."""
    return np.vstack([dataset.valid_responses(name, subject, columns) for name in stories])


def scored_responses(dataset: Dataset, subject: str, stories: Sequence[str], columns: slice) -> np.ndarray:
    """Return ``stack_responses``, perhaps those of an earlier trial: leave them as they are."""
    key = _key(dataset, subject, "scored", stories, columns)
    return _kept(dataset, key, lambda: stack_responses(dataset, subject, stories, columns), lambda Y: Y.nbytes)


def fit_targets(
    dataset: Dataset, subject: str, stories: Sequence[str], columns: slice, rows: list[np.ndarray], device: torch.device
) -> Targets:
    """Return z-scored responses as ridge takes them, perhaps those of an earlier trial.

    Parameters
    ----------
    rows : row numbers of each fold

    Raises
    ------
    ValueError
        if the stories have other rows than the folds.
    """
    key = _key(dataset, subject, f"fit {_digest(*rows)} {device}", stories, columns)
    return _kept(dataset, key, lambda: _prepare(dataset, subject, stories, columns, rows, device), lambda t: t.n_bytes)


def cc_max(dataset: Dataset, subject: str, story: str) -> np.ndarray | None:
    """Return the noise ceiling of the valid voxels in a story, (n_valid,); None without repeats.

    Raises
    ------
    InputError
        if the repeats cannot be read.
    """
    repeats = dataset.stories[story].repeats.get(subject)
    if repeats is None:
        return None
    assert dataset.voxel_masks is not None
    voxels = np.flatnonzero(dataset.voxel_masks[subject])
    key = _key(dataset, subject, "ceiling", (story,), slice(None))
    return _kept(dataset, key, lambda: ceiling_of(repeats, voxels).cc_max, lambda found: found.nbytes)


def z_score(Y: np.ndarray) -> np.ndarray:
    """Z-score each voxel over all rows, in place: a panel is too large to copy."""
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = Y[:, start : start + VOXELS_PER_BLOCK]
        block[:] = ZScore.learn(block).apply(block)
    return Y


def kept_bytes(n_rows: int, n_voxels: int) -> float:
    """Return how much of a subject's responses a process keeps at most."""
    return min(float(KEPT_BYTES), 4.0 * n_rows * n_voxels)


def _prepare(
    dataset: Dataset, subject: str, stories: Sequence[str], columns: slice, rows: list[np.ndarray], device: torch.device
) -> Targets:
    return Targets.prepare(z_score(stack_responses(dataset, subject, stories, columns)), rows, device)


def _key(dataset: Dataset, subject: str, what: str, stories: Sequence[str], columns: slice) -> tuple[str, ...]:
    assert dataset.voxel_masks is not None
    return (subject, what, *stories, _digest(dataset.voxel_masks[subject]), f"{columns.start}:{columns.stop}")


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _kept(dataset: Dataset, key: tuple[str, ...], make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
    """Return what is kept under a key, or make it, and keep it while there is room.

    Nothing makes room: what trials ask for in turn would push itself out and never be found.
    """
    global _KEPT_OF
    assert dataset.voxel_masks is not None
    of = dataset.fingerprint + _digest(*dataset.voxel_masks.values())
    if of != _KEPT_OF:
        _KEPT.clear()
        _KEPT_OF = of
    if key in _KEPT:
        return _KEPT[key][0]
    made = make()
    if dataset.fingerprint and sum(n_bytes for _, n_bytes in _KEPT.values()) + size(made) <= KEPT_BYTES:
        _KEPT[key] = (made, size(made))
    return made
