"""The report: escaped, self-contained, and correct for every kind and state of a study."""

import base64
import hashlib
import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pandas as pd
import pytest
from fake_study import SMALL, Truth, fake_records, tables
from make_report import (
    BASELINES,
    HOSTILE,
    RANK,
    SEARCHED,
    drawing,
    evidence_of,
    hostile,
    record,
    study_json,
    write_study,
)

from bert_encoding.core.storage import ObjectPath, Place, atomic_path
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import trials_frame
from study.report import html as report
from study.report.figures.figures import Drawn
from study.report.html import render, report_lines, write_report
from study.report.page import make_page
from study.report.tables import OUTCOMES, cell, trial_sheet
from study.results.evidence import Evidence, Levels
from study.results.rank_tables import used_trials
from study.results.slopes import slope_table

__all__ = ["hostile"]  # a fixture


TEXT_DATA = {"source": "/data/reviews", "n_texts": 1000, "classes": {"neg": 500, "pos": 500}, "max_length": 256}
TEXT_STUDY = {
    "data": TEXT_DATA | {"fingerprint": "f2", "notes": []},
    "voxels": {"asked": "none", "key": 256},
    "splits": [{"training": ["800 texts (1234)"], "held-out": ["200 texts (5678)"]}],
}


RECORDS = [*BASELINES, *SEARCHED]


def with_options(**options: Any) -> dict[str, Any]:
    """Content of ``study.json`` with other options."""
    return study_json(options=study_json()["options"] | options)


def page_of(folder: Path, study: dict[str, Any], records: list[TrialRecord], **changes: Any) -> str:
    """The HTML of a study on disk, without figures."""
    write_study(folder, study, records)
    return render(make_page(folder, evidence_of(folder, **changes), records))


def parsed(html: str) -> Element:
    """The page, read strictly: once its void elements are closed, it is XML, in which no attribute stands twice."""
    return ElementTree.fromstring(re.sub(r"<((?:meta|link|img|input)\b[^>]*)>", r"<\1/>", html))


def text(element: Element) -> str:
    return "".join(element.itertext())


def texts(element: Element, *tags: str) -> list[str]:
    """The texts of all elements inside with these tags."""
    return [text(node) for node in element.iter() if node.tag in tags]


def section(root: Element, name: str) -> Element:
    return next(node for node in root.iter("section") if node.attrib["id"] == name)


def table_rows(section: Element) -> list[list[Element]]:
    return [list(row) for row in next(section.iter("table")).iter("tr")]


