"""Praat's TextGrids: tiers of labelled intervals, in each of its three text dialects.

Dialects
--------
long : ``File type = "ooTextFile"``, every value behind a label (``xmin = 0.5``)
short : the same values in the same order without labels; once written as ``"ooTextFile short"``
chronological : ``"Praat chronological TextGrid text file"``, all tiers mixed, in the order of time, without counts

In each, only texts in double quotes (a quote within is doubled), numbers and flags (``<exists>``) have a meaning;
labels and what follows ``!`` on a line are for human readers. So one list of values serves all three. Texts are UTF-8,
or UTF-16 after its byte-order mark; other encodings are refused rather than guessed: a wrong guess changes words.

Source: https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html
"""

import codecs
import math
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.responses import read_file

INTERVALS, POINTS = "IntervalTier", "TextTier"
BY_TIER = ("ooTextFile", "ooTextFile short")
BY_TIME = "Praat chronological TextGrid text file"
MAX_SHOWN = 40  # characters of a wrong value in a message

_LABELS = "File type Object class xmin xmax tiers[?] size item name intervals points text mark number time"
_TOKEN = re.compile(
    rf"""(?: \s | ![^\r\n]* | (?:{"|".join(_LABELS.split())}) (?![^\s"=:\[]) | [=:] | \[\d*\] )*+
    (?: "(?P<text>[^"]*+(?:""[^"]*+)*+)" | (?P<open>") | (?P<bare>[^\s"]+) | \Z )""",
    re.VERBOSE | re.ASCII,
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)


class Interval(NamedTuple):
    """A labelled stretch of time, in seconds; a point starts and ends at the same time."""

    start_s: float
    end_s: float
    text: str


class Tier(NamedTuple):
    """One tier: ``kind`` is ``IntervalTier`` or ``TextTier`` (points), ``end_s`` the end that its header states."""

    kind: str
    name: str
    end_s: float
    intervals: tuple[Interval, ...]


def read_textgrid(path: Path) -> tuple[Tier, ...]:
    """Read all tiers of a TextGrid, in any text dialect.

    Overlapping intervals are not refused here, since tiers that are never used may have them. A chronological file that
    was cut short between two intervals cannot be recognised: it contains no counts.

    Raises InputError if the file cannot be read, is binary, of another encoding or cut short, or a value is not the
    number, text or count that its place requires.
    """
    tokens = _Tokens(path, _decoded(path))
    dialect = tokens.text("the file type")
    if dialect in BY_TIER:
        return _read_by_tier(tokens)
    if dialect == BY_TIME:
        return _read_by_time(tokens)
    tokens.refuse("the file type", f'"{BY_TIER[0]}" or "{BY_TIME}"')


def _decoded(path: Path) -> str:
    content = read_file(path)
    if content.startswith(b"ooBinaryFile"):
        raise InputError(f"{path}: a binary TextGrid; open it in Praat and save it as a text file")
    encoding = "UTF-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "UTF-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{content[error.start]:02x})"
        raise InputError(f"{path}: wrong encoding: {byte} is not {encoding}; save the file as UTF-8") from None
    if "\0" in text:
        raise InputError(
            f"{path}: a binary file or one of wrong encoding (zero at character {text.index(chr(0))}); save it in "
            "Praat as a text file"
        )
    return text.removeprefix("\ufeff")


def _read_by_tier(tokens: "_Tokens") -> tuple[Tier, ...]:
    if tokens.text("the object class") != "TextGrid":
        tokens.refuse("the object class", '"TextGrid"')
    tokens.number("the start of the file")
    tokens.number("the end of the file")
    if not tokens.exists("the flag of the tiers"):
        return ()
    n_tiers = tokens.count("the number of tiers")
    tiers = tuple(_read_tier(tokens, number) for number in range(1, n_tiers + 1))
    tokens.finish(f"after tier {n_tiers}, the last: expected the end of the file; a count in it is too small")
    return tiers


def _read_tier(tokens: "_Tokens", number: int) -> Tier:
    head = _read_head(tokens, number)
    where = f"tier {number} ({head.name})"
    n = tokens.count(f"{where}: the number of intervals")
    rows = (_read_interval(tokens, f"{where}, interval {i} of {n}", head.kind) for i in range(1, n + 1))
    return head._replace(intervals=tuple(rows))


