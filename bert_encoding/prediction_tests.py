"""What is said of predictions beside their CC: chance in every voxel, and how the mean CC varies over time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bert_encoding.significance import N_PERMUTATIONS, benjamini_hochberg, block_permutation_p, count_orders
from bert_encoding.time_intervals import Replicates, join_replicates, time_replicates

FALSE_DISCOVERY_RATE = 0.05


class PredictionTests(NamedTuple):
    """Tests of one subject's predictions.

    Attributes
    ----------
    p : (n_voxels,) of block permutations; NaN throughout where the stories are too short for them. Of silent voxels
        about 5% have p < 0.05 (simulated: 4.7 to 5.2%; real responses against those of other stories: 4.4% reversed,
        4.9% another component, 7.3% the same component, as stories share what comes with their beginning)
    replicates : the mean CC over voxels, of the rows as they are and of resamples of their time; the draws depend on
        the rows alone, so that those of two models scored on the same stories are pairs
    """

    p: np.ndarray
    replicates: Replicates

    @property
    def q(self) -> np.ndarray:
        """Benjamini and Hochberg's q, (n_voxels,)."""
        return benjamini_hochberg(self.p)

    @property
    def share_significant(self) -> float | None:
        """The share of voxels with q below ``FALSE_DISCOVERY_RATE``; None where there is no p."""
        return float(np.mean(self.q < FALSE_DISCOVERY_RATE)) if np.isfinite(self.p).any() else None


def examine_predictions(Y: np.ndarray, predicted: np.ndarray, story_of_row: np.ndarray) -> PredictionTests:
    """Test the predictions of some voxels, (n_rows, n_voxels)."""
    enough = count_orders(story_of_row) >= N_PERMUTATIONS
    p = block_permutation_p(Y, predicted, story_of_row) if enough else np.full(Y.shape[1], np.nan)
    return PredictionTests(p, time_replicates(Y, predicted, story_of_row))


def join_tests(parts: Sequence[PredictionTests]) -> PredictionTests:
    """Join the tests of one subject's panels of voxels."""
    return PredictionTests(
        np.concatenate([part.p for part in parts]), join_replicates([part.replicates for part in parts])
    )
