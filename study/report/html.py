"""One self-contained HTML page per study: verdicts, figures, trials, methods, provenance, warnings.

The page loads nothing from the network, and its policy forbids it. Every name that a user chose (stories, spaces,
texts) is escaped, and figures are images, in which no script can run.
"""

import base64
import hashlib
import logging
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bert_encoding.core.errors import in_one_line
from bert_encoding.core.storage import Place, atomic_path, naming_full_disk, open_place
from bert_encoding.trial.record import read_records
from study.report.figures.figures import Drawn, draw_all
from study.report.figures.style import NothingToDraw
from study.report.page import make_page
from study.results.evidence import Evidence
from study.results.gather import gather
from study.results.load import load_delta

REPORT_FILE, FIGURES_FOLDER = "report.html", "figures"
LARGEST_SVG_BYTES = 1_000_000  # larger drawings are embedded as PNG
TEMPLATES = Path(__file__).parent / "templates"

logger = logging.getLogger(__name__)


def write_report(path: str | Place, evidence: Evidence | None = None) -> Place:
    """Write ``report.html`` and the folder ``figures`` next to ``study.json``, also while the study runs.

    A figure that cannot be drawn is named in the report's warnings. ``path`` is as in ``load_study``, with its error;
    ``evidence`` is of ``gather``, if that has been done. InputError if the report may not be written.
    """
    study = open_place(path)
    evidence = gather(study, load_delta(study)) if evidence is None else evidence
    html = render(make_page(study, evidence, read_records(study), *_draw(study, evidence)))
    file = study / REPORT_FILE
    with naming_full_disk(study), atomic_path(file) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return file


def report_lines(path: str | Place, evidence: Evidence | None = None) -> list[str]:
    """Write the report and return its place, or the reason why it failed, in one line."""
    try:
        return [f"report: {write_report(path, evidence)}"]
    except Exception as error:  # the study's results are stored already
        logger.debug("the report failed", exc_info=True)
        return [f"note: no report was written: {in_one_line(error)}"]


def _draw(study: Place, evidence: Evidence) -> tuple[list[Drawn], list[str], list[str]]:
    """Draw the figures into the study's folder; return them, the ones without data and why, and failures."""
    without_data: list[str] = []
    failures: list[str] = []

    def skipped(title: str, error: Exception) -> None:
        if isinstance(error, NothingToDraw):
            without_data.append(f"{title}: {error}")
            return
        logger.debug("a figure failed", exc_info=error)
        failures.append(f"The figure \u201c{title}\u201d could not be drawn: {in_one_line(error)}")

    try:
        with naming_full_disk(study):
            return draw_all(evidence, study / FIGURES_FOLDER, skipped), without_data, failures
    except Exception as error:  # a page without figures is better than none
        logger.debug("figures failed", exc_info=True)
        return [], [], [f"The figures could not be drawn: {in_one_line(error)}"]


def _image(drawn: Drawn) -> str:
    """Return a figure as a data: URL; inside an image its own styles and scripts do not affect the page."""
    svg = drawn.svg.read_bytes()
    kind, content = ("svg+xml", svg) if len(svg) <= LARGEST_SVG_BYTES else ("png", drawn.png.read_bytes())
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(page: dict[str, Any]) -> str:
    """Return the page as HTML; equal pages give equal text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    css, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(css)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html")
    return template.render(page=page, css=css, script=script, policy=policy, image=_image)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
