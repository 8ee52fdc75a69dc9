"""Test-set evaluation of confirmed trials, on a tiny BERT and in a whole study."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confirm_phase import IDENTITY, folder, key_of, make_options, make_study_file
from make_data import make_lab
from make_trials import PEFT_WARNS, make_task
from project import RUN
from rich.console import Console
from study_process import run_command

from bert_encoding.core.command_line import BAD_INPUT, run_app
from bert_encoding.core.files import write_json
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split
from bert_encoding.language_model.encoder import load_encoder
from bert_encoding.language_model.lora import load_adapter, load_whole
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.record import read_cc
from bert_encoding.trial.run import run_test, run_trial
from study.results.confirmed import confirmed_trials
from study.results.load import load_trials
from study.results.locked_stories import read_looks
from study.run import app
from study.search.worker import Job, run_job
from study.session.confirm import confirm

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


@dataclass(frozen=True)
class Locked(Responses):
    """Responses to a test story: they may be read once ``confirm.json`` exists."""

    until: Path | None = None

    @contextmanager
    def open(self) -> Iterator[Any]:
        assert self.until is None or self.until.exists(), "a test story was read before the winner was fixed"
        with super().open() as source:
            yield source


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(open_dataset(make_lab(tmp_path_factory.mktemp("data") / "lab", n_words=110)))


@pytest.fixture(scope="module")
def small(tiny_bert: Path) -> TrialConfig:
    return TrialConfig(model=str(tiny_bert), epochs=1, rank=2, lr=5e-3, stride=100, window_tokens=102, probe_tokens=50)


def locked(task: Task, until: Path) -> Task:
    def lock(responses: Responses) -> Responses:
        return Locked(responses.path, responses.array, responses.key, until=until)

    stories = dict(task.dataset.stories)
    for name in task.splits[0].test:
        heard = {subject: lock(responses) for subject, responses in stories[name].responses.items()}
        stories[name] = replace(stories[name], responses=heard)
    return task._replace(dataset=replace(task.dataset, stories=stories, fingerprint=f"locked until {until}"))


def test_no_test_story_is_read_before_the_winner_is_fixed(tmp_path: Path, task: Task, small: TrialConfig) -> None:
    study = tmp_path / "s"
    guarded = locked(task, study / "confirm.json")
    write_json(make_study_file(study), {})
    with pytest.raises(AssertionError, match="a test story was read"):
        run_trial(replace(small, method="word_rate"), guarded, score_test=True)
    searched = replace(small, lr=1e-3)
    names = {"baseline-frozen": replace(small, method="frozen"), "0001": small, "0002": searched}
    for name, config in names.items():
        phase = "search" if name.isdigit() else "baseline"
        run_job(Job(name, phase, key_of(config), asdict(config)), guarded, study)

    def run(name: str, jobs: list[Job]) -> None:
        for job in jobs:
            run_job(job, guarded, study)

    options = make_options(study, trials=2, confirm_seeds=1)
    split = {"splits": [asdict(task.splits[0])]}
    assert confirm(options, 1, IDENTITY | split, key_of, run, Console(file=io.StringIO())) is None
    trials = load_trials(study).set_index("trial_id")
    assert list(trials["error"].dropna()) == []
    assert set(trials.index[trials["cc_test"].notna()]) == {"test-baseline-frozen", "test-0001", "test-0002"}
    final = trials[trials["cc_test"].notna()]
    assert final["cc_mean"].isna().all() and final["mlm_loss_heldout"].isna().all()
    assert (final["cc_test_low"] <= final["cc_test"]).all() and (final["cc_test"] <= final["cc_test_high"]).all()
    confirmed = confirmed_trials(study, read_looks(study)[0], trials.reset_index())
    for trial in confirmed:
        assert trial.gain is not None
        expected = float(
            trials.loc[f"test-{trial.trial_id}", "cc_test"] - trials.loc["test-baseline-frozen", "cc_test"]
        )
        assert trial.gain.estimate == pytest.approx(expected, abs=1e-6)
        assert trial.gain.low <= trial.gain.estimate <= trial.gain.high
    assert (study / "trials" / "test-0001" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.table
@pytest.mark.parametrize("method", ["full", "partial", "lora", "frozen"])
def test_a_confirmed_trial_keeps_its_weights_and_a_searched_one_only_an_adapter(
    method: str, tmp_path: Path, task: Task, small: TrialConfig
) -> None:
    config = replace(small, method=method, **({"frozen_blocks": 1} if method == "partial" else {}))
    study = tmp_path / "s"
    for name, phase in (("0001", "search"), ("test-0001", "confirm")):
        job = Job(name, phase, key_of(config), asdict(config), is_final=phase == "confirm", session="")
        assert run_job(job, task, study).error is None
    saved = {str(file.relative_to(study / "trials").parent) for file in study.glob("trials/*/adapter/*.safetensors")}
    expected = {"lora": {"0001/adapter", "test-0001/adapter"}, "frozen": set()}
    assert saved == expected.get(method, {"test-0001/adapter"})
    if not saved:
        return
    encoder, folder = load_encoder(small.model), study / "trials" / "test-0001" / "adapter"
    bert = load_adapter(encoder, folder) if method == "lora" else load_whole(encoder, folder)
    chain, split = Chain(config, task), task.splits[0]
    scores = chain.score_test(bert, Split(tuple(sorted(split.fit + split.validation)), (), split.test))
    cc = read_cc(study, "test-0001")["test/subject2"]
    np.testing.assert_allclose(scores["subject2"].cc, cc, rtol=0, atol=1e-5, err_msg="other weights were saved")


@pytest.mark.parametrize("method", ["word_rate", "frozen", "lora"])
def test_a_test_score_equals_validation_on_the_test_stories(task: Task, small: TrialConfig, method: str) -> None:
    config, split = replace(small, method=method, epochs=2), task.splits[0]
    reports: list[dict[str, float]] = []
    record = run_test(config, task, lambda scores: bool(reports.append(scores)))
    swapped = Split(tuple(sorted(split.fit + split.validation)), split.test, ())
    expected = run_trial(config, task._replace(splits=(swapped,)))
    assert record.scores["cc_test"] == pytest.approx(expected.scores["cc_mean"], abs=1e-7)
    np.testing.assert_allclose(record.cc_test["subject2"], expected.cc["subject2"], atol=1e-6)
    assert [row["role"] for row in record.stories + record.subjects] == ["test", "test"]
    assert [scores["epoch"] for scores in reports] == ([1, 2] if method == "lora" else [])
    for name in ("cc_mean", "cc_seen", "mlm_loss_heldout"):
        assert name not in record.scores
    if method != "lora":  # what a study without a search scores
        assert record.scores["cc_test"] == run_trial(config, task, score_test=True).scores["cc_test"]


def test_patience_without_held_out_stories_is_refused(task: Task, small: TrialConfig) -> None:
    with pytest.raises(ValueError, match="patience needs held-out stories"):
        run_test(replace(small, patience=1), task)


SPACE = '''"""Does a winner hold?"""
EPOCHS = 1
START = [{"rank": 2}, {"rank": 4}]


def space(trial):
    return {"rank": trial.suggest_categorical("rank", [2, 4, 8, 16]), "window_tokens": 128, "stride": 100, "lr": 5e-3}
'''


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_study_confirms_and_scores_the_test_stories_once(
    tmp_path: Path,
    private_tmp: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    make_lab(tmp_path / "lab")
    (tmp_path / "hold.py").write_text(SPACE)
    options = {"--space": "hold.py", "--data": "lab", "--out": "out"}
    places = [str(part) for name, place in options.items() for part in (name, tmp_path / place)]
    command = [sys.executable, str(RUN), *places, "--model", str(tiny_bert), "--trials", "2", "--confirm-seeds", "1"]
    done = run_command([*command, "--name", "s", "--confirm", "1"], private_tmp)
    study = tmp_path / "out" / "s"
    fixed = json.loads((study / "confirm.json").read_text())
    names = {f"confirm-{fixed['winner']}-seed{fixed['seeds'][0]}", f"test-{fixed['winner']}"}
    names |= {"test-baseline-frozen", "test-baseline-word_rate"}
    trials = load_trials(study).set_index("trial_id")
    assert set(trials.index[trials["phase"] == "confirm"]) == names
    assert trials.loc[f"test-{fixed['winner']}", "cc_test"] > 0
    for text in ("the winner is trial", "on the test stories |", "Confirmed: trial", "(95% interval over time inside"):
        assert text in done.stdout

    refused = {
        "s": ["--resume", "--trials", "3"],  # more to confirm, on the same stories
        "t": [],  # another study on the same stories
    }
    for name, more in refused.items():
        assert run_app(app, [*command[2:-4], "--name", name, *more]) == BAD_INPUT
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"have been read by study s ({fixed['at']})" in error
    assert not (tmp_path / "out" / "t").exists()
    assert run_app(app, [*command[2:], "--name", "s", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "Confirmed: trial" in out
