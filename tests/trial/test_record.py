"""Records and tables: what is written comes back, all or nothing, with the documented columns."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from project import ROOT

import bert_encoding
from bert_encoding.core import files as files_module
from bert_encoding.core import storage
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import code_fingerprint, content_key, read_json, write_json
from bert_encoding.trial import record as records_module
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import (
    TrialRecord,
    adapter_folder,
    keep_best,
    read_cc,
    read_details,
    read_record,
    read_records,
    write_record,
)
from bert_encoding.trial.tables import rows_frame, trials_frame, write_tables

# Typed from docs/results.md.
DOCUMENTED = [
    *("trial_id", "phase", "status", "error", "seed", "repeat_of", "method", "rank", "lora_alpha", "scaling"),
    *("target_modules", "lr", "stride", "epochs_done", "optimizer_steps", "tokens_seen", "n_trainable", "layer"),
    *("mlm_text", "mlm_loss_train", "mlm_loss_heldout", "probe_loss_before", "probe_loss_after", "delta_norm"),
    *("stable_rank", "cc_mean", "cc_median", "cc_top1", "cc_top5", "share_above_0", "cc_seen", "adaptation_gap"),
    *("cc_best", "epoch_best", "cc_norm", "cc_test", "alpha_edge_share", "accuracy", "macro_f1", "seconds_train"),
    *("seconds_embed", "seconds_ridge", "seconds_total", "peak_memory_gb", "node"),
]
RECORD_FIELDS = {"cc", "cc_test", "details"}


def lora(trial_id: str = "0001", score: float = 0.2, seen: float = 0.3, **changes: Any) -> TrialRecord:
    """A complete searched trial, by hand."""
    config = asdict(TrialConfig(model="tiny", rank=4, lora_alpha=6.0, lr=3e-4, stride=128, seed=11))
    scores = {"cc_mean": score, "cc_seen": seen, "epochs_done": 2, "n_trainable": 1024, "layer": 2.0}
    record = TrialRecord(
        status="COMPLETE",
        method="lora",
        config=config,
        trial_id=trial_id,
        phase="search",
        key=f"key{trial_id}",
        params={"log2_rank": 2, "alpha_factor": 1.5, "lr": 3e-4, "stride": 128, "target_modules": "q,v"},
        scores=scores | {"tokens_seen": 900},
        epochs=[{"epoch": 1, "cc_mean": score / 2}, {"epoch": 2, "cc_mean": score}],
        stories=[{"subject": "s", "story": "beta", "cc_mean": score}],
        seconds={"train": 1.5, "embed": 0.5, "ridge": 0.25, "total": 2.5},
        peak_memory_gb=0.75,
        node="here",
        cc={"s": np.array([0.1, np.nan, 0.3], np.float32), "t": np.array([0.5], np.float32)},
        cc_test={"s": np.array([0.2, np.nan, 0.1], np.float32)},
        details={"validation/p/s": np.array([0.01, np.nan, 0.5], np.float32), "test/replicates/s": np.arange(3) / 7},
    )
    return replace(record, **changes)


def baseline(method: str = "frozen", cc: float = 0.1, seen: float = 0.15) -> TrialRecord:
    config = asdict(TrialConfig(model="tiny", method=method))
    scores = {"cc_mean": cc, "cc_seen": seen, "layer": None if method == "word_rate" else 2.0}
    return TrialRecord("COMPLETE", method, config, f"baseline-{method}", "baseline", scores=scores)


NO_ARRAYS: dict[str, Any] = {"cc": {}, "cc_test": {}, "details": {}}


def failed(trial_id: str = "0009") -> TrialRecord:
    text = "Traceback (most recent call last):\nValueError: the loss is not finite"
    return lora(trial_id, status="FAILED", error=text, scores={}, epochs=[], stories=[], seconds={}, **NO_ARRAYS)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = lora()
    write_record(tmp_path, written)
    file = tmp_path / "trials" / "0001" / "record.json"
    write_json(file, read_json(file) | {"field_of_a_later_version": 1})
    read = read_record(tmp_path, "0001")
    assert read.cc == read.cc_test == read.details == {}
    expected = {k: v for k, v in asdict(written).items() if k not in RECORD_FIELDS}
    expected["config"] |= {k: list(v) for k, v in expected["config"].items() if isinstance(v, tuple)}
    assert {k: v for k, v in asdict(read).items() if k not in RECORD_FIELDS} == expected
    assert TrialConfig.from_dict(read.config) == TrialConfig.from_dict(written.config)
    cc = read_cc(tmp_path, "0001")
    assert sorted(cc) == ["s", "t", "test/s"]
    for name, values in {"s": written.cc["s"], "t": written.cc["t"], "test/s": written.cc_test["s"]}.items():
        assert cc[name].dtype == np.float32
        np.testing.assert_array_equal(cc[name], values)
    details = read_details(tmp_path, "0001")
    assert details.keys() == written.details.keys()
    for name, values in written.details.items():
        assert details[name].dtype == values.dtype
        np.testing.assert_array_equal(details[name], values)
    assert sorted(files(tmp_path)) == [f"trials/0001/{name}" for name in ("cc.npz", "details.npz", "record.json")]


def test_numpy_values_and_paths_are_written_as_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "p": Path("/x/y")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"i": 3, "f": 0.5, "b": True, "p": "/x/y"}


def test_records_come_baselines_first_then_by_id(tmp_path: Path) -> None:
    assert read_records(tmp_path / "nothing") == []
    adapter_folder(tmp_path, "0004").mkdir(parents=True)  # of a trial without a record, which is left out
    confirm = lora("0002", phase="confirm")
    for record in (lora("0010"), confirm, lora("0003"), baseline(), baseline("word_rate"), failed("0001")):
        write_record(tmp_path, record)
    assert [r.trial_id for r in read_records(tmp_path)] == [
        *("baseline-frozen", "baseline-word_rate", "0001", "0003", "0010", "0002")
    ]
    assert [path.name for path in (tmp_path / "trials" / "0001").iterdir()] == ["record.json"]  # a failed one has no CC
    assert read_record(tmp_path, "0001").error == failed().error
    assert read_cc(tmp_path, "0001") == read_details(tmp_path, "0001") == {}


@pytest.mark.parametrize("content", [b"", b'{"status": "COMP', bytes(200), b"\xff\xfe\xff", b"{}", b"[]", b"null"])
def test_a_damaged_record_is_named(content: bytes, tmp_path: Path) -> None:
    write_record(tmp_path, lora("0001"))
    write_record(tmp_path, lora("0002"))
    file = tmp_path / "trials" / "0002" / "record.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_records(tmp_path)
    assert str(refused.value).startswith(f"{file}: damaged")
    assert "\n" not in str(refused.value)


class Crash(Exception):
    """The power failed."""


def crash(*arguments: object, **more: object) -> None:
    raise Crash


def half_savez(file: Any, **arrays: np.ndarray) -> None:
    file.write(b"half an archive")
    raise Crash


@pytest.mark.parametrize(
    ("target", "name", "broken"),
    [(records_module.np, "savez", half_savez), (files_module.json, "dumps", crash), (storage.os, "fsync", crash)],
)
def test_a_crash_while_writing_leaves_no_record(
    target: Any, name: str, broken: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path, lora("0001"))
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(target, name, broken)
        with pytest.raises(Crash):
            write_record(tmp_path, lora("0002"))
    after = files(tmp_path)
    assert {k: v for k, v in after.items() if k.startswith("trials/0001/")} == before
    assert set(after) - set(before) <= {"trials/0002/cc.npz", "trials/0002/details.npz"}, "no record, no temporary file"
    assert [r.trial_id for r in read_records(tmp_path)] == ["0001"]
    write_record(tmp_path, lora("0002"))
    assert [r.trial_id for r in read_records(tmp_path)] == ["0001", "0002"]


def test_the_record_is_renamed_into_place_after_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[str]]] = []
    original = Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append((target.name, sorted(path.name for path in self.parent.iterdir() if not path.name.startswith("."))))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    write_record(tmp_path, lora())
    assert seen == [("cc.npz", []), ("details.npz", ["cc.npz"]), ("record.json", ["cc.npz", "details.npz"])]


def test_a_crash_while_tables_are_written_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, lora("0001"))
    write_tables(tmp_path, read_records(tmp_path))
    before = files(tmp_path)
    write_record(tmp_path, lora("0002"))

    def half(self: pd.DataFrame, path: Path, **more: object) -> None:
        Path(path).write_bytes(b"PAR1 half a table")
        raise Crash

    monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
    with pytest.raises(Crash):
        write_tables(tmp_path, read_records(tmp_path))
    after = files(tmp_path)
    assert {k: after[k] for k in before} == before
    assert not [name for name in after if "tmp" in name]


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from bert_encoding.trial import record as records
from bert_encoding.trial.tables import write_tables
from bert_encoding.core.errors import InputError
study, what = Path(sys.argv[1]), sys.argv[2]
if what == "cc":
    record = records.TrialRecord("COMPLETE", "frozen", {}, "0002", "baseline", cc={"s": np.zeros(50_000, np.float32)})
else:
    record = records.TrialRecord("FAILED", "frozen", {}, "0002", "baseline", error="x" * 200_000)
if what == "tables":
    records.write_record(study, record)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_tables(study, records.read_records(study)) if what == "tables" else records.write_record(study, record)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["cc", "record", "tables"])
def test_no_space_left_is_one_line_that_names_the_folder(what: str, tmp_path: Path) -> None:
    """The kernel refuses files beyond a size, as a full disk would, while a trial's files are written."""
    incompressible = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), 400_000))
    write_record(tmp_path, replace(lora("0001"), error=incompressible if what == "tables" else None))
    before = files(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path), what],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    named = tmp_path if what == "tables" else tmp_path / "trials" / "0002"
    assert ran.stderr == ""
    limit = "(a file may have 50000 bytes here: ulimit -f)"
    assert ran.stdout == f"{named}: no space left to write results {limit}; free some, then --resume\n"
    after = files(tmp_path)
    assert {k: after[k] for k in before} == before
    written = {"trials/0002/record.json"} if what == "tables" else set()
    assert set(after) - set(before) == written


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (PermissionError(13, "denied"), InputError, r"trials/0001: may not be written; choose another --out"),
        (OSError(5, "Input/output error"), OSError, "Input/output error"),
    ],
)
def test_a_denied_folder_is_named_and_other_errors_of_the_system_are_raised(
    error: OSError, expected: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(expected, match=message) as raised:
        write_record(tmp_path, lora())
    assert type(raised.value) is expected


def test_the_documented_columns_come_first_and_in_order() -> None:
    frame = trials_frame([baseline(), lora()])
    assert list(frame.columns) == [*DOCUMENTED, "log2_rank", "alpha_factor"], "lr has a column already"
    for records in ([baseline()], []):
        frame = trials_frame(records)
        assert list(frame.columns) == DOCUMENTED
        assert len(frame) == len(records)


def test_a_searched_trial_fills_its_row() -> None:
    row = trials_frame([baseline(cc=0.1, seen=0.15), lora(score=0.2, seen=0.3)]).set_index("trial_id").loc["0001"]
    expected = {
        **{"phase": "search", "status": "COMPLETE", "seed": 11, "method": "lora", "rank": 4, "lora_alpha": 6.0},
        **{"scaling": 1.5, "target_modules": "q,v", "lr": 3e-4, "stride": 128, "epochs_done": 2, "n_trainable": 1024},
        **{"layer": 2, "mlm_text": "fit", "tokens_seen": 900, "cc_mean": 0.2, "cc_seen": 0.3, "seconds_train": 1.5},
        **{"seconds_embed": 0.5, "seconds_ridge": 0.25, "seconds_total": 2.5, "peak_memory_gb": 0.75, "node": "here"},
        **{"log2_rank": 2, "alpha_factor": 1.5, "adaptation_gap": pytest.approx(0.05)},
    }
    assert {name: row[name] for name in expected} == expected
    empty = {name for name in row.index if pd.isna(row[name])}
    assert empty == (set(DOCUMENTED) - {"trial_id"}) - set(expected)


@pytest.mark.parametrize("method", ["frozen", "word_rate"])
def test_columns_that_do_not_apply_to_a_baseline_are_null(method: str) -> None:
    row = trials_frame([baseline(method), lora()]).iloc[0]
    assert row["method"] == method
    for name in ("rank", "lora_alpha", "scaling", "target_modules", "lr", "stride", "mlm_text", "adaptation_gap"):
        assert row[name] is pd.NA, name
    for name in ("log2_rank", "alpha_factor"):
        assert pd.isna(row[name]), name
    assert pd.isna(row["layer"]) == (method == "word_rate")


def test_column_types_do_not_depend_on_nulls() -> None:
    whole, alone = trials_frame([baseline(), lora(), failed()]), trials_frame([failed()])
    for name in DOCUMENTED:
        assert whole[name].dtype == alone[name].dtype, name
    assert [str(whole[name].dtype) for name in ("rank", "lr", "error")] == ["Int64", "Float64", "string"]


def test_the_adaptation_gap_by_hand() -> None:
    """(cc_seen - frozen cc_seen) - (cc_mean - frozen cc_mean), so positive where seen words gain more."""
    rows = [baseline("frozen", cc=0.10, seen=0.16), baseline("word_rate", cc=0.02, seen=0.03), failed("0003")]
    rows += [lora("0001", score=0.12, seen=0.21), lora("0002", score=0.08, seen=0.10)]
    gap = trials_frame(rows).set_index("trial_id")["adaptation_gap"]
    assert gap["0001"] == pytest.approx((0.21 - 0.16) - (0.12 - 0.10), abs=1e-12)  # 0.03
    assert gap["0002"] == pytest.approx(-0.04, abs=1e-12)
    assert gap[["baseline-frozen", "baseline-word_rate", "0003"]].isna().all()
    for without_frozen in (replace(baseline(), status="FAILED"), baseline("word_rate")):
        assert trials_frame([without_frozen, lora()])["adaptation_gap"].isna().all()


def test_epochs_and_stories_are_one_row_each() -> None:
    rows = [lora("0001", score=0.2), lora("0002", score=0.4), failed()]
    epochs = rows_frame(rows, "epochs")
    expected = {"trial_id": ["0001", "0001", "0002", "0002"], "phase": ["search"] * 4, "epoch": [1, 2, 1, 2]}
    assert epochs.to_dict("list") == expected | {"cc_mean": [0.1, 0.2, 0.2, 0.4]}
    stories = rows_frame(rows, "stories")
    assert stories["trial_id"].tolist() == ["0001", "0002"]
    assert stories[["subject", "story", "cc_mean"]].values.tolist() == [["s", "beta", 0.2], ["s", "beta", 0.4]]


def test_parquet_comes_back_as_the_frame(tmp_path: Path) -> None:
    rows = [baseline(), baseline("word_rate"), lora("0001"), lora("0002", score=0.3), failed()]
    for record in reversed(rows):
        write_record(tmp_path, record)
        frame = write_tables(tmp_path, read_records(tmp_path))  # the first is of a study where everything failed
        assert pd.read_parquet(tmp_path / "trials.parquet")["status"].tolist() == frame["status"].tolist()
    assert frame["trial_id"].tolist() == ["baseline-frozen", "baseline-word_rate", "0001", "0002", "0009"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trials.parquet"), frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "epochs.parquet"), rows_frame(rows, "epochs"))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "stories.parquet"), rows_frame(rows, "stories"))


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_records_of_a_large_study_become_a_table_in_seconds(n: int, tmp_path: Path) -> None:
    """With as many rows of epochs and stories as a study of three subjects has."""
    each, one = np.arange(n), lora(**NO_ARRAYS)
    one = replace(one, epochs=3 * one.epochs, stories=12 * one.stories)
    for index in each.tolist():
        config, scores = one.config | {"rank": 2 ** (index % 6 + 1)}, one.scores | {"cc_mean": index / 1e5}
        params = {"log2_rank": index % 6 + 1}
        write_record(tmp_path, replace(one, trial_id=f"{index:05d}", config=config, scores=scores, params=params))
    began = time.process_time()  # processor seconds: what else this machine does is not our cost
    trials = trials_frame(read_records(tmp_path))
    seconds = time.process_time() - began
    assert trials["trial_id"].tolist() == [f"{index:05d}" for index in each]
    np.testing.assert_array_equal(trials["cc_mean"].to_numpy(float), each / 1e5)
    np.testing.assert_array_equal(trials["rank"].to_numpy(int), 2 ** (each % 6 + 1))
    np.testing.assert_array_equal(trials["log2_rank"].to_numpy(int), each % 6 + 1)
    print(f"{n} records: {seconds:.2f} s")
    assert seconds < 5 / 10_000 * max(n, 2_000), f"{seconds:.1f} s for {n} records"


def with_adapter(study: Path, record: TrialRecord) -> None:
    adapter_folder(study, record.trial_id).mkdir(parents=True)
    (adapter_folder(study, record.trial_id) / "adapter_model.safetensors").write_bytes(b"weights")
    write_record(study, record)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_exactly_the_best_adapters_and_details_of_searched_trials_stay(n: int, tmp_path: Path) -> None:
    for trial_id, cc in {"0001": 0.10, "0002": 0.30, "0003": -0.05, "0004": 0.20}.items():
        with_adapter(tmp_path, lora(trial_id, score=cc))
    with_adapter(tmp_path, failed("0009"))
    write_record(tmp_path, lora("0005", score=0.25))  # without an adapter, it takes no place among them
    write_record(tmp_path, lora("0006", score=0.9, status="STOPPED"))
    write_record(tmp_path, lora("0007", score=-0.5, phase="confirm"))
    write_record(tmp_path, replace(baseline(cc=-0.9), details={"validation/p/s": np.ones(3)}))
    others = {file for file in files(tmp_path) if file.endswith(("record.json", "cc.npz"))}
    adapters = [f"trials/{i}/adapter/adapter_model.safetensors" for i in ("0002", "0004", "0001", "0003")][:n]
    searched = ["0002", "0005", "0004", "0001", "0003"][:n]
    details = [f"trials/{i}/details.npz" for i in (*searched, "0007", "baseline-frozen")]
    for _ in range(2):
        keep_best(tmp_path, n)
        assert set(files(tmp_path)) == {*others, *adapters, *details}


def test_the_key_sees_every_value_and_no_order_of_a_dict() -> None:
    assert content_key({"a": 1, "b": {"x": 1.5, "y": None}}) == content_key({"b": {"y": None, "x": 1.5}, "a": 1})
    assert content_key(("a", "b")) == content_key(["a", "b"])
    config = asdict(TrialConfig())
    keys = {content_key(config, "data", [["a"], ["b"]])}
    keys |= {content_key(config | {"lr": 2.0000001e-4}, "data", [["a"], ["b"]])}
    keys |= {content_key(config | {"seed": 1}, "data", [["a"], ["b"]])}
    keys |= {content_key(config, "date", [["a"], ["b"]]), content_key(config, "data", [["a", "b"]])}
    keys |= {content_key(config, "data"), content_key("data", config)}
    assert len(keys) == 7
    assert {len(key) for key in keys} == {16}


def test_the_code_fingerprint_sees_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    for name in ("__init__.py", "ridge.py", "datasets/lab.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(bert_encoding, "__file__", str(tmp_path / "__init__.py"))
    hashes = [code_fingerprint()]
    (tmp_path / "datasets" / "lab.py").write_text("x = 2\n")
    hashes.append(code_fingerprint())
    (tmp_path / "ridge.py").rename(tmp_path / "ridges.py")
    hashes.append(code_fingerprint())
    assert len(set(hashes)) == 3
    (tmp_path / "notes.txt").write_text("not code")
    assert code_fingerprint() == hashes[-1]
