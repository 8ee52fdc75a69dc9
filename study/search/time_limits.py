"""The driver's guard of trials: a time limit, and records of trials whose workers could not write any."""

import time
from typing import Any

import ray

from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.storage import Place
from bert_encoding.trial.record import write_record
from study.search.job_list import JobSearcher, TuneCallback
from study.search.worker import Job, failed_record, find_record

RETRIES = 2  # of a trial whose worker died
DIED = f"its worker died {RETRIES + 1} times"
MAX_UNRECORDED = 3  # trials in a row that could not write their records, before a study ends


class TrialGuard(TuneCallback):
    """Ends trials that take too long, and records those that left no record: their worker died, or could not write.

    A hanging trial may block its whole process, so its worker is ended and the trial is not retried; other trials
    continue. If a worker could not write its record, for example for lack of space, the driver may: it needs less, and
    may be on another machine. If the driver cannot either, or several trials in a row could not, the study ends.

    The limit in seconds counts from the start of a worker's work on a trial; None is no limit.
    """

    def __init__(self, folder: Place, searcher: JobSearcher, limit_s: float | None = None) -> None:
        self.folder, self.searcher, self.limit_s = folder, searcher, limit_s
        self.running: dict[str, tuple[float, Any]] = {}  # Ray's id -> when it began, Ray's trial
        self.n_unrecorded = 0  # in a row

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running[trial.trial_id] = (time.monotonic(), trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if not result.get("ended"):
            return
        self.running.pop(trial.trial_id, None)
        if not result.get("unrecorded"):
            self.n_unrecorded = 0
            return
        self.n_unrecorded += 1
        job, reason = self.searcher.jobs[trial.trial_id], result["error"] or "no reason given"
        self._record(job, reason, bool(result.get("is_user_error")))
        if self.n_unrecorded == MAX_UNRECORDED and self.searcher.error is None:
            last = reason.strip().splitlines()[-1]
            self.searcher.error = f"{MAX_UNRECORDED} trials in a row could not write their records; the last: {last}"

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.pop(trial.trial_id, None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that was given up, unless it has a record."""
        self.running.pop(trial.trial_id, None)
        self._record(self.searcher.jobs[trial.trial_id], self.searcher.reasons.get(trial.trial_id, DIED))
        forget(trial)

    def _record(self, job: Job, reason: str, by_user: bool = False) -> None:
        """Record a failure, unless the trial has a record; end the study if that is impossible."""
        try:
            if find_record(self.folder, job) is None:
                write_record(self.folder, failed_record(job, reason, by_user))
        except (InputError, OSError) as error:  # such as no space: no trial can be recorded
            self.searcher.error = first_line(error)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End trials that take too long; Ray Tune calls this several times per second."""
        if self.limit_s is None:
            return
        now = time.monotonic()
        for trial_id, (began, trial) in list(self.running.items()):
            if now - began > self.limit_s:
                del self.running[trial_id]
                self._end(trial)

    def _end(self, trial: Any) -> None:
        worker = trial.temporary_state.ray_actor
        if worker is None:
            return
        self.searcher.reasons[trial.trial_id] = f"no end after {self.limit_s:g} s (--trial-timeout)"
        trial.max_failures = 0  # a retry would hang too
        ray.kill(worker)


def forget(trial: Any) -> None:
    """Free Ray Tune's own tables of an ended trial, most of the driver's memory per trial.

    Its last result stays: Ray Tune prints a line about a trial without one.
    """
    for table in (trial.metric_analysis, trial.metric_n_steps, trial.evaluated_params):
        table.clear()
