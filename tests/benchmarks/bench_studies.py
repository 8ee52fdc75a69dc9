"""A study of given configurations: the course script once for each, and ours, as it is and with early stopping."""

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_kept import ROOT, Result, child_environment, command_line, run_process, run_script
from bench_tables import trial_seconds

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from study_process import environment_of, running_from

from bert_encoding.records import FAILED, SEARCH, read_records

NAME = "bench"
EARLY = "asha"
RANKS, LRS = (4, 16), (1e-4, 3e-4)
SPACE = '''"""Which of these configurations predicts best? Scientific: rank, lr. Nuisance: seed. Fixed: the rest."""

SAMPLER = "grid"
POINTS = {points}


def space(trial):
    return POINTS[trial.suggest_categorical("point", list(range(len(POINTS))))]
'''


def configurations(n: int) -> list[dict[str, Any]]:
    """Return the first ``n`` of: seed by seed, every rank with every learning rate."""
    endless = ({"rank": r, "lr": lr, "seed": seed} for seed in itertools.count() for r in RANKS for lr in LRS)
    return list(itertools.islice(endless, n))


def run_script_study(points: list[dict[str, Any]], run_one: Callable[[dict[str, Any]], Result]) -> Result:
    """Run the course script once for each configuration, one after the other; ``run_one`` runs it, or knows it."""
    results = [run_one(point) for point in points]
    cc = [result["scores"]["cc_mean"] for result in results]
    return {
        "seconds": sum(trial_seconds(result) for result in results),
        "cc": cc,
        "losses": [result["scores"]["mlm_loss_heldout"] for result in results],
        "best": max(cc),
    }


def run_course_script(options: Result) -> Result:
    """Run the course script in a process of its own."""
    return run_script("course_script.py", [options["data"], *command_line(without(options, "data"))])


def run_our_trial(options: Result) -> Result:
    """Run a trial of the library in a process of its own."""
    return run_script("bench_ours.py", [options["data"], *command_line(without(options, "data"))])


def without(options: Result, *names: str) -> Result:
    """Return the options but some."""
    return {name: value for name, value in options.items() if name not in names}


def run_our_study(shared: Result, points: list[dict[str, Any]], early: bool, enough: float) -> Result:
    """Run ``study/run.py`` on a grid of the configurations in a fresh folder, so that no record answers anything.

    Parameters
    ----------
    early : score after every epoch and stop early, else score once, at the end
    enough : CC at which the yardstick's best configuration counts as found
    """
    private = Path(tempfile.mkdtemp(prefix="b-"))
    try:
        return _run_our_study(private, shared, points, early, enough)
    finally:
        for process in running_from(private):
            process.kill()
        shutil.rmtree(private, ignore_errors=True)


def _run_our_study(private: Path, shared: Result, points: list[dict[str, Any]], early: bool, enough: float) -> Result:
    space, every = private / "bench_space.py", {"score_every": 1 if early else shared["epochs"]}
    space.write_text(SPACE.format(points=[point | every for point in points]))
    options = shared | {"space": space, "out": private / "results", "name": NAME, "trials": len(points), "confirm": 0}
    options |= {"address": "local", "scheduler": EARLY if early else "none"}
    command = [sys.executable, str(ROOT / "study" / "run.py"), *command_line(options)]
    began, began_clock = time.time(), time.perf_counter()
    run_process(command, child_environment() | environment_of(private) | {"PYTHONPATH": str(ROOT)})
    seconds = time.perf_counter() - began_clock
    return read_our_study(private / "results" / NAME, points, began, enough) | {"seconds": seconds}


def read_our_study(folder: Path, points: list[dict[str, Any]], began: float, enough: float) -> Result:
    """Return what a study found.

    Raises
    ------
    RuntimeError
        if trials are missing, failed, or were answered from a record.
    """
    records = [record for record in read_records(folder) if record.phase == SEARCH]
    bad = [record.trial_id for record in records if record.status == FAILED or record.repeat_of]
    if bad or len(records) != len(points):
        raise RuntimeError(f"{folder}: {len(records)} trials, expected {len(points)}; failed or answered: {bad}")
    found = {_point_of(record.config, points): record for record in records}
    ended = {at: (folder / "trials" / r.trial_id / "record.json").stat().st_mtime - began for at, r in found.items()}
    began_s = {at: ended[at] - record.seconds["total"] for at, record in found.items()}
    good = [ended[at] for at, record in found.items() if record.scores["cc_mean"] >= enough]
    return {
        "cc": [found[at].scores["cc_mean"] for at in range(len(points))],
        "losses": [found[at].scores["mlm_loss_heldout"] for at in range(len(points))],
        "statuses": [found[at].status for at in range(len(points))],
        "epochs_done": [found[at].scores["epochs_done"] for at in range(len(points))],
        "best": max(record.scores["cc_mean"] for record in records),
        "seconds_until_found": min(good, default=None),
        "seconds_of_trials": sum(record.seconds["total"] for record in records),
        "at_once": max(sum(began_s[o] < ended[at] <= ended[o] for o in found) for at in found),
    }


def _point_of(config: dict[str, Any], points: list[dict[str, Any]]) -> int:
    return next(at for at, point in enumerate(points) if all(config[name] == v for name, v in point.items()))
