"""What is forecast, against sums written out."""

import io
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bert_encoding.core.files import write_json
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records, write_record
from study import run
from study.session import forecast as forecast_module
from study.session import plan, probe
from study.session.confirm import validation_jobs
from study.session.forecast import Estimate, count_work, estimate, measured_rates
from study.session.plan import Done, done_so_far, print_plan, total_seconds
from study.session.probe import Rates, Work

SECONDS = Estimate(100.0, 10.0, 6.0, 50.0, 20.0, 4.0, 1e9, 1e9, source="x")


def options(**changes: Any) -> Any:
    given: dict[str, Any] = {
        **{"trials": 8, "confirm": 3, "confirm_seeds": 2, "baselines": [], "max_concurrent": 1, "voxels": "all"},
        **{"epochs": 2, "model": "m", "gpus_per_trial": 0.0, "keep_adapters": 5, "name": "s", "folder": "out/s"},
        **{"layer": None, "mlm_text": "fit", "sampler": "tpe", "scheduler": "none", "cpus_per_trial": 1.0},
        **{"delta": 0.003},
    }
    return SimpleNamespace(**given | changes)


def study_of(dataset: Dataset, n_voxels: int = 4, splits: tuple[Split, ...] = (), **changes: Any) -> Any:
    """Return a study on the four stories of ``dataset``."""
    base, space = changes.pop("base", BASE), SimpleNamespace(question="Does it?", name="x")
    about = {"dataset": dataset, "splits": splits or (SPLIT,), "n_voxels": {"s": n_voxels}, "base": base}
    return SimpleNamespace(options=options(**changes), space=space, **about)


def printed_plan(study: Any, done: Done, confirms: bool) -> str:
    out = io.StringIO()
    print_plan(Console(file=out, width=400), study, SECONDS, done, confirms)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "done", "confirms", "expected"),
    [
        ({}, Done(), True, 10 + 2 * 6 + 8 * 100 + 3 * 2 * 100 + 3 * 50 + 20 + 4),
        ({}, Done(), False, 10 + 2 * 6 + 8 * 100),
        ({}, Done(5), True, 3 * 100 + 3 * 2 * 100 + 3 * 50 + 20 + 4),
        ({}, Done(8), False, 0),
        ({"trials": 2}, Done(), True, 10 + 2 * 6 + 2 * 100 + 2 * 2 * 100 + 2 * 50 + 20 + 4),  # at most 2 finalists
        ({"baselines": ["random", "static"]}, Done(), True, 10 + 4 * 6 + 800 + 600 + 150 + 20 + 3 * 4),
        ({"voxels": "500"}, Done(), False, 2 * 10 + 2 * 6 + 800),
        ({"max_concurrent": 4}, Done(), True, 10 + 2 * 6 / 2 + (800 + 600 + 150 + 20 + 4) / 4),
        ({"trials": 0, "confirm": 0}, Done(), False, 10 + 2 * 6 + 20 + 4),  # baselines with their test scores
        ({}, Done(8, 4), True, 2 * 100 + 3 * 50 + 20 + 4),
        ({}, Done(8, 6), True, 3 * 50 + 20 + 4),
        ({}, Done(8, 6, 0, 1), True, 3 * 50 + 4),  # the frozen encoder comes first
        ({}, Done(8, 6, 2, 2), True, 50),
        ({}, Done(8, 6, 3, 2), True, 0),
    ],
)
def test_total_is_the_sum_of_the_jobs_that_are_not_done(
    changes: dict[str, Any], done: Done, confirms: bool, expected: float
) -> None:
    assert total_seconds(SECONDS, options(**changes), done, confirms) == pytest.approx(expected, rel=1e-12)


def test_what_is_done_is_counted_by_phase(tmp_path: Path) -> None:
    """Four searched trials, of which the best two are confirmed with three seeds."""
    given = options(folder=tmp_path, trials=4, confirm=2, confirm_seeds=3, seed=0)
    assert done_so_far(given, 1) == Done()

    def leave(name: str, phase: str, config: Any, value: float = 0.1) -> None:
        scores = {"cc_mean": value}
        write_record(tmp_path, TrialRecord("COMPLETE", config["method"], config, name, phase, scores=scores))

    base = asdict(TrialConfig(model="m", method="lora"))
    for method in ("frozen", "word_rate"):
        leave(f"baseline-{method}", "baseline", base | {"method": method})
    for at in range(4):
        leave(f"{at:04d}", "search", base | {"lr": 1e-4 * (at + 1)}, value=0.1 * at)
    assert done_so_far(given, 1) == Done(4)
    jobs = validation_jobs(given, read_records(tmp_path), 1, lambda config: "k")
    for job in jobs[:5]:
        leave(job.trial_id, "confirm", job.config)
    assert len(jobs) == 6 and done_so_far(given, 1) == Done(4, 5)
    assert done_so_far(given, None) == Done(4)
    finalists = [{"trial_id": "0003", "cc_confirmed": 0.3}, {"trial_id": "0002", "cc_confirmed": None}]
    fixed = {"at": "now", "data": "d", "test_stories": ["d"], "n_searched": 4, "asked": 2, "seeds": [1, 2, 3]}
    write_json(tmp_path / "confirm.json", fixed | {"look": 1, "finalists": finalists, "winner": "0003", "looks": []})
    leave("test-baseline-frozen", "confirm", base)
    assert done_so_far(given, 1) == Done(4, 6, 1, 1), "the finalist that dropped out is done with"
    leave("test-0003", "confirm", base)
    assert done_so_far(given, 1) == Done(4, 6, 2, 1)


