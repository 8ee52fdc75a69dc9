"""One seed per trial, split into named generators."""

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for one named purpose; different names give independent seeds."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator for one named purpose, e.g. ``generator(0, "masking", epoch)``."""
    return np.random.default_rng(derive_seed(seed, *names))
