"""The lab's own format: ``raw_text.pkl`` beside one folder of responses a subject.

Contract
--------
``raw_text.pkl``
    dict of story -> ``DataSequence`` with ``data`` (n_words,) words, ``data_times`` (n_words,) word mid-times in s,
    ``tr_times`` (n_trs,) in s.
``<subject>/<story>.npy``
    (n_trs - 15, n_voxels), z-scored per story, rows ``[10:-5]`` of the scan. Read as a memory map.

The published test stories are averages over repeated scans. Known defects: empty strings and stray tags among the
words, non-finite voxels in single stories.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.safe_pickle import DataSequence, PickledArray, read_pickle
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.errors import InputError, first_line

TEXT_FILE = "raw_text.pkl"
PUBLISHED_TEST = ("wheretheressmoke", "fromboyhoodtofatherhood", "onapproachtopluto")


def recognises(path: Path) -> bool:
    """Whether a folder is in the lab's format."""
    return (path / TEXT_FILE).is_file()


def open_lab(path: Path) -> Dataset:
    """Open a folder in the lab's format; every story that has text, with the responses that it has.

    Raises
    ------
    InputError
        if a file is missing, malformed, or not safe to read.
    """
    sequences = read_transcripts(path / TEXT_FILE)
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and _response_files(entry))
    if not folders:
        raise InputError(f"{path}: no responses; expected <subject>/<story>.npy beside {TEXT_FILE}")
    responses = {folder.name: _response_files(folder) for folder in folders}
    for folder in folders:
        unknown = sorted(set(responses[folder.name]) - set(sequences))
        if unknown:
            raise InputError(f"{folder / (unknown[0] + '.npy')}: story {unknown[0]} has no text in {TEXT_FILE}")
    stories = {
        name: _story(
            path, name, sequences[name], {s: Responses(files[name]) for s, files in responses.items() if name in files}
        )
        for name in sorted(sequences)
    }
    return Dataset(
        source=str(path),
        stories=stories,
        subjects=tuple(sorted(responses)),
        published_test=tuple(name for name in PUBLISHED_TEST if name in stories),
    )


def _response_files(folder: Path) -> dict[str, Path]:
    """Return story -> file, hidden folders and files left out (checkpoints of an editor, traces of a copy)."""
    if folder.name.startswith("."):
        return {}
    return {file.stem: file for file in sorted(folder.glob("*.npy")) if not file.name.startswith(".")}


def read_transcripts(path: Path) -> dict[str, DataSequence]:
    """Read ``raw_text.pkl`` through the allow-list.

    Raises
    ------
    InputError
        if the file is missing, damaged, of another form, or asks for anything but DataSequence and NumPy arrays.
    """
    try:
        with path.open("rb") as file:
            content = read_pickle(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path}: refused: {first_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected a dict of stories, found {type(content).__name__}")
    for name, sequence in content.items():
        if not isinstance(name, str) or not isinstance(sequence, DataSequence):
            raise InputError(f"{path}: story {name!r} is {type(sequence).__name__}, expected DataSequence")
        for attribute, value in vars(sequence).items():
            if isinstance(value, PickledArray):
                setattr(sequence, attribute, getattr(value, "array", None))
    return content


def _story(path: Path, name: str, sequence: DataSequence, responses: dict[str, Responses]) -> Story:
    where = f"{path / TEXT_FILE}: story {name}"
    for attribute in ("data", "data_times", "tr_times"):
        if not hasattr(sequence, attribute):
            raise InputError(f"{where} has no {attribute}")
    words = sequence.data
    if not isinstance(words, list | tuple | np.ndarray):
        raise InputError(f"{where}: its words are {type(words).__name__}, expected a list")
    for at, word in enumerate(words):
        if not isinstance(word, str):
            raise InputError(f"{where}: word {at} is {type(word).__name__}, expected text")
    return Story(
        name, tuple(map(str, words)), _times(where, sequence.data_times), _times(where, sequence.tr_times), responses
    )


def _times(where: str, values: Any) -> np.ndarray:
    try:
        times = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: times are not numbers") from None
    if times.ndim != 1:
        raise InputError(f"{where}: times have shape {times.shape}, expected one a word or TR")
    return times
