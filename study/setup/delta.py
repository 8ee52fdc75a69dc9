"""The effect that matters, set before anything is seen; alone in a file, for options read it without the statistics."""

from typing import Any

from bert_encoding.core.errors import InputError

DELTA = 0.002  # CC


def check_delta(delta: float) -> None:
    """Refuse a delta that is no size of an effect.

    Raises
    ------
    InputError
        if it is not above 0 and below 1.
    """
    if not 0 < delta < 1:
        raise InputError(f"--delta {delta:g}: must be a CC above 0 and below 1")


def delta_note(options: dict[str, Any], delta: float) -> str | None:
    """Say of a delta that it is not the one that was set before there were results; None if it is.

    Parameters
    ----------
    options : of ``study.json``; a study that recorded none was begun with the default
    delta : the one that verdicts go by
    """
    first = [*options.get("deltas_before", []), options.get("delta", DELTA)][0]
    return None if delta == first else f"delta {delta:g} was chosen after the study ({first:g} was set)"
