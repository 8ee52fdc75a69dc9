"""The runs that could decide what a study cannot, as shell commands."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.core.storage import is_url, open_place
from study.results.facts import Facts
from study.results.slopes import find_slope
from study.results.verdicts.power import (
    GRIDS,
    MAX_FOLDS,
    Runs,
    Spread,
    detectable,
    seeds_needed,
    smallest_runs,
    upper_sd,
)
from study.results.verdicts.rules import NextRuns
from study.setup.delta import DELTA
from study.wording import counted, run_command

SD_TRIAL, SD_STORY = 0.002, 0.001  # CC; assumed until a study has shown its own
FEW_STORIES = 4  # with fewer, the spread between stories is taken as at least ``SD_STORY``
# Options that a command must repeat to search the same data, with their defaults.
SAME_DATA: dict[str, Any] = {
    "data": None,
    "model": None,
    "layer": None,
    "trim": "published",
    "trust_alignment": False,
    "subjects": None,
    "voxels": "all",
    "train_stories": None,
    "test_stories": None,
    "mlm_text": "fit",
    "embed_precision": "auto",
    "score_every": 1,
    "seed": 0,
}


def which_runs(facts: Facts, folder: str, slopes: pd.DataFrame, delta: float) -> NextRuns:
    """Return the runs that could decide whether rank matters; ``slopes`` is of ``slope_table``."""
    all_failed = facts.n_failed == facts.n_searched
    failed = "The only searched trial failed" if facts.n_failed == 1 else f"All {facts.n_failed} searched trials failed"
    name, out = _name_and_out(folder)
    n_folds = _n_folds(facts)
    if not facts.is_finished:
        text = f"{failed}; fix the error first." if all_failed and facts.n_failed else "The study is not finished."
        return NextRuns(resume_command(folder), f"{text} Resume the study with the command below.")
    if all_failed and facts.n_failed:  # a failed trial counts as run and is not tried again
        text = f"{failed}; fix the error, then run the search again under another name."
        return NextRuns(_command_for(facts, None, f"{name}-again", n_folds, out, delta), text)
    if all_failed:
        small = GRIDS[0]
        text = f"No trial was searched; {small.space} with {small.n_trials} trials is the cheapest start."
        return NextRuns(_command_for(facts, small.space, f"{name}-{small.space}", n_folds, out, delta), text)
    spread = study_spread(slopes)
    runs = smallest_runs(delta, spread, len(facts.stories.get("validation", ())), _n_rotated(facts), n_folds)
    space, text = runs.grid.space, _text(runs, spread, slopes, delta)
    if (space, runs.n_folds) != (facts.study.get("space", {}).get("name"), n_folds):
        return NextRuns(_command_for(facts, space, f"{name}-{space}", runs.n_folds, out, delta), text)
    options = facts.study.get("options", {})
    seed = int(options.get("seed") or 0) + 1
    text += " The command runs this grid again with another split of the stories and shows whether the estimate holds."
    command = study_command(options | {"seed": seed}, space, f"{name}-seed{seed}", runs.n_folds, out, delta)
    return NextRuns(command, text)


def more_stories(facts: Facts, folder: str, delta: float) -> NextRuns:
    """Return the runs that could decide on fine-tuning after the test stories have been scored."""
    n_rotated, n_test = _n_rotated(facts), len(facts.stories.get("test", ()))
    same = "the same test story" if n_test == 1 else f"the same {counted(n_test, 'test story', 'test stories')}"
    if _n_folds(facts) > 1 or n_rotated <= len(facts.stories.get("validation", ())):
        return NextRuns(None, f"Neither other folds of these data nor {same} can decide; only more stories can.")
    name, out = _name_and_out(folder)
    folds = min(MAX_FOLDS, n_rotated)
    text = (
        f"More seeds do not help on {same}; only more stories would. Instead, the command evaluates the mean trial on "
        f"{n_rotated} validation stories in {folds} outer folds, so each trial trains {folds} times."
    )
    further = ["--confirm", "0", *out]
    return NextRuns(_command_for(facts, None, f"{name}-folds", folds, further, delta), text)


def _command_for(facts: Facts, space: str | None, name: str, n_folds: int, further: Sequence[str], delta: float) -> str:
    """Return the command of a new study on the same data; None stands for the same space."""
    options = facts.study.get("options", {})
    same = str(options.get("space") or facts.study.get("space", {}).get("name"))
    return study_command(options, space or same, name, n_folds, further, delta)


def _text(runs: Runs, spread: Spread, slopes: pd.DataFrame, delta: float) -> str:
    smallest = detectable(spread, runs.grid, runs.n_stories)
    n, stories = runs.grid.n_trials, counted(runs.n_stories, "validation story", "validation stories")
    each = f" in each of {runs.n_folds} outer folds, {n * runs.n_folds:,} trainings in all" if runs.n_folds > 1 else ""
    can = f"could tell no effect from one of {delta:g} CC" if runs.is_enough else "would come closest to a decision"
    text = (
        f"With the spreads between trials and stories {_source(slopes)}, {n} trials ({runs.grid.space}){each}, "
        f"evaluated on {stories}, {can}: their 95% interval would exclude 0 in four of five studies for an effect of "
        f"{smallest:.4f} CC."
    )
    if runs.is_enough:
        return text
    times = seeds_needed(delta, spread, runs.grid, runs.n_stories)
    if times is None:
        return f"{text} Only more stories could decide."
    return f"{text} A copy of that space with {times} times as many SEEDS could decide."


def _source(slopes: pd.DataFrame) -> str:
    """Return where the spreads come from, in words."""
    row = _known_spreads(slopes)
    if row is None:
        return f"assumed ({SD_TRIAL:g} and {SD_STORY:g} CC), since this study does not show its own"
    n = int(row["n_stories"])
    return "of this study, at their upper bounds" + (f" (from {n} stories: a guess)" if n < FEW_STORIES else "")


def study_spread(slopes: pd.DataFrame) -> Spread:
    """Return upper bounds of the spreads that a study shows, or assumed ones."""
    row = _known_spreads(slopes)
    if row is None:
        return Spread(SD_TRIAL, SD_STORY)
    n = int(row["n_stories"])
    of_stories = upper_sd(float(row["se_stories"] * np.sqrt(n)), n - 1)
    least = SD_STORY if n < FEW_STORIES else 0.0
    return Spread(upper_sd(float(row["sd_trial"]), int(row["df"])), max(of_stories, least))


def _known_spreads(slopes: pd.DataFrame) -> pd.Series | None:
    row = find_slope(slopes, "cc_mean")
    return row if row is not None and np.isfinite(row["sd_trial"]) and np.isfinite(row["se_stories"]) else None


def _n_folds(facts: Facts) -> int:
    return max(1, len(facts.study.get("splits", [0])))


def _n_rotated(facts: Facts) -> int:
    """Return how many stories outer folds can validate: only the present ones if voxels are chosen by the others."""
    validation = facts.stories.get("validation", ())
    if str(facts.study.get("options", {}).get("voxels", "all")).isdecimal():
        return len(validation)
    return len({*facts.stories.get("fit", ()), *validation})


def resume_command(folder: str) -> str:
    """Return the shell command that resumes a study."""
    name, out = _name_and_out(folder)
    return shlex.join([*run_command().split(), "--resume", "--name", name, *out])


def study_command(
    options: dict[str, Any], space: str, name: str, n_folds: int = 1, further: Sequence[str] = (), delta: float = DELTA
) -> str:
    """Return the shell command of a new study on the same data; ``further`` are further arguments."""
    words = [*run_command().split(), "--space", space]
    for option, default in SAME_DATA.items():
        value = options.get(option, default)
        if value is None or value == default:
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    words += ["--outer-folds", str(n_folds)] if n_folds > 1 else []
    words += ["--delta", f"{delta:g}"] if delta != DELTA else []
    return shlex.join([*words, "--name", name, *further])


def _name_and_out(folder: str) -> tuple[str, list[str]]:
    """Return the name of a study and ``--out`` with its parent, without it if that is the default."""
    if is_url(folder):
        place = open_place(folder)
        return place.name, ["--out", str(place.parent)]
    path = Path(folder).resolve()
    return path.name, [] if path.parent == Path("results").resolve() else ["--out", str(path.parent)]
