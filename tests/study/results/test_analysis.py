"""The best trial and the baselines from hand-made records; then the command that prints them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_study import SMALL, Truth, write_fake_study
from make_report import record as trial
from make_report import write_study
from project import ROOT
from run_commands import Ended, assert_refused, run_study_command
from scipy.stats import ttest_1samp

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import rows_frame, trials_frame
from study import analysis
from study.results.gather import gather
from study.results.load import load_trials
from study.results.standing import Standing, cc_by_rank, gain_over_stories, standing, verdict_lines


def frozen(cc: float = 0.1) -> TrialRecord:
    return trial("baseline-frozen", cc, "baseline", "frozen")


def word_rate(cc: float = 0.5) -> TrialRecord:
    return trial("baseline-word_rate", cc, "baseline", "word_rate")


HAND_MADE = [
    frozen(0.1),
    word_rate(0.5),  # the best of all, but neither a searched trial nor the frozen baseline
    trial("0001", 0.12, rank=2),
    trial("0002", 0.09, rank=8),
    trial("0003", None, rank=8),
    trial("0004", 0.15, rank=8),
    trial("0005", 0.40, rank=8, phase="confirm"),
]


def standing_of(*records: TrialRecord) -> Standing:
    return standing(trials_frame(list(records)))


def test_standing_compares_the_best_searched_trial_with_the_baselines() -> None:
    result = standing_of(*HAND_MADE)
    assert (result.frozen, result.word_rate, result.frozen_test, result.word_rate_test) == (0.1, 0.5, None, None)
    assert (result.best, result.best_id, result.n_complete, result.n_failed) == (0.15, "0004", 3, 1)
    assert result.gain == pytest.approx(0.05, abs=1e-12)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], (None, None, None, None, 0, 0)),
        ([frozen(0.1), word_rate()], (0.1, None, None, None, 0, 0)),
        ([trial("0001", -0.2), word_rate()], (None, -0.2, "0001", None, 1, 0)),
        ([frozen(), trial("0001", None)], (0.1, None, None, None, 0, 1)),
        ([trial("baseline-frozen", None, "baseline", "frozen")], (None, None, None, None, 0, 1)),
    ],
)
def test_standing_without_a_baseline_or_a_search(records: list[TrialRecord], expected: tuple[object, ...]) -> None:
    result = standing_of(*records)
    scores = (result.frozen, result.best, result.best_id, result.gain)
    assert (*scores, result.n_complete, result.n_failed) == expected


def test_standing_reads_test_scores_of_baselines_only() -> None:
    scored = [replace(record, scores=record.scores | {"cc_test": 0.25}) for record in (frozen(), word_rate())]
    result = standing_of(*scored, replace(trial("0001", 0.2), scores={"cc_mean": 0.2, "cc_test": 0.9}))
    assert (result.frozen_test, result.word_rate_test) == (0.25, 0.25)


def test_cc_by_rank_equals_hand_computed_values() -> None:
    table = cc_by_rank(trials_frame(HAND_MADE)).astype(float)
    expected = {"rank": [2, 8], "n_trials": [1, 2], "cc_mean": [0.12, 0.12], "cc_highest": [0.12, 0.15]}
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected).astype(float), rtol=0, atol=1e-12)
    assert len(cc_by_rank(trials_frame([frozen()]))) == 0


def test_verdict_lines_name_scores_and_the_bias_of_the_best() -> None:
    assert verdict_lines(standing_of(trial("0001", 0.2))) == ["No frozen baseline yet: nothing to compare with."]
    assert verdict_lines(standing_of(frozen(0.1), word_rate(0.05), trial("0001", None))) == [
        "Mean CC on the validation stories: frozen encoder 0.1000, word rate 0.0500."
    ]
    assert verdict_lines(standing_of(*HAND_MADE)) == [
        "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000; difference +0.0500 on the validation stories.",
        "The best of 3 noisy trials is biased upwards; the test stories have not been scored yet.",
    ]


def with_stories(record: TrialRecord, cc_of_story: dict[str, float]) -> TrialRecord:
    """The record with a CC inside each validation story, for two subjects, and in a test story."""
    rows = [
        {"split": 0, "role": "validation", "subject": subject, "story": story, "cc_mean": cc + shift}
        for story, cc in cc_of_story.items()
        for subject, shift in (("a", -0.01), ("b", 0.01))
    ]
    record.stories = [*rows, {"split": 0, "role": "test", "subject": "a", "story": "locked", "cc_mean": 0.9}]
    return record


def test_gain_over_stories_is_paired_with_a_t_interval() -> None:
    best, plain = [0.12, 0.16, 0.11, 0.2], [0.11, 0.13, 0.12, 0.15]
    records = [
        with_stories(trial("0001", 0.15), dict(zip("wxyz", best, strict=True))),
        with_stories(frozen(0.13), dict(zip("wxyz", plain, strict=True))),
        with_stories(trial("0002", 0.1), dict.fromkeys("wxyz", 0.5)),
    ]
    gain = gain_over_stories(rows_frame(records, "stories"), "0001")
    difference = np.subtract(best, plain)
    expected = ttest_1samp(difference, 0).confidence_interval(0.95)
    assert gain is not None
    np.testing.assert_allclose([gain.low, gain.high], [expected.low, expected.high], rtol=1e-9)
    np.testing.assert_allclose(gain.estimate, difference.mean(), rtol=1e-9)
    lines = verdict_lines(standing_of(*records), gain)
    assert lines[1].endswith(f"{gain.estimate:+.4f}, 95% interval over 4 stories {gain.low:+.4f} to {gain.high:+.4f}.")


def test_gain_over_stories_needs_shared_stories() -> None:
    alone = rows_frame([with_stories(trial("0001", 0.15), {"x": 0.1}), with_stories(frozen(), {"y": 0.1})], "stories")
    assert gain_over_stories(alone, "0001") is None
    assert gain_over_stories(alone, "0009") is None
    assert gain_over_stories(rows_frame([frozen()], "stories"), "0001") is None
    single = rows_frame([with_stories(trial("0001", 0.15), {"x": 0.1}), with_stories(frozen(), {"x": 0.1})], "stories")
    assert len(verdict_lines(standing_of(trial("0001", 0.15), frozen()), gain_over_stories(single, "0001"))) == 2


def test_load_trials_reads_records_not_an_old_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {"name": "study"}, HAND_MADE)
    (folder / "trials.parquet").write_bytes(b"an old table")
    for path in (folder, str(folder)):
        pd.testing.assert_frame_equal(load_trials(path), trials_frame(HAND_MADE))


@pytest.mark.parametrize("content", ["nothing", "an empty folder", "a file"])
def test_load_trials_refuses_a_place_without_a_study(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study"
    if content == "an empty folder":
        path.mkdir()
    elif content == "a file":
        path.write_text("x")
    with pytest.raises(InputError, match=r"study: no study here \(study\.json is missing\)"):
        load_trials(path)


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns what the command prints for some records."""

    def print_them(*records: TrialRecord) -> str:
        folder = write_study(tmp_path / f"study{len(list(tmp_path.iterdir()))}", {}, list(records))
        ended = run(capsys, folder)
        assert (ended.code, ended.error) == (0, "")
        return ended.out

    return print_them


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    return run_study_command([str(argument) for argument in arguments], capsys, analysis.app)


