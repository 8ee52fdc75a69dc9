"""A whole study gathered: every table with its columns, verdicts in summary.json, two studies beside each other."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_study import FULL, SMALL, Truth, write_fake_study

from bert_encoding.core.command_line import run_app
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


@pytest.fixture(scope="module", autouse=True)
def _small_forests() -> Iterator[None]:
    """Forests have tests of their own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(importances, "N_TREES", 2)
        monkeypatch.setattr(gather_module, "importances", partial(importances.importances, n_resamples=0))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = replace(SMALL, n_stories=5, subjects=("s1", "s2"))
    return write_fake_study(tmp_path_factory.mktemp("study") / "fake", Truth(effect=0.01), plan)


@pytest.fixture(scope="module")
def found(folder: Path) -> Evidence:
    return gather(folder)


def test_what_study_it_is(found: Evidence) -> None:
    facts = found.facts
    assert (facts.name, facts.task, facts.question) == ("fake", "encoding", "Does a higher rank help?")
    assert (facts.sampler, facts.is_adaptive, facts.is_confirmed, facts.is_finished) == ("grid", False, True, True)
    assert (facts.n_searched, facts.n_complete, facts.n_stopped, facts.n_failed, facts.n_repeats) == (16, 14, 1, 1, 1)
    assert {role: len(names) for role, names in facts.stories.items()} == {"fit": 12, "validation": 5, "test": 3}
    assert facts.n_voxels == {"s1": 200, "s2": 200}
    assert found.left_out == (1, 1, 1, 1)
    assert len(found.used) == 12


def test_levels_are_those_of_the_baselines(folder: Path, found: Evidence) -> None:
    frozen = read_json(folder / "trials" / "baseline-frozen" / "record.json")["scores"]["cc_mean"]
    tested = read_json(folder / "trials" / "test-baseline-frozen" / "record.json")["scores"]["cc_test"]
    assert (found.levels.frozen, found.levels.frozen_test) == (frozen, tested)
    with np.load(folder / "trials" / "baseline-frozen" / "details.npz") as details:
        assert found.levels.ceiling == pytest.approx(details["validation/cc_max/story00/s1"].mean(), abs=1e-6)
    assert found.levels.ceiling_test is None


def test_tables_have_their_documented_columns(found: Evidence) -> None:
    assert set(gather_module.EPOCHS) <= set(found.epochs)
    assert set(gather_module.STORIES) == set(found.stories)
    assert found.epochs.loc[found.epochs["is_used"], "trial_id"].nunique() == 12
    assert found.varied == ("rank", "lr")
    assert set(found.varied) <= set(found.used)
    assert found.importances["parameter"].tolist()[0] == "rank"
    assert found.history["value"].max() == found.history["best_so_far"].iloc[-1]
    assert found.best_id == found.history.loc[found.history["value"].idxmax(), "trial_id"]
    for name in ("by_rank", "rank_by_lr", "best_lr", "slopes"):
        assert len(getattr(found, name))


def test_voxels_of_best_and_frozen(folder: Path, found: Evidence) -> None:
    assert found.voxels.groupby("subject").size().to_dict() == {"s1": 200, "s2": 200}
    with np.load(folder / "trials" / str(found.best_id) / "cc.npz") as cc:
        of_one = found.voxels.loc[found.voxels["subject"] == "s2", "best"].to_numpy()
        np.testing.assert_array_equal(of_one, cc["s2"])
    assert np.isnan(found.voxels["frozen"].iloc[0])


def test_where_time_went(found: Evidence) -> None:
    assert "0015" not in found.seconds["trial_id"].tolist()  # a repeat took none
    parts = found.seconds[["seconds_train", "seconds_embed", "seconds_ridge", "seconds_other"]].sum(axis="columns")
    np.testing.assert_allclose(parts, found.seconds["seconds_total"], rtol=0, atol=1e-9)


def test_finalists_and_selection_bias(folder: Path, found: Evidence) -> None:
    fixed = read_json(folder / "confirm.json")
    assert found.confirmed["is_winner"].tolist() == [True, False]
    assert found.confirmed["trial_id"].iloc[0] == fixed["winner"]
    assert found.confirmed["n_seeds"].tolist() == [2, 2]
    best = max(fixed["finalists"], key=lambda one: one["cc_searched"])
    assert found.selection_bias == pytest.approx(best["cc_searched"] - best["cc_confirmed"], abs=1e-15)
    winner = found.confirmed.iloc[0]
    assert winner["gain_test"] == pytest.approx(winner["cc_test"] - winner["frozen_test"], abs=1e-12)
    assert winner["low"] < winner["gain_test"] < winner["high"]
    assert winner["unit"] == "time inside these stories"
    gains = found.stories[found.stories["role"] == "test"].groupby("trial_id")["cc_mean"].mean()
    expected = gains[winner["test_id"]] - gains[winner["frozen_test_id"]]
    assert winner["gain_of_stories"] == pytest.approx(expected, abs=1e-6)


