"""What is forecast, against sums written out."""

import io
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bert_encoding.core.files import write_json
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split
from bert_encoding.datasets.story import Dataset, Story
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records, write_record
from study import run
from study.session import plan
from study.session.confirm import validation_jobs
from study.session.plan import Done, Estimate, done_so_far, estimate, print_plan, total_seconds

SECONDS = Estimate(100.0, 10.0, 6.0, 50.0, 20.0, 4.0, 1e9, 1e9)


def options(**changes: Any) -> Any:
    given: dict[str, Any] = {
        **{"trials": 8, "confirm": 3, "confirm_seeds": 2, "baselines": [], "max_concurrent": 1, "voxels": "all"},
        **{"epochs": 2, "model": "m", "gpus_per_trial": 0.0, "keep_adapters": 5, "name": "s", "folder": "out/s"},
        **{"layer": None, "mlm_text": "fit", "sampler": "tpe", "scheduler": "none", "cpus_per_trial": 1.0},
        **{"delta": 0.003},
    }
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "n_done", "confirms", "expected"),
    [
        ({}, 0, True, 10 + 2 * 6 + 8 * 100 + 3 * 2 * 100 + 3 * 50 + 20 + 4),
        ({}, 0, False, 10 + 2 * 6 + 8 * 100),
        ({}, 5, True, 3 * 100 + 3 * 2 * 100 + 3 * 50 + 20 + 4),
        ({}, 8, False, 0),
        ({"trials": 2}, 0, True, 10 + 2 * 6 + 2 * 100 + 2 * 2 * 100 + 2 * 50 + 20 + 4),  # no more finalists than trials
        ({"baselines": ["random", "static"]}, 0, True, 10 + 4 * 6 + 800 + 600 + 150 + 20 + 3 * 4),
        ({"voxels": "500"}, 0, False, 2 * 10 + 2 * 6 + 800),
        ({"max_concurrent": 4}, 0, True, 10 + 2 * 6 / 2 + (800 + 600 + 150 + 20 + 4) / 4),
        ({"trials": 0, "confirm": 0}, 0, False, 10 + 2 * 6 + 20 + 4),  # baselines with their test scores
    ],
)
def test_the_whole_is_the_sum_of_all_jobs(
    changes: dict[str, Any], n_done: int, confirms: bool, expected: float
) -> None:
    assert total_seconds(SECONDS, options(**changes), Done(n_done), confirms) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (Done(8, 4), 2 * 100 + 3 * 50 + 20 + 4),
        (Done(8, 6), 3 * 50 + 20 + 4),
        (Done(8, 6, 0, 1), 3 * 50 + 4),  # the frozen encoder comes first
        (Done(8, 6, 2, 2), 50),
        (Done(8, 6, 3, 2), 0),
    ],
)
def test_what_the_confirm_phase_has_behind_it_is_not_forecast(done: Done, expected: float) -> None:
    assert total_seconds(SECONDS, options(), done, True) == pytest.approx(expected, rel=1e-12)


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


