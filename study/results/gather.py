"""A study read from its folder, and all of its tables and verdicts made: the one place where they come together."""

import ast
from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.core.files import read_json
from bert_encoding.core.names import (
    BASELINE,
    COMPLETE,
    CONFIRM,
    ENCODING,
    FAILED,
    FROZEN,
    METRICS,
    SEARCH,
    STOPPED,
    STUDY_FILE,
    WORD_RATE,
)
from bert_encoding.core.storage import Place, open_place
from bert_encoding.trial.record import TrialRecord, read_cc, read_details
from bert_encoding.trial.tables import epochs_frame, stories_frame, trials_frame
from study.results.confirmed import confirmed_table
from study.results.evidence import Effect, Evidence, Facts, LeftOut, Levels, Verdict
from study.results.importances import importances, varied_parameters
from study.results.load import ADAPTIVE, forced_lines, load_records
from study.results.locked_stories import read_looks
from study.results.rank_tables import best_lr, by_rank, history, rank_by_lr, used_trials
from study.results.slopes import slope_table
from study.results.verdicts.next_runs import Further, confirm_command, more_stories, resume_command, which_runs
from study.results.verdicts.rank import rank_verdict
from study.results.verdicts.tuning import tuning_verdict
from study.setup.delta import DELTA
from study.setup.samplers import NO_SCHEDULER

STORIES = "trial_id phase split role subject story cc_mean".split()
EPOCHS = "trial_id phase epoch rank lr seed cc_mean mlm_loss_train mlm_loss_heldout seconds is_used".split()
SECONDS = "seconds_train seconds_embed seconds_ridge seconds_other seconds_total".split()


def gather(path: str | Place, delta: float = DELTA) -> Evidence:
    """Read a study, also one that is still running, and return all that figures and report show.

    Parameters
    ----------
    path : a folder, or the URL of one in object storage
    delta : CC below which an effect does not matter

    Raises
    ------
    InputError
        if no study is there.
    """
    folder = open_place(path)
    records = load_records(folder)
    trials = trials_frame(records)
    study, looks = read_json(folder / STUDY_FILE), read_looks(folder)
    facts = _facts(study, looks, trials)
    metric = METRICS[facts.task]
    used, left_out = used_trials(trials)
    stories = _with_columns(stories_frame(records), STORIES)
    slopes = slope_table(used, stories)
    confirmed = confirmed_table(folder, looks, trials)
    best_id, frozen_id = _best(trials, facts), _baseline_id(trials, FROZEN)
    found = Evidence(
        facts=facts,
        levels=_levels(folder, trials, facts),
        left_out=left_out,
        trials=trials,
        epochs=_epochs(records, trials, used),
        stories=stories,
        used=used,
        by_rank=by_rank(used, stories),
        rank_by_lr=rank_by_lr(used),
        best_lr=best_lr(used),
        slopes=slopes,
        importances=importances(records, metric),
        history=history(trials, metric),
        varied=_varied(records),
        confirmed=confirmed,
        selection_bias=_selection_bias(confirmed),
        voxels=_voxels(folder, frozen_id, best_id),
        best_id=best_id,
        seconds=_seconds(trials),
        verdicts=(),
        warnings=_warnings(folder, facts, left_out, trials),
    )
    return found._replace(verdicts=_verdicts(found, folder, frozen_id, delta)) if facts.task == ENCODING else found


def _facts(study: dict[str, Any], looks: list[dict[str, Any]], trials: pd.DataFrame) -> Facts:
    options, task = study.get("options", {}), str(study.get("task", ENCODING))
    searched = trials[trials["phase"] == SEARCH]
    n = {status: int((searched["status"] == status).sum()) for status in (COMPLETE, STOPPED, FAILED)}
    sampler, scheduler = str(options.get("sampler", "tpe")), str(options.get("scheduler", NO_SCHEDULER))
    stories: dict[str, tuple[str, ...]] = {}
    if task == ENCODING:
        for role in ("fit", "validation", "test"):
            stories[role] = tuple(dict.fromkeys(name for split in study.get("splits", []) for name in split[role]))
    metric = METRICS[task]
    return Facts(
        name=str(study.get("name", "")),
        task=task,
        question=_question(study.get("space", {}).get("source", "")),
        data=str(study.get("data", {}).get("source", "")),
        model=str(study.get("model", {}).get("name", "")),
        space=str(study.get("space", {}).get("name", "")),
        sampler=sampler,
        scheduler=scheduler,
        is_adaptive=sampler in ADAPTIVE or scheduler != NO_SCHEDULER,
        metric=metric.column,
        metric_label=metric.label,
        is_gain=metric.is_gain,
        n_asked=int(options.get("trials", len(searched))),
        n_searched=len(searched),
        n_complete=n[COMPLETE],
        n_stopped=n[STOPPED],
        n_failed=n[FAILED],
        n_repeats=int(searched["repeat_of"].notna().sum()),
        n_voxels=dict(study.get("data", {}).get("n_voxels", {})),
        stories=stories,
        n_folds=max(1, len(study.get("splits", []))),
        is_confirmed=bool(trials.loc[trials["phase"] == CONFIRM, "cc_test"].notna().any()),
        forced=list(study.get("forced", [])),
        looks=looks,
        study=study,
    )