def test_verdicts_are_in_plain_values(found: Evidence) -> None:
    assert [verdict.answer for verdict in found.verdicts] == ["helps", "helps"]
    told = json.loads(json.dumps(verdict_record(found.verdicts), allow_nan=False))
    assert list(told) == ["tuning", "rank"]
    assert told["rank"]["answer"] == "helps"
    assert told["rank"]["effect"]["estimate"] == found.verdicts[1].effect.estimate  # type: ignore[union-attr]
    assert told["rank"]["delta"] == 0.002
    assert isinstance(told["tuning"]["sentences"], list)


def test_a_larger_delta_changes_the_answer(folder: Path) -> None:
    assert gather(folder, 0.1).verdicts[1].answer == "no effect"


def test_a_study_that_cannot_tell_names_the_runs_that_would(tmp_path: Path) -> None:
    noisy = write_fake_study(
        tmp_path / "noisy", Truth(sd_noise=0.01), replace(SMALL, n_stories=2), confirm=False, odd=False
    )
    tuning, rank = gather(noisy).verdicts
    assert rank.answer == tuning.answer == "cannot tell"
    assert rank.command is not None
    assert rank.command.startswith("python study/run.py --space lora_rank --data demo --model minilm --outer-folds 5")
    assert "validation stories" in rank.sentences[-1]
    assert tuning.command == f"python study/run.py --resume --name noisy --out {tmp_path} --confirm 3"


def test_an_adaptive_or_stopped_or_unfinished_study_says_so(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "tpe", Truth(), SMALL, sampler="tpe", confirm=False)
    study = read_json(folder / "study.json")
    study["options"]["trials"] = 40
    write_json(folder / "study.json", study)
    found = gather(folder)
    assert found.facts.is_adaptive
    assert all(verdict.is_exploratory for verdict in found.verdicts)
    assert found.warnings[0] == "24 of 40 searched trials have not ended yet"
    assert any("sampler tpe" in line for line in found.warnings)
    assert found.verdicts[1].command == f"python study/run.py --resume --name tpe --out {tmp_path}"
    study["options"] |= {"sampler": "grid", "scheduler": "asha"}
    write_json(folder / "study.json", study)
    assert gather(folder).facts.is_adaptive


def test_a_study_without_a_trial_and_one_on_text(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "empty", Truth(), replace(SMALL, seeds=()), confirm=False, odd=False)
    found = gather(folder)
    assert (found.best_id, found.selection_bias, len(found.used), len(found.history)) == (None, None, 0, 0)
    assert [verdict.answer for verdict in found.verdicts] == ["cannot tell", "cannot tell"]
    assert found.verdicts[0].command == found.verdicts[1].command  # a search, since there is nothing to confirm
    study = read_json(folder / "study.json")
    study |= {"task": "classification", "splits": [{"training": ["10 texts (a)"], "held-out": ["5 texts (b)"]}]}
    write_json(folder / "study.json", study)
    of_text = gather(folder)
    assert (of_text.verdicts, of_text.facts.stories, of_text.facts.metric) == ((), {}, "accuracy")
    for name in Evidence._fields:
        assert getattr(of_text, name) is not None or name in ("best_id", "selection_bias")


def test_no_study_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no study here \(study.json is missing\)"):
        gather(tmp_path)


def test_the_largest_study_is_not_told_to_run_itself_again(tmp_path: Path) -> None:
    plan = replace(FULL, seeds=(0,), n_stories=2)
    folder = write_fake_study(tmp_path / "large", Truth(sd_trial=0.05), plan, confirm=False, odd=False)
    study = read_json(folder / "study.json")
    study["splits"] *= 5
    write_json(folder / "study.json", study)
    rank = gather(folder).verdicts[1]
    assert rank.answer == "cannot tell"
    assert rank.command == (
        "python study/run.py --space lora_rank --data demo --model minilm --seed 1 --outer-folds 5 --name large-seed1 "
        f"--out {tmp_path}"
    )
    assert "runs this design once more" in rank.sentences[-1]
    assert "trials (lora_rank) in each of 5 outer folds, 810 trainings in all" in rank.sentences[-1]
    assert "(from 2 stories: a guess)" in rank.sentences[-1]


# --- what to run next -------------------------------------------------------------------------------------------------


def commands(folder: Path, delta: float = 0.002) -> tuple[str | None, str | None]:
    tuning, rank = gather(folder, delta).verdicts
    return tuning.command, rank.command


def test_the_folder_is_named_only_if_it_is_not_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(SMALL, n_stories=2)
    folder = write_fake_study(tmp_path / "results" / "one", Truth(), plan, name="other", confirm=False, odd=False)
    monkeypatch.chdir(tmp_path)
    assert commands(folder)[0] == "python study/run.py --resume --name one --confirm 3"
    assert commands(folder, 0.003)[1] == (
        "python study/run.py --space lora_rank --data demo --model minilm --outer-folds 5 --delta 0.003 "
        "--name one-lora_rank"
    )
    monkeypatch.chdir("/")
    assert commands(folder)[0] == f"python study/run.py --resume --name one --out {tmp_path}/results --confirm 3"
    assert resume_command("s3://bucket/far/one") == "python study/run.py --resume --name one --out s3://bucket/far"


