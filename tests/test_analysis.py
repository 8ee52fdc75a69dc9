"""What a study found, computed from hand-made records; then the command that prints it."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from bert_encoding.config import TrialConfig
from bert_encoding.errors import InputError
from bert_encoding.records import TrialRecord, trials_frame, write_json, write_record
from study import analysis
from study.analysis import Standing, cc_by_rank, load_trials, print_study, standing, verdict_lines
from study.command import run_app

ROOT = Path(__file__).resolve().parents[1]


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


def test_standing_compares_the_best_searched_trial_with_the_frozen_baseline() -> None:
    found = standing(trials_frame(HAND_MADE))
    assert found == Standing(frozen=0.1, best=0.15, best_id="0004", n_complete=3, n_failed=1)
    assert found.gain == pytest.approx(0.05, abs=1e-12)


def test_standing_without_a_baseline_or_without_a_search() -> None:
    assert standing(trials_frame([])) == Standing(None, None, None, 0, 0)
    only = standing(trials_frame([frozen(0.1), word_rate()]))
    assert only == Standing(0.1, None, None, 0, 0)
    assert only.gain is None
    alone = standing(trials_frame([trial("0001", -0.2), word_rate()]))
    assert alone == Standing(None, -0.2, "0001", 1, 0)
    assert alone.gain is None
    assert standing(trials_frame([frozen(), trial("0001", None)])) == Standing(0.1, None, None, 0, 1)


def test_a_failed_baseline_is_no_baseline() -> None:
    broken = trial("baseline-frozen", None, phase="baseline", method="frozen")
    assert standing(trials_frame([broken, trial("0001", 0.2)])).frozen is None


def test_cc_by_rank_by_hand() -> None:
    table = cc_by_rank(trials_frame(HAND_MADE))
    assert list(table.columns) == ["rank", "n_trials", "cc_mean", "cc_max"]
    assert table["rank"].tolist() == [2, 8]
    assert table["n_trials"].tolist() == [1, 2]
    np.testing.assert_allclose(table["cc_mean"].astype(float), [0.12, (0.09 + 0.15) / 2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["cc_max"].astype(float), [0.12, 0.15], rtol=0, atol=1e-12)
    assert len(cc_by_rank(trials_frame([frozen()]))) == 0


def test_the_verdict_says_what_can_be_said() -> None:
    assert verdict_lines(Standing(None, 0.2, "0001", 3, 0)) == ["No frozen baseline yet: nothing to compare with."]
    assert verdict_lines(Standing(0.1, None, None, 0, 2)) == [
        "Frozen baseline: CC 0.1000. No searched trial is complete."
    ]
    better = verdict_lines(Standing(0.1, 0.15, "0004", 3, 1))
    assert better[0] == (
        "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000; difference +0.0500 on the validation stories."
    )
    assert "best of 3 noisy trials looks better than it is" in better[1]
    assert "difference -0.0200" in verdict_lines(Standing(0.1, 0.08, "0001", 1, 0))[0]


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
        pd.testing.assert_frame_equal(load_trials(path), trials_frame(HAND_MADE[:2] + HAND_MADE[2:]))


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_a_folder_without_a_study_is_refused(there: str, tmp_path: Path) -> None:
    path = tmp_path / "study"
    if there == "an empty folder":
        path.mkdir()
    elif there == "a file":
        path.write_text("x")
    with pytest.raises(InputError, match=r"study: no study here \(study\.json is missing\)"):
        load_trials(path)


def printed(records: list[TrialRecord]) -> str:
    console = Console(width=240, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        print_study(console, trials_frame(records))
        return console.export_text()


def test_the_table_is_printed_best_first() -> None:
    lines = printed(HAND_MADE).splitlines()
    assert lines[0].split()[:4] == ["trial_id", "phase", "status", "method"]
    order = [line.split()[0] for line in lines[1:8]]
    assert order == ["baseline-word_rate", "0005", "0004", "0001", "baseline-frozen", "0002", "0003"]
    text = "\n".join(lines)
    assert "CC by rank" in text
    assert "Best trial 0004: CC 0.1500" in text
    assert "trial 0003 FAILED: ValueError: loss [nan] at step 3" in text


def test_columns_that_are_empty_are_not_printed() -> None:
    header = printed([frozen(), trial("0001", 0.2)]).splitlines()[0].split()
    assert "cc_test" not in header
    assert "rank" in header
    assert "rank" not in printed([frozen()]).splitlines()[0].split()


def test_one_rank_needs_no_table_of_ranks() -> None:
    assert "CC by rank" not in printed([frozen(), trial("0001", 0.2), trial("0002", 0.3)])


def test_a_study_that_has_nothing_yet_can_be_printed() -> None:
    assert "No frozen baseline yet" in printed([])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "study" / "analysis.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_command_prints_the_table_and_rebuilds_the_tables(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    ran = run(str(folder))
    assert (ran.returncode, ran.stderr) == (0, "")
    for record in HAND_MADE:
        assert record.trial_id in ran.stdout
    assert "Best trial 0004: CC 0.1500; frozen baseline: CC 0.1000" in ran.stdout
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), trials_frame(HAND_MADE))
    assert (folder / "epochs.parquet").is_file()
    assert (folder / "stories.parquet").is_file()


def test_the_command_says_in_one_line_that_there_is_no_study(tmp_path: Path) -> None:
    ran = run(str(tmp_path))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: {tmp_path}: no study here (study.json is missing)\n"


@pytest.mark.parametrize("arguments", [[], ["--folder"], ["a", "b"], ["--colour"]])
def test_the_command_used_wrongly_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(analysis.app, arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_damaged_record_is_named_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study", HAND_MADE)
    (folder / "trials" / "0002" / "record.json").write_text('{"status": "COMP')
    assert run_app(analysis.app, [str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'trials' / '0002' / 'record.json'}: damaged")
    assert error.count("\n") == 1
