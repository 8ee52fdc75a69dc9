"""The lag diagnostic: sums against a plain loop, planted lags, and no false alarm on noise."""

from dataclasses import replace

import numpy as np
import pytest
from make_data import story_words
from project import REAL_DATA

from bert_encoding.analyses import alignment
from bert_encoding.analyses.alignment import (
    N_FOLDS,
    SHIFTS,
    FoldSums,
    LagProfile,
    LagSums,
    check_alignment,
    held_out_cc,
    noise_floor,
    shifted_word_rate,
)
from bert_encoding.core.errors import InputError
from bert_encoding.datasets import inspect_responses, open_dataset
from bert_encoding.datasets import responses as responses_module
from bert_encoding.datasets.inspect import inspect, survey
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import story_folds
from bert_encoding.datasets.story import TRIMS, Dataset, Story, Trim
from bert_encoding.features.downsampling import lanczos_downsample

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED, COURSE = TRIMS["published"], TRIMS["course"]
TR_S = 2.0


def make_story(name: str, seed: int, n_words: int = 300) -> Story:
    """Return a story with words from 0 s on, some of them silent, without responses."""
    rng = np.random.default_rng((seed, len(name), *name.encode()))
    times = np.cumsum(rng.uniform(0.1, 1.0, n_words))
    words = ["" if i % 11 == 0 else word for i, word in enumerate(story_words(n_words, seed))]
    return Story(name, tuple(words), times, np.arange(int((times[-1] + 9) / 2) + 6) * TR_S - 9, {})


def with_rows(story: Story, rows: np.ndarray, subject: str = "s") -> Story:
    return replace(story, responses={subject: Responses(array=rows)})


def rate_of(story: Story) -> np.ndarray:
    """Return word rate, (n_trs,), without the function under test."""
    spoken = np.array([[float(word != "")] for word in story.words])
    return lanczos_downsample(spoken, story.word_times_s, story.tr_times_s)[:, 0]


def listener(lag: int, cut: Trim = PUBLISHED, n_stories: int = 6, n_voxels: int = 9, noise: float = 1.5) -> Dataset:
    """Return responses that follow word rate ``lag`` TRs later in two of three voxels, trimmed by ``cut``."""
    stories = {}
    for number in range(n_stories):
        story = make_story(f"s{number}", number)
        rng = np.random.default_rng((7, number))
        rate = rate_of(story)
        drive = np.roll(rate - rate.mean(), lag)
        follows = np.resize([0.0, 1.0, -1.0], n_voxels)
        rows = np.outer(drive, follows) + noise * rng.standard_normal((len(rate), n_voxels))
        rows = rows[cut.rows(len(rows))]
        scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0)
        stories[story.name] = with_rows(story, scaled)
    return Dataset("here", stories, ("s",), ())


def profile_of(dataset: Dataset, subject: str = "s") -> LagProfile:
    sums = LagSums(dataset)
    inspected = inspect(dataset, sums)
    assert inspected.voxel_masks is not None
    return sums.profile(subject, inspected.voxel_masks[subject])


@pytest.mark.parametrize("trim", [PUBLISHED, COURSE, Trim(0, 0)])
def test_word_rate_is_shifted_within_the_spoken_part(trim: Trim) -> None:
    story = make_story("s", 3)
    X, used = shifted_word_rate(story, trim)
    rate, trs = rate_of(story), story.tr_times_s
    spoken = [t for t, word in zip(story.word_times_s, story.words, strict=True) if word]
    rows = []
    for at in range(used.start, used.stop):
        tr = at + trim.start_trs
        assert all(spoken[0] <= trs[tr - s] <= spoken[-1] for s in range(-10, 11))
        rows.append([rate[tr - s] for s in range(-10, 11)])
    np.testing.assert_allclose(X, np.array(rows) - np.mean(rows, axis=0), atol=1e-5)
    n_spoken = sum(spoken[0] <= t <= spoken[-1] for t in trs)
    cut = max(0, trim.start_trs - 10 - int(np.searchsorted(trs, spoken[0])))
    assert len(X) == n_spoken - 20 - cut
    np.testing.assert_array_equal(SHIFTS, range(-10, 11))
    X, used = shifted_word_rate(make_story("s", 0, n_words=80), trim)
    assert (X.shape, used) == ((0, 21), slice(0, 0)), "shorter than the shifts"


