"""Resuming a study: what may not have changed, and what can be forced; without Ray."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from make_data import edit_responses, edit_text, make_lab, make_tiny_bert
from run_commands import Ended, assert_refused, read_files, run_study_command

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.trial.record import TrialRecord, read_record, write_record
from study.search import tuning
from study.session import identity as identity_module
from study.session import session as session_module
from study.session.identity import _look_around, differences, identify, resumed
from study.setup.encoding_study import prepare
from study.setup.resolve import resolve_options
from study.setup.spaces import load_space

pytestmark = pytest.mark.usefixtures("no_ray")


Resume = Callable[..., Ended]


class FinishedStudy(NamedTuple):
    """A finished study of two baselines and two trials, made without Ray."""

    folder: Path
    arguments: list[str]
    space: Path
    lab: Path


@pytest.fixture
def study(lab: Path, tiny_bert: Path, tmp_path: Path) -> FinishedStudy:
    space = tmp_path / "mine.py"
    space.write_text(load_space("smoke").path.read_text())
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    options = {"space": str(space), "data": str(lab), "model": str(model), "out": str(tmp_path / "out"), "name": "s"}
    options |= {"confirm": 0}
    loaded = load_space(str(space))
    study = prepare(resolve_options(options, {}, loaded), loaded)
    identity = identify(study, study.task())
    with session_module._open_folder(study.options.folder, identity, False) as folder:
        for n, method in enumerate(("frozen", "word_rate", "lora", "lora")):
            params = {"log2_rank": 1 + 3 * (n - 2)} if method == "lora" else {}
            config = replace(study.base, method=method, rank=2 ** params.get("log2_rank", 3))
            trial_id, phase = (f"{n - 1:04d}", "search") if method == "lora" else (f"baseline-{method}", "baseline")
            scores = {"cc_mean": 0.1 * n, "cc_seen": 0.1}
            write_record(
                folder, TrialRecord("COMPLETE", method, asdict(config), trial_id, phase, params=params, scores=scores)
            )
    return FinishedStudy(folder, ["--resume", "--name", "s", "--out", str(tmp_path / "out")], space, lab)


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
def test_the_precision_is_that_of_the_device_that_a_trial_has(
    gpus: float, device: str, lab: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may see a GPU that its trials are not given."""
    loaded = load_space("smoke")
    options = resolve_options({"space": "smoke", "data": str(lab), "model": str(tiny_bert)}, {}, loaded)
    study = prepare(replace(options, gpus_per_trial=gpus), loaded)
    monkeypatch.setattr(identity_module, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(identity_module, "resolve_precision", lambda precision, where: f"{precision} on {where}")
    assert identify(study, study.task())["precision"] == f"auto on {device}"


@pytest.fixture
def resume(study: FinishedStudy, capsys: pytest.CaptureFixture[str]) -> Resume:
    """Run ``study/run.py --resume`` with further arguments."""
    return lambda *arguments: run_study_command([*study.arguments, *arguments], capsys)


def test_a_finished_study_can_be_resumed_and_has_nothing_to_do(study: FinishedStudy, resume: Resume) -> None:
    """All options but the name come from the study."""
    before = read_files(study.folder / "trials")
    ended = resume()
    assert (ended.code, ended.error) == (0, "")
    assert "nothing to do: 2 searched trials are finished; raise --trials" in ended.out
    assert "Best trial 0002: CC 0.3000; frozen baseline: CC 0.0000" in ended.out
    assert read_files(study.folder / "trials") == before
    assert (study.folder / "trials.parquet").is_file()


def change_record(study: FinishedStudy, **values: Any) -> None:
    """Change what the study recorded when it began."""
    file = study.folder / "study.json"
    file.write_text(json.dumps(read_json(file) | values))


def edit_nothing(study: FinishedStudy) -> None:
    """Change only options."""


def edit_space(study: FinishedStudy) -> None:
    study.space.write_text(study.space.read_text().replace("1, 4)", "1, 5)"))


def edit_version(study: FinishedStudy) -> None:
    versions = read_json(study.folder / "study.json")["versions"]
    change_record(study, versions=versions | {"torch": "other"})


CHANGES: dict[str, tuple[Callable[[FinishedStudy], object], list[str], str]] = {
    "a response": (
        lambda study: edit_responses(study.lab, "beta", lambda rows: rows + 1e-9 * (np.arange(12) == 0)),
        [],
        "the data changed from ",
    ),
    "a word": (
        lambda study: edit_text(study.lab, "beta", lambda text: text.data.__setitem__(5, "otherwise")),
        [],
        "the data changed from ",
    ),
    "other data": (
        lambda study: make_lab(study.lab.parent / "other", seed=5),
        ["--data", "{folder}/other"],
        "the data changed from ",
    ),
    "the space's file": (edit_space, [], "the search space changed from "),
    "other space": (edit_nothing, ["--space", "lora_full"], "the search space changed from "),
    "test stories": (edit_nothing, ["--test-stories", "alpha"], "stories changed from "),
    "train stories": (edit_nothing, ["--train-stories", "5"], "changed from "),
    "outer folds": (edit_nothing, ["--outer-folds", "2"], "the number of outer folds changed from 1 to 2;"),
    "seed": (edit_nothing, ["--seed", "3"], "changed from "),
    "model": (
        lambda study: make_tiny_bert(study.lab.parent / "other", seed=1),
        ["--model", "{folder}/other"],
        "the model changed from ",
    ),
    "layer": (edit_nothing, ["--layer", "1"], "the setting layer changed from "),
    "epochs": (edit_nothing, ["--epochs", "2"], "the setting epochs changed from 1 to 2;"),
    "weights": (
        lambda study: shutil.copytree(
            make_tiny_bert(study.lab.parent / "other", seed=1), study.lab.parent / "model", dirs_exist_ok=True
        ),
        [],
        "the model changed from ",
    ),
    "code": (lambda study: change_record(study, code="other"), [], "the code of bert_encoding changed from other to "),
    "precision": (
        lambda study: change_record(study, precision="other"),
        [],
        "the precision of this machine changed from other to ",
    ),
    "version": (edit_version, [], "the version of torch changed from other to "),
    "mlm text": (edit_nothing, ["--mlm-text", "all"], "the setting mlm_text changed from fit to all;"),
}


@pytest.mark.table
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_study_is_refused_by_name_unless_forced(change: str, study: FinishedStudy, resume: Resume) -> None:
    edit, options, message = CHANGES[change]
    edit(study)
    options = [option.format(folder=study.lab.parent) for option in options]
    before, recorded = read_files(study.folder), read_json(study.folder / "study.json")
    records = read_files(study.folder / "trials")
    error = assert_refused(resume(*options), f"{study.folder}: cannot resume: ", message, "--name")
    assert assert_refused(resume("--dry-run", *options)) == error
    was, now = re.fullmatch(r".* changed from (.*) to (.*); give .*\n", error).groups()  # type: ignore[union-attr]
    assert was != now, "the difference must be visible"
    assert read_files(study.folder) == before
    ended = resume(*options, "--force-resume", "--trials", "2")
    assert (ended.code, ended.error) == (0, ""), ended
    (forced,) = read_json(study.folder / "study.json")["forced"]
    differences_text = " ".join(difference["what"] for difference in forced["differences"])
    assert message.partition("changed")[0].strip() in differences_text
    assert {name: recorded[name] for name in forced["was"]} == forced["was"]
    assert read_files(study.folder / "trials") == records
    assert resume().code == 0, "what was forced once is what the study is now"


def test_a_difference_late_in_a_long_split_is_visible(study: FinishedStudy) -> None:
    file = study.folder / "study.json"
    recorded = read_json(file)
    names = [f"story{i:03d}" for i in range(80)]
    before = recorded | {"splits": [{"fit": names[:60], "validation": names[60:79], "test": names[79:]}]}
    after = recorded | {"splits": [{"fit": names[:60], "validation": names[60:78], "test": names[78:79]}]}
    with pytest.raises(InputError, match="cannot resume: the validation stories changed from ") as refused:
        resumed(study.folder, before, after, False, "0003")
    was, now = re.fullmatch(r".* changed from (.*) to (.*); give .*", str(refused.value)).groups()  # type: ignore[union-attr]
    assert was != now


def test_a_study_that_another_run_holds_is_refused(study: FinishedStudy, resume: Resume) -> None:
    before = read_files(study.folder)
    with (study.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_refused(resume(), f"{study.folder}: another run is at work on this study")
    assert read_files(study.folder) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("trials/0001/record.json", content) for content in (b"", b'{"status": "COMP', b"[]")] + [("study.json", b"{}")],
)
def test_a_damaged_file_is_named_and_not_changed(
    name: str, content: bytes, study: FinishedStudy, resume: Resume
) -> None:
    (study.folder / name).write_bytes(content)
    before = read_files(study.folder)
    assert_refused(resume(), f"{study.folder / name}: damaged", "move it away")
    assert read_files(study.folder) == before


