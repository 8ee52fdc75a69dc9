"""The effect that matters, set before anything is seen; alone in a file, for options read it without the statistics."""

DELTA = 0.002  # CC
