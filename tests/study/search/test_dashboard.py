"""The copy for optuna-dashboard: read by Optuna itself, while the search goes on; never in the way of a study."""

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from make_searcher import finished, searcher
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from study.search.dashboard import JOURNAL_FILE, Journal
from study.setup.spaces import Space, load_space

SPACE = (
    "def space(trial):\n    return {'lr': trial.suggest_float('lr', 0.01, 0.9), 'rank': trial.suggest_int('r', 1, 4)}\n"
)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "two.py").write_text(SPACE)
    return load_space(str(tmp_path / "two.py"))


def read(path: Path) -> optuna.Study:
    """Open the file as a viewer would, from scratch."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage)


def shown(trials: list[Any]) -> list[tuple[Any, ...]]:
    return [(t.state.name, t.value, t.params, t.distributions, t.intermediate_values, t.user_attrs) for t in trials]


def test_a_viewer_sees_what_the_search_knows_at_every_moment(space: Space, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    search = searcher(space, n_trials=4, journal=Journal(path, "night", True), scheduler="asha")
    for name in "abcd":
        search.suggest(name)
    assert [t.state.name for t in read(path).trials] == ["RUNNING"] * 4
    search.on_trial_result("a", {"epoch": 1.0, "cc_mean": 0.1})
    search.on_trial_result("b", {"epoch": 1.0, "cc_mean": 0.05})
    assert [t.intermediate_values for t in read(path).trials] == [{1: 0.1}, {1: 0.05}, {}, {}]
    search.on_trial_complete("a", {"status": "COMPLETE", "value": 0.3, "curve": [(1, 0.1), (2, 0.3)]})
    search.on_trial_complete("b", {"status": "STOPPED", "value": 0.05, "curve": [(1, 0.05)]})
    search.on_trial_complete("c", error=True)
    copy = read(path)
    assert copy.study_name == "night"
    assert copy.direction.name == "MAXIMIZE"
    assert shown(copy.trials) == shown(search.study.trials)
    assert [t.state.name for t in copy.trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [t.user_attrs["trial_id"] for t in copy.trials] == ["0001", "0002", "0003", "0004"]
    assert copy.best_value == 0.3
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines()), "plain text, no pickle"


def test_a_resumed_study_writes_it_anew(space: Space, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    records = [finished(space, {"lr": 0.1, "r": 1}, 1, 0.2), finished(space, {"lr": 0.2, "r": 2}, 2, None)]
    records[0].epochs = [{"epoch": 1.0, "cc_mean": 0.1}, {"epoch": 2.0, "cc_mean": 0.2}]
    path.write_text("not a journal")
    (tmp_path / f"{JOURNAL_FILE}.lock").touch()  # of a driver that was killed
    for _ in range(2):
        search = searcher(space, n_trials=3, records=records, first_id=3, journal=Journal(path, "night", False))
    search.suggest("a")
    copy = read(path)
    assert copy.direction.name == "MINIMIZE"
    assert shown(copy.trials) == shown(search.study.trials)
    assert [t.state.name for t in copy.trials] == ["COMPLETE", "FAIL", "RUNNING"]
    assert copy.trials[0].intermediate_values == {1: 0.1, 2: 0.2}


@pytest.mark.parametrize(
    ("folder", "warning"), [("a_file", "the study goes on without it"), ("", "is not kept up to date any more")]
)
def test_a_copy_that_cannot_be_begun_or_breaks_ends_nothing(
    folder: str, warning: str, space: Space, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_file").touch()
    journal = Journal(tmp_path / folder / JOURNAL_FILE, "night", True)
    search = searcher(space, n_trials=2, journal=journal)
    assert search.suggest("a")["trial_id"] == "0001"
    journal.ids.clear()
    search.on_trial_result("a", {"epoch": 1.0, "cc_mean": 0.1})
    search.on_trial_complete("a", {"status": "COMPLETE", "value": 0.1})
    assert search.suggest("b")["trial_id"] == "0002"
    assert caplog.text.count(warning) == 1
    assert search.study.trials[0].value == 0.1


@pytest.mark.skipif(os.name != "posix", reason="file descriptors are counted through /proc")
def test_many_trials_leave_no_file_open(space: Space, tmp_path: Path) -> None:
    search = searcher(space, n_trials=40, journal=Journal(tmp_path / JOURNAL_FILE, "night", True))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for at in range(40):
        search.suggest(f"ray{at}")
        search.on_trial_complete(f"ray{at}", {"status": "COMPLETE", "value": at / 100})
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    assert len(read(tmp_path / JOURNAL_FILE).trials) == 40
