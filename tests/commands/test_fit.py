"""The commands ``fit`` and ``predict`` on a study's folder: trials, data and files."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_data import make_lab
from make_trials import PEFT_WARNS
from run_commands import refusal, run_command

from bert_encoding.analyses.model_file import load_model
from bert_encoding.commands.fit import choose_trial
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.statistics.correlation import correlate
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.record import TrialRecord, adapter_folder, write_record
from bert_encoding.trial.run import run_trial
from bert_encoding.trial.voxel_selection import keep_voxels, voxels_key, write_voxels
from study.session.identity import identify
from study.setup.encoding_study import prepare
from study.setup.resolve import resolve_options
from study.setup.spaces import load_space

SUBJECTS = ("a", "b")
TRIALS = {"baseline-frozen": "frozen", "baseline-word_rate": "word_rate", "0001": "lora"}

pytestmark = PEFT_WARNS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A study's folder ``s`` next to its data ``lab``, as written by ``study/run.py``, without Ray."""
    folder = tmp_path_factory.mktemp("root")
    make_lab(folder / "lab", subjects=SUBJECTS, n_words=100)
    options = {"space": "smoke", "data": str(folder / "lab"), "model": str(tiny_bert), "epochs": 1, "name": "s"}
    options |= {"embed_precision": "float32", "out": str(folder)}
    space = load_space("smoke")
    study = prepare(resolve_options(options, {}, space), space)
    task = study.task()
    (folder / "s").mkdir()
    write_json(folder / "s" / "study.json", identify(study, task))
    for trial_id, method in TRIALS.items():
        run(folder / "s", trial_id, replace(study.base, method=method, lr=1e-2, precision="float32"), task)
    return folder


def run(folder: Path, trial_id: str, config: TrialConfig, task: Task) -> None:
    is_baseline = trial_id.startswith("baseline")
    record = run_trial(config, task, adapter_folder=adapter_folder(folder, trial_id), score_test=is_baseline)
    record.trial_id, record.phase = trial_id, "baseline" if is_baseline else "search"
    write_record(folder, record)