def test_trial_table_is_printed_best_first(printed: Callable[..., str]) -> None:
    text = printed(*HAND_MADE)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["trial_id", "phase", "status", "method"]
    order = [line.split()[0] for line in lines[1:8]]
    assert order == ["baseline-word_rate", "0005", "0004", "0001", "baseline-frozen", "0002", "0003"]
    assert "CC by rank" in text
    assert "Best trial 0004: CC 0.1500" in text
    assert "trial 0003 FAILED: ValueError: loss [nan] at step 3" in text


def test_empty_columns_and_a_table_of_one_rank_are_not_printed(printed: Callable[..., str]) -> None:
    text = printed(frozen(), trial("0001", 0.2), trial("0002", 0.3))
    header = text.splitlines()[0].split()
    assert "rank" in header and "cc_test" not in header
    assert "CC by rank" not in text
    assert "rank" not in printed(frozen()).splitlines()[0].split()
    assert "No frozen baseline yet" in printed()


@pytest.mark.slow
def test_command_prints_the_trials_and_rebuilds_the_tables(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {"name": "study"}, HAND_MADE)
    command = [sys.executable, "-W", "error", str(ROOT / "study" / "analysis.py"), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (ran.returncode, ran.stderr) == (0, "")
    for record in HAND_MADE:
        assert record.trial_id in ran.stdout
    assert "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000" in ran.stdout
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), trials_frame(HAND_MADE))
    assert (folder / "epochs.parquet").is_file()
    assert (folder / "stories.parquet").is_file()


