"""Confirm phase: finalists, fresh seeds, the winner, order, and resuming."""

import io
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from confirm_phase import BASE, IDENTITY, PretendRunner, folder, key_of, make_options, make_record, write_trial
from make_trials import PEFT_WARNS
from ray.tune.search import Searcher
from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key
from bert_encoding.core.names import METRICS
from bert_encoding.trial.config import OLDER_SETTINGS, TrialConfig
from bert_encoding.trial.record import TrialRecord, read_record, read_records, write_record
from study.results.confirmed import confirm_lines
from study.results.load import load_trials
from study.results.locked_stories import permit_look, read_looks
from study.search.job_list import JobList
from study.search.progress import ProgressLine
from study.search.worker import Job
from study.session.confirm import choose_finalists, confirm, fresh_seeds, is_complete, is_lacking
from study.session.session import _confirm, check_look
from study.setup.encoding_study import Study
from study.setup.resolve import options_record, resolve_options
from study.setup.spaces import load_space
from study.setup.text_study import TextStudy

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


def test_finalists_are_the_best_different_complete_searched_trials() -> None:
    def ranked(name: str, cc: float | None, rank: int, seed: int = 0, **more: Any) -> TrialRecord:
        return make_record(name, cc, config=replace(BASE, rank=rank, seed=seed), **more)

    records = [
        ranked("0001", 0.30, 1),
        ranked("0002", 0.32, 1, seed=5),  # the same but for the seed: its best counts
        ranked("0003", 0.40, 2, status="STOPPED"),
        ranked("0004", 0.50, 3, repeat_of="0009"),
        ranked("0005", None, 4),
        ranked("0006", 0.31, 5),
        ranked("0007", 0.31, 6),
        ranked("confirm-0001-seed7", 0.60, 7, phase="confirm"),
        ranked("baseline-frozen", 0.70, 8, phase="baseline"),
    ]
    assert [one.trial_id for one in choose_finalists(records, 9)] == ["0002", "0006", "0007"]
    assert [one.trial_id for one in choose_finalists(records[::-1], 2)] == ["0002", "0006"]
    older = replace(BASE, rank=5, embed_precision="float32", seed=9)
    again = make_record("0008", 0.29, config=older)
    for setting in OLDER_SETTINGS:
        del again.config[setting]  # recorded before it could be set
    other = ranked("0009", 0.28, 5)  # auto: another configuration
    same = make_record("0010", 0.27, config=replace(older, seed=3))
    assert [one.trial_id for one in choose_finalists([again, other, same], 9)] == ["0008", "0009"]


def test_fresh_seeds_are_new_and_always_the_same() -> None:
    first = fresh_seeds(3, 1, 4, set())
    assert len(set(first)) == 4
    assert fresh_seeds(3, 1, 2, set()) == first[:2]
    assert fresh_seeds(3, 1, 3, {first[1]}) == [first[0], *first[2:]]
    assert not set(first) & (set(fresh_seeds(3, 2, 4, set())) | set(fresh_seeds(4, 1, 4, set())))


def test_the_winner_has_the_best_mean_over_fresh_seeds_and_all_are_scored(folder: Path) -> None:
    """Trial 2 was the best of the search, and has the best single seed; trial 4 has the best mean."""
    seeds = fresh_seeds(0, 1, 2, {0})
    cc = {2: (0.26, 0.10), 4: (0.21, 0.20), 1: (0.18, 0.18)}

    def of(job: Job) -> float:
        return 0.5 if job.is_final else cc[job.config["rank"]][seeds.index(job.config["seed"])]

    runner = PretendRunner(folder, of)
    runner.confirm(confirm=3)
    (fixed,) = read_looks(folder)
    assert fixed["winner"] == "0004"
    assert [one["trial_id"] for one in fixed["finalists"]] == ["0002", "0004", "0001"]
    np.testing.assert_allclose([one["cc_confirmed"] for one in fixed["finalists"]], [0.18, 0.205, 0.18], rtol=1e-12)
    assert fixed["finalists"][1]["cc_of_seed"] == {str(seeds[0]): 0.21, str(seeds[1]): 0.20}
    assert (fixed["seeds"], fixed["n_searched"], fixed["looks"], fixed["code"]) == (seeds, 4, [], "c0de")
    assert set(runner.ran[:6]) == {f"confirm-{name}-seed{seed}" for name in ("0001", "0002", "0004") for seed in seeds}
    tested = ["test-baseline-frozen", "test-baseline-word_rate", "test-0001", "test-0002", "test-0004"]
    assert sorted(runner.ran[6:]) == sorted(tested)
    assert {read_record(folder, f"test-000{at}").config["seed"] for at in (1, 2, 4)} == {seeds[0]}
    assert "the winner is trial 0004, by its mean validation CC 0.2050 over 2 fresh seeds" in runner.out.getvalue()


