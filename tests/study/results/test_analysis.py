"""What a study found, computed from hand-made records; then the command that prints it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_study import SMALL, Truth, write_fake_study
from project import ROOT
from scipy.stats import ttest_1samp

from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, write_record
from bert_encoding.trial.tables import stories_frame, trials_frame
from study import analysis
from study.results.load import load_trials
from study.results.standing import Standing, cc_by_rank, gain_over_stories, standing, verdict_lines


def trial(trial_id: str, cc: float | None, rank: int = 8, phase: str = "search", method: str = "lora") -> TrialRecord:
    """A trial by hand; failed without ``cc``."""
    return TrialRecord(
        status="FAILED" if cc is None else "COMPLETE",
        method=method,
        config=asdict(TrialConfig(model="tiny", method=method, rank=rank, lora_alpha=2.0 * rank)),
        trial_id=trial_id,
        phase=phase,
        error="Traceback (most recent call last):\n  ...\nValueError: loss [nan] at step 3" if cc is None else None,
        scores={} if cc is None else {"cc_mean": cc, "cc_seen": cc + 0.1},
        seconds={"total": 12.0},
        cc={} if cc is None else {"s": np.full(3, cc, np.float32)},
    )


def frozen(cc: float = 0.1) -> TrialRecord:
    return trial("baseline-frozen", cc, phase="baseline", method="frozen")


def word_rate(cc: float = 0.5) -> TrialRecord:
    return trial("baseline-word_rate", cc, phase="baseline", method="word_rate")


HAND_MADE = [
    frozen(0.1),
    word_rate(0.5),  # better than all: it must not be taken for the best trial, nor for the frozen baseline
    trial("0001", 0.12, rank=2),
    trial("0002", 0.09, rank=8),
    trial("0003", None, rank=8),
    trial("0004", 0.15, rank=8),
    trial("0005", 0.40, rank=8, phase="confirm"),
]


def found_in(*records: TrialRecord) -> Standing:
    return standing(trials_frame(list(records)))


def test_standing_compares_the_best_searched_trial_with_the_frozen_baseline() -> None:
    found = found_in(*HAND_MADE)
    assert (found.frozen, found.word_rate) == (0.1, 0.5)
    assert (found.best, found.best_id, found.n_complete, found.n_failed) == (0.15, "0004", 3, 1)
    assert found.gain == pytest.approx(0.05, abs=1e-12)


def test_standing_without_a_baseline_or_without_a_search() -> None:
    nothing = found_in()
    assert (nothing.frozen, nothing.best, nothing.best_id, nothing.gain) == (None, None, None, None)
    assert (nothing.n_complete, nothing.n_failed) == (0, 0)
    only = found_in(frozen(0.1), word_rate())
    assert (only.frozen, only.best, only.gain) == (0.1, None, None)
    alone = found_in(trial("0001", -0.2), word_rate())
    assert (alone.frozen, alone.best, alone.best_id, alone.gain) == (None, -0.2, "0001", None)
    hopeless = found_in(frozen(), trial("0001", None))
    assert (hopeless.frozen, hopeless.best, hopeless.n_complete, hopeless.n_failed) == (0.1, None, 0, 1)


def test_standing_reads_test_scores_of_baselines_only() -> None:
    scored = [replace(record, scores=record.scores | {"cc_test": 0.25}) for record in (frozen(), word_rate())]
    found = found_in(*scored, replace(trial("0001", 0.2), scores={"cc_mean": 0.2, "cc_test": 0.9}))
    assert (found.frozen_test, found.word_rate_test) == (0.25, 0.25)
    assert (found_in(*HAND_MADE).frozen_test, found_in(*HAND_MADE).word_rate_test) == (None, None)


def test_a_failed_baseline_is_no_baseline() -> None:
    broken = trial("baseline-frozen", None, phase="baseline", method="frozen")
    assert found_in(broken, trial("0001", 0.2)).frozen is None


def test_cc_by_rank_by_hand() -> None:
    table = cc_by_rank(trials_frame(HAND_MADE))
    assert list(table.columns) == ["rank", "n_trials", "cc_mean", "cc_max"]
    assert table["rank"].tolist() == [2, 8]
    assert table["n_trials"].tolist() == [1, 2]
    np.testing.assert_allclose(table["cc_mean"].astype(float), [0.12, (0.09 + 0.15) / 2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["cc_max"].astype(float), [0.12, 0.15], rtol=0, atol=1e-12)
    assert len(cc_by_rank(trials_frame([frozen()]))) == 0


def test_the_verdict_says_what_can_be_said() -> None:
    assert verdict_lines(found_in(trial("0001", 0.2))) == ["No frozen baseline yet: nothing to compare with."]
    (no_search,) = verdict_lines(found_in(frozen(0.1), word_rate(0.05), trial("0001", None)))
    assert "validation" in no_search
    assert "0.1000" in no_search
    assert "0.0500" in no_search
    better = verdict_lines(found_in(*HAND_MADE))
    assert better[0] == (
        "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000; difference +0.0500 on the validation stories."
    )
    assert "best of 3 noisy trials looks better than it is" in better[1]
    assert "difference -0.0200" in verdict_lines(found_in(frozen(0.1), trial("0001", 0.08)))[0]


def with_stories(record: TrialRecord, cc_of_story: dict[str, float]) -> TrialRecord:
    """The record with a CC inside each validation story, for two subjects a little apart, and in a test story."""
    rows = [
        {"split": 0, "role": "validation", "subject": subject, "story": story, "cc_mean": cc + shift}
        for story, cc in cc_of_story.items()
        for subject, shift in (("a", -0.01), ("b", 0.01))
    ]
    record.stories = [*rows, {"split": 0, "role": "test", "subject": "a", "story": "locked", "cc_mean": 0.9}]
    return record


def test_the_gain_is_paired_by_validation_story_with_the_t_interval() -> None:
    best, plain = [0.12, 0.16, 0.11, 0.2], [0.11, 0.13, 0.12, 0.15]
    records = [
        with_stories(trial("0001", 0.15), dict(zip("wxyz", best, strict=True))),
        with_stories(frozen(0.13), dict(zip("wxyz", plain, strict=True))),
        with_stories(trial("0002", 0.1), dict.fromkeys("wxyz", 0.5)),
    ]
    gain = gain_over_stories(stories_frame(records), "0001")
    difference = np.subtract(best, plain)
    expected = ttest_1samp(difference, 0).confidence_interval(0.95)
    assert gain is not None
    np.testing.assert_allclose([gain.low, gain.high], [expected.low, expected.high], rtol=1e-9)
    np.testing.assert_allclose(gain.estimate, difference.mean(), rtol=1e-9)
    lines = verdict_lines(found_in(*records), gain)
    assert lines[1] == (
        f"Story by story the difference is {gain.estimate:+.4f}, 95% interval over 4 stories {gain.low:+.4f} to "
        f"{gain.high:+.4f}."
    )


def test_without_stories_in_common_there_is_no_interval() -> None:
    alone = stories_frame([with_stories(trial("0001", 0.15), {"x": 0.1}), with_stories(frozen(), {"y": 0.1})])
    assert gain_over_stories(alone, "0001") is None
    assert gain_over_stories(alone, "0009") is None
    assert gain_over_stories(stories_frame([frozen()]), "0001") is None
    one = stories_frame([with_stories(trial("0001", 0.15), {"x": 0.1}), with_stories(frozen(), {"x": 0.1})])
    assert len(verdict_lines(found_in(trial("0001", 0.15), frozen()), gain_over_stories(one, "0001"))) == 2


def write_study(folder: Path, records: list[TrialRecord]) -> Path:
    folder.mkdir()
    write_json(folder / "study.json", {"name": folder.name})
    for record in records:
        write_record(folder, record)
    return folder


def test_load_trials_reads_records_and_not_an_old_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    (folder / "trials.parquet").write_bytes(b"an old table")
    for path in (folder, str(folder)):
        pd.testing.assert_frame_equal(load_trials(path), trials_frame(HAND_MADE))


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_a_folder_without_a_study_is_refused(there: str, tmp_path: Path) -> None:
    path = tmp_path / "study"
    if there == "an empty folder":
        path.mkdir()
    elif there == "a file":
        path.write_text("x")
    with pytest.raises(InputError, match=r"study: no study here \(study\.json is missing\)"):
        load_trials(path)


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints of some records."""

    def print_them(*records: TrialRecord) -> str:
        folder = write_study(tmp_path / f"study{len(list(tmp_path.iterdir()))}", list(records))
        capsys.readouterr()
        assert ended(str(folder)) == 0
        out, error = capsys.readouterr()
        assert error == ""
        return out

    return print_them


