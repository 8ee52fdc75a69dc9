"""Which trials tell something of rank, and what they show rank by rank."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bert_encoding.core.names import COMPLETE, FAILED, LORA, SEARCH, STOPPED, Metric

OUTCOMES = (
    "cc_mean adaptation_gap mlm_loss_train mlm_loss_heldout loss_gap forgetting delta_norm epoch_best accuracy macro_f1"
).split()
BY_RANK = "outcome rank n_trials n_seeds n_stories mean low high sd_seeds covers".split()
RANK_BY_LR = "rank lr n_trials cc_mean".split()
BEST_LR = "rank lr n_lr n_trials cc_chosen cc_mean".split()
HISTORY = "number trial_id value best_so_far".split()
SETTING = "rank lr scaling target_modules optimizer_steps".split()  # one value of each is a setting; seeds repeat it
NUMBERS = "rank lora_alpha scaling lr optimizer_steps seed".split()
FEW_LEVELS = 4
LEVEL = 0.95


class LeftOut(NamedTuple):
    """Searched trials that no analysis of rank counts, by the first reason that applies."""

    n_failed: int
    n_stopped: int
    n_repeats: int
    n_not_lora: int

    @property
    def n(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        """Say it in words, such as ``2 failed, 1 stopped early``; empty if none was left out."""
        words = ("failed", "stopped early", "repeats of others", "not LoRA")
        return ", ".join(f"{n} {word}" for n, word in zip(self, words, strict=True) if n)


def used_trials(trials: pd.DataFrame) -> tuple[pd.DataFrame, LeftOut]:
    """Return the trials that analyses of rank count, and how many searched ones they do not.

    Counted are complete searched LoRA trials that repeat no other. Returned with float64 numbers and further columns:
    ``log2_rank``, ``log10_lr``, ``log2_scaling``, ``scaling_rule``, ``loss_gap`` (held-out less training masked-LM
    loss, nats) and ``forgetting`` (probe loss after less before, nats).

    Parameters
    ----------
    trials : of ``load_trials``
    """
    searched = trials[trials["phase"] == SEARCH]
    reasons = [
        (searched["status"] == FAILED).to_numpy(bool),
        (searched["status"] == STOPPED).to_numpy(bool),
        searched["repeat_of"].notna().to_numpy(bool),
        (searched["method"] != LORA).to_numpy(bool),
    ]
    is_out, counts = np.zeros(len(searched), bool), []
    for reason in reasons:
        counts.append(int((reason & ~is_out).sum()))
        is_out |= reason
    used = searched[~is_out & (searched["status"] == COMPLETE).to_numpy(bool)].reset_index(drop=True)
    return _with_derived(used), LeftOut(*counts)


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
    """Name how the scaling of the update follows from rank: a constant alpha, a constant alpha / r, or rsLoRA.

    Where alpha / r is as constant as alpha, at a single rank, ``alpha = k r`` is preferred if other ranks share k.
    """
    standard = np.isclose(used["scaling"], used["lora_alpha"] / used["rank"], rtol=1e-6) & (used["rank"] > 1)
    ratios = (used["lora_alpha"] / used["rank"]).round(6)
    n_ranks_of_ratio = used[standard].groupby(ratios[standard])["rank"].nunique()
    n_ranks_of_alpha = used[standard].groupby(used["lora_alpha"][standard])["rank"].nunique()
    names = []
    for is_standard, alpha, ratio in zip(standard, used["lora_alpha"], ratios, strict=True):
        if not is_standard and not _is_rank_one(used, alpha, ratio):
            names.append(f"rsLoRA alpha = {alpha:g}")
        elif n_ranks_of_alpha.get(alpha, 0) > n_ranks_of_ratio.get(ratio, 0):
            names.append(f"alpha = {alpha:g}")
        else:
            names.append(f"alpha = {ratio:g} r")
    return names


def _is_rank_one(used: pd.DataFrame, alpha: float, ratio: float) -> bool:
    """At rank 1 all rules are the same; take the standard one unless no other rank has it."""
    return bool(alpha == ratio and not (used["scaling"] != used["lora_alpha"] / used["rank"]).any())


def story_table(stories: pd.DataFrame, trial_ids: list[str], role: str = "validation") -> pd.DataFrame:
    """Return CC inside each story, a row a trial in the given order and a column a story.

    Subjects and outer folds are averaged inside a story first. Stories that a trial lacks are left out.
    """
    if stories.empty:
        return pd.DataFrame(index=pd.Index(trial_ids))
    rows = stories[(stories["role"] == role) & stories["trial_id"].isin(trial_ids)]
    table = rows.groupby(["trial_id", "story"])["cc_mean"].mean().unstack("story").reindex(trial_ids)
    return table.dropna(axis="columns")


def by_rank(used: pd.DataFrame, stories: pd.DataFrame) -> pd.DataFrame:
    """Return mean and 95% interval of each outcome, a row an outcome and rank; columns as in ``BY_RANK``.

    The interval of ``cc_mean`` adds two variances: that between replicates of a setting (seeds), and that between
    validation stories of what the rank does to a story beside the other ranks. The level of a story is common to all
    ranks and is taken out, so that intervals of two ranks can be compared; they do not say how well the brain of other
    stories is predicted. Of other outcomes only seeds enter.
    """
    n_of_stories, story_part = _story_parts(used, stories)
    rows = []
    for outcome in OUTCOMES:
        if outcome not in used:
            continue
        having = used[used[outcome].notna()]
        sd, df = seed_spread(having, outcome)
        for rank, one in having.groupby("rank"):
            part = story_part.get(float(rank), 0.0) if outcome == "cc_mean" else 0.0  # type: ignore[arg-type]
            reach = np.hypot(student.ppf((1 + LEVEL) / 2, df) * sd / np.sqrt(len(one)), part) if df else np.nan
            mean, n_stories = one[outcome].mean(), n_of_stories if outcome == "cc_mean" else 0
            covers = f"seeds and {n_stories} validation stories" if n_stories > 1 else "seeds"
            n_seeds = one["seed"].nunique()
            rows.append((outcome, rank, len(one), n_seeds, n_stories, mean, mean - reach, mean + reach, sd, covers))
    return _typed(pd.DataFrame(rows, columns=BY_RANK), "outcome covers")


def seed_spread(used: pd.DataFrame, outcome: str = "cc_mean") -> tuple[float, int]:
    """Return the SD of an outcome between seeds of one setting, pooled over settings, and its degrees of freedom.

    NaN and 0 where no setting was run with two seeds.
    """
    grouped = used.groupby([name for name in SETTING if name in used], dropna=False)[outcome]
    df = len(used) - grouped.ngroups
    if df < 1:
        return np.nan, 0
    deviations = used[outcome] - grouped.transform("mean")
    return float(np.sqrt((deviations**2).sum() / df)), df


def _story_parts(used: pd.DataFrame, stories: pd.DataFrame) -> tuple[int, dict[float, float]]:
    """Return the number of stories, and by rank half the 95% interval over stories of what the rank adds in a story."""
    table = story_table(stories, used["trial_id"].tolist())
    n = table.shape[1]
    if n < 2:
        return n, {}
    of_rank = table.groupby(used["rank"].to_numpy()).mean()  # (n_ranks, n_stories)
    beside = of_rank - of_rank.mean(axis="index")
    reach = student.ppf((1 + LEVEL) / 2, n - 1) * beside.std(axis="columns", ddof=1) / np.sqrt(n)
    return n, {float(rank): float(value) for rank, value in reach.items()}


def rank_by_lr(used: pd.DataFrame) -> pd.DataFrame:
    """Return the mean CC of each rank and learning rate that were tried together; columns as in ``RANK_BY_LR``."""
    grouped = used.groupby(["rank", "lr"])["cc_mean"].agg(["count", "mean"]).reset_index()
    grouped.columns = pd.Index(RANK_BY_LR)
    return _typed(grouped, "")


def best_lr(used: pd.DataFrame) -> pd.DataFrame:
    """Return each rank at its own best learning rate, a row a rank; columns as in ``BEST_LR``.

    The best of several is flattered by the noise that made it best. So each seed is scored at the rate that the *other*
    seeds choose (``cc_mean``); beside it stands what the same trials say that chose (``cc_chosen``). Only rates that
    every rank tried with every seed are compared, so that no rank has more tries than another.
    """
    cells = used.groupby(["rank", "seed", "lr"])["cc_mean"].mean().unstack("lr")
    every = len(cells) == used["rank"].nunique() * used["seed"].nunique()
    cells = cells.dropna(axis="columns")
    if not every or cells.shape[1] < 2:
        return _typed(pd.DataFrame(columns=BEST_LR), "")
    rows = []
    for rank, of_seed in cells.groupby(level="rank"):
        values = of_seed.to_numpy(float)  # (n_seeds, n_lr)
        chosen = int(values.mean(axis=0).argmax())
        n_trials = int(((used["rank"] == rank) & (used["lr"] == cells.columns[chosen])).sum())
        fair = _scored_by_others(values)
        rows.append((rank, cells.columns[chosen], values.shape[1], n_trials, values[:, chosen].mean(), fair))
    return _typed(pd.DataFrame(rows, columns=BEST_LR), "")


def _scored_by_others(values: np.ndarray) -> float:
    """Return the mean of each row at the column that the other rows' mean chooses; NaN with one row."""
    n = len(values)
    if n < 2:
        return float("nan")
    others = (values.sum(axis=0) - values) / (n - 1)
    return float(values[np.arange(n), others.argmax(axis=1)].mean())


def history(trials: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the complete searched trials in order, and the best so far; columns as in ``HISTORY``."""
    is_complete = (trials["phase"] == SEARCH) & (trials["status"] == COMPLETE)
    searched = trials[is_complete & trials[metric.column].notna()].sort_values("trial_id")
    value = searched[metric.column].to_numpy(float)
    best = np.maximum.accumulate(value) if metric.is_gain else np.minimum.accumulate(value)
    number = np.arange(1, len(value) + 1)
    ids = searched["trial_id"].to_numpy(str)
    return pd.DataFrame({"number": number, "trial_id": ids, "value": value, "best_so_far": best})


def _typed(frame: pd.DataFrame, text: str) -> pd.DataFrame:
    """Return numbers as int64 where they count and as float64 elsewhere, also without a row."""
    whole = [name for name in frame if str(name).startswith("n_")]
    types = {name: "int64" if name in whole else "object" if name in text.split() else "float64" for name in frame}
    return frame.astype(types)
