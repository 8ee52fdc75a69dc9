"""Responses to several stories, one panel of voxels at a time, so that they need not fit in memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bert_encoding.core import worker_cache
from bert_encoding.core.worker_cache import Value, WorkerCache
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.story import Dataset
from bert_encoding.regression.ridge import CrossValidatedRidge
from bert_encoding.regression.solvers import Targets
from bert_encoding.statistics.correlation import VOXELS_PER_BLOCK
from bert_encoding.statistics.noise_ceiling import ceiling_of

PANEL_BYTES = 2**29  # of responses in memory at a time


class ResponsePanel(NamedTuple):
    """The responses of some of a subject's valid voxels."""

    dataset: Dataset
    subject: str
    fit: Sequence[str]  # stories
    scored: Sequence[str]
    columns: slice  # counted among the valid voxels
    cache: WorkerCache

    def targets(self, ridge: CrossValidatedRidge) -> Targets:
        """Return z-scored responses to the fit stories, prepared for ridge."""
        return self._cached(
            f"fit {_digest(*ridge.rows)} {ridge.device}",
            self.fit,
            lambda: Targets.prepare(z_score(self._read(self.fit))[0], ridge.rows, ridge.device),
            lambda targets: targets.n_bytes,
        )

    def scored_responses(self) -> np.ndarray:
        """Return the responses to the scored stories in the units of the file, (n_scored_rows, n_columns) float32."""
        return self._cached("scored", self.scored, lambda: self._read(self.scored), lambda Y: Y.nbytes)

    def z_scored(self) -> tuple[np.ndarray, ...]:
        """Return the responses to fit and scored stories, both z-scored by mean and deviation of the fit rows."""
        return z_score(self._read(self.fit), self._read(self.scored))

    def _read(self, stories: Sequence[str]) -> np.ndarray:
        return stack_responses(self.dataset, self.subject, stories, self.columns)

    def _cached(
        self, kind: str, stories: Sequence[str], make: Callable[[], Value], n_bytes: Callable[[Value], int]
    ) -> Value:
        key = (self.subject, kind, *stories, f"{self.columns.start}:{self.columns.stop}")
        return self.cache.get_sized(_owner(self.dataset), key, make, n_bytes)


def panels(
    dataset: Dataset,
    subject: str,
    fit: Sequence[str],
    scored: Sequence[str],
    n_rows: int,
    cache: WorkerCache | None = None,
) -> Iterator[ResponsePanel]:
    """Divide a subject's valid voxels into panels.

    Parameters
    ----------
    n_rows : float32 values in memory per voxel; a panel has at most ``PANEL_BYTES`` of them
    cache : shared with other trials; None reads responses whenever they are requested
    """
    n_valid, n_columns = dataset.n_valid(subject), max(1, PANEL_BYTES // (4 * n_rows))
    for start in range(0, n_valid, n_columns):
        columns = slice(start, min(start + n_columns, n_valid))
        yield ResponsePanel(dataset, subject, fit, scored, columns, cache or WorkerCache(max_bytes=0))


def stack_responses(dataset: Dataset, subject: str, stories: Sequence[str], columns: slice = slice(None)) -> np.ndarray:
    """Return valid responses to several stories, one below the other, (n_rows, n_columns) float32."""
    return np.vstack([dataset.valid_responses(name, subject, columns) for name in stories])


def cc_max(dataset: Dataset, subject: str, story: str, cache: WorkerCache) -> np.ndarray | None:
    """Return the noise ceiling of the valid voxels in a story, (n_valid,); None without repeats."""
    repeats = dataset.stories[story].repeats.get(subject)
    if repeats is None:
        return None
    assert dataset.voxel_masks is not None
    voxels = np.flatnonzero(dataset.voxel_masks[subject])
    key = (subject, "ceiling", story)
    return cache.get_sized(_owner(dataset), key, lambda: ceiling_of(repeats, voxels).cc_max, lambda cc: cc.nbytes)


def z_score(Y: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Z-score arrays in place by each voxel's mean and deviation over the rows of the first; a panel is too large to
    copy."""
    for start in range(0, Y.shape[1], VOXELS_PER_BLOCK):
        block = slice(start, start + VOXELS_PER_BLOCK)
        constants = ZScore.learn(Y[:, block])
        for array in (Y, *others):
            array[:, block] = constants.apply(array[:, block])
    return Y, *others


def cached_bytes(n_rows: int, n_voxels: int) -> float:
    """Return the memory of a subject's responses in the cache at most."""
    return min(float(worker_cache.CACHED_BYTES), 4.0 * n_rows * n_voxels)


def _owner(dataset: Dataset) -> str:
    """Return a name of the data set and its valid voxels; empty without a fingerprint."""
    assert dataset.voxel_masks is not None
    return dataset.fingerprint and dataset.fingerprint + _digest(*dataset.voxel_masks.values())


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
