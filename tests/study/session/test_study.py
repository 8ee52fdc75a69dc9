"""Whole studies through the real command line and real Ray processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_data import make_lab
from pretend import wait_for
from project import ANALYSIS, ROOT, RUN
from ray_cluster import Cluster
from study_process import environment_of, run_command, running_from, with_ctrl_c

from bert_encoding.core.storage import ObjectPath
from bert_encoding.trial.record import read_cc
from bert_encoding.trial.tables import COLUMNS
from study.cluster.lock import LOCK_FILE
from study.results.load import load_trials

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


SPACE = '''"""Does a study survive?"""
EPOCHS = 2
START = {start}


def space(trial):
    return {{
        "rank": trial.suggest_categorical("rank", [2, 4, 8, 16]),
        "window_tokens": trial.suggest_categorical("window_tokens", [128, 600]),
        "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
        "stride": 100,
    }}
'''
GOOD = {"rank": 4, "window_tokens": 128, "lr": 5e-3}
TOO_LONG = GOOD | {"window_tokens": 600}  # the tiny BERT reads 512
OTHERS = [{"rank": 2, "window_tokens": 128, "lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)]


def _command(folder: Path, start: list[dict], tiny_bert: Path, *more: str) -> list[str]:
    if not (folder / "lab").exists():
        make_lab(folder / "lab")
    (folder / "survive.py").write_text(SPACE.format(start=start))
    places = {"--space": folder / "survive.py", "--data": folder / "lab", "--model": tiny_bert, "--out": folder / "out"}
    options = [str(part) for pair in places.items() for part in pair]
    return [sys.executable, str(RUN), *options, "--confirm", "0", "--name", "s", *more]


def test_study_ends_with_a_table_a_failure_and_a_repeat(tmp_path: Path, private_tmp: Path, tiny_bert: Path) -> None:
    command = _command(tmp_path, [GOOD, TOO_LONG, GOOD], tiny_bert, "--trials", "3")
    done = run_command(command, private_tmp, code=3)  # one trial failed
    assert done.stderr == ""
    study = tmp_path / "out" / "s"
    trials = pd.read_parquet(study / "trials.parquet").set_index("trial_id")
    assert list(pd.read_parquet(study / "trials.parquet").columns[: len(COLUMNS)]) == COLUMNS
    assert list(trials.index) == ["baseline-frozen", "baseline-word_rate", "0001", "0002", "0003"]
    assert list(trials["status"]) == ["COMPLETE"] * 3 + ["FAILED", "COMPLETE"]
    assert "window_tokens 600" in trials.loc["0002", "error"]
    assert trials.loc["0003", "repeat_of"] == "0001"
    assert trials.loc["0003", "cc_mean"] == trials.loc["0001", "cc_mean"]
    assert trials.loc["0001", "epochs_done"] == 2
    pd.testing.assert_frame_equal(load_trials(study).set_index("trial_id"), trials)
    epochs = pd.read_parquet(study / "epochs.parquet")
    last = epochs[(epochs["trial_id"] == "0001") & (epochs["epoch"] == 2)]
    assert last["cc_mean"].item() == trials.loc["0001", "cc_mean"]
    cc = read_cc(study, "0001")["subject2"]
    assert cc.shape == (12,)
    assert np.nanmean(cc) == pytest.approx(trials.loc["0001", "cc_mean"], abs=1e-6)
    assert (study / "trials" / "0001" / "adapter" / "adapter_model.safetensors").is_file()
    for line in ("[search 5/5] 0003: CC", f"results are in {study}", "trial 0002 FAILED", "frozen baseline: CC"):
        assert line in done.stdout
    assert not list(private_tmp.glob("bert-encoding-*")), "Ray's private folder is removed"


@pytest.mark.slow
def test_a_study_on_a_cluster(tmp_path: Path, private_tmp: Path, tiny_bert: Path, cluster: Cluster) -> None:
    command = _command(tmp_path, [GOOD], tiny_bert, "--trials", "1", "--address", cluster.address)
    environment = environment_of(private_tmp) | {"RAY_AUTH_TOKEN_PATH": str(cluster.token), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    assert f"runs on: the cluster at {cluster.address} (--address): 1 node, 3 CPUs, 0 GPUs" in done.stdout
    study = tmp_path / "out" / "s"
    assert json.loads((study / "study.json").read_text())["precision"] in ("float32", "bfloat16")
    assert list(load_trials(study)["status"]) == ["COMPLETE"] * 3
    assert any(process.name() == "gcs_server" for process in running_from(cluster.folder)), "it is left running"
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "nothing to do" in again.stdout


@pytest.mark.slow
def test_a_study_in_object_storage(tmp_path: Path, private_tmp: Path, tiny_bert: Path, bucket: ObjectPath) -> None:
    out = str(bucket / "out")
    command = _command(tmp_path, [GOOD], tiny_bert, "--trials", "1")
    command[command.index("--out") + 1] = out
    run_command(command, private_tmp)
    study = bucket / "out" / "s"
    assert (study / "summary.json").is_file() and (study / "trials.parquet").is_file()
    assert (study / "trials" / "0001" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (study / LOCK_FILE).exists()
    trials = load_trials(study)
    assert list(trials["status"]) == ["COMPLETE"] * 3
    table = run_command([sys.executable, str(ANALYSIS), str(study)], private_tmp)
    assert "Best trial 0001" in table.stdout
    resumed = run_command([sys.executable, str(RUN), "--resume", "--out", out], private_tmp)
    assert "nothing to do" in resumed.stdout
    pd.testing.assert_frame_equal(load_trials(study), trials)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_terminating_ends_like_ctrl_c(tmp_path: Path, private_tmp: Path, tiny_bert: Path, sent: signal.Signals) -> None:
    command = _command(tmp_path, [GOOD, *OTHERS], tiny_bert, "--trials", "40")
    study, is_heard = tmp_path / "out" / "s", sent == signal.SIGINT
    driver = subprocess.Popen(
        with_ctrl_c(command, is_heard),
        env=environment_of(private_tmp), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(_file(study, "0001").exists, driver)
        if not is_heard:
            driver.send_signal(signal.SIGINT)  # ignored, as behind nohup: trials go on
            wait_for(_file(study, "0005").exists, driver)
        driver.send_signal(sent)
        out, error = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130, out + error
    assert "\ninterrupted\n" in out and "resume with: python study/run.py --resume" in out
    assert "Traceback" not in out + error
    assert not list(private_tmp.glob("bert-encoding-*")), "Ray's private folder is removed"
    assert (study / "trials.parquet").exists()


def _file(study: Path, trial_id: str) -> Path:
    return study / "trials" / trial_id / "record.json"
