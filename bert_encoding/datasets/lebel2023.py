"""LeBel et al. 2023, OpenNeuro ds003020: nine subjects listened to stories for hours.

Contract
--------
TR
    2.0 s: the scanner's was 2.0045 s, but every published pipeline counts in 2.0.
``derivative/respdict.json``
    story -> volumes of its scan, 84 stories. The scan began 10 s before the story, so TR times are
    ``arange(volumes - 5) * 2.0 - 10 + 1``: the middle of each volume, in s.
``derivative/TextGrids/<story>.TextGrid``
    84 files, in three dialects; tiers of phones and of words. A word's time is the middle of its interval.
``derivative/preprocessed_data/<subject>/<story>.hf5``
    ``data`` (volumes - 20, n_voxels) float64, z-scored: rows ``[10:-5]`` of the TR times. In the repeated test story
    also ``individual_repeats`` (n_repeats, volumes - 20, n_voxels): 10 repeats in UTS01 to UTS03, 5 in UTS04 to UTS08.
Complete copies hold
    stories: 84 in UTS01 to UTS03, 26 in UTS04, 27 in UTS05 to UTS08, 54 in UTS09; voxels from UTS01 on: 81126, 94251,
    95556, 109469, 99322, 92198, 94395, 97023, 98336.
Held out
    the published test stories are averages over repeated scans; of the three, those with responses of any subject.
Known defects
    UTS04 has no `life`; UTS04's files were damaged before version 1.0.7; UTS02 was scanned with another protocol. Phone
    intervals of wheretheressmoke overlap, which does not matter here: only words are read.

Words are lower-cased, and marks of breaths, noise and sentence bounds (``NOT_SPOKEN``) left out, as published. The
published rule keeps intervals without text. We leave them out: they are the pauses that Praat fills in between words,
their vectors are zero, so that no feature differs. Other tags stay as rows without a spoken word.

Sources: https://doi.org/10.18112/openneuro.ds003020, https://doi.org/10.1038/s41597-023-02437-z
"""

import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from bert_encoding.core.errors import InputError, first_line, first_names
from bert_encoding.datasets.lab import PUBLISHED_TEST, check_name, shown_name
from bert_encoding.datasets.responses import Responses, check_regular, read_file
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.datasets.textgrid import INTERVALS, Interval, Tier, read_textgrid

TR_S, LEAD_S = 2.0, 10.0
PAD_TRS, CUT_TRS = 5, 20  # volumes without a TR time; volumes without responses
MAX_VOLUMES = 100_000  # more than two days in the scanner
NOT_SPOKEN = frozenset({"sentence_start", "sentence_end", "br", "lg", "ls", "ns", "sp", ""})
MAX_OVERLAP_S = 0.02  # two frames of a forced aligner; a word's time moves by half of that
MAX_SILENT_END_S = 60.0
DATA, REPEATS = "data", "individual_repeats"
FETCH = "content not fetched; run `datalad get`, or `python -m bert_encoding fetch lebel2023`"

Files = Mapping[str, Path]  # story -> its file


def recognises(path: Path) -> bool:
    """Whether a folder is the data set, or its ``derivative`` folder."""
    return _derivative(path) is not None


def open_lebel(path: Path) -> Dataset:
    """Open the data set: every story with text and a length, and the responses that exist; responses are not read.

    Responses whose content a DataLad clone has not fetched are left out with a note. Raises InputError if another file
    is missing, malformed or not fetched, or responses have no text or no length.
    """
    folder = _derivative(path)
    if folder is None:
        raise InputError(f"{path}: not ds003020; expected its root or its folder derivative, with respdict.json")
    volumes = read_volumes(folder / "respdict.json")
    grids = _files(folder / "TextGrids", ".TextGrid")
    responses, notes = _responses(folder / "preprocessed_data")
    for files in responses.values():
        _check_text(folder, files, grids, volumes)
    heard = {name for files in responses.values() for name in files}
    usable, left_out = _usable(grids, volumes, heard)
    tiers = {name: word_tier(grids[name]) for name in usable}
    stories = {name: _story(name, grids[name], tiers[name], volumes[name], responses) for name in usable}
    cut_short = [note for name, tier in tiers.items() for note in _silent_end(name, tier)]
    return Dataset(
        source=str(path),
        stories=stories,
        subjects=tuple(sorted(responses)),
        published_test=tuple(name for name in PUBLISHED_TEST if name in heard),
        notes=(*notes, *left_out, *cut_short, *_known_defects(responses, stories)),
    )


