"""Trial records with a planted truth: a study that nobody ran, as large as a real one.

``fake_records(Truth(...), Plan(...), seed)`` gives records, ``tables`` the tables of them, ``write_fake_study`` a
folder like one that ``study/run.py`` leaves, with baselines, epochs, stories, a confirm phase and CC over voxels.
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.core.files import content_key, write_json
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, write_record
from bert_encoding.trial.tables import rows_frame, trials_frame, write_tables

RSLORA, TWICE, FIXED = "rslora", "2r", "fixed"
_BASE = asdict(TrialConfig(model="tiny", epochs=5))


@dataclass(frozen=True)
class Truth:
    """What is planted; CC.

    Attributes
    ----------
    effect : of rank over its range on held-out CC; ``bend``: of the middle beside both ends
    gap : of rank over its range on the adaptation gap
    lr_effect : of the learning rate over the range of ``Plan.lrs``
    by_lr : effect of rank at the highest rate less that at the lowest, about none in the mean
    tuning : of the lowest rank against frozen
    sd_trial : of a trial, common to its stories; ``sd_noise``: of a trial in a story, besides
    sd_seed : of a seed, common to its trials
    sd_slope : of the effect of rank between stories; ``sd_story``: of the level of stories
    """

    effect: float = 0.0
    gap: float = 0.0
    bend: float = 0.0
    by_lr: float = 0.0
    lr_effect: float = 0.003
    tuning: float = 0.002
    sd_trial: float = 0.0019
    sd_noise: float = 0.001
    sd_seed: float = 0.001
    sd_slope: float = 0.0005
    sd_story: float = 0.02
    frozen: float = 0.18


@dataclass(frozen=True)
class Plan:
    """Which trials are run, and on what they are judged; the defaults are those of ``lora_rank``."""

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    rules: tuple[str, ...] = (RSLORA, TWICE, FIXED)
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    n_stories: int = 8
    n_test: int = 3
    subjects: tuple[str, ...] = ("s1",)

    @property
    def points(self) -> list[dict[str, Any]]:
        """All settings of the grid, each with each seed."""
        grid = product(self.seeds, self.ranks, self.rules, self.lrs)
        return [{"seed": seed, "rank": rank, "rule": rule, "lr": lr} for seed, rank, rule, lr in grid]


FULL = Plan()
SMALL = Plan(ranks=(4, 16, 64), rules=(RSLORA,), lrs=(2e-4, 6e-4), seeds=(0, 1), n_stories=3)


class Listener:
    """Scores settings: the same stories and seeds for all of them."""

    def __init__(self, truth: Truth, plan: Plan, seed: int) -> None:
        self.truth, self.plan = truth, plan
        self.rng = np.random.default_rng(seed)
        n, self.names = plan.n_stories, [f"story{at:02d}" for at in range(plan.n_stories)]
        self.level = truth.frozen + truth.sd_story * self.rng.standard_normal(n)
        self.slope = truth.effect + truth.sd_slope * self.rng.standard_normal(n)
        self.of_seed = {s: truth.sd_seed * self.rng.standard_normal() for s in range(-1, 1000)}

    def of_stories(self, point: dict[str, Any]) -> np.ndarray:
        """Return a trial's CC inside each validation story, (n_stories,)."""
        truth, x = self.truth, self.place(point)
        lrs = np.log10(self.plan.lrs)
        of_lr = truth.lr_effect * (np.log10(point["lr"]) - lrs.min()) / (np.ptp(lrs) or 1)
        common = truth.tuning + of_lr + truth.bend * (1 - (2 * x - 1) ** 2) + self.of_seed[point["seed"]]
        common += truth.by_lr * x * ((np.log10(point["lr"]) - lrs.min()) / (np.ptp(lrs) or 1) - 0.5)
        noise = truth.sd_noise * self.rng.standard_normal(len(self.names))
        return self.level + common + self.slope * x + truth.sd_trial * self.rng.standard_normal() + noise

    def place(self, point: dict[str, Any]) -> float:
        """Return where a rank lies in the range, from 0 to 1."""
        x = np.log2(self.plan.ranks)
        return float((np.log2(point["rank"]) - x.min()) / (np.ptp(x) or 1))