def test_a_study_is_extended_by_what_it_lacks(study: FinishedStudy, resume: Resume) -> None:
    before = read_files(study.folder)
    ended = resume("--trials", "5", "--dry-run")
    assert (ended.code, ended.error) == (0, "")
    assert "2 baselines, 5 searched, 2 of them done" in ended.out
    assert "runs on: this machine" in ended.out
    assert "note: " not in ended.out
    assert read_files(study.folder) == before


def test_a_study_in_which_a_trial_failed_ends_with_its_own_exit_code(study: FinishedStudy, resume: Resume) -> None:
    failed = replace(read_record(study.folder, "0002"), status="FAILED", error="no end after 5 s", scores={})
    write_record(study.folder, failed)
    ended = resume()
    assert (ended.code, ended.error) == (3, "")
    assert "trial 0002 FAILED: no end after 5 s" in ended.out


@pytest.mark.table
@pytest.mark.parametrize(
    ("options", "kept"), [([], ["0001", "0002"]), (["--keep-adapters", "1"], ["0002"]), (["--keep-adapters", "0"], [])]
)
def test_the_best_adapters_are_kept(options: list[str], kept: list[str], study: FinishedStudy, resume: Resume) -> None:
    for name in ("0001", "0002"):
        (study.folder / "trials" / name / "adapter").mkdir()
    for session_options in (options, []):  # the second session remembers the number
        assert resume(*session_options).code == 0
        assert [path.parent.name for path in sorted(study.folder.glob("trials/*/adapter"))] == kept