def _derivative(path: Path) -> Path | None:
    for folder in (path, path / "derivative"):
        has_lengths = (folder / "respdict.json").exists() or (folder / "respdict.json").is_symlink()
        if (folder / "TextGrids").is_dir() and (has_lengths or (folder / "preprocessed_data").is_dir()):
            return folder
    return None


def _files(folder: Path, ending: str) -> dict[str, Path]:
    """Return story -> file, without hidden files (traces of a copy)."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in entries if file.name.endswith(ending) and not file.is_dir() and file.name[0] != "."]
    for file in files:
        check_name(file)
        check_regular(file)
    return {file.name.removesuffix(ending): file for file in files}


def _is_fetched(file: Path) -> bool:
    """Whether a file's content was fetched: else git-annex leaves a dangling link, or a line that names the content."""
    if not file.exists():
        return not file.is_symlink()
    try:
        return file.stat().st_size > 1000 or b"annex/objects/" not in file.read_bytes()
    except OSError:  # raised again, and named, when the file is read
        return True


def _responses(folder: Path) -> tuple[dict[str, Files], list[str]]:
    """Return subject -> story -> file, and notes of what was not fetched."""
    subjects = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    for subject in subjects:
        check_name(subject)
    responses: dict[str, Files] = {}
    notes, absent = [], None
    for subject in subjects:
        named = {} if subject.name.startswith(".") else _files(subject, ".hf5")
        fetched = {story: file for story, file in named.items() if _is_fetched(file)}
        if fetched:
            responses[subject.name] = fetched
        if missing := [file for story, file in named.items() if story not in fetched]:
            absent = absent or missing[0]
            notes.append(f"{subject.name}: responses to {len(missing)} of {len(named)} stories left out: {FETCH}")
    if not responses:
        raise InputError(f"{absent}: {FETCH}" if absent else f"{folder}: no responses; expected <subject>/<story>.hf5")
    return responses, notes


def _check_text(folder: Path, files: Files, grids: Files, volumes: Mapping[str, int]) -> None:
    for name, file in files.items():
        if name not in grids:
            raise InputError(
                f"{file}: story {shown_name(name)} has no text; expected {folder / 'TextGrids' / name}.TextGrid"
            )
        if name not in volumes:
            raise InputError(f"{file}: story {name} has no length in {folder / 'respdict.json'}; add its volumes")
        if not _is_fetched(grids[name]):
            raise InputError(f"{grids[name]}: {FETCH}")


def _usable(grids: Files, volumes: Mapping[str, int], heard: set[str]) -> tuple[list[str], list[str]]:
    """Return the stories with text and length, and a note on each kind that is left out."""
    complete = set(grids) & set(volumes)
    unfetched = {name for name in complete - heard if not _is_fetched(grids[name])}
    reasons = {
        "TextGrid, but no length in respdict.json": set(grids) - complete,
        "length in respdict.json, but no TextGrid": set(volumes) - complete,
        f"TextGrid: {FETCH}": unfetched,
    }
    notes = [f"left out: {first_names(sorted(names), 5)} ({reason})" for reason, names in reasons.items() if names]
    return sorted(complete - unfetched), notes


def _known_defects(responses: Mapping[str, Files], stories: Mapping[str, Story]) -> list[str]:
    if "UTS04" not in responses:
        return []
    notes = ["UTS04: its files were damaged before version 1.0.7 of the data; if one cannot be read, download it again"]
    if "life" in stories and "life" not in responses["UTS04"]:
        notes.append("UTS04: the data contain no responses to life")
    return notes


