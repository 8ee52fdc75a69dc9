"""The confirm phase: the best trials again with fresh seeds, a winner, and one test-set evaluation.

1. The finalists, the best searched configurations, run again with fresh seeds and are scored on the validation stories.
2. ``confirm.json`` fixes the winner by their mean. It is written once, before any test story's responses are read.
3. Every finalist and every baseline is refitted on fit + validation and scored once on the test stories.

A changed study that is resumed by force (``--force-resume``) runs again the jobs whose keys changed, unless an
evaluation is complete: that one stays as it is. The keys are part of ``confirm.json`` and are rewritten only then.

Finished jobs are recognised by their records, so that a study that was killed resumes where it was interrupted.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.console import Console

from bert_encoding.core.command_line import print_lines
from bert_encoding.core.files import content_key, write_json
from bert_encoding.core.names import BASELINE, COMPLETE, CONFIRM, SEARCH, TUNED
from bert_encoding.core.seeds import derive_seed
from bert_encoding.trial.config import OLDER_SETTINGS, TrialConfig
from bert_encoding.trial.record import TrialRecord, read_records
from study.results.locked_stories import (
    check_looks,
    earlier_baselines,
    earlier_looks,
    id_on_test,
    look_file,
    read_looks,
)
from study.search.worker import Job
from study.session.baselines import MakeKey
from study.setup.options import Options

SEEDS_BELOW = 1_000_000  # ids hold them
Run = Callable[[str, list[Job]], str | None]  # (name, jobs) -> why it ended early


def confirm(
    options: Options, look: int, identity: dict[str, Any], make_key: MakeKey, run: Run, console: Console
) -> str | None:
    """Run the jobs of the confirm phase that are not finished; return why it ended early.

    Other studies are checked once more before ``confirm.json`` is written. Two studies that both check while the other
    one writes that file both score the test stories, and neither records the other.

    Parameters
    ----------
    look : number of this test-set evaluation, from 1
    identity : code, data and split as in ``study.json``, and who ``heard`` the test stories
        (``locked_stories.heard_by``)
    run : runs jobs; each writes a record, unless it is interrupted; then None is returned
    """
    folder = options.folder
    if len(read_looks(folder)) < look:
        records = read_records(folder)
        jobs = validation_jobs(options, records, look, make_key)
        unfinished = _unfinished(jobs, records)
        error = run(f"confirm-{look}", unfinished) if unfinished else None
        records = read_records(folder)
        if error is not None or _unfinished(jobs, records):
            return error
        fixed = fix_winner(options, records, look, identity)
        if fixed is None:
            console.print("nothing is confirmed: every finalist failed with every fresh seed")
            return None
        check_looks(options, look, identity["heard"], is_again=False)
        write_json(folder / look_file(look), fixed | {"keys": _keys(final_jobs(fixed, records, make_key))})
        cc = {finalist["trial_id"]: finalist["cc_confirmed"] for finalist in fixed["finalists"]}
        print_lines(
            console,
            f"the winner is trial {fixed['winner']}, by its mean validation CC {cc[fixed['winner']]:.4f} over "
            f"{len(fixed['seeds'])} fresh seeds; now the test stories are scored",
        )
    fixed, records = read_looks(folder)[look - 1], read_records(folder)
    if is_complete(fixed, records):
        return None
    jobs = final_jobs(fixed, records, make_key)
    if _keys(jobs).items() - fixed.get("keys", _keys(jobs)).items():  # the study was resumed by force
        write_json(folder / look_file(look), fixed | {"keys": _keys(jobs)})
    unfinished = _unfinished(jobs, records)
    return run(f"test-{look}", unfinished) if unfinished else None


def choose_finalists(records: list[TrialRecord], k: int) -> list[TrialRecord]:
    """Return the ``k`` best complete searched trials, best first, one per configuration regardless of its seed.

    Trials that repeat another one or were stopped early are excluded.
    """
    best: dict[str, TrialRecord] = {}
    searched = [r for r in records if r.phase == SEARCH and r.status == COMPLETE and r.repeat_of is None]
    for record in sorted(searched, key=lambda record: (-record.scores["cc_mean"], record.trial_id)):
        best.setdefault(content_key(OLDER_SETTINGS | record.config | {"seed": None}), record)
    return list(best.values())[:k]


def fresh_seeds(seed: int, look: int, n: int, used: set[int]) -> list[int]:
    """Return ``n`` different seeds that no searched trial had; the same arguments give the same seeds."""
    candidates = (derive_seed(seed, "confirm", look, index) % SEEDS_BELOW for index in itertools.count())
    seeds: dict[int, None] = {}  # in order
    while len(seeds) < n:
        if (candidate := next(candidates)) not in used:
            seeds[candidate] = None
    return list(seeds)


def validation_jobs(options: Options, records: list[TrialRecord], look: int, make_key: MakeKey) -> list[Job]:
    """Return one job per finalist and fresh seed, scored on the validation stories only."""
    jobs = []
    for finalist in choose_finalists(records, options.confirm):
        for seed in _seeds(options, records, look):
            config = replace(_config_of(finalist), seed=seed)
            name = _validation_id(finalist.trial_id, seed)
            jobs.append(Job(name, CONFIRM, make_key(config), asdict(config), finalist.params))
    return jobs


def fix_winner(
    options: Options, records: list[TrialRecord], look: int, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the content of ``confirm.json``; None if every finalist failed with every seed.

    The winner has the highest mean validation CC over the seeds that did not fail.
    """
    seeds = _seeds(options, records, look)
    finalists = [_validated(finalist, seeds, records) for finalist in choose_finalists(records, options.confirm)]
    valid = [finalist for finalist in finalists if finalist["cc_confirmed"] is not None]
    if not valid:
        return None
    heard = identity["heard"]
    return {
        "look": look,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "study": options.name,
        "code": identity["code"],
        "git": identity.get("git"),
        "data": identity["data"]["fingerprint"],
        "test_stories": list(identity["splits"][0]["test"]),
        "heard": heard,
        "n_searched": sum(record.phase == SEARCH for record in records),
        "asked": options.confirm,
        "seeds": seeds,
        "finalists": finalists,
        "winner": max(valid, key=lambda finalist: finalist["cc_confirmed"])["trial_id"],
        "test_was_read": _test_was_read(records),
        "looks": [
            earlier._asdict() for earlier in (*earlier_looks(options, heard), *earlier_baselines(options, heard))
        ],
    }