def plain_profile(dataset: Dataset, voxels: list[int]) -> np.ndarray:
    """Return (n_folds, 21) mean CC of word rate fitted on the other folds, by a slow loop."""
    X, Y = {}, {}
    for name, story in dataset.stories.items():
        X[name], used = shifted_word_rate(story, dataset.trim)
        rows = story.responses["s"].read(np.array(voxels))[used].astype(float)
        Y[name] = rows - rows.mean(axis=0)
    n_rows = {name: len(story.tr_times_s) - 15 for name, story in dataset.stories.items()}
    folds = story_folds(n_rows, N_FOLDS, 0)
    cc = np.zeros((len(folds), 21, len(voxels)))
    for f, fold in enumerate(folds):
        others = [name for name in dataset.stories if name not in fold]
        for s in range(21):
            for v in range(len(voxels)):
                x_fit = np.concatenate([X[n][:, s] for n in others]).astype(float)
                slope, start = np.polyfit(x_fit, np.concatenate([Y[n][:, v] for n in others]), 1)
                predicted = slope * np.concatenate([X[n][:, s] for n in fold]) + start
                cc[f, s, v] = np.corrcoef(predicted, np.concatenate([Y[n][:, v] for n in fold]))[0, 1]
    return cc.mean(axis=2)


def test_profile_equals_a_plain_loop_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = listener(2)
    bad = np.array(dataset.stories["s1"].responses["s"].array)
    bad[4, 5] = np.nan
    stories = {**dataset.stories, "s1": with_rows(dataset.stories["s1"], bad)}
    dataset = replace(dataset, stories=stories)
    expected = plain_profile(dataset, [0, 1, 2, 3, 4, 6, 7, 8])
    profile = profile_of(dataset)
    np.testing.assert_allclose(profile.cc, expected.mean(axis=0), atol=1e-5)
    assert profile.floor == pytest.approx(noise_floor(expected), abs=1e-5)
    assert (profile.subject, profile.tr_s, profile.trim, profile.source) == ("s", 2.0, PUBLISHED, "here")
    monkeypatch.setattr(responses_module, "BLOCK_BYTES", 72 * 13)
    monkeypatch.setattr(inspect_responses, "VOXELS_AT_A_TIME", 4)
    monkeypatch.setattr(alignment, "VOXELS_AT_A_TIME", 3)
    np.testing.assert_allclose(profile_of(dataset).cc, expected.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 800.0])
def test_level_and_scale_of_a_voxel_do_not_matter(offset: float) -> None:
    dataset = listener(3)
    raw = {
        name: with_rows(story, 40 * np.array(story.responses["s"].array) + number * offset)
        for number, (name, story) in enumerate(dataset.stories.items())
    }
    np.testing.assert_allclose(profile_of(replace(dataset, stories=raw)).cc, profile_of(dataset).cc, atol=1e-5)


