"""Responses, read once: which voxels are finite and vary, z-scores, shapes, copies."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import Dataset, Story

CONSTANT_RANGE = 1e-8  # largest minus smallest response; z-scored responses span several units
MAX_ABS_MEAN, MAX_SD_ERROR = 0.05, 0.1  # medians over voxels, above which responses do not count as z-scored
VOXELS_AT_A_TIME = 4096  # so that some rows of them stay in the processor's cache
ROWS_OF_REPEATS = 16  # read at a time: some MB of a whole brain
MAX_SHOWN = 8  # stories or rows in a message
MAX_VALUE = 1e15  # squares and their sums still fit float32; for sums only, no response is changed


class ResponseCheck(NamedTuple):
    """One subject's responses to one story; a value that could not be measured is None."""

    story: str
    subject: str
    n_rows_expected: int
    n_rows: int | None = None
    n_voxels: int | None = None
    n_nonfinite: int | None = None
    n_constant: int | None = None
    max_abs_mean: float | None = None  # of each voxel over rows; only of voxels that are finite and vary
    sd_range: tuple[float, float] | None = None  # of the same voxels
    is_z_scored: bool | None = None  # whether half of these voxels have about mean 0 and standard deviation 1
    n_repeats: int | None = None
    problems: tuple[str, ...] = ()

    def and_problem(self, problem: str) -> "ResponseCheck":
        return self._replace(problems=(*self.problems, problem))


class Block(NamedTuple):
    """Some responses, as they are read: rows in order, voxels in order within rows."""

    story: Story
    subject: str
    shape: tuple[int, int]  # (n_rows, n_voxels) of the whole story
    rows: slice
    voxels: slice
    values: np.ndarray  # (rows, voxels) float32, minus the voxel's first response to this story; 0 where not finite


Watch = Callable[[Block], None]


