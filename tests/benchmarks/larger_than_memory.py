"""A whole-brain subject through inspection, frozen features and ridge: peak memory, seconds, and the planted CC.

python tests/benchmarks/larger_than_memory.py --folder /tmp/large [--hdf5] [--seen]

20,000 TRs x 90,000 voxels are 7 GB in float32. A few voxels follow the frozen encoder with a known ceiling, the others
are noise. Writing and scoring run in processes of their own, so that each has its own peak.
"""

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import cyclopts
import h5py
import numpy as np

from bert_encoding.core.names import FROZEN
from bert_encoding.core.zscore import ZScore
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import split_stories
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.demo.stories import TR_S, demo_stories
from bert_encoding.features.downsampling import story_features
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task

N_STORIES, N_DIRECTIONS, SUBJECT = 60, 8, "large"
PLANTED_EVERY = 50  # one voxel in so many, spread over the whole brain
MODEL = "minilm-plain"
MAX_GB = 6 * 2**30 / 1e9

app = cyclopts.App(help=__doc__)


@app.default
def main(
    folder: Path, trs: int = 20_000, voxels: int = 90_000, hdf5: bool = False, seen: bool = False, seed: int = 0
) -> None:
    """Write the subject unless it is there, score it, and say whether memory and CC are as they must be."""
    options = [str(folder), f"--trs={trs}", f"--voxels={voxels}", f"--seed={seed}"] + ["--hdf5"] * hdf5
    for step in (["write", *options], ["score", *options, *["--seen"] * seen]):
        code = subprocess.run([sys.executable, __file__, *step]).returncode
        if code:
            sys.exit(code)


@app.command
def write(folder: Path, *, trs: int, voxels: int, seed: int, hdf5: bool = False) -> None:
    """Write responses story by story: frozen features x weights for planted voxels, noise for all."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset, began = make_dataset(folder, trs, seed, hdf5), time.perf_counter()
    config = TrialConfig(method=FROZEN, model=MODEL)
    ceiling = planted_ceiling(voxels, seed)
    rng = np.random.default_rng((seed, 1))
    weights = rng.standard_normal((N_DIRECTIONS, int((ceiling > 0).sum()))).astype(np.float32)
    signals = planted_signals(dataset, config)
    for at, (name, story) in enumerate(dataset.stories.items()):
        path = story.responses[SUBJECT].path
        assert path is not None
        if path.exists():
            continue
        drive = signals[name] @ weights / np.sqrt(N_DIRECTIONS)
        rows = np.random.default_rng((seed, 2, at)).standard_normal((len(drive), voxels), dtype=np.float32)
        planted = ceiling > 0
        rows[:, planted] = ceiling[planted] * drive + np.sqrt(1 - ceiling[planted] ** 2) * rows[:, planted]
        if hdf5:
            with h5py.File(path, "w") as file:
                file["data"] = rows
        else:
            np.save(path, rows)
    print(f"written   {report(began)}")


@app.command
def score(folder: Path, *, trs: int, voxels: int, seed: int, hdf5: bool = False, seen: bool = False) -> None:
    """Score the frozen encoder on validation stories; with ``--seen`` also by cross-validation inside the fit ones."""
    began = time.perf_counter()
    dataset = inspect(make_dataset(folder, trs, seed, hdf5))
    n_bytes = sum(np.prod(story.responses[SUBJECT].check()[0]) * 4 for story in dataset.stories.values())
    seconds = time.perf_counter() - began
    print(f"inspected {report(began)}, {n_bytes / 1e9:.2f} GB at {n_bytes / 1e9 / seconds:.2f} GB/s")
    split = split_stories(list(dataset.stories)[1:], list(dataset.stories)[:1], seed, 1)[0]
    chain = Chain(TrialConfig(method=FROZEN, model=MODEL), Task(dataset, (split,), seed))
    assert chain.encoder is not None
    began = time.perf_counter()
    downsampled = chain.downsampled(chain.encoder.copy_model().bert, split.fit + split.validation, split.fit)
    print(f"embedded  {report(began)}")
    began = time.perf_counter()
    cc = chain.score(downsampled, split.fit, split.validation)[SUBJECT].cc
    print(f"scored    {report(began)}")
    judge("validation", cc, planted_ceiling(voxels, seed))
    if seen:
        began = time.perf_counter()
        cc = chain.score_seen(downsampled, split.fit)[SUBJECT]
        print(f"seen      {report(began)}")
        judge("inside fit", cc, planted_ceiling(voxels, seed))
    if peak_gb() > MAX_GB:
        sys.exit(f"peak memory {peak_gb():.2f} GB is above {MAX_GB:.2f} GB (6 GiB)")


def make_dataset(folder: Path, n_rows: int, seed: int, hdf5: bool) -> Dataset:
    """Return stories made of the demo's sentences in random order, ``n_rows`` rows of responses in all."""
    sentences = [s for story in demo_stories().stories.values() for s in np.array_split(np.array(story.words), 40)]
    stories = {}
    sizes = [len(part) for part in np.array_split(np.arange(n_rows), N_STORIES)]
    for at, size in enumerate(sizes):
        rng = np.random.default_rng((seed, 3, at))
        tr_times_s = np.arange(size + 15) * TR_S - 9
        n_words = int(tr_times_s[-1] * 2.5)
        order = rng.permutation(len(sentences))
        words = np.concatenate([sentences[i] for i in np.resize(order, len(order) * 3)])[:n_words]
        times_s = np.sort(rng.uniform(0.2, tr_times_s[-1] - 0.2, len(words)))
        path = folder / f"story{at:02d}.{'hf5' if hdf5 else 'npy'}"
        responses = Responses(path, key="data" if hdf5 else None)
        stories[path.stem] = Story(path.stem, tuple(map(str, words)), times_s, tr_times_s, {SUBJECT: responses})
    return Dataset(str(folder), stories, (SUBJECT,), ())


