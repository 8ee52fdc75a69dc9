"""One self-contained HTML page of a study: verdict, figures, trials, methods, provenance, warnings.

Nothing in it comes from the network, and its policy forbids that anything could; all that a study names (stories,
spaces, texts) is escaped, and figures are images, in which no script can run.
"""

import base64
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bert_encoding.core.errors import in_one_line
from bert_encoding.core.storage import Place, atomic_path, naming_full_disk, open_place
from bert_encoding.trial.record import read_records
from study.report.figures.figures import Drawn, draw_all, left_out
from study.report.page import Page, make_page
from study.results.evidence import Evidence
from study.results.gather import gather
from study.results.load import load_delta

REPORT_FILE, FIGURES_FOLDER = "report.html", "figures"
LARGEST_SVG_BYTES = 1_000_000  # a drawing of more parts is shown as pixels
TEMPLATES = Path(__file__).parent / "templates"

logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """A figure in the page; ``source`` is a data: URL."""

    title: str
    caption: str
    alt: str
    source: str


def write_report(path: str | Place, evidence: Evidence | None = None) -> Place:
    """Write ``report.html`` and the folder ``figures`` beside ``study.json``, also of a study that is still running.

    A figure that cannot be drawn is told in the report's warnings.

    Parameters
    ----------
    path : a folder, or the URL of one in object storage
    evidence : what ``gather`` returned, if that has been done

    Raises
    ------
    InputError
        if no study is there, or it may not be written.
    """
    study = open_place(path)
    evidence = gather(study, load_delta(study)) if evidence is None else evidence
    html = render(make_page(study, evidence, read_records(study), *draw(study, evidence)))
    file = study / REPORT_FILE
    with naming_full_disk(study), atomic_path(file) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return file


def report_lines(path: str | Place, evidence: Evidence | None = None) -> list[str]:
    """Write the report and say where it lies; a report that fails is one line, and loses nothing."""
    try:
        return [f"report: {write_report(path, evidence)}"]
    except Exception as error:  # whatever it is, the study's results are kept
        logger.debug("the report failed", exc_info=True)
        return [f"note: no report was written: {in_one_line(error)}"]


class Drawing(NamedTuple):
    """The figures of a page, what there was nothing to draw of and why, and what went wrong."""

    pictures: list[Picture]
    absent: list[str]
    troubles: list[str]


def draw(study: Place, evidence: Evidence) -> Drawing:
    """Draw the figures into the study's folder ``figures``."""
    troubles: list[str] = []

    def failed(title: str, error: Exception) -> None:
        logger.debug("a figure failed", exc_info=error)
        troubles.append(f"The figure \u201c{title}\u201d could not be drawn: {in_one_line(error)}")

    try:
        with naming_full_disk(study):
            pictures = [_picture(drawn) for drawn in draw_all(evidence, study / FIGURES_FOLDER, failed)]
        return Drawing(pictures, [f"{one.title}: {one.reason}" for one in left_out(evidence)], troubles)
    except Exception as error:  # a page without figures is better than none
        logger.debug("figures failed", exc_info=True)
        return Drawing([], [], [f"The figures could not be drawn: {in_one_line(error)}"])


def _picture(drawn: Drawn) -> Picture:
    """Embed a figure; an image's own styles and scripts are none of the page's."""
    svg = drawn.svg.read_bytes()
    kind, content = ("svg+xml", svg) if len(svg) <= LARGEST_SVG_BYTES else ("png", drawn.png.read_bytes())
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(drawn.title, drawn.caption, drawn.alt, source)


def render(page: Page) -> str:
    """Return the page as HTML; equal pages give equal text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    css, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        page=page, css=css, script=script, policy=content_policy(css, script)
    )


def content_policy(css: str, script: str) -> str:
    """Return the Content-Security-Policy that allows this style and this script, images in the page, and no more."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_digest(css)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
