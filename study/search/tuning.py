"""The jobs of a session through Ray Tune, with their searcher, callbacks and interruption."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from bert_encoding.core.names import METRICS
from bert_encoding.text_tasks.task import TextTask
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.record import TrialRecord
from study.search.dashboard import JOURNAL_FILE, Journal
from study.search.early_stopping import StopSignal, make_stop_signal
from study.search.job_list import JobSearcher
from study.search.progress import ProgressLine
from study.search.searcher import StudySearcher
from study.search.tensorboard import TensorBoard
from study.search.time_limits import RETRIES, TrialGuard
from study.search.worker import Job, objective
from study.setup.samplers import NO_SCHEDULER
from study.setup.text_study import AnyStudy

OF_TUNE = {signal.SIGINT, signal.SIGUSR1}  # what Ray Tune takes for an interruption


def run_search(
    study: AnyStudy,
    task: Task | TextTask,
    records: list[TrialRecord],
    baselines: list[Job],
    make_key: Callable[..., str],
    first_id: int,
    private: Path,
    console: Console,
    is_mixed: bool = False,
) -> str | None:
    """Run baselines and search; every trial leaves a record. Needs Ray.

    Parameters
    ----------
    records : of earlier sessions
    baselines : jobs that lack a record
    first_id : number of the next trial
    private : folder for Ray Tune's own files
    is_mixed : the study was forced to go on although it had changed

    Returns
    -------
    Why the search ended before its time, in one line; None if it did not.
    """
    options, folder, metric = study.options, study.options.folder, METRICS[study.space.task]
    stop_signal = None if options.scheduler == NO_SCHEDULER else make_stop_signal()
    searcher = StudySearcher(
        study.space,
        study.base,
        baselines,
        options.trials,
        records,
        make_key,
        options.seed,
        first_id,
        metric,
        scheduler=options.scheduler,
        stop_signal=stop_signal,
        journal=Journal(folder / JOURNAL_FILE, options.name, metric.is_gain) if isinstance(folder, Path) else None,
        is_mixed=is_mixed,
    )
    return run_jobs("search", study, task, records, searcher, private, console, stop_signal)


def run_jobs(
    name: str,
    study: AnyStudy,
    task: Task | TextTask,
    records: list[TrialRecord],
    searcher: JobSearcher,
    private: Path,
    console: Console,
    stop_signal: StopSignal | None = None,
) -> str | None:
    """Run the jobs of a searcher, with a progress line and a guard; parameters and result as in ``run_search``.

    Raises KeyboardInterrupt if it was interrupted, be it after the last job.

    Parameters
    ----------
    name : of these jobs within the session
    """
    options, folder = study.options, study.options.folder
    _set_up_tune()
    with ProgressLine(console, searcher, records, options.epochs) as progress:
        callbacks: list[tune.Callback] = [TrialGuard(folder, searcher, options.trial_timeout), progress]
        if options.tensorboard and isinstance(folder, Path):
            callbacks.append(TensorBoard(folder))
        tuner = tune.Tuner(
            _trainable(study, task, stop_signal),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=searcher.n_jobs,
                max_concurrent_trials=options.max_concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(private),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=callbacks,
                verbose=0,
            ),
        )
        with passing_on_interrupts():
            tuner.fit()
    return searcher.error


def _set_up_tune() -> None:
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # they are in the records and the progress line
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as behind nohup
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = str(int(is_ignored))  # it ends trials in good order
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1e9"  # Ray Tune's own state is not read and grows with the trials
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)


def _trainable(study: AnyStudy, task: Task | TextTask, stop_signal: StopSignal | None) -> Any:
    """Return the worker's function with what all trials share, and a trial's CPUs and GPUs."""
    options = study.options
    trainable = tune.with_parameters(
        objective,
        task=task,
        study=str(options.folder),
        metric=METRICS[study.space.task],
        n_threads=max(1, int(options.cpus_per_trial)),
        gpu_share=options.gpus_per_trial,
        stop_signal=stop_signal,
    )
    return tune.with_resources(trainable, {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial})


@contextmanager
def passing_on_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt after a block in which Ray Tune was interrupted, and put the handler of Ctrl-C back.

    Tune handles the first Ctrl-C itself and ends without reporting it; without a Ctrl-C it leaves its handler in place,
    which would swallow the next one. Python writes every signal to the file of ``signal.set_wakeup_fd``, whatever the
    handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    with tempfile.TemporaryFile() as noted:
        os.set_blocking(noted.fileno(), False)  # required by the next line
        others = signal.set_wakeup_fd(noted.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(others)
            signal.signal(signal.SIGINT, before)
        noted.seek(0)
        was_interrupted = bool(OF_TUNE & set(noted.read()))
    if was_interrupted:
        raise KeyboardInterrupt
