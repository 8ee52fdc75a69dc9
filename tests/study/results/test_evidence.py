"""A gathered study: its tables, verdicts and next commands; the comparison of two studies."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_study import FULL, SMALL, Plan, Truth, write_fake_study
from run_commands import Ended, assert_refused, run_study_command

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from study import analysis
from study.report.figures.figures import draw_all
from study.results import gather as gather_module
from study.results import importances
from study.results.compare import check_comparable, compare
from study.results.evidence import Evidence
from study.results.gather import gather, verdict_record
from study.results.verdicts.next_runs import resume_command

RUN = "python study/run.py --space lora_rank --data demo --model minilm"
RESUME = "python study/run.py --resume --name"


@pytest.fixture(scope="module", autouse=True)
def _small_forests() -> Iterator[None]:
    """Small forests: importances have their own tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(importances, "N_TREES", 2)
        monkeypatch.setattr(gather_module, "importances", partial(importances.importances, n_resamples=0))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = replace(SMALL, n_stories=5, subjects=("s1", "s2"))
    return write_fake_study(tmp_path_factory.mktemp("study") / "fake", Truth(effect=0.01), plan)


@pytest.fixture(scope="module")
def evidence(folder: Path) -> Evidence:
    return gather(folder)


def searched_study(folder: Path, truth: Truth | None = None, plan: Plan = SMALL) -> Path:
    """A study without a confirm phase, in which every trial is complete."""
    return write_fake_study(folder, truth or Truth(), plan, confirm=False, odd=False)


def commands(folder: Path, delta: float = 0.002) -> list[str | None]:
    """The next command for the verdicts on tuning and on rank."""
    return [verdict.command for verdict in gather(folder, delta).verdicts]


def change(folder: Path, options: dict[str, Any] | None = None, **fields: Any) -> None:
    """Change ``study.json``."""
    study = read_json(folder / "study.json")
    write_json(folder / "study.json", study | {"options": study["options"] | (options or {})} | fields)


def run(capsys: pytest.CaptureFixture[str], *arguments: Path) -> Ended:
    return run_study_command([str(argument) for argument in arguments], capsys, analysis.app)


def test_facts_describe_the_study(evidence: Evidence) -> None:
    facts = evidence.facts
    assert (facts.name, facts.task, facts.question) == ("fake", "encoding", "Does a higher rank help?")
    assert (facts.sampler, facts.is_adaptive, facts.is_confirmed, facts.is_finished) == ("grid", False, True, True)
    assert (facts.n_searched, facts.n_complete, facts.n_failed) == (16, 14, 1)
    assert {role: len(names) for role, names in facts.stories.items()} == {"fit": 12, "validation": 5, "test": 3}
    assert facts.n_voxels == {"s1": 200, "s2": 200}
    assert evidence.left_out == "1 failed, 1 stopped early, 1 repeated, 1 not LoRA"
    assert len(evidence.used) == 12


def test_levels_are_the_scores_of_the_baselines(folder: Path, evidence: Evidence) -> None:
    frozen = read_json(folder / "trials" / "baseline-frozen" / "record.json")["scores"]["cc_mean"]
    tested = read_json(folder / "trials" / "test-baseline-frozen" / "record.json")["scores"]["cc_test"]
    assert (evidence.levels.frozen, evidence.levels.frozen_test) == (frozen, tested)
    with np.load(folder / "trials" / "baseline-frozen" / "details.npz") as details:
        assert evidence.levels.ceiling == pytest.approx(details["validation/cc_max/story00/s1"].mean(), abs=1e-6)
    assert evidence.levels.ceiling_test is None


