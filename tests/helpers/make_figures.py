"""Studies made by hand for tests of figures."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from study.results.evidence import Evidence, Levels
from study.results.facts import Facts

EPOCHS = 4


def figure_evidence(
    ranks: tuple[int, ...] = (4, 16, 64),
    rates: tuple[float, ...] = (1e-4, 3e-4),
    rules: tuple[str, ...] = ("rsLoRA lora_alpha = 6",),
    seeds: tuple[int, ...] = (0, 1),
    n_voxels: tuple[int, ...] = (400,),
) -> Evidence:
    """A study made by hand: CC rises by 0.001 per doubling of rank, the gap by 0.002."""
    rng = np.random.default_rng(0)
    settings = list(product(ranks, rates, rules, seeds))
    used = pd.DataFrame(settings, columns=["rank", "lr", "scaling_rule", "seed"])
    n, log2 = len(used), np.log2(used["rank"].to_numpy(float))
    used.insert(0, "trial_id", [f"{i:04d}" for i in range(1, n + 1)])
    used = used.assign(phase="search", status="COMPLETE", method="lora", log2_rank=log2)
    used["cc_mean"] = 0.05 + 0.001 * log2 + 10 * used["lr"] * 0.1 + 0.002 * rng.standard_normal(n)
    used["adaptation_gap"] = 0.002 * log2 + 0.001 * rng.standard_normal(n)
    used = used.astype({"rank": "Int64", "cc_mean": "Float64", "adaptation_gap": "Float64"})
    subjects = {f"UTS{i:02d}": n for i, n in enumerate(n_voxels, 1)}
    facts = Facts(
        name="lora_rank", task="encoding", question="Does a higher rank help?", space="lora_rank", sampler="grid",
        is_adaptive=False, n_requested=n, n_searched=n, n_complete=n, n_failed=0, n_voxels=subjects,
        stories={"fit": ("a", "b", "c"), "validation": ("d", "e"), "test": ("f",)}, is_confirmed=True, looks=[],
        study={},
    )  # fmt: skip
    return Evidence(
        facts=facts,
        levels=Levels(0.051, 0.02, 0.06, 0.02, 0.31, 0.35),
        left_out="",
        trials=used,
        epochs=_epochs(used, rng),
        stories=pd.DataFrame(),
        used=used,
        by_rank=pd.concat([_by_rank(used, "cc_mean"), _by_rank(used, "adaptation_gap")]),
        rank_by_lr=used.groupby(["rank", "lr"])["cc_mean"].agg(n_trials="size", cc_mean="mean").reset_index(),
        slopes=pd.DataFrame(),
        importances=_importances(["rank", "lr", "seed"], [0.6, 0.3, 0.1], [0.4, 0.1, 0.0], [0.8, 0.5, 0.2], n),
        history=_history(used, "cc_mean"),
        varied=tuple(name for name in ("rank", "lr", "scaling_rule", "seed") if used[name].nunique() > 1),
        confirmed=_confirmed(used),
        voxels=_voxels(subjects, rng),
        best_id=str(used.loc[used["cc_mean"].astype(float).idxmax(), "trial_id"]),
        seconds=_seconds(used, rng),
        verdicts=(),
        warnings=(),
    )


def _importances(parameters: list[str], importance: Any, low: Any, high: Any, n_trials: int) -> pd.DataFrame:
    table = {"parameter": parameters, "importance": importance, "low": low, "high": high}
    return pd.DataFrame(table | {"n_trials": n_trials})


def _by_rank(used: pd.DataFrame, outcome: str) -> pd.DataFrame:
    means = used.groupby("rank")[outcome].agg(n_trials="size", mean="mean").reset_index()
    means = means.assign(outcome=outcome, covers="seeds and validation stories")
    return means.assign(low=means["mean"] - 0.0015, high=means["mean"] + 0.0015)


def _history(used: pd.DataFrame, score: str) -> pd.DataFrame:
    table = used[["trial_id"]].assign(number=range(1, len(used) + 1))
    return table.assign(value=used[score], best_so_far=used[score].cummax())


def _epochs(used: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for trial in used.to_dict("records"):
        for epoch in range(1, EPOCHS + 1):
            train = 3.0 - 0.1 * epoch * np.log2(trial["rank"]) * 0.3 + 0.02 * rng.standard_normal()
            rows.append(
                {name: trial[name] for name in ("trial_id", "phase", "rank", "lr", "seed")}
                | {"epoch": epoch, "mlm_loss_train": train, "mlm_loss_heldout": train + 0.05 * epoch, "is_used": True}
            )
    return pd.DataFrame(rows)


def _confirmed(used: pd.DataFrame) -> pd.DataFrame:
    best = used.sort_values("cc_mean", ascending=False).head(3).reset_index(drop=True)
    cc = best["cc_mean"].astype(float)
    about = {"look": 1, "trial_id": best["trial_id"], "is_winner": best.index == 0, "rank": best["rank"]}
    cc_of = {"lr": best["lr"], "cc_searched": cc, "cc_confirmed": cc - 0.002, "n_seeds": 3, "selection_bias": 0.002}
    tested = {"cc_test": 0.062, "frozen_test": 0.06, "gain_test": 0.002, "low": -0.001, "high": 0.005}
    return pd.DataFrame(about | cc_of | tested | {"unit": "time inside these stories"})


def _voxels(subjects: dict[str, int], rng: np.random.Generator) -> pd.DataFrame:
    tables = []
    for subject, n in subjects.items():
        frozen = np.clip(rng.gamma(1.5, 0.05, n) - 0.03, -0.1, 0.6)
        best = frozen + 0.004 + 0.01 * rng.standard_normal(n)
        tables.append(pd.DataFrame({"subject": subject, "voxel": range(n), "frozen": frozen, "best": best}))
    return pd.concat(tables, ignore_index=True)


def _seconds(used: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    base = pd.DataFrame({"trial_id": ["baseline-frozen", "baseline-word_rate"], "phase": "baseline"})
    late = pd.DataFrame({"trial_id": ["confirm-1", "test-1"], "phase": "confirm"})
    rows = pd.concat([base, used[["trial_id", "phase"]], late], ignore_index=True)
    parts = {"seconds_train": 40.0, "seconds_embed": 12.0, "seconds_ridge": 8.0, "seconds_other": 1.0}
    rows = rows.assign(**{name: size * rng.uniform(0.7, 1.3, len(rows)) for name, size in parts.items()})
    rows.loc[rows["phase"] == "baseline", "seconds_train"] = np.nan
    return rows.assign(seconds_total=rows[list(parts)].sum(axis=1))


def empty() -> Evidence:
    """A study in which nothing has ended yet; its tables have columns and no rows."""
    full = figure_evidence()
    tables = {name: value.iloc[:0] for name, value in full._asdict().items() if isinstance(value, pd.DataFrame)}
    return full._replace(**tables, levels=Levels(), varied=(), best_id=None)


def sampled() -> Evidence:
    """A search by TPE: 40 different ranks and rates."""
    rng = np.random.default_rng(1)
    ranks = tuple(int(rank) for rank in rng.permutation(np.arange(2, 65))[:40])
    evidence = figure_evidence(ranks, (1e-4,), seeds=(0,))
    used = evidence.used.assign(lr=10 ** rng.uniform(-4, -3.3, 40))
    used["scaling_rule"] = [f"lora_alpha = {value:.2f}" for value in rng.uniform(1, 99, 40)]
    cells = used[["rank", "lr", "cc_mean"]].assign(n_trials=1)
    adaptive = evidence.facts._replace(is_adaptive=True)
    return evidence._replace(used=used, rank_by_lr=cells, varied=("rank", "lr", "scaling_rule"), facts=adaptive)


def long_names() -> Evidence:
    """Long names with special characters."""
    evidence = figure_evidence(
        (4, 16), rules=("a rule of scaling, at great length, and longer yet", "$\\frac{x_1$ <script>")
    )
    names = {name: f"{name}_of_the_adapter_that_$\\alpha$_{'very_' * 9}long" for name in ("lr", "seed")}
    trial = {name: f"<script>alert(1)</script>-->{name}-\n嗨-{'x' * 60}" for name in evidence.used["trial_id"]}
    tables = {
        name: table.assign(trial_id=table["trial_id"].map(lambda name: trial.get(name, name)))
        for name, table in evidence._asdict().items()
        if isinstance(table, pd.DataFrame) and "trial_id" in table
    }
    used = tables.pop("used").rename(columns=names)
    used = used.assign(lr=evidence.used["lr"], **{f"extra_{i}_{'y' * 30}": np.arange(len(used)) for i in range(9)})
    voxels = evidence.voxels.replace("UTS01", f"$subject$ {'z' * 50} </svg>")
    parameters = [f"{i} {'parameter ' * 8}$" for i in range(20)]
    importances = _importances(parameters, np.linspace(0.5, 0, 20), np.nan, np.nan, 8)
    varied = tuple(name for name in used if str(name).startswith("extra")) + tuple(names.values())
    changed: dict[str, Any] = {"used": used, "voxels": voxels, "importances": importances, "varied": varied}
    return evidence._replace(**tables, **changed, best_id=trial[evidence.best_id or ""])


def wanting() -> Evidence:
    """Missing values wherever possible; one epoch; no baseline."""
    evidence = figure_evidence((4, 16), seeds=(0, 1, 2))
    used = evidence.used.assign(
        lr=[np.nan, *evidence.used["lr"][1:]], scaling_rule=[None, *evidence.used["scaling_rule"][1:]]
    )
    used.loc[[1, 5], ["cc_mean", "adaptation_gap"]] = pd.NA
    by_rank = evidence.by_rank.assign(low=np.nan, high=np.nan, covers=None)
    epochs = evidence.epochs[evidence.epochs["epoch"] == 1].assign(mlm_loss_heldout=np.nan)
    confirmed = evidence.confirmed.assign(cc_test=np.nan, gain_test=np.nan, low=np.nan, high=np.nan, unit=None)
    voxels = evidence.voxels.assign(frozen=evidence.voxels["frozen"].where(evidence.voxels["voxel"] % 3 > 0))
    seconds = evidence.seconds.assign(seconds_other=np.nan)
    tables = {"by_rank": by_rank, "epochs": epochs, "confirmed": confirmed, "voxels": voxels}
    return evidence._replace(used=used, **tables, levels=Levels(), seconds=seconds)


def of_text() -> Evidence:
    """A study of a classifier: accuracy, no voxels, losses of another name."""
    evidence = figure_evidence()
    used = evidence.used.rename(columns={"cc_mean": "accuracy"}).assign(accuracy=lambda rows: rows["accuracy"] * 10)
    used = used.drop(columns="adaptation_gap")
    nothing = {name: evidence._asdict()[name].iloc[:0] for name in ("by_rank", "rank_by_lr", "confirmed", "voxels")}
    of_study = evidence.facts._replace(task="classification", n_voxels={}, stories={})
    epochs = evidence.epochs.rename(columns={"mlm_loss_train": "loss_train", "mlm_loss_heldout": "loss_heldout"})
    tables = {"history": _history(used, "accuracy"), "used": used, "trials": used, "epochs": epochs}
    return evidence._replace(**tables, **nothing, facts=of_study, levels=Levels(0.5))


STUDIES = {
    "a small grid": figure_evidence(),
    "the whole grid": figure_evidence(
        (2, 4, 8, 16, 32, 64), (1e-4, 2e-4, 5e-4), ("lora_alpha = 2 r", "lora_alpha = 16", "rsLoRA lora_alpha = 6"),
        (0, 1, 2),
        (5000, 400, 300),
    ),
    "one trial": figure_evidence((8,), (2e-4,), seeds=(0,), n_voxels=(1,)),
    "a sampler": sampled(),
    "long names": long_names(),
    "missing values": wanting(),
    "text": of_text(),
}  # fmt: skip


WITHOUT_DATA = {  # study -> figure -> reason
    "one trial": {
        "rank_by_lr": "only one rank and one learning rate were tried",
        "parallel": "the search varied no hyperparameter",
    },
    "text": {
        "gap_by_rank": "no trial has a value of adaptation_gap",
        "rank_by_lr": "no complete searched LoRA trial has a CC",
        "confirmed": "no finalist was confirmed",
        "voxels": "text-only studies have no voxels",
        "voxel_pairs": "text-only studies have no voxels",
    },
}


def linear_rgb(colour: Any) -> list[float]:
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]


def luminance(colour: Any) -> float:
    """Relative luminance by WCAG 2.2."""
    red, green, blue = linear_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: Any, second: Any) -> float:
    """Contrast of two colours by WCAG 2.2."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