def planted_ceiling(n_voxels: int, seed: int) -> np.ndarray:
    """Return the CC of a perfect prediction, (n_voxels,) float32; 0 for noise voxels."""
    ceiling = np.zeros(n_voxels, np.float32)
    planted = slice(None, None, PLANTED_EVERY)
    ceiling[planted] = np.random.default_rng((seed, 0)).uniform(0.3, 0.7, ceiling[planted].size)
    return ceiling


def planted_signals(dataset: Dataset, config: TrialConfig) -> dict[str, np.ndarray]:
    """Return the strongest directions of the frozen features, story -> (n_rows, N_DIRECTIONS), unit variance."""
    chain = Chain(config, Task(dataset, (), 0))
    assert chain.encoder is not None
    vectors = chain.vectors(chain.encoder.copy_model().bert, tuple(dataset.stories), ())
    X = {n: story_features(vectors[n], story, config.delays, dataset.trim) for n, story in dataset.stories.items()}
    scale = ZScore.learn(np.vstack(list(X.values())))
    gram = sum(scale.apply(x).T @ scale.apply(x) for x in X.values())
    directions = np.linalg.eigh(gram)[1][:, -N_DIRECTIONS:]
    projected = {name: scale.apply(x) @ directions for name, x in X.items()}
    final = ZScore.learn(np.vstack(list(projected.values())))
    return {name: final.apply(x) for name, x in projected.items()}


def judge(what: str, cc: np.ndarray, ceiling: np.ndarray) -> None:
    planted = ceiling > 0
    share = (cc[planted] / ceiling[planted]).mean()
    noise = cc[~planted].mean()
    print(f"{what}: planted voxels reach {share:.3f} of their ceiling, noise voxels {noise:+.5f}")
    if not (share > 0.9 and abs(noise) < 0.002):
        sys.exit(f"{what}: the planted CC was not recovered")


def report(began: float) -> str:
    return f"{time.perf_counter() - began:7.1f} s, peak {peak_gb():.2f} GB resident"


def peak_gb() -> float:
    """Return the largest resident set of this process so far, mapped pages of files included."""
    status = Path("/proc/self/status")
    if status.exists():
        result = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert result is not None
        return int(result[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


if __name__ == "__main__":
    app()
