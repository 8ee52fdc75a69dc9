"""Responses, read once: which voxels are finite and vary, z-scores, shapes, copies."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset, Story

ROWS_OF_REPEATS = 16  # read at a time: some MB of a whole brain


class Hasher:
    """The hash of all content, in order; responses are hashed in a thread while the block is looked at."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self.stories: dict[str, list[tuple[str, str]]] = {}  # hash of responses -> the (subject, story) that have them

    def __enter__(self) -> "Hasher":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def add_text(self, story: Story) -> None:
        self._digest.update("\0".join((story.name, *story.words)).encode())
        self._digest.update(np.ascontiguousarray(story.word_times_s, dtype="<f8").tobytes())
        self._digest.update(np.ascontiguousarray(story.tr_times_s, dtype="<f8").tobytes())

    def add(self, block: np.ndarray) -> None:
        self._digest.update(np.ascontiguousarray(block).data)

    def add_header(self, subject: str, story: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._digest.update(f"{subject}/{story}/{shape}/{dtype.str}".encode())

    @contextmanager
    def adding(self, block: np.ndarray) -> Iterator[None]:
        """Hash a block while the body runs."""
        hashing = self._pool.submit(self.add, block)
        try:
            yield
        finally:
            hashing.result()

    def result(self) -> str:
        return self._digest.hexdigest()[:16]


def repeats_of(dataset: Dataset) -> list[tuple[str, str, Responses]]:
    return [
        (story.name, subject, story.repeats[subject])
        for story in dataset.stories.values()
        for subject in dataset.subjects
        if subject in story.repeats
    ]


def hash_repeats(story: str, subject: str, repeats: Responses, hasher: Hasher) -> str:
    """Let the repeats of a story enter the fingerprint; return what is wrong with them, if anything."""
    try:
        with repeats.open() as source:
            hasher.add_header(subject, f"{story}/repeats", source.shape, source.dtype)
            for repeat in range(source.shape[0]):
                for start in range(0, source.shape[1], ROWS_OF_REPEATS):
                    hasher.add(source[repeat, start : start + ROWS_OF_REPEATS])
    except (OSError, RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"story {story}, subject {subject}: its repeats cannot be read ({first_line(error)}); get them anew"
    return ""


CONSTANT_RANGE = 1e-8  # largest minus smallest response; z-scored responses span several units
MAX_ABS_MEAN, MAX_SD_ERROR = 0.05, 0.1  # medians over voxels, above which responses do not count as z-scored
VOXELS_AT_A_TIME = 4096  # so that some rows of them stay in the processor's cache
MAX_SHOWN = 8  # stories or rows in a message
MAX_VALUE = 1e15  # squares and their sums still fit float32; for sums only, no response is changed


class ResponseCheck(NamedTuple):
    """One subject's responses to one story; what could not be measured is None.

    Attributes
    ----------
    n_rows, n_voxels : as found
    max_abs_mean, sd_range : over the voxels that are finite and vary, each over its rows
    is_z_scored : whether half of these voxels have about mean 0 and standard deviation 1
    n_repeats : of the story, where they are kept
    problems : why it is unusable
    """

    story: str
    subject: str
    n_rows_expected: int
    n_rows: int | None = None
    n_voxels: int | None = None
    n_nonfinite: int | None = None
    n_constant: int | None = None
    max_abs_mean: float | None = None
    sd_range: tuple[float, float] | None = None
    is_z_scored: bool | None = None
    n_repeats: int | None = None
    problems: tuple[str, ...] = ()


class Block(NamedTuple):
    """Some responses as they pass by.

    Attributes
    ----------
    shape : (n_rows, n_voxels) of the whole story
    rows, voxels : which part of it this is; rows come in order, voxels in order within rows
    values : (rows, voxels) float32, less the voxel's first response to this story; 0 where not finite
    """

    story: Story
    subject: str
    shape: tuple[int, int]
    rows: slice
    voxels: slice
    values: np.ndarray


Watch = Callable[[Block], None]


def check_subject(
    dataset: Dataset, subject: str, hasher: Hasher, watch: Watch | None, usable: set[str]
) -> tuple[list[ResponseCheck], np.ndarray, np.ndarray]:
    """Return what was found story by story, and (n_voxels,) flags: finite, and not constant, in every usable story."""
    stories = [story for story in dataset.stories.values() if subject in story.responses]
    checks = {story.name: _check_shape(dataset, story, subject) for story in stories}
    sizes = Counter(check.n_voxels for check in checks.values() if not check.problems)
    n_voxels = sizes.most_common(1)[0][0] if sizes else 0
    finite, varies = np.ones(n_voxels or 0, bool), np.ones(n_voxels or 0, bool)
    for story in stories:
        check = _check_n_voxels(dataset, story, checks[story.name], n_voxels)
        if not check.problems:
            check, totals = _read(dataset, story, check, hasher, watch if story.name in usable else None)
            if not check.problems and story.name in usable:
                finite &= totals.finite
                varies &= totals.varies()
        checks[story.name] = _check_repeats(dataset, story, check)
    return list(checks.values()), finite, varies


def _check_shape(dataset: Dataset, story: Story, subject: str) -> ResponseCheck:
    where = _where(dataset, story, subject)
    rows = dataset.trim.rows(len(story.tr_times_s))
    expected = rows.stop - rows.start
    check = ResponseCheck(story.name, subject, expected)
    try:
        shape, dtype = story.responses[subject].check()
    except InputError as error:
        return check._replace(problems=(str(error),))
    if len(shape) != 2 or dtype.kind not in "fiu":
        return check._replace(problems=(f"{where} is {dtype} of shape {shape}; expected numbers (rows, voxels)",))
    check = check._replace(n_rows=shape[0], n_voxels=shape[1])
    if shape[0] == expected:
        return check
    made = f"its {len(story.tr_times_s)} TR times less {sum(dataset.trim)} trimmed make {expected}"
    if shape[1] == expected:
        problem = (
            f"{where} has {shape[0]} rows and {shape[1]} columns; {made}: it looks transposed; save (rows, voxels)"
        )
    else:
        problem = f"{where} has {shape[0]} rows; {made}; text and responses must belong to the same cut"
    return check._replace(problems=(problem,))


def _check_n_voxels(dataset: Dataset, story: Story, check: ResponseCheck, usual: int | None) -> ResponseCheck:
    if check.problems or check.n_voxels == usual:
        return check
    problem = (
        f"{_where(dataset, story, check.subject)} has {check.n_voxels} voxels, "
        f"other stories of {check.subject} have {usual}; all must agree"
    )
    return check._replace(problems=(problem,))


def _check_repeats(dataset: Dataset, story: Story, check: ResponseCheck) -> ResponseCheck:
    """Count the repeats; their mean belongs to the responses, so rows and voxels must be the same."""
    if check.subject not in story.repeats:
        return check
    where = _where(dataset, story, check.subject, story.repeats[check.subject])
    try:
        shape, dtype = story.repeats[check.subject].check()
    except InputError as error:
        return check._replace(problems=(*check.problems, str(error)))
    expected = f"(repeats, {check.n_rows_expected}, {check.n_voxels or 'voxels'})"
    fits = len(shape) == 3 and shape[1] == check.n_rows_expected and check.n_voxels in (None, shape[2])
    if not fits or dtype.kind not in "fiu":
        problem = f"{where} its repeats are {dtype} of shape {shape}; expected numbers {expected}"
        return check._replace(problems=(*check.problems, problem))
    return check._replace(n_repeats=shape[0])


def _read(
    dataset: Dataset, story: Story, check: ResponseCheck, hasher: Hasher, watch: Watch | None
) -> tuple[ResponseCheck, "_Totals"]:
    """Read all responses of a story, a block at a time."""
    assert check.n_rows is not None and check.n_voxels is not None
    shape = (check.n_rows, check.n_voxels)
    totals = _Totals(check.n_voxels)
    hasher.add_header(check.subject, story.name, shape, story.responses[check.subject].check()[1])
    first_row = 0
    try:
        for block in story.responses[check.subject].blocks():
            rows = slice(first_row, first_row + len(block))
            with hasher.adding(block):
                for voxels, values in totals.add(block):
                    if watch is not None:
                        watch(Block(story, check.subject, shape, rows, voxels, values))
            first_row = rows.stop
    except InputError as error:
        return check._replace(problems=(str(error),)), totals
    check = totals.describe(check)
    assert check.n_nonfinite is not None and check.n_constant is not None
    if check.n_nonfinite + check.n_constant == check.n_voxels:
        complaint = _no_voxel(story.responses[check.subject], check)
        return check._replace(problems=(f"{_where(dataset, story, check.subject)} {complaint}",)), totals
    hasher.stories.setdefault(totals.key(), []).append((check.subject, story.name))
    return check, totals


def _no_voxel(responses: Responses, check: ResponseCheck) -> str:
    """Say why a story has no valid voxel; lost volumes are told by their rows."""
    if check.n_nonfinite != check.n_voxels:
        return "has no voxel that is finite and varies; leave the story out or mend the file"
    lost: list[int] = []
    first_row = 0
    for block in responses.blocks():
        lost += (first_row + np.flatnonzero(~np.isfinite(block).any(axis=1))).tolist()
        first_row += len(block)
    if not 0 < len(lost) < first_row:
        return "has no finite voxel; leave the story out or mend the file"
    shown = ", ".join(map(str, lost[:MAX_SHOWN])) + (", ..." if len(lost) > MAX_SHOWN else "")
    return f"has no finite voxel: in row {shown} no value is finite; interpolate there, or leave the story out"


def _where(dataset: Dataset, story: Story, subject: str, responses: Responses | None = None) -> str:
    path = (responses or story.responses[subject]).path
    return f"{path or dataset.source}: story {story.name}, subject {subject}:"


class _Totals:
    """Sums over the rows of one story, (n_voxels,) each, of responses less the first one: of z-scored data this
    changes little, of raw data it keeps float32 exact enough."""

    def __init__(self, n_voxels: int) -> None:
        self.n_rows = 0
        self.first = np.zeros(0)
        self.finite = np.ones(n_voxels, bool)
        self.low, self.high = np.zeros(n_voxels, np.float32), np.zeros(n_voxels, np.float32)
        self.sum, self.squares = np.zeros(n_voxels), np.zeros(n_voxels)

    def add(self, block: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Add rows; yield (voxels, values) a few thousand voxels at a time, as ``Block`` has them."""
        if self.n_rows == 0:
            self.first = _first_responses(block[0])
        self.n_rows += len(block)
        for start in range(0, block.shape[1], VOXELS_AT_A_TIME):
            voxels = slice(start, min(start + VOXELS_AT_A_TIME, block.shape[1]))
            values = self._settle(block[:, voxels], voxels)
            np.minimum(self.low[voxels], values.min(axis=0), out=self.low[voxels])
            np.maximum(self.high[voxels], values.max(axis=0), out=self.high[voxels])
            self.sum[voxels] += values.sum(axis=0)
            yield voxels, values

    def _settle(self, part: np.ndarray, voxels: slice) -> np.ndarray:
        """Return values less the first, (rows, voxels) float32, and note which voxels are not finite."""
        values = np.empty(part.shape, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(part, self.first[voxels], out=values, casting="same_kind")
            squares = np.einsum("tv,tv->v", values, values)
            if not np.isfinite(squares).all():
                is_finite = np.isfinite(part.astype(np.float32))  # what exceeds float32 is not finite in our arithmetic
                self.finite[voxels] &= is_finite.all(axis=0)
                values = np.where(is_finite, values, np.float32(0)).clip(-MAX_VALUE, MAX_VALUE)
                squares = np.einsum("tv,tv->v", values, values)
        self.squares[voxels] += squares
        return values

    def key(self) -> str:
        """Return what equal responses have in common, and others have not but by a miracle."""
        return hashlib.sha256(b"".join((self.first.tobytes(), self.sum.tobytes(), self.squares.tobytes()))).hexdigest()

    def varies(self) -> np.ndarray:
        """Return (n_voxels,) False where all rows are equal."""
        return self.high - self.low > CONSTANT_RANGE

    def describe(self, check: ResponseCheck) -> ResponseCheck:
        """Fill in counts, means and standard deviations."""
        varies = self.varies()
        check = check._replace(
            n_nonfinite=int((~self.finite).sum()), n_constant=int((self.finite & ~varies).sum()), is_z_scored=False
        )
        good = self.finite & varies
        if not good.any():
            return check
        shifted = self.sum[good] / self.n_rows
        mean = np.abs(shifted + self.first[good])
        sd = np.sqrt(np.maximum(self.squares[good] / self.n_rows - shifted**2, 0))
        is_z_scored = np.median(mean) <= MAX_ABS_MEAN and np.median(np.abs(sd - 1)) <= MAX_SD_ERROR
        return check._replace(
            max_abs_mean=float(mean.max()), sd_range=(float(sd.min()), float(sd.max())), is_z_scored=bool(is_z_scored)
        )


def _first_responses(row: np.ndarray) -> np.ndarray:
    """Return what to subtract, (n_voxels,): 0 where the first response is not finite. In float32 if the file is, so
    that nothing is converted twice."""
    kind = np.float32 if row.dtype.kind == "f" and row.dtype.itemsize <= 4 else np.float64
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(row.astype(np.float32))
    return np.where(is_finite, row, 0).astype(kind)
