"""The figures of a study, drawn from its tables; only means of what is shown are computed here.

    from study.results.gather import gather
    from study.report.figures.figures import draw_all

    draw_all(gather("results/lora_rank"), Path("figures"))

A figure without data is left out.
"""

from collections.abc import Callable
from typing import NamedTuple

from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import Place, atomic_path, make_folder
from study.report.figures.heat import draw_heat
from study.report.figures.losses import draw_losses
from study.report.figures.parallel import draw_parallel
from study.report.figures.rank import draw_gaps, draw_ranks
from study.report.figures.search import draw_confirmed, draw_history, draw_importances, draw_time
from study.report.figures.style import NothingToDraw, Picture, image_of, one_line, styled
from study.report.figures.voxels import draw_histograms, draw_scatter
from study.results.evidence import Evidence

FIGURES: dict[str, tuple[str, Callable[[Evidence], Picture]]] = {  # name -> title, drawing; in the order of the report
    "score_by_rank": ("Does a higher rank help?", draw_ranks),
    "gap_by_rank": ("Does a higher rank overfit?", draw_gaps),
    "losses": ("Loss in training and on held-out text", draw_losses),
    "rank_by_lr": ("Rank and learning rate", draw_heat),
    "confirmed": ("The finalists, confirmed", draw_confirmed),
    "history": ("The search, trial by trial", draw_history),
    "importances": ("Which settings matter", draw_importances),
    "parallel": ("All trials and their settings", draw_parallel),
    "voxels": ("CC over voxels", draw_histograms),
    "voxel_pairs": ("Tuned against frozen, voxel by voxel", draw_scatter),
    "time": ("Time per trial", draw_time),
}


class Drawn(NamedTuple):
    """A figure in two files. Caption and alt may contain names that a user chose: escape them in HTML."""

    name: str  # of both files, without extension
    png: Place
    svg: Place
    title: str  # for a heading; it is not in the figure
    caption: str  # what is shown, and n
    alt: str  # the content in words and numbers, for screen readers


def draw_all(evidence: Evidence, folder: Place, skipped: Callable[[str, Exception], None] | None = None) -> list[Drawn]:
    """Draw every figure that has data, and write each as PNG and SVG; equal evidence gives equal bytes.

    The folder is created if missing, files of these names are replaced; InputError if it may not be written.
    ``skipped`` is called with title and error of each figure without data (NothingToDraw) or that cannot be drawn;
    without it the latter error is raised.
    """
    make_folder(folder)
    drawn = []
    for name, (title, _) in FIGURES.items():
        try:
            drawn.append(_write(name, title, evidence, folder))
        except InputError:
            raise
        except Exception as error:
            if skipped is not None:
                skipped(title, error)
            elif not isinstance(error, NothingToDraw):
                raise
    return drawn


def draw(name: str, evidence: Evidence) -> Picture:
    """Return one figure, named as in `FIGURES`; raise NothingToDraw without data."""
    with styled():
        return FIGURES[name][1](evidence)


def _write(name: str, title: str, evidence: Evidence, folder: Place) -> Drawn:
    files = {ending: folder / f"{name}.{ending}" for ending in ("png", "svg")}
    picture = draw(name, evidence)
    with styled():
        images = {ending: image_of(picture.figure, ending, name) for ending in files}
    for ending, file in files.items():
        with atomic_path(file) as temporary:
            temporary.write_bytes(images[ending])
    return Drawn(name, files["png"], files["svg"], title, one_line(picture.caption), one_line(picture.alt))