def test_a_forced_study_records_how_it_changed(
    study: FinishedStudy, resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = read_json(study.folder / "study.json")
    change_record(study, code="older", versions=now["versions"] | {"torch": "1.0"}, created="long ago")
    refused = assert_refused(resume(), "the code of bert_encoding changed from older to ")
    assert "or resume with --force-resume; also changed: the version of torch\n" in refused
    before = read_files(study.folder)
    rehearsed = resume("--force-resume", "--dry-run")
    assert (rehearsed.code, rehearsed.error) == (0, "")
    assert "note: the code of bert_encoding changed from older to " in rehearsed.out
    assert "note: the version of torch changed from 1.0 to " in rehearsed.out
    assert read_files(study.folder) == before
    message = "note: trials from 0003 on may not be comparable with earlier ones"
    for options in (["--force-resume", "--trials", "1"], []):  # the study stays mixed
        assert message in resume(*options).out
    after = read_json(study.folder / "study.json")
    (forced,) = after["forced"]
    assert [difference["before"] for difference in forced["differences"]] == ["older", "1.0"]
    assert (forced["first_trial"], after["created"]) == ("0003", "long ago")
    searched: list[Any] = []
    monkeypatch.setattr(session_module, "connect", lambda machines: nullcontext(study.folder))
    monkeypatch.setattr(tuning, "run_search", lambda *given: searched.append(given[-1]))
    resume("--trials", "3")
    assert searched == [True], "the search is told that earlier trials may be of another space"


def test_nothing_is_recorded_where_nothing_changed(study: FinishedStudy, resume: Resume) -> None:
    assert resume("--force-resume").code == 0
    assert "forced" not in read_json(study.folder / "study.json")


@pytest.mark.parametrize(
    ("recorded", "options", "change"),
    [
        ({}, ["--voxels", "5"], "the voxels changed from all ("),  # a number is chosen by the study
        ({"task": "adapt"}, [], "the task changed from adapt to encoding"),
    ],
)
def test_chosen_voxels_and_tasks_are_never_mixed(
    recorded: dict[str, Any], options: list[str], change: str, study: FinishedStudy, resume: Resume
) -> None:
    change_record(study, **recorded)
    assert_refused(resume("--force-resume", *options), f"cannot resume, even by force: {change}")


def test_what_is_not_known_yet_is_no_difference(study: FinishedStudy) -> None:
    """The precision before a cluster's worker was asked; the weights of a model that a rehearsal may not fetch."""
    recorded = read_json(study.folder / "study.json")
    assert differences(recorded, recorded) == []
    assert differences(recorded | {"precision": None}, recorded) == []
    assert differences(recorded, recorded | {"precision": None}) == []
    unknown = recorded | {"model": recorded["model"] | {"weights": None}}
    assert differences(recorded, unknown) == []
    other = recorded | {"model": {"name": "another", "weights": None}}
    assert [difference.what for difference in differences(recorded, other)] == ["the model"]
    assert resumed(study.folder, recorded, recorded | {"precision": None}, False, "0003") == recorded
    assert resumed(study.folder, recorded | {"precision": None}, recorded, False, "0003") == recorded


def test_a_forced_study_keeps_the_choice_of_voxels_that_its_trials_used(study: FinishedStudy) -> None:
    recorded = read_json(study.folder / "study.json") | {"voxels": {"asked": "5", "key": "chosen"}}
    now = recorded | {"voxels": {"asked": "5", "key": None}, "code": "newer", "precision": None}
    identity = resumed(study.folder, recorded, now, True, "0003")
    assert {name: identity[name] for name in recorded} == recorded | {"code": "newer"}
    assert identity["forced"][0]["was"] == {"code": recorded["code"]}


def test_a_machine_that_does_not_see_the_study_is_named(study: FinishedStudy, tmp_path: Path) -> None:
    assert _look_around("float32", str(study.folder)) == "float32"
    gone = tmp_path / "gone"
    with pytest.raises(InputError, match=rf"{gone}: {os.uname().nodename}, a machine of the cluster, does not see it"):
        _look_around("float32", str(gone))
