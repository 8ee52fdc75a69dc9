"""Read a study's folder: records, options, task, and whether it was forced to resume."""

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


def load_study(path: str | Place) -> dict[str, Any]:
    """Return the content of ``study.json`` in a folder, or at the URL of one; InputError if no study is there."""
    folder = open_place(path)
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no study here ({STUDY_FILE} is missing)")
    return read_json(folder / STUDY_FILE)


def load_records(path: str | Place) -> list[TrialRecord]:
    """Return the records of a study, without CC per voxel."""
    load_study(path)
    return read_records(open_place(path))


def load_trials(path: str | Place) -> pd.DataFrame:
    """Return the trials of a study, also while it runs, one row per trial with the documented columns."""
    return trials_frame(load_records(path))


def load_options(path: str | Place) -> dict[str, Any]:
    """Return the options that a study recorded."""
    return load_study(path).get("options", {})


def load_delta(path: str | Place) -> float:
    """Return the smallest effect that matters, in CC, as the study recorded it."""
    return float(load_options(path).get("delta", DELTA))


def load_task(path: str | Place) -> str:
    """Return the task of a study: ``encoding``, or one on text alone."""
    return str(load_study(path).get("task", ENCODING))


def is_adaptive(options: dict[str, Any]) -> bool:
    """Whether later trials of a study depended on the scores of earlier ones, by its recorded options."""
    return options.get("sampler", "tpe") in ADAPTIVE or options.get("scheduler", NO_SCHEDULER) != NO_SCHEDULER


def forced_lines(path: str | Place) -> list[str]:
    """Return one line per forced resumption: from which trial on scores may not be comparable."""
    lines = []
    for forced in load_study(path).get("forced", []):
        names = ", ".join(difference["what"] for difference in forced["differences"])
        lines.append(
            f"note: trials from {forced['first_trial']} on may not be comparable with earlier ones: the study was "
            f"forced to resume ({forced['at']}) although it differs in {names} (see {STUDY_FILE})"
        )
    return lines
