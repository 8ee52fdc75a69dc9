"""The lab's own format: ``raw_text.pkl`` next to one folder of responses per subject.

Contract
--------
``raw_text.pkl``
    dict of story -> ``DataSequence`` with ``data`` (n_words,) words, ``data_times`` (n_words,) word mid-times in s,
    ``tr_times`` (n_trs,) in s.
``<subject>/<story>.npy``
    (n_trs - 15, n_voxels), z-scored within each story, rows ``[10:-5]`` of the scan. Read as a memory map.

The published test stories are averages over repeated scans. Known defects: empty strings and stray tags among the
words, non-finite voxels in single stories.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets import safe_pickle
from bert_encoding.datasets.responses import Responses, read_file
from bert_encoding.datasets.story import Dataset, Story

TEXT_FILE = "raw_text.pkl"
MAX_BYTES = 64 * 2**20  # of the pickle; twenty times the lab's file of 109 stories
PLAIN_KINDS = "biufUS"  # booleans, numbers, text; never objects, structures or dates
MAX_SHOWN = 40  # characters of a wrong value in a message
PUBLISHED_TEST = ("wheretheressmoke", "fromboyhoodtofatherhood", "onapproachtopluto")


def recognises(path: Path) -> bool:
    """Whether a folder is in the lab's format."""
    return (path / TEXT_FILE).is_file()


def open_lab(path: Path) -> Dataset:
    """Open a folder in the lab's format; raise InputError if a file is missing, malformed, or not safe to read."""
    transcripts = read_transcripts(path / TEXT_FILE)
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    responses = {folder.name: files for folder in folders if (files := _response_files(folder))}
    if not responses:
        raise InputError(f"{path}: no responses; expected <subject>/<story>.npy next to {TEXT_FILE}")
    for files in responses.values():
        _check_text(files, transcripts)
    stories = {
        name: _story(
            f"{path / TEXT_FILE}: story {name}",
            name,
            transcripts[name],
            {subject: Responses(files[name]) for subject, files in responses.items() if name in files},
        )
        for name in sorted(transcripts)
    }
    return Dataset(
        source=str(path),
        stories=stories,
        subjects=tuple(sorted(responses)),
        published_test=tuple(name for name in PUBLISHED_TEST if name in stories),
    )


def _response_files(folder: Path) -> dict[str, Path]:
    """Return story -> file, without hidden folders and files (checkpoints of an editor, traces of a copy)."""
    if folder.name.startswith("."):
        return {}
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".npy" and not file.name.startswith("."))
    except PermissionError:
        raise InputError(f"{folder}: cannot be read (Permission denied); grant access, or move it away") from None
    for entry in (folder, *files) if files else ():
        check_name(entry)
    return {file.stem: file for file in files}


def _check_text(files: dict[str, Path], transcripts: dict[str, SimpleNamespace]) -> None:
    unknown = sorted(set(files) - set(transcripts))
    if unknown:
        more = f" (nor have {', '.join(map(shown_name, unknown[1:6]))})" if unknown[1:] else ""
        raise InputError(
            f"{files[unknown[0]]}: story {shown_name(unknown[0])} has no text in {TEXT_FILE}{more}; move it away"
        )


def check_name(path: Path) -> None:
    """Refuse a file or folder whose name is not UTF-8: it cannot be printed or recorded."""
    if not _is_unicode(path.name):
        raise InputError(f"{path.parent}: the name {path.name!a} in it is not UTF-8; rename it")


def shown_name(name: str) -> str:
    """Return a story's name for a message; in quotes if white space or something invisible is part of it."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def read_transcripts(path: Path) -> dict[str, SimpleNamespace]:
    """Read ``raw_text.pkl``: story -> its ``data``, ``data_times`` and ``tr_times``, as far as the file has them.

    Another process reads the pickle (see ``safe_pickle``). Raises InputError if the file is missing, damaged, of
    another form, or asks for anything but DataSequence and NumPy arrays.
    """
    if path.exists() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: refused: larger than {MAX_BYTES // 2**20} MiB, which no transcript is")
    content = read_file(path)
    try:
        stories = dict(json.loads(_unpickled(content), object_hook=_decoded))
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path}: refused: {first_line(error)}") from None
    for name in stories:
        if not _is_unicode(name):
            raise InputError(f"{path}: story {name!a:.80}: its name contains half a character; correct its encoding")
    return {name: SimpleNamespace(**attributes) for name, attributes in stories.items()}


def _unpickled(content: bytes) -> str:
    command = [sys.executable, "-I", "-S", "-X", "utf8", safe_pickle.__file__]
    ran = subprocess.run(command, input=content, capture_output=True, start_new_session=True)  # Ctrl-C ends this one
    if ran.returncode:
        error = ran.stderr.decode(errors="replace").strip()
        raise ValueError(error or "reading it takes longer than any transcripts, or too much memory")
    return ran.stdout.decode("utf-8", "surrogatepass")


def _decoded(value: dict[str, Any]) -> Any:
    """Return an array, or an object of another type, as ``safe_pickle`` describes it; a dict of attributes as it is."""
    if "type" in value:
        return type(value["type"], (), {})()
    if "raw" not in value:
        return value
    dtype = np.dtype(value["code"]).newbyteorder(value["order"])
    if dtype.kind not in PLAIN_KINDS:
        raise ValueError(f"an array of {dtype} is not allowed")
    array = np.frombuffer(base64.b64decode(value["raw"]), dtype).copy()
    return array[0] if value["shape"] is None else array.reshape(value["shape"], order=value["layout"])


def _story(where: str, name: str, transcript: SimpleNamespace, responses: dict[str, Responses]) -> Story:
    for attribute in safe_pickle.ATTRIBUTES:
        if not hasattr(transcript, attribute):
            raise InputError(f"{where} has no {attribute}")
    words = transcript.data
    if not isinstance(words, list | np.ndarray):
        raise InputError(f"{where}: its words are {type(words).__name__}, expected a list")
    for index, word in enumerate(words):
        if not isinstance(word, str):
            raise InputError(f"{where}: word {index} is {type(word).__name__}, expected text")
        if not _is_unicode(word):
            raise InputError(
                f"{where}: word {index} ({word[:MAX_SHOWN]!a}) contains half a character; correct its encoding"
            )
    word_times_s = _times(f"{where}: its word times", transcript.data_times)
    tr_times_s = _times(f"{where}: its TR times", transcript.tr_times)
    return Story(name, tuple(map(str, words)), word_times_s, tr_times_s, responses)


def _is_unicode(text: str) -> bool:
    """Whether text can be written to a file: names and pickles may contain single surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _times(where: str, values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray) and values.dtype.kind not in "iuf":
        raise InputError(f"{where} are not numbers but {values.dtype}")
    for index, value in enumerate(values if isinstance(values, list) else ()):
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            shown = f"{value[:MAX_SHOWN]!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
            raise InputError(f"{where} are not numbers: number {index} is {shown}")
    try:
        times = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} are not numbers") from None
    if times.ndim != 1:
        raise InputError(f"{where} have shape {times.shape}, expected one per word or TR")
    return times
