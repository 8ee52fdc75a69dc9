"""Numbers and lists in words, with singular and plural right; the command of a study."""

from collections.abc import Iterable, Sequence
from typing import Any

from bert_encoding.core.command_line import called_as

MOST_LISTED = 8  # different values; more are told as a range


def run_command() -> str:
    """Return what starts a study in a shell."""
    return called_as("bert-encoding-study", "python study/run.py")


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """Return ``1 story``, ``0 stories``, ``1,200 stories``; the plural is that of ``singular`` + s if none is given."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def joined(parts: Sequence[str], last: str = "and") -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}" if parts else ""


def number(value: float) -> str:
    """Return a number as a paper prints it: at most six digits, thousands separated, no zeros at the end."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) < 1e6 else f"{value:.6g}"
    return f"{value:.6g}"


def said(value: Any) -> str:
    """Return a setting's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return joined([said(one) for one in value])
    return "none" if value is None else str(value)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the different values, numbers ascending, lists as tuples, None first."""
    found = {tuple(value) if isinstance(value, list) else value for value in values}
    return sorted(found, key=lambda v: (v is not None, not _is_number(v), v if _is_number(v) else str(v)))


def one_or_several(values: Iterable[Any]) -> str:
    """Return the one value, all of a few, or the range of many numbers."""
    several = distinct(values)
    if len(several) > MOST_LISTED and all(_is_number(value) for value in several):
        return f"{number(several[0])} to {number(several[-1])} ({len(several)} different values)"
    return joined([said(value) for value in several])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
