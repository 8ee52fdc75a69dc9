"""Word vectors without BERT."""

from collections.abc import Sequence

import numpy as np


def word_rate(spoken: Sequence[str]) -> np.ndarray:
    """Return 1 for every spoken word and 0 for empty rows and tags, (n_words, 1) float32.

    Downsampled, it is how many words fall on each TR.
    """
    return np.array([[float(word != "")] for word in spoken], dtype=np.float32).reshape(-1, 1)