def _read_by_time(tokens: "_Tokens") -> tuple[Tier, ...]:
    tokens.number("the start of the file")
    tokens.number("the end of the file")
    n_tiers = tokens.count("the number of tiers")
    heads = [_read_head(tokens, number) for number in range(1, n_tiers + 1)]
    rows: list[list[Interval]] = [[] for _ in heads]
    while not tokens.at_end():
        number = tokens.count("the tier of an interval")
        if not 1 <= number <= n_tiers:
            tokens.refuse("the tier of an interval", f"1 to {n_tiers}")
        head, intervals = heads[number - 1], rows[number - 1]
        where = f"tier {number} ({head.name}), interval {len(intervals) + 1}"
        intervals.append(_read_interval(tokens, where, head.kind))
    return tuple(head._replace(intervals=tuple(own)) for head, own in zip(heads, rows, strict=True))


def _read_head(tokens: "_Tokens", number: int) -> Tier:
    after = f", after as many intervals as tier {number - 1} counts" if number > 1 else ""
    where = f"the class of tier {number}{after}"
    kind = tokens.text(where)
    if kind not in (INTERVALS, POINTS):
        tokens.refuse(where, f'"{INTERVALS}" or "{POINTS}"')
    name = tokens.text(f"the name of tier {number}")
    tokens.number(f"tier {number} ({name}): its start")
    return Tier(kind, name, tokens.number(f"tier {number} ({name}): its end"), ())


def _read_interval(tokens: "_Tokens", where: str, kind: str) -> Interval:
    start_s = tokens.number(where)
    end_s = start_s if kind == POINTS else tokens.number(where)
    return Interval(start_s, end_s, tokens.text(where))


class _Tokens:
    """The values of a file in order; it knows the line of the latest one, for error messages."""

    def __init__(self, path: Path, content: str) -> None:
        self._path, self._content = path, content
        self._matches = [match for match in _TOKEN.finditer(content) if match.lastgroup]
        self._next = 0

    def at_end(self) -> bool:
        return self._next == len(self._matches)

    def text(self, where: str) -> str:
        """Return the next value; refuse it if it is not a text."""
        match = self._take(where)
        if match.lastgroup != "text":
            self.refuse(where, "a text in quotes")
        return match["text"].replace('""', '"')

    def number(self, where: str) -> float:
        """Return the next value; refuse it if it is not a finite number."""
        bare = self._take(where)["bare"] or ""
        value = float(bare) if _NUMBER.fullmatch(bare) else math.nan
        if not math.isfinite(value):
            self.refuse(where, "a number")
        return value

    def count(self, where: str) -> int:
        """Return the next value; refuse it if it is not a whole number from 0."""
        value = self.number(where)
        if value < 0 or value != int(value):
            self.refuse(where, "a whole number from 0")
        return int(value)

    def exists(self, where: str) -> bool:
        """Return whether the next value, a flag, is ``<exists>``."""
        flag = self._take(where)["bare"]
        if flag not in ("<exists>", "<absent>"):
            self.refuse(where, "<exists> or <absent>")
        return bool(flag == "<exists>")

    def finish(self, problem: str) -> None:
        """Refuse a value after the last expected one."""
        if not self.at_end():
            self._raise(self._matches[self._next], problem)

    def refuse(self, where: str, expected: str) -> NoReturn:
        """Raise an error that names the value taken last."""
        self._raise(self._matches[self._next - 1], f"{where}: expected {expected}")

    def _take(self, where: str) -> "re.Match[str]":
        if self.at_end():
            raise InputError(f"{self._path}: ends before {where}; it is cut short or a count in it is too large")
        match = self._matches[self._next]
        self._next += 1
        if match.lastgroup == "open":
            self._raise(match, f"{where}: a quote opens and never closes; the file is cut short")
        return match

    def _raise(self, match: "re.Match[str]", problem: str) -> NoReturn:
        kind = str(match.lastgroup)
        line = len(re.findall(r"\r\n?|\n", self._content[: match.start(kind)])) + 1
        value = " ".join(match[kind].split())[:MAX_SHOWN]
        raise InputError(f"{self._path}: line {line}: {problem}; got {value!r}")
