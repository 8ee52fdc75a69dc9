"""The progress of a study: a live line in a terminal; in a log file one line per finished trial and per minute."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bert_encoding.core.names import BASELINE, COMPLETE, CONFIRM, FAILED, STOPPED
from bert_encoding.trial.record import TrialRecord
from study.search.job_list import JobList, JobSearcher, TuneCallback
from study.search.time_limits import DIED
from study.wording import duration

EVERY_S = 60.0  # between lines of a log file that only say what is running
N_NAMED = 3  # running trials
ENOUGH, ENOUGH_SHARE = 2, 0.1  # finished trials before the time left is estimated: a number, or a share of all


class ProgressLine(TuneCallback):
    """Follows a study, of which ``records`` are there from earlier sessions, through Ray Tune's events."""

    def __init__(
        self,
        console: Console,
        searcher: JobSearcher,
        records: list[TrialRecord],
        n_epochs: int,
        clock: Any = time.monotonic,
    ) -> None:
        self.console, self.searcher, self.clock = console, searcher, clock
        self.phase = _phase(searcher)
        self.n_jobs, self.n_epochs, self.n_done, self.n_searched = searcher.n_jobs, n_epochs, 0, 0
        self.search_began = self.last_printed = clock()
        self.running: dict[str, str] = {}  # trial -> how far it is
        self.best: tuple[float, str] | None = None
        self.frozen: float | None = None
        for record in records:
            if record.status == COMPLETE and record.phase != CONFIRM:
                self._note(record.phase, record.trial_id, record.method, record.scores[searcher.measure.column])
        self.bar = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=console, transient=True
        )
        self.task = self.bar.add_task("starting workers", total=self.n_jobs)

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()  # elsewhere it would leave an empty line

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running[trial.config["trial_id"]] = ""
        self._describe(self._at_work())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("ended"):
            self._ended(self.searcher.jobs[trial.trial_id].config["method"], result)
        else:
            self.running[result["job"]] = f" epoch {result['epoch']:.0f}/{self.n_epochs}" if result["epoch"] else ""
            self._describe(self._at_work())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial that was given up, whose worker cannot report its end."""
        job = self.searcher.jobs[trial.trial_id]
        reason = self.searcher.reasons.get(trial.trial_id, DIED)
        self._ended(job.config["method"], {"job": job.trial_id, "phase": job.phase, "status": FAILED, "error": reason})

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Print every minute, in a log file, what is running; Ray Tune calls this several times per second."""
        if not self.console.is_terminal and self.running and self.clock() - self.last_printed >= EVERY_S:
            self._print(self._at_work())

    def _ended(self, method: str, result: dict[str, Any]) -> None:
        self.n_done += 1
        self.running.pop(result["job"], None)
        if result["phase"] == BASELINE:
            self.search_began = self.clock()
        else:
            self.n_searched += 1
        if result["status"] == COMPLETE and result["phase"] != CONFIRM:
            self._note(result["phase"], result["job"], method, result["value"])
        event = f"{result['job']}: {self._outcome(result)}"
        self._describe(event)
        if not self.console.is_terminal:
            self._print(event)

    def _outcome(self, result: dict[str, Any]) -> str:
        if result["status"] == FAILED:
            return f"FAILED: {(result['error'] or 'no reason given').splitlines()[-1]}"
        on_test = " on the test stories" if result.get("is_final") else ""
        reached = f"{self.searcher.measure.label} {result['value']:z.4f}{on_test}"
        if result["status"] == STOPPED:
            return f"{reached}, stopped after epoch {result['epochs_done']:.0f}/{self.n_epochs}"
        return reached

    def _at_work(self) -> str:
        named = [f"{name}{epoch}" for name, epoch in list(self.running.items())[:N_NAMED]]
        more = [f"{len(self.running) - N_NAMED} more"] if len(self.running) > N_NAMED else []
        return f"running {', '.join(named + more)}"

    def _note(self, phase: str, name: str, method: str, value: float) -> None:
        if phase == BASELINE:
            self.frozen = value if method == "frozen" else self.frozen
        elif self.best is None or self.searcher.measure.better(value, self.best[0]):
            self.best = (value, name)

    def _print(self, event: str) -> None:
        self.last_printed = self.clock()
        line = f"[{self.phase} {self.n_done}/{self.n_jobs}] {event} | {self._standing()}"
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _describe(self, event: str) -> None:
        text = f"{self.phase} {self.n_done}/{self.n_jobs} | {event} | {self._standing()}"
        self.bar.update(self.task, completed=self.n_done, description=text)

    def _standing(self) -> str:
        label = self.searcher.measure.label
        best = f"best {label} {self.best[0]:z.4f} ({self.best[1]})" if self.best else f"best {label} -"
        frozen = f"frozen {self.frozen:z.4f}" if self.frozen is not None else "frozen -"
        return f"{best}, {frozen} | {self._time_left()}"

    def _time_left(self) -> str:
        if self.n_done == self.n_jobs:
            return "done"
        n_baselines = self.n_done - self.n_searched
        enough = min(ENOUGH, ENOUGH_SHARE * (self.n_jobs - n_baselines))
        if self.n_searched == 0 or self.n_searched < enough:
            return "time left: not known yet"
        left = (self.clock() - self.search_began) / self.n_searched * (self.n_jobs - self.n_done)
        return f"about {duration(left)} left"


def _phase(searcher: JobSearcher) -> str:
    """Return the phase of the jobs: ``search``, ``confirm`` (fresh seeds) or ``test`` (the test stories)."""
    if not isinstance(searcher, JobList):
        return "search"
    return "test" if any(job.is_final for job in searcher.waiting) else "confirm"