def test_tables_have_their_documented_columns(evidence: Evidence) -> None:
    assert set(gather_module.EPOCHS) <= set(evidence.epochs)
    assert set(gather_module.STORIES) == set(evidence.stories)
    assert evidence.epochs.loc[evidence.epochs["is_used"], "trial_id"].nunique() == 12
    assert evidence.varied == ("rank", "lr")
    assert set(evidence.varied) <= set(evidence.used)
    assert evidence.importances["parameter"].tolist()[0] == "rank"
    assert evidence.history["value"].max() == evidence.history["best_so_far"].iloc[-1]
    assert evidence.best_id == evidence.history.loc[evidence.history["value"].idxmax(), "trial_id"]
    for name in ("by_rank", "rank_by_lr", "slopes"):
        assert len(getattr(evidence, name))


def test_voxels_hold_the_cc_of_best_and_frozen(folder: Path, evidence: Evidence) -> None:
    assert evidence.voxels.groupby("subject").size().to_dict() == {"s1": 200, "s2": 200}
    with np.load(folder / "trials" / str(evidence.best_id) / "cc.npz") as cc:
        best = evidence.voxels.loc[evidence.voxels["subject"] == "s2", "best"].to_numpy()
        np.testing.assert_array_equal(best, cc["s2"])
    assert np.isnan(evidence.voxels["frozen"].iloc[0])


def test_stages_add_up_to_the_total_time(evidence: Evidence) -> None:
    assert "0015" not in evidence.seconds["trial_id"].tolist()  # a repeat took none
    parts = evidence.seconds[["seconds_train", "seconds_embed", "seconds_ridge", "seconds_other"]].sum(axis="columns")
    np.testing.assert_allclose(parts, evidence.seconds["seconds_total"], rtol=0, atol=1e-9)


def test_confirmed_holds_finalists_with_bias_and_gain(folder: Path, evidence: Evidence) -> None:
    fixed = read_json(folder / "confirm.json")
    assert evidence.confirmed["is_winner"].tolist() == [True, False]
    assert evidence.confirmed["trial_id"].iloc[0] == fixed["winner"]
    assert evidence.confirmed["n_seeds"].tolist() == [2, 2]
    bias = {finalist["trial_id"]: finalist["cc_searched"] - finalist["cc_confirmed"] for finalist in fixed["finalists"]}
    for row in evidence.confirmed.itertuples():
        assert row.selection_bias == pytest.approx(bias[row.trial_id], abs=1e-15)
    winner = evidence.confirmed.iloc[0]
    assert winner["gain_test"] == pytest.approx(winner["cc_test"] - winner["frozen_test"], abs=1e-12)
    assert winner["low"] < winner["gain_test"] < winner["high"]
    assert winner["unit"] == "time inside these stories"
    gains = evidence.stories[evidence.stories["role"] == "test"].groupby("trial_id")["cc_mean"].mean()
    expected = gains[winner["test_id"]] - gains[winner["frozen_test_id"]]
    assert winner["gain_of_stories"] == pytest.approx(expected, abs=1e-6)


def test_verdict_record_is_plain_json(folder: Path, evidence: Evidence) -> None:
    record = json.loads(json.dumps(verdict_record(evidence.verdicts), allow_nan=False))
    assert list(record) == ["tuning", "rank"]
    assert (record["tuning"]["answer"], record["rank"]["answer"], record["rank"]["delta"]) == ("helps", "helps", 0.002)
    assert record["rank"]["effect"]["estimate"] == evidence.verdicts[1].effect.estimate  # type: ignore[union-attr]
    assert isinstance(record["tuning"]["sentences"], list)
    assert gather(folder, 0.1).verdicts[1].answer == "no effect"  # with a larger delta


def test_undecided_study_names_the_next_runs(tmp_path: Path) -> None:
    noisy = searched_study(tmp_path / "noisy", Truth(sd_noise=0.01), replace(SMALL, n_stories=2))
    tuning, rank = gather(noisy).verdicts
    assert rank.answer == tuning.answer == "cannot tell"
    assert str(rank.command).startswith(f"{RUN} --outer-folds 5")
    assert "validation stories" in rank.sentences[-1]
    assert tuning.command == f"{RESUME} noisy --out {tmp_path} --confirm 3"


