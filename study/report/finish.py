"""The end of a study: its verdicts, printed and stored in ``summary.json``, and its report."""

import logging

from rich.console import Console

from bert_encoding.core.errors import in_one_line
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.storage import Place
from study.report.html import report_lines
from study.results.gather import gather, verdict_record
from study.results.load import load_delta, load_options
from study.results.printing import print_lines, print_verdicts
from study.setup.delta import delta_note

SUMMARY_FILE = "summary.json"

logger = logging.getLogger(__name__)


def print_answer(console: Console, study: Place, delta: float | None = None) -> None:
    """Print the verdicts, store them in ``summary.json`` if there is one, and write the report.

    Any failure here is one printed line: the results are stored, and the answer can be computed from them again.
    ``delta`` is the smallest effect that matters, CC; None for the recorded one.
    """
    try:
        evidence = gather(study, load_delta(study) if delta is None else delta)
    except Exception as error:
        logger.debug("no verdict", exc_info=True)
        print_lines(console, [f"note: no verdict and no report: {in_one_line(error)}"])
        return
    verdicts, summary = evidence.verdicts, study / SUMMARY_FILE
    print_verdicts(console, verdicts)
    if verdicts and (note := delta_note(load_options(study), verdicts[0].delta)):
        print_lines(console, [f"note: {note}"])
    try:
        if summary.is_file():
            write_json(summary, read_json(summary) | {"verdict": verdict_record(verdicts)})
    except Exception as error:
        logger.debug("the summary was not written", exc_info=True)
        print_lines(console, [f"note: the verdicts are not in {SUMMARY_FILE}: {in_one_line(error)}"])
    print_lines(console, report_lines(study, evidence))
