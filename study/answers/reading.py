"""What lies in a study's folder: its records, its task, and whether it was forced to go on."""

from bert_encoding.errors import InputError
from bert_encoding.records import ENCODING, STUDY_FILE, TrialRecord, read_json, read_records
from bert_encoding.storage import Place, open_place


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
