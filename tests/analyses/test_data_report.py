"""The data check: defects, verdict, printed report, figure and JSON; the commands ``check`` and ``fetch``."""

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import edit_responses, edit_text, make_lab, put
from project import REAL_DATA
from rich.console import Console
from run_commands import refusal, run_command

from bert_encoding.analyses.alignment import SHIFTS, LagProfile
from bert_encoding.analyses.data_report import (
    Report,
    check_dataset,
    draw_lags,
    lag_lines,
    print_report,
    to_json,
    with_responses,
)
from bert_encoding.core.errors import InputError
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.story import TRIMS
from bert_encoding.demo.stories import demo_stories, simulate_listener

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures go under the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A lab folder with a clear lag: more words than the usual small one."""
    return make_lab(tmp_path / "good", n_words=300)


with_nan = put((3, 8), np.nan)


def printed(report: Report) -> str:
    out = StringIO()
    print_report(Console(file=out, width=240), report, "a remark")
    return out.getvalue()


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def with_noise(lab: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted((lab / "subject2").glob("*.npy")):
        edit_responses(lab, file.stem, lambda rows: rng.standard_normal(rows.shape))


def with_other_scales(lab: Path) -> None:
    edit_responses(lab, "beta", lambda rows: 3 * rows)
    edit_responses(lab, "zeta", lambda rows: rows + 100)


def without_valid_voxel(lab: Path) -> None:
    edit_responses(lab, "alpha", put((slice(None), slice(0, 6)), np.nan))
    edit_responses(lab, "beta", put((slice(None), slice(6, 12)), 0.0))


CASES: dict[str, tuple[Callable[[Path], object], str, str]] = {  # change, verdict, the last cause
    "good": (lambda lab: None, "usable", "^$"),
    "masked voxel": (
        lambda lab: edit_responses(lab, "beta", with_nan),
        "usable with these masks",
        r"^subject2: 1 of 12 voxels left out \(1 non-finite, 0 constant in a story\)$",
    ),
    "other scales": (
        with_other_scales,
        "usable, with doubts",
        "^subject2: 2 of 7 stories are not z-scored.*beta, zeta$",
    ),
    "noise": (with_noise, "usable, with doubts", "alignment could not be confirmed"),
    "copied subject": (
        lambda lab: shutil.copytree(lab / "subject2", lab / "subject2_backup"),
        "not usable",
        r"subject subject2_backup's responses to .* are .* subject2 to ",
    ),
    "lost volumes": (
        lambda lab: edit_responses(lab, "beta", put([4, 7], np.nan)),
        "not usable",
        r"beta\.npy: story beta, subject subject2: has no finite voxel: in row 4, 7",
    ),
    "no valid voxel": (without_valid_voxel, "not usable", "has no voxel that is finite and varies in every story"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_and_cause(case: str, good: Path) -> None:
    change, verdict, cause = CASES[case]
    change(good)
    report = check_dataset(open_dataset(good))
    assert (report.verdict, report.exit_code) == (verdict, {"usable": 0, "not usable": 2}.get(verdict, 1))
    assert re.search(cause, ["", *report.survey.left_out, *report.doubts, *report.reasons][-1])
    assert report.profiles[0].is_aligned == (case not in ("noise", "no valid voxel"))
    if verdict == "not usable":
        assert len(report.reasons) == (7 if case == "copied subject" else 1)
        with pytest.raises(InputError, match=re.escape(report.reasons[0])):
            inspect(open_dataset(good))
    else:
        inspected = inspect(open_dataset(good))
        assert report.survey.dataset.fingerprint == inspected.fingerprint
        if case == "other scales":
            assert report.doubts[0] in inspected.notes, "also a note of a study"


def test_all_reasons_are_reported_and_the_other_stories_are_checked(good: Path) -> None:
    (good / "subject2" / "beta.npy").write_bytes(b"\x93NUMPY damaged")
    edit_responses(good, "delta", lambda rows: rows.T)
    report = check_dataset(open_dataset(good))
    assert report.verdict == "not usable"
    beta, delta = report.reasons
    assert "beta.npy: not a readable" in beta and "looks transposed" in delta
    assert report.profiles[0].peak in (2, 3)
    text = printed(report)
    states = {line.split()[0]: line.rstrip()[-10:] for line in text.splitlines() if line}
    assert (states["beta"], states["delta"], states["gamma"][-2:]) == ("NOT USABLE", "NOT USABLE", "ok")
    assert text.count("NOT USABLE") == 2
    assert f"  because {beta}\n  because {delta}\n" in text


def test_unreadable_files_alone_give_a_verdict(good: Path) -> None:
    for file in (good / "subject2").glob("*.npy"):
        file.write_bytes(b"")
    report = check_dataset(open_dataset(good))
    assert report.verdict == "not usable"
    assert len(report.reasons) == 7
    assert "lag of subject2: too little data" in printed(report)
    assert json.loads(json.dumps(to_json(report), allow_nan=False))["lags"][0]["cc"] == [None] * 21


def test_only_chosen_subjects_and_their_stories_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make_lab(tmp_path / "lab", subjects=("subject2", "subject3"), n_words=300)
    edit_responses(lab, "delta", with_nan, "subject3")
    for name in ("alpha", "beta"):
        (lab / "subject3" / f"{name}.npy").unlink()
    (lab / "subject2" / "alpha.npy").unlink()
    both = with_responses(open_dataset(lab), None)
    assert sorted(both.stories) == ["beta", "delta", "epsilon", "gamma", "wheretheressmoke", "zeta"]
    assert both.notes == (
        "1 stories have text but no responses and are ignored: alpha",
        "1 stories lack responses of a subject; a study of all subjects ignores them: beta",
    )
    report = check_dataset(both)
    assert [(c.story, c.subject) for c in report.survey.responses][:2] == [("beta", "subject2"), ("delta", "subject2")]
    assert len(report.survey.responses) == 6 + 5
    alone = with_responses(open_dataset(lab), ["subject3"])
    assert (alone.subjects, len(alone.stories)) == (("subject3",), 5)
    for options, code, subjects in ((("--subjects", "subject2"), 0, ["subject2"]), ((), 1, ["subject2", "subject3"])):
        assert run_command("check", str(lab), "--json", *options) == code, "subject3 has a masked voxel"
        content = as_json(capsys)
        assert list(content["voxels"]) == [lag["subject"] for lag in content["lags"]] == subjects


def test_bad_text_of_a_story_without_responses_is_no_reason(good: Path) -> None:
    edit_text(good, "unheard", lambda text: text.__init__(["a"], np.array([np.nan]), np.arange(30) * 2.0))  # type: ignore[misc]
    assert check_dataset(with_responses(open_dataset(good), None)).verdict == "usable"


def a_profile(cc: np.ndarray, floor: float) -> LagProfile:
    peak = int(SHIFTS[np.argmax(cc)])
    return LagProfile("here", "s", SHIFTS, cc, floor, peak, bool(cc.max() > floor), 2.0, TRIMS["published"])


def test_lag_profile_is_a_bar_chart() -> None:
    cc = np.zeros(21)
    cc[[12, 13, 0, 1]] = 0.05, 0.025, -0.01, 0.001
    lines = lag_lines(a_profile(cc, 0.01))
    assert lines[0].endswith("best at +2 TR (+4 s), above the noise")
    assert lines[1] == "  -10 -0.0100 " + " " * 10 + ":"
    assert lines[2] == "   -9 +0.0010 #" + " " * 9 + ":"
    assert lines[13] == ">  +2 +0.0500 " + "#" * 50
    assert lines[14] == ">  +3 +0.0250 " + "#" * 25
    assert [line[:5].split()[-1] for line in lines[1:]] == [f"{shift:+d}" for shift in range(-10, 11)]
    assert [line[4] for line in lines[1:] if line.startswith(">")] == ["1", "2", "3", "4"]
    lines = lag_lines(a_profile(np.full(21, -0.01), 0.02))
    assert lines[0].endswith("within the noise")
    assert {line[13:] for line in lines[1:]} == {" " * 51 + ":"}


def test_table_has_one_row_per_story_with_its_counts(good: Path) -> None:
    edit_responses(good, "beta", with_nan)
    edit_responses(good, "gamma", lambda rows: rows[:-1])
    (good / "subject2" / "rois.json").write_text('{"[AC]": [1, 2], "V1": [7]}')
    text = printed(check_dataset(open_dataset(good)))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    n_rows = len(np.load(good / "subject2" / "beta.npy"))
    assert lines["beta"][:9] == ["beta", "subject2", "307", "0", "0.0%", str(n_rows), "12", "1", "0"]
    assert lines["beta"][9:] == ["0.00", "1.00-1.00", "-", "ok"]
    n_rows = len(np.load(good / "subject2" / "gamma.npy"))
    assert lines["gamma"][5:] == [str(n_rows), "of", str(n_rows + 1), "12", "-", "-", "-", "-", "-", "NOT", "USABLE"]
    assert "note: regions of subject2: [AC] (2 voxels), V1 (1 voxels)\n" in text, "brackets are no markup"


def test_json_contains_the_numbers(good: Path) -> None:
    edit_responses(good, "beta", with_nan)
    report = check_dataset(open_dataset(good))
    content = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert set(content) == set(
        "kind source verdict reasons doubts left_out notes fingerprint trim stories responses voxels lags".split()
    )
    assert (content["kind"], content["source"], content["verdict"]) == ("responses", str(good), report.verdict)
    assert content["trim"] == [10, 5]
    assert content["voxels"] == {"subject2": {"all": 12, "valid": 11}}
    assert content["left_out"] == list(report.survey.left_out)
    assert [story["story"] for story in content["stories"]] == sorted(report.survey.dataset.stories)
    beta = next(row for row in content["responses"] if row["story"] == "beta")
    assert (beta["n_nonfinite"], beta["n_rows"], beta["problems"]) == (1, beta["n_rows_expected"], [])
    (lag,) = content["lags"]
    assert lag["shifts"] == list(range(-10, 11))
    np.testing.assert_array_equal(lag["cc"], report.profiles[0].cc)
    assert lag["peak_s"] == 2 * lag["peak"]


@pytest.mark.parametrize(("name", "begins"), [("b.PDF", b"%PDF"), ("c.svg", b"<?xml")])
def test_the_figure_is_drawn(name: str, begins: bytes, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / name
    draw_lags(check_dataset(open_dataset(good)), file)
    assert file.read_bytes().startswith(begins)
    assert [path.name for path in file.parent.iterdir()] == [name]


def test_check_prints_the_verdict_and_saves_the_figure_if_it_can(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("check", str(good)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "verdict: usable"
    assert f"figure: {Path('results/check/good-lag.png')}" in out
    assert err == ""
    assert Path("results/check/good-lag.png").read_bytes().startswith(PNG)
    shutil.rmtree("results")
    Path("results").write_text("a file where the folder should be")
    assert run_command("check", str(good)) == 0
    out = capsys.readouterr().out
    assert "no figure: results/check/good-lag.png: " in out
    assert out.endswith("verdict: usable\n")
    assert run_command("check", str(good), "--json") == 0
    assert as_json(capsys)["figure"] is None


@pytest.mark.parametrize(
    ("options", "code", "verdict"), [((), 1, "usable with these masks"), (("--trim", "course"), 2, "not usable")]
)
def test_check_as_json_prints_one_object(
    options: tuple[str, ...], code: int, verdict: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_responses(good, "beta", with_nan)
    assert run_command("check", str(good), "--json", "--figure", "mine.png", *options) == code
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["verdict"], content["figure"], err) == (verdict, "mine.png", "")
    assert Path("mine.png").read_bytes().startswith(PNG)


def test_text_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "films.csv"
    file.write_text("text,label\n" + "a fine film,good\na dull film \N{GRINNING FACE},bad\n" * 5)
    assert run_command("check", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{file}: 10 texts, ")
    assert lines[-1] == "verdict: usable"
    assert run_command("check", str(file), "--clean", "--examples", "4", "--json") == 0
    content = as_json(capsys)
    assert (content["kind"], content["source"], content["verdict"]) == ("text", str(file), "usable")
    assert content["notes"][0].startswith(f"{file}: 4 texts, ")
    assert not Path("results").exists()


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_is_usable_and_its_trim_matters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = simulate_listener(demo_stories())
    monkeypatch.setattr("bert_encoding.demo.stories.simulate_listener", lambda stories: simulated)
    assert run_command("check", "demo", "--json") == 0
    (lag,) = as_json(capsys)["lags"]
    assert lag["peak"] in (2, 3)
    assert run_command("check", "demo", "--trim", "course", "--json") == 2
    assert "try --trim published" in as_json(capsys)["reasons"][0]


@pytest.fixture
def fetch_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of downloads that are not made."""
    from bert_encoding.datasets.fetching.lebel2023 import FetchResult

    calls: list[dict[str, Any]] = []

    def pretend(subjects: list[str], to: Path, stories: list[str] | None = None, **options: Any) -> FetchResult:
        calls.append({"subjects": subjects, "to": to, "stories": stories} | options)
        return FetchResult(5, 2)

    monkeypatch.setattr("bert_encoding.commands.fetch.fetch_lebel2023", pretend)
    return calls


