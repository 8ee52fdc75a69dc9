"""The runs that would tell what a study could not, ready for a shell."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bert_encoding.core.storage import is_url, open_place
from study.results.slopes import ALL, NUISANCE, find_slope
from study.results.verdicts.power import (
    DESIGNS,
    MAX_FOLDS,
    Runs,
    Spread,
    command,
    detectable,
    runs_that_would_tell,
    seeds_needed,
    upper_sd,
)
from study.wording import counted, run_command

SD_TRIAL, SD_STORY = 0.002, 0.001  # CC; supposed where a study has not shown its own
FEW_STORIES = 4  # of fewer, no spread below ``SD_STORY`` is believed


class Further(NamedTuple):
    """What to run next: ``words`` that say what it would tell, and ``command`` for a shell, None if there is none."""

    command: str | None
    words: str


def which_runs(
    study: dict[str, Any],
    folder: str,
    slopes: pd.DataFrame,
    stories: dict[str, tuple[str, ...]],
    is_finished: bool,
    delta: float,
    n_failed: int | None = None,
) -> Further:
    """Return the runs that would tell whether rank matters.

    Parameters
    ----------
    study : content of ``study.json``
    folder : the study's place
    slopes : of ``slopes.slope_table``
    stories : by role
    n_failed : how many searched trials failed, if all did; 0 of a study without a trial; None of others
    """
    if n_failed and not is_finished:
        return Further(resume_command(folder), f"{_all_failed(n_failed)}; mend the error, then go on.")
    if not is_finished:
        return Further(resume_command(folder), "The study is not finished; this goes on with it.")
    if n_failed is not None:
        return _from_the_start(study, folder, delta, n_failed)
    runs, spread = _runs(study, slopes, stories, delta)
    words = _words(runs, spread, slopes, delta)
    is_same = (runs.design.space, runs.n_folds) == (study.get("space", {}).get("name"), _n_folds(study))
    if is_same:
        words += " The command runs this design once more, stories split anew, and shows whether the estimate holds."
        return Further(_repeat(study, folder, runs, delta), words)
    name, where = _where(folder)
    space = runs.design.space
    return Further(command(study.get("options", {}), space, f"{name}-{space}", runs.n_folds, where, delta), words)


def more_stories(study: dict[str, Any], folder: str, stories: dict[str, tuple[str, ...]], delta: float) -> Further:
    """Return the runs that would tell more of fine-tuning where the test stories have been read and could not."""
    options, n_rotated, n_test = study.get("options", {}), _n_rotated(study, stories), len(stories.get("test", ()))
    same = f"the same {counted(n_test, 'test story', 'test stories')}" if n_test > 1 else "the same test story"
    if _n_folds(study) > 1 or n_rotated <= len(stories.get("validation", ())):
        return Further(None, f"No other folds of these data would tell more beside {same}: only more stories would.")
    name, where = _where(folder)
    folds = min(MAX_FOLDS, n_rotated)
    words = (
        f"More seeds cannot tell more on {same}, and only more stories there would. The command judges the mean trial "
        f"on {n_rotated} validation stories in {folds} outer folds instead, so that each trial trains {folds} times."
    )
    space = str(options.get("space") or study.get("space", {}).get("name"))
    told = command(options, space, f"{name}-folds", folds, ["--confirm", "0", *where], delta)
    return Further(told, words)


def _from_the_start(study: dict[str, Any], folder: str, delta: float, n_failed: int) -> Further:
    """Return what to run where no trial has come to anything: a failed one counts as run and is not tried again."""
    options, (name, where) = study.get("options", {}), _where(folder)
    if n_failed:
        space = str(options.get("space") or study.get("space", {}).get("name"))
        told = f"{_all_failed(n_failed)}; mend the error, then run the search again under another name."
        return Further(command(options, space, f"{name}-again", _n_folds(study), where, delta), told)
    small = DESIGNS[0]
    words = f"Nothing was searched; {small.space}, {small.n_trials} trials, is the cheapest beginning."
    return Further(command(options, small.space, f"{name}-{small.space}", _n_folds(study), where, delta), words)


def _all_failed(n: int) -> str:
    return f"All {n} searched trials failed" if n > 1 else "The one searched trial failed"


def _runs(
    study: dict[str, Any], slopes: pd.DataFrame, stories: dict[str, tuple[str, ...]], delta: float
) -> tuple[Runs, Spread]:
    spread, n_validation = _spread(slopes), len(stories.get("validation", ()))
    return runs_that_would_tell(delta, spread, n_validation, _n_rotated(study, stories), _n_folds(study)), spread


def _words(runs: Runs, spread: Spread, slopes: pd.DataFrame, delta: float) -> str:
    smallest = detectable(spread, runs.design, runs.n_stories)
    n, heard = runs.design.n_trials, counted(runs.n_stories, "validation story", "validation stories")
    each = f" in each of {runs.n_folds} outer folds, {n * runs.n_folds:,} trainings in all" if runs.n_folds > 1 else ""
    can = f"would tell no effect from one of {delta:g} CC" if runs.is_enough else "would come closest"
    words = (
        f"By the spreads between trials and stories, {_source(slopes)}, {n} trials ({runs.design.space}){each}, "
        f"judged on {heard}, {can}: their 95% interval would leave out 0 four times in five at an effect of "
        f"{smallest:.4f} CC."
    )
    if runs.is_enough:
        return words
    times = seeds_needed(delta, spread, runs.design, runs.n_stories)
    if times is None:
        return f"{words} Only more stories would tell."
    return f"{words} A copy of that space with {times} times as many SEEDS would tell."


def _source(slopes: pd.DataFrame) -> str:
    """Say whence the spreads are."""
    row = _shown(slopes)
    if row is None:
        return f"supposed, since this study shows none ({SD_TRIAL:g} and {SD_STORY:g} CC)"
    n = int(row["n_stories"])
    return "with room for their own uncertainty" + (f" (from {n} stories: a guess)" if n < FEW_STORIES else "")


def _spread(slopes: pd.DataFrame) -> Spread:
    """Return the spreads to reckon with: upper bounds of those that a study shows, or what is supposed."""
    row = _shown(slopes)
    if row is None:
        return Spread(SD_TRIAL, SD_STORY)
    n = int(row["n_stories"])
    of_stories = upper_sd(float(row["se_stories"] * np.sqrt(n)), n - 1)
    least = SD_STORY if n < FEW_STORIES else 0.0
    return Spread(upper_sd(float(row["sd_trial"]), int(row["df"])), max(of_stories, least))


def _shown(slopes: pd.DataFrame) -> pd.Series | None:
    row = find_slope(slopes, "cc_mean", NUISANCE, ALL)
    shows = row is not None and np.isfinite(row["sd_trial"]) and np.isfinite(row["se_stories"])
    return row if shows else None


def _n_folds(study: dict[str, Any]) -> int:
    return max(1, len(study.get("splits", [0])))


def _n_rotated(study: dict[str, Any], stories: dict[str, tuple[str, ...]]) -> int:
    """Return how many stories outer folds can validate; only those validated now if voxels are chosen by the others."""
    validation = stories.get("validation", ())
    if str(study.get("options", {}).get("voxels", "all")).isdecimal():
        return len(validation)
    return len({*stories.get("fit", ()), *validation})


def _repeat(study: dict[str, Any], folder: str, runs: Runs, delta: float) -> str:
    name, where = _where(folder)
    options = study.get("options", {})
    seed = int(options.get("seed") or 0) + 1
    return command(options | {"seed": seed}, runs.design.space, f"{name}-seed{seed}", runs.n_folds, where, delta)


def confirm_command(folder: str) -> str:
    """Return the shell command of a study's confirm phase."""
    return f"{resume_command(folder)} --confirm 3"


def resume_command(folder: str) -> str:
    """Return the shell command that goes on with a study."""
    name, where = _where(folder)
    return shlex.join([*run_command().split(), "--resume", "--name", name, *where])


def _where(folder: str) -> tuple[str, list[str]]:
    """Return the name of a study and the option that leads to where it is kept; nothing if that is the default."""
    if is_url(folder):
        place = open_place(folder)
        return place.name, ["--out", str(place.parent)]
    path = Path(folder).resolve()
    return path.name, [] if path.parent == Path("results").resolve() else ["--out", str(path.parent)]
