"""Studies whose trials only pretend (stub_study.py), run to their end or only started."""

import json
import subprocess
import sys
import time
from pathlib import Path

from project import HELPERS, ROOT
from study_process import environment_of, with_ctrl_c

from bert_encoding.trial.record import TrialRecord, read_records

STUB = HELPERS / "stub_study.py"


SPACE = """START = [{{"lr": lr}} for lr in {lrs}]
def space(trial):
    return {{"lr": trial.suggest_float("lr", 0.001, 0.9)}}
"""


def pretend(
    folder: Path, private_tmp: Path, lrs: list[float], ends: str = "ended: None", **options: object
) -> subprocess.CompletedProcess:
    """Run a study whose trials have these learning rates; ``ends``: what it says at its end."""
    driver = begin(folder, private_tmp, lrs, **options)
    out, error = driver.communicate(timeout=900)
    assert driver.returncode == 0, error + out
    assert ends in out
    return subprocess.CompletedProcess(driver.args, driver.returncode, out, error)


def by_lr(folder: Path) -> dict[float, TrialRecord]:
    return {record.config["lr"]: record for record in read_records(folder)}


def begin(folder: Path, private_tmp: Path, lrs: list[float], **options: object) -> subprocess.Popen:
    """Start the study that ``pretend`` would run."""
    folder.mkdir(exist_ok=True)
    (folder / "space.py").write_text(SPACE.format(lrs=lrs))
    environment = environment_of(private_tmp) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(STUB), str(folder), json.dumps({"trials": len(lrs)} | options)]
    return subprocess.Popen(
        with_ctrl_c(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: object, driver: subprocess.Popen, timeout_s: float = 600) -> None:
    """Wait until something holds while a driver runs."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
