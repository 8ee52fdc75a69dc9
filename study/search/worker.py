"""One job on a worker: run the trial, write its record, report to Ray Tune."""

import ctypes
import functools
import logging
import os
import sys
import traceback
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bert_encoding.core.errors import InputError
from bert_encoding.core.names import BASELINE, FAILED, SEARCH, Metric
from bert_encoding.core.storage import Place, naming_full_disk, open_place
from bert_encoding.core.worker_cache import WorkerCache
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, has_record, read_cc, read_record, saving_adapter, write_record
from study.cluster.lock import is_held_by, session_id
from study.search.early_stopping import StopSignal

if TYPE_CHECKING:  # torch is imported by trials alone: a worker that only repeats records stays small
    from bert_encoding.text_tasks.task import TextTask
    from bert_encoding.trial.pipeline import Task
    from bert_encoding.trial.run import Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One trial to run; the driver makes it, a worker receives it as Ray Tune's config.

    A record is written only while the ``session`` that made the job holds the study's lock; always if it is empty.
    """

    trial_id: str
    phase: str
    key: str
    config: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)  # the parameters that Optuna suggested
    repeat_of: str | None = None  # a finished trial with the same key, whose results this job repeats
    score_test: bool = False  # also score the test stories (baselines of a study without a search)
    is_final: bool = False  # refit on fit + validation and score only the test stories (end of the confirm phase)
    session: str = field(default_factory=session_id)


class LostLockError(InputError):
    """Another session holds the study's lock, so this one may not write."""


def objective(
    job: dict[str, Any],
    *,
    task: "Task | TextTask",
    study: str,
    metric: Metric,
    n_threads: int,
    gpu_share: float,
    stop_signal: StopSignal | None = None,
) -> None:
    """Run one job in a Ray worker; a failure is recorded and reported, not raised, so the worker stays usable.

    The last report states how the trial ended. If it is ``unrecorded``, the record could not be written here and the
    driver writes it; another try would fail in the same way.
    """
    from ray import tune

    def report(scores: dict[str, float]) -> bool:
        """Wait until the driver has received the scores, then return whether to continue."""
        tune.report({"job": job["trial_id"], "scores": list(scores), **scores})
        return stop_signal is None or not stop_signal.should_stop(job["trial_id"], int(scores["epoch"]))

    _limit_resources(n_threads, gpu_share)
    received, unrecorded = Job(**job), False
    try:
        record = run_job(received, task, open_place(study), report, _process_cache())
    except Exception as error:  # if raised, Ray would retry it twice and the reason would be lost
        logger.warning("trial %s has no record: %s", received.trial_id, error)
        record = failed_record(received, error, node=os.uname().nodename)
        unrecorded = not isinstance(error, LostLockError)
    _return_memory()
    tune.report(_ending(record, received, metric) | {"unrecorded": unrecorded})


def _ending(record: TrialRecord, job: Job, metric: Metric) -> dict[str, Any]:
    """Return the last report of a trial."""
    return {
        "job": record.trial_id,  # Ray Tune writes its own id over "trial_id"
        "phase": record.phase,
        "status": record.status,
        "error": record.error,
        "value": record.scores.get("cc_test" if job.is_final else metric.column),
        "is_final": job.is_final,
        "epochs_done": record.scores.get("epochs_done"),
        "curve": curve(record, metric),
        "is_user_error": record.scores.get("is_user_error", False),
        "ended": True,
    }


def curve(record: TrialRecord, metric: Metric) -> list[tuple[int, float]]:
    """Return (epoch, value of the metric) of every scored epoch."""
    return [(int(epoch["epoch"]), epoch[metric.column]) for epoch in record.epochs if metric.column in epoch]


def choose(config: TrialConfig, task: "Task", n: int, n_threads: int, gpu_share: float) -> dict[str, Any]:
    """Choose voxels in a Ray worker, in float32 so that any machine chooses the same; see ``choose_voxels``."""
    from bert_encoding.trial.voxel_selection import choose_voxels

    _limit_resources(n_threads, gpu_share)
    chosen = choose_voxels(replace(config, embed_precision="float32"), task, n)
    _return_memory()
    return chosen


