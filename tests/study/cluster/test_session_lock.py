"""One driver per study: in a folder, and in object storage, where a local S3 server decides conditional writes."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from botocore.awsrequest import AWSRequest, AWSResponse
from cloud_servers import keys
from project import ROOT
from study_process import with_ctrl_c

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.storage import ObjectPath, Place, atomic_path
from bert_encoding.trial.record import TrialRecord, write_record
from study.cluster import lock as lock_module
from study.cluster.conditional_write import S3Object, conditional_object
from study.cluster.lock import BEAT_S, LOCK_FILE, OWNER_FILE, STALE_S, Hold, Owner, has_ended, holding, this_process
from study.session import session

ELSEWHERE = replace(this_process(), host="elsewhere", machine="another boot", pid=1, token="theirs")


@pytest.fixture
def study(bucket: ObjectPath) -> ObjectPath:
    return bucket / "out" / "study"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)


@pytest.fixture(autouse=True)
def _no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is lost by mistake fails its own test only."""
    monkeypatch.setattr(lock_module, "_interrupt", lambda: None)


def leave_lock(study: ObjectPath, owner: Owner) -> None:
    """Write the lock of another owner."""
    with atomic_path(study / LOCK_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(owner) | {"n_beats": 3}))


def lock_of(study: Place) -> dict[str, Any]:
    return json.loads((study / LOCK_FILE).read_text())


def hold_lock(place: Place, hold: Hold | None = None) -> Hold:
    """Hold a lock for a moment."""
    hold = hold or Hold()
    with holding(place, hold):
        assert read_json(place / (LOCK_FILE if isinstance(place, ObjectPath) else OWNER_FILE))["pid"] == os.getpid()
    return hold


def begin(place: Place, identity: dict[str, Any], is_resumed: bool = False, hold: Hold | None = None) -> None:
    """Begin or resume a study that ends at once."""
    with session._open_folder(place, identity, is_resumed, hold):
        pass


def set_age(monkeypatch: pytest.MonkeyPatch, age_s: float) -> None:
    """Let every lock have this age by the server's clock."""
    read = S3Object.read

    def read_older(self: S3Object) -> Any:
        stored = read(self)
        return None if stored is None else stored._replace(age_s=age_s)

    monkeypatch.setattr(S3Object, "read", read_older)


def wait_for_beats(study: Place, n_beats: int) -> None:
    deadline = time.monotonic() + 20
    while lock_of(study)["n_beats"] < n_beats:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_lock_is_kept(study: ObjectPath) -> None:
    """Hold the lock for several renewals."""
    hold = Hold()
    with holding(study, hold):
        wait_for_beats(study, 4)
    assert hold.lost_to is None
    assert keys(study) == []


@pytest.mark.parametrize("cloud", ["bucket", "gcs_bucket"])
def test_an_object_is_created_once_and_replaced_only_by_who_read_it(cloud: str, request: pytest.FixtureRequest) -> None:
    study = request.getfixturevalue(cloud) / "s"
    first, second = conditional_object(study / "a b%"), conditional_object(study / "a b%")
    assert first.read() is None
    tag = first.write(b"first", None)
    assert tag is not None
    assert second.write(b"second", None) is None
    stored = second.read()
    assert stored is not None
    assert (stored.content, stored.tag) == (b"first", tag)
    assert -1 <= stored.age_s < 60  # dates have a resolution of a second
    later = second.write(b"later", stored.tag)
    assert first.write(b"stale", tag) is None
    assert later is not None
    if cloud == "bucket":  # fake-gcs-server ignores conditions of deletes; Google's own server does not
        first.delete(tag)
    assert (study / "a b%").read_bytes() == b"later"
    first.delete(later)
    assert second.read() is None
    assert second.write(b"x", later) is None, "there is nothing to replace"


def test_one_of_many_simultaneous_writers_wins(study: ObjectPath) -> None:
    start = threading.Barrier(8)

    def race(content: bytes) -> bytes | None:
        mine = conditional_object(study / LOCK_FILE)
        start.wait()
        return content if mine.write(content, None) is not None else None

    with ThreadPoolExecutor(8) as pool:
        winners = [content for content in pool.map(race, [b"%d" % n for n in range(8)]) if content is not None]
    assert winners == [(study / LOCK_FILE).read_bytes()]


