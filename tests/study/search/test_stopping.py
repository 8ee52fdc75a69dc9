"""Time limit, dead workers and early stopping with real Ray processes; most trials only pretend (stub_study.py)."""

import struct
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pretend import by_lr, pretend
from stub_study import DIES_ONCE, FAILS, FREEZES, HOLDS_THE_INTERPRETER, SLEEPS
from study_process import running_from

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read TensorBoard's files by their documented framing: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for file in folder.glob("events.out.tfevents.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return scalars


@pytest.mark.slow
def test_what_hangs_dies_or_fails_leaves_its_reason_and_the_others_alone(tmp_path: Path, private_tmp: Path) -> None:
    lrs = [0.01, SLEEPS, HOLDS_THE_INTERPRETER, FREEZES, DIES_ONCE, FAILS, 0.02]
    done = pretend(tmp_path / "s", private_tmp, lrs, trial_timeout=20, tensorboard=True, max_concurrent=3)
    records = by_lr(tmp_path / "s")
    assert len(records) == 7
    for lr in (0.01, DIES_ONCE, 0.02):
        assert records[lr].status == "COMPLETE"
        assert records[lr].scores["cc_mean"] == pytest.approx(4 * lr)
    for lr in (SLEEPS, HOLDS_THE_INTERPRETER, FREEZES):
        assert (records[lr].status, records[lr].error) == ("FAILED", "no end after 20 s (--trial-timeout)")
        assert records[lr].params == {"lr": lr} and records[lr].key and records[lr].phase == "search"
    assert (records[FAILS].error or "").endswith("FloatingPointError: the loss is not finite")
    assert done.stdout.count("FAILED: no end after 20 s (--trial-timeout)") == 3
    assert "[search 7/7]" in done.stdout
    assert "Traceback" not in done.stderr, "the records tell what went wrong"
    assert not running_from(private_tmp), "hanging workers are gone"
    curve = scalars(tmp_path / "s" / "tensorboard" / "0001")
    assert curve == {("cc_mean", at): pytest.approx(0.01 * at) for at in (1, 2, 3, 4)}


@pytest.mark.slow
def test_stopped_trials_leave_records_and_a_resumed_search_knows_them(tmp_path: Path, private_tmp: Path) -> None:
    lrs = [0.5, 0.02, 0.55, 0.03, 0.6, 0.04]
    folder = tmp_path / "s"
    done = pretend(folder, private_tmp, lrs, scheduler="asha", max_concurrent=1)
    expected = {0.5: 4, 0.02: 1, 0.55: 4, 0.03: 1, 0.6: 4, 0.04: 1}
    records = by_lr(folder)
    for lr, n_epochs in expected.items():
        record = records[lr]
        assert record.status == ("COMPLETE" if n_epochs == 4 else "STOPPED")
        assert record.epochs == [{"epoch": float(at), "cc_mean": lr * at} for at in range(1, n_epochs + 1)]
        assert record.scores["cc_mean"] == lr * n_epochs
        assert record.scores["epochs_done"] == n_epochs
    assert len({record.scores["worker"] for record in records.values()}) == 1, "its worker goes on with the next trial"
    assert "0002: CC 0.0200, stopped after epoch 1/4" in done.stdout

    pretend(folder, private_tmp, [*lrs, 0.05, 0.7], scheduler="asha", max_concurrent=1)
    records = by_lr(folder)
    assert (records[0.05].status, records[0.7].status) == ("STOPPED", "COMPLETE")
    assert len(records) == 8
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    trials = optuna.load_study(study_name="stub", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"] * 3 + ["PRUNED", "COMPLETE"]
    assert [len(trial.intermediate_values) for trial in trials] == [4, 1] * 3 + [1, 4]
