"""The trials that analyses of rank include, and their outcomes rank by rank."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bert_encoding.core.names import COMPLETE, FAILED, LORA, SEARCH, STOPPED, Metric

OUTCOMES = (
    "cc_mean adaptation_gap mlm_loss_train mlm_loss_heldout loss_gap forgetting delta_norm epoch_best accuracy macro_f1"
).split()
BY_RANK = "outcome rank n_trials n_seeds n_stories mean low high sd_seeds covers".split()
RANK_BY_LR = "rank lr n_trials cc_mean".split()
SETTING = "rank lr scaling target_modules optimizer_steps".split()  # trials that agree in these differ by seed alone
NUMBERS = "rank lora_alpha scaling lr optimizer_steps seed".split()
FEW_LEVELS = 4
LEVEL = 0.95


def typed_table(rows: Iterable[Any], columns: Sequence[str], text: str = "", counts: str = "") -> pd.DataFrame:
    """Return a table whose types are the same with and without rows.

    Columns in ``text`` are object, those in ``counts`` and all ``n_...`` int64, ``is_...`` bool, the others float64.
    """

    def type_of(name: str) -> str:
        if name in text.split():
            return "object"
        if name.startswith("n_") or name in counts.split():
            return "int64"
        return "bool" if name.startswith("is_") else "float64"

    return pd.DataFrame(rows, columns=list(columns)).astype({name: type_of(name) for name in columns})


def used_trials(trials: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the complete searched LoRA trials that repeat no other, and in words which searched trials are left out.

    Further columns are ``log2_rank``, ``log10_lr``, ``log2_scaling``, ``scaling_rule``, ``loss_gap`` (held-out minus
    training masked-LM loss, nats) and ``forgetting`` (probe loss after minus before, nats). Numbers are float64.
    """
    searched = trials[trials["phase"] == SEARCH]
    applies = {
        "failed": searched["status"] == FAILED,
        "stopped early": searched["status"] == STOPPED,
        "repeated": searched["repeat_of"].notna(),
        "not LoRA": searched["method"] != LORA,
    }
    reasons = np.select([column.to_numpy(bool) for column in applies.values()], list(applies), "")
    counts = [(int((reasons == reason).sum()), reason) for reason in applies]
    used = searched[(reasons == "") & (searched["status"] == COMPLETE).to_numpy(bool)].reset_index(drop=True)
    return _with_derived(used), ", ".join(f"{n} {reason}" for n, reason in counts if n)


def _with_derived(used: pd.DataFrame) -> pd.DataFrame:
    used = used.copy()
    for name in (*NUMBERS, *OUTCOMES, "probe_loss_before", "probe_loss_after", "cc_seen"):
        if name in used:
            used[name] = used[name].astype("Float64").to_numpy(float, na_value=np.nan)
    used["log2_rank"], used["log10_lr"] = np.log2(used["rank"]), np.log10(used["lr"])
    used["log2_scaling"] = np.log2(used["scaling"])
    used["scaling_rule"] = _scaling_rules(used)
    used["loss_gap"] = used["mlm_loss_heldout"] - used["mlm_loss_train"]
    used["forgetting"] = used["probe_loss_after"] - used["probe_loss_before"]
    return used


def _scaling_rules(used: pd.DataFrame) -> list[str]:
    """Name how the scaling of the update follows from rank: constant lora_alpha, constant lora_alpha / r, or rsLoRA.

    With a single rank both are constant; ``lora_alpha = k r`` is then preferred if other ranks share k. At rank 1 all
    rules agree; it counts as standard unless some trial scales by rsLoRA.
    """
    ratios = (used["lora_alpha"] / used["rank"]).round(6)
    standard = np.isclose(used["scaling"], used["lora_alpha"] / used["rank"], rtol=1e-6) & (used["rank"] > 1)
    n_ranks_of_ratio = used[standard].groupby(ratios[standard])["rank"].nunique()
    n_ranks_of_alpha = used[standard].groupby(used["lora_alpha"][standard])["rank"].nunique()
    all_standard = not (used["scaling"] != used["lora_alpha"] / used["rank"]).any()
    names = []
    for is_standard, lora_alpha, ratio in zip(standard, used["lora_alpha"], ratios, strict=True):
        if not is_standard and not (lora_alpha == ratio and all_standard):
            names.append(f"rsLoRA lora_alpha = {lora_alpha:g}")
        elif n_ranks_of_alpha.get(lora_alpha, 0) > n_ranks_of_ratio.get(ratio, 0):
            names.append(f"lora_alpha = {lora_alpha:g}")
        else:
            names.append(f"lora_alpha = {ratio:g} r")
    return names


