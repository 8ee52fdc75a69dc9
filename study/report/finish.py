"""What a study ends with: its verdicts, printed and kept in ``summary.json``, and its report."""

import logging

from rich.console import Console

from bert_encoding.core.errors import in_one_line
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.storage import Place
from study.report.html import report_lines
from study.results.evidence import Evidence
from study.results.gather import gather, verdict_record
from study.results.load import load_delta, load_options
from study.results.printing import print_verdicts
from study.setup.delta import delta_note

SUMMARY_FILE = "summary.json"

logger = logging.getLogger(__name__)


def print_answer(console: Console, study: Place, delta: float | None = None) -> None:
    """Print the verdicts, keep them in the summary if there is one, write the report and say where it lies.

    Whatever goes wrong here is one line, for the study's results are kept and the answer can be had again from them.

    Parameters
    ----------
    delta : CC below which an effect does not matter; None for what the study recorded
    """

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    try:
        found = gather(study, load_delta(study) if delta is None else delta)
    except Exception as error:
        logger.debug("no verdict", exc_info=True)
        tell(f"note: no verdict and no report: {in_one_line(error)}")
        return
    print_verdicts(console, found.verdicts)
    if found.verdicts and (note := delta_note(load_options(study), found.verdicts[0].delta)):
        tell(f"note: {note}")
    try:
        keep_verdicts(study, found)
    except Exception as error:
        logger.debug("the summary was not written", exc_info=True)
        tell(f"note: the verdicts are not in {SUMMARY_FILE}: {in_one_line(error)}")
    for line in report_lines(study, found):
        tell(line)


def keep_verdicts(study: Place, found: Evidence) -> None:
    """Put the verdicts into ``summary.json``, which a session leaves at its end; nothing where there is none yet."""
    file = study / SUMMARY_FILE
    if file.is_file():
        write_json(file, read_json(file) | {"verdict": verdict_record(found.verdicts)})
