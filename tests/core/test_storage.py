"""Results in a folder and in object storage: the same files, written completely or not at all (a local S3 server)."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cloud_servers import keys
from project import ROOT

from bert_encoding.core import storage
from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.storage import (
    ObjectPath,
    Place,
    atomic_path,
    children,
    entries,
    local_copy,
    local_folder,
    make_folder,
    modified_s,
    open_place,
    remove_tree,
)
from bert_encoding.trial.record import (
    TrialRecord,
    has_record,
    keep_best,
    read_cc,
    read_record,
    read_records,
    saving_adapter,
    write_record,
)
from bert_encoding.trial.tables import trials_frame, write_tables
from study import analysis
from study.results.load import load_trials

ODD = ["plain", "with space", "ümlaut 語", "100%", "what?", "a#b", "a+b&c=d", "[x]", "per%20cent", "'q'\"", "x;y", "~$"]


@pytest.fixture(params=["folder", "bucket", "gcs_bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty study: a folder, then one in object storage of either kind."""
    root = tmp_path if request.param == "folder" else request.getfixturevalue(request.param) / "out"
    return root / "study"


def record(trial_id: str, score: float = 0.2, status: str = "COMPLETE") -> TrialRecord:
    return TrialRecord(
        status=status,
        method="lora",
        config={"model": "tiny", "rank": 4, "lora_alpha": 8.0, "seed": 1},
        trial_id=trial_id,
        phase="search",
        scores={"cc_mean": score},
        epochs=[{"epoch": 1, "cc_mean": score}],
        cc={"s": np.array([score, np.nan], np.float32)},
        cc_test={"s": np.array([0.5, np.nan], np.float32)},
    )


def write(place: Place, name: str, content: bytes = b"x") -> Place:
    make_folder(place)
    with atomic_path(place / name) as temporary:
        temporary.write_bytes(content)
    return place / name


def write_half(place: Place, error: Callable[[], BaseException]) -> None:
    """Write half a file, then fail."""
    with atomic_path(place) as temporary:
        temporary.write_bytes(b"half")
        raise error()


def fill(study: Place, scores: dict[str, float]) -> None:
    for trial_id, score in scores.items():
        with saving_adapter(study, trial_id) as folder:
            (folder / "split0").mkdir(parents=True)
            (folder / "split0" / "adapter_model.safetensors").write_bytes(trial_id.encode())
            (folder / "adapter_config.json").write_text("{}")
        write_record(study, record(trial_id, score))


@pytest.mark.parametrize("query", ["", "endpoint_override=localhost:9000&scheme=http"])
@pytest.mark.parametrize("name", ODD)
def test_open_place_reads_what_str_writes(name: str, query: str) -> None:
    place = ObjectPath("s3://bucket", "results", query) / name / "trials"
    assert open_place(str(place)) == place
    assert (place.name, place.parent.name, place.parent.parent.key) == ("trials", name, "results")


def test_open_place_takes_text_without_scheme_as_a_folder() -> None:
    for text in ("results", "/a/b", "../s3:", "C:x", "s3:/bucket"):
        assert open_place(text) == Path(text)
    assert open_place(Path("s3:/x")) == Path("s3:/x")
    assert open_place("S3://Bucket/a%20b/") == ObjectPath("s3://Bucket", "a b")
    assert open_place("gs://anonymous@bucket") == ObjectPath("gs://anonymous@bucket", "")
    assert storage.arrow_path(open_place("gs://anonymous@bucket/x")) == "bucket/x"


@pytest.mark.parametrize(
    ("locations", "reason"),
    [
        (["ftp://host/x"], "ftp://host/x: results can be kept in a folder, s3://bucket/prefix or gs://bucket/prefix"),
        (["s3://", "s3:///x", "s3://bucket/../b", "s3://bucket/a#b"], "must look like s3://bucket/prefix"),
        (["gs://bucket/a//b"], "must look like gs://bucket/prefix"),
        (["s3://AKIA:hush@bucket/x", "s3://bucket/x?secret_key=hush", "s3://hush@bucket"], "contains a secret"),
    ],
)
def test_open_place_refuses_and_repeats_no_secret(locations: list[str], reason: str) -> None:
    """``study.json`` keeps the command line."""
    for location in locations:
        with pytest.raises(InputError, match=re.escape(reason)) as refused:
            open_place(location)
        assert "hush" not in str(refused.value)


