"""Imitates the confirm phase: a small study on disk, and a runner that pretends to run its jobs."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from make_searcher import key_of, make_record
from rich.console import Console

from bert_encoding.core.files import write_json
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, write_record
from study.results.locked_stories import look_file
from study.search.worker import Job
from study.session.confirm import confirm

BASE = TrialConfig(model="tiny", epochs=1)
HEARD = {"eta": ["subject2 e7a"], "zeta": ["subject2 2e7a"]}
IDENTITY = {**{"data": {"fingerprint": "abc"}, "code": "c0de", "splits": [{"test": ["zeta", "eta"]}]}, "heard": HEARD}
ScoreOf = Callable[[Job], float | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with four different searched configurations and two baselines."""
    study = tmp_path / "out" / "s"
    write_json(make_study_file(study), {})
    for method in ("frozen", "word_rate"):
        write_trial(study, f"baseline-{method}", 0.1, phase="baseline", config=replace(BASE, method=method))
    for rank, cc in enumerate((0.20, 0.25, 0.15, 0.24), start=1):
        write_trial(study, f"{rank:04d}", cc, config=replace(BASE, rank=rank))
    return study


def make_study_file(study: Path) -> Path:
    (study / "trials").mkdir(parents=True, exist_ok=True)
    return study / "study.json"


def write_trial(study: Path, name: str, cc: float | None, config: TrialConfig = BASE, **values: Any) -> None:
    write_record(study, make_record(name, cc, config, **values))


def make_options(study: Path, **changes: Any) -> Any:
    values = {"confirm": 2, "confirm_seeds": 2, "seed": 0, "name": study.name, "out": str(study.parent), "trials": 4}
    return SimpleNamespace(**{**values, "folder": study, "data": "lab"} | changes)


class PretendRunner:
    """Pretends to run jobs; ``of`` returns the CC of a job, None if it fails."""

    def __init__(self, study: Path, of: ScoreOf = lambda job: 0.2, n_until_killed: int = 1000) -> None:
        self.study, self.of, self.left = study, of, n_until_killed
        self.ran: list[str] = []
        self.out = io.StringIO()

    def __call__(self, name: str, jobs: list[Job]) -> str | None:
        for job in jobs:
            if self.left == 0:
                return None  # as after Ctrl-C
            self.left -= 1
            self.ran.append(job.trial_id)
            fixed = self.study / look_file(int(name.split("-")[1]))
            assert job.is_final == fixed.exists(), "the winner is fixed in between"
            value = self.of(job)
            failed = {"status": "FAILED", "error": "no"} if value is None else {}
            scores = {"cc_test" if job.is_final else "cc_mean": value} | {"epoch_kept": 3.0}
            record = TrialRecord("COMPLETE", job.config["method"], job.config, scores=scores)
            write_record(self.study, replace(record, trial_id=job.trial_id, phase=job.phase, key=job.key, **failed))
        return None

    def confirm(self, look: int = 1, **changes: Any) -> None:
        console = Console(file=self.out, width=400)
        options = make_options(self.study, **changes)
        assert confirm(options, look, IDENTITY, key_of, self, console) is None
