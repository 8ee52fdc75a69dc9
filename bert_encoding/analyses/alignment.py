"""The lag diagnostic: do the responses follow the words by the few seconds that blood needs, and not by others?

Responses that are cut otherwise than their text fit it row by row, raise no error, and lose most of the signal. So word
rate is shifted against them: with text and responses aligned it predicts best when they come 2 or 3 TRs later.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.inspect_responses import Block
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import TRIMS, Dataset, Story, Trim
from bert_encoding.features.downsampling import lanczos_downsample
from bert_encoding.features.word_rate import word_rate

SHIFTS = np.arange(-10, 11)  # in TRs; above 0 the response comes later than the word
USABLE = range(1, 5)  # TRs at which the peak of aligned data lies
TYPICAL = (2, 3)
WRONG_TRIM_TRS = 5  # by so much do the published and the course's trim differ
N_FOLDS = 5
MIN_ROWS = 10  # of a story, for a CC
# A peak counts if it stands above the profile's median by so many of both measures of noise. Measured, so many profiles
# have such a peak: of noise (white, or correlated in time; 12 to 1000 voxels) 1 in 4800, of noise with a part common to
# all voxels up to 1 in 80, of real responses to other stories than the words' none in 1200; of 3, 5 and 10 stories of a
# real listener 34%, 68% and all of 200 draws.
MIN_MADS, MIN_ERRORS = 3.0, 9.0
MAD_TO_SD = 1.4826  # of a normal distribution
VOXELS_AT_A_TIME = 4096
MIN_STORIES, STORY_VOXELS = 5, 4096  # for a story's own lag: stories to learn a pattern from, voxels kept of each
# In MADs. Of a real listener's 101 stories (100 voxels; 8 of them shifted by 3 to 5 TRs, 12 draws) 95% of the shifted
# ones lie clearly elsewhere and none of the 1116 others. With 10 voxels it would be 1 in 60 of the others, so the lags
# of single stories count only where most of them show well.
MIN_STORY_HEIGHT, MIN_STORY_LEAD, MIN_USUAL_HEIGHT = 3.0, 1.5, 4.5
MAX_TRACE = 1.9  # of a story that does not follow its words; 22 of 26 swapped in pairs, none of 101 right ones
MAX_SHOWN = 8  # stories in a message
NEAR_TRS = 2  # shifts so close to the subject's peak count as the same


class StoryLag(NamedTuple):
    """Where one story's responses follow its words best, through the other stories' pattern over voxels.

    Attributes
    ----------
    peak : in TRs
    height, height_here : of that peak, and of the best shift near the subject's own peak, in MADs above the median
    """

    story: str
    peak: int
    height: float
    height_here: float

    @property
    def is_elsewhere(self) -> bool:
        """Whether the story clearly belongs to another lag than the subject's stories as a whole."""
        return self.height >= MIN_STORY_HEIGHT and self.height - self.height_here >= MIN_STORY_LEAD

    @property
    def is_lost(self) -> bool:
        """Whether the story does not follow its words where the others do, nor clearly anywhere else."""
        return self.height_here < MAX_TRACE and not self.is_elsewhere


class LagProfile(NamedTuple):
    """How well word rate predicts one subject at each shift.

    Attributes
    ----------
    shifts : (21,) in TRs, above 0: the response comes later
    cc : (21,) held-out CC, mean over folds and valid voxels; NaN if there are fewer than two folds
    floor : a CC above it is no noise
    peak : the best shift, in TRs
    is_clear : whether the peak reaches above the floor
    stories : each story's own lag; none if there are too few
    """

    source: str
    subject: str
    shifts: np.ndarray
    cc: np.ndarray
    floor: float
    peak: int
    is_clear: bool
    tr_s: float
    trim: Trim
    stories: tuple[StoryLag, ...] = ()

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
        """Whether the peak is clear and lies where it must."""
        return self.is_clear and self.peak in USABLE


class FoldSums(NamedTuple):
    """Products of word rate ``x`` and responses ``y``, each less its mean over the rows used of a story, summed over
    the rows of each fold.

    Attributes
    ----------
    xy : (n_folds, n_shifts, n_voxels) float32
    xx : (n_folds, n_shifts)
    yy : (n_folds, n_voxels)
    """

    xy: np.ndarray
    xx: np.ndarray
    yy: np.ndarray