def definitions(section: Element) -> dict[str, str]:
    return dict(zip(texts(section, "dt"), texts(section, "dd"), strict=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """The page of a study of three trials."""
    return parsed(page_of(tmp_path_factory.mktemp("page") / "study", study_json(), RECORDS))


def test_names_chosen_by_users_are_escaped(hostile: Path) -> None:
    html = hostile.read_text()
    root = parsed(html)
    assert texts(root, "script") == [(report.TEMPLATES / "report.js").read_text()]
    assert html.lower().count("<script") == 1
    assert html.count(HOSTILE) == 0
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 30
    for node in root.iter():
        assert not [name for name in node.attrib if name.startswith("on")], node.tag
        assert node.tag in ALLOWED, node.tag
    (image,) = root.iter("img")
    assert image.attrib["alt"] == f"Alt {HOSTILE}\"'"


ALLOWED = set(
    "html head meta title link style body header h1 h2 h3 p nav ul li a main section article div table caption thead "
    "tbody tr th td details summary dl dt dd pre code figure img label input figcaption footer script strong".split()
)


def test_page_needs_and_allows_no_network(hostile: Path) -> None:
    root = parsed(hostile.read_text())
    (policy,) = (meta.attrib["content"] for meta in root.iter("meta") if "http-equiv" in meta.attrib)
    style, script = texts(root, "style", "script")
    digests = [hashlib.sha256(content.encode()).digest() for content in (style, script)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {hashes[0]}; script-src {hashes[1]}; base-uri 'none'; "
        "form-action 'none'"
    )
    links = [node.attrib[name] for node in root.iter() for name in ("src", "href") if name in node.attrib]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|WebSocket|import\(", style + script)


def test_page_is_well_formed_and_accessible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_all", lambda *arguments: [drawing(tmp_path)])
    folder = write_study(tmp_path / "study", study_json(), RECORDS)
    html = write_report(folder, evidence_of(folder)).read_text()
    assert html.lstrip().startswith("<!DOCTYPE html>")
    root = parsed(html)
    assert (root.tag, root.attrib["lang"], texts(root, "title")) == ("html", "en", ["Study mine"])
    levels = [int(node.tag[1]) for node in root.iter() if node.tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(node.attrib["alt"].strip() for node in root.iter("img"))
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert {node.attrib["href"] for node in root.iter("a")} == {f"#{name}" for name in ids}
    assert ids == ["verdict", "figures", "trials", "methods", "provenance", "warnings"]
    (terms,) = (node for node in root.iter("details") if node.get("class") == "terms")
    assert list(definitions(terms)) == ["CC", "Held-out", "Frozen", "Baseline", "Delta", "Fold", "Noise ceiling"]
    for table in root.iter("table"):
        assert len(list(table.iter("caption"))) == 1
        assert len({len(row) for row in table.iter("tr")}) == 1
        assert {node.attrib["scope"] for node in table.iter("th")} <= {"col", "row"}


def test_figure_is_embedded_as_svg_or_large_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawing(tmp_path)
    monkeypatch.setattr(report, "draw_all", lambda *arguments: [figure])
    folder = write_study(tmp_path / "study", study_json(), BASELINES)
    for largest, kind, file in ((10**6, "svg+xml", figure.svg), (10, "png", figure.png)):
        monkeypatch.setattr(report, "LARGEST_SVG_BYTES", largest)
        (image,) = parsed(write_report(folder).read_text()).iter("img")
        head, _, content = image.attrib["src"].partition(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(content) == file.read_bytes()
        assert image.attrib["alt"] == "Alt rank\"'"


def test_trial_table_holds_every_trial_best_first(page: Element) -> None:
    rows = table_rows(section(page, "trials"))
    names = [text(cell) for cell in rows[0]]
    assert names[:6] == ["trial_id", "phase", "status", "method", "cc_mean", "rank"]
    column = names.index("cc_mean")
    assert [text(row[0]) for row in rows[1:]] == ["0002", "0001", "baseline-frozen", "baseline-word_rate", "0003"]
    assert [text(row[column]) for row in rows[1:]] == ["0.1235", "0.1200", "0.1000", "0.0400", ""]
    assert [row[column].attrib["data-sort"] for row in rows[1:]] == ["0.1234567", "0.12", "0.1", "0.04", ""]
    assert rows[0][column].attrib == {"scope": "col", "class": "number", "aria-sort": "descending"}
    assert [text(row[names.index("rank")]) for row in rows[1:]] == ["16", "2", "", "", "64"]
    assert "accuracy" not in names


def test_trial_table_of_a_loss_is_ascending() -> None:
    records = [replace(record(str(i)), scores={"mlm_loss_heldout": loss}) for i, loss in enumerate([3, 1, 2])]
    table = trial_sheet(trials_frame(records), "adapt")
    column = [item.name for item in table.columns].index("mlm_loss_heldout")
    assert [row[column].text for row in table.rows] == ["1", "2", "3"]
    assert table.columns[column].sorted == "ascending"


@pytest.mark.parametrize(
    ("value", "text", "sort"),
    [
        (0.12345678, "0.1235", "0.12345678"),
        (2e-4, "0.0002", "0.0002"),
        (123456.7, "1.23e+05", "123456.7"),
        (16, "16", "16.0"),
        (2.0, "2", "2.0"),
        (0.0, "0", "0.0"),
        (-0.0005, "-0.0005", "-0.0005"),
        (None, "", ""),
        (pd.NA, "", ""),
        (float("nan"), "", ""),
        (True, "True", "True"),
        ("<b>", "<b>", "<b>"),
        ((1, 2), "(1, 2)", "(1, 2)"),
    ],
)
def test_cell_shows_four_decimals_and_sorts_by_the_full_value(value: Any, text: str, sort: str) -> None:
    assert cell(value) == (text, sort)


PENDING = "still to be confirmed with fresh seeds and on the test stories."


def banner(root: Element) -> str:
    return " ".join(" ".join(text(node) for node in root.iter("div") if node.get("class") == "banner").split())


@pytest.mark.parametrize(
    ("options", "records", "message"),
    [
        ({"trials": 12}, RECORDS, "3 of 12 searched trials have ended."),
        ({"trials": 3}, SEARCHED, "There is no baseline yet to compare with."),
        ({"trials": 3, "confirm": 1}, RECORDS, f"The best configuration is {PENDING}"),
        ({"trials": 3, "confirm": 2}, RECORDS, f"The best 2 configurations are {PENDING}"),
        ({"trials": 3}, RECORDS, ""),
        ({"trials": 3, "confirm": 1}, [*BASELINES, *SEARCHED, record("confirm-0002-seed9", None, "confirm")], ""),
    ],
)
def test_banner_names_what_an_unfinished_study_lacks(
    tmp_path: Path, options: dict[str, Any], records: list[TrialRecord], message: str
) -> None:
    start = "This study is incomplete; what follows is provisional. "
    page = page_of(tmp_path / "study", with_options(**options), records)
    assert banner(parsed(page)) == (start + message if message else "")


@pytest.mark.parametrize("records", [[], [record("0001", None)]])
def test_study_without_a_complete_trial_has_one_line(tmp_path: Path, records: list[TrialRecord]) -> None:
    root = parsed(page_of(tmp_path / "study", with_options(trials=5), records, verdicts=(RANK,), levels=Levels()))
    verdict = section(root, "verdict")
    assert texts(verdict, "p") == ["No trial is complete yet, so there is nothing to compare."]
    assert not texts(verdict, "article", "table")
    assert f"{len(records)} of 5 searched trials have ended." in banner(root)


def test_report_of_baselines_alone_and_without_ranks(tmp_path: Path) -> None:
    root = parsed(page_of(tmp_path / "study", with_options(trials=0), BASELINES))
    assert banner(root) == ""
    assert "frozen encoder 0.1000, word rate 0.0400" in text(section(root, "verdict"))
    assert "trained" not in text(section(root, "methods"))
    records = [*BASELINES, record("0001", 0.11, method="full"), record("0002", 0.12, method="full", lr=1e-5)]
    root = parsed(page_of(tmp_path / "full", with_options(trials=2), records))
    assert "all weights" in text(section(root, "methods"))
    assert "rank" not in [text(cell) for cell in table_rows(section(root, "trials"))[0]]


@pytest.mark.parametrize("task", ["classification", "adapt"])
def test_report_of_a_text_only_study(tmp_path: Path, task: str) -> None:
    study = with_options(trials=1) | {"task": task} | TEXT_STUDY
    better, worse = ({"accuracy": a, "mlm_loss_heldout": loss} for a, loss in ((0.9, 2.0), (0.6, 3.0)))
    records = [replace(BASELINES[0], scores=worse), replace(record("0001", 0.5), scores=better)]
    records[1].examples = [{"text": HOSTILE, "label": "pos", "predicted_before": "neg", "predicted_after": "pos"}]
    levels = Levels(worse["accuracy" if task == "classification" else "mlm_loss_heldout"])
    html = page_of(tmp_path / "study", study, records, levels=levels)
    root = parsed(html)
    verdict = text(section(root, "verdict"))
    assert ("accuracy 0.6000" if task == "classification" else "held-out loss 3.0000") in verdict
    assert not texts(section(root, "verdict"), "article")
    assert (HOSTILE in text(section(root, "trials"))) == (task == "classification")
    assert HOSTILE not in html
    assert "voxel" not in text(section(root, "methods")).split("All settings")[0]


def test_verdict_comes_first_with_its_command(page: Element) -> None:
    first = next(page.iter("section"))
    assert first.attrib["id"] == "verdict"
    (article,) = first.iter("article")
    assert texts(article, "p") == [
        "These trials cannot tell. Exploratory: the search was adaptive.",
        "The effect of rank is +0.001 CC (-0.004 to +0.006).",
        "Next command:",
    ]
    assert texts(article, "li", "code") == ["It rests on 2 trials.", RANK.command]


def test_scores_and_finalists_are_below_the_verdict(tmp_path: Path) -> None:
    confirmed = pd.DataFrame({"trial_id": ["0002"], "cc_confirmed": [0.119], "cc_test": [0.21], "low": [pd.NA]})
    levels = Levels(0.1, 0.04, 0.2, None, None, 0.5)
    root = parsed(page_of(tmp_path / "s", study_json(), RECORDS, confirmed=confirmed, levels=levels))
    first, second, *_ = section(root, "verdict").iter("table")
    assert [[text(cell) for cell in row] for row in first.iter("tr")] == [
        ["", "validation", "test"],
        ["frozen encoder", "0.1000", "0.2000"],
        ["word rate", "0.0400", ""],
        ["best of the search (0002)", "0.1235", ""],
        ["winner with fresh seeds (0002)", "0.1190", "0.2100"],
        ["noise ceiling", "", "0.5000"],
    ]
    assert [[text(cell) for cell in row] for row in second.iter("tr")] == [
        ["trial_id", "cc_confirmed", "cc_test"],
        ["0002", "0.1190", "0.2100"],
    ]


def test_every_setting_is_listed_for_trials_and_baselines(page: Element) -> None:
    rows = table_rows(section(page, "methods"))
    assert [text(cell) for cell in rows[0]] == ["setting", "searched trials", "baselines"]
    assert {text(row[0]) for row in rows[1:]} == {field.name for field in fields(TrialConfig)}
    settings = {text(row[0]): [text(cell) for cell in row[1:]] for row in rows[1:]}
    assert settings["rank"] == ["2 and 16", "8"]
    assert settings["method"] == ["lora", "frozen and word_rate"]
    assert settings["lr"] == ["0.0002", "0.0002"]


def test_provenance_names_command_code_and_data(page: Element) -> None:
    provenance = section(page, "provenance")
    rows = definitions(provenance)
    assert texts(provenance, "code") == [study_json()["space"]["source"]]
    assert rows["command"] == "study/run.py --space 'lora rank'"
    assert rows["commit"] == "0123456789abcdef"
    assert rows["packages"] == "torch 2.13.0 and numpy 2.4.6"
    assert rows["data"] == "/data/lab (fingerprint f1)"
    assert rows["fit"] == "a, b, c"
    assert "sampler grid; scheduler none; seed 0" in rows["options"]


@pytest.mark.parametrize(("requested", "expected"), [("auto", "bfloat16"), ("float32", "float32"), (None, "float32")])
def test_provenance_names_the_precision_of_word_vectors_and_training(
    requested: str | None, expected: str, tmp_path: Path
) -> None:
    """None: recorded before this setting existed."""
    study = study_json()
    study["config"] |= {"embed_precision": requested}
    if requested is None:
        del study["config"]["embed_precision"]
    root = parsed(page_of(tmp_path / "study", study, BASELINES))
    rows = definitions(section(root, "provenance"))
    assert (rows["precision of training"], rows["precision of word vectors"]) == ("bfloat16", expected)
    assert f"with matrix products in {expected}; a word" in text(section(root, "methods"))


def test_warnings_and_notes_of_a_study(tmp_path: Path) -> None:
    study = study_json(
        takeovers=[{}],
        git={"commit": "01", "dirty": True},
        data=study_json()["data"] | {"notes": ["1 story lacks responses"]},
    )
    records = [*BASELINES, *(replace(trial, notes=["shared"]) for trial in SEARCHED)]
    look = {"look": 2, "looks": [{"study": "older", "at": "2026-01-01"}], "n_searched": 3, "winner": "0002"}
    looks = [look | {"seeds": [9], "finalists": [], "test_stories": ["e"]}]
    evidence = evidence_of(write_study(tmp_path / "study", study, records), warnings=("A warning.", "A warning."))
    evidence = evidence._replace(facts=evidence.facts._replace(looks=looks))
    pages = [make_page(tmp_path / "study", evidence, records, failures=["No figure"]) for _ in range(2)]
    assert render(pages[0] | {"written": ""}) == render(pages[1] | {"written": ""})
    assert pages[0]["warnings"] == [
        "A warning.",
        "These test stories had been used before by study older (2026-01-01).",
        "Trial 0003 failed: ValueError: loss [nan] at step 3",
        "The code had uncommitted changes: its fingerprint identifies it, the commit does not.",
        "The study was taken over 1 time from a run that seemed to be active.",
        "1 story lacks responses",
        "No figure",
    ]
    assert pages[0]["notes"] == ["shared (trials 0001, 0002 and 0003)"]


def test_failing_report_is_one_line_and_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = report_lines(tmp_path)
    assert line.startswith(f"note: no report was written: {tmp_path}: no study here")
    folder = write_study(tmp_path / "study", study_json(), BASELINES)
    (folder / "report.html").write_text("old")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("no\nfigure")

    with monkeypatch.context() as patch:
        patch.setattr(report, "render", fail)
        patch.setattr(report, "draw_all", lambda *arguments: [])
        assert report_lines(folder) == ["note: no report was written: ZeroDivisionError: no"]
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(report, "draw_all", fail)
    assert report_lines(str(folder)) == [f"report: {folder / 'report.html'}"]
    warnings = text(section(parsed((folder / "report.html").read_text()), "warnings"))
    assert "The figures could not be drawn: ZeroDivisionError: no" in warnings


def test_report_in_object_storage(bucket: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(bucket / "out" / "mine", study_json(), BASELINES)

    def draw_there(evidence: Evidence, folder: Place, skipped: object) -> list[Drawn]:
        here = drawing(tmp_path)
        for file in (here.png, here.svg):
            with atomic_path(folder / file.name) as temporary:
                temporary.write_bytes(file.read_bytes())
        return [here._replace(png=folder / "one.png", svg=folder / "one.svg")]

    monkeypatch.setattr(report, "draw_all", draw_there)
    assert report_lines(str(study)) == [f"report: {study / 'report.html'}"]
    (image,) = parsed((study / "report.html").read_text()).iter("img")
    content = image.attrib["src"].partition(",")[2]
    assert base64.b64decode(content) == (study / "figures" / "one.svg").read_bytes()


def test_every_outcome_of_a_slope_is_shown_in_words(tmp_path: Path) -> None:
    trials, stories = tables(fake_records(Truth(effect=0.005), SMALL, 0))
    used = used_trials(trials)[0]
    slopes = slope_table(used.assign(scaling_rule=["a", "b"] * (len(used) // 2)), stories)
    assert set(slopes["outcome"]) == set(OUTCOMES)
    root = parsed(page_of(tmp_path / "s", study_json(), RECORDS, slopes=slopes))
    table = next(node for node in root.iter("table") if "Slope per doubling of rank" in text(node))
    cells = set(texts(table, "td", "th"))
    assert set(OUTCOMES.values()) <= cells and not set(OUTCOMES) & cells
