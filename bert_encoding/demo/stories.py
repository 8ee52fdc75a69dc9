"""The bundled demo: sixteen stories and a simulated listener whose truth is known.

The listener has three kinds of voxels. *Language* voxels follow the word vectors of the ``minilm`` encoder, without
word rate and drift, in a few directions and with a haemodynamic delay; *rate* voxels follow word rate; *silent* voxels
follow nothing. In ``demo`` language voxels follow the last layer of the frozen encoder, so that fine-tuning can at best
match it. For the other demos see ``simulated_listeners``; everything else, including the noise, is the same.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_encoding.core.names import DEMO
from bert_encoding.core.seeds import generator
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.story import TRIMS, Dataset, Story
from bert_encoding.demo.simulated_listeners import Followed, hidden_weights, what_is_followed
from bert_encoding.features.downsampling import delay, downsample_story
from bert_encoding.features.word_rate import word_rate

SUBJECT = "listener"
TEST = ("ferry", "telescope")
TR_S = 2.0
N_LANGUAGE, N_RATE, N_SILENT = 160, 40, 100
N_VOXELS = N_LANGUAGE + N_RATE + N_SILENT
N_DIRECTIONS = 8  # of the word vectors that language voxels follow
N_DRIFT = 8  # cosines over a story that count as drift: periods down to about 45 s
HAEMODYNAMICS = np.array([0.3, 1.0, 0.9, 0.4])  # weights at delays of 1 to 4 TRs
N_REPEATS_TEST = 5  # test stories are averages over these scans, which are available too
SEED = 2026
_VERSION = 1  # raise it whenever the simulation changes
_STORIES = Path(__file__).parent / "data" / "stories"


class Truth(NamedTuple):
    """The true properties of the simulated voxels, (n_voxels,) each."""

    kind: np.ndarray  # "language", "rate" or "silent"
    ceiling: np.ndarray  # CC of a perfect prediction for stories heard once
    ceiling_test: np.ndarray  # the same for test stories


def demo_stories(name: str = DEMO) -> Dataset:
    """Return the bundled stories of a demo, one of ``DEMOS``, without responses; needs no model."""
    stories = {path.stem: _story(path) for path in sorted(_STORIES.glob("*.txt"))}
    return Dataset(source=name, stories=stories, subjects=(SUBJECT,), published_test=TEST)


def simulate_listener(dataset: Dataset) -> tuple[Dataset, Truth]:
    """Return the bundled stories with the responses of the demo's listener, inspected, and the truth.

    The fingerprint depends on the text and the simulation, not on the last bits of a forward pass, so that it is the
    same on every machine.
    """
    truth = _truth()
    stories = {name: _with_responses(dataset, name, signal, truth) for name, signal in _signals(dataset).items()}
    heard = inspect(replace(dataset, stories=stories))
    return replace(heard, fingerprint=_fingerprint(dataset)), truth


def _with_responses(dataset: Dataset, name: str, signal: np.ndarray, truth: Truth) -> Story:
    """Return a story with z-scored responses to a signal without noise, (n_trs, n_voxels); a test story also has
    repeats, on the scale of their mean."""
    ceiling = truth.ceiling_test if name in TEST else truth.ceiling
    noise = _noise(signal.shape, "noise", name)
    rows = dataset.trim.rows(len(signal))
    responses = (ceiling * signal + np.sqrt(1 - ceiling**2) * noise)[rows]
    scale = ZScore.learn(responses)
    story = replace(dataset.stories[name], responses={SUBJECT: Responses(array=scale.apply(responses))})
    if name not in TEST:
        return story
    repeats = [scale.apply((ceiling * signal + np.sqrt(1 - ceiling**2) * n)[rows]) for n in _repeat_noise(noise, name)]
    return replace(story, repeats={SUBJECT: Responses(array=np.stack(repeats))})


def _repeat_noise(noise: np.ndarray, story: str) -> np.ndarray:
    """Return the noise of each repeat, (n_repeats, n_trs, n_voxels), given that of their mean, (n_trs, n_voxels).

    Independent Gaussian noise e_1 .. e_N of variance N, conditioned on its mean m, is m + e_i - mean(e): the mean is
    ``noise`` itself, and each repeat has N times its variance.
    """
    drawn = [_noise(noise.shape, "repeat", story, repeat) for repeat in range(N_REPEATS_TEST)]
    independent = np.sqrt(N_REPEATS_TEST) * np.stack(drawn)
    return noise + independent - independent.mean(axis=0)


def _truth() -> Truth:
    kind = np.repeat(["language", "rate", "silent"], [N_LANGUAGE, N_RATE, N_SILENT])
    ceiling = generator(SEED, "ceiling").uniform(0.3, 0.7, kind.size)
    ceiling[kind == "silent"] = 0
    share = ceiling**2
    return Truth(kind, ceiling, np.sqrt(share / (share + (1 - share) / N_REPEATS_TEST)))


def _signals(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return what each voxel would respond without noise, story -> (n_trs, n_voxels); unit variance over the rows that
    responses keep."""
    rate = {n: downsample_story(word_rate(s.spoken), s) for n, s in dataset.stories.items()}
    kept = {n: dataset.trim.rows(len(rate[n])) for n in rate}
    rng = generator(SEED, "weights")
    language = _language(dataset, rate, kept, rng.standard_normal((N_DIRECTIONS, N_LANGUAGE)))
    hrf = HAEMODYNAMICS[:, None] * rng.uniform(0.7, 1.3, (len(HAEMODYNAMICS), N_LANGUAGE + N_RATE))
    signals = {}
    for name in rate:
        drive = np.hstack([language[name], np.repeat(rate[name], N_RATE, axis=1)])  # (n_trs, n_driven)
        delayed = delay(drive, range(1, len(hrf) + 1)).reshape(len(drive), *hrf.shape)  # (n_trs, n_delays, n_driven)
        signals[name] = np.einsum("tdv,dv->tv", delayed, hrf)
    scale = ZScore.learn(np.vstack([signals[n][kept[n]] for n in signals]))
    return {n: np.hstack([scale.apply(s), np.zeros((len(s), N_SILENT))]) for n, s in signals.items()}


