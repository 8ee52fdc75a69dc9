"""What goes wrong in long nights, with real Ray processes: killed drivers, killed workers, lost nodes, full memory.

Most trials only pretend (stub_study.py); driver, workers, lock and records are real. Marked slow: the long forms.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from many_trials import at_record, cost, measure
from pretend import begin, by_lr, pretend, wait_for
from stub_study import FILLS_EVERY_DISK, FILLS_ITS_DISK, FILLS_MEMORY, LOG, WAITING, WAITS_ONCE
from study_process import running_from

from bert_encoding.trial.record import TrialRecord, read_records

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def log_of(folder: Path) -> list[tuple[float, int]]:
    """Return learning rate and process of every trial that a worker began."""
    lines = (folder / LOG).read_text().splitlines() if (folder / LOG).exists() else []
    return [(float(lr), int(pid)) for lr, pid in (line.split() for line in lines)]


def assert_pretended(record: TrialRecord) -> None:
    """Compare with the closed form of the stub: a CC of lr * epoch, 4 epochs."""
    lr = record.config["lr"]
    assert (record.status, record.params) == ("COMPLETE", {"lr": lr})
    assert record.epochs == [{"epoch": float(at), "cc_mean": lr * at} for at in (1, 2, 3, 4)]
    assert not record.scores["has_torch"], "the stub's workers stay small"


@pytest.mark.parametrize(("n_kills", "n_trials"), [(2, 16), pytest.param(10, 60, marks=pytest.mark.slow)])
def test_a_driver_killed_at_random_moments_loses_and_repeats_nothing(
    n_kills: int, n_trials: int, tmp_path: Path, private_tmp: Path
) -> None:
    lrs, moments, folder = [(at + 1) / 1000 for at in range(n_trials)], random.Random(0), tmp_path / "s"
    finished: dict[str, bytes] = {}
    for _ in range(n_kills):
        driver = begin(folder, private_tmp, lrs, seconds=0.2)
        try:
            n_before = len(log_of(folder))
            wait_for(lambda n=n_before: len(log_of(folder)) > n, driver)
            time.sleep(moments.uniform(0, 1))
            assert driver.poll() is None, "the study ended before it could be killed"
        finally:
            driver.kill()  # SIGKILL
            driver.communicate()
        ids = [record.trial_id for record in read_records(folder)]
        finished |= {name: (folder / "trials" / name / "record.json").read_bytes() for name in ids}
    deadline = time.monotonic() + 120
    while running_from(private_tmp):
        assert time.monotonic() < deadline, "Ray's processes end with their driver"
        time.sleep(0.1)
    begun = Counter(lr for lr, _ in log_of(folder))
    done = {json.loads(content)["config"]["lr"] for content in finished.values()}
    pretend(folder, private_tmp, lrs, seconds=0)  # goes on, and checks that it ends well
    records = read_records(folder)
    assert sorted(record.config["lr"] for record in records) == lrs, "as many as uninterrupted, none twice"
    for record in records:
        assert_pretended(record)
        assert record.repeat_of is None
    again = Counter(lr for lr, _ in log_of(folder)) - begun
    assert not done & set(again), "what was finished did not run again"
    assert sum(begun.values()) + sum(again.values()) <= n_trials + 2 * n_kills, "a kill costs what was running, no more"
    for trial_id, content in finished.items():
        assert (folder / "trials" / trial_id / "record.json").read_bytes() == content, f"{trial_id} was touched"
    assert not [path for path in folder.rglob("*") if "tmp" in path.name], "nothing half-written lies about"


@pytest.mark.slow
def test_a_killed_worker_and_a_full_disk_concern_one_trial_each(tmp_path: Path, private_tmp: Path) -> None:
    folder, lrs = tmp_path / "s", [0.01, WAITS_ONCE, FILLS_ITS_DISK, 0.02]
    driver = begin(folder, private_tmp, lrs)
    try:
        wait_for((folder / WAITING).exists, driver)
        killed = json.loads((folder / WAITING).read_text())["pid"]
        os.kill(killed, signal.SIGKILL)
        out, error = driver.communicate(timeout=600)
    finally:
        driver.kill()
    assert driver.returncode == 0, error + out
    records = by_lr(folder)
    assert len(records) == 4
    for lr in (0.01, WAITS_ONCE, 0.02):
        assert_pretended(records[lr])
    tries = [pid for lr, pid in log_of(folder) if lr == WAITS_ONCE]
    assert len(tries) == 2 and tries[0] == killed != tries[1]
    full = records[FILLS_ITS_DISK]
    assert full.status == "FAILED" and full.key and full.params == {"lr": FILLS_ITS_DISK}, "the driver could write it"
    assert f"{folder / 'trials' / full.trial_id}: no space left" in (full.error or ""), "its worker told the reason"
    assert "a file may have" in (full.error or "")
    assert [lr for lr, _ in log_of(folder)].count(FILLS_ITS_DISK) == 1, "to try again would fill the disk again"
    assert not [path for path in folder.rglob("*") if "tmp" in path.name], "nothing half-written lies about"


@pytest.mark.slow
def test_where_no_record_can_be_written_the_study_ends_and_goes_on_later(tmp_path: Path, private_tmp: Path) -> None:
    folder, lrs = tmp_path / "s", [0.01, FILLS_EVERY_DISK, 0.02, 0.03]
    done = pretend(folder, private_tmp, lrs, ends="no space left", max_concurrent=1)
    assert f"ended: {folder / 'trials' / '0002'}: no space left to write results" in done.stdout
    assert sorted(by_lr(folder)) == [0.01], "what had ended is kept, and nothing more was begun"
    assert not [path for path in folder.rglob("*") if "tmp" in path.name], "nothing half-written lies about"
    pretend(folder, private_tmp, [0.01, 0.02, 0.03], max_concurrent=1)
    records = by_lr(folder)
    assert sorted(records) == [0.01, 0.02, 0.03]
    for record in records.values():
        assert_pretended(record)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_trial_that_really_runs_out_of_memory_fails_alone(tmp_path: Path, private_tmp: Path) -> None:
    pretend(tmp_path / "s", private_tmp, [0.01, FILLS_MEMORY, 0.02], max_concurrent=1)
    records = by_lr(tmp_path / "s")
    assert_pretended(records[0.01])
    assert_pretended(records[0.02])
    assert records[FILLS_MEMORY].status == "FAILED"
    assert (records[FILLS_MEMORY].error or "").splitlines()[-1] == "MemoryError"
    assert len({record.scores["worker"] for record in records.values() if record.status == "COMPLETE"}) == 1


@pytest.mark.slow
def test_a_lost_node_costs_its_trials_a_second_try_elsewhere(tmp_path: Path, private_tmp: Path) -> None:
    folder, lrs = tmp_path / "s", [0.01, 0.02, WAITS_ONCE, 0.03, 0.04, 0.05]
    done = pretend(folder, private_tmp, lrs, nodes=3, cpus=1, seconds=0.2)
    lost = json.loads((folder / WAITING).read_text())
    assert f"lost {lost['node']}" in done.stdout
    records = by_lr(folder)
    assert sorted(records) == sorted(lrs)
    for record in records.values():
        assert_pretended(record)
    tries = [pid for lr, pid in log_of(folder) if lr == WAITS_ONCE]
    assert len(tries) == 2 and tries[0] == lost["pid"] != tries[1]


@pytest.mark.slow
def test_a_thousand_trials_cost_the_driver_little_and_always_the_same(tmp_path: Path, private_tmp: Path) -> None:
    samples = measure(tmp_path / "s", private_tmp, n_trials=1000, n_workers=8)
    records = read_records(tmp_path / "s")
    assert len(records) == 1000
    assert not any(record.scores["has_torch"] for record in records), "workers are Ray's and ours alone"
    _, early, _ = cost(samples, 0.1, 0.5)
    _, late, mb = cost(samples, 0.5, 0.9)  # at the very end all trials are listed once
    assert late < 2 * early, "the last trials take the driver no longer than the first"
    assert late < 0.2, "processor seconds"
    assert mb < 0.06, "MB a trial"
    assert max(one.workers_mb for one in samples) < 1.3 * at_record(samples, 100).workers_mb, "workers do not grow"
