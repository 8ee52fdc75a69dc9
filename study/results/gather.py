"""Read a study from its folder and make all of its tables and verdicts."""

import ast
from typing import Any

import numpy as np
import pandas as pd

from bert_encoding.core.names import BASELINE, COMPLETE, ENCODING, FAILED, FROZEN, SEARCH, WORD_RATE
from bert_encoding.core.storage import Place, open_place
from bert_encoding.trial.record import TrialRecord, read_cc, read_details
from bert_encoding.trial.tables import rows_frame, trials_frame
from study.results.confirmed import confirmed_table
from study.results.evidence import Evidence, Levels
from study.results.facts import Facts
from study.results.importances import importances, varied_parameters
from study.results.load import forced_lines, is_adaptive, load_records, load_study
from study.results.locked_stories import id_on_test, read_looks
from study.results.rank_tables import by_rank, history, rank_by_lr, used_trials
from study.results.slopes import slope_table
from study.results.standing import baseline_score, best_trial, is_confirmed
from study.results.verdicts.next_runs import more_stories, resume_command, which_runs
from study.results.verdicts.rank import rank_verdict
from study.results.verdicts.rules import Effect, NextRuns, Verdict
from study.results.verdicts.tuning import tuning_verdict
from study.setup.delta import DELTA

STORIES = "trial_id phase split role subject story cc_mean".split()
EPOCHS = "trial_id phase epoch rank lr seed cc_mean mlm_loss_train mlm_loss_heldout seconds is_used".split()
VOXELS = "subject voxel frozen best".split()
STAGES = "seconds_train seconds_embed seconds_ridge".split()


def gather(path: str | Place, delta: float = DELTA) -> Evidence:
    """Read a study, also one that is still running, and return all that figures and report show.

    ``path`` is as in ``load_study``, with its error; ``delta`` is the smallest effect that matters, CC.
    """
    folder = open_place(path)
    study, records, looks = load_study(folder), load_records(folder), read_looks(folder)
    trials = trials_frame(records)
    facts = _facts(study, looks, trials)
    used, left_out = used_trials(trials)
    stories = _with_columns(rows_frame(records, "stories"), STORIES)
    best_id, frozen_id = best_trial(trials, facts.task), _frozen_id(trials)
    evidence = Evidence(
        facts=facts,
        levels=_levels(folder, trials, facts),
        left_out=left_out,
        trials=trials,
        epochs=_epochs(records, trials, used),
        stories=stories,
        used=used,
        by_rank=by_rank(used, stories),
        rank_by_lr=rank_by_lr(used),
        slopes=slope_table(used, stories),
        importances=importances(records, facts.metric),
        history=history(trials, facts.metric),
        varied=_varied(records),
        confirmed=confirmed_table(folder, looks, trials),
        voxels=_voxels(folder, frozen_id, best_id),
        best_id=best_id,
        seconds=_seconds(trials),
        verdicts=(),
        warnings=_warnings(folder, facts, left_out, trials),
    )
    if facts.task != ENCODING:
        return evidence
    return evidence._replace(verdicts=_verdicts(evidence, str(folder), frozen_id, delta))


