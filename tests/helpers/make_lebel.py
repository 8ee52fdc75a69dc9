"""An imitation of OpenNeuro ds003020, written in every dialect that TextGrids come in."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from make_data import story_words

Labelled = list[tuple[float, float, str]]
Tiers = list[tuple[str, Labelled]]  # name and intervals; all tiers begin at 0 and end with the longest


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _end(tiers: Tiers) -> float:
    return max(end for _, intervals in tiers for _, end, _ in intervals)


def long_textgrid(tiers: Tiers) -> str:
    """Return a TextGrid with every value behind a label, as Praat's "Save as text file" lays it out."""
    end = _end(tiers)
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0 ", f"xmax = {end} "]
    lines += ["tiers? <exists> ", f"size = {len(tiers)} ", "item []: "]
    for at, (name, intervals) in enumerate(tiers, 1):
        lines += [f"    item [{at}]:", '        class = "IntervalTier" ', f"        name = {_quoted(name)} "]
        lines += ["        xmin = 0 ", f"        xmax = {end} ", f"        intervals: size = {len(intervals)} "]
        for i, (start, stop, text) in enumerate(intervals, 1):
            lines += [f"        intervals [{i}]:", f"            xmin = {start} ", f"            xmax = {stop} "]
            lines += [f"            text = {_quoted(text)} "]
    return "\n".join(lines) + "\n"


def short_textgrid(tiers: Tiers, head: str = 'File type = "ooTextFile"\nObject class = "TextGrid"') -> str:
    """Return a TextGrid with one value per line and no labels."""
    end = _end(tiers)
    lines = [head, "", "0", f"{end}", "<exists>", f"{len(tiers)}"]
    for name, intervals in tiers:
        lines += ['"IntervalTier"', _quoted(name), "0", f"{end}", f"{len(intervals)}"]
        for start, stop, text in intervals:
            lines += [f"{start}", f"{stop}", _quoted(text)]
    return "\n".join(lines) + "\n"


def chronological_textgrid(tiers: Tiers) -> str:
    """Return a TextGrid whose tiers are mixed in the order of time."""
    lines = ['"Praat chronological TextGrid text file"', f"0 {_end(tiers)}   ! Time domain."]
    lines += [f"{len(tiers)}   ! Number of tiers."]
    lines += [f'"IntervalTier" {_quoted(name)} 0 {_end(tiers)}' for name, _ in tiers]
    rows = [(start, at, i) for at, (_, intervals) in enumerate(tiers) for i, (start, _, _) in enumerate(intervals)]
    for start, at, i in sorted(rows):
        name, intervals = tiers[at]
        lines += ["", f"! {name}:", f"{at + 1} {start} {intervals[i][1]}", _quoted(intervals[i][2])]
    return "\n".join(lines) + "\n"


DIALECTS: dict[str, Callable[[Tiers], str]] = {
    "long": long_textgrid,
    "short": short_textgrid,
    "old": partial(short_textgrid, head='File type = "ooTextFile short"\n"TextGrid"'),  # of old versions of Praat
    "chronological": chronological_textgrid,
}
WRITTEN_AS = (  # one a story, in turn
    ("long", "utf-8"),
    ("short", "utf-8"),
    ("chronological", "utf-8"),
    ("long", "utf-8-sig"),
    ("chronological", "utf-16"),
    ("old", "utf-8"),
)


def story_tiers(words: list[str], starts_s: np.ndarray, ends_s: np.ndarray, overlapping_phones: bool = False) -> Tiers:
    """Return tiers of phones and words; around the words lie pauses, breaths and marks, as in the data set."""
    labelled: Labelled = [(0.0, 0.01, "{sentence_start}")]
    for at, (word, start, end) in enumerate(zip(words, starts_s, ends_s, strict=True)):
        pause = ("", "{BR}", "sp", "{NS}")[at % 4]
        labelled += [(labelled[-1][1], float(start), pause), (float(start), float(end), word.upper())]
    labelled.append((labelled[-1][1], labelled[-1][1] + 1.0, "{sentence_end}"))
    shift = 0.04 if overlapping_phones else 0.0
    phones = [(start, end + shift, "AH0" if text.isalpha() else "sp") for start, end, text in labelled]
    return [("phone", phones), ("word", labelled)]


def make_lebel(
    folder: Path,
    stories: tuple[str, ...] = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "wheretheressmoke"),
    subjects: tuple[str, ...] = ("UTS01", "UTS03"),
    n_words: int = 150,
    n_voxels: int = 12,
    seed: int = 0,
    n_repeats: int = 5,
) -> Path:
    """Write a data set in the format of ds003020 and return its root, which contains ``derivative/``.

    The first half of the voxels follow word rate two and three TRs later; the others are noise. The responses to
    wheretheressmoke are the average of ``n_repeats`` repeats, which are kept.
    """
    derivative = folder / "derivative"
    (derivative / "TextGrids").mkdir(parents=True, exist_ok=True)
    volumes = {}
    for at, name in enumerate(stories):
        rng = np.random.default_rng((seed, at))
        n = n_words + 7 * at
        starts = np.cumsum(rng.uniform(0.15, 1.0, n)).round(3)
        ends = (starts + 0.14).round(3)
        tiers = story_tiers(story_words(n, seed + at), starts, ends, overlapping_phones=name == "wheretheressmoke")
        dialect, encoding = WRITTEN_AS[at % len(WRITTEN_AS)]
        (derivative / "TextGrids" / f"{name}.TextGrid").write_bytes(DIALECTS[dialect](tiers).encode(encoding))
        volumes[name] = int((ends[-1] + 9) / 2) + 11
        drive = _drive((starts + ends) / 2, volumes[name])
        for subject in subjects:
            file = derivative / "preprocessed_data" / subject / f"{name}.hf5"
            _write_responses(file, drive, n_voxels, n_repeats if name == "wheretheressmoke" else 1, rng)
    (derivative / "respdict.json").write_text(json.dumps(volumes))
    return folder


def _drive(times_s: np.ndarray, n_volumes: int) -> np.ndarray:
    """Return word rate two and three TRs ago, (n_volumes - 20,)."""
    edges = np.arange(n_volumes - 4) * 2.0 - 10
    rate = np.histogram(times_s, edges)[0].astype(float)
    return (np.roll(rate, 2) + np.roll(rate, 3))[10:-5]


def _write_responses(file: Path, drive: np.ndarray, n_voxels: int, n_repeats: int, rng: np.random.Generator) -> None:
    driven = np.arange(n_voxels) < n_voxels // 2
    repeats = rng.standard_normal((n_repeats, drive.size, n_voxels)) + 0.8 * np.outer(drive, driven)
    repeats = (repeats - repeats.mean(axis=1, keepdims=True)) / repeats.std(axis=1, keepdims=True)
    average = repeats.mean(axis=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:
        content["data"] = (average - average.mean(axis=0)) / average.std(axis=0)
        if n_repeats > 1:
            content["individual_repeats"] = repeats
