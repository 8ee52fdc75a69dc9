"""A copy of the search for ``optuna-dashboard``, kept up to date while the study runs.

It is for viewing only and is never read back: the records are the truth. A resumed session writes it again.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

JOURNAL_FILE = "optuna.journal"

_log = logging.getLogger(__name__)
Method = Callable[..., None]


def _never_fatal(method: Method) -> Method:
    """Give the copy up, saying so once, when it cannot be written: a study goes on without it."""

    @functools.wraps(method)
    def guarded(self: "Journal", *given: Any) -> None:
        if self.storage is None:
            return
        try:
            method(self, *given)
        except Exception as error:  # whatever it is, it concerns the copy alone
            _log.warning("%s is not kept up to date any more: %s", self.path, error)
            self.storage = None

    return guarded


class Journal:
    """Writes what happens to the searched trials to a new file; one line per event."""

    def __init__(self, path: Path, name: str, is_gain: bool) -> None:
        self.path = path
        self.storage: Any = None
        self.ids: dict[int, int] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            path.unlink(missing_ok=True)
            lock = JournalFileOpenLock(str(path))
            Path(f"{path}.lock").unlink(missing_ok=True)  # of a driver that was killed while it wrote
            self.storage = JournalStorage(JournalFileBackend(str(path), lock))
            direction = StudyDirection.MAXIMIZE if is_gain else StudyDirection.MINIMIZE
            self.study_id = self.storage.create_new_study([direction], name)
        except Exception as error:
            _log.warning("%s cannot be written, the study goes on without it: %s", path, error)
            self.storage = None

    @_never_fatal
    def copy(self, trials: list[FrozenTrial]) -> None:
        """Write trials of earlier sessions."""
        for trial in trials:
            self.storage.create_new_trial(self.study_id, template_trial=trial)

    @_never_fatal
    def begin(self, asked: optuna.Trial) -> None:
        """Write a trial that begins, with its parameters."""
        running = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=asked.params,
            distributions=asked.distributions,
            user_attrs=asked.user_attrs,
        )
        self.ids[asked.number] = self.storage.create_new_trial(self.study_id, template_trial=running)

    @_never_fatal
    def report(self, asked: optuna.Trial, epoch: int, value: float) -> None:
        """Write one epoch of a trial."""
        self.storage.set_trial_intermediate_value(self.ids[asked.number], epoch, value)

    @_never_fatal
    def end(self, asked: optuna.Trial, state: TrialState, value: float | None) -> None:
        """Write how a trial ended."""
        values = None if value is None else [value]
        self.storage.set_trial_state_values(self.ids.pop(asked.number), state, values)