def test_a_voxel_constant_in_one_fold_is_left_out_there() -> None:
    rng = np.random.default_rng(0)
    xy, xx, yy = rng.standard_normal((3, 21, 4)), np.ones((3, 21)), np.full((3, 4), 9.0)
    yy[1, 2] = xy[1, :, 2] = 0
    cc = held_out_cc(FoldSums(xy, xx, yy), np.ones(4, bool))
    sign = np.sign(xy.sum(axis=0) - xy)
    np.testing.assert_allclose(cc[0], (sign * xy / 3)[0].mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(cc[1], (sign * xy / 3)[1][:, [0, 1, 3]].mean(axis=1), atol=1e-12)


def test_an_incompletely_read_story_does_not_count() -> None:
    dataset = listener(2)
    complete = LagSums(dataset)
    survey(dataset, complete)
    broken = LagSums(dataset)

    def cut_off(block: inspect_responses.Block) -> None:  # s2 is first read halfway, then completely
        if block.story.name == "s2":
            half = block.rows.stop // 2
            broken(block._replace(rows=slice(0, half), values=block.values[:half]))
        broken(block)

    survey(dataset, cut_off)
    np.testing.assert_array_equal(broken.sums["s"].xy, complete.sums["s"].xy)
    np.testing.assert_array_equal(broken.sums["s"].yy, complete.sums["s"].yy)


def test_a_story_with_unusable_text_is_not_used() -> None:
    dataset = listener(2)
    times = dataset.stories["s2"].word_times_s.copy()
    times[5] = np.nan
    bad = replace(dataset, stories={**dataset.stories, "s2": replace(dataset.stories["s2"], word_times_s=times)})
    sums = LagSums(bad)
    (problem,) = survey(bad, sums).problems
    assert problem.startswith("here: story s2 has non-finite word times")
    assert sums.profile("s", np.ones(9, bool)).peak == 2


@pytest.mark.parametrize("lag", [-7, -3, 0, 1, 2, 3, 4, 5, 8])
def test_the_peak_is_at_the_planted_lag(lag: int) -> None:
    profile = profile_of(listener(lag))
    assert profile.is_clear
    assert profile.peak == lag
    assert profile.is_aligned == (lag in (1, 2, 3, 4))
    if lag == 0:
        with pytest.raises(InputError, match="is expected; check how the responses were cut"):
            check_alignment(profile)
    if profile.is_aligned:
        assert [f"best lag is {lag:+d} TR" in note for note in check_alignment(profile)] == [True] * (lag in (1, 4))


@pytest.mark.parametrize("n_stories", [1, 0])
def test_one_story_or_noise_gives_a_note(n_stories: int) -> None:
    dataset = listener(2, n_stories=2)
    short = make_story("short", 1, 80)
    rows = np.random.default_rng(0).standard_normal((len(short.tr_times_s) - 15, 9))
    stories = dict(list(dataset.stories.items())[:n_stories]) | {"short": with_rows(short, rows)}
    profile = profile_of(replace(dataset, stories=stories))
    assert not profile.is_clear
    assert np.isnan(profile.cc).all() and profile.stories == ()
    assert check_alignment(profile) == ["s: too little data to compute the lag: alignment could not be confirmed"]
    (note,) = check_alignment(profile_of(listener(2, noise=1e6)))
    assert note.startswith("s: word rate predicts nothing at any shift: alignment could not be confirmed (best CC ")


def test_noise_floor_equals_the_closed_form() -> None:
    folds = np.tile(np.arange(21.0), (4, 1)) + np.array([[-1.0], [1.0], [-1.0], [1.0]])
    # median 10; median absolute deviation 5; variance over folds 4/3, so the error is sqrt(1/3)
    assert noise_floor(folds) == pytest.approx(10 + 3 * 1.4826 * 5)
    assert noise_floor(10 * (folds - np.arange(21.0))) == pytest.approx(9 * 10 * np.sqrt(1 / 3))
    assert np.isnan(noise_floor(folds[:1]))


@pytest.mark.parametrize("n_voxels", [12, 100])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_noise_has_no_clear_peak(n_voxels: int, keep: float) -> None:
    """With ``keep``, noise is correlated in time and over voxels; at most 1% of such profiles may have a clear peak."""
    n_seeds = 200
    stories = {f"s{at}": make_story(f"s{at}", at) for at in range(5)}
    X = [shifted_word_rate(story, PUBLISHED)[0].astype(float) for story in stories.values()]
    rng = np.random.default_rng((n_voxels, int(10 * keep)))
    xy, yy = np.zeros((5, 21, n_seeds * n_voxels)), np.zeros((5, n_seeds * n_voxels))
    for fold, x in enumerate(X):
        y = rng.standard_normal((len(x), n_seeds, n_voxels)) + keep * rng.standard_normal((len(x), n_seeds, 1))
        for t in range(1, len(y)):
            y[t] += keep * y[t - 1]
        flat = (y - y.mean(axis=0)).reshape(len(x), -1)
        xy[fold], yy[fold] = x.T @ flat, (flat**2).sum(axis=0)
    xx = np.array([(x**2).sum(axis=0) for x in X])
    alarms = 0
    for seed in range(n_seeds):
        own = slice(seed * n_voxels, (seed + 1) * n_voxels)
        cc = held_out_cc(FoldSums(xy[:, :, own], xx, yy[:, own]), np.ones(n_voxels, bool))
        alarms += bool(cc.mean(axis=0).max() > noise_floor(cc))
    assert alarms <= (2 if keep else 0)


@pytest.mark.parametrize("lag", [2, 3])
@pytest.mark.parametrize(
    ("cut", "read_as", "moved", "remedy"), [(PUBLISHED, COURSE, -5, "published"), (COURSE, PUBLISHED, 5, "course")]
)
def test_the_wrong_trim_is_refused_with_the_right_one(
    lag: int, cut: Trim, read_as: Trim, moved: int, remedy: str
) -> None:
    profile = profile_of(replace(listener(lag, cut), trim=read_as))
    with pytest.raises(InputError, match=r"^here: subject s: the best lag is ") as refused:
        check_alignment(profile)
    message = str(refused.value)
    assert f" {lag + moved:+d} TR ({2 * (lag + moved):+d} s), where " in message
    assert f"as if trimmed {tuple(cut)} instead of {tuple(read_as)} TRs" in message
    assert f"try --trim {remedy}, or" in message and "--trust-alignment" in message and "\n" not in message
    (note,) = check_alignment(profile, trust=True)
    assert note.endswith("; ignored because of --trust-alignment")


@pytest.mark.slow
@pytest.mark.data
def test_a_real_listener() -> None:
    profile = profile_of(open_dataset(REAL_DATA), "uts02")
    assert profile.is_aligned
    assert profile.peak in (2, 3)
    assert 0.03 < profile.cc.max() < 0.045
    assert np.abs(profile.cc[np.abs(SHIFTS - profile.peak) > 5]).max() < 0.01


def shift_stories(dataset: Dataset, lags: dict[str, int]) -> Dataset:
    """Return the data set with some stories' responses moved later by ``lags`` TRs."""
    stories = dict(dataset.stories)
    for name, lag in lags.items():
        rows = stories[name].responses["s"].array
        assert rows is not None
        stories[name] = with_rows(stories[name], np.roll(rows, lag, axis=0))
    return replace(dataset, stories=stories)


def twelve_stories() -> Dataset:
    return listener(2, n_stories=12, n_voxels=60, noise=2.0)


def test_a_storys_lag_equals_a_plain_loop() -> None:
    """The other stories' slopes at their best shift weigh the voxels; the weighted sum is correlated shift by shift."""
    dataset = shift_stories(twelve_stories(), {"s3": 5})
    lags = {lag.story: lag for lag in profile_of(dataset).stories}
    parts = {}
    for name, story in dataset.stories.items():
        X, used = shifted_word_rate(story, PUBLISHED)
        rows = story.responses["s"].array
        assert rows is not None
        parts[name] = (X.astype(np.float64), (rows[used] - rows[used].mean(axis=0)))
    for name in ("s0", "s3"):
        others = [parts[other] for other in parts if other != name]
        X, Y = np.vstack([x for x, _ in others]), np.vstack([y for _, y in others])
        slopes = np.array([np.linalg.lstsq(X[:, [s]], Y, rcond=None)[0][0] for s in range(21)])
        power = [(slopes[s] ** 2).sum() * (X[:, s] ** 2).sum() for s in range(21)]
        x, y = parts[name]
        profile = [(x[:, s] @ (y @ slopes[int(np.argmax(power))])) / np.linalg.norm(x[:, s]) for s in range(21)]
        profile -= np.median(profile)
        height = profile / (1.4826 * np.median(np.abs(profile)))
        assert lags[name].peak == SHIFTS[np.argmax(height)]
        assert lags[name].height == pytest.approx(height.max(), rel=1e-4)
        assert lags[name].height_here == pytest.approx(height[10:15].max(), rel=1e-4)  # 0 to +4, near the peak at +2


@pytest.mark.parametrize("lag", [5, -5, 4])
def test_stories_cut_differently_are_named(lag: int) -> None:
    profile = profile_of(shift_stories(twelve_stories(), dict.fromkeys(("s1", "s4", "s9"), lag)))
    assert [(story.story, story.peak) for story in profile.elsewhere] == [(n, 2 + lag) for n in ("s1", "s4", "s9")]
    with pytest.raises(InputError, match=r"3 of 12 stories have another lag than \+2 TR") as refused:
        check_alignment(profile)
    assert f"together: s1 ({2 + lag:+d} TR), s4 ({2 + lag:+d} TR), s9" in str(refused.value)
    assert "another lag" in check_alignment(profile, trust=True)[0]

    profile = profile_of(shift_stories(twelve_stories(), dict.fromkeys(("s0", "s2", "s4", "s6", "s8", "s10"), lag)))
    with pytest.raises(InputError, match="stories have another lag") as refused:
        check_alignment(profile)
    assert "--trim" not in str(refused.value), "half of the stories are shifted"


def test_stories_that_do_not_follow_their_words_are_noted() -> None:
    dataset = twelve_stories()
    rng = np.random.default_rng(5)
    stories = dict(dataset.stories)
    for name in ("s2", "s7"):
        shape = stories[name].responses["s"].check()[0]
        stories[name] = with_rows(stories[name], rng.standard_normal(shape))
    profile = profile_of(replace(dataset, stories=stories))
    assert {story.story for story in profile.lost} <= {"s2", "s7"}
    assert profile.lost
    assert "do not follow their words" in check_alignment(profile)[0]


def test_lags_of_single_stories_are_not_reported_from_few_stories_or_faint_data() -> None:
    assert profile_of(listener(2, n_stories=4)).stories == ()
    faint = listener(2, n_stories=12, n_voxels=6, noise=12.0)
    for lags in ({}, dict.fromkeys(("s1", "s4"), 5)):
        profile = profile_of(shift_stories(faint, lags))
        assert (profile.elsewhere, profile.lost) == ([], [])


@pytest.mark.slow
@pytest.mark.data
def test_shifted_stories_of_a_real_listener_are_found() -> None:
    dataset = open_dataset(REAL_DATA)
    names = sorted(dataset.stories)[::12]
    stories = dict(dataset.stories)
    for name in names:
        rows = stories[name].responses["uts02"].read(np.arange(100))
        stories[name] = with_rows(stories[name], np.roll(rows, 5, axis=0), "uts02")
    profile = profile_of(replace(dataset, stories=stories), "uts02")
    flagged = {story.story for story in profile.elsewhere}
    assert flagged <= set(names)
    assert len(flagged) >= len(names) - 1
    assert profile_of(dataset, "uts02").elsewhere == []