def read_volumes(path: Path) -> dict[str, int]:
    """Return story -> volumes of its scan; raise InputError unless these are whole numbers that leave some rows."""
    check_regular(path)
    if not _is_fetched(path):
        raise InputError(f"{path}: {FETCH}")
    raw = read_file(path)
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected a dict of story -> volumes, got {type(content).__name__}")
    for name, value in content.items():
        if type(value) is not int or not CUT_TRS < value <= MAX_VOLUMES:
            raise InputError(
                f"{path}: story {name}: {str(value)[:40]!r} volumes; expected a whole number above {CUT_TRS}"
            )
    return content


def tr_times_s(n_volumes: int) -> np.ndarray:
    """Return the middle of each volume, (n_volumes - 5,), in seconds from the start of the story."""
    return np.arange(n_volumes - PAD_TRS) * TR_S - LEAD_S + TR_S / 2


def word_tier(path: Path) -> Tier:
    """Return the tier of words: the first one with that name, else the second tier, else raise InputError."""
    tiers = read_textgrid(path)
    named = [tier for tier in tiers if tier.name.strip().lower() in ("word", "words")]
    for tier in (*named, *tiers[1:2]):
        if tier.kind == INTERVALS:
            return tier
    names = ", ".join(tier.name for tier in tiers) or "none"
    raise InputError(f"{path}: no tier of words; expected one called word, or intervals in the second; has {names}")


def spoken_words(path: Path, tier: Tier) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the words, lower-case, and the middle of each, (n_words,) in s.

    Raises InputError if there are none, an interval ends before it starts, or two overlap by more than rounding
    explains.
    """
    spoken = [
        (number, interval)
        for number, interval in enumerate(tier.intervals, 1)
        if interval.text.lower().strip("{}").strip() not in NOT_SPOKEN
    ]
    if not spoken:
        raise InputError(f"{path}: tier {tier.name}: contains no spoken word; leave the story out")
    _check_order(path, tier.name, spoken)
    times = np.array([(interval.start_s + interval.end_s) / 2 for _, interval in spoken])
    return tuple(interval.text.lower() for _, interval in spoken), times


def _check_order(path: Path, tier_name: str, spoken: list[tuple[int, Interval]]) -> None:
    last_number, last_end_s = 0, -np.inf
    for number, (start_s, end_s, text) in spoken:
        where = f"{path}: tier {tier_name}, interval {number} ({text!r}, {start_s:g} to {end_s:g} s)"
        if end_s < start_s:
            raise InputError(f"{where} ends before it starts; correct it")
        if start_s < last_end_s - MAX_OVERLAP_S:
            raise InputError(
                f"{where} overlaps interval {last_number}, which ends at {last_end_s:g} s; correct one of them"
            )
        last_number, last_end_s = number, end_s


def _silent_end(name: str, tier: Tier) -> list[str]:
    """Note a tier that stops long before its end, the only sign of a chronological file that was cut short."""
    last_s = max((interval.end_s for interval in tier.intervals), default=0.0)
    if tier.end_s - last_s <= MAX_SILENT_END_S:
        return []
    return [f"{name}: its words stop at {last_s:g} s of {tier.end_s:g} s; was its TextGrid cut short?"]


def _story(name: str, grid: Path, tier: Tier, n_volumes: int, responses: Mapping[str, Files]) -> Story:
    words, times_s = spoken_words(grid, tier)
    files = {subject: own[name] for subject, own in responses.items() if name in own}
    repeated = {s: file for s, file in files.items() if name in PUBLISHED_TEST and _has_repeats(file)}
    return Story(
        name,
        words,
        times_s,
        tr_times_s(n_volumes),
        {subject: Responses(file, key=DATA) for subject, file in files.items()},
        {subject: Responses(file, key=REPEATS) for subject, file in repeated.items()},
    )


def _has_repeats(file: Path) -> bool:
    """Whether the file contains repeats; a damaged one is refused, with its name, when its responses are read."""
    try:
        with h5py.File(file, "r") as content:
            return content.get(REPEATS, getlink=True) is not None
    except (OSError, RuntimeError):
        return False
