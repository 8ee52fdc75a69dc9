"""Predicted responses to a story as files: one ``.npy`` per subject, written block by block."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from bert_encoding.analyses.encoding_model import predict_story
from bert_encoding.analyses.model_file import BLOCK_BYTES, EncodingModel, SubjectModel, is_plain_name, load_model
from bert_encoding.analyses.new_story import check_text, describe_rows, read_new_story
from bert_encoding.core.command_line import check_absent, check_ending, check_folder
from bert_encoding.core.errors import InputError, first_names
from bert_encoding.core.files import output_file
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Story
from bert_encoding.demo import open_data
from bert_encoding.statistics.correlation import correlate, summarise

SUFFIX = ".npy"


def predict_to_files(
    file: Path,
    story: str,
    *,
    to: str | None,
    n_trs: int | None,
    data: str | None,
    encoder: str | None,
    test: bool = False,
) -> Iterator[str]:
    """Predict a story with a saved model, write one file per subject, and yield lines to print.

    A file holds (n_rows, n_all_voxels) float32, one voxel after the other (Fortran order), NaN where a voxel was masked
    out; unit: standard deviations of the responses that the model was fitted on.

    Raises InputError if the model, the story or the data do not fit each other or are damaged, or an output exists.
    """
    model = load_model(file)
    settings = model.settings
    if data is None:
        heard = read_new_story(
            Path(story), tr_s=settings.tr_s, first_tr_s=settings.first_tr_s, trim=settings.trim_trs, n_trs=n_trs
        )
    else:
        heard = _open_story(data, story, model)
    name, is_locked = heard.name, heard.name in settings.test_stories
    if test and not is_locked:
        raise InputError(f"--test: {name} is not a locked test story of {file}; leave the option out")
    paths = _outputs(to, name, tuple(model.subjects))
    rows = settings.trim_trs.rows(len(heard.tr_times_s))
    n_rows = rows.stop - rows.start
    responses = {
        s: _check_responses(heard, s, n_rows, part) for s, part in model.subjects.items() if s in heard.responses
    }
    predicted = predict_story(model, heard, encoder)
    yield f"{name}: {describe_rows(heard, settings.trim_trs)}"
    if name in settings.fit_stories and responses:
        yield f"note: the model was fitted on {name}, so its CC is optimistically biased"
    if is_locked and responses:
        of = f"a locked test story of the study {settings.study}"
        if test:
            yield f"note: {name} was {of} and has now been scored: choose nothing by its CC"
        else:
            yield f"note: {name} is {of}, so its CC is not computed (--test computes it)"
            responses = {}
    for subject, blocks in predicted.items():
        part = model.subjects[subject]
        cc = _write(paths[subject], n_rows, part, blocks, responses.get(subject))
        yield f"{paths[subject]}: {n_rows} rows, {part.voxels.size} of {part.n_all} voxels{_score(cc)}"


def _open_story(data: str, name: str, model: EncodingModel) -> Story:
    dataset = open_data(data, model.settings.trim_trs)
    if name not in dataset.stories:
        known = first_names(list(dataset.stories))
        raise InputError(f"--story {name}: not in {data}; it has {known}; for a transcript leave --data out")
    check_text(dataset.stories[name], dataset.source)
    return dataset.stories[name]


def _outputs(to: str | None, story: str, subjects: tuple[str, ...]) -> dict[str, Path]:
    if to is None and not is_plain_name(story):
        raise InputError(f"story {story!r:.80}: it cannot be a file name; give --to FILE{SUFFIX}")
    file = Path(f"{story}{SUFFIX}" if to is None else to)
    check_ending(file, (SUFFIX,))
    paths = {subject: file.with_name(f"{file.stem}-{subject}{SUFFIX}") for subject in subjects}
    if to is not None and len(subjects) == 1:
        paths = {subjects[0]: file}
    check_folder(file)
    check_absent(*paths.values())
    return paths


def _check_responses(story: Story, subject: str, n_rows: int, part: SubjectModel) -> Responses:
    """Return the responses to a story if they have the rows and voxels that will be predicted."""
    shape, _ = story.responses[subject].check()
    if shape != (n_rows, part.n_all):
        raise InputError(
            f"subject {subject}, story {story.name}: responses {shape}, but predictions {(n_rows, part.n_all)}"
        )
    return story.responses[subject]


def _write(
    path: Path, n_rows: int, part: SubjectModel, blocks: Iterable[tuple[slice, np.ndarray]], responses: Responses | None
) -> np.ndarray | None:
    """Write the file, completely or not at all, and return the CC with responses, if there are any, (n_voxels,).

    Blocks are appended: writing to a memory map on a full disk kills the program.
    """
    cc = []
    with output_file(path) as temporary, temporary.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": True, "shape": (n_rows, part.n_all)}
        np.lib.format.write_array_header_1_0(file, header)
        start = 0
        for columns, block in blocks:
            voxels = part.voxels[columns]
            stop = part.n_all if columns.stop == part.voxels.size else int(voxels[-1]) + 1
            _append(file, slice(start, stop), voxels, block)
            start = stop
            if responses is not None:
                cc.append(_correlate(responses.read(voxels), block))
    return np.concatenate(cc) if cc else None


def _append(file: IO[bytes], columns: slice, voxels: np.ndarray, block: np.ndarray) -> None:
    """Write some columns of all voxels, NaN where a column is not among ``voxels``, those of ``block``."""
    n_columns = max(1, BLOCK_BYTES // (4 * len(block)))
    for start in range(columns.start, columns.stop, n_columns):
        stop = min(start + n_columns, columns.stop)
        values = np.full((stop - start, len(block)), np.nan, "<f4")
        inside = slice(*np.searchsorted(voxels, (start, stop)))
        values[voxels[inside] - start] = block.T[inside]
        file.write(values.data)


def _correlate(Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the CC, (n_columns,); NaN where a response is not finite."""
    finite = np.isfinite(Y).all(axis=0)
    cc = np.full(Y.shape[1], np.nan, np.float32)
    cc[finite] = correlate(Y[:, finite], np.ascontiguousarray(predicted[:, finite]))
    return cc


def _score(cc: np.ndarray | None) -> str:
    if cc is None or np.isnan(cc).all():
        return ""
    summary = summarise(cc[~np.isnan(cc)])
    n_without = int(np.isnan(cc).sum())
    without = f", {n_without} voxels without a CC" if n_without else ""
    return f"; CC {summary['cc_mean']:.4f}, best 5% {summary['cc_top5']:.4f}{without}"
