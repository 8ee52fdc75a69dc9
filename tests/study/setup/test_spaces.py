"""Search-space files: the bundled ones, a user's own, and every way in which one can be wrong."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from bert_encoding.core.errors import InputError
from bert_encoding.trial.config import TrialConfig
from study.setup.samplers import quiet_study
from study.setup.spaces import Space, load_space, rehearse, to_trial_config

LORA_TARGETS = {"q,v", "q,k,v", "q,k,v,o", "all"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a search-space file of one's own and return its path."""

    def write_file(source: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write_file


MINE = '''"""Is a tiny rank enough?

Scientific: rank.
"""

START = [{"rank": 2}]
EPOCHS = 4
TRIALS = 7
SAMPLER = "random"


def space(trial):
    return {"rank": trial.suggest_int("rank", 1, 3), "lr": 1e-3}
'''


def suggestions(space: Space, n: int, seed: int = 0) -> list[tuple[TrialConfig, dict[str, Any]]]:
    """Draw from a space through Optuna, as a study does."""
    study = quiet_study(optuna.samplers.RandomSampler(seed=seed))
    drawn = []
    for _ in range(n):
        trial = study.ask()
        drawn.append((to_trial_config(space.suggest(trial), TrialConfig()), trial.params))
    return drawn


def test_lora_full_stays_within_its_ranges_and_reaches_all_of_them() -> None:
    drawn = suggestions(load_space("lora_full"), 500)
    configs = [config for config, _ in drawn]
    assert {c.rank for c in configs} == {2, 4, 8, 16, 32, 64}
    factors = [c.lora_alpha / c.rank for c in configs]
    assert 1.0 <= min(factors) < 1.1
    assert 1.9 < max(factors) <= 2.0
    assert 1e-4 <= min(c.lr for c in configs) < 1.1e-4
    assert 4.6e-4 < max(c.lr for c in configs) <= 5e-4
    below_the_middle = sum(c.lr < math.sqrt(1e-4 * 5e-4) for c in configs) / len(configs)
    assert 0.4 < below_the_middle < 0.6, "lr is searched on a logarithmic scale"
    assert {c.stride for c in configs} == {128, 192, 256, 320, 384}
    assert {c.target_modules for c in configs} == LORA_TARGETS
    assert {(c.method, c.lora_dropout, c.batch_size, c.epochs) for c in configs} == {("lora", 0.1, 8, 3)}
    assert {frozenset(params) for _, params in drawn} == {
        frozenset({"log2_rank", "alpha_factor", "target_modules", "lr", "stride"})
    }


def test_a_user_s_file_works(write: Callable[[str], str]) -> None:
    space = load_space(write(MINE))
    assert (space.name, space.question) == ("mine", "Is a tiny rank enough?")
    assert (space.epochs, space.trials, space.sampler, space.start) == (4, 7, "random", ({"rank": 2},))
    rehearse(space, TrialConfig())
    assert {(c.rank, c.lr) for c, _ in suggestions(space, 40)} == {(1, 1e-3), (2, 1e-3), (3, 1e-3)}


def test_a_file_is_found_from_where_one_stands(
    write: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(MINE)
    monkeypatch.chdir(tmp_path)
    assert load_space("mine.py").path == tmp_path / "mine.py"
    assert load_space("./mine.py").path.is_absolute()


def test_the_least_a_file_needs(write: Callable[[str], str]) -> None:
    space = load_space(write("def space(trial):\n    return {}\n"))
    rehearse(space, TrialConfig())
    assert (space.question, space.epochs, space.trials, space.start, space.sampler) == ("mine", None, 20, (), "tpe")


def test_another_source_is_another_space(write: Callable[[str], str]) -> None:
    one = load_space(write(MINE)).source_hash
    assert load_space(write(MINE)).source_hash == one
    assert load_space(write(MINE.replace("1, 3", "1, 4"))).source_hash != one


def test_log2_rank_and_alpha_factor_become_rank_and_alpha() -> None:
    given = {"log2_rank": 5, "alpha_factor": 1.5, "lr": 1e-3}
    config = to_trial_config(given, TrialConfig(seed=7))
    assert (config.rank, config.lora_alpha, config.lr, config.seed) == (32, 48.0, 1e-3, 7)
    assert given == {"log2_rank": 5, "alpha_factor": 1.5, "lr": 1e-3}, "the caller's dict is left alone"
    assert to_trial_config({"alpha_factor": 0.5}, TrialConfig(rank=6)).lora_alpha == 3.0
    assert to_trial_config({"alpha_factor": 2.0, "rank": 5}, TrialConfig()).lora_alpha == 10.0


def short(value: str) -> str:
    """A parameter as it shows in a test's name: the last line of a file."""
    return value.strip().splitlines()[-1].strip()


SPACE = "def space(trial):\n    return {}\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def space(trial)\n    return {}\n", "cannot be loaded: SyntaxError"),
        ("import no_such_module_here\n", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("1 / 0\n", "cannot be loaded: ZeroDivisionError"),
        ("x = 1\n", r"no function space\(trial\)"),
        ("space = {'rank': 8}\n", r"no function space\(trial\)"),
        (SPACE + "SAMPLER = 'cube'\n", "SAMPLER 'cube': must be one of tpe, gp, cmaes, random, grid, qmc"),
        (SPACE + "SAMPLER = None\n", "SAMPLER None: must be one of"),
        (SPACE + "SAMPLER = ['tpe']\n", "SAMPLER"),
        (SPACE + "START = 5\n", "START"),
        (SPACE + "SCHEDULER = 'hyperband'\n", "SCHEDULER 'hyperband': must be one of none, asha, median"),
        *(
            (SPACE + f"SEEDS = {seeds}\n", "SEEDS .*: must be a list of different whole numbers from 0")
            for seeds in ("5", "(0, 0)", "(1.5,)", "(-1,)", "(True,)")
        ),
        (SPACE + "EPOCHS = 0\n", "EPOCHS 0: must be a whole number from 1"),
        (SPACE + "EPOCHS = 'three'\n", "EPOCHS 'three': must be a whole number from 1"),
        (SPACE + "TRIALS = -1\n", "TRIALS -1: must be a whole number from 0"),
        (SPACE + "TRIALS = 'many'\n", "TRIALS 'many': must be a whole number from 0"),
        (
            "SAMPLER = 'grid'\ndef space(trial):\n    return {'lr': trial.suggest_float('lr', 1e-4, 1e-2)}\n",
            r"a grid of space\(trial\) cannot be made",
        ),
    ],
    ids=short,
)
def test_a_file_that_cannot_be_used_is_named(source: str, message: str, write: Callable[[str], str]) -> None:
    path = write(source)
    with pytest.raises(InputError, match=message) as refused:
        load_space(path)
    assert str(refused.value).startswith(f"{path}: ")