def _question(source: str) -> str:
    """Return the first line of a space file's docstring."""
    try:
        return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    except SyntaxError:
        return ""


def _levels(folder: Place, trials: pd.DataFrame, facts: Facts) -> Levels:
    def score(method: str, column: str) -> float | None:
        rows = trials[(trials["phase"] == BASELINE) & (trials["method"] == method) & (trials["status"] == COMPLETE)]
        if column == "cc_test":  # of a study that confirmed, baselines were refitted for the test
            again = trials[trials["trial_id"] == f"test-baseline-{method}"]
            rows = again if len(again) else rows
        values = rows[column].dropna()
        return float(values.iloc[0]) if len(values) else None

    ids = [f"baseline-{FROZEN}", f"test-baseline-{FROZEN}"]
    kept: dict[str, np.ndarray] = {}
    for trial_id in ids:
        if facts.task == ENCODING and (trials["trial_id"] == trial_id).any():
            kept |= read_details(folder, trial_id)
    return Levels(
        frozen=score(FROZEN, facts.metric),
        word_rate=score(WORD_RATE, facts.metric),
        frozen_test=score(FROZEN, "cc_test"),
        word_rate_test=score(WORD_RATE, "cc_test"),
        ceiling=_ceiling(kept, "validation"),
        ceiling_test=_ceiling(kept, "test"),
    )


def _ceiling(details: dict[str, np.ndarray], role: str) -> float | None:
    """Return the mean over stories with repeats, and subjects, of the mean CC_max over voxels; None without repeats."""
    found = [values for name, values in details.items() if name.startswith(f"{role}/cc_max/")]
    found = [values[np.isfinite(values)] for values in found]
    means = [float(values.mean()) for values in found if values.size]
    return float(np.mean(means)) if means else None


def _epochs(records: list[TrialRecord], trials: pd.DataFrame, used: pd.DataFrame) -> pd.DataFrame:
    epochs = epochs_frame(records)
    if epochs.empty:
        return pd.DataFrame(columns=EPOCHS)
    of_trial = trials.set_index("trial_id")[["rank", "lr", "seed"]].astype("Float64").astype(float)
    epochs = epochs.drop(columns=["rank", "lr", "seed"], errors="ignore").join(of_trial, on="trial_id")
    epochs["is_used"] = epochs["trial_id"].isin(used["trial_id"])
    return _with_columns(epochs, EPOCHS)


