"""Numbers, durations and lists in words; the command that starts a study."""

from collections.abc import Iterable, Sequence
from typing import Any

from bert_encoding.core.command_line import called_as

MOST_LISTED = 8  # different values; more are shown as a range


def run_command() -> str:
    """Return the shell command that starts a study."""
    return called_as("bert-encoding-study", "python study/run.py")


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """Return ``1 story``, ``0 stories``, ``1,200 stories``; the plural is ``singular`` + s unless given."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def joined(parts: Sequence[str], last: str = "and") -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def capitalised(text: str) -> str:
    """Return a text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours: ``85 s``, ``12 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def number(value: float) -> str:
    """Return a number with at most six digits, thousands separated, without trailing zeros."""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.6g}"


def score(value: float) -> str:
    """Return a score with four decimals, or three digits where these would show nothing; integers as they are."""
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 else f"{value:.3g}"


def setting(value: Any) -> str:
    """Return the value of a setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return joined([setting(item) for item in value])
    return "none" if value is None else str(value)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the different values: None first, numbers ascending, then all others; lists become tuples."""
    unique = {tuple(value) if isinstance(value, list) else value for value in values}
    return sorted(unique, key=lambda v: (v is not None, not _is_number(v), v if _is_number(v) else str(v)))


def one_or_several(values: Iterable[Any]) -> str:
    """Return the value if all are equal, a list of a few values, or the range of many numbers."""
    several = distinct(values)
    if len(several) > MOST_LISTED and all(_is_number(value) for value in several):
        return f"{number(several[0])} to {number(several[-1])} ({len(several)} different values)"
    return joined([setting(value) for value in several])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