def test_warnings_of_an_adaptive_or_unfinished_study(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "tpe", Truth(), SMALL, sampler="tpe", confirm=False)
    forced = {"first_trial": "0002", "at": "2026-02-01", "differences": [{"what": "the code"}]}
    change(folder, {"trials": 40}, forced=[forced])
    evidence = gather(folder)
    assert evidence.facts.is_adaptive
    assert all(verdict.is_exploratory for verdict in evidence.verdicts)
    assert evidence.warnings[0] == "24 of 40 searched trials have not ended yet"
    assert any("sampler tpe" in line for line in evidence.warnings)
    assert evidence.warnings[-1] == (
        "trials from 0002 on may not be comparable with earlier ones: the study was forced to resume (2026-02-01) "
        "although it differs in the code (see study.json)"
    )
    assert evidence.verdicts[1].command == f"{RESUME} tpe --out {tmp_path}"
    change(folder, {"sampler": "grid", "scheduler": "asha"})
    assert gather(folder).facts.is_adaptive


def test_study_without_trials_and_text_only_study(tmp_path: Path) -> None:
    folder = searched_study(tmp_path / "empty", plan=replace(SMALL, seeds=()))
    evidence = gather(folder)
    assert (evidence.best_id, len(evidence.used), len(evidence.history)) == (None, 0, 0)
    assert [verdict.answer for verdict in evidence.verdicts] == ["cannot tell", "cannot tell"]
    assert evidence.verdicts[0].command == evidence.verdicts[1].command  # a search: there is nothing to confirm
    change(folder, task="classification", splits=[{"training": ["10 texts (a)"], "held-out": ["5 texts (b)"]}])
    of_text = gather(folder)
    assert (of_text.verdicts, of_text.facts.stories, of_text.facts.metric.column) == ((), {}, "accuracy")


def test_largest_grid_repeats_with_another_seed(tmp_path: Path) -> None:
    folder = searched_study(tmp_path / "large", Truth(sd_trial=0.05), replace(FULL, seeds=(0,), n_stories=2))
    change(folder, splits=read_json(folder / "study.json")["splits"] * 5)
    rank = gather(folder).verdicts[1]
    assert rank.answer == "cannot tell"
    assert rank.command == f"{RUN} --seed 1 --outer-folds 5 --name large-seed1 --out {tmp_path}"
    assert "runs this grid again" in rank.sentences[-1]
    assert "trials (lora_rank) in each of 5 outer folds, 810 trainings in all" in rank.sentences[-1]
    assert "(from 2 stories: a guess)" in rank.sentences[-1]


def test_next_command_names_the_folder_only_if_not_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = searched_study(tmp_path / "results" / "one", plan=replace(SMALL, n_stories=2))
    change(folder, name="other")
    monkeypatch.chdir(tmp_path)
    assert commands(folder)[0] == f"{RESUME} one --confirm 3"
    assert commands(folder, 0.003)[1] == f"{RUN} --outer-folds 5 --delta 0.003 --name one-lora_rank"
    monkeypatch.chdir("/")
    assert commands(folder)[0] == f"{RESUME} one --out {tmp_path}/results --confirm 3"
    assert resume_command("s3://bucket/far/one") == f"{RESUME} one --out s3://bucket/far"


def test_next_command_is_the_pending_confirm_phase_or_missing_baseline(tmp_path: Path) -> None:
    folder = searched_study(tmp_path / "clear", Truth(tuning=0.02), replace(SMALL, n_stories=5))
    tuning = gather(folder).verdicts[0]
    assert (tuning.answer, str(tuning.command).split()[-2:]) == ("helps", ["--confirm", "3"])
    (folder / "trials" / "baseline-frozen" / "record.json").unlink()
    tuning = gather(folder).verdicts[0]
    assert "no frozen baseline" in tuning.headline
    assert tuning.command == f"{RESUME} clear --out {tmp_path}"