def _language(
    dataset: Dataset, rate: dict[str, np.ndarray], kept: dict[str, slice], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return what drives language voxels before any delay, story -> (n_trs, n_language); ``weights``, (n_directions,
    n_language), say how much each voxel follows each direction."""
    parts, start = [], 0
    for followed in what_is_followed(dataset, N_LANGUAGE):
        directions = _directions(_downsampled(dataset, followed, rate, kept), rate, kept)
        parts.append({n: directions[n] @ weights[:, start : start + followed.n_voxels] for n in directions})
        start += followed.n_voxels
    return {n: np.hstack([part[n] for part in parts]) for n in rate}


def _downsampled(
    dataset: Dataset, followed: Followed, rate: dict[str, np.ndarray], kept: dict[str, slice]
) -> dict[str, np.ndarray]:
    """Return the followed vectors, downsampled, story -> (n_trs, n_hidden); with ``differs_from`` their coordinates in
    the strongest directions of the difference, (n_trs, n_directions)."""
    X = {n: downsample_story(vectors, dataset.stories[n]) for n, vectors in followed.vectors.items()}
    if followed.differs_from is None:
        return X
    change = {n: X[n] - downsample_story(vectors, dataset.stories[n]) for n, vectors in followed.differs_from.items()}
    axes = _strongest(change, _known(rate), kept)[2]
    return {n: X[n] @ axes.T for n in X}


def _directions(X: dict[str, np.ndarray], rate: dict[str, np.ndarray], kept: dict[str, slice]) -> dict[str, np.ndarray]:
    """Return the strongest directions of the downsampled vectors, story -> (n_trs, n_directions), learned on the rows
    that responses cover, with unit mean square there.

    Word rate and slow drift are removed first. BERT's vectors drift with the position in the window, independent of the
    words; a listener who followed that would be predicted by any text.
    """
    known = _known(rate)
    slopes, scale, axes = _strongest(X, known, kept)
    n_rows = sum(len(X[n][kept[n]]) for n in X)
    project = axes.T * (np.sqrt(n_rows) / scale)
    return {n: (X[n] - known[n] @ slopes) @ project for n in X}


def _strongest(
    X: dict[str, np.ndarray], known: dict[str, np.ndarray], kept: dict[str, slice]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the slopes of vectors on the known regressors, (n_known, n_hidden), and of the residuals the largest
    singular values, (n_directions,), with their directions, (n_directions, n_hidden)."""
    fit_known, fit_X = (np.vstack([values[n][kept[n]] for n in X]) for values in (known, X))
    slopes = np.linalg.lstsq(fit_known, fit_X, rcond=None)[0]
    _, scale, directions = np.linalg.svd(fit_X - fit_known @ slopes, full_matrices=False)
    return slopes, scale[:N_DIRECTIONS], directions[:N_DIRECTIONS]


def _known(rate: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a constant, and word rate times a constant and slow cosines over the story, story -> (n_trs, n_known)."""
    known = {}
    for n, r in rate.items():
        position = (np.arange(len(r)) + 0.5) / len(r)
        known[n] = np.hstack([np.ones_like(r), r * np.cos(np.pi * np.outer(position, np.arange(1 + N_DRIFT)))])
    return known


def _noise(shape: tuple[int, ...], *names: str | int) -> np.ndarray:
    """Return unit-variance noise that is as smooth as real responses: an autoregressive process of order 1."""
    coefficient = 1 / 3
    white = generator(SEED, *names).standard_normal(shape)
    noise = white.copy()
    for t in range(1, len(noise)):
        noise[t] = coefficient * noise[t - 1] + np.sqrt(1 - coefficient**2) * white[t]
    return noise


def _story(path: Path) -> Story:
    """Read a story with simulated word times: long words take longer, sentences end in a pause."""
    rng = generator(SEED, "reading", path.stem)
    words, times, now = [], [], 0.2
    for written in path.read_text().lower().split():
        word = re.sub(r"^[^a-z]+|[^a-z]+$", "", written)
        if not word:
            continue
        duration = (0.10 + 0.045 * len(word)) * rng.uniform(0.8, 1.25)
        words.append(word)
        times.append(now + duration / 2)
        pause = 0.6 if re.search(r"[.?!]", written) else 0.2 if written[-1] in ",;:" else 0.0
        now += duration + pause * rng.uniform(0.5, 1.5)
    n_trs = int(np.ceil((now + 9) / TR_S)) + TRIMS["published"].end_trs + 1
    return Story(path.stem, tuple(words), np.array(times), np.arange(n_trs) * TR_S - 9, {})


def _fingerprint(dataset: Dataset) -> str:
    text = "".join(" ".join((name, *story.words)) for name, story in dataset.stories.items())
    content = hashlib.sha256(text.encode() + hidden_weights(dataset.source)).hexdigest()
    return f"{dataset.source}-{_VERSION}-{content[:8]}"