def ended(*arguments: str) -> int:
    """Run the command here and return its exit code."""
    return run_app(analysis.app, list(arguments))


def test_the_table_is_printed_best_first(printed: Callable[..., str]) -> None:
    text = printed(*HAND_MADE)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["trial_id", "phase", "status", "method"]
    order = [line.split()[0] for line in lines[1:8]]
    assert order == ["baseline-word_rate", "0005", "0004", "0001", "baseline-frozen", "0002", "0003"]
    assert "CC by rank" in text
    assert "Best trial 0004: CC 0.1500" in text
    assert "trial 0003 FAILED: ValueError: loss [nan] at step 3" in text


def test_columns_that_are_empty_are_not_printed(printed: Callable[..., str]) -> None:
    header = printed(frozen(), trial("0001", 0.2)).splitlines()[0].split()
    assert "cc_test" not in header
    assert "rank" in header
    assert "rank" not in printed(frozen()).splitlines()[0].split()


def test_one_rank_needs_no_table_of_ranks(printed: Callable[..., str]) -> None:
    assert "CC by rank" not in printed(frozen(), trial("0001", 0.2), trial("0002", 0.3))


def test_a_study_that_has_nothing_yet_can_be_printed(printed: Callable[..., str]) -> None:
    assert "No frozen baseline yet" in printed()


