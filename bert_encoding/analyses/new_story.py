"""A story outside any data set: its transcript, a Praat TextGrid or a CSV, with the TR times of a scan."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.inspect import survey
from bert_encoding.datasets.lebel2023 import spoken_words, word_tier
from bert_encoding.datasets.responses import check_regular
from bert_encoding.datasets.story import Dataset, Story, Trim

TEXTGRID, CSV = ".textgrid", ".csv"
MAX_BYTES = 64 * 2**20  # of a transcript; an hour takes about half a megabyte
MAX_CELLS = 50_000_000  # volumes x words, of 8 bytes in the Lanczos matrix; about 100 minutes of speech
MAX_SHOWN = 40  # characters of a wrong value in a message


def read_new_story(path: Path, *, tr_s: float, first_tr_s: float, trim: Trim, n_trs: int | None = None) -> Story:
    """Return a transcript as a story without responses, named after the file.

    Raises InputError if the file cannot be read, has no spoken word, or its times are not in order or not inside the
    scan.

    Parameters
    ----------
    path : ``.TextGrid``: words are in the tier of that name, or the second, as in ds003020. ``.csv``: columns ``word``
        and ``time_s`` (the word's middle), or ``word``, ``start`` and ``end``; in seconds from the story's start
    tr_s, first_tr_s : seconds from one volume to the next; the middle of the first
    n_trs : volumes of the scan; by default enough for the volumes that ``trim`` keeps to cover the last word
    """
    words, times_s, end_s = _read(path)
    if n_trs is None:
        n_trs = max(math.ceil((end_s - first_tr_s) / tr_s) + 1 + trim.end_trs, sum(trim) + 1)
    if n_trs * len(words) > MAX_CELLS:
        raise InputError(f"{path}: {len(words)} words over {n_trs} volumes are too many at once; split it into parts")
    if n_trs <= sum(trim):
        raise InputError(f"--trs {n_trs}: the model cuts {sum(trim)} volumes of every story; give more")
    story = Story(path.stem, words, times_s, first_tr_s + tr_s * np.arange(n_trs), {})
    check_text(story, str(path))
    return story


def check_text(story: Story, source: str) -> None:
    """Raise InputError, which names the first problem, if the words or times of a story are unusable."""
    checked = survey(Dataset(source=source, stories={story.name: story}, subjects=(), published_test=()))
    if checked.problems:
        raise InputError(checked.problems[0])


def describe_rows(story: Story, trim: Trim) -> str:
    """Return the volumes of a prediction's rows in words: their numbers from 1, and the first and last middle."""
    times, rows = story.tr_times_s, trim.rows(len(story.tr_times_s))
    return (
        f"{rows.stop - rows.start} rows: volumes {rows.start + 1} to {rows.stop} of {len(times)}, "
        f"{times[rows.start]:g} to {times[rows.stop - 1]:g} s from the story's start"
    )


def _read(path: Path) -> tuple[tuple[str, ...], np.ndarray, float]:
    """Return words, their middles in s, (n_words,), and the end of the last word in s."""
    check_regular(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"--story {path}: {error.strerror}; to name a story of a data set, give --data too") from None
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size / 2**20:.0f} MiB is too large for a transcript")
    if path.suffix.lower() == TEXTGRID:
        tier = word_tier(path)
        words, times_s = spoken_words(path, tier)
        return words, times_s, max(i.end_s for i in tier.intervals if i.start_s <= times_s[-1])
    if path.suffix.lower() != CSV:
        raise InputError(f"--story {path}: give a .TextGrid, a .csv, or with --data the name of a story in it")
    return _read_csv(path)


def _read_csv(path: Path) -> tuple[tuple[str, ...], np.ndarray, float]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip().lower() for name in next(reader, [])]
            times = _time_columns(path, names)
            cells = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable CSV in UTF-8 ({first_line(error)})") from None
    if not cells:
        raise InputError(f"{path}: no words in it")
    rows = [(line, dict(zip(names, row, strict=False))) for line, row in cells]
    for line, row in rows:
        if lacking := [name for name in ("word", *times) if name not in row]:
            raise InputError(f"{path}: line {line} has no {lacking[0]}")
    seconds = [_seconds(path, line, row, times) for line, row in rows]
    words = tuple(row["word"].strip() for _, row in rows)
    return words, np.array([sum(s) / len(s) for s in seconds]), max(s[-1] for s in seconds)


def _time_columns(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the name of the column of words' middles, or of their starts and ends."""
    for times in (("time_s",), ("start", "end"), ("start_s", "end_s")):
        if all(names.count(name) == 1 for name in ("word", *times)):
            return times
    shown = ", ".join(names)[:MAX_SHOWN]
    raise InputError(f"{path}: its columns are {shown or 'none'}; needed are word and time_s, or word, start and end")


def _seconds(path: Path, line: int, row: Mapping[str, str], times: Sequence[str]) -> list[float]:
    seconds = []
    for name in times:
        try:
            seconds.append(float(row[name]))
        except ValueError:
            seconds.append(math.nan)
        if not math.isfinite(seconds[-1]):
            raise InputError(f"{path}: line {line}: {name} is {row[name][:MAX_SHOWN]!r}, not a number of seconds")
    if seconds[-1] < seconds[0]:
        raise InputError(f"{path}: line {line}: the word ends at {seconds[-1]:g} s, before it starts; correct it")
    return seconds