class LagSums:
    """Watches responses pass by (see ``inspect``) and keeps the sums that the lag profile needs.

    Memory: ``FoldSums`` of each subject, one story's share of it, and ``STORY_VOXELS`` voxels' share of every story.
    """

    def __init__(self, dataset: Dataset, n_folds: int = N_FOLDS) -> None:
        self.dataset, self.n_folds = dataset, n_folds
        self.folds = {subject: _fold_of(dataset, subject, n_folds) for subject in dataset.subjects}
        self.sums: dict[str, FoldSums] = {}
        self.of_stories: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {s: {} for s in dataset.subjects}
        self._tr_s: dict[str, float] = {}
        self._designs: dict[str, tuple[np.ndarray, slice]] = {}
        self._story = FoldSums(*(np.zeros(0),) * 3)
        self._y = np.zeros(0)

    def __call__(self, block: Block) -> None:
        """Add some responses; a story counts once its last rows have passed."""
        X, used = self._design(block.story)
        if not len(X):
            return
        if block.rows.start == 0 and block.voxels.start == 0:
            self._begin(block)
        start, stop = max(used.start, block.rows.start), min(used.stop, block.rows.stop)
        if start < stop:
            y = block.values[start - block.rows.start : stop - block.rows.start]
            self._story.xy[:, block.voxels] += X[start - used.start : stop - used.start].T @ y
            self._story.yy[block.voxels] += np.einsum("tv,tv->v", y, y)
            self._y[block.voxels] += y.sum(axis=0)
        if (block.rows.stop, block.voxels.stop) == block.shape:
            self._end(block, X)

    def profile(self, subject: str, valid: np.ndarray) -> LagProfile:
        """Return the profile of one subject over its valid voxels, (n_voxels,) flags."""
        empty = FoldSums(np.zeros((0, SHIFTS.size, 0)), np.zeros((0, SHIFTS.size)), np.zeros((0, 0)))
        fold_cc = held_out_cc(self.sums.get(subject, empty), valid)
        cc = fold_cc.mean(axis=0) if len(fold_cc) > 1 else np.full(SHIFTS.size, np.nan)
        floor = noise_floor(fold_cc)
        peak = int(SHIFTS[np.argmax(cc)]) if np.isfinite(cc).all() else 0
        is_clear, tr_s = bool(cc.max() > floor), self._tr_s.get(subject, float("nan"))
        stories = story_lags(self.of_stories[subject], valid[_spread(valid.size)], peak) if valid.size else ()
        return LagProfile(
            self.dataset.source, subject, SHIFTS, cc, floor, peak, is_clear, tr_s, self.dataset.trim, stories
        )

    def _design(self, story: Story) -> tuple[np.ndarray, slice]:
        if story.name not in self._designs:
            self._designs[story.name] = shifted_word_rate(story, self.dataset.trim)
        return self._designs[story.name]

    def _begin(self, block: Block) -> None:
        n_voxels = block.shape[1]
        self._story = FoldSums(np.zeros((SHIFTS.size, n_voxels), np.float32), np.zeros(SHIFTS.size), np.zeros(n_voxels))
        self._y = np.zeros(n_voxels)

    def _end(self, block: Block, X: np.ndarray) -> None:
        """Add the story to its fold. ``X`` has mean 0, so ``y`` need not have, but for its own square."""
        if block.subject not in self.sums:
            self._tr_s[block.subject] = float(np.mean(np.diff(block.story.tr_times_s)))
            n_folds, n_voxels = max(self.folds[block.subject].values()) + 1, block.shape[1]
            self.sums[block.subject] = FoldSums(
                np.zeros((n_folds, SHIFTS.size, n_voxels), np.float32),
                np.zeros((n_folds, SHIFTS.size)),
                np.zeros((n_folds, n_voxels)),
            )
        fold, sums = self.folds[block.subject][block.story.name], self.sums[block.subject]
        xx = np.einsum("ts,ts->s", X, X, dtype=np.float64)
        sums.xy[fold] += self._story.xy
        sums.xx[fold] += xx
        self.of_stories[block.subject][block.story.name] = (self._story.xy[:, _spread(block.shape[1])], xx)
        sums.yy[fold] += np.maximum(self._story.yy - self._y**2 / len(X), 0)


