"""How a study ends before it has begun, and in the last moment of its search; without Ray's processes."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.tune import _setup_signal_catching

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.trial.record import TrialRecord, write_record
from study.cluster.lock import LOCK_FILE, OWNER_FILE
from study.search import tuning
from study.session import session

IDENTITY: dict[str, Any] = {"name": "s", "code": "c"}


# --- before the first study.json --------------------------------------------------------------------------------------


def open_new(folder: Path) -> None:
    with session._open_folder(folder, IDENTITY, False):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_study_that_cannot_be_begun_leaves_no_folder(
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


def test_a_study_that_goes_on_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_new(tmp_path / "s")
    before = (tmp_path / "s" / "study.json").read_bytes()
    monkeypatch.setattr(session, "read_identity", lambda *of: IDENTITY)
    monkeypatch.setattr(session, "resumed", lambda *of: IDENTITY)
    monkeypatch.setattr(session, "write_json", lambda *of: os.truncate(tmp_path / "none", 0))
    with pytest.raises(FileNotFoundError), session._open_folder(tmp_path / "s", IDENTITY, True):
        pass
    assert (tmp_path / "s" / "study.json").read_bytes() == before


def test_what_a_killed_beginning_leaves_is_in_nobodys_way(tmp_path: Path) -> None:
    """Killed between the folder and ``study.json``."""
    study = tmp_path / "s"
    (study / "trials").mkdir(parents=True)
    for name in (LOCK_FILE, OWNER_FILE, ".study.json.123.tmp", f".{OWNER_FILE}.123.tmp"):
        (study / name).touch()
    open_new(study)
    assert (study / "study.json").is_file()


def _a_study(folder: Path) -> None:
    write_json(folder / "study.json", IDENTITY)


def _a_trial(folder: Path) -> None:
    write_record(folder, TrialRecord("COMPLETE", "lora", {}, "0001", "search"))


def _weights(folder: Path) -> None:
    (folder / "trials" / "0001" / "adapter").mkdir(parents=True)


def _notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("fill", [_a_study, _a_trial, _weights, _notes])
def test_where_anything_else_lies_no_study_begins(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    study = tmp_path / "s"
    study.mkdir()
    fill(study)
    before = sorted(study.rglob("*"))
    with pytest.raises(InputError, match=r"exists already; add --resume"):
        open_new(study)
    assert sorted(study.rglob("*")) == before
    session.check_new(study, resume=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with pytest.raises(InputError, match="exists already"):
        session.check_new(tmp_path / "s", resume=False)


# --- in the last moment of a search -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    names = (signal.SIGINT, signal.SIGUSR1)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name in names:
        signal.signal(name, before[name])


def run_tune(monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """Run ``_tune`` with a Tuner that does with signals what Ray Tune does, and ends well though one came."""

    def fit() -> None:
        interrupted = _setup_signal_catching()
        for one in signals:
            os.kill(os.getpid(), one)
        assert interrupted.is_set() == bool(signals)

    def passing(*args: Any, **kwargs: Any) -> Any:
        return None

    names = ("with_parameters", "with_resources", "TuneConfig", "RunConfig", "FailureConfig")
    stub = SimpleNamespace(**dict.fromkeys(names, passing), Tuner=lambda *args, **kwargs: SimpleNamespace(fit=fit))
    monkeypatch.setattr(tuning, "tune", stub)
    options = SimpleNamespace(cpus_per_trial=1.0, gpus_per_trial=0.0, max_concurrent=1)
    study: Any = SimpleNamespace(options=options, space=SimpleNamespace(task="encoding"))
    for name in ("TUNE_PRINT_ALL_TRIAL_ERRORS", "TUNE_GLOBAL_CHECKPOINT_S", "TUNE_DISABLE_SIGINT_HANDLER"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    searcher: Any = None
    tuning._tune("search", study, None, Path("s"), searcher, None, [], Path("p"), 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupt_that_tune_kept_to_itself_is_raised(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_tune(monkeypatch, number)
    assert signal.getsignal(signal.SIGINT) is before


def test_tune_leaves_no_handler_that_swallows_the_next_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_tune(monkeypatch)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_and_an_error_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tune(monkeypatch, signal.SIGINT, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)

    def fail() -> None:
        with tuning.passing_on_interrupts():
            _setup_signal_catching()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(signal.SIGINT) is before


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