def final_jobs(fixed: dict[str, Any], records: list[TrialRecord], make_key: MakeKey) -> list[Job]:
    """Return one job per finalist in ``confirm.json`` that is kept, with the first fresh seed, and per baseline."""
    record_of = {record.trial_id: record for record in records}
    configs = {r.trial_id: _config_of(r) for r in records if _is_baseline(r)}
    for finalist in kept(fixed):
        chosen = _config_of(record_of[finalist])
        validated = [record_of.get(_validation_id(finalist, seed)) for seed in fixed["seeds"]]
        configs[finalist] = _without_patience(replace(chosen, seed=fixed["seeds"][0]), validated)
    jobs = []
    answered = {r.key: r.trial_id for r in records if r.phase == CONFIRM and r.status == COMPLETE}
    for name, config in configs.items():
        key = content_key(make_key(config), "test stories")
        params = record_of[name].params
        repeat_of = answered.get(key) if fixed["look"] > 1 else None
        job = Job(id_on_test(name, fixed["look"]), CONFIRM, key, asdict(config), params, repeat_of, is_final=True)
        jobs.append(job)
    return jobs


def is_complete(fixed: dict[str, Any], records: list[TrialRecord]) -> bool:
    """Whether all jobs of a test-set evaluation are finished, under the keys of ``confirm.json``."""
    scored = (*kept(fixed), *(record.trial_id for record in records if _is_baseline(record)))
    finished, keys = {record.trial_id: record.key for record in records}, fixed.get("keys", {})
    names = [id_on_test(name, fixed["look"]) for name in scored]
    return all(name in finished and finished[name] == keys.get(name, finished[name]) for name in names)


