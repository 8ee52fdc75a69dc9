"""The memory forecast: what it counts, what it refuses, and a real process beside it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import make_lab

from bert_encoding.core import worker_cache
from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import Split, choose_stories, split_stories
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.language_model.encoder import model_shape
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.run import run_trial
from study.session import memory
from study.session.memory import check_memory, free_bytes, worker_bytes
from study.setup.options import Options
from study.setup.resolve import resolve_options
from study.setup.spaces import load_space

BASE_SHAPE = {"n_layers": 12, "n_hidden": 768, "n_intermediate": 3072}
GB = 1e9


def stories(n: int, n_rows: int, n_words: int = 1900) -> tuple[Dataset, tuple[Split, ...]]:
    """Stories without responses; the forecast asks only how long they are."""
    words, word_times, tr_times = ("word",) * n_words, np.linspace(0, 600, n_words), np.arange(n_rows + 15) * 2.0 - 9
    made = {f"s{at:03d}": Story(f"s{at:03d}", words, word_times, tr_times, {}) for at in range(n)}
    return Dataset("made", made, ("a",), ()), split_stories(list(made)[1:], list(made)[:1], 0, 1)


def need(n_stories: int, n_voxels: int, trains: bool = True, **changes: int) -> float:
    return worker_bytes(*stories(n_stories, 340), n_voxels, BASE_SHAPE, replace(TrialConfig(), **changes), trains)


def test_more_stories_and_more_voxels_need_more_up_to_a_panel() -> None:
    sizes = [need(n, 1000) for n in (10, 30, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    widths = [need(100, n) for n in (100, 1000, 4000, 90_000)]
    assert widths == sorted(widths) and widths[0] < widths[2]
    assert need(100, 90_000) == need(100, 200_000), "responses are read by the panel"


def cached_share(monkeypatch: pytest.MonkeyPatch, *given: Any) -> float:
    """Return how much of a forecast is for cached responses."""
    whole = worker_bytes(*given)
    with monkeypatch.context() as patched:
        patched.setattr(worker_cache, "CACHED_BYTES", 0)
        return whole - worker_bytes(*given)


def test_cached_responses_count_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    few = cached_share(monkeypatch, *stories(10, 340), 100, BASE_SHAPE, TrialConfig(), False)
    assert 9 * 340 * 100 * 4 <= few <= 3 * 9 * 340 * 100 * 4
    whole = cached_share(monkeypatch, *stories(100, 340), 95_000, BASE_SHAPE, TrialConfig(), False)
    assert whole == worker_cache.CACHED_BYTES


def test_no_trial_caches_more_than_the_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subjects, splits that rotate, and a baseline that scores the test stories too: all of it is cached."""
    dataset = inspect(open_dataset(make_lab(tmp_path / "lab", subjects=("a", "b"), n_voxels=500)))
    task = Task(dataset, split_stories(*choose_stories(dataset, dataset.subjects, None, None, 0), 0, 3), 0)
    config = TrialConfig(method="word_rate")
    cache = worker_cache.WorkerCache()
    run_trial(config, task, score_test=True, cache=cache)
    forecast = cached_share(monkeypatch, dataset, task.splits, 500, BASE_SHAPE, config, False)
    assert 0 < cache.n_bytes <= forecast


def test_training_counts_where_it_is_the_peak() -> None:
    assert need(10, 100, batch_size=64) > 2 * need(10, 100, batch_size=8)
    assert need(10, 100, trains=False, batch_size=64) == need(10, 100, trains=False, batch_size=8)


def test_a_whole_brain_of_all_stories_is_forecast_in_single_gigabytes() -> None:
    """Responses of 100 stories x 95,000 voxels are 13 GB in float32, and are never held at once."""
    assert 4 * GB < need(100, 95_000) < 12 * GB


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.chdir(tmp_path)
    options = resolve_options({"space": "smoke", "trials": 10}, {}, load_space("smoke"))
    return replace(options, max_concurrent=4)


def test_what_fits_passes(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 25 * GB + memory.DRIVER_BYTES)
    check_memory(lambda n: GB + 1e5 * n, 50_000, options)  # four times 6 GB
    one = replace(options, trials=0)
    monkeypatch.setattr(memory, "free_bytes", lambda: 7 * GB + memory.DRIVER_BYTES)
    check_memory(lambda n: GB + 1e5 * n, 50_000, one)  # a baseline alone


@pytest.mark.parametrize(
    ("free_gb", "n_voxels", "advice"),
    [
        (13, 50_000, "use --max-concurrent 2"),
        (3, 50_000, "use --voxels 10000 --max-concurrent 1"),
        (1.2, 50_000, "use --voxels 1000 --max-concurrent 1"),
        (0.5, 50_000, "use fewer stories (--train-stories)"),
        (0.5, 50, "use fewer stories (--train-stories)"),
    ],
)
def test_too_little_memory_is_refused_with_what_fits(
    free_gb: float, n_voxels: int, advice: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every voxel needs a tenth of a megabyte, every trial a gigabyte."""
    monkeypatch.setattr(memory, "free_bytes", lambda: free_gb * GB + memory.DRIVER_BYTES)
    with pytest.raises(InputError) as error:
        check_memory(lambda n: GB + 1e5 * n, n_voxels, options)
    needed = 4 * (GB + 1e5 * n_voxels) / GB
    message = f"memory: 4 trials at once need {needed:.1f} GB, {free_gb:.1f} GB are free next to the driver; {advice}"
    assert str(error.value).startswith(message)


def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = free_bytes()
    (tmp_path / "own").write_text("0::/slurm/job7/step\n")
    job = tmp_path / "slurm" / "job7"
    (job / "step").mkdir(parents=True)
    limit, used = job / "memory.max", job / "memory.current"
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path)
    limit.write_text("3000000\n")
    used.write_text("1000000\n")
    (job / "memory.stat").write_text("anon 300000\nactive_file 100000\ninactive_file 600000\n")
    assert free_bytes() == 2_700_000, "pages of files can be given back"
    limit.write_text("max\n")
    assert free_bytes() == pytest.approx(machine, rel=0.5)
    limit.unlink()
    assert free_bytes() == pytest.approx(machine, rel=0.5)


PEAK = """
import json, re, sys
from pathlib import Path
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.config import TrialConfig
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories, split_stories
from bert_encoding.trial.run import run_trial

dataset = inspect(open_dataset(Path(sys.argv[1])))
splits = split_stories(*choose_stories(dataset, dataset.subjects, None, None, 0), 0, 1)
run_trial(TrialConfig(method="frozen", model=sys.argv[2]), Task(dataset, splits, 0))
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak of a process")
def test_the_forecast_is_near_the_peak_of_a_real_trial(tmp_path: Path, tiny_bert: Path) -> None:
    folder = make_lab(tmp_path / "lab", n_words=300, n_voxels=20_000)
    command = [sys.executable, "-c", PEAK, str(folder), str(tiny_bert)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])
    dataset = open_dataset(folder)
    splits = split_stories(*choose_stories(dataset, dataset.subjects, None, None, 0), 0, 1)
    forecast = worker_bytes(dataset, splits, 20_000, model_shape(str(tiny_bert)), TrialConfig(method="frozen"), False)
    assert 0.7 * peak < forecast < 2 * peak, f"peak {peak / GB:.2f} GB, forecast {forecast / GB:.2f} GB"