def returning(value: str, more: str = "") -> str:
    return f"def space(trial):\n    return {value}\n{more}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (returning("{'rank': 0}"), "rank 0: must be a number from 1"),
        (returning("{'rank': trial.suggest_int('rank', 0, 40)}"), "rank 0: must be a number from 1"),
        (returning("{'rank': 2.5}"), "rank 2.5: must be a whole number"),
        (returning("{'lr': -1e-4}"), "lr -0.0001: must be a number from 0"),
        (returning("{'lr': 0.0}"), "lr 0: must be above 0"),
        (returning("{'lr': float('nan')}"), "lr nan: must be a number"),
        (returning("{'lr': '1e-4'}"), "lr '1e-4': must be a number"),
        (returning("{'stride': 511}"), "stride 511: must be a number from 1 to 510"),
        (returning("{'target_modules': 'q,w'}"), "target_modules 'q,w': no module 'w'"),
        (returning("{'target_modules': 'query'}"), "no module 'query'"),
        (returning("{'learning_rate': 1e-4}"), "'learning_rate' is no setting of a trial; settings are .*lr.*rank"),
        (returning("{'method': 'prompt'}"), "method 'prompt': must be one of"),
        (returning("{'lora_dropout': 1.0}"), "lora_dropout 1.0"),
        (returning("{'layer': 1}"), "layer 1: a space may not change it"),
        (returning("{'n_folds': 4}"), "n_folds 4: a space may not change it"),
        (returning("{'log2_rank': 2, 'rank': 8}"), "log2_rank and rank: give one of the two"),
        (
            returning("{'seed': trial.suggest_int('seed', 0, 3)}", "SEEDS = [0, 1]\n"),
            "SEEDS and a suggested seed: give one of the two",
        ),
        (returning("None"), r"space\(trial\) returned NoneType, expected a dict"),
        (returning("[8]"), r"space\(trial\) returned list, expected a dict"),
        (returning("{}['rank']"), r"space\(trial\) failed: KeyError"),
        (returning("trial.suggest_rank()"), r"space\(trial\) failed: AttributeError"),
        ("def space():\n    return {}\n", r"space\(trial\) failed: TypeError"),
        (returning("{}['rank']", "START = [{}]\n"), "KeyError"),
        (returning("None", "START = [{}]\n"), "NoneType"),
        (returning("{'rank': trial.suggest_int('rank', 1, 3)}", "START = [{'lr': 1e-3}]\n"), "START point.*rank"),
        (returning("{'rank': trial.suggest_int('rank', 1, 3)}", "START = [{'rank': 8}]\n"), "START point.*8"),
        (
            returning("{'rank': trial.suggest_int('rank', 1, 3)}", "START = [{'rank': 2, 'rnak': 3}]\n"),
            "START point.*rnak",
        ),
        (returning("{'rank': trial.suggest_int('rank', 1, 3)}", "START = {'rank': 2}\n"), "START"),
    ],
    ids=short,
)
def test_a_space_that_suggests_nonsense_is_refused_before_anything_runs(
    source: str, message: str, write: Callable[[str], str]
) -> None:
    path = write(source)
    with pytest.raises(InputError, match=message) as refused:
        rehearse(load_space(path), TrialConfig())
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_word_vectors_of_trials_and_baselines_are_made_alike(write: Callable[[str], str]) -> None:
    space = load_space(write(returning("{'embed_precision': 'bfloat16'}")))
    assert rehearse(space, TrialConfig(embed_precision="bfloat16"))
    with pytest.raises(InputError, match="embed_precision 'bfloat16': a space may not change it"):
        rehearse(space, TrialConfig(embed_precision="float32"))


def test_a_rare_mistake_is_found_among_the_rehearsals(write: Callable[[str], str]) -> None:
    """One choice in six is wrong, and none of it lies in the start point."""
    path = write(
        returning("{'target_modules': trial.suggest_categorical('t', ['q', 'k', 'v', 'o', 'i', 'x'])}")
        + "START = [{'t': 'q'}]\n"
    )
    with pytest.raises(InputError, match="no module 'x'"):
        rehearse(load_space(path), TrialConfig())


def test_a_rehearsal_leaves_no_trace(write: Callable[[str], str]) -> None:
    space = load_space(write(MINE))
    first = [params for _, params in suggestions(space, 5)]
    rehearse(space, TrialConfig())
    assert [params for _, params in suggestions(space, 5)] == first