@pytest.mark.slow
def test_the_command_prints_the_table_and_rebuilds_the_tables(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "study" / "analysis.py"), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    for record in HAND_MADE:
        assert record.trial_id in ran.stdout
    assert "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000" in ran.stdout
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), trials_frame(HAND_MADE))
    assert (folder / "epochs.parquet").is_file()
    assert (folder / "stories.parquet").is_file()


def test_the_command_says_in_one_line_that_there_is_no_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(str(tmp_path)) == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path}: no study here (study.json is missing)\n")


@pytest.mark.parametrize("arguments", [[], ["--folder"], ["a", "b"], ["--colour"]])
def test_the_command_used_wrongly_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_damaged_record_is_named_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    (folder / "trials" / "0002" / "record.json").write_text('{"status": "COMP')
    assert ended(str(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'trials' / '0002' / 'record.json'}: damaged")
    assert error.count("\n") == 1


# --- the whole command, on a study with planted truth -----------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures: others test them."""
    monkeypatch.setattr("study.report.html.draw_all", lambda *arguments: [])


@pytest.mark.slow
def test_a_delta_chosen_afterwards_is_told_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    study = read_json(folder / "study.json")
    write_json(folder / "study.json", study | {"options": study["options"] | {"delta": 0.004}})
    write_json(folder / "summary.json", {"best": 0.5, "verdict": None})
    note = "delta 0.05 was chosen after the study (0.004 was set)"
    for arguments, delta in (([], 0.004), (["--delta", "0.05"], 0.05), ([], 0.004)):
        assert ended(str(folder), *arguments) == 0
        summary, page = read_json(folder / "summary.json"), (folder / "report.html").read_text()
        assert summary["best"] == 0.5
        assert (summary["verdict"]["rank"]["delta"], summary["verdict"]["tuning"]["delta"]) == (delta, delta)
        assert (f"note: {note}\n" in capsys.readouterr().out) == (delta == 0.05)
        assert (f"<li>{note}</li>" in page) == (delta == 0.05)
        assert (f"chosen after the study had begun as {delta:g} CC" in page) == (delta == 0.05)
        assert (f"set in advance as {delta:g} CC" in page) == (delta == 0.004)
    assert "within \u00b10.05 CC" not in page and "+-" not in page
    assert ended(str(folder), "--delta", "0") == 2
    assert capsys.readouterr().err == "error: --delta 0: must be a CC above 0 and below 1\n"


@pytest.mark.slow
def test_a_study_without_a_summary_gets_none(tmp_path: Path, quick: None) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    assert ended(str(folder)) == 0
    assert not (folder / "summary.json").exists()
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_summary_that_is_damaged_costs_neither_verdict_nor_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    (folder / "summary.json").write_text("{")
    assert ended(str(folder)) == 0
    out = capsys.readouterr().out
    assert f"note: the verdicts are not in summary.json: {folder / 'summary.json'}: damaged" in out
    assert out.endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.slow
def test_a_score_that_is_not_a_number_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_fake_study(tmp_path / "fake", Truth(), SMALL)
    file = next(iter(sorted(folder.glob("trials/0*/record.json"))))
    record = read_json(file)
    file.write_text(json.dumps(record | {"scores": record["scores"] | {"cc_mean": float("nan")}}))
    assert ended(str(folder)) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "could not" not in (folder / "report.html").read_text()
    assert out.endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.parametrize(
    ("options", "is_exploratory"),
    [({"sampler": "grid"}, False), ({"sampler": "tpe"}, True), ({"sampler": "grid", "scheduler": "asha"}, True)],
)
def test_only_an_adaptive_search_is_called_exploratory(
    options: dict[str, str], is_exploratory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    write_json(folder / "study.json", {"name": "study", "options": options})
    assert ended(str(folder)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CC by rank")]
    assert ("exploratory" in line) == is_exploratory
