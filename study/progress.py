"""One line that says how far a study is: live in a terminal, a line a finished trial in a log file."""

import time
from typing import Any

from ray import tune
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bert_encoding.records import BASELINE, COMPLETE, TrialRecord
from study.searcher import StudySearcher


class ProgressLine(tune.Callback):
    """Follows a study through Ray Tune's events.

    Parameters
    ----------
    records : of earlier sessions
    n_jobs : jobs that this session will run
    """

    def __init__(
        self, console: Console, searcher: StudySearcher, records: list[TrialRecord], n_jobs: int, n_epochs: int
    ) -> None:
        self.console, self.searcher = console, searcher
        self.n_jobs, self.n_epochs, self.n_done, self.n_searched = n_jobs, n_epochs, 0, 0
        self.search_began = time.monotonic()
        self.best: tuple[float, str] | None = None
        self.frozen: float | None = None
        for record in records:
            if record.status == COMPLETE:
                self._note(record.phase, record.trial_id, record.method, record.scores[searcher.measure.column])
        self.bar = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=console, transient=True
        )
        self.task = self.bar.add_task("starting workers", total=n_jobs)

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its callbacks for a restore of its own, which we never use."""
        return {}

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("ended"):
            self._ended(self.searcher.jobs[trial.trial_id].config["method"], result)
        elif self.console.is_terminal:
            self._describe(f"trial {result['job']} epoch {result['epoch']:.0f}/{self.n_epochs}")

    def _ended(self, method: str, result: dict[str, Any]) -> None:
        self.n_done += 1
        if result["phase"] == BASELINE:
            self.search_began = time.monotonic()
        else:
            self.n_searched += 1
        name, status = result["job"], result["status"]
        if status == COMPLETE:
            self._note(result["phase"], name, method, result["value"])
            said = f"{name}: {self.searcher.measure.label} {result['value']:.4f}"
        else:
            said = f"{name}: {status}: {(result['error'] or '').splitlines()[-1]}"
        self._describe(said)
        if not self.console.is_terminal:
            self.console.print(
                f"[{self.n_done}/{self.n_jobs}] {said} | {self._standing()}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def _note(self, phase: str, name: str, method: str, value: float) -> None:
        if phase == BASELINE:
            self.frozen = value if method == "frozen" else self.frozen
        elif self.best is None or self.searcher.measure.better(value, self.best[0]):
            self.best = (value, name)

    def _describe(self, said: str) -> None:
        self.bar.update(
            self.task, completed=self.n_done, description=f"{self.n_done}/{self.n_jobs} | {said} | {self._standing()}"
        )

    def _standing(self) -> str:
        label = self.searcher.measure.label
        best = f"best {label} {self.best[0]:.4f} ({self.best[1]})" if self.best else f"best {label} -"
        frozen = f"frozen {self.frozen:.4f}" if self.frozen is not None else "frozen -"
        return f"{best}, {frozen} | {self._time_left()}"

    def _time_left(self) -> str:
        if self.n_done == self.n_jobs:
            return "done"
        if self.n_searched == 0:
            return "time left: known after the first trial"
        left = (time.monotonic() - self.search_began) / self.n_searched * (self.n_jobs - self.n_done)
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
