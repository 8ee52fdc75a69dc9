"""Studies on text alone through the real command line: search, records, and the saved classifier called back."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_texts import make_text_bert, negated_texts, write_texts
from project import RUN
from study_process import run_command

from bert_encoding.commands.predict import predict_texts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


SPACE = '''"""Which way tells negated praise from praise?"""
TASK = "{task}"
EPOCHS = {epochs}
START = [{{"method": "full"}}, {{"method": "lora"}}]


def space(trial):
    method = trial.suggest_categorical("method", ["full", "lora"])
    rate = {{"full": 3e-3, "lora": 1e-2}}[method]
    return {{"method": method, "lr": rate, "batch_size": 16, "rank": 8, "target_modules": "all", "lora_dropout": 0.0}}
'''


def command(folder: Path, task: str, epochs: int, *more: str) -> list[str]:
    (folder / "ways.py").write_text(SPACE.format(task=task, epochs=epochs))
    texts = write_texts(folder / "texts.csv", negated_texts(400))
    shared = ["--space", str(folder / "ways.py"), "--data", str(texts), "--model", str(make_text_bert(folder / "bert"))]
    return [sys.executable, str(RUN), *shared, "--out", str(folder / "out"), "--name", "s", *more]


@pytest.mark.slow
def test_a_classification_study_and_its_classifier(tmp_path: Path, private_tmp: Path) -> None:
    options = ("--trials", "2", "--max-length", "32", "--train-examples", "300")
    done = run_command(command(tmp_path, "classification", 6, *options), private_tmp)
    assert done.stderr == ""
    for text in (
        "classes: ",
        "300 to train on, 100 held out",
        "Frozen encoder: accuracy",
        "best trial 000",
        "Examples of trial 000",
        "predicted_before",
    ):
        assert text in done.stdout
    study = tmp_path / "out" / "s"
    trials = pd.read_parquet(study / "trials.parquet").set_index("trial_id")
    assert list(trials.index) == ["baseline-frozen", "0001", "0002"]
    assert trials["accuracy"].between(0, 1).all()
    assert trials["cc_mean"].isna().all()
    assert trials["stride"].isna().all() and trials["mlm_text"].isna().all(), "nothing of that is done here"
    assert trials["lr"].tolist() == [2e-4, 3e-3, 1e-2]
    assert trials["accuracy_before"].between(0.2, 0.8).all(), "nothing is known before training"
    record = json.loads((study / "trials" / "0001" / "record.json").read_text())
    assert len(record["examples"]) == 10
    assert record["scores"]["accuracy"] == trials.loc["0001", "accuracy"] > trials.loc["baseline-frozen", "accuracy"]
    texts = pd.read_csv(tmp_path / "texts.csv")
    predicted = predict_texts(study / "trials" / "0001" / "adapter", texts["text"].tolist())
    assert (predicted["label"].to_numpy() == texts["label"].to_numpy()).mean() > 0.8
    assert np.all(predicted["probability"] > 0.5)

    again = run_command([sys.executable, str(RUN), "--resume", "--out", str(tmp_path / "out")], private_tmp)
    assert "nothing to do" in again.stdout
    other = ("--resume", "--out", str(tmp_path / "out"), "--train-examples", "200")
    refused = run_command([sys.executable, str(RUN), *other], private_tmp, code=2)
    assert "the training stories changed from 300 texts" in refused.stderr


@pytest.mark.slow
def test_an_adaptation_study_minimises_the_held_out_loss(tmp_path: Path, private_tmp: Path) -> None:
    run_command(command(tmp_path, "adapt", 2, "--trials", "2", "--max-length", "24"), private_tmp)
    study = tmp_path / "out" / "s"
    trials = pd.read_parquet(study / "trials.parquet").set_index("trial_id")
    frozen = trials.loc["baseline-frozen", "mlm_loss_heldout"]
    searched = trials.loc[["0001", "0002"], "mlm_loss_heldout"]
    assert (searched < frozen).all()
    summary = json.loads((study / "summary.json").read_text())
    assert summary["best"] == searched.min()
    assert summary["best_id"] == searched.idxmin()
