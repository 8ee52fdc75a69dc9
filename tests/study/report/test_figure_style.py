"""How figures look: nothing overlaps, files are reproducible and safe, colours suit the colour-blind."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from make_figures import STUDIES, WITHOUT_DATA, contrast, empty, linear_rgb, luminance
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from study.report.figures import search as figure_search
from study.report.figures import style as figure_style
from study.report.figures.figures import FIGURES, Drawn, draw, draw_all
from study.report.figures.style import rank_colours, short, styled
from study.results.evidence import Evidence

SIMILAR = {  # figures laid out like those of another study
    "a small grid": set(FIGURES) - {"time", "parallel"},
    "a sampler": {"gap_by_rank", "confirmed", "history", "importances", "voxels", "voxel_pairs", "time"},
    "missing values": {"gap_by_rank", "history", "importances", "voxels", "voxel_pairs", "time"},
    "one trial": {"gap_by_rank", "importances"},
    "text": {"history", "importances", "time"},
}


def all_figures() -> list[Any]:
    """Each figure of each study."""
    return [
        pytest.param(study, name, marks=[pytest.mark.slow] * (name in SIMILAR.get(study, ())))
        for study in STUDIES
        for name in FIGURES
        if name not in WITHOUT_DATA.get(study, ())
    ]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lay out a figure and return its visible texts."""

    def lay_out(figure: Figure) -> list[Text]:
        drawn: list[Text] = []
        with monkeypatch.context() as patched, styled():
            original = Text.draw
            patched.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), original(self, renderer)))
            figure.draw_without_rendering()
        return [text for text in drawn if text.get_visible() and text.get_text().strip()]

    return lay_out


@pytest.mark.table
@pytest.mark.parametrize(("study", "name"), all_figures())
def test_no_text_overlaps_or_leaves_the_figure(study: str, name: str, texts: Any) -> None:
    picture = draw(name, STUDIES[study])
    figure = picture.figure
    written = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(written) >= 4
    frame = figure.bbox
    for text, box in written:
        assert frame.x0 - 0.5 <= box.x0 and box.x1 <= frame.x1 + 0.5, f"{text!r} leaves the figure sideways"
        assert frame.y0 - 0.5 <= box.y0 and box.y1 <= frame.y1 + 0.5, f"{text!r} leaves the figure"
    for i, (text, box) in enumerate(written):
        for other_text, other_box in written[:i]:
            common = Bbox.intersection(box, other_box)
            assert common is None or min(common.width, common.height) < 1, f"{text!r} covers {other_text!r}"
    for legend in figure.legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "the legend covers the data"
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>")
    assert re.search(r"\bn = \d", picture.caption), picture.caption
    assert re.search(r"\d", picture.alt)
    assert not re.search(r"\bnan\b|<NA>|None|  ", picture.caption + picture.alt)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Drawn]:
    """All figures of the study with long names, in files."""
    return draw_all(STUDIES["long names"], tmp_path_factory.mktemp("figures"))


def test_files_are_no_empty_pictures_share_no_id_and_run_nothing(files: list[Drawn]) -> None:
    assert [figure.name for figure in files] == list(FIGURES)
    ids: set[str] = set()
    for figure in files:
        image = imread(str(figure.png))
        assert image.shape[1] >= 840 and image[..., :3].std() > 0.02, figure.name
        root = ElementTree.fromstring(figure.svg.read_text())
        own = [element.get("id", "") for element in root.iter() if element.get("id")]
        assert len(own) == len(set(own)) > 0
        assert not ids & set(own), "two figures of one page share an id"
        ids |= set(own)
        assert {element.tag.rpartition("}")[2] for element in root.iter()} <= SVG_ELEMENTS
        for element in root.iter():
            for name, value in element.items():
                for target in re.findall(r"url\((.*?)\)", value) + ([value] if name.endswith("href") else []):
                    assert target.startswith("data:image/png;base64,") or target[1:] in own, target
                assert not name.rpartition("}")[2].startswith("on")
        assert "<dc:date>" not in figure.svg.read_text()


SVG_ELEMENTS = {
    "svg", "metadata", "RDF", "Work", "type", "format", "defs", "style", "g", "path", "use", "clipPath", "rect",
    "image", "pattern",
}  # fmt: skip