def test_files_are_listed_and_read(place: Place) -> None:
    assert (place.exists(), list(children(place))) == (False, [])
    contents = {name: os.urandom(n_bytes) for n_bytes, name in enumerate(ODD)}
    for name, content in contents.items():
        write(place, name, content)
    assert {child.name: child.read_bytes() for child in children(place)} == contents
    assert [child.name for child in children(place)] == sorted(ODD)
    assert (place.exists(), place.is_dir(), place.is_file()) == (True, True, False)
    assert ((place / "plain").is_file(), (place / "plain").is_dir()) == (True, False)
    assert ((place / "nothing").exists(), (place / "nothing").name) == (False, "nothing")
    with pytest.raises(FileNotFoundError):
        (place / "nothing").read_bytes()


def test_a_large_file_is_read_as_written_and_replaced_completely(place: Place) -> None:
    content = np.random.default_rng(0).bytes(12_000_000)  # more than one part of a multipart upload
    assert write(place, "a", content).read_bytes() == content
    before = modified_s(place / "a")
    assert modified_s(write(place, "a", b"second")) >= before > 1.7e9
    assert (place / "a").read_bytes() == b"second"


def test_an_error_while_writing_leaves_the_old_file(place: Place) -> None:
    write(place, "a", b"old")
    for name, error in (("a", ZeroDivisionError), ("b", KeyboardInterrupt)):
        with pytest.raises(error):
            write_half(place / name, error)
    assert [child.name for child in children(place)] == ["a"]
    assert (place / "a").read_bytes() == b"old"


def test_folders_are_uploaded_copied_and_removed(place: Place) -> None:
    with local_folder(place / "adapter") as folder:
        (folder / "split 0").mkdir(parents=True)
        (folder / "split 0" / "weights").write_bytes(b"weights")
        (folder / "config.json").write_bytes(b"{}")
    with local_copy(place / "adapter") as copy:
        files = {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob("*") if file.is_file()}
        assert (copy.name, files) == ("adapter", {"split 0/weights": b"weights", "config.json": b"{}"})
    with local_copy(place / "adapter" / "config.json") as copy:
        assert (copy.name, copy.read_bytes()) == ("config.json", b"{}")
    with pytest.raises(FileNotFoundError), local_copy(place / "nothing") as copy:
        copy.read_bytes()
    remove_tree(place / "adapter" / "split 0")
    with local_copy(place / "adapter") as copy:
        assert [file.name for file in copy.rglob("*")] == ["config.json"]
    remove_tree(place)
    assert not place.exists()


def test_an_error_in_a_local_folder_uploads_nothing_and_one_about_a_copy_names_the_place(bucket: ObjectPath) -> None:
    with pytest.raises(ZeroDivisionError), local_folder(bucket / "adapter") as folder:
        raise ZeroDivisionError((folder / "weights").write_bytes(b"half"))
    assert keys(bucket) == []
    write(bucket, "voxels.npz")
    with pytest.raises(InputError) as refused, local_copy(bucket / "voxels.npz") as copy:
        raise InputError(f"{copy}: subject s: no such voxel")
    assert str(refused.value) == f"{bucket / 'voxels.npz'}: subject s: no such voxel"


def test_entries_are_one_level_deep_and_folders_no_prefixes(place: Place) -> None:
    """Object storage knows prefixes, not folders."""
    for name in ("2", "1", "10"):
        write(place / name, "record.json")
    write(place / "3", "other.json")
    write(place / "3" / "deeper", "record.json")
    write(place, "record.json")
    assert [str(entry) for entry in entries(place, "record.json")] == [
        str(place / name / "record.json") for name in ("1", "10", "2")
    ]
    assert [entry.parent.name for entry in entries(place, "deeper")] == ["3"]
    assert list(entries(place / "nothing", "record.json")) == []
    assert [child.name for child in children(place / "1")] == ["record.json"]
    remove_tree(place / "1")
    assert [child.name for child in children(place)] == ["10", "2", "3", "record.json"]
    assert not (place / "rec").exists()


