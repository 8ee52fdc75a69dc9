"""The bundled spaces that are grids: every point once, however many run at once; and what each space tries first."""

import hashlib
import itertools
import re
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
from study.setup.samplers import quiet_study
from study.setup.spaces import Space, load_space, rehearse, to_trial_config

BUNDLED = sorted(f.stem for f in Path(next(iter(search_spaces.__path__))).glob("*.py") if f.stem != "__init__")


def run_study(space: Space, n_at_once: int, jobs_done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Suggest the remaining trials, several at once, of which every fourth fails; return the jobs."""
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
            fails = n_at_once > 1 and len(jobs) % 4 == 0
            result = {"status": "FAILED", "error": "no"} if fails else {"status": "COMPLETE", "value": 0.1}
            searcher.on_trial_complete(running.popleft(), result)
        else:
            jobs.append(job)
            running.append(name)
    assert searcher.error is None
    return jobs


def point(job: dict[str, Any]) -> tuple[Any, ...]:
    config, is_lora = job["config"], job["config"]["method"] == "lora"
    rule = job["params"].get("alpha_rule", "rslora")
    of_lora = (config["rank"], rule) if is_lora else (None, None)
    return (config["method"], *of_lora, config["lr"], config["seed"])


def ran(jobs: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(map(point, jobs))


SCALES: dict[str, Callable[[int], float]] = {  # what B A is multiplied by
    "2r": lambda rank: 2.0,
    "fixed": lambda rank: 18 / rank,
    "rslora": lambda rank: 6 / rank**0.5,
}
FULL_VS_LORA = [
    *itertools.product(("partial", "full"), (None,), (None,), (1e-5, 3e-5, 5e-5), (0, 1, 2)),
    *itertools.product(("lora",), (4, 16, 64), ("rslora",), (1e-4, 3e-4, 5e-4), (0, 1, 2)),
]
RANKS = [
    ("lora_rank", list(itertools.product(("lora",), (2, 4, 8, 16, 32, 64), SCALES, (1e-4, 3e-4, 1e-3), (0, 1, 2)))),
    ("lora_rank_small", list(itertools.product(("lora",), (4, 16, 64), ("rslora",), (3e-4, 1e-3), (0, 1)))),
]
GRIDS = [("full_vs_lora", FULL_VS_LORA), *RANKS]


@pytest.mark.parametrize(("name", "grid"), GRIDS)
@pytest.mark.parametrize("n_at_once", [1, 5, 45])
def test_a_grid_runs_every_point_with_every_seed_once(name: str, grid: list[Any], n_at_once: int) -> None:
    space = load_space(name)
    assert (space.trials, space.size, space.sampler) == (len(grid), len(grid), "grid")
    jobs = run_study(space, n_at_once, [])
    assert ran(jobs) == Counter(grid)  # to the last bit of each learning rate
    assert len({job["key"] for job in jobs}) == len(grid), "no two points are the same settings"


@pytest.mark.parametrize(("name", "grid"), GRIDS)
@pytest.mark.parametrize("n_done", [1, 5])
def test_a_resumed_grid_runs_the_points_that_are_left(name: str, grid: list[Any], n_done: int) -> None:
    space = load_space(name)
    done = run_study(space, 1, [])[:n_done]  # the last point lacks a seed
    assert ran(done) + ran(run_study(space, 1, done)) == Counter(grid)


def test_full_vs_lora_starts_with_one_of_each_method_and_fixes_the_other_settings() -> None:
    space = load_space("full_vs_lora")
    jobs = run_study(space, 1, [])
    assert [job["params"] for job in jobs[: len(space.start)]] == list(space.start)
    assert {point["method"] for point in space.start} == {"partial", "full", "lora"}
    configs = [TrialConfig.from_dict(job["config"]) for job in jobs]
    assert {(c.lora_scaling, c.lora_alpha) for c in configs if c.method == "lora"} == {("rslora", 6.0)}
    assert {(c.batch_size, c.target_modules, c.frozen_blocks) for c in configs} == {(8, "q,v", 6)}


@pytest.mark.parametrize("n_layers", [12, 6, 2])
def test_layers_visits_every_layer_once(n_layers: int) -> None:
    space = load_space("layers", n_layers)
    assert (space.sampler, space.trials) == ("grid", n_layers + 1), "as many trials as there are layers"
    configs = [job["config"] for job in run_study(space, 3, [])]
    assert sorted(config["layer"] for config in configs) == list(range(n_layers + 1))
    assert {(config["method"], config["keep_layers"]) for config in configs} == {("frozen", True)}


def test_nsp_starts_at_the_course_s_point_and_beside_it() -> None:
    space = load_space("nsp")
    configs = [
        to_trial_config(space.suggest(optuna.trial.FixedTrial(point)), TrialConfig(epochs=space.epochs or 0))
        for point in space.start
    ]
    assert [(c.objective, c.method, c.lr, c.epochs) for c in configs] == [
        ("mlm_nsp", "full", 5e-6, 2),
        ("mlm", "full", 5e-6, 2),
    ]
    assert (space.seeds, space.trials % len(space.seeds)) == ((0, 1, 2), 0), "no point lacks a seed at the end"


def test_nsp_compares_the_two_objectives_alone() -> None:
    study = quiet_study(optuna.samplers.RandomSampler(seed=0))
    configs = [to_trial_config(load_space("nsp").suggest(study.ask()), TrialConfig()) for _ in range(200)]
    assert {config.objective for config in configs} == {"mlm", "mlm_nsp"}
    assert 1e-6 <= min(c.lr for c in configs) < 1.5e-6
    assert 3.5e-5 < max(c.lr for c in configs) <= 5e-5
    assert {(c.method, c.batch_size, c.train_embeddings) for c in configs} == {("full", 8, True)}


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
    assert ran(first) == Counter(("lora", 16, "rslora", 3e-4, seed) for seed in seeds)


def test_lora_rank_holds_every_trial_of_its_small_form() -> None:
    keys = [{job["key"] for job in run_study(load_space(name), 1, [])} for name, _ in RANKS]
    assert keys[1] < keys[0]


@pytest.mark.parametrize("name", ["full_vs_lora", "layers", "nsp", "lora_rank", "lora_rank_small"])
def test_the_docstring_sorts_every_parameter(name: str) -> None:
    space = load_space(name)
    doc = space.path.read_text().split('"""')[1]
    assert space.question.endswith("?")
    sections = {
        title: re.search(rf"^{title}\n((?:    .*\n)+)", doc, re.MULTILINE) for title in ("Scientific", "Nuisance")
    }
    text = "".join(match.group(1) for match in sections.values() if match)
    for point in space.start:
        trial = optuna.trial.FixedTrial(point)
        suggested = space.suggest(trial)
        assert set(point) == set(trial.params)
        assert not [parameter for parameter in trial.params if f"``{parameter}``" not in text]
        assert set(suggested) <= set(TrialConfig.__dataclass_fields__)
        own_words = {"alpha_rule"} if name == "lora_rank" else set()  # two settings in one
        assert set(trial.params) - own_words <= set(suggested), "parameters are named as the settings they are"


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("n_layers", [12, 6])
def test_every_bundled_space_passes_the_rehearsal(name: str, n_layers: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "bert", "num_hidden_layers": {n_layers}}}')
    space = load_space(name, n_layers)
    rehearse(space, TrialConfig(model=str(tmp_path), epochs=space.epochs or 3))
    assert (space.name, space.path.name) == (name, f"{name}.py")
    assert space.source_hash == hashlib.sha256(space.path.read_bytes()).hexdigest()[:16]
    assert space.question.endswith(("?", ".")) and "\n" not in space.question
    assert space.start, "the first point is the course's, not a random one"
    assert space.task == ("classification" if name == "sentiment_lora" else "encoding")
    assert {"full_vs_lora": 45, "layers": n_layers + 1, "lora_rank": 162, "lora_rank_small": 12}.get(
        name, space.trials
    ) == space.trials


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 6}')
    with pytest.raises(InputError, match=r"layers\.py: --layer \d+: .* has layers 0 \(embeddings\) to 6"):
        rehearse(load_space("layers", 12), TrialConfig(model=str(tmp_path)))