def story_table(stories: pd.DataFrame, trial_ids: list[str], role: str = "validation") -> pd.DataFrame:
    """Return the CC inside each story, one row per trial in the given order and one column per story.

    Subjects and outer folds are averaged within each story first. Stories that some trial lacks are left out.
    """
    if stories.empty:
        return pd.DataFrame(index=pd.Index(trial_ids))
    rows = stories[(stories["role"] == role) & stories["trial_id"].isin(trial_ids)]
    table = rows.groupby(["trial_id", "story"])["cc_mean"].mean().unstack("story").reindex(trial_ids)
    return table.dropna(axis="columns")


def story_gains(
    stories: pd.DataFrame, trial_ids: list[str], frozen_id: str | None, role: str = "validation"
) -> np.ndarray:
    """Return the CC inside each story minus that of the frozen baseline, (n_trials, n_stories)."""
    if frozen_id is None:
        return np.empty((len(trial_ids), 0))
    table = story_table(stories, [*trial_ids, frozen_id], role)
    return (table.loc[trial_ids] - table.loc[frozen_id]).to_numpy(float)


def by_rank(used: pd.DataFrame, stories: pd.DataFrame) -> pd.DataFrame:
    """Return mean and 95% interval of each outcome, one row per outcome and rank; columns as in ``BY_RANK``.

    The interval of ``cc_mean`` adds two variances: between replicates of a setting (seeds), and between validation
    stories of the difference from the other ranks. The level of a story, common to all ranks, is removed, so that
    intervals of two ranks can be compared; they do not cover the CC of other stories. Other outcomes vary by seed only.
    """
    n_validation, story_half_widths = _story_half_widths(used, stories)
    rows = []
    for outcome in (name for name in OUTCOMES if name in used):
        known = used[used[outcome].notna()]
        sd, df = seed_spread(known, outcome)
        n_stories = n_validation if outcome == "cc_mean" else 0
        covers = f"seeds and {n_stories} validation stories" if n_stories > 1 else "seeds"
        for rank, trials in known.groupby("rank"):
            part = story_half_widths.get(rank, 0.0) if outcome == "cc_mean" else 0.0
            half = np.hypot(student.ppf((1 + LEVEL) / 2, df) * sd / np.sqrt(len(trials)), part) if df else np.nan
            mean, n_seeds = trials[outcome].mean(), trials["seed"].nunique()
            rows.append((outcome, rank, len(trials), n_seeds, n_stories, mean, mean - half, mean + half, sd, covers))
    return typed_table(rows, BY_RANK, "outcome covers")


def seed_spread(used: pd.DataFrame, outcome: str = "cc_mean") -> tuple[float, int]:
    """Return the SD of an outcome between seeds of one setting, pooled over settings, and its degrees of freedom.

    NaN and 0 if no setting was run with two seeds.
    """
    grouped = used.groupby([name for name in SETTING if name in used], dropna=False)[outcome]
    df = len(used) - grouped.ngroups
    if df < 1:
        return np.nan, 0
    deviations = used[outcome] - grouped.transform("mean")
    return float(np.sqrt((deviations**2).sum() / df)), df


def _story_half_widths(used: pd.DataFrame, stories: pd.DataFrame) -> tuple[int, dict[Any, float]]:
    """Return the number of stories, and by rank half the 95% interval over stories of its difference from the mean."""
    table = story_table(stories, used["trial_id"].tolist())
    n = table.shape[1]
    if n < 2:
        return n, {}
    of_rank = table.groupby(used["rank"].to_numpy()).mean()  # (n_ranks, n_stories)
    difference = of_rank - of_rank.mean(axis="index")
    return n, dict(student.ppf((1 + LEVEL) / 2, n - 1) * difference.std(axis="columns", ddof=1) / np.sqrt(n))


def rank_by_lr(used: pd.DataFrame) -> pd.DataFrame:
    """Return the mean CC per rank and learning rate; columns as in ``RANK_BY_LR``."""
    cells = used.groupby(["rank", "lr"])["cc_mean"].agg(n_trials="count", cc_mean="mean").reset_index()
    return typed_table(cells, RANK_BY_LR)


def history(trials: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the complete searched trials in order, with the best score so far."""
    is_complete = (trials["phase"] == SEARCH) & (trials["status"] == COMPLETE)
    searched = trials[is_complete & trials[metric.column].notna()].sort_values("trial_id")
    value = searched[metric.column].to_numpy(float)
    best = np.maximum.accumulate(value) if metric.is_gain else np.minimum.accumulate(value)
    number = np.arange(1, len(value) + 1)
    ids = searched["trial_id"].to_numpy(str)
    return pd.DataFrame({"number": number, "trial_id": ids, "value": value, "best_so_far": best})