def _with_columns(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return frame.reindex(columns=[*columns, *(name for name in frame.columns if name not in columns)])


def _varied(records: list[TrialRecord]) -> tuple[str, ...]:
    """Return the columns of the parameters that the search varied; the rank itself instead of its logarithm."""
    names = varied_parameters([r.params for r in records if r.phase == SEARCH and r.status == COMPLETE])
    return tuple(dict.fromkeys("rank" if name == "log2_rank" else name for name in names))


def _best(trials: pd.DataFrame, facts: Facts) -> str | None:
    searched = trials[(trials["phase"] == SEARCH) & (trials["status"] == COMPLETE) & trials[facts.metric].notna()]
    if searched.empty:
        return None
    return str(searched.sort_values(facts.metric, ascending=not facts.is_gain, kind="stable").iloc[0]["trial_id"])


def _baseline_id(trials: pd.DataFrame, method: str) -> str | None:
    rows = trials[(trials["phase"] == BASELINE) & (trials["method"] == method) & (trials["status"] == COMPLETE)]
    return str(rows.iloc[0]["trial_id"]) if len(rows) else None


def _selection_bias(confirmed: pd.DataFrame) -> float | None:
    """Return what the best searched trial lost when fresh seeds judged it, in the first look."""
    first = confirmed[confirmed["look"] == 1].sort_values("cc_searched", ascending=False)
    return float(first.iloc[0]["selection_bias"]) if len(first) else None


def _voxels(folder: Place, frozen_id: str | None, best_id: str | None) -> pd.DataFrame:
    """Return CC over voxels of the two, of the subjects that both have."""
    frozen, best = ({} if one is None else read_cc(folder, one) for one in (frozen_id, best_id))
    parts = [
        pd.DataFrame({"subject": s, "voxel": np.arange(len(frozen[s])), "frozen": frozen[s], "best": best[s]})
        for s in frozen
        if s in best and not s.startswith("test/")
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns="subject voxel frozen best".split())


def _seconds(trials: pd.DataFrame) -> pd.DataFrame:
    """Return where time went; repeats, which took none, are left out."""
    ran = trials[trials["repeat_of"].isna()].reset_index(drop=True)
    table = ran[["trial_id", "phase"]].copy()
    stages = [name for name in SECONDS if name not in ("seconds_other", "seconds_total")]
    for name in (*stages, "seconds_total"):
        table[name] = ran[name].astype("Float64").to_numpy(float, na_value=np.nan)
    known = table[stages].fillna(0.0).sum(axis="columns")
    table["seconds_other"] = (table["seconds_total"] - known).clip(lower=0.0)
    return table[["trial_id", "phase", *SECONDS]]


def _verdicts(found: Evidence, folder: Place, frozen_id: str | None, delta: float) -> tuple[Verdict, ...]:
    facts, used = found.facts, found.used
    n_failed = facts.n_failed if facts.n_failed == facts.n_searched else None
    runs = which_runs(facts.study, str(folder), found.slopes, facts.stories, facts.is_finished, delta, n_failed)
    following = _next_for_tuning(found, runs, str(folder), frozen_id, delta)
    tuning = tuning_verdict(
        used,
        found.stories,
        frozen_id,
        found.confirmed,
        found.slopes,
        delta=delta,
        is_adaptive=facts.is_adaptive,
        command=following.command,
        what_would_tell=following.words,
        frozen_seen=_cc_seen(found.trials, frozen_id),
    )
    rank = rank_verdict(
        found.slopes,
        used,
        delta=delta,
        is_adaptive=facts.is_adaptive,
        left_out=found.left_out,
        command=runs.command,
        what_would_tell=runs.words,
    )
    return tuning, rank


def _cc_seen(trials: pd.DataFrame, frozen_id: str | None) -> float | None:
    """Return the CC of the frozen baseline on the fit stories; None if unknown."""
    values = trials.loc[trials["trial_id"] == frozen_id, "cc_seen"].dropna()
    return float(values.iloc[0]) if len(values) else None


def _next_for_tuning(found: Evidence, runs: Further, folder: str, frozen_id: str | None, delta: float) -> Further:
    """Return what to run for fine-tuning: what the study lacks, then its confirm phase, then more stories."""
    facts = found.facts
    if not facts.is_finished or len(found.used) < 2:
        return runs
    if frozen_id is None:
        return Further(resume_command(folder), "This runs the missing frozen baseline.")
    if not facts.is_confirmed:
        return Further(confirm_command(folder), "")
    return more_stories(facts.study, folder, facts.stories, delta)


def _warnings(folder: Place, facts: Facts, left_out: LeftOut, trials: pd.DataFrame) -> tuple[str, ...]:
    lines = []
    if not facts.is_finished:
        lines.append(f"{facts.n_asked - facts.n_searched} of {facts.n_asked} searched trials have not ended yet")
    if facts.n_failed:
        failed = trials.loc[(trials["phase"] == SEARCH) & (trials["status"] == FAILED), "trial_id"]
        lines.append(f"{facts.n_failed} searched trials failed: {', '.join(failed)}")
    if left_out.n and facts.task == ENCODING:
        lines.append(f"left out of all that is said of rank: {left_out}")
    if facts.is_adaptive and facts.n_searched:
        lines.append(
            f"sampler {facts.sampler}, scheduler {facts.scheduler}: which settings were tried, or ran to the end, "
            "depended on earlier scores; what is said of parameters is exploratory"
        )
    return (*lines, *(line.removeprefix("note: ") for line in forced_lines(folder)))


def verdict_record(verdicts: tuple[Verdict, ...]) -> dict[str, Any]:
    """Return verdicts as plain values for ``summary.json``: ``tuning`` and ``rank``; nothing on text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Effect | Verdict):
            return {name: plain(one) for name, one in value._asdict().items()}
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {name: plain(one) for name, one in zip(("tuning", "rank"), verdicts, strict=False)}