@pytest.fixture
def study(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study's folder, to write to and to damage."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(root / "s", tmp_path / "s"))


def test_the_frozen_model_scores_a_test_story_as_its_record(
    study: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("fit", study, "--trial", "baseline-frozen", "--to", "m.npz") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "m.npz: trial baseline-frozen (frozen, validation CC " in captured.out.splitlines()[-1]
    assert run_command("predict", "m.npz", "--story", "wheretheressmoke", "--data", root / "lab", "--test") == 0
    first, note, *lines = capsys.readouterr().out.splitlines()
    assert note.startswith("note: wheretheressmoke was a locked test story of the study s and has now been scored")
    record = read_json(study / "trials" / "baseline-frozen" / "record.json")
    with np.load(study / "trials" / "baseline-frozen" / "cc.npz") as arrays:
        cc = {subject: arrays[f"test/{subject}"] for subject in SUBJECTS}
    assert first.startswith("wheretheressmoke: ") and " rows: volumes 11 to " in first
    for subject, line in zip(SUBJECTS, lines, strict=True):
        predicted = np.load(f"wheretheressmoke-{subject}.npy")
        responses = np.load(root / "lab" / subject / "wheretheressmoke.npy").astype(np.float32)
        assert predicted.dtype == np.float32
        np.testing.assert_allclose(correlate(responses, predicted), cc[subject], rtol=0, atol=2e-5)
        row = next(r for r in record["stories"] if r["role"] == "test" and r["subject"] == subject)
        assert float(line.split("CC ")[1].split(",")[0]) == pytest.approx(row["cc_mean"], abs=1e-4)


def test_a_locked_test_story_is_predicted_but_not_scored(
    study: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command("fit", study, "--trial", "baseline-frozen", "--to", "m.npz") == 0
    capsys.readouterr()

    def read(*of: object) -> None:
        raise AssertionError("responses to a locked story were read")

    options = ("m.npz", "--data", root / "lab", "--story")
    with monkeypatch.context() as patch:
        patch.setattr(Responses, "read", read)
        assert run_command("predict", *options, "wheretheressmoke") == 0
    out = capsys.readouterr().out
    assert "note: wheretheressmoke is a locked test story of the study s, so its CC is not computed (--test" in out
    assert "; CC " not in out
    for subject in SUBJECTS:
        assert np.isfinite(np.load(f"wheretheressmoke-{subject}.npy")).all()
    assert run_command("predict", *options, "beta") == 0, "all other stories are scored"
    out = capsys.readouterr().out
    assert "; CC " in out and "locked" not in out
    error = refusal(capsys, "predict", *options, "beta", "--to", "c.npy", "--test")
    assert "--test: beta is not a locked test story of m.npz" in error
    assert not list(Path().glob("c-*.npy"))


def test_the_best_searched_trial_is_fitted_on_all_but_test_stories_by_default(
    study: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("fit", study) == 0
    assert f", its adapter in {study / 'model'}" in capsys.readouterr().out
    model, split = load_model(study / "model.npz"), read_json(study / "study.json")["splits"][0]
    assert (model.settings.study, model.settings.trial_id) == ("s", "0001")
    assert model.settings.fit_stories == tuple(sorted(split["fit"] + split["validation"]))
    assert model.settings.fingerprint == read_json(study / "study.json")["data"]["fingerprint"]
    with np.load(study / "trials" / "0001" / "cc.npz") as arrays:
        np.testing.assert_array_equal(model.subjects["a"].cc, arrays["a"])
    assert "model.npz: exists already; move it away" in refusal(capsys, "fit", study)
    assert run_command("predict", study / "model.npz", "--story", "alpha", "--data", root / "lab") == 0
    assert "note: the model was fitted on alpha, so" in capsys.readouterr().out


def test_a_transcript_is_predicted_as_the_same_story_of_the_data_set(
    study: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = open_dataset(root / "lab").stories["wheretheressmoke"]
    with Path("copy.csv").open("w") as file:
        csv.writer(file).writerows([("word", "time_s"), *zip(story.words, story.word_times_s.tolist(), strict=True)])
    keep_voxels_study(study, {"a": [3, 7], "b": [0]})
    assert run_command("fit", study, "--trial", "baseline-frozen") == 0
    n_trs = str(len(story.tr_times_s))
    assert run_command("predict", study / "model.npz", "--story", "copy.csv", "--trs", n_trs, "--to", "p.npy") == 0
    assert (
        run_command("predict", study / "model.npz", "--story", story.name, "--data", root / "lab", "--to", "q.npy") == 0
    )
    for subject, voxels in (("a", [3, 7]), ("b", [0])):
        predicted, expected = np.load(f"p-{subject}.npy"), np.load(f"q-{subject}.npy")
        assert predicted.shape == (len(story.tr_times_s) - 15, 12)
        np.testing.assert_array_equal(np.flatnonzero(~np.isnan(predicted).any(axis=0)), voxels)
        np.testing.assert_array_equal(predicted, expected)
    capsys.readouterr()
    for to, message in (("p.npy", "p-a.npy: exists already"), ("", "give a name that ends in .npy")):
        assert message in refusal(capsys, "predict", study / "model.npz", "--story", "copy.csv", "--to", to)


def keep_voxels_study(study: Path, voxels: dict[str, list[int]]) -> None:
    """Turn the study into one on chosen voxels, and its trials' CC with it."""
    about = read_json(study / "study.json")
    chosen = {subject: np.array(indices) for subject, indices in voxels.items()}
    key = voxels_key(keep_voxels(inspect(open_dataset(Path(about["options"]["data"]))), chosen))
    write_voxels(study / "voxels.npz", chosen)
    about["options"]["voxels"], about["voxels"] = "2", {"asked": "2", "key": key}
    write_json(study / "study.json", about)


def test_notes_name_a_better_frozen_encoder_and_changed_code(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study / "trials" / "baseline-frozen" / "record.json"
    content = json.loads(file.read_text())
    content["scores"]["cc_mean"] = 0.9
    file.write_text(json.dumps(content))
    about = read_json(study / "study.json")
    write_json(study / "study.json", about | {"code": "older"})
    assert run_command("fit", study) == 0
    out = capsys.readouterr().out
    assert "note: the frozen encoder predicts as well or better (0.9000): --trial baseline-frozen" in out
    assert "note: the program has changed since this study" in out


def put(folder: Path, trial_id: str, cc_mean: float, keep: bool = True, **values: Any) -> None:
    config = asdict(TrialConfig(method=values.get("method", "lora")))
    fields = {"status": "COMPLETE", "method": "lora", "phase": "search"} | values
    write_record(folder, TrialRecord(config=config, trial_id=trial_id, scores={"cc_mean": cc_mean}, **fields))
    if keep:
        (folder / "trials" / trial_id / "adapter").mkdir()
        (folder / "trials" / trial_id / "adapter" / "adapter_config.json").write_text("{}")


def test_the_best_trial_with_a_saved_adapter_is_chosen(tmp_path: Path) -> None:
    put(tmp_path, "0001", 0.1)
    put(tmp_path, "0002", 0.3)
    put(tmp_path, "0003", 0.9, keep=False)
    put(tmp_path, "0004", 0.8, keep=False, method="full")
    put(tmp_path, "0005", 0.7, status="STOPPED")
    record, adapter = choose_trial(tmp_path, None)
    assert (record.trial_id, adapter) == ("0002", tmp_path / "trials" / "0002" / "adapter")
    put(tmp_path, "0006", 0.4, keep=False, repeat_of="0001")
    assert choose_trial(tmp_path, None)[1] == tmp_path / "trials" / "0001" / "adapter"
    put(tmp_path, "0007", 0.5, keep=False, method="frozen")
    record, adapter = choose_trial(tmp_path, None)
    assert (record.trial_id, adapter) == ("0007", None)
    with pytest.raises(InputError, match="its adapter was not saved"):
        choose_trial(tmp_path, "0001", n_splits=2)
    first = tmp_path / "trials" / "0001" / "adapter" / "split0"
    first.mkdir()
    (first / "adapter_config.json").write_text("{}")
    assert choose_trial(tmp_path, "0001", n_splits=2)[1] == first


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("0003", r"trial 0003: its adapter was not saved"),
        ("0004", r"trial 0004: its method is full; only the encoders of lora and frozen trials"),
        ("0005", r"trial 0005: is STOPPED, not COMPLETE"),
        ("../0003", r"no trial \.\./0003; it has 0003, 0004, 0005"),
        (None, r"no searched trial has a saved encoder .*give --trial, such as --trial baseline-frozen"),
    ],
)
def test_a_trial_that_cannot_be_fitted_is_refused(trial: str | None, message: str, tmp_path: Path) -> None:
    put(tmp_path, "0003", 0.9, keep=False)
    put(tmp_path, "0004", 0.8, keep=False, method="full")
    put(tmp_path, "0005", 0.7, status="STOPPED")
    with pytest.raises(InputError, match=message):
        choose_trial(tmp_path, trial)


def change(**values: Any) -> Callable[[Path], None]:
    def apply(study: Path) -> None:
        about = read_json(study / "study.json")
        for name, value in values.items():
            about[name] = about[name] | value if isinstance(value, dict) else value
        write_json(study / "study.json", about)

    return apply


BAD_STUDIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no study": (lambda study: (study / "study.json").unlink(), "s: no study here"),
    "damaged": (lambda study: (study / "study.json").write_text("{"), "study.json: damaged"),
    "splits": (change(splits=[{"fit": 3}]), "study.json: damaged"),
    "text": (change(task="classification"), "a text-only study"),
    "other data": (change(data={"fingerprint": "0"}), "not the data of this study"),
    "other weights": (change(model={"weights": "0"}), "have changed since the study"),
    "other voxels": (change(voxels={"key": "0"}), "the voxels have changed"),
    "no data": (change(options={"data": "/nowhere"}), "/nowhere: no such data"),
    "damaged cc": (lambda study: (study / "trials" / "0001" / "cc.npz").write_text("x"), "cc.npz: damaged"),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_a_damaged_or_changed_study_is_refused_in_one_line(
    case: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_STUDIES[case]
    damage(study)
    assert message in refusal(capsys, "fit", study)
    assert not (study / "model.npz").exists() and not (study / "model").exists()


def test_moved_data_are_accepted_and_other_data_refused(
    study: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(options={"data": "/nowhere"})(study)
    other = make_lab(tmp_path / "other", subjects=SUBJECTS, n_words=100, seed=1)
    fewer = make_lab(tmp_path / "fewer", stories=("alpha", "beta"), subjects=SUBJECTS, n_words=100)
    for folder, message in ((other, "not the data of this study"), (fewer, "no story delta, which this study uses")):
        assert message in refusal(capsys, "fit", study, "--data", folder)
    moved = shutil.copytree(root / "lab", tmp_path / "moved")
    assert run_command("fit", study, "--data", moved, "--trial", "baseline-frozen") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.npz"], "name the story, as in --story FILE.TextGrid"),
        (["m.npz", "words", "--story", "x.csv"], "give --story FILE and no other texts"),
        (["m.npz", "--story", "x", "--data", "demo", "--trs", "9"], "--trs: the stories of --data have a known length"),
        (["m.npz", "--story", "x.csv"], "m.npz: no such file; `python -m bert_encoding fit"),
        (["folder"], "give texts in quotes, or --file FILE"),
        (["folder", "good", " "], "text 2 of 2 is empty; leave it out"),
        (["folder", "good", "--to", "out.txt"], "--to out.txt: give a name that ends in .csv, .parquet"),
        (["folder", "good", "--to", "no/such/out.csv"], "--to no/such/out.csv: no such folder no/such; make it first"),
        (["folder", "--file", "absent.csv"], "absent.csv: no such file or folder"),
        (["folder", "text", "--story", "x.csv"], "--story: not available for a classifier"),
        (["folder", "text", "--trs", "3"], "--trs: not available for a classifier"),
        (["folder", "text", "--test"], "--test: not available for a classifier"),
        (["m.npz", "--story", "x.csv", "--test"], "--test: needs --data"),
    ],
)
def test_predict_refuses_bad_arguments_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "predict", *arguments)
