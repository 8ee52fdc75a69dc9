"""Which trial comes next, asked directly: no Ray process runs here."""

import random
from dataclasses import asdict, replace
from typing import Any

import pytest
from make_searcher import ask_all, finished, key_of, make_record, searcher
from ray.tune.search import Searcher

from bert_encoding.core.errors import InputError
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from study.search.searcher import StudySearcher, _first_points
from study.search.worker import Job
from study.setup.spaces import Space, load_space

COURSE = {"log2_rank": 3, "alpha_factor": 2.0, "target_modules": "q,v", "lr": 2e-4, "stride": 256}
OK = {"status": "COMPLETE", "value": 0.1}


def test_baselines_come_first_and_alone() -> None:
    search = searcher(jobs=("frozen", "word_rate"))
    assert search.n_jobs == 5
    first, second = search.suggest("a"), search.suggest("b")
    assert (first["trial_id"], second["trial_id"]) == ("baseline-frozen", "baseline-word_rate")
    assert (first["phase"], first["key"]) == ("baseline", "key-frozen")
    assert search.suggest("c") is None
    search.on_trial_complete("b", OK)
    assert search.suggest("c") is None, "one baseline is still missing"
    search.on_trial_complete("a", OK)
    job = search.suggest("c")
    assert (job["trial_id"], job["phase"]) == ("0001", "search")


def test_the_start_point_comes_first() -> None:
    jobs = ask_all(searcher())
    assert jobs[0]["params"] == COURSE
    assert [jobs[0]["config"][name] for name in ("rank", "lora_alpha", "lr")] == [8, 16.0, 2e-4]
    assert jobs[0]["key"] == key_of(TrialConfig.from_dict(jobs[0]["config"]))
    assert COURSE not in [job["params"] for job in jobs[1:]]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_the_budget_is_respected(n: int) -> None:
    search = searcher(n_trials=n)
    assert search.n_jobs == n
    jobs = ask_all(search)
    assert [job["trial_id"] for job in jobs] == [f"{i:04d}" for i in range(1, n + 1)]
    assert [job["repeat_of"] for job in jobs] == [None] * n
    assert len({job["key"] for job in jobs}) == n
    assert states(search) == [("COMPLETE", 0.1 + at / 1000) for at in range(n)]
    assert search.n_jobs == 0
    assert search.suggest("late") == Searcher.FINISHED


def test_the_budget_counts_trials_that_run_at_once_and_those_that_fail() -> None:
    search = searcher(n_trials=3)
    assert [search.suggest(name)["trial_id"] for name in "abc"] == ["0001", "0002", "0003"]
    assert search.suggest("d") == Searcher.FINISHED
    search.on_trial_complete("a", error=True)
    search.on_trial_complete("unknown", OK)
    assert search.suggest("d") == Searcher.FINISHED
    assert states(search) == [("FAIL", None)]


def test_a_job_carries_the_base_settings_and_its_parameters() -> None:
    (job,) = ask_all(searcher(base=TrialConfig(model="tiny", seed=9, layer=1, epochs=2), n_trials=1))
    config = TrialConfig.from_dict(job["config"])
    assert (config.model, config.seed, config.layer, config.epochs) == ("tiny", 9, 1, 2)
    assert asdict(Job(**job)) == job


def states(search: StudySearcher) -> list[tuple[str, float | None]]:
    return [
        (trial.state.name, trial.value)
        for trial in search.study.get_trials(deepcopy=False)
        if trial.state.is_finished()
    ]


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        (OK, False, ("COMPLETE", 0.1)),
        (OK, True, ("FAIL", None)),  # a crash after the last report
        (None, True, ("FAIL", None)),
        (None, False, ("FAIL", None)),
        ({"status": "FAILED", "error": "nan", "value": None}, False, ("FAIL", None)),
        ({"epoch": 1}, False, ("FAIL", None)),
    ],
)
def test_optuna_receives_each_end_and_the_search_continues(
    result: dict[str, Any] | None, error: bool, state: tuple[str, float | None]
) -> None:
    search = searcher()
    job = search.suggest("a")
    search.on_trial_complete("a", result, error)
    assert states(search) == [state]
    assert search.error is None
    assert (job["key"] in search.done) == (state[0] == "COMPLETE")
    assert search.suggest("b")["trial_id"] == "0002"


@pytest.mark.parametrize(
    ("result", "error", "reason"),
    [
        ({"status": "FAILED", "error": "the loss is not finite"}, False, "the loss is not finite"),
        (None, True, "the worker died"),
        (None, False, "the worker died"),
    ],
)
def test_a_failed_baseline_stops_the_search_with_its_reason(
    result: dict[str, Any] | None, error: bool, reason: str
) -> None:
    search = searcher(jobs=("frozen", "word_rate"))
    search.suggest("a")
    search.on_trial_complete("a", result, error)
    assert search.error == f"baseline baseline-frozen failed: {reason}"
    assert search.suggest("b") == Searcher.FINISHED


def test_a_nonsensical_suggestion_stops_the_search_with_its_reason() -> None:
    space = load_space("smoke")
    broken = Space(
        **vars(space) | {"suggest": lambda trial: {"rank": trial.suggest_int("log2_rank", 0, 0)}, "start": ()}
    )
    search = searcher(broken)
    assert search.suggest("a") == Searcher.FINISHED
    assert search.error is not None
    assert search.error.startswith(f"{space.path}: rank 0:")


