"""Compare cross-validated ridge solvers on the same numbers: seconds, peak memory, and distance from float64.

python tests/benchmarks/compare_ridge.py [--size 8000 3072 5000] [--repeats 2] [--only ours huth ...]

Each runs in its own process, one after the other. The task: whole-story folds, one penalty per voxel by the mean
held-out correlation, then weights from all rows. Times cover that alone, best of the repeats.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from cyclopts import Parameter

ALPHAS = np.logspace(2, 8, 13)
N_FOLDS, ROWS_A_STORY, N_TEST = 5, 320, 1000
HIMALAYA = ((None, None), (None, 1), (5000, 1), (1000, 1))  # targets and alphas in a batch
CANDIDATES = (
    "float64",  # ours throughout in float64: the reference
    "ours",
    "huth",
    "scikit-learn",
    *(f"himalaya {backend} {at}" for backend in ("numpy", "torch") for at in range(len(HIMALAYA))),
    *(f"himalaya torch_cuda {at}" for at in range(len(HIMALAYA))),
)
app = cyclopts.App()
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@app.default
def main(
    *,
    size: tuple[int, int, int] = (8000, 3072, 5000),
    repeats: int = 2,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
) -> None:
    """Print a line a candidate, then the ratios.

    Parameters
    ----------
    size
        Rows, features and voxels.
    only
        Candidates whose names begin so; the reference always runs.
    """
    print(f"{machine()}; rows x features x voxels {size}, {N_FOLDS} folds, {len(ALPHAS)} alphas", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), *size)
        names = [n for n in CANDIDATES if n == "float64" or (runs_here(n) and any(map(n.startswith, only or ("",))))]
        results = {}
        for name in names:
            results[name] = measure(name, Path(folder), repeats)
            print(line(name, results[name], results["float64"]), flush=True)
    if "ours" in results:
        for rival in ("huth", "himalaya", "scikit-learn"):
            times = [r["seconds"] for n, r in results.items() if n.startswith(rival) and "seconds" in r]
            if times:
                print(f"{rival} at its best: {min(times) / results['ours']['seconds']:.1f} x the time of ours")


def machine() -> str:
    """Name processor, cores, GPU and libraries."""
    import torch

    model = next((row for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row), ": unknown")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{model.split(': ')[1]}, {os.cpu_count()} cores, {gpu}; torch {torch.__version__}, {platform.platform()}"


def runs_here(name: str) -> bool:
    """Whether a candidate's device is there."""
    import torch

    return "cuda" not in name or torch.cuda.is_available()


