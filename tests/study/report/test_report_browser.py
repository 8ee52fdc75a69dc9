"""The report in headless Chromium: no requests, no errors, legible, sortable by mouse and keyboard."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Page, browsing, find_chromium
from make_report import BASELINES, HOSTILE, drawing, evidence_of, hostile, record, study_json, write_study

from study.report import html as report
from study.report.figures.figures import Drawn
from study.report.html import write_report

__all__ = ["hostile"]  # a fixture
pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed (Debian's package chromium): the report is not opened"
)
N_TRIALS = 60
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def scores() -> list[float | None]:
    """CC of the searched trials; every seventh failed."""
    drawn = np.random.default_rng(0).normal(0.1, 0.05, N_TRIALS)
    return [None if i % 7 == 3 else float(cc) for i, cc in enumerate(drawn)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, scores: list[float | None]) -> Path:
    """A report of many trials, with two figures, one of them wide."""
    folder = tmp_path_factory.mktemp("plain")
    ranks = [2 ** (1 + i % 6) for i in range(N_TRIALS)]
    searched = [record(f"{i + 1:04d}", cc, rank=ranks[i], lr=1e-4 * (1 + i % 3)) for i, cc in enumerate(scores)]
    study = study_json(options=study_json()["options"] | {"trials": N_TRIALS})
    write_study(folder / "study", study, [*BASELINES, *searched])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_all", lambda *arguments: [drawing(folder), pixels(folder)])
        return Path(str(write_report(folder / "study", evidence_of(folder / "study"))))


def pixels(folder: Path) -> Drawn:
    """A figure drawn by matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    axes.plot([1, 2, 4], [0.1, 0.2, 0.15], color="#0000ff", linewidth=9)
    axes.set_xlabel("rank of the adapter")
    for ending in ("svg", "png"):
        figure.savefig(folder / f"two.{ending}")
    return Drawn(
        "two", folder / "two.png", folder / "two.svg", "Rank", "CC against rank, n = 3", "CC rises, then falls"
    )


