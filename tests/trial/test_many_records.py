"""Large studies: their records become a table in seconds, and every number arrives."""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bert_encoding.core.names import COMPLETE, LORA, SEARCH
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records, write_record
from bert_encoding.trial.tables import trials_frame

SECONDS_A_RECORD = 5 / 10_000
N_EPOCHS, N_STORIES, SUBJECTS = 5, 4, ("UTS01", "UTS02", "UTS03")


def make_record(index: int) -> TrialRecord:
    """Return a record as large as those of a study of three subjects, whose numbers follow from its own number."""
    config = asdict(TrialConfig(model="tiny", rank=2 ** (index % 6 + 1), lr=1e-5 * (index + 1), seed=index))
    stories = [
        {"subject": subject, "story": f"story{story}", "role": "validation", "cc_mean": index / 1e6, "n_trs": 300}
        for subject in SUBJECTS
        for story in range(N_STORIES)
    ]
    scores = dict.fromkeys(("cc_mean", "cc_median", "cc_top1", "cc_seen", "delta_norm"), index / 100000.0)
    return TrialRecord(
        **{"status": COMPLETE, "method": LORA, "config": config, "trial_id": f"{index:05d}", "phase": SEARCH},
        **{"key": f"{index:016x}", "params": {"lr": config["lr"], "log2_rank": index % 6 + 1}, "scores": scores},
        epochs=[{"epoch": float(epoch), "cc_mean": index / 1e5, "mlm_loss_train": 2.5} for epoch in range(N_EPOCHS)],
        stories=stories,
        subjects=[{"subject": subject, "role": "validation", "cc_mean": index / 1e5} for subject in SUBJECTS],
        seconds={"train": 1.0, "embed": 2.0, "ridge": 3.0, "total": 6.0},
    )


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_records_become_a_table_in_seconds(n: int, tmp_path: Path) -> None:
    for index in range(n):
        write_record(tmp_path, make_record(index))
    began = time.process_time()  # processor seconds: what else this machine does is not our cost
    trials = trials_frame(read_records(tmp_path))
    seconds = time.process_time() - began
    each = np.arange(n)
    assert trials["trial_id"].tolist() == [f"{index:05d}" for index in each]
    np.testing.assert_array_equal(trials["cc_mean"].to_numpy(float), each / 1e5)
    np.testing.assert_array_equal(trials["lr"].to_numpy(float), 1e-5 * (each + 1))
    np.testing.assert_array_equal(trials["rank"].to_numpy(int), 2 ** (each % 6 + 1))
    np.testing.assert_array_equal(trials["log2_rank"].to_numpy(int), each % 6 + 1)
    assert (trials["seconds_total"].to_numpy(float) == 6).all()
    print(f"{n} records: {seconds:.2f} s")
    assert seconds < SECONDS_A_RECORD * max(n, 2_000), f"{seconds:.1f} s for {n} records"