def fake_records(
    truth: Truth | None = None, plan: Plan = FULL, seed: int = 0, points: list[dict[str, Any]] | None = None
) -> list[TrialRecord]:
    """Return the baselines and a record a point, without epochs and voxels."""
    truth = truth or Truth()
    listener = Listener(truth, plan, seed)
    records = [_baseline(listener, "frozen", listener.level), _baseline(listener, "word_rate", listener.level / 3)]
    chosen = plan.points if points is None else points
    return records + [trial(listener, point, f"{at:04d}") for at, point in enumerate(chosen, 1)]


def tables(records: list[TrialRecord]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and stories."""
    return trials_frame(records), rows_frame(records, "stories")


def trial(listener: Listener, point: dict[str, Any], trial_id: str, phase: str = "search") -> TrialRecord:
    """Return the record of a LoRA trial."""
    cc, rng, x = listener.of_stories(point), listener.rng, listener.place(point)
    rank, rule = point["rank"], point["rule"]
    alpha = {RSLORA: 6.0, TWICE: 2.0 * rank, FIXED: 18.0}[rule]
    config = {"lora_scaling": "rslora" if rule == RSLORA else "standard", "lora_alpha": alpha}
    config = _BASE | {name: point[name] for name in ("rank", "lr", "seed")} | config
    gap = 0.001 + listener.truth.gap * x + 0.0005 * rng.standard_normal()
    heldout = 4.3 - 0.1 * x + 0.01 * rng.standard_normal()
    scores: dict[str, Any] = {
        **{"cc_mean": cc.mean(), "cc_median": cc.mean() - 0.01, "cc_seen": cc.mean() + 0.05 + gap},
        **{"mlm_loss_train": heldout - 0.2 - 0.2 * x, "mlm_loss_heldout": heldout, "probe_loss_before": 4.0},
        **{"probe_loss_after": 4.02 + 0.05 * x + 0.005 * rng.standard_normal(), "delta_norm": 1.0 + x},
        **{"epochs_done": 5.0, "epoch_best": float(5 - round(2 * x)), "optimizer_steps": 100.0},
        **{"tokens_seen": 400_000.0, "n_trainable": 9216.0 * rank, "layer": 2.0},
    }
    params = {name: point[name] for name in ("rank", "lr")} | {"alpha_rule": rule}
    seconds = {"train": 50.0 + rank / 8, "embed": 9.0, "ridge": 6.0, "total": 67.0 + rank / 8}
    return TrialRecord(
        "COMPLETE", "lora", config, trial_id, phase, key=content_key(config), params=params, scores=scores,
        stories=_story_rows(listener, cc, "validation"), seconds=seconds, node="here",
    )  # fmt: skip


def _baseline(listener: Listener, method: str, cc: np.ndarray) -> TrialRecord:
    scores = {"cc_mean": cc.mean(), "cc_seen": cc.mean() + 0.05, "mlm_loss_heldout": 4.5, "mlm_loss_train": 4.5}
    return TrialRecord(
        "COMPLETE", method, _BASE | {"method": method}, f"baseline-{method}", "baseline", scores=scores,
        stories=_story_rows(listener, cc, "validation"), seconds={"embed": 3.0, "ridge": 6.0, "total": 9.5},
        node="here",
    )  # fmt: skip


def _story_rows(listener: Listener, cc: np.ndarray, role: str) -> list[dict[str, Any]]:
    names = listener.names if role == "validation" else [f"test{at}" for at in range(len(cc))]
    shifts = np.linspace(-0.01, 0.01, len(listener.plan.subjects)) if len(listener.plan.subjects) > 1 else [0.0]
    return [
        {"split": 0, "role": role, "subject": subject, "story": name, "cc_mean": value + shift}
        for subject, shift in zip(listener.plan.subjects, shifts, strict=True)
        for name, value in zip(names, cc, strict=True)
    ]


def draw(truth: Truth, plan: Plan, points: list[dict[str, Any]], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and stories of what ``fake_records`` would give, with the columns that the verdict needs alone."""
    rng = np.random.default_rng(seed)
    ranks, lrs, seeds = (np.array([point[name] for point in points], float) for name in ("rank", "lr", "seed"))
    rules = np.array([point["rule"] for point in points])
    x = (np.log2(ranks) - np.log2(min(plan.ranks))) / (np.log2(max(plan.ranks)) - np.log2(min(plan.ranks)))
    of_lr = np.log10(lrs / min(plan.lrs)) / np.log10(max(plan.lrs) / min(plan.lrs)) if len(plan.lrs) > 1 else 0 * lrs
    n, n_stories = len(points), plan.n_stories
    of_seed = dict(zip(np.unique(seeds), truth.sd_seed * rng.standard_normal(n), strict=False))
    common = truth.tuning + truth.lr_effect * of_lr + truth.bend * (1 - (2 * x - 1) ** 2)
    common = common + truth.by_lr * x * (of_lr - 0.5)
    common = common + np.array([of_seed[one] for one in seeds]) + truth.sd_trial * rng.standard_normal(n)
    level = truth.frozen + truth.sd_story * rng.standard_normal(n_stories)
    slope = truth.effect + truth.sd_slope * rng.standard_normal(n_stories)
    cc = level + common[:, None] + np.outer(x, slope) + truth.sd_noise * rng.standard_normal((n, n_stories))
    return frames(cc, 0.001 + truth.gap * x + 0.0005 * rng.standard_normal(n), ranks, lrs, seeds, rules)


def draw_adaptive(truth: Truth, plan: Plan, n_trials: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and stories of a search that goes where it has seen high scores, as TPE does.

    After ten random points, four of five stay beside one of the best quarter; one rule, one seed.
    """
    rng = np.random.default_rng(seed)
    level = truth.frozen + truth.sd_story * rng.standard_normal(plan.n_stories)
    slope = truth.effect + truth.sd_slope * rng.standard_normal(plan.n_stories)
    at = np.zeros((n_trials, 2), int)  # places of rank and learning rate
    cc, sizes = np.zeros((n_trials, plan.n_stories)), np.array([len(plan.ranks), len(plan.lrs)])
    for i in range(n_trials):
        at[i] = rng.integers(sizes)
        if i >= 10 and rng.random() < 0.8:
            best = np.argsort(-cc[:i].mean(axis=1))[: max(1, i // 4)]
            at[i] = np.clip(at[rng.choice(best)] + rng.integers(-1, 2, size=2) * (rng.random(2) < 0.3), 0, sizes - 1)
        x, of_lr = at[i] / (sizes - 1)
        common = truth.tuning + truth.lr_effect * of_lr + truth.sd_trial * rng.standard_normal()
        cc[i] = level + common + slope * x + truth.sd_noise * rng.standard_normal(plan.n_stories)
    gap = 0.001 + truth.gap * at[:, 0] / (sizes[0] - 1) + 0.0005 * rng.standard_normal(n_trials)
    ranks, lrs = np.array(plan.ranks, float)[at[:, 0]], np.array(plan.lrs)[at[:, 1]]
    return frames(cc, gap, ranks, lrs, np.zeros(n_trials), np.array([RSLORA] * n_trials))


def frames(
    cc: np.ndarray, gap: np.ndarray, ranks: np.ndarray, lrs: np.ndarray, seeds: np.ndarray, rules: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and stories of given CC, (n_trials, n_stories)."""
    ids = np.array([f"{at:04d}" for at in range(1, len(cc) + 1)])
    alpha = np.select([rules == RSLORA, rules == TWICE], [6.0, 2 * ranks], 18.0)
    scaling = alpha / np.where(rules == RSLORA, np.sqrt(ranks), ranks)
    trials = pd.DataFrame(
        {
            "trial_id": ids, "phase": "search", "status": "COMPLETE", "repeat_of": None, "method": "lora",
            "rank": ranks, "lora_alpha": alpha, "scaling": scaling, "target_modules": "q,v", "lr": lrs, "seed": seeds,
            "optimizer_steps": 100.0, "cc_mean": cc.mean(axis=1), "adaptation_gap": gap,
            "cc_seen": cc.mean(axis=1) + 0.05 + gap,
            **dict.fromkeys("mlm_loss_train mlm_loss_heldout probe_loss_before probe_loss_after".split(), np.nan),
        }
    )  # fmt: skip
    n_stories = cc.shape[1]
    names = np.array([f"story{at:02d}" for at in range(n_stories)])
    columns = {"trial_id": np.repeat(ids, n_stories), "split": 0, "role": "validation", "subject": "s1"}
    return trials, pd.DataFrame(columns | {"story": np.tile(names, len(ids)), "cc_mean": cc.ravel()})


def write_fake_study(
    folder: Path,
    truth: Truth | None = None,
    plan: Plan = FULL,
    seed: int = 0,
    *,
    name: str | None = None,
    sampler: str = "grid",
    confirm: bool = True,
    odd: bool = True,
    n_voxels: int = 200,
) -> Path:
    """Write a finished study and return its folder.

    Parameters
    ----------
    confirm : the best two were confirmed and scored on ``plan.n_test`` test stories
    odd : add a failed, a stopped, a repeated and a fully tuned trial
    """
    truth = truth or Truth()
    listener = Listener(truth, plan, seed)
    records = fake_records(truth, plan, seed)
    records = [_with_epochs(listener, record) for record in records]
    if odd:
        records += _odd_trials(records)
    looks = []
    if confirm:
        confirmed, fixed = _confirm(listener, records, name or folder.name)
        records += confirmed
        looks.append(fixed)
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        write_record(folder, _with_voxels(listener, record, n_voxels) if record.status == "COMPLETE" else record)
    for fixed in looks:
        write_json(folder / "confirm.json", fixed)
    n_searched = sum(record.phase == "search" for record in records)
    write_json(folder / "study.json", _study(name or folder.name, plan, sampler, n_searched, n_voxels))
    write_tables(folder, records)
    return folder


def _with_epochs(listener: Listener, record: TrialRecord) -> TrialRecord:
    if record.method != "lora":
        return replace(record, epochs=[{"epoch": 0.0, "cc_mean": record.scores["cc_mean"], "seconds": 5.0}])
    away = {"cc_mean": -0.0005, "mlm_loss_train": 0.08, "mlm_loss_heldout": 0.03}  # per epoch before the last
    epochs = [
        {"epoch": float(epoch), "seconds": 12.0 * epoch}
        | {name: record.scores[name] + change * (5 - epoch) for name, change in away.items()}
        for epoch in range(1, 6)
    ]
    return replace(record, epochs=epochs)


def _odd_trials(records: list[TrialRecord]) -> list[TrialRecord]:
    one, n = records[2], len(records) - 2
    error = "Traceback (most recent call last):\n  ...\nFloatingPointError: loss is nan at step 3"
    failed = replace(one, trial_id=f"{n + 1:04d}", status="FAILED", scores={}, epochs=[], stories=[], error=error)
    stopped = replace(one, trial_id=f"{n + 2:04d}", status="STOPPED", epochs=one.epochs[:2])
    repeat = replace(one, trial_id=f"{n + 3:04d}", repeat_of=one.trial_id)
    full = replace(one, trial_id=f"{n + 4:04d}", method="full", config=one.config | {"method": "full"})
    return [failed, stopped, repeat, full]


def _confirm(listener: Listener, records: list[TrialRecord], name: str) -> tuple[list[TrialRecord], dict[str, Any]]:
    """Return the trials of the confirm phase, and what ``confirm.json`` holds."""
    rng, seeds, n_test = listener.rng, [901, 902], listener.plan.n_test
    level = listener.truth.frozen + 0.02 * rng.standard_normal(n_test)
    searched = [r for r in records if r.phase == "search" and r.status == "COMPLETE" and r.repeat_of is None]
    best = sorted((r for r in searched if r.method == "lora"), key=lambda r: -r.scores["cc_mean"])[:2]
    trials = [_on_test(listener, r, level if r.method == "frozen" else level / 3) for r in records[:2]]
    finalists = []
    for one in best:
        point = {"rank": one.config["rank"], "lr": one.config["lr"], "rule": one.params["alpha_rule"]}
        fresh = [trial(listener, {**point, "seed": s}, f"confirm-{one.trial_id}-seed{s}", "confirm") for s in seeds]
        cc = {str(s): float(r.scores["cc_mean"]) for s, r in zip(seeds, fresh, strict=True)}
        gain = listener.truth.tuning + listener.truth.effect * listener.place(point)
        test = _on_test(listener, one, level + gain + 0.0005 * rng.standard_normal(n_test))
        trials += [*fresh, test]
        scores = {"cc_searched": float(one.scores["cc_mean"]), "cc_of_seed": cc}
        finalists.append({"trial_id": one.trial_id, **scores, "cc_confirmed": float(np.mean(list(cc.values())))})
    winner = max(finalists, key=lambda one: one["cc_confirmed"])["trial_id"]
    fixed = {
        "look": 1, "at": "2026-01-31T12:00:00+00:00", "study": name, "data": "abc", "n_searched": len(searched),
        "test_stories": [f"test{at}" for at in range(n_test)], "asked": 2, "seeds": seeds, "finalists": finalists,
        "winner": winner, "looks": [], "code": "c0de", "git": None,
    }  # fmt: skip
    return trials, fixed


def _on_test(listener: Listener, record: TrialRecord, cc: np.ndarray) -> TrialRecord:
    """Return a trial scored on the test stories, with resamples of time that are paired between trials."""
    time = 0.004 * np.random.default_rng(5).standard_normal(500)  # common to all: pairs differ by a constant and noise
    replicates = np.append(cc.mean(), cc.mean() + time + 0.0008 * listener.rng.standard_normal(500))
    subjects = listener.plan.subjects
    of_stories = {f"test/story/test{at}/{s}": np.full(2, value) for at, value in enumerate(cc) for s in subjects}
    return replace(
        record, trial_id=f"test-{record.trial_id}", phase="confirm", params={}, epochs=[],
        scores={"cc_test": cc.mean(), "cc_test_low": cc.mean() - 0.01, "cc_test_high": cc.mean() + 0.01},
        stories=_story_rows(listener, cc, "test"),
        details={f"test/replicates/{subject}": replicates for subject in subjects} | of_stories,
    )  # fmt: skip


def _with_voxels(listener: Listener, record: TrialRecord, n: int) -> TrialRecord:
    """Return the record with a CC over voxels; the first is masked out. The frozen baseline knows the ceiling."""
    if record.phase == "confirm":
        return record
    pattern = np.random.default_rng(1).gamma(2.0, 0.5, n) - 1.0
    cc = record.scores["cc_mean"] + 0.1 * pattern + 0.01 * listener.rng.standard_normal(n)
    cc[0] = np.nan
    ceiling = (0.5 + 0.1 * pattern).astype(np.float32)
    subjects = listener.plan.subjects
    details = {f"validation/cc_max/story00/{s}": ceiling for s in subjects} if record.method == "frozen" else {}
    return replace(record, cc={s: cc.astype(np.float32) for s in subjects}, details=details)


def _study(name: str, plan: Plan, sampler: str, n_searched: int, n_voxels: int) -> dict[str, Any]:
    names = [f"story{at:02d}" for at in range(plan.n_stories)]
    fit = [f"fit{at:02d}" for at in range(12)]
    options = {
        "space": "lora_rank", "data": "demo", "model": "minilm", "layer": None, "trim": "published", "voxels": "all",
        "trust_alignment": False, "subjects": None, "train_stories": None, "test_stories": None, "trials": n_searched,
        "epochs": 5, "seed": 0, "sampler": sampler, "scheduler": "none", "outer_folds": 1, "mlm_text": "fit",
        "baselines": [], "static_vectors": "", "probe": "", "control_text": "", "train_examples": None,
        "examples": None, "max_length": None, "clean": False, "keep_adapters": 5, "confirm": 2, "confirm_seeds": 2,
    }  # fmt: skip
    changes = {
        "name": name, "config": _BASE, "options": options, "model": {"name": "minilm", "weights": "beef"},
        "space": {"name": "lora_rank", "hash": "0123", "source": '"""Does a higher rank help?\n\nMore."""\n'},
        "splits": [{"fit": fit, "validation": names, "test": [f"test{at}" for at in range(plan.n_test)]}],
        "general_text": {"probe": "bundled", "control_text": "bundled"},
    }  # fmt: skip
    n_of = {"n_voxels": dict.fromkeys(plan.subjects, n_voxels)}
    study = study_json(**changes)
    return study | {"data": study["data"] | {"source": "demo", "fingerprint": "abc"} | n_of}


def study_json(**changes: Any) -> dict[str, Any]:
    """Content of ``study.json``, of a study on stories."""
    return {
        "name": "mine",
        "task": "encoding",
        "created": "2026-01-31T10:00:00+00:00",
        "command_line": ["study/run.py", "--space", "lora rank"],
        "code": "c0de",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "python": "3.11.7",
        "platform": "Linux",
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "space": {"name": "lora_rank", "hash": "5face", "source": '"""Does rank help?"""\nEPOCHS = 3\n'},
        "model": {"name": "tiny", "weights": "abc"},
        "config": asdict(TrialConfig(model="tiny")),
        "precision": "bfloat16",
        "options": {"trials": 3, "sampler": "grid", "scheduler": "none", "seed": 0, "confirm": 0, "epochs": 3},
        "data": {"source": "/data/lab", "fingerprint": "f1", "n_voxels": {"s1": 300}, "trim_trs": [10, 5], "notes": []},
        "voxels": {"asked": "all", "key": "k"},
        "splits": [{"fit": ["a", "b", "c"], "validation": ["d"], "test": ["e", "f"]}],
        "general_text": {},
    } | changes