def run_job(
    job: Job,
    task: "Task | TextTask",
    study: Place,
    report: "Report" = lambda scores: True,
    cache: WorkerCache | None = None,
) -> TrialRecord:
    """Run one job and write its record, or repeat the record of an equal trial.

    If the worker died after writing the record, Ray retries the job and the record is returned.

    A worker may outlive its driver while another session resumes the study. Its result is dropped if its session no
    longer holds the lock. If the lock changes hands between this check and the write, the record counts when the study
    is resumed again: no session reuses an id that an earlier one may have assigned (``session.first_free_id``).

    Raises
    ------
    LostLockError, InputError
        if another session holds the lock, or the record cannot be written.
    """
    logging.getLogger("bert_encoding").setLevel(logging.WARNING)
    if (finished := find_record(study, job)) is not None:
        return finished
    try:
        record = _run(job, task, study, report, cache) if job.repeat_of is None else _repeat(job, study)
    except Exception as error:
        record = failed_record(job, error, node=os.uname().nodename)
    if job.session and not is_held_by(study, job.session):
        raise LostLockError(
            f"{study}: trial {job.trial_id} is dropped: its run of the study has ended or was taken over"
        )
    record.trial_id, record.phase, record.key, record.params = job.trial_id, job.phase, job.key, job.params
    write_record(study, record)
    return record


def find_record(study: Place, job: Job) -> TrialRecord | None:
    """Return the record that a job has already written, or None."""
    if not has_record(study, job.trial_id):
        return None
    record = read_record(study, job.trial_id)
    return record if record.key == job.key else None


_process_cache = functools.cache(WorkerCache)  # of this process, in which Ray runs one trial after another


def _run(job: Job, task: "Task | TextTask", study: Place, report: "Report", cache: WorkerCache | None) -> TrialRecord:
    from bert_encoding.text_tasks.run import run_text_trial
    from bert_encoding.text_tasks.task import TextTask
    from bert_encoding.trial.run import run_test, run_trial
    from study.cluster.worker_data import check_weights, with_settled_precision

    config = with_settled_precision(TrialConfig.from_dict(job.config), str(study))
    check_weights(str(study), config.model)
    with naming_full_disk(study), saving_adapter(study, job.trial_id) as folder:
        adapter_folder = folder if job.phase == SEARCH else None
        if isinstance(task, TextTask):
            return run_text_trial(config, task, report, adapter_folder=adapter_folder, cache=cache)
        if job.is_final:
            return run_test(config, task, report, adapter_folder=folder, cache=cache)
        return run_trial(
            config,
            task,
            report,
            adapter_folder=adapter_folder,
            score_test=job.score_test,
            with_tests=None if job.phase == BASELINE else False,
            cache=cache,
        )


def _repeat(job: Job, study: Place) -> TrialRecord:
    assert job.repeat_of is not None
    record = read_record(study, job.repeat_of)
    record.repeat_of = record.repeat_of or job.repeat_of
    record.seconds = dict.fromkeys(record.seconds, 0.0)
    record.cc = read_cc(study, job.repeat_of)
    return record


def failed_record(job: Job, error: Exception | str, is_user_error: bool = False, node: str = "") -> TrialRecord:
    """Return the record of a trial that failed: the traceback of an exception, one line of a user's mistake.

    ``node`` is empty if the driver records a trial that could not write a record.
    """
    if isinstance(error, InputError):
        error, is_user_error = str(error), True
    elif isinstance(error, Exception):
        error = "".join(traceback.format_exception(error)).strip()
    return TrialRecord(
        status=FAILED,
        method=job.config["method"],
        config=job.config,
        trial_id=job.trial_id,
        phase=job.phase,
        error=error,
        key=job.key,
        params=job.params,
        scores={"is_user_error": True} if is_user_error else {},
        node=node,
    )


def _return_memory() -> None:
    """Return freed memory to the system: training fragments the heap, which would grow from trial to trial."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # in glibc, not in musl
        trim(0)


def _limit_resources(n_threads: int, gpu_share: float) -> None:
    """Set threads and GPU memory of a trial: Ray does not enforce GPU fractions, and may set one CPU thread."""
    import torch

    torch.set_num_threads(n_threads)
    if torch.cuda.is_available() and 0 < gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
