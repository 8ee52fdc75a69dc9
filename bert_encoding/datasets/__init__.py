"""Stories and responses on disk, in every format we read."""

from dataclasses import replace
from pathlib import Path

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import DEMOS
from bert_encoding.datasets import lab, lebel2023
from bert_encoding.datasets.rois import read_rois
from bert_encoding.datasets.story import TRIMS, Dataset, Trim


def open_dataset(path: Path, trim: Trim = TRIMS["published"]) -> Dataset:
    """Open a data set in any known format; raise InputError if ``path`` is in none of them."""
    if not path.exists():
        raise InputError(f"{path}: no such data; give a folder, or one of {', '.join(DEMOS)}")
    if path.name == lab.TEXT_FILE:
        raise InputError(f"{path}: give its folder, {path.parent}")
    if path.is_dir() and lab.recognises(path):
        dataset = lab.open_lab(path)
    elif path.is_dir() and lebel2023.recognises(path):
        dataset = lebel2023.open_lebel(path)
    else:
        raise InputError(
            f"{path}: no known format; a lab folder contains {lab.TEXT_FILE} and <subject>/<story>.npy, "
            "OpenNeuro ds003020 contains derivative/TextGrids"
        )
    return replace(dataset, trim=trim, rois=read_rois(dataset))