@pytest.fixture
def dataset() -> Dataset:
    """Four stories of 10 to 40 words, and of 100 to 400 TRs beside the 15 that are cut."""

    def story(name: str, n: int) -> Story:
        heard = {"s": Responses(array=np.zeros((n * 10, 4), np.float32))}
        return Story(name, ("word",) * n, np.arange(float(n)), np.arange(n * 10 + 15) * 2.0, heard)

    stories = {name: story(name, n) for name, n in zip("abcd", (10, 20, 30, 40), strict=True)}
    return Dataset("here", stories, ("s",), ("d",), voxel_masks={"s": np.ones(4, bool)}, fingerprint="f")


@pytest.fixture
def unit_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation per second, and one per weight and token, so that everything can be counted; no ridge."""
    monkeypatch.setattr(forecast_module, "model_shape", lambda name: SHAPE)
    monkeypatch.setattr(
        forecast_module, "probe_rates", lambda *arguments: Rates(Work(1, 1, 1, 1, 1), 0.5, 2.0, "from a probe")
    )
    monkeypatch.setattr(forecast_module, "train_flops", lambda shape, mask_probability: 4.0)
    monkeypatch.setattr(forecast_module, "embed_flops", lambda shape: 2.0)
    monkeypatch.setattr(forecast_module, "worker_bytes", lambda *arguments: 7.0)
    monkeypatch.setattr(forecast_module, "_ridge_flops", lambda *arguments: (0.0, 0.0))


SHAPE = {"n_layers": 1, "n_hidden": 2, "n_intermediate": 4}
SPLIT = Split(("a", "b"), ("c",), ("d",))
BASE = TrialConfig(model="m", window_tokens=102, stride=50, embed_window_tokens=202, embed_stride=100)


@pytest.mark.usefixtures("unit_rates")
def test_training_vectors_and_tests_are_forecast(dataset: Dataset) -> None:
    forecast = estimate(study_of(dataset, epochs=3))
    train, embed = 1.2 * 2, 1.2 * 2  # tokens per word: each is read in two windows
    expected = {
        "trial_seconds": 3 * (4 * train * 30 + 2 * embed * 60),
        "baseline_seconds": 2 * embed * 60,
        "tests_seconds": 4 * 300,
        "final_seconds": 3 * 4 * train * 60 + 2 * embed * 100 + 4 * 400,
        "final_baseline_seconds": 2 * embed * 100 + 4 * 400,
        "final_tests_seconds": 4 * 400,
    }
    assert {name: getattr(forecast, name) for name in expected} == pytest.approx(expected, rel=1e-12)
    assert (forecast.low, forecast.high, forecast.source) == (0.5, 2.0, "from a probe")
    rarely = estimate(study_of(dataset, base=replace(BASE, score_every=2), epochs=3))
    assert rarely.trial_seconds == pytest.approx(3 * 4 * train * 30 + 2 * 2 * embed * 60)  # after epochs 2 and 3
    rotated = (SPLIT, Split(("a", "c"), ("b",), ("d",)))
    assert estimate(study_of(dataset, splits=rotated, epochs=3)).tests_seconds == 4 * (300 + 200)


def test_finished_trials_replace_the_probe(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of 80, 100 and 120 s: the next takes 100 s, a final one as much more as it has more to compute."""
    monkeypatch.setattr(forecast_module, "model_shape", lambda name: SHAPE)
    monkeypatch.setattr(forecast_module, "probe_rates", lambda *arguments: pytest.fail("finished trials tell"))

    def record(name: str, phase: str, method: str, seconds: dict[str, float]) -> TrialRecord:
        return TrialRecord("COMPLETE", method, {}, name, phase, seconds=seconds)

    records = [
        record(f"{n}", "search", "lora", {"train": 0.6 * n, "embed": 0.1 * n, "ridge": 0.2 * n, "total": n})
        for n in (80, 100, 120)
    ]
    records.append(record("w", "baseline", "word_rate", {"train": 0.0, "embed": 0.0, "ridge": 6.0, "total": 6.1}))
    forecast = estimate(study_of(dataset, epochs=3), records)
    assert forecast.trial_seconds == pytest.approx(100)
    assert forecast.tests_seconds == pytest.approx(6)
    assert forecast.final_tests_seconds == pytest.approx(6 * 400 / 300)
    work = count_work(dataset, (SPLIT,), 4, SHAPE, BASE, 3)
    ridge = (work.final.decompose + work.final.products) / (work.trial.decompose + work.trial.products)
    expected = (60 * 60 / 30 + 10 * 100 / (3 * 60) + 20 * ridge) / 0.9 + 6 * 400 / 300  # words read
    assert forecast.final_seconds == pytest.approx(expected)
    assert (forecast.low, forecast.high) == pytest.approx((0.9, 1.1))
    assert forecast.source == "from the seconds of 3 finished trials"
    assert measured_rates(records[3:], work) is None, "no trial has finished"