class Hasher:
    """The hash of all content, in order; responses are hashed in a thread while they are checked."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self.stories: dict[str, list[tuple[str, str]]] = {}  # hash of responses -> the (subject, story) with that hash

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

    def begin_to_add(self, block: np.ndarray) -> Future[None]:
        """Hash a block in the thread."""
        return self._pool.submit(self.add, block)

    def result(self) -> str:
        return self._digest.hexdigest()[:16]


def hash_repeats(dataset: Dataset, hasher: Hasher) -> list[str]:
    """Add the repeats of stories to the fingerprint; return a problem for each that cannot be read."""
    problems = []
    for story in dataset.stories.values():
        for subject in (subject for subject in dataset.subjects if subject in story.repeats):
            try:
                with story.repeats[subject].open() as source:
                    hasher.add_header(subject, f"{story.name}/repeats", source.shape, source.dtype)
                    for repeat in range(source.shape[0]):
                        for start in range(0, source.shape[1], ROWS_OF_REPEATS):
                            hasher.add(source[repeat, start : start + ROWS_OF_REPEATS])
            except (OSError, RuntimeError, ValueError, TypeError, IndexError) as error:
                problems.append(
                    f"story {story.name}, subject {subject}: its repeats cannot be read ({first_line(error)}); "
                    "get the file again"
                )
    return problems


def check_subject(
    dataset: Dataset, subject: str, hasher: Hasher, watch: Watch | None, usable: set[str]
) -> tuple[list[ResponseCheck], np.ndarray, np.ndarray]:
    """Return a check per story, and (n_voxels,) flags: finite, and not constant, in every usable story."""
    stories = [story for story in dataset.stories.values() if subject in story.responses]
    checks = {story.name: _check_shape(dataset, story, subject) for story in stories}
    sizes = Counter(check.n_voxels for check in checks.values() if not check.problems)
    n_voxels = (sizes.most_common(1)[0][0] if sizes else 0) or 0
    finite, varies = np.ones(n_voxels, bool), np.ones(n_voxels, bool)
    for story in stories:
        check = checks[story.name]
        if not check.problems and check.n_voxels != n_voxels:
            check = check.and_problem(
                f"{_where(dataset, story, subject)} has {check.n_voxels} voxels, other stories of {subject} have "
                f"{n_voxels}; all must agree"
            )
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
        return check.and_problem(str(error))
    if len(shape) != 2 or dtype.kind not in "fiu":
        return check.and_problem(f"{where} is {dtype} of shape {shape}; expected numbers (rows, voxels)")
    check = check._replace(n_rows=shape[0], n_voxels=shape[1])
    if shape[0] == expected:
        return check
    sizes = f"its {len(story.tr_times_s)} TR times less {sum(dataset.trim)} trimmed make {expected}"
    if shape[1] == expected:
        return check.and_problem(
            f"{where} has {shape[0]} rows and {shape[1]} columns; {sizes}: it looks transposed; save (rows, voxels)"
        )
    return check.and_problem(
        f"{where} has {shape[0]} rows; {sizes}; text and responses must be of the same part of the scan"
    )


def _check_repeats(dataset: Dataset, story: Story, check: ResponseCheck) -> ResponseCheck:
    """Count the repeats; their mean is in the responses, so that rows and voxels must be the same."""
    repeats = story.repeats.get(check.subject)
    if repeats is None:
        return check
    try:
        shape, dtype = repeats.check()
    except InputError as error:
        return check.and_problem(str(error))
    if (
        len(shape) == 3
        and shape[1] == check.n_rows_expected
        and check.n_voxels in (None, shape[2])
        and dtype.kind in "fiu"
    ):
        return check._replace(n_repeats=shape[0])
    return check.and_problem(
        f"{_where(dataset, story, check.subject, repeats)} its repeats are {dtype} of shape {shape}; expected numbers "
        f"(repeats, {check.n_rows_expected}, {check.n_voxels or 'voxels'})"
    )


def _read(
    dataset: Dataset, story: Story, check: ResponseCheck, hasher: Hasher, watch: Watch | None
) -> tuple[ResponseCheck, "_Totals"]:
    """Read all responses of a story, a block at a time."""
    responses, subject = story.responses[check.subject], check.subject
    assert check.n_rows is not None and check.n_voxels is not None
    shape = (check.n_rows, check.n_voxels)
    totals = _Totals(check.n_voxels)
    hasher.add_header(subject, story.name, shape, responses.check()[1])
    try:
        for block in responses.blocks():
            rows = slice(totals.n_rows, totals.n_rows + len(block))
            hashing = hasher.begin_to_add(block)
            for voxels, values in totals.add(block):
                if watch is not None:
                    watch(Block(story, subject, shape, rows, voxels, values))
            hashing.result()
    except InputError as error:
        return check.and_problem(str(error)), totals
    check = totals.describe(check)
    if not (totals.finite & totals.varies()).any():
        return check.and_problem(f"{_where(dataset, story, subject)} {_no_voxel(responses, totals)}"), totals
    hasher.stories.setdefault(totals.key(), []).append((subject, story.name))
    return check, totals


def _no_voxel(responses: Responses, totals: "_Totals") -> str:
    """Say why a story has no valid voxel; lost volumes are recognised by their rows."""
    if totals.finite.any():
        return "has no voxel that is finite and varies; leave the story out or correct the file"
    lost = np.flatnonzero([not np.isfinite(row).any() for block in responses.blocks() for row in block])
    if not 0 < len(lost) < totals.n_rows:
        return "has no finite voxel; leave the story out or correct the file"
    shown = ", ".join(map(str, lost[:MAX_SHOWN])) + (", ..." if len(lost) > MAX_SHOWN else "")
    return f"has no finite voxel: in row {shown} no value is finite; interpolate there, or leave the story out"


def _where(dataset: Dataset, story: Story, subject: str, responses: Responses | None = None) -> str:
    path = (responses or story.responses[subject]).path
    return f"{path or dataset.source}: story {story.name}, subject {subject}:"


class _Totals:
    """Sums over the rows of one story, (n_voxels,) each, of responses minus the first one: of z-scored data this
    changes little, of raw data it keeps float32 exact enough."""

    def __init__(self, n_voxels: int) -> None:
        self.n_rows = 0
        self.first = np.zeros(0)
        self.finite = np.ones(n_voxels, bool)
        self.low, self.high = np.zeros(n_voxels, np.float32), np.zeros(n_voxels, np.float32)
        self.sum, self.squares = np.zeros(n_voxels), np.zeros(n_voxels)

    def add(self, block: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Add rows; yield (voxels, values) a few thousand voxels at a time, as in ``Block``."""
        if self.n_rows == 0:
            self.first = _first_responses(block[0])
        self.n_rows += len(block)
        for start in range(0, block.shape[1], VOXELS_AT_A_TIME):
            voxels = slice(start, min(start + VOXELS_AT_A_TIME, block.shape[1]))
            values = self._subtract_first(block[:, voxels], voxels)
            np.minimum(self.low[voxels], values.min(axis=0), out=self.low[voxels])
            np.maximum(self.high[voxels], values.max(axis=0), out=self.high[voxels])
            self.sum[voxels] += values.sum(axis=0)
            yield voxels, values

    def _subtract_first(self, part: np.ndarray, voxels: slice) -> np.ndarray:
        """Return values minus the first, (rows, voxels) float32; note which voxels are not finite, and add squares."""
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
        """Return a hash that identical responses share."""
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
        valid = self.finite & varies
        if not valid.any():
            return check
        shifted = self.sum[valid] / self.n_rows
        mean = np.abs(shifted + self.first[valid])
        sd = np.sqrt(np.maximum(self.squares[valid] / self.n_rows - shifted**2, 0))
        is_z_scored = np.median(mean) <= MAX_ABS_MEAN and np.median(np.abs(sd - 1)) <= MAX_SD_ERROR
        return check._replace(
            max_abs_mean=float(mean.max()), sd_range=(float(sd.min()), float(sd.max())), is_z_scored=bool(is_z_scored)
        )


def _first_responses(row: np.ndarray) -> np.ndarray:
    """Return the values to subtract, (n_voxels,): 0 where the first response is not finite; float32 for float32 files,
    so that values are converted only once."""
    kind = np.float32 if row.dtype.kind == "f" and row.dtype.itemsize <= 4 else np.float64
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(row.astype(np.float32))
    return np.where(is_finite, row, 0).astype(kind)
