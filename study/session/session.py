"""One session of a study: new or resumed, its jobs through Ray Tune, its tables."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key, read_json, write_json
from bert_encoding.core.names import COMPLETE, ENCODING, FAILED, METRICS, SEARCH, STUDY_FILE, Metric
from bert_encoding.core.storage import Place, children, make_folder, naming_full_disk, remove_tree
from bert_encoding.trial.record import TrialRecord, keep_best, read_records
from bert_encoding.trial.tables import write_record_tables
from study.cluster.connect import connect
from study.cluster.lock import LOCK_FILE, OWNER_FILE, Hold, holding, session_id
from study.cluster.worker_data import for_workers
from study.results.locked_stories import check_looks, heard_by, next_look, permit_look, read_looks
from study.search.worker import Job
from study.session.baselines import MakeKey, baseline_job, key_maker, missing_baselines
from study.session.confirm import confirm, is_complete, is_lacking
from study.session.identity import AnyStudy, Difference, differences, identify, read_identity, resumed, settle_precision
from study.session.voxel_choice import on_chosen_voxels
from study.setup.encoding_study import Study
from study.setup.options import Options

_UNFINISHED = rf"\.({re.escape(STUDY_FILE)}|{re.escape(OWNER_FILE)})\.\d+\.tmp"  # as ``atomic_path`` names them


def run_session(
    study: AnyStudy,
    resume: bool,
    console: Console,
    take_over: bool = False,
    may_force: bool = False,
    look_again: bool = False,
) -> None:
    """Run what the study still lacks.

    Parameters
    ----------
    take_over : take it from another run that holds it in object storage
    may_force : go on with it although it differs from its record
    look_again : confirm on test stories that have been read before

    Raises
    ------
    InputError
        if the study exists and is not to be resumed, is in use, differs from its record, or a baseline fails.
    """
    task, folder = study.task(), study.options.folder
    identity = identify(study, task)
    hold = Hold(may_force=take_over)
    with _open_folder(folder, identity, resume, hold, may_force, study.options.max_concurrent):
        try:
            look = look_of_session(study.options, look_again)
            if look is not None and look_again:
                permit_look(folder, look)
            _run_jobs(study, task, identity, folder, console, may_force, look)
        finally:
            if hold.lost_to is None:
                _tidy(folder, METRICS[study.space.task], not resume, study.options.keep_adapters)


def _tidy(folder: Place, metric: Metric, is_new: bool, n_adapters: int) -> None:
    """Keep the best adapters and write the tables; remove a new study that has come to nothing."""
    records = read_records(folder)
    if any(record.status == COMPLETE for record in records):
        keep_best(folder, n_adapters, metric)
        write_record_tables(folder, records)
    elif is_new and not any(_has_traceback(record) for record in records):
        remove_tree(folder)  # nothing to keep, and nothing in the way of the next try


def _has_traceback(record: TrialRecord) -> bool:
    return record.status == FAILED and not record.scores.get("is_user_error", False)


def n_searched(folder: Place) -> int:
    """Return how many searched trials of a study have ended."""
    return sum(record.phase == SEARCH for record in read_records(folder))


def look_of_session(options: Options, look_again: bool) -> int | None:
    """Return the number of the look at the test stories that a session shall end with; None for no new one."""
    if options.confirm == 0:
        return None
    records, looks = read_records(options.folder), read_looks(options.folder)
    is_done = not looks or is_complete(looks[-1], records)
    return next_look(options, sum(record.phase == SEARCH for record in records), look_again, is_done)


def check_look(study: AnyStudy, look_again: bool) -> None:
    """Refuse, before anything runs, to look a second time at locked test stories.

    Raises
    ------
    InputError
        naming the study that has looked, unless that is forced; or if there is nothing to force.
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
    """Whether a session has something to confirm, once its search is complete."""
    return is_unconfirmed(options) or look_of_session(options, look_again) is not None


def _run_jobs(
    study: AnyStudy,
    task: Any,
    identity: dict[str, Any],
    folder: Place,
    console: Console,
    may_force: bool,
    look: int | None,
) -> None:
    options = study.options
    records = read_records(folder)
    lacking = missing_baselines(study, records)
    searches = bool(lacking) or n_searched(folder) < options.trials
    if not searches and not is_lacking(options, records, look):
        console.print(f"nothing to do: {options.trials} searched trials are on record; raise --trials to add some")
        return
    console.print("starting workers ...")
    with connect(options.machines) as private:
        from study.search.tuning import run_jobs, run_list

        settle_precision(study, folder, may_force, _next_trial(folder))
        recorded = read_json(folder / STUDY_FILE)
        is_mixed = "forced" in recorded
        if isinstance(study, Study):
            task = task._replace(dataset=for_workers(task.dataset))
            task = on_chosen_voxels(study, task, folder, console)
            identity = identity | {"heard": heard_by(study.dataset, study.splits[0].test)}
        make_key = key_maker(in_key(identity | study.about(task), recorded.get("precision")))
        score_test = options.trials == 0 and study.space.task == ENCODING
        baselines = [baseline_job(config, score_test, make_key) for config in lacking]
        first_id = _next_id(folder)
        error = None
        if searches:
            error = run_jobs(study, task, folder, records, baselines, make_key, first_id, private, console, is_mixed)

        def run(name: str, jobs: list[Job]) -> str | None:
            return run_list(name, study, task, folder, read_records(folder), jobs, private, console)

        if error is None:
            error = _confirm(options, folder, look, identity, make_key, run, console)
    if error is not None:
        raise InputError(error)