@pytest.mark.parametrize("cloud", ["bucket", "gcs_bucket"])
def test_a_missing_bucket_is_one_line(cloud: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(cloud)
    missing = replace(place, bucket=f"{place.bucket}-missing", key=LOCK_FILE)
    with pytest.raises(InputError, match="no such bucket; create it, or choose another --out"):
        conditional_object(missing).write(b"", None)


def test_the_lock_without_boto3_names_what_to_install(study: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"needs boto3 for the lock; pip install .*\[cluster\]"):
        conditional_object(study / LOCK_FILE)


def test_a_storage_that_ignores_conditions_is_refused(study: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    write = S3Object.write
    monkeypatch.setattr(S3Object, "write", lambda self, content, tag: write(self, content, tag) or "written anyway")
    with pytest.raises(InputError, match="ignores If-None-Match"):
        hold_lock(study)


def test_a_lock_on_googles_storage(gcs_bucket: ObjectPath, fast: None) -> None:
    with holding(gcs_bucket, Hold()):
        with pytest.raises(InputError, match="another run is at work"):
            hold_lock(gcs_bucket)
        wait_for_beats(gcs_bucket, 2)
    assert not (gcs_bucket / LOCK_FILE).exists()


def test_a_second_driver_is_refused_and_the_owner_named(study: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    set_age(monkeypatch, 7.0)
    with holding(study, Hold()):
        owner = lock_of(study)
        assert (owner["host"], owner["pid"]) == (os.uname().nodename, os.getpid())
        assert abs(time.time() - time.mktime(time.strptime(owner["since"][:19], "%Y-%m-%dT%H:%M:%S"))) < 86400
        with pytest.raises(InputError) as refused:
            hold_lock(study)
        assert lock_of(study)["token"] == owner["token"]
    assert keys(study) == []
    who = f"host {owner['host']}, process {owner['pid']}, since {owner['since']}"
    expected = rf"{re.escape(str(study))}: another run is at work on this study \({re.escape(who)}\); wait for it"
    assert re.match(expected, str(refused.value))
    assert "last sign of life 7 s ago" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("seconds", "may_force", "expected"),
    [(STALE_S - 1, False, None), (STALE_S + 1, False, False), (0, True, True), (STALE_S + 1, True, False)],
)
def test_a_lock_of_another_machine_is_taken_when_stale_or_forced(
    seconds: float, may_force: bool, expected: bool | None, study: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``expected`` is whether the takeover is recorded as forced; None if it is refused."""
    assert BEAT_S * 5 <= STALE_S, "several renewals may fail"
    leave_lock(study, ELSEWHERE)
    set_age(monkeypatch, seconds)
    hold = Hold(may_force)
    if expected is None:
        with pytest.raises(InputError, match=r"host elsewhere, process 1, since .* --take-over"):
            hold_lock(study, hold)
        assert lock_of(study)["token"] == "theirs"
        return
    takeover = hold_lock(study, hold).takeover
    assert takeover is not None
    assert (takeover["forced"], takeover["silent_s"]) == (expected, seconds)
    assert takeover["from"] == {"host": "elsewhere", "pid": 1, "since": ELSEWHERE.since}


def test_a_damaged_lock_is_stale_by_age_alone(study: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_path(study / LOCK_FILE) as temporary:
        temporary.write_text('{"host": "x"')
    with pytest.raises(InputError, match="another run is at work on this study; wait"):
        hold_lock(study)
    set_age(monkeypatch, STALE_S + 1)
    hold_lock(study)


def test_has_ended_distinguishes_processes_and_machines() -> None:
    mine = this_process()
    assert not has_ended(mine)
    assert has_ended(replace(mine, process_start_s=mine.process_start_s - 100)), "the id belongs to a later process"
    assert not has_ended(replace(mine, machine="another", pid=2**22 + 1)), "not known for another machine"
    assert not has_ended(Owner())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert has_ended(replace(mine, pid=ended.pid))


DRIVER = """
import signal, sys, time
from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import open_place
from study.cluster import lock

signal.signal(signal.SIGTERM, signal.default_int_handler)  # as where Ray runs
lock.BEAT_S, hold = float(sys.argv[2]), lock.Hold()
try:
    with lock.holding(open_place(sys.argv[1]), hold):
        print("held", flush=True)
        time.sleep(60)
except InputError as error:
    print(hold.lost_to.host, error)
"""


def start_driver(place: Place, beat_s: float, is_heard: bool = True) -> subprocess.Popen:
    """Start a process that holds a lock; if Ctrl-C is ignored, as with nohup, it receives SIGTERM."""
    command = with_ctrl_c([sys.executable, "-c", DRIVER, str(place), str(beat_s)], is_heard)
    driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "held\n"
    return driver


def test_the_lock_of_a_killed_driver_is_free_at_once(tmp_path: Path, study: ObjectPath) -> None:
    for place in (tmp_path, study):
        with start_driver(place, BEAT_S) as holder:
            message = rf"another run is at work on this study \(host .*, process {holder.pid}, since "
            with pytest.raises(InputError, match=message):
                hold_lock(place)
            holder.send_signal(signal.SIGKILL)
        takeover = hold_lock(place).takeover
        if isinstance(place, ObjectPath):
            assert takeover is not None
            assert (takeover["from"]["pid"], takeover["forced"]) == (holder.pid, False)


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_driver_that_loses_its_lock_ends_and_does_not_touch_the_new_one(study: ObjectPath, is_heard: bool) -> None:
    with start_driver(study, 0.05, is_heard) as loser:
        try:
            leave_lock(study, ELSEWHERE)
            text, _ = loser.communicate(timeout=30)
        finally:
            loser.kill()
    assert re.match(r"elsewhere .*: another run took this study over \(host elsewhere, process 1, ", text)
    assert lock_of(study)["token"] == "theirs"


def test_a_renewal_whose_response_was_lost_keeps_the_lock(
    study: ObjectPath, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = S3Object.write, []

    def lose_one(self: S3Object, content: bytes, tag: str | None) -> str | None:
        written = write(self, content, tag)
        if tag is not None and not lost:
            lost.append(tag)
            raise InputError("no response")
        return written

    monkeypatch.setattr(S3Object, "write", lose_one)
    logging.getLogger("study.cluster.lock").setLevel(logging.ERROR)
    assert_lock_is_kept(study)
    assert lost


def test_a_renewal_that_met_another_request_keeps_the_lock(
    study: ObjectPath, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 409 if two conditional requests meet, and then neither has to succeed."""
    made, conflicts = S3Object.__init__, []

    def answer_first_renewal(request: AWSRequest, **_: Any) -> AWSResponse | None:
        if "If-Match" not in request.headers or conflicts:
            return None  # the server answers
        conflicts.append(request)
        error = io.BytesIO(b"<Error><Code>ConditionalRequestConflict</Code></Error>")
        return AWSResponse(request.url, 409, {}, urllib3.HTTPResponse(error, preload_content=False))

    def make(self: S3Object, place: ObjectPath) -> None:
        made(self, place)
        self.client.meta.events.register("before-send.s3.PutObject", answer_first_renewal)

    monkeypatch.setattr(S3Object, "__init__", make)
    assert_lock_is_kept(study)
    assert len(conflicts) == 1


def test_ctrl_c_releases_the_lock(study: ObjectPath, tmp_path: Path) -> None:
    for place in (study, tmp_path):
        with pytest.raises(KeyboardInterrupt), holding(place, Hold()):
            raise KeyboardInterrupt
    assert keys(study) == []
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


IDENTITY: dict[str, Any] = {
    "options": {"trials": 3},
    "space": {"name": "s", "hash": "1"},
    "data": {"source": "here", "fingerprint": "f"},
    "voxels": {"asked": "all", "key": "v"},
    "model": {"name": "m", "weights": "w"},
    "splits": [{"fit": ["a"]}],
    "config": {"lr": 1},
    "code": "c",
    "precision": "p",
    "versions": {"torch": "1"},
}


def test_a_study_that_another_driver_just_began_is_not_overwritten(
    study: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, calls = session.check_new, []

    def begin_after_check(folder: Place, resume: bool) -> None:
        check(folder, resume)
        if not calls:
            calls.append(folder)
            begin(study, IDENTITY)

    monkeypatch.setattr(session, "check_new", begin_after_check)
    with pytest.raises(InputError, match="exists already"):
        begin(study, IDENTITY | {"code": "d"})
    assert read_json(study / "study.json") == IDENTITY


def test_takeovers_are_recorded_in_order(study: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is of a driver that was killed between the lock and ``study.json``."""
    for host, age_s in (("one", STALE_S + 1), ("two", 0), ("three", 0)):
        leave_lock(study, replace(ELSEWHERE, host=host))
        with monkeypatch.context() as patch:
            set_age(patch, age_s)
            begin(study, IDENTITY, is_resumed=host != "one", hold=Hold(may_force=host != "one"))
    takeovers = [
        (takeover["from"]["host"], takeover["forced"]) for takeover in read_json(study / "study.json")["takeovers"]
    ]
    assert takeovers == [("one", False), ("two", True), ("three", True)]


def test_the_next_id_follows_trials_without_a_record(study: ObjectPath) -> None:
    assert session._next_id(study) == 1
    write_record(study, TrialRecord("COMPLETE", "lora", {}, "0003", "search"))
    with atomic_path(study / "trials" / "0007" / "adapter" / "weights") as temporary:
        temporary.write_bytes(b"of a killed worker")
    assert session._next_id(study) == 8


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_ids_of_a_killed_session_are_not_used_again(where: str, tmp_path: Path, study: ObjectPath) -> None:
    """Its workers may still write, on a disconnected machine: as many trials as ran at the same time."""
    place = tmp_path / "s" if where == "folder" else study
    record = TrialRecord("COMPLETE", "lora", {}, "0003", "search")
    with session._open_folder(place, IDENTITY, False, at_once=4):
        begun = read_json(place / "study.json")
        assert begun["session"] == {"id": lock_module.session_id(), "first_id": 1, "at_once": 4}
        write_record(place, record)
        assert session._next_id(place) == 4, "inside a session ids follow each other"
    assert "session" not in read_json(place / "study.json"), "it ended normally"
    with session._open_folder(place, IDENTITY, True, at_once=2):
        assert session._next_id(place) == 4
    killed = begun
    for at_once, expected in ((3, 4 + 4), (1, 8 + 3)):
        write_json(place / "study.json", killed)
        with session._open_folder(place, IDENTITY, True, at_once=at_once):
            assert session._next_id(place) == expected
            killed = read_json(place / "study.json")  # with nothing recorded
    assert session._next_id(place) == 11, "the other session ended normally, without a record"
    with session._open_folder(place, IDENTITY, True):
        assert session._next_id(place) == 11
        write_record(place, replace(record, trial_id="0011"))
    assert "session" not in read_json(place / "study.json")
    assert session._next_id(place) == 12


def test_a_driver_that_lost_its_study_does_not_end_the_session_of_the_new_owner(tmp_path: Path) -> None:
    with session._open_folder(tmp_path / "s", IDENTITY, False):
        other = read_json(tmp_path / "s" / "study.json") | {"session": {"id": "theirs", "first_id": 9, "at_once": 1}}
        write_json(tmp_path / "s" / "study.json", other)
    assert read_json(tmp_path / "s" / "study.json") == other


def test_tidy_deletes_an_empty_study_and_keeps_records(study: ObjectPath) -> None:
    metric = session.METRICS[session.ENCODING]
    with session._open_folder(study, IDENTITY, False):
        session._tidy(study, metric, is_new=True, n_adapters=5)
    assert [key for key in keys(study) if not key.endswith("/")] == []
    with session._open_folder(study, IDENTITY, False):
        write_record(study, TrialRecord("COMPLETE", "lora", {"rank": 1, "lora_alpha": 1}, "0001", "search"))
        session._tidy(study, metric, is_new=True, n_adapters=5)
    assert "out/study/trials.parquet" in keys(study)
    assert session.n_searched(study) == 1
