"""The lag diagnostic: do the responses follow the words by the few seconds that blood flow needs?

Responses that were cut otherwise than their text have the right number of rows, raise no error, and lose most of the
signal. So word rate is shifted against them: in aligned data the best lag is +2 or +3 TRs (response after word).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError, first_names
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.inspect_responses import Block
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import TRIMS, Dataset, Story, Trim
from bert_encoding.features.downsampling import lanczos_downsample
from bert_encoding.features.word_rate import word_rate

SHIFTS = np.arange(-10, 11)  # in TRs; above 0 the response comes later than the word
PLAUSIBLE = range(1, 5)  # lags of aligned data, in TRs
TYPICAL = (2, 3)
TRIM_DIFFERENCE_TRS = 5  # between the published and the course's trim
N_FOLDS = 5
MIN_ROWS = 10  # of a story, for a CC
# How often these thresholds flag noise, and find real shifts: docs/data.md
MIN_MADS, MIN_ERRORS = 3.0, 9.0  # a peak above the profile's median by both is clear
MAD_TO_SD = 1.4826  # of a normal distribution
VOXELS_AT_A_TIME = 4096
MIN_STORIES, STORY_VOXELS = 5, 4096  # for a story's own lag: stories to learn a pattern from, voxels used of each
MIN_STORY_HEIGHT, MIN_STORY_LEAD, MIN_USUAL_HEIGHT = 3.0, 1.5, 4.5  # in MADs
MAX_TRACE = 1.9  # in MADs, of a story that does not follow its words
NEAR_TRS = 2  # shifts this close to the subject's peak count as the same


class StoryLag(NamedTuple):
    """Where one story's responses follow its words best, by the voxel pattern of the other stories."""

    story: str
    peak: int  # in TRs
    height: float  # of the peak, in MADs above the median
    height_here: float  # of the best shift near the subject's own peak

    @property
    def is_elsewhere(self) -> bool:
        """Whether the story clearly has another lag than the subject's stories as a whole."""
        return self.height >= MIN_STORY_HEIGHT and self.height - self.height_here >= MIN_STORY_LEAD

    @property
    def is_lost(self) -> bool:
        """Whether the story follows its words neither at the lag of the others, nor clearly at any other."""
        return self.height_here < MAX_TRACE and not self.is_elsewhere


class LagProfile(NamedTuple):
    """How well word rate predicts one subject at each shift."""

    source: str
    subject: str
    shifts: np.ndarray  # (21,) in TRs, above 0: the response comes later
    cc: np.ndarray  # (21,) held-out CC, mean over folds and valid voxels; NaN if there are fewer than two folds
    floor: float  # the CC that noise reaches
    peak: int  # the best shift, in TRs
    is_clear: bool  # whether the peak is above the floor
    tr_s: float
    trim: Trim
    stories: tuple[StoryLag, ...] = ()  # empty if there are too few

    @property
    def elsewhere(self) -> list[StoryLag]:
        """Stories that are cut otherwise than the others."""
        return [story for story in self.stories if story.is_elsewhere] if self._shows_stories else []

    @property
    def lost(self) -> list[StoryLag]:
        """Stories that follow other words than theirs, or none."""
        return [story for story in self.stories if story.is_lost] if self._shows_stories else []

    @property
    def _shows_stories(self) -> bool:
        heights = [story.height for story in self.stories]
        return bool(heights) and float(np.median(heights)) >= MIN_USUAL_HEIGHT

    @property
    def is_aligned(self) -> bool:
        """Whether there is a clear peak at a plausible lag."""
        return self.is_clear and self.peak in PLAUSIBLE


class FoldSums(NamedTuple):
    """Products of word rate ``x`` and responses ``y``, each less its mean over the story's rows, summed by fold."""

    xy: np.ndarray  # (n_folds, n_shifts, n_voxels) float32
    xx: np.ndarray  # (n_folds, n_shifts)
    yy: np.ndarray  # (n_folds, n_voxels)

    @classmethod
    def zeros(cls, n_folds: int, n_voxels: int) -> "FoldSums":
        xy = np.zeros((n_folds, SHIFTS.size, n_voxels), np.float32)
        return cls(xy, np.zeros((n_folds, SHIFTS.size)), np.zeros((n_folds, n_voxels)))