def test_more_than_a_thousand_files_are_listed(bucket: ObjectPath) -> None:
    """S3 lists at most a thousand keys per response."""
    from moto.s3.models import s3_backends

    names = [f"{index:04d}" for index in range(1203)]
    for name in names:  # directly into the server: requests would take half a minute
        s3_backends["123456789012"]["aws"].put_object(bucket.bucket[5:], f"s/trials/{name}/record.json", b"{}")
    study = bucket / "s"
    assert [entry.parent.name for entry in entries(study / "trials", "record.json")] == names
    assert [child.name for child in children(study / "trials")] == names
    remove_tree(study / "trials")
    assert [key for key in keys(bucket) if "record" in key] == []


def test_records_are_the_same_in_both(tmp_path: Path, bucket: ObjectPath) -> None:
    scores = {"0001": 0.1, "0002": 0.3, "0003": 0.2}
    local, remote = tmp_path / "study", bucket / "study"
    for study in (local, remote):
        make_folder(study)
        write_json(study / "study.json", {"name": "study"})
        fill(study, scores)
        keep_best(study, 2)
        write_tables(study, read_records(study))
    contents = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(contents) == [key for key in keys(bucket) if not key.endswith("/")], "the same files"
    assert {name: (bucket / name).read_bytes() for name in contents} == contents, "with the same bytes"
    assert [asdict(r) for r in read_records(local)] == [asdict(r) for r in read_records(remote)]
    assert (has_record(remote, "0001"), has_record(remote, "0009")) == (True, False)
    assert read_record(remote, "0002").scores == {"cc_mean": 0.3}
    for name, values in read_cc(local, "0002").items():
        np.testing.assert_array_equal(values, read_cc(remote, "0002")[name])
    assert sorted({key.split("/")[2] for key in keys(bucket) if "/adapter/" in key}) == ["0002", "0003"]
    pd.testing.assert_frame_equal(load_trials(str(remote)), trials_frame(read_records(local)))


def test_a_record_is_one_request_and_comes_last(bucket: ObjectPath, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        write_record(bucket / "s", record("0001"))
    requests = [re.sub(r"\x1b\[\d+m", "", line) for line in caplog.messages]
    writes = [re.search(r'"(PUT|POST|DELETE) (\S+) ', line) for line in requests]
    assert [write.group(1, 2) for write in writes if write] == [
        ("PUT", f"/{bucket.bucket[5:]}/s/trials/0001/cc.npz"),
        ("PUT", f"/{bucket.bucket[5:]}/s/trials/0001/record.json"),
    ]


KILLED = """
import os, signal, sys
import numpy as np
from bert_encoding.trial import record as records; from bert_encoding.core import storage
study, moment = storage.open_place(sys.argv[1]), sys.argv[2]
record = records.TrialRecord("COMPLETE", "lora", {}, "0002", "search", cc={"s": np.zeros(3, np.float32)})
def die(*arguments, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the record":
    records.write_json = die
elif moment == "before it is uploaded":
    upload = storage._upload
    storage._upload = lambda file, place: die() if place.name == "record.json" else upload(file, place)
else:
    np.savez = die
records.write_record(study, record)
"""


@pytest.mark.parametrize("moment", ["while cc.npz is made", "before the record", "before it is uploaded"])
def test_a_writer_that_is_killed_leaves_no_record(moment: str, bucket: ObjectPath, tmp_path: Path) -> None:
    place = bucket / "s"
    write_record(place, record("0001"))
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(place), moment],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL
    assert [r.trial_id for r in read_records(place)] == ["0001"]
    assert not has_record(place, "0002")
    write_record(place, record("0002"))
    assert [r.trial_id for r in read_records(place)] == ["0001", "0002"]