def is_lacking(options: Options, records: list[TrialRecord], look: int | None) -> bool:
    """Whether the confirm phase, which is to end with evaluation ``look``, has jobs to run after the search.

    ``look`` is None if the session adds no evaluation.
    """
    looks = read_looks(options.folder) if options.confirm else []
    if look is None or len(looks) >= look:
        return bool(looks) and not is_complete(looks[-1], records)
    finalists = choose_finalists(records, options.confirm)
    ended = {record.trial_id: record.status for record in records}
    seeds = _seeds(options, records, look)
    names = [_validation_id(finalist.trial_id, seed) for finalist in finalists for seed in seeds]
    return any(ended.get(name, COMPLETE) == COMPLETE for name in names)


def kept(fixed: dict[str, Any]) -> list[str]:
    """Return the finalists that did not fail with every seed, in the order of the search."""
    return [finalist["trial_id"] for finalist in fixed["finalists"] if finalist["cc_confirmed"] is not None]


def _validation_id(name: str, seed: int) -> str:
    return f"confirm-{name}-seed{seed}"


def _seeds(options: Options, records: list[TrialRecord], look: int) -> list[int]:
    used = {record.config["seed"] for record in records if record.phase == SEARCH}
    return fresh_seeds(options.seed, look, options.confirm_seeds, used)


def _validated(finalist: TrialRecord, seeds: list[int], records: list[TrialRecord]) -> dict[str, Any]:
    """Return the entry of a finalist in ``confirm.json``: its CC in the search, with every seed, and their mean."""
    record_of = {record.trial_id: record for record in records}
    scored = {seed: record_of[_validation_id(finalist.trial_id, seed)] for seed in seeds}
    cc = {seed: r.scores["cc_mean"] if r.status == COMPLETE else None for seed, r in scored.items()}
    valid = [value for value in cc.values() if value is not None]
    return {
        "trial_id": finalist.trial_id,
        "cc_searched": finalist.scores["cc_mean"],
        "cc_of_seed": {str(seed): value for seed, value in cc.items()},
        "cc_confirmed": float(np.mean(valid)) if valid else None,
    }


def _without_patience(config: TrialConfig, validated: list[TrialRecord | None]) -> TrialConfig:
    """Train for the mean number of epochs kept with the fresh seeds, because no story is held out in the end."""
    if config.patience is None:
        return config
    epochs = [r.scores["epoch_kept"] for r in validated if r is not None and r.status == COMPLETE]
    return replace(config, patience=None, epochs=max(1, round(float(np.mean(epochs)))))


def _config_of(record: TrialRecord) -> TrialConfig:
    return TrialConfig.from_dict(OLDER_SETTINGS | record.config)


def _is_baseline(record: TrialRecord) -> bool:
    return record.phase == BASELINE and record.status == COMPLETE


def _test_was_read(records: list[TrialRecord]) -> bool:
    """Whether this study has already scored its baselines on the test stories, or fine-tuned on their text."""
    return any("cc_test" in r.scores for r in records if r.phase == BASELINE) or any(
        r.config.get("mlm_text") == "all" for r in records if r.phase == SEARCH and r.method in TUNED
    )


def _keys(jobs: list[Job]) -> dict[str, str]:
    return {job.trial_id: job.key for job in jobs}


def _unfinished(jobs: list[Job], records: list[TrialRecord]) -> list[Job]:
    finished = {(record.trial_id, record.key) for record in records}
    return [job for job in jobs if (job.trial_id, job.key) not in finished]
