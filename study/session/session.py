"""One session of a study: begin or resume it, run its jobs through Ray Tune, write its tables."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key, read_json, write_json
from bert_encoding.core.names import COMPLETE, ENCODING, FAILED, METRICS, SEARCH, STUDY_FILE, Metric
from bert_encoding.core.storage import Place, children, make_folder, naming_full_disk, remove_tree
from bert_encoding.trial.record import keep_best, read_records
from bert_encoding.trial.tables import write_tables
from study.cluster.connect import connect
from study.cluster.lock import LOCK_FILE, OWNER_FILE, Hold, holding, session_id
from study.cluster.worker_data import for_workers
from study.results.locked_stories import check_looks, heard_by, next_look, permit_look, read_looks
from study.search.worker import Job
from study.session.baselines import MakeKey, baseline_job, key_maker, missing_baselines
from study.session.confirm import Run, confirm, is_complete, is_lacking
from study.session.identity import Difference, differences, identify, read_identity, resumed, settle_precision
from study.session.voxel_choice import on_chosen_voxels
from study.setup.encoding_study import Study
from study.setup.options import Options, ResumePolicy
from study.setup.text_study import AnyStudy

_UNFINISHED = rf"\.({re.escape(STUDY_FILE)}|{re.escape(OWNER_FILE)})\.\d+\.tmp"  # as ``atomic_path`` names them


def run_session(study: AnyStudy, policy: ResumePolicy, console: Console) -> None:
    """Run all trials of a study that have not been run yet.

    Raises InputError if the study exists and is not to be resumed, is in use, differs from its record, or if a
    baseline fails.
    """
    task, folder = study.task(), study.options.folder
    identity = identify(study, task)
    hold = Hold(may_force=policy.take_over)
    with _open_folder(folder, identity, policy.resumes, hold, policy.force_resume, study.options.max_concurrent):
        try:
            look = look_of_session(study.options, policy.look_again)
            if look is not None and policy.look_again:
                permit_look(folder, look)
            _run_jobs(study, task, identity, console, policy.force_resume, look)
        finally:
            if hold.lost_to is None:
                _tidy(folder, METRICS[study.space.task], not policy.resumes, study.options.keep_adapters)


def _tidy(folder: Place, metric: Metric, is_new: bool, n_adapters: int) -> None:
    """Keep the best adapters and write the tables; remove a new study without results."""
    records = read_records(folder)
    if any(record.status == COMPLETE for record in records):
        keep_best(folder, n_adapters, metric)
        write_tables(folder, records)
    elif is_new and all(record.status != FAILED or record.scores.get("is_user_error") for record in records):
        remove_tree(folder)  # so that the next attempt can use its name


def n_searched(folder: Place) -> int:
    """Return how many searched trials of a study have ended."""
    return sum(record.phase == SEARCH for record in read_records(folder))


def look_of_session(options: Options, look_again: bool) -> int | None:
    """Return the number of the test-set evaluation with which a session is to end; None if it adds none."""
    if options.confirm == 0:
        return None
    records, looks = read_records(options.folder), read_looks(options.folder)
    is_done = not looks or is_complete(looks[-1], records)
    return next_look(options, sum(record.phase == SEARCH for record in records), look_again, is_done)


def check_look(study: AnyStudy, look_again: bool) -> None:
    """Refuse, before anything runs, a second evaluation on locked test stories.

    The error names the study that has used them, unless that is forced; or says that there is nothing to force.
    """
    options = study.options
    if look_again and options.confirm == 0:
        if isinstance(study, Study) and options.trials > 0:
            raise InputError("--look-again: --confirm is 0 in this study; give --confirm K too")
        raise InputError("--look-again: nothing is confirmed in this study; leave it out")
    if options.confirm and isinstance(study, Study):
        look = look_of_session(options, look_again)
        check_looks(options, look, heard_by(study.dataset, study.splits[0].test), look_again)


def is_unconfirmed(options: Options) -> bool:
    """Whether the confirm phase of a study, whose search is complete, was interrupted."""
    return options.confirm > 0 and is_lacking(
        options, read_records(options.folder), look_of_session(options, look_again=False)
    )


def will_confirm(options: Options, look_again: bool) -> bool:
    """Whether a session confirms trials once its search is complete."""
    return is_unconfirmed(options) or look_of_session(options, look_again) is not None


def _run_jobs(
    study: AnyStudy, task: Any, identity: dict[str, Any], console: Console, may_force: bool, look: int | None
) -> None:
    options, folder = study.options, study.options.folder
    records = read_records(folder)
    baseline_configs = missing_baselines(study, records)
    searches = bool(baseline_configs) or n_searched(folder) < options.trials
    if not searches and not is_lacking(options, records, look):
        console.print(f"nothing to do: {options.trials} searched trials are finished; raise --trials to add some")
        return
    console.print("starting workers ...")
    with connect(options.machines) as private:
        from study.search.job_list import JobList
        from study.search.tuning import run_jobs, run_search

        settle_precision(study, folder, may_force, _next_trial(folder))
        recorded = read_json(folder / STUDY_FILE)
        is_mixed = "forced" in recorded
        if isinstance(study, Study):
            task = task._replace(dataset=for_workers(task.dataset))
            task = on_chosen_voxels(study, task, folder, console)
            identity = identity | {"heard": heard_by(study.dataset, study.splits[0].test)}
        make_key = key_maker(in_key(identity | study.about(task), recorded.get("precision")))
        score_test = options.trials == 0 and study.space.task == ENCODING
        baselines = [baseline_job(config, score_test, make_key) for config in baseline_configs]
        first_id = _next_id(folder)
        error = None
        if searches:
            error = run_search(study, task, records, baselines, make_key, first_id, private, console, is_mixed)

        def run(name: str, jobs: list[Job]) -> str | None:
            job_list = JobList(jobs, METRICS[study.space.task])
            return run_jobs(name, study, task, read_records(folder), job_list, private, console)

        if error is None:
            error = _confirm(options, look, identity, make_key, run, console)
    if error is not None:
        raise InputError(error)


def _confirm(
    options: Options, look: int | None, identity: dict[str, Any], make_key: MakeKey, run: Run, console: Console
) -> str | None:
    """Finish an interrupted test-set evaluation, then a new one, once the search is complete; return an error."""
    error, folder = None, options.folder
    looks = read_looks(folder) if options.confirm else []
    for number in sorted({len(looks), look or 0} - {0}):
        was_interrupted = n_searched(folder) < options.trials or (
            number > len(looks) > 0 and not is_complete(looks[-1], read_records(folder))
        )
        if error is None and not was_interrupted:
            error = confirm(options, number, identity, make_key, run, console)
    return error


def in_key(identity: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """Return the identity of which keys are made: ``code`` covers all that a result depends on but its own settings.

    A study that was forced to resume under another precision, other versions or with other folds must not answer its
    trials from earlier records. ``precision`` is that of matrix products in trials, which a cluster's driver learns
    from its workers.
    """
    context = (precision, identity["versions"], identity["config"].get("seed"), identity["data"].get("trim_trs"))
    return identity | {"code": content_key(identity["code"], *context)}


def first_free_id(folder: Place, session: dict[str, Any]) -> int:
    """Return a number that no trial of an earlier session has had or can still get.

    Workers can outlive a session that was killed, with trials that have written nothing yet: at most as many as ran at
    once, with the next numbers. A session that ended normally has ended its workers; any other one is recorded as
    ``session`` in ``study.json``.
    """
    used = [int(path.name) for path in children(folder / "trials") if path.name.isdigit()]
    return int(max(max(used, default=0) + 1, session.get("first_id", 1)) + session.get("at_once", 0))


def _next_id(folder: Place) -> int:
    """Return the number of the next trial of this session, or of one that would begin now."""
    file = folder / STUDY_FILE
    session = read_json(file).get("session", {}) if file.is_file() else {}
    if session.get("id") == session_id():
        session = session | {"at_once": 0}
    return first_free_id(folder, session)


def _next_trial(folder: Place) -> str:
    return f"{_next_id(folder):04d}"


def changes(study: AnyStudy, may_force: bool) -> list[Difference]:
    """Return how a study differs from its record, if that may be forced; no model is fetched and nothing written."""
    folder, identity = study.options.folder, identify(study, study.task(), may_fetch=False)
    recorded = read_identity(folder, identity)
    resumed(folder, recorded, identity, may_force, _next_trial(folder))
    return differences(recorded, identity)


def check_new(folder: Place, resume: bool) -> None:
    """Refuse to begin a study in a folder that is not empty; this also verifies that object storage answers.

    Leftovers of a study that ended before its first ``study.json`` are ignored.
    """
    is_file = isinstance(folder, Path) and folder.exists() and not folder.is_dir()
    if not resume and (is_file or any(not _is_leftover(place) for place in children(folder))):
        raise InputError(f"{folder}: exists already; add --resume to resume it, or choose another --name")


def _is_leftover(place: Place) -> bool:
    """Whether this file or folder precedes ``study.json`` and contains no results."""
    if place.name == "trials":
        return isinstance(place, Path) and place.is_dir() and not children(place)
    return place.name in (LOCK_FILE, OWNER_FILE) or re.fullmatch(_UNFINISHED, place.name) is not None


@contextmanager
def _open_folder(
    folder: Place,
    identity: dict[str, Any],
    resume: bool,
    hold: Hold | None = None,
    may_force: bool = False,
    at_once: int = 1,
) -> Iterator[Place]:
    """Lock the study's folder and yield it, with its ``study.json`` written or compared.

    A new study that cannot be begun leaves no folder, so that the next attempt can use its name.
    """
    file, hold = folder / STUDY_FILE, hold or Hold()
    check_new(folder, resume)
    with naming_full_disk(folder):
        make_folder(folder)
        with holding(folder, hold):
            if not resume:
                if file.exists():  # another run has begun and ended it since the first check
                    check_new(folder, resume)
                make_folder(folder / "trials")
            recorded = read_identity(folder, identity) if resume else {}
            first_id = first_free_id(folder, recorded.get("session", {}))
            content = resumed(folder, recorded, identity, may_force, f"{first_id:04d}") if resume else identity
            if hold.takeover is not None:
                content = content | {"takeovers": [*content.get("takeovers", []), hold.takeover]}
            session = {"id": session_id(), "first_id": first_id, "at_once": at_once}
            try:
                write_json(file, content | {"session": session})
            except BaseException:
                if not resume and isinstance(folder, Path):
                    remove_tree(folder)
                raise
            try:
                yield folder
            finally:
                if hold.lost_to is None:
                    _sign_off(file)


def _sign_off(file: Place) -> None:
    """Record in ``study.json`` that a session ended normally; if that fails the next one skips some numbers."""
    with suppress(InputError, OSError):
        recorded = read_json(file) if file.is_file() else {}
        session = recorded.pop("session", {})
        if session.get("id") != session_id():
            return
        if session["first_id"] > first_free_id(file.parent, {}):  # the numbers of a killed session stay skipped
            recorded["session"] = {"id": "", "first_id": session["first_id"], "at_once": 0}
        write_json(file, recorded)