@pytest.mark.parametrize("arguments", [[], ["--folder"], ["a", "b"], ["--colour"]])
def test_wrong_arguments_give_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ended = run(capsys, *arguments)
    assert_refused(ended)
    assert ended.out == ""


def test_command_names_a_damaged_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study", {"name": "study"}, HAND_MADE)
    (folder / "trials" / "0002" / "record.json").write_text('{"status": "COMP')
    assert_refused(run(capsys, folder), f"error: {folder / 'trials' / '0002' / 'record.json'}: damaged")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures; they have their own tests."""
    monkeypatch.setattr("study.report.html.draw_all", lambda *arguments: [])


@pytest.mark.slow
def test_delta_chosen_later_is_noted_in_print_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    study = read_json(folder / "study.json")
    write_json(folder / "study.json", study | {"options": study["options"] | {"delta": 0.004}})
    write_json(folder / "summary.json", {"best": 0.5, "verdict": None})
    note = "delta 0.05 was chosen after the study (0.004 was set)"
    for arguments, delta in (([], 0.004), (["--delta", "0.05"], 0.05), ([], 0.004)):
        ended = run(capsys, folder, *arguments)
        assert ended.code == 0
        summary, page = read_json(folder / "summary.json"), (folder / "report.html").read_text()
        assert summary["best"] == 0.5
        assert (summary["verdict"]["rank"]["delta"], summary["verdict"]["tuning"]["delta"]) == (delta, delta)
        assert (f"note: {note}\n" in ended.out) == (delta == 0.05)
        assert (f"<li>{note}</li>" in page) == (delta == 0.05)
        assert (f"chosen after the study had begun as {delta:g} CC" in page) == (delta == 0.05)
        assert (f"set in advance as {delta:g} CC" in page) == (delta == 0.004)
    assert "within \u00b10.05 CC" not in page and "+-" not in page
    assert_refused(run(capsys, folder, "--delta", "0"), "error: --delta 0: must be a CC above 0 and below 1\n")


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [False, True])
def test_missing_or_damaged_summary_does_not_prevent_verdict_and_report(
    is_damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    summary, verdicts = folder / "summary.json", gather(folder).verdicts
    if is_damaged:
        summary.write_text("{")
    code, out, _ = run(capsys, folder)
    assert code == 0
    assert all(verdict.question in out and verdict.headline in out for verdict in verdicts)
    assert (f"note: the verdicts are not in summary.json: {summary}: damaged" in out) == is_damaged
    assert summary.exists() == is_damaged
    assert out.endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.slow
def test_nan_score_does_not_prevent_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    file = next(iter(sorted(folder.glob("trials/0*/record.json"))))
    record = read_json(file)
    file.write_text(json.dumps(record | {"scores": record["scores"] | {"cc_mean": float("nan")}}))
    code, out, error = run(capsys, folder)
    assert (code, error) == (0, "")
    assert "could not" not in (folder / "report.html").read_text()
    assert out.endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.parametrize(
    ("options", "is_exploratory"),
    [({"sampler": "grid"}, False), ({"sampler": "tpe"}, True), ({"sampler": "grid", "scheduler": "asha"}, True)],
)
def test_only_an_adaptive_search_is_called_exploratory(
    options: dict[str, str], is_exploratory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_study(tmp_path / "study", {"name": "study", "options": options}, HAND_MADE)
    (line,) = [line for line in run(capsys, folder).out.splitlines() if line.startswith("CC by rank")]
    assert ("exploratory" in line) == is_exploratory