def shifted_word_rate(story: Story, trim: Trim) -> tuple[np.ndarray, slice]:
    """Return word rate at every shift, (n_used, 21) float32 with mean 0, and the rows of the responses it belongs to.

    The rows are the same for every shift: those at which each shift still meets the told story. With others, the
    silence before the first word and after the last would be predicted, at all shifts alike.
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
    ``sign(b) xy / sqrt(xx yy)`` with ``sign(b)`` that of the others' ``xy``. A voxel that is constant in a fold has no
    CC there.
    """
    used = np.flatnonzero(sums.xx.min(axis=1) > 0)
    total, counts = np.zeros((len(used), sums.xx.shape[1])), np.zeros((len(used), 1))
    voxels = np.flatnonzero(valid)
    for start in range(0, voxels.size, VOXELS_AT_A_TIME):
        some = voxels[start : start + VOXELS_AT_A_TIME]
        xy = sums.xy[np.ix_(used, np.arange(sums.xy.shape[1]), some)].astype(np.float64)
        scale = np.sqrt(sums.xx[used][:, :, None] * sums.yy[np.ix_(used, some)][:, None])
        sign = np.sign(xy.sum(axis=0) - xy)
        total += np.divide(sign * xy, scale, out=np.zeros_like(xy), where=scale > 0).sum(axis=2)
        counts += (scale[:, :1] > 0).sum(axis=2)
    return (total / np.maximum(counts, 1))[counts[:, 0] > 0]


def story_lags(sums: Mapping[str, tuple[np.ndarray, np.ndarray]], valid: np.ndarray, peak: int) -> tuple[StoryLag, ...]:
    """Return the lag of each story alone.

    One story is too short for a profile of single voxels. But the slopes of the *other* stories at their best shift
    tell which voxels follow word rate, and how much: summed with these weights, one story's voxels show its peak.

    Parameters
    ----------
    sums : story -> (xy (21, n_voxels), xx (21,)), as in ``FoldSums``
    valid : (n_voxels,) flags
    peak : the subject's own, in TRs
    """
    kept = {name: (xy[:, valid].astype(np.float64), xx) for name, (xy, xx) in sums.items() if xx.min() > 0}
    if len(kept) < MIN_STORIES or not valid.any():
        return ()
    all_xy, all_xx = (sum(parts, np.zeros(1)) for parts in zip(*kept.values(), strict=True))
    lags = []
    for name, (xy, xx) in kept.items():
        others, others_xx = all_xy - xy, all_xx - xx
        best = int(np.argmax(np.einsum("sv,sv->s", others, others) / others_xx))
        profile = (xy @ others[best]) / np.sqrt(xx)  # (21,)
        profile -= np.median(profile)
        height = profile / max(MAD_TO_SD * float(np.median(np.abs(profile))), 1e-30)
        near = np.abs(SHIFTS - peak) <= NEAR_TRS
        at = int(np.argmax(height))
        lags.append(StoryLag(name, int(SHIFTS[at]), float(height[at]), float(height[near].max())))
    return tuple(lags)


def _spread(n_voxels: int) -> np.ndarray:
    """Return at most ``STORY_VOXELS`` voxels, spread evenly over all."""
    return np.linspace(0, n_voxels - 1, min(n_voxels, STORY_VOXELS)).astype(int)


def noise_floor(fold_cc: np.ndarray) -> float:
    """Return the CC above which a peak is no noise: the profile's median, and some multiples of its noise.

    Of two measures the larger multiple counts: the profile's own spread over shifts (median absolute deviation), and
    the standard error over folds. The first also rises with a slow trend over shifts, the second does not.

    Parameters
    ----------
    fold_cc : (n_folds, n_shifts)
    """
    if len(fold_cc) < 2:
        return float("nan")
    cc = fold_cc.mean(axis=0)
    spread = MAD_TO_SD * np.median(np.abs(cc - np.median(cc)))
    error = np.sqrt(fold_cc.var(axis=0, ddof=1).mean() / len(fold_cc))
    return float(np.median(cc) + max(MIN_MADS * spread, MIN_ERRORS * error))


