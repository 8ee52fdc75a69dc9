"""What the driver costs: trials that do nothing; its seconds per trial, memory of driver and workers with study size.

Processor seconds of the driver are its own; seconds by the clock also depend on what else the machine does.

python tests/benchmarks/many_trials.py [--trials 1000] [--workers 8] [--sampler tpe]
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cyclopts
import psutil

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
sys.path.insert(0, str(HELPERS))

from study_process import environment_of, running_from, short_folder  # noqa: E402

SPACE = """SAMPLER = "{sampler}"


def space(trial):
    return {{"lr": trial.suggest_float("lr", 1e-4, 0.1, log=True)}}
"""

app = cyclopts.App(help=__doc__)


class Sample(NamedTuple):
    """One look at a running study; seconds since its first record."""

    n_records: int
    seconds: float
    driver_cpu_s: float
    driver_mb: float
    workers_mb: float


@app.default
def main(*, trials: int = 1000, workers: int = 8, sampler: str = "tpe") -> None:
    """Run a study of trials that do nothing, and print its progress and what it cost."""
    folder = short_folder()
    try:
        samples = measure(folder / "study", folder, trials, workers, sampler)
    finally:
        for process in running_from(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    print("records  seconds  driver's processor s  driver MB  largest worker MB")
    for one in samples[:: max(1, len(samples) // 20)] + samples[-1:]:
        print(
            f"{one.n_records:7d}  {one.seconds:7.1f}  {one.driver_cpu_s:20.1f}  {one.driver_mb:9.0f}  "
            f"{one.workers_mb:17.0f}"
        )
    for name, first, last in (("first half", 0.1, 0.5), ("second half", 0.5, 1.0)):
        by_clock, cpu, mb = cost(samples, first, last)
        print(f"{name}: a trial costs {by_clock:.3f} s, {cpu:.3f} processor s and {mb * 1000:.0f} kB in the driver")


def cost(samples: list[Sample], first: float, last: float) -> tuple[float, float, float]:
    """Return seconds, processor seconds and MB of the driver per trial, between two shares of all records."""
    n = samples[-1].n_records
    begin, end = at_record(samples, int(first * n)), at_record(samples, int(last * n))
    n_between, *spent = (after - before for before, after in zip(begin[:4], end[:4], strict=True))
    seconds, cpu_s, mb = (value / n_between for value in spent)
    return seconds, cpu_s, mb


def at_record(samples: list[Sample], n: int) -> Sample:
    """Return the first look that saw ``n`` records."""
    return next(sample for sample in samples if sample.n_records >= n)


def measure(folder: Path, private_tmp: Path, n_trials: int, n_workers: int, sampler: str = "tpe") -> list[Sample]:
    """Run a study of trials that do nothing; look at it about twice a second.

    Raises
    ------
    RuntimeError
        if it does not end well.
    """
    folder.mkdir(parents=True)
    (folder / "space.py").write_text(SPACE.format(sampler=sampler))
    given = {"trials": n_trials, "max_concurrent": n_workers, "cpus": n_workers, "epochs": 1}
    command = [sys.executable, str(HELPERS / "stub_study.py"), str(folder), json.dumps(given)]
    environment = environment_of(private_tmp) | {"PYTHONPATH": str(ROOT)}
    with open(folder / "out", "w") as out:
        driver = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        samples = list(_watch(driver, folder))
    if driver.returncode or samples[-1].n_records < n_trials:
        raise RuntimeError((folder / "out").read_text())
    return samples


def _watch(driver: subprocess.Popen, folder: Path):  # type: ignore[no-untyped-def]
    began, process = None, psutil.Process(driver.pid)
    mb = cpu_s = workers_mb = 0.0
    while True:
        has_ended = driver.poll() is not None
        if not has_ended:
            try:
                mb, spent = process.memory_info().rss / 1e6, process.cpu_times()
                cpu_s = spent.user + spent.system
                workers_mb = max((_mb(one) for one in process.children(recursive=True)), default=0.0)
            except psutil.NoSuchProcess:
                pass
        n = sum(1 for _ in folder.glob("trials/*/record.json"))
        if n and began is None:
            began = time.perf_counter()
        if began is not None and n:
            yield Sample(n, time.perf_counter() - began, cpu_s, mb, workers_mb)
        if has_ended:
            return
        time.sleep(0.5)


def _mb(process: psutil.Process) -> float:
    """Return the resident memory of a Ray worker in MB; 0 of what is none, or is gone."""
    try:
        return process.memory_info().rss / 1e6 if process.cmdline()[0].startswith("ray::") else 0.0
    except (psutil.Error, IndexError):
        return 0.0


if __name__ == "__main__":
    app()