def test_next_command_after_confirm_uses_more_stories(tmp_path: Path) -> None:
    truth = Truth(tuning=0.0, sd_noise=0.01)
    folder = write_fake_study(tmp_path / "open", truth, replace(SMALL, n_test=2), odd=False)
    tuning = gather(folder).verdicts[0]
    assert tuning.answer == "cannot tell"
    assert tuning.command == f"{RUN} --outer-folds 5 --name open-folds --confirm 0 --out {tmp_path}"
    assert "15 validation stories in 5 outer folds" in tuning.sentences[-1]
    change(folder, {"voxels": "500"})  # voxels were chosen with stories that outer folds would rotate
    tuning = gather(folder).verdicts[0]
    assert tuning.command is None
    assert "only more stories can" in tuning.sentences[-1]


def test_next_command_if_all_trials_failed_or_none_was_searched(tmp_path: Path) -> None:
    folder = searched_study(tmp_path / "bad")
    for file in sorted(folder.glob("trials/0*/record.json")):
        write_json(file, read_json(file) | {"status": "FAILED", "scores": {}, "stories": [], "epochs": []})
    rank = gather(folder).verdicts[1]
    assert rank.sentences[-1].startswith("All 12 searched trials failed; fix the error")
    assert rank.command == f"{RUN} --name bad-again --out {tmp_path}"
    empty = searched_study(tmp_path / "empty", plan=replace(SMALL, seeds=()))
    small = RUN.replace("lora_rank", "lora_rank_small")
    assert commands(empty)[1] == f"{small} --name empty-lora_rank_small --out {tmp_path}"


def test_compare_shows_two_studies_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = searched_study(tmp_path / "other", plan=replace(SMALL, n_stories=5, subjects=("s1", "s2")))
    table = compare(gather(folder), gather(other)).set_index("finding")
    assert table.columns.tolist() == ["fake", "other"]
    assert table.loc["rank"].tolist() == ["helps", gather(other).verdicts[1].answer]
    assert table.loc["complete trials"].tolist() == ["14", "12"]
    code, out, _ = run(capsys, folder, other)
    assert code == 0
    assert "effect of rank" in out and "other" in out


def test_compare_refuses_studies_on_other_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(capsys, folder, searched_study(tmp_path / "fewer"))
    assert_refused(ended, "error: fake and fewer: cannot be compared, since their ")
    assert ended.out == ""
    study = read_json(folder / "study.json")
    for other, message in (
        (study | {"data": study["data"] | {"fingerprint": "x"}}, "their data differ: abc and x"),
        (study | {"data": study["data"] | {"trim_trs": [5, 10]}}, "their trims differ"),
        (study | {"voxels": {"key": "other"}}, "their voxels differ"),
        (study | {"splits": [study["splits"][0] | {"test": ["else"]}]}, "their test stories differ"),
    ):
        with pytest.raises(InputError, match=message):
            check_comparable(study, other)
    check_comparable(study, study | {"name": "again"})


@pytest.mark.slow
def test_unscored_epochs_change_no_verdict_and_figure(folder: Path, tmp_path: Path) -> None:
    """As ``score_every`` leaves them: losses after every epoch, CC after the last."""
    rare = tmp_path / "rare"
    shutil.copytree(folder, rare)
    for file in rare.glob("trials/*/record.json"):
        record = read_json(file)
        for epoch in record["epochs"][:-1]:
            del epoch["cc_mean"]
        write_json(file, record)
    every, sparse = gather(folder), gather(rare)
    assert sparse.epochs["cc_mean"].notna().sum() < every.epochs["cc_mean"].notna().sum()
    assert [verdict.answer for verdict in sparse.verdicts] == [verdict.answer for verdict in every.verdicts]
    np.testing.assert_array_equal(sparse.epochs["mlm_loss_heldout"], every.epochs["mlm_loss_heldout"])
    drawn = [figure.name for figure in draw_all(sparse, tmp_path / "figures")]
    assert {"losses", "score_by_rank", "history"} <= set(drawn)