def check_alignment(profile: LagProfile, trust: bool = False) -> list[str]:
    """Return what a user should know of the alignment, a line each; nothing if it is confirmed.

    Parameters
    ----------
    trust : note what would be refused instead of refusing it

    Raises
    ------
    InputError
        if there is a clear peak where aligned data have none, or some stories clearly peak elsewhere than the others.
    """
    if not np.isfinite(profile.cc).all():
        return [f"{profile.subject}: too little data to look for the lag: alignment could not be confirmed"]
    refusal = _mixture(profile)
    if not refusal and not profile.is_clear:
        return [
            f"{profile.subject}: word rate predicts nothing at any shift: alignment could not be confirmed "
            f"(best CC {profile.cc.max():.4f} at {in_trs(profile.peak, profile.tr_s)}, noise up to {profile.floor:.4f})"
        ]
    refusal = refusal or ("" if profile.is_aligned else f"{_misaligned(profile)}; {_remedy(profile)}")
    if refusal and not trust:
        raise InputError(f"{refusal}, or --trust-alignment for a study all the same")
    if refusal:
        return [f"{refusal}; trusted all the same, as asked"]
    notes = []
    if profile.lost:
        notes.append(
            f"{profile.subject}: {len(profile.lost)} of {len(profile.stories)} stories leave no trace of their words "
            f"where the others do; does each lie under its own name? {_shown([s.story for s in profile.lost])}"
        )
    if profile.peak not in TYPICAL:
        expected = " or ".join(in_trs(shift, profile.tr_s) for shift in TYPICAL)
        notes.append(
            f"{profile.subject}: responses follow the words best at {in_trs(profile.peak, profile.tr_s)}; {expected} "
            "is usual: are TR times and trim right?"
        )
    return notes


def inspect_aligned(dataset: Dataset, names: list[str], trust: bool) -> Dataset:
    """Inspect the data, and in the same pass see whether responses follow the words in these stories, no others."""
    sums = LagSums(dataset.only(names, dataset.subjects))
    inspected = inspect(dataset, lambda block: sums(block) if block.story.name in sums.dataset.stories else None)
    assert inspected.voxel_masks is not None
    profiles = [sums.profile(subject, inspected.voxel_masks[subject]) for subject in dataset.subjects]
    notes = [note for profile in profiles for note in check_alignment(profile, trust)]
    return replace(inspected, notes=(*inspected.notes, *notes))


def _mixture(profile: LagProfile) -> str:
    """Describe stories that are cut otherwise than the others; a remedy for all would spoil these, or those."""
    others = profile.elsewhere
    if not others:
        return ""
    shown = _shown([f"{story.story} ({story.peak:+d} TR)" for story in others])
    return (
        f"{profile.source}: subject {profile.subject}: {len(others)} of {len(profile.stories)} stories do not follow "
        f"their words at {in_trs(profile.peak, profile.tr_s)} as the stories do on the whole, but elsewhere: {shown}; "
        "cut all stories alike, and see that each lies under its own name"
    )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")


def in_trs(shift: int, tr_s: float) -> str:
    """Return a shift in TRs and seconds, for people."""
    return f"{shift:+d} TR ({shift * tr_s:+g} s)"


def _misaligned(profile: LagProfile) -> str:
    expected = " or ".join(in_trs(shift, profile.tr_s) for shift in TYPICAL)
    return (
        f"{profile.source}: subject {profile.subject}: responses follow the words best at "
        f"{in_trs(profile.peak, profile.tr_s)}, where {expected} is expected{_cause(profile)}"
    )


def _cause(profile: LagProfile) -> str:
    actual = _trim_that_fits(profile)
    if actual is None:
        return ""
    return f", as if trimmed {tuple(actual)} instead of {tuple(profile.trim)} TRs at start and end"


def _remedy(profile: LagProfile) -> str:
    actual = _trim_that_fits(profile)
    for name, trim in TRIMS.items():
        if trim == actual:
            return f"try --trim {name}"
    return f"check how the responses were cut; try --trim {' or --trim '.join(TRIMS)}"


def _trim_that_fits(profile: LagProfile) -> Trim | None:
    """Return the trim with which the peak would lie at +2 or +3, if it is off by the usual confusion."""
    for wrong in (WRONG_TRIM_TRS, -WRONG_TRIM_TRS):
        if profile.peak - wrong in TYPICAL and min(profile.trim.start_trs - wrong, profile.trim.end_trs + wrong) >= 0:
            return Trim(profile.trim.start_trs - wrong, profile.trim.end_trs + wrong)
    return None


def _fold_of(dataset: Dataset, subject: str, n_folds: int) -> dict[str, int]:
    n_rows = {
        name: max(0, len(story.tr_times_s) - sum(dataset.trim))
        for name, story in dataset.stories.items()
        if subject in story.responses
    }
    return {name: at for at, names in enumerate(story_folds(n_rows, n_folds, seed=0)) for name in names}
