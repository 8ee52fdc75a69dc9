"""What lies in a study's folder: its records, its task, and whether it was forced to go on."""

from typing import Any

import pandas as pd

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.core.names import ENCODING, STUDY_FILE
from bert_encoding.core.storage import Place, open_place
from bert_encoding.trial.record import TrialRecord, read_records
from bert_encoding.trial.tables import trials_frame
from study.setup.delta import DELTA
from study.setup.samplers import NO_SCHEDULER

ADAPTIVE = ("tpe", "gp", "cmaes")


def load_trials(path: str | Place) -> pd.DataFrame:
    """Return the trials of a study, a row each with the documented columns, from its records (also while it runs).

    Raises
    ------
    InputError
        if ``path``, a folder or the URL of one in object storage, holds no study.
    """
    return trials_frame(load_records(path))


def load_options(path: str | Place) -> dict[str, Any]:
    """Return the options that a study recorded.

    Raises
    ------
    InputError
        if no study is there.
    """
    file = open_place(path) / STUDY_FILE
    if not file.is_file():
        raise InputError(f"{open_place(path)}: no study here ({STUDY_FILE} is missing)")
    found: dict[str, Any] = read_json(file).get("options", {})
    return found


def is_adaptive(options: dict[str, Any]) -> bool:
    """Whether later trials of a study depended on the scores of earlier ones, by its recorded options."""
    return options.get("sampler", "tpe") in ADAPTIVE or options.get("scheduler", NO_SCHEDULER) != NO_SCHEDULER


def load_delta(path: str | Place) -> float:
    """Return the CC below which, by what was set when the study began or went on, an effect does not matter."""
    return float(load_options(path).get("delta", DELTA))


def load_records(path: str | Place) -> list[TrialRecord]:
    """Return the records of a study, without their CC.

    Raises
    ------
    InputError
        if ``path``, a folder or the URL of one in object storage, holds no study.
    """
    folder = open_place(path)
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no study here ({STUDY_FILE} is missing)")
    return read_records(folder)


def load_task(path: str | Place) -> str:
    """Return what a study is about: ``encoding``, or a task on text alone."""
    return str(read_json(open_place(path) / STUDY_FILE).get("task", ENCODING))


def forced_lines(path: str | Place) -> list[str]:
    """Say of a study that was forced to go on which of its trials may not compare."""
    lines = []
    for forced in read_json(open_place(path) / STUDY_FILE).get("forced", []):
        names = ", ".join(one["what"] for one in forced["differences"])
        lines.append(
            f"note: trials from {forced['first_trial']} on may not compare with those before: the study was forced to "
            f"go on ({forced['at']}) although it differs in {names} ({STUDY_FILE} tells how)"
        )
    return lines
