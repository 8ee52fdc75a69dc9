"""Predicted responses to a story as files: one ``.npy`` a subject, written as the predictions come."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from bert_encoding.analyses.encoding_model import predict_story
from bert_encoding.analyses.model_file import BLOCK_BYTES, EncodingModel, SubjectModel, is_plain_name, load_model
from bert_encoding.analyses.new_story import check_text, describe_rows, read_new_story
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.names import DEMOS
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Story
from bert_encoding.demo.stories import demo_stories, simulate_listener
from bert_encoding.statistics.correlation import correlate, summarise

SUFFIX = ".npy"
MAX_SHOWN = 8  # names in a message


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
    """Predict a story with a saved model, write a file a subject, and yield what there is to say, a line each.

    A file holds (n_rows, n_all_voxels) float32, a voxel after the other (Fortran order), NaN where a voxel was masked
    out; unit: standard deviations of the responses that the model was fitted on.

    Parameters
    ----------
    file : ``model.npz``
    story : a transcript, or with ``data`` the name of a story in it
    to : ``FILE.npy``; by default ``<story>-<subject>.npy`` in the current folder
    n_trs : volumes of a new story's scan
    encoder : where the pretrained encoder lies now
    test : score a locked test story of the model's study; without it such a story is predicted, and not scored

    Raises
    ------
    InputError
        if the model, the story or the data do not fit each other or are damaged, or an output exists.
    """
    model = load_model(file)
    settings = model.settings
    if data is None:
        told = read_new_story(
            Path(story), tr_s=settings.tr_s, first_tr_s=settings.first_tr_s, trim=settings.trim_trs, n_trs=n_trs
        )
    else:
        told = _story_of(data, story, model)
    is_locked = told.name in settings.test_stories
    if test and not is_locked:
        raise InputError(f"--test: {told.name} is no test story of {file}, so its CC is open; leave --test out")
    paths = _outputs(to, told.name, tuple(model.subjects))
    responses = {name: _checked(told, name, model) for name in model.subjects if name in told.responses}
    predicted = predict_story(model, told, encoder)
    yield f"{told.name}: {describe_rows(told, settings.trim_trs)}"
    if told.name in settings.fit_stories and responses:
        yield f"note: the model was fitted on {told.name} too, so its CC flatters it"
    if is_locked and responses:
        yield _about_lock(told.name, settings.study, test)
        responses = responses if test else {}
    for subject, blocks in predicted.items():
        part = model.subjects[subject]
        rows = settings.trim_trs.rows(len(told.tr_times_s))
        out = _Output(paths[subject], rows.stop - rows.start, part)
        cc = _write(out, blocks, responses.get(subject))
        yield f"{paths[subject]}: {out.n_rows} rows, {part.voxels.size} of {part.n_all} voxels{_score(cc)}"


def _about_lock(story: str, study: str, test: bool) -> str:
    of = f"of the study {study}" if study else "of the model's study"
    if test:
        return f"note: {story} was a locked test story {of}, and has now been looked at: choose nothing by its CC"
    return (
        f"note: {story} is a locked test story {of}, so its CC is not computed; --test looks at it, once all is chosen"
    )


def _story_of(data: str, name: str, model: EncodingModel) -> Story:
    dataset = (
        simulate_listener(demo_stories(data))[0] if data in DEMOS else open_dataset(Path(data), model.settings.trim_trs)
    )
    if name not in dataset.stories:
        known = ", ".join(list(dataset.stories)[:MAX_SHOWN])
        raise InputError(f"--story {name}: not in {data}; it has {known}, ...; for a transcript leave --data out")
    check_text(dataset.stories[name], dataset.source)
    return dataset.stories[name]


def _outputs(to: str | None, story: str, subjects: tuple[str, ...]) -> dict[str, Path]:
    if to is not None and Path(to).suffix != SUFFIX:
        raise InputError(f"--to {to}: give a name that ends in {SUFFIX}")
    if to is None and not is_plain_name(story):
        raise InputError(f"story {story!r:.80}: its name cannot be a file's; give --to FILE{SUFFIX}")
    if to is None:
        paths = {subject: Path(f"{story}-{subject}{SUFFIX}") for subject in subjects}
    elif len(subjects) == 1:
        paths = {subjects[0]: Path(to)}
    else:
        paths = {subject: Path(to).with_name(f"{Path(to).stem}-{subject}{SUFFIX}") for subject in subjects}
    for path in paths.values():
        if not path.parent.is_dir():
            raise InputError(f"--to {path}: no such folder {path.parent}; make it first")
        if path.exists():
            raise InputError(f"{path}: exists already; move it away, or give another name with --to")
    return paths


def _checked(story: Story, subject: str, model: EncodingModel) -> Responses:
    """Return the responses to a story if they have the rows and voxels that will be predicted."""
    rows = model.settings.trim_trs.rows(len(story.tr_times_s))
    expected = (rows.stop - rows.start, model.subjects[subject].n_all)
    shape, _ = story.responses[subject].check()
    if shape != expected:
        raise InputError(f"subject {subject}, story {story.name}: responses {shape}, but predictions {expected}")
    return story.responses[subject]


class _Output(NamedTuple):
    """A file to write: (n_rows, n_all) with what is predicted of ``part``."""

    path: Path
    n_rows: int
    part: SubjectModel


def _write(out: _Output, blocks: Iterable[tuple[slice, np.ndarray]], responses: Responses | None) -> np.ndarray | None:
    """Write the file, whole or not at all, and return the CC with responses, if there are any, (n_voxels,).

    Blocks are appended, not put into a memory map: on a full disk writing to one kills the program.
    """
    cc = []
    try:
        with atomic_path(out.path) as temporary, temporary.open("wb") as file:
            shape = (out.n_rows, out.part.n_all)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": True, "shape": shape})
            at = 0
            for columns, block in blocks:
                voxels = out.part.voxels[columns]
                past = out.part.n_all if columns.stop == out.part.voxels.size else int(voxels[-1]) + 1
                _append(file, at, past, voxels, block)
                at = past
                if responses is not None:
                    cc.append(_correlate(responses.read(voxels), block))
    except OSError as error:
        raise InputError(f"{out.path}: cannot be written ({error.strerror or first_line(error)})") from None
    return np.concatenate(cc) if cc else None


def _append(file: IO[bytes], at: int, past: int, voxels: np.ndarray, block: np.ndarray) -> None:
    """Write the columns ``at`` to ``past`` of all voxels; those which are not among ``voxels`` are NaN."""
    n_columns = max(1, BLOCK_BYTES // (4 * len(block)))
    for start in range(at, past, n_columns):
        stop = min(start + n_columns, past)
        whole = np.full((stop - start, len(block)), np.nan, "<f4")
        here = slice(*np.searchsorted(voxels, (start, stop)))
        whole[voxels[here] - start] = block.T[here]
        file.write(whole.data)


def _correlate(Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the CC, (n_columns,); NaN where a response is not finite."""
    finite = np.isfinite(Y).all(axis=0)
    cc = np.full(Y.shape[1], np.nan, np.float32)
    cc[finite] = correlate(Y[:, finite], np.ascontiguousarray(predicted[:, finite]))
    return cc


def _score(cc: np.ndarray | None) -> str:
    if cc is None or np.isnan(cc).all():
        return ""
    found = summarise(cc[~np.isnan(cc)])
    n_without = int(np.isnan(cc).sum())
    without = f", {n_without} voxels without" if n_without else ""
    return f"; CC {found['cc_mean']:.4f}, best 5% {found['cc_top5']:.4f}{without}"
