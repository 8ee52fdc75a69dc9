"""One session of a study: new or resumed, its jobs through Ray Tune, its tables."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from bert_encoding.devices import pick_device, resolve_precision
from bert_encoding.encoders import checkpoint_fingerprint
from bert_encoding.errors import InputError
from bert_encoding.records import (
    COMPLETE,
    ENCODING,
    FAILED,
    METRICS,
    SEARCH,
    STUDY_FILE,
    TrialRecord,
    keep_best,
    naming_full_disk,
    read_json,
    read_records,
    write_json,
    write_record,
    write_tables,
)
from study.baselines import baseline_job, key_maker, missing_baselines
from study.choice import on_chosen_voxels
from study.cluster import local_ray, machine_cpus, machine_gpus
from study.objective import Job, objective
from study.options import options_record
from study.prepare import Study
from study.provenance import provenance
from study.text import TextStudy

AnyStudy = Study | TextStudy
IDENTITY = ("options", "space", "data", "voxels", "model", "splits", "config", "code", "precision", "versions")
KEEP_ADAPTERS = 5
RETRIES = 2  # of a trial whose worker died


def run_session(study: AnyStudy, resume: bool, console: Console) -> None:
    """Run what the study still lacks.

    Raises
    ------
    InputError
        if the study exists and is not to be resumed, differs from its record, or a baseline fails.
    """
    task = study.task()
    identity = _identity(study, task)
    with _open_folder(study.options.folder, identity, resume) as folder:
        try:
            _run_jobs(study, task, identity, folder, console)
        finally:
            if any(record.status == COMPLETE for record in read_records(folder)):
                keep_best(folder, KEEP_ADAPTERS, METRICS[study.space.task])
                write_tables(folder)
            elif not resume and not any(_has_traceback(record) for record in read_records(folder)):
                shutil.rmtree(folder)  # nothing to keep, and nothing in the way of the next try


def _has_traceback(record: TrialRecord) -> bool:
    return record.status == FAILED and not record.scores.get("is_user_error", False)


def n_searched(folder: Path) -> int:
    """Return how many searched trials of a study have ended."""
    return sum(record.phase == SEARCH for record in read_records(folder))


def _run_jobs(study: AnyStudy, task: Any, identity: dict[str, Any], folder: Path, console: Console) -> None:
    options = study.options
    records = read_records(folder)
    lacking = missing_baselines(study, records)
    if not lacking and n_searched(folder) >= options.trials:
        console.print(f"nothing to do: {options.trials} searched trials are on record; raise --trials to add some")
        return
    console.print("starting workers ...")
    with local_ray(machine_cpus(), machine_gpus()) as private:
        from study.progress import ProgressLine
        from study.searcher import StudySearcher

        if isinstance(study, Study):
            task = on_chosen_voxels(study, task, folder, console)
        make_key = key_maker(identity | study.about(task))
        score_test = options.trials == 0 and study.space.task == ENCODING
        baselines = [baseline_job(config, score_test, make_key) for config in lacking]
        searcher = StudySearcher(
            study.space,
            study.base,
            baselines,
            options.trials,
            records,
            make_key,
            options.seed,
            _next_id(folder),
            METRICS[study.space.task],
        )
        n_jobs = searcher.n_jobs
        with ProgressLine(console, searcher, records, n_jobs, options.epochs) as progress:
            dead = _tune(study, task, folder, searcher, progress, private, n_jobs)
    for job in dead:
        write_record(
            folder,
            TrialRecord(
                FAILED,
                job.config["method"],
                job.config,
                job.trial_id,
                job.phase,
                f"its worker died {RETRIES + 1} times",
                job.key,
                params=job.params,
            ),
        )
    if searcher.error is not None:
        raise InputError(searcher.error)


def _tune(
    study: AnyStudy, task: Any, folder: Path, searcher: Any, progress: Any, private: Path, n_jobs: int
) -> list[Job]:
    """Run ``n_jobs`` jobs on resident workers; return those whose worker died for good."""
    from ray import tune

    options = study.options
    trainable = tune.with_resources(
        tune.with_parameters(
            objective,
            task=task,
            study=str(folder),
            metric=METRICS[study.space.task],
            n_threads=max(1, int(options.cpus_per_trial)),
            gpu_share=options.gpus_per_trial,
        ),
        {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial},
    )
    results = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=n_jobs,
            max_concurrent_trials=options.max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(private),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[progress],
            verbose=0,
        ),
    ).fit()
    dead = [Job(**result.config) for result in results if result.error is not None and result.config]
    return [job for job in dead if not (folder / "trials" / job.trial_id / "record.json").exists()]


def _next_id(folder: Path) -> int:
    """Return a number that no trial has had, those included that a killed driver left without a record."""
    used = [int(path.name) for path in (folder / "trials").glob("*") if path.name.isdigit()]
    return max(used, default=0) + 1


def _identity(study: AnyStudy, task: Any) -> dict[str, Any]:
    """What makes this study this study; ``study.json`` keeps it and a resumed study must match it."""
    space = study.space
    return (
        provenance()
        | {
            "name": study.options.name,
            "task": space.task,
            "space": {"name": space.name, "hash": space.source_hash, "source": space.path.read_text()},
            "model": {"name": study.options.model, "weights": checkpoint_fingerprint(study.options.model)},
            "config": asdict(study.base),
            "precision": resolve_precision(study.base.precision, pick_device()),
            "options": options_record(study.options),
        }
        | study.about(task)
    )


def check_new(folder: Path, resume: bool) -> None:
    """Refuse to begin a study where something lies.

    Raises
    ------
    InputError
        if the folder exists and the study is not to be resumed.
    """
    if folder.exists() and not resume:
        raise InputError(f"{folder}: exists already; add --resume to go on with it, or choose another --name")


@contextmanager
def _open_folder(folder: Path, identity: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield the study's folder, held by this process alone.

    Raises
    ------
    InputError
        if it exists already, is in use, or holds another study than the one to resume.
    """
    file = folder / STUDY_FILE
    check_new(folder, resume)
    with naming_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{folder}: another run is at work on this study; wait for it or end it") from None
        try:
            if resume:
                _check_same(file, identity)
            else:
                (folder / "trials").mkdir()
                write_json(file, identity)
            yield folder
        finally:
            lock.release()