def test_the_confirm_phase_is_offered_while_it_has_not_run_whatever_the_answer(tmp_path: Path) -> None:
    plan = replace(SMALL, n_stories=5)
    folder = write_fake_study(tmp_path / "clear", Truth(tuning=0.02), plan, confirm=False, odd=False)
    tuning = gather(folder).verdicts[0]
    assert (tuning.answer, str(tuning.command).split()[-2:]) == ("helps", ["--confirm", "3"])
    (folder / "trials" / "baseline-frozen" / "record.json").unlink()
    tuning = gather(folder).verdicts[0]
    assert "no frozen baseline" in tuning.headline
    assert tuning.command == f"python study/run.py --resume --name clear --out {tmp_path}"


def test_after_the_confirm_phase_more_stories_are_asked(tmp_path: Path) -> None:
    plan = replace(SMALL, n_test=2)
    folder = write_fake_study(tmp_path / "open", Truth(tuning=0.0, sd_noise=0.01), plan, odd=False)
    tuning = gather(folder).verdicts[0]
    assert tuning.answer == "cannot tell"
    assert tuning.command == (
        "python study/run.py --space lora_rank --data demo --model minilm --outer-folds 5 --name open-folds "
        f"--confirm 0 --out {tmp_path}"
    )
    assert "15 validation stories in 5 outer folds" in tuning.sentences[-1]
    study = read_json(folder / "study.json")
    study["options"]["voxels"] = "500"  # chosen by stories, which outer folds would not leave
    write_json(folder / "study.json", study)
    tuning = gather(folder).verdicts[0]
    assert tuning.command is None
    assert "only more stories would" in tuning.sentences[-1]


def test_a_study_whose_trials_all_failed_or_that_searched_nothing(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "bad", Truth(), SMALL, confirm=False, odd=False)
    for file in sorted(folder.glob("trials/0*/record.json")):
        write_json(file, read_json(file) | {"status": "FAILED", "scores": {}, "stories": [], "epochs": []})
    rank = gather(folder).verdicts[1]
    assert rank.sentences[-1].startswith("All 12 searched trials failed; mend the error")
    assert rank.command == (
        f"python study/run.py --space lora_rank --data demo --model minilm --name bad-again --out {tmp_path}"
    )
    empty = write_fake_study(tmp_path / "empty", Truth(), replace(SMALL, seeds=()), confirm=False, odd=False)
    assert commands(empty)[1] == (
        "python study/run.py --space lora_rank_small --data demo --model minilm --name empty-lora_rank_small "
        f"--out {tmp_path}"
    )


# --- two studies ------------------------------------------------------------------------------------------------------


def test_two_studies_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_fake_study(
        tmp_path / "other", Truth(), replace(SMALL, n_stories=5, subjects=("s1", "s2")), confirm=False, odd=False
    )
    table = compare(gather(folder), gather(other)).set_index("finding")
    assert table.columns.tolist() == ["fake", "other"]
    assert table.loc["rank"].tolist() == ["helps", gather(other).verdicts[1].answer]
    assert table.loc["complete trials"].tolist() == ["14", "12"]
    assert run(str(folder), str(other)) == 0
    out = capsys.readouterr().out
    assert "effect of rank" in out
    assert "other" in out


def test_studies_on_other_stories_or_data_are_not_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = write_fake_study(tmp_path / "fewer", Truth(), SMALL, confirm=False, odd=False)
    assert run(str(folder), str(fewer)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: fake and fewer: cannot be compared, since their ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    study = read_json(folder / "study.json")
    for other, what in (
        (study | {"data": study["data"] | {"fingerprint": "x"}}, "their data differ: abc and x"),
        (study | {"data": study["data"] | {"trim_trs": [5, 10]}}, "their trims differ"),
        (study | {"voxels": {"key": "other"}}, "their voxels differ"),
        (study | {"splits": [study["splits"][0] | {"test": ["else"]}]}, "their test stories differ"),
    ):
        with pytest.raises(InputError, match=what):
            check_comparable(study, other)
    check_comparable(study, study | {"name": "again"})


@pytest.mark.slow
def test_the_command_prints_the_verdict(folder: Path, found: Evidence, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder)) == 0
    out = capsys.readouterr().out
    for verdict in found.verdicts:
        assert verdict.question in out
        assert verdict.headline in out
    assert run(str(folder), "--delta", "0") == 2
    assert capsys.readouterr().err == "error: --delta 0: must be a CC above 0 and below 1\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(run_app(analysis.app, list(arguments)))
    return int(str(ended.value.code or 0))


@pytest.mark.slow
def test_epochs_that_were_not_scored_cost_no_figure_and_no_verdict(folder: Path, tmp_path: Path) -> None:
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
    assert [one.answer for one in sparse.verdicts] == [one.answer for one in every.verdicts]
    np.testing.assert_array_equal(sparse.epochs["mlm_loss_heldout"], every.epochs["mlm_loss_heldout"])
    drawn = [one.name for one in draw_all(sparse, tmp_path / "figures")]
    assert {"losses", "score_by_rank", "history"} <= set(drawn)
