"""Responses as ridge wants them: checked, on its device, with their norms; trials share them, for no feature enters."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch


class Targets(NamedTuple):
    """Responses of some voxels to the rows that ridge fits.

    Attributes
    ----------
    Y : (n_trs, n_voxels) float32 or float64, on the device where ridge computes
    norms : (n_folds, n_voxels) of the centred rows of each fold; 0 where a voxel is constant there
    """

    Y: torch.Tensor
    norms: torch.Tensor

    @classmethod
    def prepare(cls, Y: np.ndarray, rows: list[np.ndarray], device: torch.device | None = None) -> "Targets":
        """Check responses, (n_trs, n_voxels), and move them to the device.

        Parameters
        ----------
        rows : row numbers of each fold

        Raises
        ------
        ValueError
            if rows disagree or values are not finite.
        """
        n_rows = sum(map(len, rows))
        if len(Y) != n_rows:
            raise ValueError(f"rows disagree: X {n_rows}, Y {len(Y)}")
        if not np.isfinite(Y).all():
            raise ValueError("Y has non-finite values")
        moved = torch.from_numpy(Y).to(device or "cpu")
        return cls(moved, torch.stack([_centred_norms(moved[fold]) for fold in rows]))

    def blocks(self, n_columns: int) -> Iterator["Targets"]:
        """Yield the voxels ``n_columns`` at a time."""
        for start in range(0, self.Y.shape[1], n_columns):
            columns = slice(start, start + n_columns)
            yield Targets(self.Y[:, columns], self.norms[:, columns])

    @property
    def n_bytes(self) -> int:
        return self.Y.nbytes + self.norms.nbytes


def rows_of_folds(folds: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each fold label, (n_trs,)."""
    return [np.flatnonzero(folds == label) for label in np.unique(folds)]


def _centred_norms(Y: torch.Tensor) -> torch.Tensor:
    centred = Y - Y.mean(dim=0)
    norms = centred.square_().sum(dim=0).sqrt()
    norms[Y.amax(dim=0) == Y.amin(dim=0)] = 0  # the rounded mean of equal values leaves a trace
    return norms