def _facts(study: dict[str, Any], looks: list[dict[str, Any]], trials: pd.DataFrame) -> Facts:
    options, space, task = study.get("options", {}), study.get("space", {}), str(study.get("task", ENCODING))
    status = trials.loc[trials["phase"] == SEARCH, "status"]
    roles, splits = ("fit", "validation", "test") if task == ENCODING else (), study.get("splits", [])
    return Facts(
        name=str(study.get("name", "")),
        task=task,
        question=_question(space.get("source", "")),
        space=str(space.get("name", "")),
        sampler=str(options.get("sampler", "tpe")),
        is_adaptive=is_adaptive(options),
        n_requested=int(options.get("trials", len(status))),
        n_searched=len(status),
        n_complete=int((status == COMPLETE).sum()),
        n_failed=int((status == FAILED).sum()),
        n_voxels=dict(study.get("data", {}).get("n_voxels", {})),
        stories={role: tuple(dict.fromkeys(name for split in splits for name in split[role])) for role in roles},
        is_confirmed=is_confirmed(trials),
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
    column, details = facts.metric.column, dict[str, np.ndarray]()
    for trial_id in (f"baseline-{FROZEN}", id_on_test(f"baseline-{FROZEN}", 1)):
        if facts.task == ENCODING and (trials["trial_id"] == trial_id).any():
            details |= read_details(folder, trial_id)
    return Levels(
        frozen=baseline_score(trials, FROZEN, column),
        word_rate=baseline_score(trials, WORD_RATE, column),
        frozen_test=_test_score(trials, FROZEN),
        word_rate_test=_test_score(trials, WORD_RATE),
        ceiling=_ceiling(details, "validation"),
        ceiling_test=_ceiling(details, "test"),
    )


def _test_score(trials: pd.DataFrame, method: str) -> float | None:
    """Return a baseline's test score: refitted for the confirm phase, or in a study of baselines alone."""
    refitted = trials.loc[trials["trial_id"] == id_on_test(f"baseline-{method}", 1), "cc_test"]
    if refitted.empty:
        return baseline_score(trials, method, "cc_test")
    return float(refitted.iloc[0]) if refitted.notna().any() else None


def _ceiling(details: dict[str, np.ndarray], role: str) -> float | None:
    """Return the mean noise ceiling over voxels, then over stories with repeats and subjects; None without repeats."""
    ceilings = [values for name, values in details.items() if name.startswith(f"{role}/cc_max/")]
    finite = [values[np.isfinite(values)] for values in ceilings]
    means = [float(values.mean()) for values in finite if values.size]
    return float(np.mean(means)) if means else None


def _epochs(records: list[TrialRecord], trials: pd.DataFrame, used: pd.DataFrame) -> pd.DataFrame:
    epochs = rows_frame(records, "epochs")
    if epochs.empty:
        return pd.DataFrame(columns=EPOCHS)
    of_trial = trials.set_index("trial_id")[["rank", "lr", "seed"]].astype("Float64").astype(float)
    epochs = epochs.drop(columns=["rank", "lr", "seed"], errors="ignore").join(of_trial, on="trial_id")
    return _with_columns(epochs.assign(is_used=epochs["trial_id"].isin(used["trial_id"])), EPOCHS)


def _with_columns(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return frame.reindex(columns=[*columns, *(name for name in frame.columns if name not in columns)])


def _varied(records: list[TrialRecord]) -> tuple[str, ...]:
    """Return the columns of the parameters that the search varied; rank instead of its logarithm."""
    names = varied_parameters([r.params for r in records if r.phase == SEARCH and r.status == COMPLETE])
    return tuple(dict.fromkeys("rank" if name == "log2_rank" else name for name in names))


def _frozen_id(trials: pd.DataFrame) -> str | None:
    rows = trials[(trials["phase"] == BASELINE) & (trials["method"] == FROZEN) & (trials["status"] == COMPLETE)]
    return str(rows.iloc[0]["trial_id"]) if len(rows) else None


def _voxels(folder: Place, frozen_id: str | None, best_id: str | None) -> pd.DataFrame:
    """Return the CC per voxel of both trials, for the subjects that both have."""
    frozen, best = ({} if trial_id is None else read_cc(folder, trial_id) for trial_id in (frozen_id, best_id))
    tables = [
        pd.DataFrame({"subject": s, "voxel": np.arange(len(frozen[s])), "frozen": frozen[s], "best": best[s]})
        for s in frozen
        if s in best and not s.startswith("test/")
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=VOXELS)


def _seconds(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the time that each trial took, by stage; repeats, which took none, are left out."""
    ran = trials[trials["repeat_of"].isna()].reset_index(drop=True)
    seconds = ran[[*STAGES, "seconds_total"]].astype("Float64").astype(float)
    other = (seconds["seconds_total"] - seconds[STAGES].fillna(0.0).sum(axis="columns")).clip(lower=0.0)
    seconds.insert(len(STAGES), "seconds_other", other)
    return ran[["trial_id", "phase"]].join(seconds)


def _verdicts(evidence: Evidence, folder: str, frozen_id: str | None, delta: float) -> tuple[Verdict, ...]:
    facts, used, slopes = evidence.facts, evidence.used, evidence.slopes
    runs = which_runs(facts, folder, slopes, delta)
    tuning = tuning_verdict(
        used,
        evidence.stories,
        frozen_id,
        evidence.confirmed,
        slopes,
        delta=delta,
        is_adaptive=facts.is_adaptive,
        next_runs=_next_for_tuning(evidence, runs, folder, frozen_id, delta),
        frozen_seen=baseline_score(evidence.trials, FROZEN, "cc_seen"),
    )
    rank = rank_verdict(
        slopes, used, delta=delta, is_adaptive=facts.is_adaptive, left_out=evidence.left_out, next_runs=runs
    )
    return tuning, rank


def _next_for_tuning(evidence: Evidence, runs: NextRuns, folder: str, frozen_id: str | None, delta: float) -> NextRuns:
    """Return what to run for the verdict on tuning: what the study lacks, its confirm phase, or more stories."""
    facts = evidence.facts
    if not facts.is_finished or len(evidence.used) < 2:
        return runs
    if frozen_id is None:
        return NextRuns(resume_command(folder), "The command runs the missing frozen baseline.")
    if facts.is_confirmed:
        return more_stories(facts, folder, delta)
    return NextRuns(f"{resume_command(folder)} --confirm 3")


def _warnings(folder: Place, facts: Facts, left_out: str, trials: pd.DataFrame) -> tuple[str, ...]:
    lines = []
    if not facts.is_finished:
        pending = facts.n_requested - facts.n_searched
        lines.append(f"{pending} of {facts.n_requested} searched trials have not ended yet")
    if facts.n_failed:
        failed = trials.loc[(trials["phase"] == SEARCH) & (trials["status"] == FAILED), "trial_id"]
        lines.append(f"{facts.n_failed} searched trials failed: {', '.join(failed)}")
    if left_out and facts.task == ENCODING:
        lines.append(f"excluded from all analyses of rank: {left_out}")
    if facts.is_adaptive and facts.n_searched:
        scheduler = facts.study.get("options", {}).get("scheduler", "none")
        lines.append(
            f"sampler {facts.sampler}, scheduler {scheduler}: which settings were tried, or ran to the end, depended "
            "on earlier scores; conclusions about parameters are exploratory"
        )
    return (*lines, *(line.removeprefix("note: ") for line in forced_lines(folder)))


def verdict_record(verdicts: tuple[Verdict, ...]) -> dict[str, Any]:
    """Return verdicts as plain values for ``summary.json``: ``tuning`` and ``rank``; nothing for text-only studies."""

    def plain(value: Any) -> Any:
        if isinstance(value, Effect | Verdict):
            return {name: plain(item) for name, item in value._asdict().items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {name: plain(verdict) for name, verdict in zip(("tuning", "rank"), verdicts, strict=False)}
