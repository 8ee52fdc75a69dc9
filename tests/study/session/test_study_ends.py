"""How a study ends before it has begun, and in the last moment of its search; without Ray's processes."""

import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.tune import _setup_signal_catching
from rich.console import Console
from study_process import raised_in_a_copy

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.names import METRICS
from bert_encoding.trial.record import TrialRecord, write_record
from study.cluster.lock import LOCK_FILE, OWNER_FILE
from study.search import tuning
from study.search.job_list import JobList
from study.session import session

IDENTITY: dict[str, Any] = {"name": "s", "code": "c"}


def open_new(folder: Path) -> None:
    with session._open_folder(folder, IDENTITY, False):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_study_that_cannot_begin_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*of: object) -> None:
        raise error

    study = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(session, "write_json", fail)
        with pytest.raises((InputError, KeyboardInterrupt)):
            open_new(study)
    assert not study.exists()
    open_new(study)
    assert (study / "study.json").is_file()


def test_a_resumed_study_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_new(tmp_path / "s")
    before = (tmp_path / "s" / "study.json").read_bytes()
    monkeypatch.setattr(session, "read_identity", lambda *of: IDENTITY)
    monkeypatch.setattr(session, "resumed", lambda *of: IDENTITY)
    monkeypatch.setattr(session, "write_json", lambda *of: os.truncate(tmp_path / "none", 0))
    with pytest.raises(FileNotFoundError), session._open_folder(tmp_path / "s", IDENTITY, True):
        pass
    assert (tmp_path / "s" / "study.json").read_bytes() == before


def test_leftovers_of_a_killed_beginning_are_ignored(tmp_path: Path) -> None:
    """Killed between the folder and ``study.json``."""
    study = tmp_path / "s"
    (study / "trials").mkdir(parents=True)
    for name in (LOCK_FILE, OWNER_FILE, ".study.json.123.tmp", f".{OWNER_FILE}.123.tmp"):
        (study / name).touch()
    open_new(study)
    assert (study / "study.json").is_file()


OTHER_CONTENT: dict[str, Callable[[Path], object]] = {
    "a study": lambda folder: write_json(folder / "study.json", IDENTITY),
    "a trial": lambda folder: write_record(folder, TrialRecord("COMPLETE", "lora", {}, "0001", "search")),
    "weights": lambda folder: (folder / "trials" / "0001" / "adapter").mkdir(parents=True),
}


@pytest.mark.parametrize("content", OTHER_CONTENT)
def test_a_folder_with_other_content_is_refused(tmp_path: Path, content: str) -> None:
    study = tmp_path / "s"
    study.mkdir()
    OTHER_CONTENT[content](study)
    before = sorted(study.rglob("*"))
    with pytest.raises(InputError, match=r"exists already; add --resume"):
        open_new(study)
    assert sorted(study.rglob("*")) == before
    session.check_new(study, resume=True)


def test_a_file_with_the_name_of_the_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with pytest.raises(InputError, match="exists already"):
        session.check_new(tmp_path / "s", resume=False)


def run_tune(monkeypatch: pytest.MonkeyPatch, *signals: int, heard: bool = True) -> None:
    """Run no jobs with a Tuner that does with signals what Ray Tune does, and ends well though one came.

    For a copy of this process.
    """
    before = signal.getsignal(signal.SIGINT)

    def fit() -> None:
        interrupted = _setup_signal_catching()
        for one in signals:
            os.kill(os.getpid(), one)
        assert interrupted.is_set() == (heard and bool(signals))

    def passing(*args: Any, **kwargs: Any) -> Any:
        return None

    names = ("with_parameters", "with_resources", "TuneConfig", "RunConfig", "FailureConfig")
    stub = SimpleNamespace(**dict.fromkeys(names, passing), Tuner=lambda *args, **kwargs: SimpleNamespace(fit=fit))
    monkeypatch.setattr(tuning, "tune", stub)
    options = SimpleNamespace(
        **{"cpus_per_trial": 1.0, "gpus_per_trial": 0.0, "max_concurrent": 1, "epochs": 1, "trial_timeout": None},
        **{"tensorboard": False, "folder": Path("s")},
    )
    study: Any = SimpleNamespace(options=options, space=SimpleNamespace(task="encoding"))
    for name in ("TUNE_PRINT_ALL_TRIAL_ERRORS", "TUNE_GLOBAL_CHECKPOINT_S", "TUNE_DISABLE_SIGINT_HANDLER"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    task: Any = None
    try:
        searcher = JobList([], METRICS["encoding"])
        tuning.run_jobs("search", study, task, [], searcher, Path("p"), Console(file=io.StringIO()))
    finally:
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGUSR1], [signal.SIGINT, signal.SIGINT]])
def test_an_interrupt_that_tune_swallowed_is_raised(signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert raised_in_a_copy(lambda: run_tune(monkeypatch, *signals)) == "KeyboardInterrupt()"


def test_tune_leaves_no_handler_that_swallows_the_next_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_later() -> None:
        run_tune(monkeypatch)
        signal.raise_signal(signal.SIGINT)

    assert raised_in_a_copy(interrupt_later) == "KeyboardInterrupt()"


def test_where_ctrl_c_is_ignored_tune_does_not_hear_it_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind nohup."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        run_tune(monkeypatch, signal.SIGINT, heard=False)
        raise ZeroDivisionError

    assert raised_in_a_copy(ignore) == "ZeroDivisionError()"


def test_an_error_passes_as_it_is() -> None:
    def fail() -> None:
        before = signal.getsignal(signal.SIGINT)
        try:
            with tuning.passing_on_interrupts():
                _setup_signal_catching()
                raise ZeroDivisionError
        finally:
            assert signal.getsignal(signal.SIGINT) is before

    assert raised_in_a_copy(fail) == "ZeroDivisionError()"


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with tuning.passing_on_interrupts():
                pass
        except BaseException as error:  # the thread would only print it
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
