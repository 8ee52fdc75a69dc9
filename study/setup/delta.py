"""Delta, the smallest effect that matters; in its own file because options read it without the statistics."""

from typing import Any

from bert_encoding.core.errors import InputError

DELTA = 0.002  # CC


def check_delta(delta: float) -> None:
    """Refuse a delta that is not a difference in CC above 0 and below 1."""
    if not 0 < delta < 1:
        raise InputError(f"--delta {delta:g}: must be a CC above 0 and below 1")


def delta_note(options: dict[str, Any], delta: float) -> str | None:
    """Return a note if delta is not the one that the study began with: without a record of it, the default."""
    first = [*options.get("deltas_before", []), options.get("delta", DELTA)][0]
    return None if delta == first else f"delta {delta:g} was chosen after the study ({first:g} was set)"
