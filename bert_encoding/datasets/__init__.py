"""Stories and responses on disk, in every format we read."""

from pathlib import Path

from bert_encoding.datasets import lab
from bert_encoding.datasets.story import Dataset
from bert_encoding.errors import InputError


def open_dataset(path: Path) -> Dataset:
    """Open a data set, whatever its format, by what lies at ``path``.

    Raises
    ------
    InputError
        if nothing there is recognised.
    """
    if not path.exists():
        raise InputError(f"{path}: no such data; give a folder, or 'demo'")
    if path.name == lab.TEXT_FILE:
        raise InputError(f"{path}: give its folder, {path.parent}")
    if path.is_dir() and lab.recognises(path):
        return lab.open_lab(path)
    raise InputError(f"{path}: no known format; a lab folder holds {lab.TEXT_FILE} and <subject>/<story>.npy")