def _confirm(
    options: Options,
    folder: Place,
    look: int | None,
    identity: dict[str, Any],
    make_key: MakeKey,
    run: Callable[[str, list[Job]], str | None],
    console: Console,
) -> str | None:
    """Finish a look that was interrupted, then take a new one, once the search is complete; return an error."""
    error = None
    looks = read_looks(folder) if options.confirm else []
    for number in sorted({len(looks), look or 0} - {0}):
        was_interrupted = n_searched(folder) < options.trials or (
            number > len(looks) > 0 and not is_complete(looks[-1], read_records(folder))
        )
        if error is None and not was_interrupted:
            error = confirm(options, folder, number, identity, make_key, run, console)
    return error


def in_key(identity: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """Return the identity with all that a result depends on beside its own settings, under ``code``, for keys.

    A study that was forced to go on under another precision, other versions or with other folds may not answer its
    trials from records of before.

    Parameters
    ----------
    precision : in which trials multiply, which a cluster's driver learns from its workers
    """
    beside = (precision, identity["versions"], identity["config"].get("seed"), identity["data"].get("trim_trs"))
    return identity | {"code": content_key(identity["code"], *beside)}


def first_free_id(folder: Place, recorded: dict[str, Any]) -> int:
    """Return a number that no trial of an earlier session has had, nor will have.

    A session that was killed may have workers that outlive it and have left nothing yet: at most as many as ran at
    once, with the next numbers. A session that ended by itself has ended its workers.

    Parameters
    ----------
    recorded : content of ``study.json``, with a ``session`` if that did not end by itself
    """
    used = [int(path.name) for path in children(folder / "trials") if path.name.isdigit()]
    before = recorded.get("session", {})
    return int(max(max(used, default=0) + 1, before.get("first_id", 1)) + before.get("at_once", 0))


def _next_id(folder: Place) -> int:
    """Return the number of the next trial of this session, or of one that would begin now."""
    file = folder / STUDY_FILE
    session = read_json(file).get("session", {}) if file.is_file() else {}
    if session.get("id") == session_id():
        session = session | {"at_once": 0}
    return first_free_id(folder, {"session": session})


def _next_trial(folder: Place) -> str:
    return f"{_next_id(folder):04d}"


def changes(study: AnyStudy, may_force: bool) -> list[Difference]:
    """Return in what a study differs from its record; nothing is written, and no model is fetched.

    Raises
    ------
    InputError
        if it differs from its record, unless that may be forced.
    """
    folder, identity = study.options.folder, identify(study, study.task(), may_fetch=False)
    recorded = read_identity(folder, identity)
    resumed(folder, recorded, identity, may_force, _next_trial(folder))
    return differences(recorded, identity)


def check_new(folder: Place, resume: bool) -> None:
    """Refuse to begin a study where something lies; object storage is asked, so that it is known to answer.

    What a study leaves that ended before its first ``study.json`` is in nobody's way.

    Raises
    ------
    InputError
        if the folder exists and the study is not to be resumed, or the storage refuses us.
    """
    is_file = isinstance(folder, Path) and folder.exists() and not folder.is_dir()
    if not resume and (is_file or any(not _is_of_beginning(place) for place in children(folder))):
        raise InputError(f"{folder}: exists already; add --resume to go on with it, or choose another --name")


def _is_of_beginning(place: Place) -> bool:
    """Whether this lies in a study's folder before its ``study.json`` does, and holds nothing that could be lost."""
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
    """Yield the study's folder, held by this process alone, with its ``study.json`` written or compared.

    Parameters
    ----------
    at_once : how many trials may run at a time

    Raises
    ------
    InputError
        if it exists already, is in use, or holds another study than the one to resume, unless that may be forced.
    """
    file, hold = folder / STUDY_FILE, hold or Hold()
    check_new(folder, resume)
    with naming_full_disk(folder):
        make_folder(folder)
        with holding(folder, hold):
            if not resume:
                if file.exists():  # another run began it, and ended, since we looked
                    check_new(folder, resume)
                make_folder(folder / "trials")
            recorded = read_identity(folder, identity) if resume else {}
            first_id = first_free_id(folder, recorded)
            content = resumed(folder, recorded, identity, may_force, f"{first_id:04d}") if resume else identity
            if hold.takeover is not None:
                content = content | {"takeovers": [*content.get("takeovers", []), hold.takeover]}
            session = {"id": session_id(), "first_id": first_id, "at_once": at_once}
            with _leaving_nothing(folder, is_new=not resume):
                write_json(file, content | {"session": session})
            try:
                yield folder
            finally:
                if hold.lost_to is None:
                    _sign_off(file)


@contextmanager
def _leaving_nothing(folder: Place, is_new: bool) -> Iterator[None]:
    """Remove the folder of a new study that cannot be begun: nothing to resume, and nothing in the way of a retry."""
    try:
        yield
    except BaseException:
        if is_new and isinstance(folder, Path):
            remove_tree(folder)
        raise


def _sign_off(file: Place) -> None:
    """Note in ``study.json`` that a session ended by itself; where that fails the next one skips some numbers."""
    with suppress(InputError, OSError):
        recorded = read_json(file) if file.is_file() else {}
        session = recorded.pop("session", {})
        if session.get("id") != session_id():
            return
        if session["first_id"] > first_free_id(file.parent, {}):  # numbers of a killed session stay skipped
            recorded["session"] = {"id": "", "first_id": session["first_id"], "at_once": 0}
        write_json(file, recorded)
