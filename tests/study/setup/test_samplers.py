"""Samplers: each runs a search through the searcher; what one cannot search is refused; seeds and replicates."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from make_searcher import BASE, ask_all, finished, searcher
from ray.tune.search import Searcher

from bert_encoding.core.errors import InputError
from study.setup.samplers import SAMPLERS, make_sampler
from study.setup.spaces import Space, load_space, rehearse

HAS_CMAES = importlib.util.find_spec("cmaes") is not None
needs_cmaes = pytest.mark.skipif(not HAS_CMAES, reason="the package cmaes (extra 'cmaes') is not installed")
EVERY = [pytest.param(name, marks=needs_cmaes if name == "cmaes" else ()) for name in SAMPLERS]

NUMBERS = """START = [{"lr": 0.03, "rank": 2}]
def space(trial):
    return {"lr": trial.suggest_float("lr", 0.01, 0.05, step=0.01), "rank": trial.suggest_int("rank", 1, 3)}
"""
CONDITIONAL = """def space(trial):
    method = trial.suggest_categorical("method", ["full", "lora"])
    rank = {"rank": trial.suggest_int("rank", 1, 4)} if method == "lora" else {}
    return {"method": method, "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True), **rank}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Space]:
    """Load a space from source, with another sampler if given."""

    def load_source(source: str, sampler: str | None = None) -> Space:
        (tmp_path / "mine.py").write_text(source)
        return load_space(str(tmp_path / "mine.py"), None, sampler)

    return load_source


def quality(job: dict[str, Any]) -> float:
    return -abs(job["params"]["lr"] - 0.02) - abs(job["params"]["rank"] - 3) / 10


def search(tune_search: Any, n_at_once: int = 1) -> list[dict[str, Any]]:
    """Run a search to its end, ``n_at_once`` trials at once, and report their values."""
    jobs: list[dict[str, Any]] = []
    running: list[tuple[str, dict[str, Any]]] = []
    for at in range(300):
        job = tune_search.suggest(f"ray{at}") if len(running) < n_at_once else None
        if isinstance(job, dict):
            jobs.append(job)
            running.append((f"ray{at}", job))
        elif running:
            name, ended = running.pop(0)
            tune_search.on_trial_complete(name, {"status": "COMPLETE", "value": quality(ended)})
        elif job == Searcher.FINISHED:
            return jobs
    raise AssertionError("the search has no end")


@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_searches_from_the_start_point_reproducibly(name: str, load: Callable[..., Space]) -> None:
    space = load(NUMBERS, name)
    rehearse(space, BASE)
    jobs = search(searcher(space, n_trials=12), n_at_once=2)
    assert len(jobs) == 12
    assert jobs[0]["params"] == {"lr": 0.03, "rank": 2}
    lrs = {job["params"]["lr"] for job in jobs}
    assert all(any(math.isclose(lr, step / 100) for step in range(1, 6)) for lr in lrs)
    assert {job["params"]["rank"] for job in jobs} <= {1, 2, 3}
    assert len(lrs) > 1
    again = search(searcher(space, n_trials=12), n_at_once=2)
    assert [job["params"] for job in again] == [job["params"] for job in jobs], "a seed settles it"
    other = search(searcher(space, n_trials=12, seed=1), n_at_once=2)
    assert [job["params"] for job in other] != [job["params"] for job in jobs]


@pytest.mark.parametrize("name", EVERY)
def test_a_configuration_runs_once_whatever_the_sampler(name: str, load: Callable[..., Space]) -> None:
    """There are 15 points; what is suggested again is answered from its record."""
    jobs = search(searcher(load(NUMBERS, name), n_trials=15), n_at_once=3)
    ran = [job["key"] for job in jobs if job["repeat_of"] is None]
    assert len(ran) == len(set(ran))
    ids = {job["trial_id"]: job["key"] for job in jobs}
    assert all(ids[job["repeat_of"]] == job["key"] for job in jobs if job["repeat_of"] is not None)
    if name == "grid":
        assert len(ran) == 15


def test_conditional_parameters_make_no_noise(
    load: Callable[..., Space], capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Tree-structured models keep what only some trials have; nothing falls back to chance, or says so."""
    tune_search = searcher(load(CONDITIONAL), n_trials=25)
    assert len(ask_all(tune_search)) == 25
    assert capsys.readouterr().err == "" and caplog.text == ""


CHOICE = "def space(trial):\n    return {'target_modules': trial.suggest_categorical('t', ['q', 'v']), "
CHOICE += "'lr': trial.suggest_float('lr', 0.1, 0.9)}\n"
ONE = "def space(trial):\n    return {'lr': trial.suggest_float('lr', 0.1, 0.9), "
ONE += "'rank': trial.suggest_int('rank', 8, 8)}\n"
MOVING = "def space(trial):\n    rank = trial.suggest_int('rank', 1, 4)\n"
MOVING += "    return {'rank': rank, 'lora_alpha': trial.suggest_float('lora_alpha', 1, 2 * rank)}\n"


@pytest.mark.parametrize(
    ("sampler", "source", "message"),
    [
        pytest.param("cmaes", CHOICE, "searches numbers only, and t is a choice; use tpe", marks=needs_cmaes),
        pytest.param("cmaes", ONE, "needs two numbers to search, the space has 1", marks=needs_cmaes),
        pytest.param("cmaes", CONDITIONAL, "rank or its range depends on other parameters", marks=needs_cmaes),
        ("gp", CONDITIONAL, "rank or its range depends on other parameters; use tpe"),
        ("gp", MOVING, "lora_alpha or its range depends on other parameters"),
    ],
)
def test_what_a_sampler_would_draw_at_random_is_refused(
    sampler: str, source: str, message: str, load: Callable[..., Space]
) -> None:
    space = load(source, sampler)
    with pytest.raises(InputError, match=f"mine.py: sampler {sampler}: .*{message}"):
        rehearse(space, BASE)
    rehearse(load(source, "tpe"), BASE)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--sampler cmaes: needs the package cmaes; pip install '.*\[cmaes\]'"):
        make_sampler("cmaes", 0)
    assert isinstance(make_sampler("tpe", 0), optuna.samplers.TPESampler)


SEEDED = "SEEDS = (0, 1, 2)\n" + NUMBERS


@pytest.mark.parametrize("name", ["tpe", "random", "qmc", "gp"])
def test_every_suggested_point_is_run_with_every_seed(name: str, load: Callable[..., Space]) -> None:
    tune_search = searcher(load(SEEDED, name), n_trials=12)
    jobs = search(tune_search)
    assert [job["config"]["seed"] for job in jobs] == [0, 1, 2] * 4
    assert [job["params"] for job in jobs[::3]] == [job["params"] for job in jobs[2::3]]
    assert jobs[0]["params"] == {"lr": 0.03, "rank": 2}
    trials = tune_search.study.get_trials(deepcopy=False)
    told = [(trial.params, trial.user_attrs["seed"], trial.user_attrs["trial_id"]) for trial in trials]
    assert told == [(job["params"], job["config"]["seed"], job["trial_id"]) for job in jobs]


def test_a_resumed_study_completes_the_seeds(load: Callable[..., Space]) -> None:
    space = load(SEEDED)
    start, other = {"lr": 0.03, "rank": 2}, {"lr": 0.05, "rank": 1}
    records = [finished(space, params, at + 1) for at, params in enumerate((start, start, start, other))]
    for record, seed in zip(records, (0, 1, 2, 0), strict=True):
        record.config["seed"] = seed
    jobs = search(searcher(space, n_trials=7, records=records, first_id=5))
    assert [job["config"]["seed"] for job in jobs] == [1, 2, 0]
    assert [job["params"] for job in jobs[:2]] == [other, other]