def test_complete_and_failed_records_count_and_their_points_are_not_tried_again() -> None:
    space = load_space("lora_full")
    other = COURSE | {"log2_rank": 5, "lr": 3e-4}
    records = [finished(space, COURSE, 1, None), finished(space, other, 2, 0.3)]
    enough = searcher(n_trials=1, records=records, first_id=3)
    assert (enough.n_jobs, enough.suggest("a")) == (0, Searcher.FINISHED)
    search = searcher(n_trials=5, records=records, first_id=3)
    assert search.n_jobs == 3
    assert states(search) == [("FAIL", None), ("COMPLETE", 0.3)]
    assert search.study.best_params == other
    jobs = ask_all(search)
    assert [job["trial_id"] for job in jobs] == ["0003", "0004", "0005"]
    assert COURSE not in [job["params"] for job in jobs]


def test_records_of_other_phases_are_no_part_of_the_search() -> None:
    space = load_space("lora_full")
    records = [finished(space, COURSE, 1, phase="confirm"), finished(space, COURSE, 2, phase="baseline")]
    search = searcher(n_trials=2, records=records)
    assert (search.n_jobs, states(search)) == (2, [])
    assert search.suggest("a")["params"] == COURSE


def test_a_trial_that_a_changed_space_no_longer_suggests_counts_only_in_a_forced_study() -> None:
    records = [finished(load_space("lora_full"), COURSE, 1), make_record("0002", 0.3, params=COURSE | {"log2_rank": 9})]
    search = searcher(n_trials=4, records=records, first_id=3, is_mixed=True)
    assert (search.n_jobs, states(search)) == (2, [("COMPLETE", 0.1)])
    with pytest.raises(InputError, match="no longer suggests what trial 0002 was run with"):
        searcher(n_trials=4, records=records, first_id=3)


@pytest.mark.parametrize("seeds", [(), (0, 1, 2)])
def test_what_waits_is_what_a_plain_loop_over_all_pairs_finds(seeds: tuple[int, ...]) -> None:
    random.seed(0)
    start = [{"a": 1}, {"a": 2, "b": 1}, {"a": 3}, {"a": 2, "b": 1.0}, {"a": 9}]
    space, records = replace(load_space("smoke"), start=tuple(start), seeds=seeds), []
    for at in range(40):
        params = {"a": random.randint(1, 5)} | ({"b": random.randint(1, 2)} if random.random() < 0.7 else {})
        config = {"seed": random.choice(seeds or (0,))}
        records.append(TrialRecord("COMPLETE", "lora", config, f"{at:04d}", params=params))
    points: list[dict[str, Any]] = []
    for point in [*start, *(record.params for record in records if seeds)]:
        if point not in points or not seeds:
            points.append(point)
    expected = [
        (point, seed)
        for point in points
        for seed in seeds or (None,)
        if not any(
            (record.params == point or (point in start and point.items() <= record.params.items()))
            and (seed is None or record.config["seed"] == seed)
            for record in records
        )
    ]
    assert expected, "there is something to find"
    assert list(_first_points(space, records)) == expected


def test_a_long_study_is_resumed_without_comparing_all_records_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    space = load_space("lora_full")
    records = [finished(space, COURSE | {"lr": 1e-4 + at * 1e-7}, at + 1) for at in range(30)]

    def refuse(one: TrialRecord, other: object) -> bool:
        raise AssertionError("two records were compared")

    monkeypatch.setattr(TrialRecord, "__eq__", refuse)
    search = searcher(space, records=records, n_trials=31, first_id=31)
    assert len(search.study.trials) == 30


def test_the_sampler_differs_after_a_resume() -> None:
    """With equal seeds a resumed search would ask for the points that the first session has tried."""
    space = load_space("lora_full")
    begun = [job["params"] for job in ask_all(searcher(n_trials=6))]
    assert [job["params"] for job in ask_all(searcher(n_trials=6))] == begun, "a study can be repeated"
    assert [job["params"] for job in ask_all(searcher(n_trials=6, seed=1))][1:] != begun[1:]
    records = [finished(space, params, at + 1) for at, params in enumerate(begun[:2])]
    resumed = [job["params"] for job in ask_all(searcher(n_trials=6, records=records, first_id=3))]
    assert len(resumed) == 4
    assert not [params for params in resumed if params in begun]


def one_point(space: Space) -> Space:
    """A space with a single configuration."""
    return Space(**vars(space) | {"suggest": lambda trial: {"rank": trial.suggest_int("rank", 8, 8)}, "start": ()})


@pytest.mark.parametrize(("status", "repeated"), [("COMPLETE", "0001"), ("FAILED", None)])
@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_repeated_configuration_is_answered_from_a_complete_record(
    is_earlier: bool, status: str, repeated: str | None
) -> None:
    space = one_point(load_space("smoke"))
    earlier = [finished(space, {"rank": 8}, 1, 0.1 if status == "COMPLETE" else None)] if is_earlier else []
    search = searcher(space, n_trials=3, records=earlier, first_id=1 + is_earlier)
    if not is_earlier:
        assert search.suggest("a")["repeat_of"] is None
        search.on_trial_complete("a", {"status": status, "value": 0.1})
    job = search.suggest("b")
    assert (job["trial_id"], job["repeat_of"]) == ("0002", repeated)


def test_ray_s_own_restore_is_refused() -> None:
    search = searcher()
    assert search.set_search_properties("cc", "max", {})
    with pytest.raises(NotImplementedError, match="--resume"):
        search.restore("anywhere")
