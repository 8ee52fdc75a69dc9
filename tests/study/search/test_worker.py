"""Workers: the records they write, the session they belong to, their share of the machine, their data."""

import io
import json
import logging
import os
import pickle
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.tune
import torch
from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.names import METRICS
from bert_encoding.core.storage import Place, atomic_path
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import N_SAMPLES, Responses, check_stamp, file_stamp
from bert_encoding.datasets.story import Dataset
from bert_encoding.language_model.encoder import checkpoint_fingerprint
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, has_record, read_record
from study.cluster import worker_data as travel
from study.cluster.lock import LOCK_FILE, OWNER_FILE, Hold, holding, is_held_by, session_id
from study.cluster.worker_data import check_weights, for_workers, with_settled_precision
from study.search import tuning
from study.search import worker as module
from study.search.worker import Job, objective, run_job
from study.session import session
from study.session.baselines import key_maker
from study.session.session import in_key
from study.setup.encoding_study import prepare
from study.setup.options import ResumePolicy
from study.setup.resolve import resolve_options
from study.setup.spaces import load_space

CONFIG = TrialConfig(model="none", epochs=2)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The reports of a worker to Ray Tune, of trials that do not run."""
    reported: list[dict[str, Any]] = []

    def pretend(job: Job, task: Any, study: Place, report: Any, cache: Any) -> TrialRecord:
        scores = {"epoch": 1.0, "cc_mean": 0.2}
        report(scores)
        return TrialRecord("COMPLETE", "lora", asdict(CONFIG), scores={"cc_mean": 0.2}, epochs=[scores])

    monkeypatch.setattr(ray.tune, "report", reported.append)
    monkeypatch.setattr(module, "_run", pretend)
    return reported


def work(study: Place, job: Job, **changes: Any) -> None:
    limits = {"n_threads": torch.get_num_threads(), "gpu_share": 0.0}
    objective(asdict(job), task=None, study=str(study), metric=METRICS["encoding"], **limits | changes)


def a_job(name: str = "0007", **changes: Any) -> Job:
    return Job(name, "search", "key", asdict(CONFIG), {"lr": 0.1}, **changes)


@pytest.mark.parametrize("error", [InputError("no space left to write results"), OSError(5, "Input/output error")])
def test_a_record_that_cannot_be_written_is_reported_to_the_driver_and_not_retried(
    error: Exception, reports: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(study: Place, record: TrialRecord) -> None:
        raise error

    monkeypatch.setattr(module, "write_record", fail)
    logging.getLogger("study.search.worker").setLevel(logging.ERROR)
    work(tmp_path, a_job())
    epoch, end = reports
    assert epoch["epoch"] == 1
    assert (end["job"], end["status"], end["ended"], end["unrecorded"]) == ("0007", "FAILED", True, True)
    assert str(error) in end["error"].splitlines()[-1]
    assert end["value"] is None


@pytest.fixture(params=["folder", "s3"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path if request.param == "folder" else request.getfixturevalue("bucket") / "s"


def take(study: Place, token: str | None) -> None:
    """Give the lock to another session, or remove it."""
    file = study / (OWNER_FILE if isinstance(study, Path) else LOCK_FILE)
    if token is None:
        file.unlink()
        return
    content = json.loads(file.read_bytes()) | {"token": token}
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content))


def test_a_job_names_its_session(study: Place) -> None:
    assert a_job().session == session_id() == ""
    with holding(study, Hold()):
        first = a_job().session
        assert first == session_id() != ""
        assert is_held_by(study, first)
        assert Job(**asdict(a_job())).session == first
    assert session_id() == ""
    assert not is_held_by(study, first)
    with holding(study, Hold()):
        assert not is_held_by(study, first), "each session has an id of its own"


def test_a_written_record_is_reported_and_answers_the_job_if_it_is_tried_again(
    study: Place, reports: list[dict[str, Any]]
) -> None:
    with holding(study, Hold()):
        work(study, a_job())
        again = run_job(a_job(), None, study, pytest.fail)
    end = reports[-1]
    assert (end["status"], end["value"], end["curve"], end["unrecorded"]) == ("COMPLETE", 0.2, [(1, 0.2)], False)
    record = read_record(study, "0007")
    assert (record.status, record.key, record.params, record.phase) == ("COMPLETE", "key", {"lr": 0.1}, "search")
    assert again.scores["cc_mean"] == 0.2


@pytest.mark.parametrize("token", ["another session's", None])
def test_a_late_result_of_a_session_that_is_over_is_dropped(
    token: str | None, study: Place, reports: list[dict[str, Any]]
) -> None:
    """Driver killed or cut off, study taken over or ended: its worker comes last."""
    logging.getLogger("study.search.worker").setLevel(logging.ERROR)
    with holding(study, Hold()):
        job = a_job()
        take(study, token)
        work(study, job)
        assert not has_record(study, "0007")
        if isinstance(study, Path):
            study.joinpath(OWNER_FILE).touch()
    end = reports[-1]
    assert (end["status"], end["unrecorded"]) == ("FAILED", False), "neither the worker nor its driver may write it"
    assert "trial 0007 is dropped" in end["error"]


def test_a_killed_driver_s_last_result_counts_while_nobody_else_holds_the_study(tmp_path: Path) -> None:
    """Its record is there before the next session reads them."""
    with holding(tmp_path, Hold()):
        left = (tmp_path / OWNER_FILE).read_bytes()
        token = session_id()
    (tmp_path / OWNER_FILE).write_bytes(left)
    assert is_held_by(tmp_path, token)


def test_a_forced_study_repeats_no_earlier_record() -> None:
    identity: dict[str, Any] = {
        "data": {"fingerprint": "f", "trim_trs": [10, 5]},
        "model": {"weights": "w"},
        "voxels": {"key": "v"},
        "splits": [{"fit": ["a"]}],
        "code": "c",
        "versions": {"torch": "2.12.0", "numpy": "2.4"},
        "config": {"seed": 0},
    }

    def key(precision: str | None = "float32", **changes: Any) -> str:
        return key_maker(in_key(identity | changes, precision))(CONFIG)

    assert key() == key(created="today", git={"commit": "1"}, options={"trials": 9})
    changed = {
        "precision": key("bfloat16"),
        "versions": key(versions={"torch": "2.13.0", "numpy": "2.4"}),
        "trim": key(data={"fingerprint": "f", "trim_trs": [5, 10]}),
        "seed of folds and probes": key(config={"seed": 1}),
        "code": key(code="d"),
        "data": key(data={"fingerprint": "g", "trim_trs": [10, 5]}),
    }
    assert len({key(), *changed.values()}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("has_gpu", "share", "expected"),
    [(True, 0.25, [0.25]), (True, 1, []), (True, 2, []), (True, 0, []), (False, 0.25, [])],
)
def test_a_trial_that_shares_a_gpu_has_its_part_of_the_memory(
    has_gpu: bool, share: float, expected: list[float], reports: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    work(tmp_path, a_job(), gpu_share=share)
    assert limits == expected
    limits.clear()
    precisions: list[str] = []
    monkeypatch.setattr(
        "bert_encoding.trial.voxel_selection.choose_voxels",
        lambda config, *_: precisions.append(config.embed_precision) or {},
    )
    module.choose(CONFIG, None, 3, torch.get_num_threads(), share)  # a task of its own, on the same card
    assert (limits, precisions) == (expected, ["float32"])


def test_a_trial_has_its_number_of_threads(reports: list[dict[str, Any]], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            work(tmp_path, a_job(f"000{n}"), n_threads=n)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def dataset(lab: Path) -> Dataset:
    dataset = open_dataset(lab)
    names = [name for name, story in dataset.stories.items() if story.responses]
    return inspect(dataset.only(names, dataset.subjects))


def test_only_paths_are_sent_and_the_worker_reads_the_inspected_responses(dataset: Dataset) -> None:
    sent = pickle.dumps(for_workers(dataset))
    story = next(iter(dataset.stories))
    subject = dataset.subjects[0]
    assert dataset.stories[story].responses[subject].read(np.arange(3)).tobytes() not in sent
    arrived: Dataset = pickle.loads(sent)  # noqa: S301
    assert arrived.fingerprint == dataset.fingerprint
    for name, other in arrived.stories.items():
        for who, responses in other.responses.items():
            assert responses.array is None and responses.stamp is not None
            np.testing.assert_array_equal(
                responses.read(np.arange(3)), dataset.stories[name].responses[who].read(np.arange(3))
            )


def test_other_responses_on_a_worker_s_disk_are_refused(dataset: Dataset) -> None:
    stamped = for_workers(dataset)
    one, two = list(stamped.stories)[:2]
    subject = dataset.subjects[0]
    mine, other = (stamped.stories[name].responses[subject] for name in (one, two))
    assert mine.path is not None and other.path is not None
    check_stamp.cache_clear()  # the worker is another process
    shutil.copy(other.path, mine.path)
    message = rf"{mine.path.name}: on {os.uname().nodename} not the responses that this study began with; copy them"
    with pytest.raises(InputError, match=message):
        mine.read(np.arange(2))
    mine.path.unlink()
    with pytest.raises(InputError, match=r"no such file; the responses were there when the study began"):
        mine.read(np.arange(2))
    with pytest.raises(InputError, match=r"\.npy: No such file"):
        for_workers(dataset)


def test_a_stamp_sees_size_start_end_and_samples(tmp_path: Path) -> None:
    file = tmp_path / "a"
    content = bytes(np.random.default_rng(0).integers(256, size=1_000_000, dtype=np.uint8))
    stamps = set()
    for changed in (0, 1, len(content) - 1, (len(content) - 4096) * 3 // (N_SAMPLES - 1)):
        file.write_bytes(content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :])
        stamps.add(file_stamp(file))
    for whole in (content, content[:-1], b"", b"x"):
        file.write_bytes(whole)
        stamps.add(file_stamp(file))
        assert file_stamp(file) in stamps
    assert len(stamps) == 8
    shutil.copy(file, tmp_path / "b")
    assert file_stamp(tmp_path / "b") == file_stamp(file), "a copy is as good"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file but a pipe"):
        file_stamp(tmp_path / "pipe")


def test_responses_in_memory_travel_if_they_are_small(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    name, subject = next(iter(dataset.stories)), dataset.subjects[0]
    heard = replace(dataset.stories[name], responses={subject: Responses(array=np.zeros((50, 5), np.float32))})
    held = replace(dataset, stories={name: heard})
    assert for_workers(held).stories[name].responses[subject].array is not None
    monkeypatch.setattr(travel, "MAX_SENT_BYTES", 999)
    with pytest.raises(InputError, match=r"0\.0 GB of responses in memory are too large to be sent to the workers"):
        for_workers(held)


def test_a_session_sends_stamped_paths_and_jobs_that_know_it(
    lab: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = load_space("smoke")
    options = {"space": "smoke", "data": str(lab), "model": str(tiny_bert), "address": "local", "trials": 1}
    options |= {"confirm": 0, "out": str(tmp_path / "out"), "name": "s"}
    study = prepare(resolve_options(options, {}, space), space)
    sent: dict[str, Any] = {}

    def keep(study: Any, task: Any, records: Any, baselines: list[Job], make_key: Any, *rest: Any) -> None:
        file = read_json(study.options.folder / "study.json")
        sent.update(task=task, jobs=baselines, key=make_key(CONFIG), file=file)

    monkeypatch.setattr(session, "connect", lambda machines: nullcontext(tmp_path))
    monkeypatch.setattr(tuning, "run_search", keep)
    session.run_session(study, ResumePolicy(), Console(file=io.StringIO()))
    stamps = {one.stamp for story in sent["task"].dataset.stories.values() for one in story.responses.values()}
    files = {one.path for story in study.dataset.stories.values() for one in story.responses.values()}
    assert None not in stamps and len(stamps) == len(files) > 5
    token = sent["file"]["session"]["id"]
    assert [job.session for job in sent["jobs"]] == [token, token]
    assert sent["key"] == key_maker(in_key(sent["file"], sent["file"]["precision"]))(CONFIG)


def test_word_vectors_are_made_in_the_precision_that_the_study_settled_on(tmp_path: Path) -> None:
    """Whatever this machine would choose; an explicit precision stays."""
    write_json(tmp_path / "study.json", {"precision": "bfloat16"})
    config = TrialConfig(embed_precision="auto", precision="auto")
    assert with_settled_precision(config, str(tmp_path)) == replace(config, embed_precision="bfloat16")
    exact = replace(config, embed_precision="float32")
    assert with_settled_precision(exact, str(tmp_path)) == exact
    assert with_settled_precision(config, str(tmp_path / "nowhere")) == config


def test_other_weights_under_the_model_s_name_fail_the_trial(tmp_path: Path, tiny_bert: Path) -> None:
    model, study = tmp_path / "model", tmp_path / "study"
    shutil.copytree(tiny_bert, model)
    study.mkdir()
    write_json(study / "study.json", {"model": {"name": str(model), "weights": checkpoint_fingerprint(str(model))}})
    check_weights(str(study), str(model))
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_weights(str(study), str(model))  # checked once per process
    check_weights.cache_clear()
    check_weights(str(study), str(tiny_bert))  # another model is none of its business
    config = replace(CONFIG, model=str(model))
    record = run_job(Job("0001", "search", "key", asdict(config)), None, study)
    assert record.status == "FAILED"
    assert record.error is not None and "\n" not in record.error
    assert record.error.startswith(f"--model {model}: the weights on {os.uname().nodename} (")