def _check_same(file: Path, identity: dict[str, Any]) -> None:
    """Refuse to mix two studies, by name; a larger budget is no difference."""
    recorded = read_json(file, required=tuple(name for name in identity if name in IDENTITY))
    if recorded["data"]["fingerprint"] == identity["data"]["fingerprint"]:
        recorded["data"]["source"] = identity["data"]["source"]  # data may move
    before, now = _comparable(recorded), _comparable(identity)
    for what in (name for name in now if before.get(name) != now[name]):
        raise InputError(
            f"{file.parent}: cannot resume: {what} changed from {before.get(what)} to {now[what]}; "
            "give the recorded value, or begin a new study with another --name"
        )
    write_json(file, recorded | {"options": identity["options"]})


def _comparable(identity: dict[str, Any]) -> dict[str, str]:
    """Return what must not change, as text by name."""
    stories = {
        f"the {role} stories" + (f" of outer fold {at}" if len(identity["splits"]) > 1 else ""): ", ".join(names)
        for at, split in enumerate(identity["splits"])
        for role, names in split.items()
    }
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in identity["config"].items()}
    return {
        "the search space": f"{identity['space']['name']} ({identity['space']['hash']})",
        "the data": f"{identity['data']['source']} ({identity['data']['fingerprint']})",
        "the trim": str(identity["data"].get("trim_trs")),
        "the voxels": _voxels_text(identity["voxels"]),
        "the text that is not stories": str(identity.get("general_text")),
        "the model": f"{identity['model']['name']} ({identity['model']['weights']})",
        "the code of bert_encoding": str(identity["code"]),
        "the precision of this machine": str(identity["precision"]),
        **{f"the version of {name}": version for name, version in identity["versions"].items()},
        "the number of outer folds": str(len(identity["splits"])),
        **stories,
        **{f"the setting {name}": str(value) for name, value in settings.items()},
    }


def _voxels_text(voxels: dict[str, Any]) -> str:
    """Describe which voxels are scored; a choice that the study makes itself is checked when it is read."""
    asked = str(voxels["asked"])
    return asked if asked.isdecimal() else f"{Path(asked).name} ({voxels['key']})"
