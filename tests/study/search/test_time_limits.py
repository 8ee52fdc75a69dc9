"""The guard of trials, called as Ray Tune calls it; with real processes it is in test_stopping.py."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from make_searcher import searcher

from bert_encoding.core.errors import InputError
from bert_encoding.trial.record import TrialRecord, has_record, read_record, write_record
from study.search import time_limits as guard_module
from study.search.time_limits import TrialGuard
from study.search.worker import find_record


def ray_trial(name: str, worker: Any = "worker") -> SimpleNamespace:
    kept: dict[str, Any] = {name: {"value": 1} for name in ("metric_analysis", "metric_n_steps", "evaluated_params")}
    return SimpleNamespace(trial_id=name, temporary_state=SimpleNamespace(ray_actor=worker), max_failures=2, **kept)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workers that were ended."""
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", ended.append)
    return ended


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(guard_module, "time", SimpleNamespace(monotonic=lambda: seconds))


def test_only_what_is_too_late_is_ended(killed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    search = searcher()
    trials = {name: ray_trial(name, f"worker of {name}") for name in "abc"}
    guard = TrialGuard(tmp_path, search, 10)
    for name, began in (("a", 0), ("b", 1), ("c", 8)):
        search.suggest(name)
        clock(monkeypatch, began)
        guard.on_trial_start(0, [], trials[name])
    guard.on_trial_result(0, [], trials["b"], {"ended": True})
    clock(monkeypatch, 10)
    guard.on_step_end(0, [])
    assert killed == [], "the last moment counts"
    clock(monkeypatch, 10.1)
    guard.on_step_end(0, [])
    guard.on_step_end(0, [])
    assert killed == ["worker of a"], "once; b had ended, c has time"
    assert (trials["a"].max_failures, trials["c"].max_failures) == (0, 2), "it is not tried again"
    guard.on_trial_recover(0, [], trials["c"])  # its worker died; the next try has its own time
    clock(monkeypatch, 17)
    guard.on_trial_start(0, [], trials["c"])
    clock(monkeypatch, 26)
    guard.on_step_end(0, [])
    assert killed == ["worker of a"]


@pytest.mark.parametrize("limit", [None, 3])  # without a limit its worker is not ended, and dies by itself
def test_what_was_given_up_gets_a_record_with_its_reason(
    limit: float | None, killed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search = searcher(jobs=("frozen",))
    search.suggest("a")
    guard = TrialGuard(tmp_path, search, limit)
    clock(monkeypatch, 0)
    guard.on_trial_start(0, [], ray_trial("a"))
    clock(monkeypatch, 4)
    guard.on_step_end(0, [])
    assert killed == ([] if limit is None else ["worker"])
    search.on_trial_complete("a", None, error=True)
    guard.on_trial_error(0, [], ray_trial("a"))
    reason = "its worker died 3 times" if limit is None else "no end after 3 s (--trial-timeout)"
    record = read_record(tmp_path, "baseline-frozen")
    job = search.jobs["a"]
    assert (record.status, record.error) == ("FAILED", reason)
    assert (record.key, record.phase, record.method) == (job.key, "baseline", "frozen")
    assert record.config == {k: list(v) if isinstance(v, tuple) else v for k, v in job.config.items()}
    assert search.error == f"baseline baseline-frozen failed: {'the worker died' if limit is None else reason}"


def test_a_record_that_a_worker_has_written_stays(tmp_path: Path) -> None:
    search = searcher()
    search.suggest("a")
    job = search.jobs["a"]
    write_record(tmp_path, TrialRecord("COMPLETE", "lora", job.config, job.trial_id, key=job.key))
    TrialGuard(tmp_path, search).on_trial_error(0, [], ray_trial("a"))
    TrialGuard(tmp_path, search).on_trial_result(0, [], ray_trial("a"), ending())
    assert read_record(tmp_path, job.trial_id).status == "COMPLETE"
    found_again = find_record(tmp_path, job)
    assert found_again is not None and found_again.status == "COMPLETE"
    assert find_record(tmp_path, replace(job, key="of another configuration")) is None


FULL = "trials/0001: no space left"


def ending(**more: Any) -> dict[str, Any]:
    """Return what a worker reports that could not write its record."""
    return {"ended": True, "unrecorded": True, "status": "FAILED", "error": FULL, "is_user_error": True} | more


def test_what_a_worker_could_not_write_the_driver_writes(tmp_path: Path) -> None:
    search = searcher()
    guard = TrialGuard(tmp_path, search)
    for name, by_user in (("a", True), ("b", False)):
        search.suggest(name)
        guard.on_trial_start(0, [], ray_trial(name))
        guard.on_trial_result(0, [], ray_trial(name), ending(is_user_error=by_user))
        job, record = search.jobs[name], read_record(tmp_path, search.jobs[name].trial_id)
        assert (record.status, record.error, record.key, record.params) == ("FAILED", FULL, job.key, job.params)
        assert record.scores == ({"is_user_error": True} if by_user else {})
    assert search.error is None and guard.running == {}


@pytest.mark.parametrize("worker_died", [True, False])
def test_a_record_that_the_driver_cannot_write_ends_the_study(
    worker_died: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, record: TrialRecord) -> None:
        raise InputError(f"{folder}: no space left")

    monkeypatch.setattr(guard_module, "write_record", refuse)
    search = searcher()
    search.suggest("a")
    guard = TrialGuard(tmp_path, search)
    if worker_died:
        guard.on_trial_error(0, [], ray_trial("a"))
    else:
        guard.on_trial_result(0, [], ray_trial("a"), ending())
    assert search.error == f"{tmp_path}: no space left"
    assert not has_record(tmp_path, "0001")
    assert search.suggest("b") == "FINISHED"


def test_a_study_ends_when_trials_in_a_row_cannot_write(tmp_path: Path) -> None:
    search = searcher(n_trials=10)
    guard = TrialGuard(tmp_path, search)
    for name, unrecorded in (("a", True), ("b", True), ("c", False), ("d", True), ("e", True), ("f", True)):
        assert search.error is None
        search.suggest(name)
        guard.on_trial_result(0, [], ray_trial(name), ending(unrecorded=unrecorded))
    assert search.error == f"3 trials in a row could not write their records; the last: {FULL}"


def test_of_an_ended_trial_no_statistics_are_kept(tmp_path: Path) -> None:
    search = searcher()
    for name, end in (("a", TrialGuard.on_trial_complete), ("b", TrialGuard.on_trial_error)):
        trial = ray_trial(name)
        search.suggest(name)
        end(TrialGuard(tmp_path, search), 0, [], trial)
        assert (trial.metric_analysis, trial.metric_n_steps, trial.evaluated_params) == ({}, {}, {})