def test_a_finalist_that_fails_with_every_seed_drops_out(folder: Path) -> None:
    first = fresh_seeds(0, 1, 2, {0})[0]

    def of(job: Job) -> float | None:
        rank, seed = job.config["rank"], job.config["seed"]
        return None if rank == 2 or (rank == 4 and seed == first) else 0.3

    runner = PretendRunner(folder, of)
    runner.confirm()
    (fixed,) = read_looks(folder)
    assert fixed["winner"] == "0004"
    assert [one["cc_confirmed"] for one in fixed["finalists"]] == [None, 0.3]
    assert "test-0002" not in runner.ran and "test-0004" in runner.ran
    assert any("Finalist 0002 dropped out" in line for line in confirm_lines(folder, load_trials(folder)))


def test_the_test_stories_stay_unread_if_every_finalist_fails(folder: Path) -> None:
    runner = PretendRunner(folder, lambda job: None)
    runner.confirm()
    assert len(runner.ran) == 4 and read_looks(folder) == []
    assert "nothing is confirmed" in runner.out.getvalue()
    assert not is_lacking(make_options(folder), read_records(folder), 1), "a session that goes on has nothing to do"


def test_patience_becomes_the_epochs_that_the_fresh_seeds_kept(folder: Path) -> None:
    write_trial(folder, "0005", 0.9, config=replace(BASE, epochs=8, patience=2))
    PretendRunner(folder).confirm(confirm=1)
    config = read_record(folder, "test-0005").config
    assert (config["patience"], config["epochs"]) == (None, 3)


@pytest.mark.parametrize("n", range(9))
def test_an_interrupted_confirm_phase_runs_what_is_missing(folder: Path, n: int) -> None:
    n_jobs = 2 * 2 + 2 + 2
    first = PretendRunner(folder, n_until_killed=n)
    first.confirm()
    options, records = make_options(folder), read_records(folder)
    assert is_lacking(options, records, None if read_looks(folder) else 1) == (n < n_jobs)
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    second = PretendRunner(folder)
    second.confirm()
    assert len(first.ran + second.ran) == len(set(first.ran + second.ran)) == n_jobs
    assert {file: file.read_bytes() for file in before} == before, "nothing that was written is written again"
    (fixed,) = read_looks(folder)
    assert is_complete(fixed, read_records(folder))


def test_an_interrupted_search_or_evaluation_is_not_followed_by_another_evaluation(folder: Path) -> None:
    console = Console(file=io.StringIO())

    def session(runner: PretendRunner, look: int | None, **changes: Any) -> None:
        assert _confirm(make_options(folder, **changes), look, IDENTITY, key_of, runner, console) is None

    interrupted = PretendRunner(folder, n_until_killed=5)
    session(interrupted, 1, trials=5)
    assert interrupted.ran == [], "the search lacks a trial"
    session(interrupted, 1)
    assert len(interrupted.ran) == 5 and len(read_looks(folder)) == 1
    interrupted.left = 1
    permit_look(folder, 2)
    session(interrupted, 2)
    assert len(interrupted.ran) == 6 and len(read_looks(folder)) == 1
    rest = PretendRunner(folder)
    session(rest, 2)
    assert len(read_looks(folder)) == 2
    assert [name.endswith("-look2") for name in rest.ran] == [False] * 2 + [False] * 4 + [True] * 4


def test_a_second_evaluation_has_its_own_seeds_and_reuses_the_baselines(folder: Path) -> None:
    PretendRunner(folder).confirm()
    jobs: list[Job] = []

    def run(name: str, new_jobs: list[Job]) -> None:
        jobs.extend(new_jobs)
        PretendRunner(folder)(name, [replace(job, is_final=True) for job in new_jobs if job.is_final])
        for job in new_jobs:
            write_record(
                folder, make_record(job.trial_id, 0.3, TrialConfig.from_dict(job.config), "confirm", key=job.key)
            )

    permit_look(folder, 2)
    confirm(make_options(folder), 2, IDENTITY, key_of, run, Console(file=io.StringIO()))
    one, two = read_looks(folder)
    assert not set(one["seeds"]) & set(two["seeds"])
    assert [(look["study"], look["at"]) for look in two["looks"]] == [("s", one["at"])]
    final = {job.trial_id: job.repeat_of for job in jobs if job.is_final}
    assert final["test-baseline-frozen-look2"] == "test-baseline-frozen"
    assert final["test-0002-look2"] is None


def other_key_of(config: TrialConfig) -> str:
    """The key of a configuration after ``--force-resume`` with other code."""
    return content_key("other code", asdict(config))


def resume_forced(folder: Path, n_until_killed: int = 1000) -> PretendRunner:
    runner = PretendRunner(folder, n_until_killed=n_until_killed)
    assert confirm(make_options(folder), 1, IDENTITY, other_key_of, runner, Console(file=runner.out)) is None
    return runner