class LagSums:
    """Receives blocks of responses (see ``inspect``) and keeps the sums that the lag profile needs.

    Memory: ``FoldSums`` of each subject and of one story, and ``STORY_VOXELS`` voxels' share of every story.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.folds = {subject: _fold_of(dataset, subject) for subject in dataset.subjects}
        self.sums: dict[str, FoldSums] = {}
        self.of_stories: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {s: {} for s in dataset.subjects}
        self._tr_s: dict[str, float] = {}
        self._word_rates: dict[str, tuple[np.ndarray, slice]] = {}
        self._story, self._y = FoldSums.zeros(1, 0), np.zeros(0)  # of the story being read

    def __call__(self, block: Block) -> None:
        """Add a block; a story counts once its last rows have been read."""
        if block.story.name not in self._word_rates:
            self._word_rates[block.story.name] = shifted_word_rate(block.story, self.dataset.trim)
        X, used = self._word_rates[block.story.name]
        if not len(X):
            return
        if block.rows.start == 0 and block.voxels.start == 0:
            self._story, self._y = FoldSums.zeros(1, block.shape[1]), np.zeros(block.shape[1])
        start, stop = max(used.start, block.rows.start), min(used.stop, block.rows.stop)
        if start < stop:
            y = block.values[start - block.rows.start : stop - block.rows.start]
            self._story.xy[0, :, block.voxels] += X[start - used.start : stop - used.start].T @ y
            self._story.yy[0, block.voxels] += np.einsum("tv,tv->v", y, y)
            self._y[block.voxels] += y.sum(axis=0)
        if (block.rows.stop, block.voxels.stop) == block.shape:
            self._end_story(block, X)

    def profile(self, subject: str, valid: np.ndarray) -> LagProfile:
        """Return the profile of one subject over its valid voxels, (n_voxels,) flags."""
        fold_cc = held_out_cc(self.sums.get(subject, FoldSums.zeros(0, 0)), valid)
        cc = fold_cc.mean(axis=0) if len(fold_cc) > 1 else np.full(SHIFTS.size, np.nan)
        floor = noise_floor(fold_cc)
        peak = int(SHIFTS[np.argmax(cc)]) if np.isfinite(cc).all() else 0
        return LagProfile(
            self.dataset.source,
            subject,
            SHIFTS,
            cc,
            floor,
            peak,
            is_clear=bool(cc.max() > floor),
            tr_s=self._tr_s.get(subject, float("nan")),
            trim=self.dataset.trim,
            stories=story_lags(self.of_stories[subject], valid[_spread(valid.size)], peak) if valid.size else (),
        )

    def _end_story(self, block: Block, X: np.ndarray) -> None:
        """Add the story to its fold. ``X`` has mean 0, so the mean of ``y`` matters only for its own square."""
        fold, n_voxels = self.folds[block.subject][block.story.name], block.shape[1]
        if block.subject not in self.sums:
            self._tr_s[block.subject] = float(np.mean(np.diff(block.story.tr_times_s)))
            self.sums[block.subject] = FoldSums.zeros(max(self.folds[block.subject].values()) + 1, n_voxels)
        sums, xy = self.sums[block.subject], self._story.xy[0]
        xx = np.einsum("ts,ts->s", X, X, dtype=np.float64)
        sums.xy[fold] += xy
        sums.xx[fold] += xx
        sums.yy[fold] += np.maximum(self._story.yy[0] - self._y**2 / len(X), 0)
        self.of_stories[block.subject][block.story.name] = (xy[:, _spread(n_voxels)], xx)


def shifted_word_rate(story: Story, trim: Trim) -> tuple[np.ndarray, slice]:
    """Return word rate at every shift, (n_used, 21) float32 with mean 0, and the rows of responses that it predicts.

    The rows are the same for every shift: those for which every shift falls between the first and the last word.
    Otherwise the silence before and after the story would be predicted, at all shifts alike.
    """
    rate = lanczos_downsample(word_rate(story.spoken), story.word_times_s, story.tr_times_s)[:, 0]  # (n_trs,)
    spoken_s = story.word_times_s[[word != "" for word in story.spoken]]
    first, past = np.searchsorted(story.tr_times_s, spoken_s[[0, -1]])  # TRs from the first to the last word
    rows, reach = trim.rows(len(rate)), int(SHIFTS.max())
    start, stop = max(int(first) + reach, rows.start), min(int(past) - reach, rows.stop)
    if stop - start < MIN_ROWS:
        return np.zeros((0, SHIFTS.size), np.float32), slice(0, 0)
    X = rate[np.arange(start, stop)[:, None] - SHIFTS]  # (n_used, n_shifts)
    return (X - X.mean(axis=0)).astype(np.float32), slice(start - rows.start, stop - rows.start)


def held_out_cc(sums: FoldSums, valid: np.ndarray) -> np.ndarray:
    """Return the mean CC over valid voxels in each fold that has data, (n_folds_used, 21).

    One regressor without intercept, fitted on the other folds, predicts ``b x``; its CC in the fold is
    ``sign(b) xy / sqrt(xx yy)``, where ``b`` has the sign of ``xy`` summed over the other folds. A voxel that is
    constant in a fold has no CC there.
    """
    used = np.flatnonzero(sums.xx.min(axis=1) > 0)
    total, counts = np.zeros((len(used), sums.xx.shape[1])), np.zeros((len(used), 1))
    voxels = np.flatnonzero(valid)
    for start in range(0, voxels.size, VOXELS_AT_A_TIME):
        block = voxels[start : start + VOXELS_AT_A_TIME]
        xy = sums.xy[np.ix_(used, np.arange(sums.xy.shape[1]), block)].astype(np.float64)
        scale = np.sqrt(sums.xx[used][:, :, None] * sums.yy[np.ix_(used, block)][:, None])
        sign = np.sign(xy.sum(axis=0) - xy)
        total += np.divide(sign * xy, scale, out=np.zeros_like(xy), where=scale > 0).sum(axis=2)
        counts += (scale[:, :1] > 0).sum(axis=2)
    return (total / np.maximum(counts, 1))[counts[:, 0] > 0]


def story_lags(sums: Mapping[str, tuple[np.ndarray, np.ndarray]], valid: np.ndarray, peak: int) -> tuple[StoryLag, ...]:
    """Return the lag of each single story.

    One story is too short for a profile of single voxels. But the slopes of the *other* stories at their best shift
    show how much each voxel follows word rate; the sum over voxels with these weights shows the story's peak.
    ``sums`` maps a story to xy (21, n_voxels) and xx (21,), as in ``FoldSums``; ``peak`` is the subject's own.
    """
    usable = {name: (xy[:, valid].astype(np.float64), xx) for name, (xy, xx) in sums.items() if xx.min() > 0}
    if len(usable) < MIN_STORIES or not valid.any():
        return ()
    all_xy, all_xx = (sum(parts, np.zeros(1)) for parts in zip(*usable.values(), strict=True))
    lags = []
    for name, (xy, xx) in usable.items():
        others, others_xx = all_xy - xy, all_xx - xx
        best = int(np.argmax(np.einsum("sv,sv->s", others, others) / others_xx))
        profile = (xy @ others[best]) / np.sqrt(xx)  # (21,)
        profile -= np.median(profile)
        height = profile / max(MAD_TO_SD * float(np.median(np.abs(profile))), 1e-30)
        near = np.abs(SHIFTS - peak) <= NEAR_TRS
        lags.append(StoryLag(name, int(SHIFTS[np.argmax(height)]), float(height.max()), float(height[near].max())))
    return tuple(lags)


def _spread(n_voxels: int) -> np.ndarray:
    """Return at most ``STORY_VOXELS`` voxels, spread evenly over all."""
    return np.linspace(0, n_voxels - 1, min(n_voxels, STORY_VOXELS)).astype(int)


def noise_floor(fold_cc: np.ndarray) -> float:
    """Return the CC that noise reaches, from (n_folds, n_shifts): the profile's median plus a multiple of its noise.

    The larger of two measures counts: the profile's spread over shifts (median absolute deviation, MAD), which also
    rises with a slow trend over shifts, and the standard error over folds, which does not.
    """
    if len(fold_cc) < 2:
        return float("nan")
    cc = fold_cc.mean(axis=0)
    spread = MAD_TO_SD * np.median(np.abs(cc - np.median(cc)))
    error = np.sqrt(fold_cc.var(axis=0, ddof=1).mean() / len(fold_cc))
    return float(np.median(cc) + max(MIN_MADS * spread, MIN_ERRORS * error))


def check_alignment(profile: LagProfile, trust: bool = False) -> list[str]:
    """Return what speaks against the alignment, one line each; nothing if it is confirmed.

    Raises InputError if there is a clear peak at an implausible lag, or some stories clearly peak at another lag than
    the others; with ``trust`` this becomes a note.
    """
    subject, peak = profile.subject, in_trs(profile.peak, profile.tr_s)
    if not np.isfinite(profile.cc).all():
        return [f"{subject}: too little data to compute the lag: alignment could not be confirmed"]
    refusal = _mixture(profile)
    if not refusal and not profile.is_clear:
        return [
            f"{subject}: word rate predicts nothing at any shift: alignment could not be confirmed "
            f"(best CC {profile.cc.max():.4f} at {peak}, noise up to {profile.floor:.4f})"
        ]
    refusal = refusal or ("" if profile.is_aligned else _misalignment(profile))
    if refusal and not trust:
        raise InputError(f"{refusal}, or run a study anyway with --trust-alignment")
    if refusal:
        return [f"{refusal}; ignored because of --trust-alignment"]
    notes = []
    if profile.lost:
        names = first_names([story.story for story in profile.lost])
        notes.append(
            f"{subject}: {len(profile.lost)} of {len(profile.stories)} stories do not follow their words at the lag of "
            f"the others; are their names right? {names}"
        )
    if profile.peak not in TYPICAL:
        notes.append(f"{subject}: the best lag is {peak}; {_typical(profile)} is usual: are TR times and trim right?")
    return notes


def inspect_aligned(dataset: Dataset, names: list[str], trust: bool) -> Dataset:
    """Inspect a data set and, in the same pass, check the alignment of these stories, reading no other for it."""
    sums = LagSums(dataset.only(names, dataset.subjects))
    inspected = inspect(dataset, lambda block: sums(block) if block.story.name in sums.dataset.stories else None)
    assert inspected.voxel_masks is not None
    profiles = [sums.profile(subject, inspected.voxel_masks[subject]) for subject in dataset.subjects]
    notes = [note for profile in profiles for note in check_alignment(profile, trust)]
    return replace(inspected, notes=(*inspected.notes, *notes))


def in_trs(shift: int, tr_s: float) -> str:
    """Return a shift in TRs and seconds, for a message."""
    return f"{shift:+d} TR ({shift * tr_s:+g} s)"


def _typical(profile: LagProfile) -> str:
    return " or ".join(in_trs(shift, profile.tr_s) for shift in TYPICAL)


def _mixture(profile: LagProfile) -> str:
    """Name the stories that are cut otherwise than the others; one ``--trim`` for all would spoil either."""
    if not profile.elsewhere:
        return ""
    shown = first_names([f"{story.story} ({story.peak:+d} TR)" for story in profile.elsewhere])
    return (
        f"{profile.source}: subject {profile.subject}: {len(profile.elsewhere)} of {len(profile.stories)} stories have "
        f"another lag than {in_trs(profile.peak, profile.tr_s)}, the lag of all together: {shown}; "
        "cut all stories alike, and check that each has the right name"
    )


def _misalignment(profile: LagProfile) -> str:
    """Name the lag, and if the two usual trims were confused the right one."""
    cause, remedy = "", f"check how the responses were cut; try --trim {' or --trim '.join(TRIMS)}"
    for shift in (TRIM_DIFFERENCE_TRS, -TRIM_DIFFERENCE_TRS):
        actual = Trim(profile.trim.start_trs - shift, profile.trim.end_trs + shift)
        if profile.peak - shift in TYPICAL and min(actual) >= 0:
            cause = f", as if trimmed {tuple(actual)} instead of {tuple(profile.trim)} TRs at start and end"
            remedy = next((f"try --trim {name}" for name, trim in TRIMS.items() if trim == actual), remedy)
            break
    return (
        f"{profile.source}: subject {profile.subject}: the best lag is {in_trs(profile.peak, profile.tr_s)}, where "
        f"{_typical(profile)} is expected{cause}; {remedy}"
    )


def _fold_of(dataset: Dataset, subject: str) -> dict[str, int]:
    """Return story -> fold."""
    n_rows = {
        name: max(0, len(story.tr_times_s) - sum(dataset.trim))
        for name, story in dataset.stories.items()
        if subject in story.responses
    }
    return {name: fold for fold, names in enumerate(story_folds(n_rows, N_FOLDS, seed=0)) for name in names}