def console_events(page: Page) -> list[Any]:
    """Console messages: errors, policy violations, exceptions, dialogs."""
    page.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    return [event for kind in kinds for event in page.named(kind)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_page_loads_without_requests_and_errors_and_runs_no_script_in_a_name(
    name: str, width: int, browser: Page, request: pytest.FixtureRequest
) -> None:
    file: Path = request.getfixturevalue(name)
    browser.open(file, width)
    assert console_events(browser) == []
    urls = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert urls[0] == file.resolve().as_uri()
    assert all(url.startswith("data:") for url in urls[1:])
    assert browser.value("document.scripts.length") == 1
    if name == "hostile":
        assert HOSTILE in browser.value("document.querySelector('h1').textContent")
        assert HOSTILE in browser.value("document.querySelector('#trials tbody').textContent + document.title")


def test_policy_is_in_force(browser: Page, plain: Path) -> None:
    """Forbidden actions are refused, so that the test above can fail."""
    browser.open(plain)
    browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')")
    browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    browser.value("document.body.setAttribute('style', 'color: red')")
    browser.value("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.ran = 2\">')")
    browser.value("document.body.lastChild.click()")
    assert browser.value("window.ran === undefined") is True
    messages = " ".join(event["entry"]["text"] for event in console_events(browser))
    for rule in ("img-src data:", "script-src", "style-src"):
        assert rule in messages, rule
    fetched = "fetch('http://127.0.0.1:9/').then(() => 'fetched', error => 'refused')"
    assert browser.value(fetched) == "refused"


@pytest.mark.parametrize("width", WIDTHS)
def test_only_boxes_scroll_sideways_and_commands_wrap(browser: Page, plain: Path, hostile: Path, width: int) -> None:
    for file in (plain, hostile):
        browser.open(file, width)
        browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert browser.value("document.documentElement.scrollWidth") <= width
        outside = """[...document.querySelectorAll('body *')].filter(node => !node.closest('.box, .canvas, pre')
            && node.getBoundingClientRect().right > innerWidth + 0.5).map(node => node.outerHTML.slice(0, 90))"""
        assert browser.value(outside) == []
    assert browser.value("document.querySelector('#trials .box').scrollWidth") > 400
    browser.open(plain, width)
    browser.value("document.querySelector('.verdict pre code').textContent += ' --name ' + 'x'.repeat(300)")
    assert browser.value("(b => b.scrollWidth <= b.clientWidth)(document.querySelector('.verdict pre'))") is True


def test_figures_fit_a_small_screen_and_can_be_enlarged(browser: Page, plain: Path) -> None:
    sizes = "[...document.images].map(node => [node.clientWidth, node.parentElement.clientWidth])"
    browser.open(plain, 400)
    assert all(width <= room for width, room in browser.value(sizes))
    label = "getComputedStyle(document.querySelector('.enlarge')).display"
    assert browser.value(label) == "block"
    browser.value("document.querySelectorAll('.enlarge input')[1].click()")
    assert [width > room + 200 for width, room in browser.value(sizes)] == [False, True]
    assert browser.value("document.documentElement.scrollWidth") <= 400, "the box scrolls, not the page"
    browser.open(plain, 1280)
    assert browser.value(label) == "none"


CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const rgba = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = node => {
    for (let e = node; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')]
    .filter(node => [...node.childNodes].some(t => t.nodeType === 3 && t.data.trim()) && node.checkVisibility())
    .map(node => {
      const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
      return [node.outerHTML.slice(0, 60), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
              parseFloat(getComputedStyle(node).fontSize)];
    });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_text_is_legible(browser: Page, plain: Path, width: int, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, success criterion 1.4.3), and no letters below 13 pixels."""
    browser.open(plain, width, scheme)
    texts = browser.value(CONTRAST)
    assert len(texts) > 200
    assert [(html, contrast, size) for html, contrast, size in texts if contrast < 4.5 or size < 13] == []
    page = browser.value("getComputedStyle(document.documentElement).backgroundColor")
    assert (page == "rgb(255, 255, 255)") == (scheme == "light")


def test_figures_keep_their_own_styles_and_alternative_texts(browser: Page, plain: Path) -> None:
    browser.open(plain)
    images = browser.value(
        "[...document.images].map(node => [node.complete, node.naturalWidth > 0, node.clientWidth > 80, node.alt])"
    )
    assert images == [[True, True, True, "Alt rank\"'"], [True, True, True, "CC rises, then falls"]]
    colours = browser.value("""[...document.images].map(node => {
      const canvas = document.createElement('canvas');
      [canvas.width, canvas.height] = [node.naturalWidth, node.naturalHeight];
      const context = canvas.getContext('2d');
      context.drawImage(node, 0, 0);
      const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
      const seen = new Set();
      for (let at = 0; at < data.length; at += 4) seen.add(data.slice(at, at + 4).join());
      return [seen.has('255,0,0,255'), seen.has('0,0,255,255')];
    })""")
    assert colours == [[True, False], [False, True]]


def column(page: Page, name: str) -> list[str]:
    """The texts of a column of the trial table, top to bottom."""
    return page.value(f"""(() => {{
      const table = document.querySelector('#trials table');
      const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === '{name}');
      return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
    }})()""")


def click(page: Page, name: str) -> None:
    page.value(f"[...document.querySelectorAll('#trials th button')].find(b => b.textContent === '{name}').click()")


def sorted_by(page: Page) -> list[list[str]]:
    return page.value("[...document.querySelectorAll('#trials [aria-sort]')].map(c => [c.textContent, c.ariaSort])")


def test_numbers_sort_as_numbers_and_empty_cells_last(browser: Page, plain: Path, scores: list[float | None]) -> None:
    browser.open(plain)
    assert sorted_by(browser) == [["cc_mean", "descending"]]
    ids = {f"{i + 1:04d}": cc for i, cc in enumerate(scores)}
    ids |= {trial.trial_id: trial.scores["cc_mean"] for trial in BASELINES}
    best_first = sorted((name for name in ids if ids[name] is not None), key=lambda name: -(ids[name] or 0.0))
    failed = {name for name, cc in ids.items() if cc is None}
    assert column(browser, "trial_id")[: len(best_first)] == best_first
    for order, expected in (("ascending", best_first[::-1]), ("descending", best_first)):
        click(browser, "cc_mean")
        assert sorted_by(browser) == [["cc_mean", order]]
        names = column(browser, "trial_id")
        assert (names[: len(expected)], set(names[len(expected) :])) == (expected, failed)
    click(browser, "rank")
    ranks = column(browser, "rank")
    numbers = [float(rank) if rank else math.inf for rank in ranks]
    assert numbers == sorted(numbers)
    assert ranks[-2:] == ["", ""]
    assert ranks.index("16") > ranks.index("8") > ranks.index("4")


def test_words_sort_as_words_and_equal_rows_keep_their_order(browser: Page, plain: Path) -> None:
    browser.open(plain)
    click(browser, "trial_id")
    names = column(browser, "trial_id")
    assert names == sorted(names)
    click(browser, "phase")
    assert column(browser, "phase") == ["baseline"] * 2 + ["search"] * N_TRIALS
    assert column(browser, "trial_id") == sorted(names[-2:]) + names[:-2]


def test_table_can_be_sorted_by_keyboard(browser: Page, plain: Path) -> None:
    browser.open(plain)
    browser.value("document.querySelector('#trials .box').focus()")
    reached = []
    for _ in range(3):
        browser.press("Tab", 9)
        reached.append(browser.value("document.activeElement.textContent"))
    assert reached == ["trial_id", "phase", "status"]
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", 13, "\r")
    assert sorted_by(browser) == [["status", "ascending"]]
    status = column(browser, "status")
    assert status == sorted(status) and set(status) == {"COMPLETE", "FAILED"}
    browser.press(" ", 32, " ")
    assert sorted_by(browser) == [["status", "descending"]]


def test_print_opens_everything_and_scrolls_nothing(browser: Page, plain: Path) -> None:
    browser.open(plain)
    browser.value("dispatchEvent(new Event('beforeprint'))")
    browser.media("dark", "print")
    assert browser.value("[...document.querySelectorAll('details')].every(part => part.open)") is True
    assert browser.value("getComputedStyle(document.querySelector('.contents')).display") == "none"
    assert browser.value("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    overflow = "[...document.querySelectorAll('.box, pre, .canvas')].map(node => getComputedStyle(node).overflow)"
    assert set(browser.value(overflow)) == {"visible"}
    printed = browser.send("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert len(printed) > 20_000
