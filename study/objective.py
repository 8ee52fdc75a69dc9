"""What a worker does with one job: run the trial, write its record, report to Ray Tune."""

import ctypes
import logging
import os
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bert_encoding.config import TrialConfig
from bert_encoding.errors import InputError
from bert_encoding.records import (
    BASELINE,
    FAILED,
    SEARCH,
    Metric,
    TrialRecord,
    adapter_folder,
    content_key,
    naming_full_disk,
    read_cc,
    read_record,
    write_record,
)


@dataclass(frozen=True)
class Job:
    """One trial to run; the driver makes it, a worker receives it as Ray Tune's config.

    Attributes
    ----------
    params : what Optuna suggested
    repeat_of : a finished trial with the same key, whose record answers this job
    score_test : also score the test stories (baselines of a study without a search)
    """

    trial_id: str
    phase: str
    key: str
    config: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    repeat_of: str | None = None
    score_test: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def job_key(config: TrialConfig, inputs: tuple[str, ...], splits: Any, code: str, score_test: bool) -> str:
    """Return the identity of a configuration: equal keys give equal results."""
    return content_key(asdict(config), inputs, splits, code, score_test)


def objective(job: dict[str, Any], *, task: Any, study: str, metric: Metric, n_threads: int, gpu_share: float) -> None:
    """Run one job in a Ray worker. A failure is recorded and reported, not raised: the worker stays usable."""
    from ray import tune

    _limit_resources(n_threads, gpu_share)
    record = run_job(Job(**job), task, Path(study), lambda scores: tune.report({"job": job["trial_id"], **scores}))
    _return_memory()
    tune.report(
        {
            "job": record.trial_id,  # Ray Tune writes its own id over "trial_id"
            "phase": record.phase,
            "status": record.status,
            "error": record.error,
            "value": record.scores.get(metric.column),
            "is_user_error": record.scores.get("is_user_error", False),
            "ended": True,
        }
    )


def choose(config: TrialConfig, task: Any, n: int, n_threads: int, gpu_share: float) -> dict[str, Any]:
    """Choose voxels in a Ray worker; see ``choose_voxels``."""
    from bert_encoding.voxels import choose_voxels

    _limit_resources(n_threads, gpu_share)
    chosen = choose_voxels(config, task, n)
    _return_memory()
    return chosen


def run_job(job: Job, task: Any, study: Path, report: Any = lambda scores: None) -> TrialRecord:
    """Run one job and write its record, or answer it from the record of an equal one.

    Raises
    ------
    InputError
        if the record cannot be written.
    """
    from bert_encoding.text_task import TextTask
    from bert_encoding.text_trial import run_text_trial
    from bert_encoding.trial import run_trial

    logging.getLogger("bert_encoding").setLevel(logging.WARNING)
    if job.repeat_of is not None:
        record = _repeat(job, study)
    else:
        config = TrialConfig.from_dict(job.config)
        keep_adapter = adapter_folder(study, job.trial_id) if job.phase == SEARCH else None
        try:
            with naming_full_disk(study):
                keep_going = lambda scores: report(scores) is not False  # noqa: E731
                if isinstance(task, TextTask):
                    record = run_text_trial(config, task, keep_going, adapter_folder=keep_adapter)
                else:
                    with_tests = None if job.phase == BASELINE else False
                    record = run_trial(
                        config,
                        task,
                        keep_going,
                        adapter_folder=keep_adapter,
                        score_test=job.score_test,
                        with_tests=with_tests,
                    )
        except Exception as error:
            record = _failure(job, error)
    record.trial_id, record.phase, record.key, record.params = job.trial_id, job.phase, job.key, job.params
    write_record(study, record)
    return record


def _repeat(job: Job, study: Path) -> TrialRecord:
    assert job.repeat_of is not None
    record = read_record(study, job.repeat_of)
    record.repeat_of = record.repeat_of or job.repeat_of
    record.seconds = dict.fromkeys(record.seconds, 0.0)
    record.cc = read_cc(study, job.repeat_of)
    return record


def _failure(job: Job, error: Exception) -> TrialRecord:
    """Record what went wrong: one line for a user's mistake, else the traceback."""
    by_user = isinstance(error, InputError)
    text = str(error) if by_user else "".join(traceback.format_exception(error)).strip()
    return TrialRecord(
        status=FAILED,
        method=job.config["method"],
        config=job.config,
        error=text,
        scores={"is_user_error": True} if by_user else {},
        node=os.uname().nodename,
    )


def _return_memory() -> None:
    """Give freed pages back: a resident worker's heap is fragmented by training and would grow from trial to trial."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _limit_resources(n_threads: int, gpu_share: float) -> None:
    """Keep to the trial's share: Ray counts GPU fractions but does not enforce them, and may set one CPU thread."""
    import torch

    torch.set_num_threads(n_threads)
    if torch.cuda.is_available() and 0 < gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
