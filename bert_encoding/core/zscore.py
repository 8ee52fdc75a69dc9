"""Z-scores whose mean and standard deviation come from other rows."""

from typing import NamedTuple

import numpy as np


class ZScore(NamedTuple):
    """Mean and standard deviation of some rows, (n_columns,) each, to apply to others."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def learn(cls, X: np.ndarray) -> "ZScore":
        """Return mean and standard deviation of each column; a constant column keeps scale 1 and becomes 0."""
        mean, std = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
        varies = (np.ptp(X, axis=0) > 0) & (std > 1e-12)  # the rounded mean of equal values has a tiny std
        return cls(np.where(varies, mean, X[0]), np.where(varies, std, 1.0))

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Return z-scored ``X``, float32."""
        return ((X - self.mean) / self.std).astype(np.float32)