def test_fetch_passes_its_options_and_prints_the_next_command(
    fetch_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("fetch", "lebel2023", "--subjects", "UTS01", "UTS03", "--to", "stories of [red]") == 0
    (call,) = fetch_calls
    assert isinstance(call.pop("console"), Console)
    assert call == {"subjects": ["UTS01", "UTS03"], "to": Path("stories of [red]"), "stories": None}
    assert capsys.readouterr().out.splitlines() == [
        "5 files are in stories of [red], 2 of them were there before",
        "next: python -m bert_encoding check 'stories of [red]'",
    ]
    options = "--subjects UTS03 --to d --stories life alternateithicatom --base-url https://a/ --keys-url https://b/"
    assert run_command("fetch", "lebel2023", *options.split()) == 0
    assert fetch_calls[1]["stories"] == ["life", "alternateithicatom"]
    assert (fetch_calls[1]["base_url"], fetch_calls[1]["keys_url"]) == ("https://a/", "https://b/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check {lab} --trim 10", "--trim 10: give published or course"),
        ("check {lab} --subjects nobody", "no subject nobody; it has subject2"),
        ("check {lab} --figure lag.txt", "--figure lag.txt: give a name that ends in .png, .pdf, .svg"),
        ("check {lab} --clean", "--clean: {lab} is no text corpus; leave the option out"),
        ("check {lab} --examples 3", "--examples: {lab} is no text corpus; leave the option out"),
        ("check {lab} --examples many", "many"),
        ("check {lab}/nowhere", "{lab}/nowhere: no such data"),
        ("check {lab}/subject2", "{lab}/subject2: "),
        ("check", "path"),
        ("check {text} --trim course", "--trim: {text} is text without responses"),
        ("check {text} --subjects s", "--subjects: {text} is text without responses"),
        ("check {text} --figure a.png", "--figure: {text} is text without responses"),
        ("fetch other --subjects UTS03 --to d", "no data set 'other' to fetch; there is lebel2023"),
        ("fetch lebel2023 --to d", "name the subjects, as in --subjects UTS03"),
        ("fetch lebel2023 --subjects UTS03", "name the folder, as in --to DIR"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    arguments: str, message: str, lab: Path, fetch_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = lab.parent / "lines.txt"
    text.write_text("one\ntwo\n")
    error = refusal(capsys, *(argument.format(lab=lab, text=text) for argument in arguments.split()))
    assert message.format(lab=lab, text=text).lower() in error.lower()
    assert not Path("results").exists() and fetch_calls == []


@pytest.mark.slow
@pytest.mark.data
def test_a_real_listener_is_usable_with_the_right_trim(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("check", str(REAL_DATA)) == 0
    out = capsys.readouterr().out
    assert "lag of uts02: " in out
    assert "best at +2 TR (+4 s), above the noise" in out
    assert out.splitlines()[-1] == "verdict: usable"
    assert sum(line.rstrip().endswith(" ok") for line in out.splitlines()) == 101
    assert run_command("check", str(REAL_DATA), "--trim", "course") == 2
    reason = capsys.readouterr().out.splitlines()[-1]
    assert "-3 TR (-6 s)" in reason and "--trim published" in reason
