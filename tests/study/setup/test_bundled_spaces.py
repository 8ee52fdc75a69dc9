"""The bundled spaces that are grids: every point once, whatever runs beside it; and what each space tries first."""

import importlib.util
import itertools
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

import search_spaces
from bert_encoding.core.errors import InputError
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import lora_scaling
from study.search.searcher import StudySearcher
from study.setup.spaces import Space, load_space, rehearse, to_trial_config

FOLDER = Path(next(iter(search_spaces.__path__)))
Suggest = Callable[[optuna.trial.BaseTrial], dict[str, Any]]


def load(name: str) -> Any:
    """Import a space file afresh."""
    spec = importlib.util.spec_from_file_location(f"space_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid_study(seed: int) -> optuna.Study:
    """Return a study that visits every point of a grid."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.BruteForceSampler(seed=seed)
    sampler.after_trial = lambda *ended: None  # it would stop a study that is not running
    return optuna.create_study(direction="maximize", sampler=sampler)


def visit(suggest: Suggest, start: list[dict[str, Any]], n: int, n_at_once: int, seed: int) -> list[dict[str, Any]]:
    """Ask for ``n`` trials, ``n_at_once`` at a time, as a study does; every fourth of them fails."""
    study, running, suggested = grid_study(seed), [], []
    for point in start:
        study.enqueue_trial(point)
    for at in range(n):
        trial = study.ask()
        suggested.append(suggest(trial))
        running.append(trial)
        if len(running) >= n_at_once:
            ended = running.pop(0)
            if at % 4:
                study.tell(ended, float(at))
            else:
                study.tell(ended, state=optuna.trial.TrialState.FAIL)
    return suggested


def distinct(suggested: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(sorted(values.items())) for values in suggested}


# --- full_vs_lora -----------------------------------------------------------------------------------------------------

FULL_LRS, LORA_LRS = (1e-5, 3e-5, 5e-5), (1e-4, 3e-4, 5e-4)
WAYS = [
    *((method, None, lr) for method in ("partial", "full") for lr in FULL_LRS),
    *(("lora", rank, lr) for rank in (4, 16, 64) for lr in LORA_LRS),
]
GRID = {(*way, seed) for way in WAYS for seed in (0, 1, 2)}


def points(suggested: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(s["method"], s.get("rank"), s["lr"], s["seed"]) for s in suggested]


@pytest.mark.parametrize(("n_at_once", "seed"), [(1, 0), (2, 1), (7, 2), (45, 3)])
def test_full_vs_lora_visits_its_grid_once(n_at_once: int, seed: int) -> None:
    module = load("full_vs_lora")
    assert module.SAMPLER == "grid"
    assert module.TRIALS == len(GRID) == 45
    visited = points(visit(module.space, module.START, module.TRIALS, n_at_once, seed))
    assert len(visited) == len(set(visited))
    assert set(visited) == GRID  # to the last bit of each learning rate


def test_full_vs_lora_goes_on_after_a_cut_with_what_is_left() -> None:
    """As the study does: records are replayed into a fresh one, with another sampler seed."""
    module = load("full_vs_lora")
    study, done = grid_study(0), []
    for point in module.START:
        study.enqueue_trial(point)
    for at in range(20):
        trial = study.ask()
        done.append((module.space(trial), trial.params))
        study.tell(trial, float(at))
    resumed = grid_study(99)
    for _, params in done:
        replay = optuna.trial.FixedTrial(params)
        module.space(replay)
        resumed.add_trial(
            optuna.trial.create_trial(params=replay.params, distributions=replay.distributions, value=0.0)
        )
    left = []
    for _ in range(module.TRIALS - len(done)):
        trial = resumed.ask()
        left.append(module.space(trial))
        resumed.tell(trial, 0.0)
    visited = points([suggested for suggested, _ in done] + left)
    assert sorted(visited, key=str) == sorted(GRID, key=str)


def test_full_vs_lora_gives_each_way_as_many_trials() -> None:
    module = load("full_vs_lora")
    configs = [to_trial_config(s, TrialConfig()) for s in visit(module.space, [], module.TRIALS, 1, 0)]
    assert len({repr(config) for config in configs}) == module.TRIALS
    ways = Counter((c.method, c.rank if c.method == "lora" else None) for c in configs)
    assert ways == {("partial", None): 9, ("full", None): 9, ("lora", 4): 9, ("lora", 16): 9, ("lora", 64): 9}
    assert {(c.lora_scaling, c.lora_alpha) for c in configs if c.method == "lora"} == {("rslora", 6.0)}
    assert {(c.batch_size, c.target_modules, c.frozen_blocks) for c in configs} == {(8, "q,v", 6)}


def test_full_vs_lora_starts_with_one_of_each_method_on_the_grid() -> None:
    module = load("full_vs_lora")
    first = points(visit(module.space, module.START, len(module.START), 1, 0))
    assert [(point["method"], point.get("rank"), point["lr"], point["seed"]) for point in module.START] == first
    assert set(first) <= GRID
    assert {method for method, *_ in first} == {"partial", "full", "lora"}


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [12, 6, 2])
def test_layers_visits_every_layer_once(n_layers: int) -> None:
    space = load_space("layers", n_layers)
    assert (space.sampler, space.trials) == ("grid", n_layers + 1), "as many trials as there are layers"
    suggested = visit(space.suggest, list(space.start), n_layers + 1, 3, 0)
    assert sorted(values["layer"] for values in suggested) == list(range(n_layers + 1))
    configs = [to_trial_config(values, TrialConfig(layer=5)) for values in suggested]
    assert {(config.method, config.keep_layers) for config in configs} == {("frozen", True)}


# --- nsp --------------------------------------------------------------------------------------------------------------


def test_nsp_starts_at_the_course_s_point_and_beside_it() -> None:
    module = load("nsp")
    configs = [
        to_trial_config(module.space(optuna.trial.FixedTrial(point)), TrialConfig(epochs=module.EPOCHS))
        for point in module.START
    ]
    assert [(c.objective, c.method, c.lr, c.epochs) for c in configs] == [
        ("mlm_nsp", "full", 5e-6, 2),
        ("mlm", "full", 5e-6, 2),
    ]
    space = load_space("nsp")
    assert (space.seeds, space.trials % len(space.seeds)) == ((0, 1, 2), 0), "no point lacks a seed at the end"


def test_nsp_compares_the_two_objectives_alone() -> None:
    module = load("nsp")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    configs = [to_trial_config(module.space(study.ask()), TrialConfig()) for _ in range(200)]
    assert {config.objective for config in configs} == {"mlm", "mlm_nsp"}
    assert 1e-6 <= min(c.lr for c in configs) < 1.5e-6
    assert 3.5e-5 < max(c.lr for c in configs) <= 5e-5
    assert {(c.method, c.batch_size, c.train_embeddings) for c in configs} == {("full", 8, True)}


# --- lora_rank and lora_rank_small ------------------------------------------------------------------------------------

SCALES: dict[str, Callable[[int], float]] = {  # what B A is multiplied by
    "2r": lambda rank: 2.0,
    "fixed": lambda rank: 18 / rank,
    "rslora": lambda rank: 6 / rank**0.5,
}
RANKS = [
    ("lora_rank", list(itertools.product((2, 4, 8, 16, 32, 64), SCALES, (1e-4, 3e-4, 1e-3), (0, 1, 2)))),
    ("lora_rank_small", list(itertools.product((4, 16, 64), ("rslora",), (3e-4, 1e-3), (0, 1)))),
]


def run_study(space: Space, n_at_once: int, jobs_done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Suggest the remaining trials, several at once; return the jobs."""
    records = [
        TrialRecord("COMPLETE", "lora", job["config"], job["trial_id"], "search", key=job["key"], params=job["params"])
        for job in jobs_done
    ]
    for record in records:
        record.scores["cc_mean"] = 0.1
    base, n = TrialConfig(epochs=space.epochs or 3), len(records)
    searcher = StudySearcher(space, base, [], space.trials, records, repr, seed=0, first_id=n)
    jobs: list[dict[str, Any]] = []
    running: deque[str] = deque()
    while (name := f"ray{len(jobs)}") and len(jobs) <= space.trials:
        job = searcher.suggest(name) if len(running) < n_at_once else None
        if job == Searcher.FINISHED:
            break
        if job is None:
            searcher.on_trial_complete(running.popleft(), {"status": "COMPLETE", "value": 0.1})
        else:
            jobs.append(job)
            running.append(name)
    assert searcher.error is None
    return jobs


def ran(jobs: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    rules = [(job["params"].get("alpha_rule", "rslora"), job["config"]) for job in jobs]
    return Counter((config["rank"], rule, config["lr"], config["seed"]) for rule, config in rules)


@pytest.mark.parametrize(("name", "grid"), RANKS)
@pytest.mark.parametrize("n_at_once", [1, 5])
def test_lora_rank_runs_every_point_with_every_seed_once(name: str, grid: list[Any], n_at_once: int) -> None:
    space = load_space(name)
    assert (space.trials, space.size, space.sampler) == (len(grid), len(grid), "grid")
    jobs = run_study(space, n_at_once, [])
    assert ran(jobs) == Counter(grid)
    assert len({job["key"] for job in jobs}) == len(grid), "no two points are the same settings"


@pytest.mark.parametrize(("name", "grid"), RANKS)
@pytest.mark.parametrize("n_done", [1, 5])
def test_lora_rank_goes_on_after_a_cut_with_what_is_left(name: str, grid: list[Any], n_done: int) -> None:
    space = load_space(name)
    done = run_study(space, 1, [])[:n_done]  # the last point lacks a seed
    left = run_study(space, 1, done)
    assert ran(done) + ran(left) == Counter(grid)


@pytest.mark.parametrize(("name", "grid"), RANKS)
def test_lora_rank_changes_rank_rule_rate_and_seed_alone(name: str, grid: list[Any]) -> None:
    jobs = run_study(load_space(name), 1, [])
    for job in jobs:
        rule, config = job["params"].get("alpha_rule", "rslora"), job["config"]
        assert lora_scaling(config) == pytest.approx(SCALES[rule](config["rank"]), rel=1e-12)
    searched = {"rank", "lora_alpha", "lora_scaling", "lr", "seed"}
    fixed = asdict(TrialConfig(method="lora", epochs=5, batch_size=8, target_modules="q,v", lora_dropout=0.1))
    others = [{name: value for name, value in job["config"].items() if name not in searched} for job in jobs]
    assert others == [{name: value for name, value in fixed.items() if name not in searched}] * len(grid)


@pytest.mark.parametrize(("name", "grid"), RANKS)
def test_lora_rank_stops_none_early_and_begins_amid_its_grid(name: str, grid: list[Any]) -> None:
    space = load_space(name)
    assert space.scheduler == "none"
    seeds = sorted({seed for *_, seed in grid})
    assert list(space.seeds) == seeds
    first = run_study(space, 1, [])[: len(seeds)]
    assert ran(first) == Counter((16, "rslora", 3e-4, seed) for seed in seeds)


def test_lora_rank_holds_every_trial_of_its_small_form() -> None:
    keys = [{job["key"] for job in run_study(load_space(name), 1, [])} for name, _ in RANKS]
    assert keys[1] < keys[0]


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full_vs_lora", "layers", "nsp", "lora_rank", "lora_rank_small"])
def test_the_docstring_sorts_every_parameter(name: str) -> None:
    module = load(name)
    doc = str(module.__doc__)
    assert doc.splitlines()[0].endswith("?")
    sections = {
        title: re.search(rf"^{title}\n((?:    .*\n)+)", doc, re.MULTILINE) for title in ("Scientific", "Nuisance")
    }
    text = "".join(match.group(1) for match in sections.values() if match)
    for point in module.START:
        trial = optuna.trial.FixedTrial(point)
        suggested = module.space(trial)
        assert set(point) == set(trial.params)
        assert not [parameter for parameter in trial.params if f"``{parameter}``" not in text]
        assert set(suggested) <= set(TrialConfig.__dataclass_fields__)
        own_words = {"alpha_rule"} if name == "lora_rank" else set()  # two settings in one
        assert set(trial.params) - own_words <= set(suggested), "parameters are named as the settings they are"


# --- as studies load them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lora_full", "smoke", "layers", "full_vs_lora", "nsp", "sentiment_lora", "lora_rank", "lora_rank_small"]
)
@pytest.mark.parametrize("n_layers", [12, 6])
def test_every_bundled_space_passes_the_rehearsal(name: str, n_layers: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "bert", "num_hidden_layers": {n_layers}}}')
    space = load_space(name, n_layers)
    rehearse(space, TrialConfig(model=str(tmp_path), epochs=space.epochs or 3))
    assert space.task == ("classification" if name == "sentiment_lora" else "encoding")
    assert {"full_vs_lora": 45, "layers": n_layers + 1, "lora_rank": 162, "lora_rank_small": 12}.get(
        name, space.trials
    ) == space.trials


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 6}')
    with pytest.raises(InputError, match=r"layers\.py: --layer \d+: .* has layers 0 \(embeddings\) to 6"):
        rehearse(load_space("layers", 12), TrialConfig(model=str(tmp_path)))