@pytest.mark.parametrize("n", [0, 3, 4])
def test_fresh_seeds_run_again_after_a_forced_change(folder: Path, n: int) -> None:
    PretendRunner(folder, n_until_killed=n).confirm()
    looked_before = bool(read_looks(folder))
    forced = resume_forced(folder)
    assert len(forced.ran) == (4 if looked_before else 8)
    confirmed = [r for r in read_records(folder) if r.trial_id.startswith("confirm-")]
    expected = key_of if looked_before else other_key_of  # a winner that is fixed stays
    assert [r.key for r in confirmed] == [expected(TrialConfig.from_dict(r.config)) for r in confirmed]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_an_interrupted_evaluation_is_scored_again_after_a_forced_change(folder: Path, n: int) -> None:
    """Also if that is interrupted when every id has a record, of which some are old."""
    PretendRunner(folder, n_until_killed=7).confirm()
    (before,) = read_looks(folder)
    first = resume_forced(folder, n_until_killed=n)
    records = read_records(folder)
    assert not is_complete(read_looks(folder)[0], records)
    assert is_lacking(make_options(folder), records, None)
    rest = resume_forced(folder)
    assert len(first.ran) == n and len(set(first.ran + rest.ran)) == len(first.ran + rest.ran) == 4
    (after,) = read_looks(folder)
    assert is_complete(after, read_records(folder))
    assert {k: v for k, v in after.items() if k != "keys"} == {k: v for k, v in before.items() if k != "keys"}


def test_a_complete_evaluation_is_unchanged_by_a_forced_change(folder: Path) -> None:
    PretendRunner(folder).confirm()
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    assert resume_forced(folder).ran == []
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before


def test_a_study_without_a_search_and_one_on_text_confirm_nothing() -> None:
    smoke, text = load_space("smoke"), load_space("sentiment_lora")
    without, on_text = (
        resolve_options({"space": space.name, "address": "local"} | trials, {}, space)
        for space, trials in ((smoke, {"trials": 0}), (text, {}))
    )
    assert without.confirm == on_text.confirm == 0
    assert options_record(without)["confirm"] is None, "a search that is added later has its own default"
    with pytest.raises(InputError, match="--confirm 2: not available for text-only studies"):
        resolve_options({"space": text.name, "address": "local", "confirm": 2}, {}, text)


def test_look_again_without_a_confirm_phase_is_refused() -> None:
    encoding, text = Study.__new__(Study), TextStudy.__new__(TextStudy)
    for study, trials, message in (
        (encoding, 4, "--look-again: --confirm is 0 in this study; give --confirm K too"),
        (encoding, 0, "--look-again: nothing is confirmed in this study; leave it out"),
        (text, 4, "--look-again: nothing is confirmed in this study; leave it out"),
    ):
        object.__setattr__(study, "options", SimpleNamespace(confirm=0, trials=trials))
        with pytest.raises(InputError) as refused:
            check_look(study, look_again=True)
        assert str(refused.value) == message


@pytest.mark.parametrize(
    ("is_final", "phase", "on_test"), [(False, "confirm", ""), (True, "test", " on the test stories")]
)
def test_jobs_run_in_order_and_a_failure_stops_no_other(is_final: bool, phase: str, on_test: str) -> None:
    jobs = [Job(f"job-{at}", "confirm", "k", asdict(BASE), is_final=is_final) for at in range(3)]
    job_list, out = JobList(jobs, METRICS["encoding"]), io.StringIO()
    before = [make_record("0001", 0.3), make_record("test-0009", None, phase="confirm", status="COMPLETE")]
    progress = ProgressLine(Console(file=out, width=400), job_list, before, 3, clock=lambda: 0.0)
    for name, status in (("a", "COMPLETE"), ("b", "FAILED")):
        job = job_list.suggest(name)
        result = {"job": job["trial_id"], "phase": "confirm", "status": status, "value": -0.00001, "error": "no"}
        result |= {"ended": True, "is_final": is_final}
        job_list.on_trial_complete(name, result)
        progress.on_trial_result(0, [], SimpleNamespace(trial_id=name), result)
    assert [line.split(" | ")[:2] for line in out.getvalue().splitlines()] == [
        [f"[{phase} 1/3] job-0: CC 0.0000{on_test}", "best CC 0.3000 (0001), frozen -"],
        [f"[{phase} 2/3] job-1: FAILED: no", "best CC 0.3000 (0001), frozen -"],
    ]
    assert job_list.suggest("c")["trial_id"] == "job-2"
    assert job_list.suggest("d") == Searcher.FINISHED
    job_list = JobList(jobs, METRICS["encoding"])
    job_list.error = "no space"
    assert job_list.suggest("a") == Searcher.FINISHED