def make_problem(folder: Path, n: int, p: int, n_voxels: int) -> None:
    """Features with a steep spectrum and slow rows as BERT's have; a third of the voxels is noise alone."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((n + N_TEST, p), dtype=np.float32)
    latent[1:] = 0.6 * latent[:-1] + 0.8 * latent[1:]
    X = latent * np.arange(1, p + 1, dtype=np.float32) ** -0.7 @ rng.standard_normal((p, p), dtype=np.float32)
    X = (X - X[:n].mean(0)) / X[:n].std(0)
    Y = latent @ rng.standard_normal((p, n_voxels), dtype=np.float32) / np.sqrt(p)
    Y *= np.where(np.arange(n_voxels) % 3, rng.uniform(0.05, 0.5, n_voxels), 0).astype(np.float32)
    Y += rng.standard_normal(Y.shape, dtype=np.float32)
    Y = (Y - Y[:n].mean(0)) / Y[:n].std(0)
    stories = np.arange(n) // ROWS_A_STORY
    for name, array in {"X": X, "Y": Y, "folds": stories % N_FOLDS, "n": np.array(n)}.items():
        np.save(folder / f"{name}.npy", array)


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Run one candidate in its own process."""
    command = [sys.executable, __file__, "one", name, str(folder), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    with np.load(folder / f"{name}.npz") as arrays:
        return result | dict(arrays)


@app.command
def one(name: str, folder: Path, repeats: int) -> None:
    """Time one candidate and write its result."""
    logging.disable(logging.INFO)
    X, Y, folds, n = (np.load(folder / f"{name}.npy") for name in ("X", "Y", "folds", "n"))
    fit = choose(name)
    before = peak_gb()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        weights, alphas = fit(X[:n], Y[:n], folds)
        seconds.append(time.perf_counter() - began)
    np.savez(folder / f"{name}.npz", cc=correlations(Y[n:], X[n:] @ weights), alphas=alphas, cv_cc=CV_CC.get(name, 0))
    print(json.dumps({"seconds": min(seconds), "peak_gb": peak_gb() - before, "data_gb": (X.nbytes + Y.nbytes) / 1e9}))


CV_CC: dict[str, np.ndarray] = {}


def choose(name: str) -> Fit:
    """Return the function of a candidate."""
    kind, *rest = name.split()
    if kind == "himalaya":
        return lambda X, Y, folds: himalaya(X, Y, folds, rest[0], *HIMALAYA[int(rest[1])])
    return {"huth": huth, "scikit-learn": scikit_learn}.get(
        kind, lambda X, Y, folds: ours(X, Y, folds, "float64" if kind == "float64" else "auto")
    )


def ours(X: np.ndarray, Y: np.ndarray, folds: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and alphas of this project's ridge."""
    from bert_encoding.core.devices import pick_device
    from bert_encoding.regression.ridge import CrossValidatedRidge

    grid = tuple(map(float, ALPHAS))
    fit = CrossValidatedRidge(X, folds, grid, device=pick_device(), precision=precision).fit(Y)
    CV_CC[precision] = fit.cv_cc
    return fit.weights, fit.ridge_alphas


def himalaya(
    X: np.ndarray, Y: np.ndarray, folds: np.ndarray, backend: str, targets: int | None, alphas: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and alphas of himalaya's RidgeCV."""
    from himalaya.backend import set_backend
    from himalaya.ridge import RidgeCV
    from himalaya.scoring import correlation_score
    from sklearn.model_selection import PredefinedSplit

    backend_used = set_backend(backend)
    solver = {
        "score_func": correlation_score,
        "local_alpha": True,
        "n_targets_batch": targets,
        "n_alphas_batch": alphas,
        "warn": False,
    }
    model = RidgeCV(alphas=ALPHAS.astype(np.float32), cv=PredefinedSplit(folds), solver_params=solver)
    model.fit(X.astype(np.float32), Y.astype(np.float32))
    return backend_used.to_numpy(model.coef_), backend_used.to_numpy(model.best_alphas_)


def huth(X: np.ndarray, Y: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and alphas of the Huth lab's code; its alphas are the roots of ours."""
    from ridge_utils.ridge import ridge, ridge_corr

    roots = np.sqrt(ALPHAS).astype(np.float32)
    cc = np.zeros((len(ALPHAS), Y.shape[1]))
    for fold in range(N_FOLDS):
        out = folds == fold
        cc += ridge_corr(X[~out], X[out], Y[~out], Y[out], roots, use_corr=True)
    alphas = ALPHAS[cc.argmax(axis=0)]
    return ridge(X, Y, np.sqrt(alphas).astype(np.float32)), alphas


def scikit_learn(X: np.ndarray, Y: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and alphas of scikit-learn's Ridge in plain loops."""
    from sklearn.linear_model import Ridge

    cc = np.zeros((len(ALPHAS), Y.shape[1]))
    for fold in range(N_FOLDS):
        out = folds == fold
        for row, alpha in enumerate(ALPHAS):
            model = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(X[~out], Y[~out])
            cc[row] += correlations(Y[out], model.predict(X[out]))
    alphas = ALPHAS[cc.argmax(axis=0)]
    weights = np.empty((X.shape[1], Y.shape[1]), np.float32)
    for alpha in np.unique(alphas):
        mine = alphas == alpha
        weights[:, mine] = np.atleast_2d(
            Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(X, Y[:, mine]).coef_
        ).T
    return weights, alphas


def correlations(Y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the CC of each voxel."""
    y, p = (a - a.mean(axis=0) for a in (Y, predicted))
    return np.einsum("tv,tv->v", y, p) / (np.linalg.norm(y, axis=0) * np.linalg.norm(p, axis=0))


def line(name: str, result: dict[str, Any], exact: dict[str, Any]) -> str:
    """Return one row of the table."""
    if "failed" in result:
        return f"{name:24s} failed: {result['failed']}"
    row_of = np.abs(np.log(result["alphas"][:, None] / ALPHAS)).argmin(axis=1)
    loss = exact["cv_cc"].max(axis=0) - exact["cv_cc"][row_of, np.arange(len(row_of))]
    as_good = np.mean(loss <= 1e-4)
    differ = np.abs(np.log(result["alphas"] / exact["alphas"])) > 1e-3
    return (
        f"{name:24s} {result['seconds']:7.1f} s  peak +{result['peak_gb']:.2f} GB  mean CC {result['cc'].mean():.6f} "
        f"(off by {abs(result['cc'].mean() - exact['cc'].mean()):.1e})  same alpha {1 - differ.mean():.2%}, "
        f"or as good {as_good:.2%}"
    )


def peak_gb() -> float:
    """Return the peak resident memory of this process; unlike getrusage, without its parent's."""
    (peak,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(peak.split()[1]) / 1e6


if __name__ == "__main__":
    app()