def test_tests_and_final_scores_are_forecast(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """One floating-point operation a second, one weight and one second a test, so that everything can be counted."""
    monkeypatch.setattr(plan, "model_shape", lambda name: {"n_layers": 1, "n_hidden": 0.5, "n_intermediate": 0})
    monkeypatch.setattr(plan, "_flops_a_second", lambda options: 1.0)
    monkeypatch.setattr(plan, "TESTS_S", 1.0)
    monkeypatch.setattr(plan, "worker_bytes", lambda *given: 7.0)
    monkeypatch.setattr(plan, "_ridge_flops", lambda n_fit, *given: 0.0)
    split = Split(("a", "b"), ("c",), ("d",))
    base = TrialConfig(model="m", window_tokens=102, stride=50, embed_window_tokens=202, embed_stride=100)
    found = estimate(dataset, (split,), {"s": 4}, base, options(epochs=3))
    train, embed = 1.2 * 2, 1.2 * 2  # tokens a word: every one is read in two windows
    expected = {
        "trial_seconds": 3 * (4 * train * 30 + 2 * embed * 60),
        "baseline_seconds": 2 * embed * 60,
        "tests_seconds": 4 * 300,
        "final_seconds": 3 * 4 * train * 60 + 2 * embed * 100 + 4 * 400,
        "final_baseline_seconds": 2 * embed * 100 + 4 * 400,
        "final_tests_seconds": 4 * 400,
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-12)
    rarely = estimate(dataset, (split,), {"s": 4}, replace(base, score_every=2), options(epochs=3))
    assert rarely.trial_seconds == pytest.approx(3 * 4 * train * 30 + 2 * 2 * embed * 60)  # after epochs 2 and 3
    rotated = replace(base), (split, Split(("a", "c"), ("b",), ("d",)))
    assert estimate(dataset, rotated[1], {"s": 4}, base, options(epochs=3)).tests_seconds == 4 * (300 + 200)


def test_only_a_confirm_phase_that_is_still_to_come_is_announced(dataset: Dataset) -> None:
    space: Any = SimpleNamespace(question="Does it?", name="x")
    split = Split(("a", "b"), ("c",), ("d",))
    for confirms in (True, False):
        out = io.StringIO()
        given = options(baselines=["random"], max_concurrent=2, epochs=1)
        print_plan(Console(file=out, width=400), given, space, dataset, (split,), {"s": 4}, SECONDS, Done(), confirms)
        told = (
            "the best 3, with 2 fresh seeds each; then these and 3 baselines once on the test stories: 12 more trials"
        )
        assert (told in out.getvalue()) == confirms
        seconds = 10 + 3 * 6 / 2 + (800 + (600 + 150 + 20 + 2 * 4) * confirms) / 2
        assert f"about 2 min and 1.0 GB a trial, {seconds / 60:.0f} min in all" in out.getvalue()


def test_one_is_not_several_and_what_is_done_is_said(dataset: Dataset) -> None:
    space: Any = SimpleNamespace(question="Does it?", name="x")
    split = Split(("a", "b"), ("c",), ("d",))
    out = io.StringIO()
    given = options(epochs=1, confirm_seeds=1)
    print_plan(Console(file=out, width=400), given, space, dataset, (split,), {"s": 1}, SECONDS, Done(8, 2, 0, 0), True)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "data        here: s 1 voxel" in lines
    assert "fit         2 stories, 30 words, 300 TRs: a, b" in lines
    assert "validation  1 story, 30 words, 300 TRs: c" in lines
    assert "trials      2 baselines, 8 searched, 8 of them done; 1 epoch each" in lines
    assert "delta       0.003 CC: an effect within it does not matter" in lines
    assert (
        "confirm     the best 3, with 1 fresh seed each; then these and 2 baselines once on the test stories: 8 more "
        "trials, 2 of them done" in lines
    )


def test_a_log_file_has_neither_trailing_spaces_nor_a_bar(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    space: Any = SimpleNamespace(question="Does it?", name="x")
    split = Split(("a", "b"), ("c",), ("d",))
    console = run._console()
    print_plan(console, options(), space, dataset, (split,), {"s": 4}, SECONDS, Done(), False)
    console.print("a  b  ", end="")
    console.print("c")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study       s -> out/s" and lines[-1] == "a  b  c"
    assert [line for line in lines if line != line.rstrip() or not line] == []


@pytest.mark.parametrize(
    ("is_kept", "said"),
    [(False, "interrupted before any trial had ended; nothing was kept\n"), (True, "interrupted\n")],
)
def test_an_interruption_is_said_once(
    is_kept: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    if is_kept:
        (tmp_path / "study.json").write_text("{}")
    given = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(run, "run_session", interrupt)
    study: Any = SimpleNamespace(options=given)
    assert run._run(study, run.ResumePolicy(), run._console()) is is_kept
    assert capsys.readouterr().out == said