def test_equal_studies_give_equal_bytes_with_any_user_settings(files: list[Drawn], tmp_path: Path) -> None:
    before = dict(rcParams)
    with rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none", "text.parse_math": True}):
        mine = dict(rcParams)
        again = {figure.name: figure for figure in draw_all(_only(STUDIES["long names"]), tmp_path)}
        assert dict(rcParams) == mine
    assert dict(rcParams) == before
    for figure in [figure for figure in files if figure.name in ("score_by_rank", "rank_by_lr")]:
        assert again[figure.name].png.read_bytes() == figure.png.read_bytes()
        assert again[figure.name].svg.read_bytes() == figure.svg.read_bytes()


def _only(evidence: Evidence) -> Evidence:
    """The tables of two figures: drawing all takes seconds."""
    keep = {name: getattr(evidence, name) for name in ("facts", "levels", "used", "rank_by_lr")}
    by_rank = evidence.by_rank[evidence.by_rank["outcome"] == "cc_mean"]
    return empty()._replace(**keep, by_rank=by_rank)


# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0: colours as seen without one kind of cone, in linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def perceived(colour: Any, deficiency: str) -> np.ndarray:
    """A colour as perceived, in CIE L*a*b*."""
    linear = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear_rgb(colour), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", sorted(DEFICIENCIES))
def test_colours_are_distinct_for_the_colour_blind(deficiency: str) -> None:
    ranks = list(rank_colours([2, 4, 8, 16, 32, 64]).values())
    stages = [colour for colour, _ in figure_search.STAGE_LOOKS]
    for first, second in [*pairwise(ranks), *pairwise(stages), (figure_style.BEST, figure_style.PLAIN)]:
        assert np.linalg.norm(perceived(first, deficiency) - perceived(second, deficiency)) > 10


def test_colours_of_ranks_are_distinct_in_grey_and_legible_on_white() -> None:
    grey = [luminance(colour) for colour in rank_colours([2, 4, 8, 16, 32, 64]).values()]
    assert (np.diff([116 * np.cbrt(value) - 16 for value in grey]) > 7).all()  # lightness, of 100
    assert grey[-1] < 0.6
    scale = [luminance(figure_style.SEQUENTIAL(place)) for place in np.linspace(0, 1, 64)]
    assert (np.diff(scale) > 0).all()
    assert contrast(figure_style.BEST, figure_style.PLAIN) > 2.5
    assert all(contrast(colour, "white") > 2.5 for colour in (figure_style.BEST, figure_style.PLAIN, figure_style.GREY))


def test_markers_lines_and_hatching_repeat_what_colours_show() -> None:
    figure = draw("losses", STUDIES["the whole grid"]).figure
    lines = [line for line in figure.axes[0].get_lines() if line.get_label()[0] != "_"]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == 6
    hatches = {bars[0].get_hatch() for bars in draw("time", STUDIES["a small grid"]).figure.axes[0].containers}
    assert len(hatches) == 4
    patterns = {shape.get_linestyle() for shape in draw("voxels", STUDIES["a small grid"]).figure.axes[0].patches}
    assert len(patterns) == 2


def test_formats_of_names_and_numbers() -> None:
    assert short("abcdefghij", 10) == "abcdefghij"
    assert short("abcdefghijk", 10) == "abcd…ghijk"
    assert short(" a\nb\tc\x00 ") == "a b c"
    numbers = {0: "0", 12345.0: "12345", 0.5: "0.5", 2e-5: "2e-5", 2.5e-4: "2.5e-4", 1e-3: "0.001", 3e-10: "3e-10"}
    assert [figure_style.plain(value) for value in numbers] == list(numbers.values())
    assert figure_style.plain(np.nan) == "unknown"


@pytest.mark.slow
def test_failing_figure_does_not_prevent_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, failures = STUDIES["a small grid"], list[tuple[str, str]]()
    expected = [figure.name for figure in draw_all(evidence, tmp_path / "whole")]

    def fail(evidence: Evidence) -> Any:
        raise ZeroDivisionError("no figure")

    title = FIGURES[expected[0]][0]
    monkeypatch.setitem(FIGURES, expected[0], (title, fail))
    drawn = draw_all(evidence, tmp_path / "rest", lambda title, error: failures.append((title, str(error))))
    assert [figure.name for figure in drawn] == expected[1:]
    assert failures == [(title, "no figure")]
    with pytest.raises(ZeroDivisionError):
        draw_all(evidence, tmp_path / "raised")