def test_a_damaged_record_in_object_storage_is_named(bucket: ObjectPath) -> None:
    file = write(bucket / "s" / "trials" / "0001", "record.json", b'{"status": "COMP')
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: damaged"):
        read_records(bucket / "s")


def test_the_command_prints_a_study_in_object_storage(bucket: ObjectPath, capsys: pytest.CaptureFixture[str]) -> None:
    study = bucket / "s"
    write_json(study / "study.json", {"name": "s"})
    fill(study, {"0001": 0.1})
    assert run_app(analysis.app, [str(study)]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "0001" in out
    table = pd.read_parquet(io.BytesIO((study / "trials.parquet").read_bytes()))
    pd.testing.assert_frame_equal(table, load_trials(study))
    assert run_app(analysis.app, [str(bucket / "other")]) == 2
    assert capsys.readouterr().err == f"error: {bucket / 'other'}: no study here (study.json is missing)\n"


def test_an_unknown_setting_and_a_bucket_that_is_missing_are_one_line(bucket: ObjectPath) -> None:
    with pytest.raises(InputError, match="schame"):
        ObjectPath(bucket.bucket, "x", "schame=http").exists()
    study = ObjectPath("s3://no-such-bucket", "s", bucket.query)
    with pytest.raises(InputError, match=rf"{re.escape(str(study))}.*: no such bucket; create it"):
        children(study)
    with pytest.raises(InputError, match="no such bucket"):
        write_record(study, record("0001"))


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_denied_access_is_one_line(
    code: str, bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch, s3_endpoint: str
) -> None:
    """The server refuses as Amazon does."""
    from moto.s3 import exceptions
    from moto.s3.responses import S3Response

    class Denied(exceptions.S3ClientError):
        code = 403

        def __init__(self) -> None:
            super().__init__(code, "not you")

    def deny(*arguments: object, **more: object) -> None:
        raise Denied

    monkeypatch.setattr(S3Response, "list_objects_v2", deny)
    monkeypatch.setattr(S3Response, "put_object", deny)
    with pytest.raises(InputError, match="access denied; check your credentials") as refused:
        children(bucket / "s")
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"trials/0001/cc\.npz\?.*: access denied"):
        write_record(bucket / "s", record("0001"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [  # messages of pyarrow
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not", "cannot be reached"),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not", "no such bucket"),
        ("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.", "access denied"),
        ("AWS Error ACCESS_DENIED during PutObject operation: Access Denied", "access denied"),
        ("google::cloud::Status(UNAUTHENTICATED: Permanent error)", "access denied"),
        ("Something\nunexpected", "Something unexpected"),
    ],
)
def test_explain_turns_errors_of_pyarrow_into_one_line(message: str, expected: str) -> None:
    error = str(storage.explain(ObjectPath("s3://b", "p"), message))
    assert error.startswith(f"s3://b/p: {expected}")
    assert "\n" not in error


def test_an_upload_is_retried_after_temporary_errors(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = ["AWS Error NETWORK_CONNECTION during PutObject operation", "AWS Error SLOW_DOWN"]
    put = storage._put

    def fail_first(file: Path, place: ObjectPath) -> None:
        if errors:
            raise OSError(errors.pop(0))
        put(file, place)

    monkeypatch.setattr(storage, "_put", fail_first)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.02))
    assert write(bucket, "a", b"stored").read_bytes() == b"stored"
    errors.extend(["AWS Error SLOW_DOWN"] * 3)
    with pytest.raises(InputError, match="SLOW_DOWN"):
        write(bucket, "a", b"never")
    assert (bucket / "a").read_bytes() == b"stored"


def test_a_full_local_disk_is_not_reported_as_an_error_of_the_cloud(bucket: ObjectPath) -> None:
    with pytest.raises(InputError, match=r"bert-encoding-.*: no space left"):
        write_half(bucket / "a", lambda: OSError(28, "No space left on device"))
    assert keys(bucket) == []