def test_without_the_gpu_of_the_trials_the_time_is_unknown(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "model_shape", lambda name: SHAPE)
    monkeypatch.setattr(probe, "machine_gpus", lambda: 0)
    forecast = estimate(study_of(dataset, gpus_per_trial=1.0))
    assert plan._range(forecast.trial_seconds, forecast) == "an unknown time"
    assert "this machine does not have the GPU" in forecast.source


def test_probe_measures_every_stage_and_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    base = TrialConfig(model="m", window_tokens=34, stride=32, embed_window_tokens=34, embed_stride=32)
    here = SimpleNamespace(is_local=False)
    rates = probe.probe_rates({"n_layers": 1, "n_hidden": 16, "n_intermediate": 16}, base, options(machines=here))
    assert rates is not None
    assert all(0 < seconds < 1e-3 for seconds in rates.seconds)
    assert rates.low < 1 < rates.high
    assert re.fullmatch(r"from a probe of [\d.]+ s on this machine, the cluster's others may differ", rates.source)
    assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_probe_counts_processor_time_on_a_cpu() -> None:
    """Waiting, for instance while other programs run, is not counted."""
    assert probe._seconds(lambda: time.sleep(0.2), torch.device("cpu")) < 0.1


@pytest.mark.parametrize(
    ("seconds", "low", "high", "text"),
    [
        (100, 0.7, 2, "70 s to 3 min"),
        (600, 0.7, 2, "7 to 20 min"),
        (600, 1, 1, "about 10 min"),
        (7200, 0.7, 2, "84 min to 4.0 h"),
        (20_000, 0.7, 2, "3.9 to 11.1 h"),
    ],
)
def test_range_names_a_unit_once(seconds: float, low: float, high: float, text: str) -> None:
    assert plan._range(seconds, SECONDS._replace(low=low, high=high)) == text


@pytest.mark.parametrize("confirms", [True, False])
def test_only_a_confirm_phase_that_is_still_to_come_is_announced(confirms: bool, dataset: Dataset) -> None:
    text = printed_plan(study_of(dataset, baselines=["random"], max_concurrent=2, epochs=1), Done(), confirms)
    announced = (
        "the best 3, with 2 fresh seeds each; then these and 3 baselines once on the test stories: 12 more trials"
    )
    assert (announced in text) == confirms
    seconds = 10 + 3 * 6 / 2 + (800 + (600 + 150 + 20 + 2 * 4) * confirms) / 2
    assert f"about 2 min and 1.0 GB per trial, about {seconds / 60:.0f} min in all (x)" in text


def test_plan_uses_singular_nouns_and_prints_what_is_done(dataset: Dataset) -> None:
    text = printed_plan(study_of(dataset, n_voxels=1, epochs=1, confirm_seeds=1), Done(8, 2, 0, 0), True)
    lines = [line.rstrip() for line in text.splitlines()]
    for line in (
        "data        here: s 1 voxel",
        "fit         2 stories, 30 words, 300 TRs: a, b",
        "validation  1 story, 30 words, 300 TRs: c",
        "trials      2 baselines, 8 searched, 8 of them done; 1 epoch each",
        "delta       0.003 CC: an effect within it does not matter",
        "confirm     the best 3, with 1 fresh seed each; then these and 2 baselines once on the test stories: 8 more "
        "trials, 2 of them done",
    ):
        assert line in lines


def test_a_log_file_has_neither_trailing_spaces_nor_a_bar(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    console = run._console()
    print_plan(console, study_of(dataset), SECONDS, Done(), False)
    console.print("a  b  ", end="")
    console.print("c")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study       s -> out/s" and lines[-1] == "a  b  c"
    assert [line for line in lines if line != line.rstrip() or not line] == []


@pytest.mark.parametrize(
    ("is_kept", "text"),
    [(False, "interrupted before any trial had ended; nothing was kept\n"), (True, "interrupted\n")],
)
def test_an_interruption_is_said_once(
    is_kept: bool, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    if is_kept:
        (tmp_path / "study.json").write_text("{}")
    given = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(run, "run_session", interrupt)
    study: Any = SimpleNamespace(options=given)
    assert run._run(study, run.ResumePolicy(), run._console()) is is_kept
    assert capsys.readouterr().out == text
