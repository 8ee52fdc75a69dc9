"""The content of the report as plain values; the template only arranges them."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

import bert_encoding
from bert_encoding.core.names import CLASSIFICATION, COMPLETE, CONFIRM, ENCODING, FAILED, SEARCH, TUNED
from bert_encoding.core.storage import Place
from bert_encoding.trial.record import TrialRecord
from study.report.figures.figures import Drawn
from study.report.methods.data import vectors_precision
from study.report.methods.inference import inference_paragraphs
from study.report.methods.methods import methods_paragraphs
from study.report.tables import BRIEF, MEANINGS, OUTCOMES, SIGNED, Sheet, p_value, sheet, trial_sheet
from study.results.confirmed import confirm_lines
from study.results.evidence import Evidence
from study.results.printing import comparison_lines, trial_columns
from study.results.verdicts.rules import Verdict
from study.session.confirm import is_complete
from study.setup.delta import delta_note
from study.wording import counted, joined, one_or_several, setting

ANSWERS = {  # answer -> (how it is shown, its colour)
    "helps": ("It helps.", "good"),
    "overfits": ("It overfits.", "bad"),
    "no effect": ("No detectable effect.", "even"),
    "cannot tell": ("These trials cannot tell.", "open"),
}
TERMS = {
    "CC": "Pearson correlation between predicted and measured response of a voxel, averaged over voxels: 1 is perfect, "
    "0 is chance.",
    "Held-out": "not used to fit the model. Validation stories are held out during the search; test stories are scored "
    "only after the winner is fixed.",
    "Frozen": "BERT as published, without fine-tuning.",
    "Baseline": "what trials are compared with: the frozen encoder, and word rate (the number of words per scan).",
    "Delta": "the smallest difference in CC that matters, {delta}.",
    "Fold": "one of several groups of stories; each is predicted once by a model fitted to the other groups.",
    "Noise ceiling": "the highest CC that the reliability of the responses allows, estimated from repeated scans.",
}
TEXT_TERMS = {
    "Held-out": "not used for training.",
    "Frozen": "BERT as published, without fine-tuning; the baseline that trials are compared with.",
}
MOST_NAMED = 5  # trials that share a note
SHORT_SLOPES = "outcome adjustment subset n_trials n_ranks n_stories slope effect low high p".split()
SHORT_CONFIRMED = (
    "trial_id rank lr cc_searched cc_confirmed selection_bias cc_test frozen_test gain_test low high gain_of_stories"
).split()


def make_page(
    study: Place,
    evidence: Evidence,
    records: list[TrialRecord],
    figures: Sequence[Drawn] = (),
    not_drawn: Sequence[str] = (),
    failures: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the values that the template ``report.html`` shows.

    ``not_drawn`` are figures without data, ``failures`` figures that could not be drawn, each with the reason.
    """
    facts, trials = evidence.facts, evidence.trials
    has_result = bool((trials["status"] == COMPLETE).any())
    inference = inference_paragraphs(evidence) if has_result else []
    return {
        "title": f"Study {facts.name}",
        "question": facts.question,
        "incomplete": incomplete_lines(evidence, records),
        "terms": _terms(evidence),
        "verdicts": [shown_verdict(verdict) for verdict in evidence.verdicts] if has_result else [],
        "lines": _lines(study, evidence, records, has_result),
        "numbers": _numbers(evidence),
        "slopes": _slopes(evidence.slopes),
        "figures": figures,
        "not_drawn": not_drawn,
        "trials": trial_sheet(trials, facts.task),
        "meanings": [(name, MEANINGS[name]) for name in trial_columns(trials, facts.task) if name in MEANINGS],
        "examples": _examples(evidence, records),
        "methods": methods_paragraphs(facts.study, records, facts.looks, inference),
        "settings": settings_sheet(facts.study, records),
        "provenance": provenance_rows(facts.study),
        "space": facts.space,
        "source": facts.study["space"]["source"],
        "warnings": list(dict.fromkeys((*_warnings(evidence, records), *failures))),
        "notes": shared_notes(records),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "version": bert_encoding.__version__,
    }


def _terms(evidence: Evidence) -> dict[str, str]:
    """Return the terms that the page uses, with their meaning."""
    if evidence.facts.task != ENCODING:
        return TEXT_TERMS
    delta = f"{evidence.verdicts[0].delta:g} in this study" if evidence.verdicts else "set in advance"
    return {term: meaning.format(delta=delta) for term, meaning in TERMS.items()}


def shown_verdict(verdict: Verdict) -> dict[str, Any]:
    """Return the fields of a verdict as the page shows them, with ``kind``, its colour."""
    answer, kind = ANSWERS.get(verdict.answer, (verdict.answer, "open"))
    label = " Exploratory: the search was adaptive." * verdict.is_exploratory
    headline, *sentences = (text.replace("+-", "\u00b1") for text in (verdict.headline, *verdict.sentences))
    return verdict._asdict() | {"answer": answer + label, "kind": kind, "headline": headline, "sentences": sentences}


def incomplete_lines(evidence: Evidence, records: list[TrialRecord]) -> list[str]:
    """Return what a study that runs, or was interrupted, still lacks."""
    facts, lines = evidence.facts, []
    if not facts.is_finished:
        lines.append(f"{facts.n_searched:,} of {counted(facts.n_requested, 'searched trial')} have ended.")
    if not any(record.phase not in (SEARCH, CONFIRM) and record.status == COMPLETE for record in records):
        lines.append("There is no baseline yet to compare with.")
    n_finalists = facts.study.get("options", {}).get("confirm") or 0
    if n_finalists and facts.task == ENCODING and facts.n_requested and _confirm_is_pending(evidence, records):
        best = "configuration is" if n_finalists == 1 else f"{n_finalists} configurations are"
        lines.append(f"The best {best} still to be confirmed with fresh seeds and on the test stories.")
    return lines


def _confirm_is_pending(evidence: Evidence, records: list[TrialRecord]) -> bool:
    looks = evidence.facts.looks
    if looks:
        return not is_complete(looks[-1], records)
    fresh = [record.status for record in records if record.phase == CONFIRM]
    return not fresh or COMPLETE in fresh or not evidence.facts.is_finished


def _lines(study: Place, evidence: Evidence, records: list[TrialRecord], has_result: bool) -> list[str]:
    """Return the comparison with the baselines and the results of the confirm phase, in words."""
    if not has_result:
        return ["No trial is complete yet, so there is nothing to compare."]
    confirmed = confirm_lines(study, evidence.trials)
    if len(evidence.confirmed):  # a table shows each finalist
        confirmed = [line for line in confirmed if not line.startswith("  ") and not line.endswith(":")]
    compared = comparison_lines(records, evidence.trials, evidence.facts.task)
    return [*compared, *(line.strip() for line in confirmed)]


def _numbers(evidence: Evidence) -> list[Sheet]:
    """Return the small tables below the verdicts: scores per split, and finalists."""
    sheets, levels, confirmed = [], _levels(evidence), evidence.confirmed
    if len(levels):
        sheets.append(sheet(f"{evidence.facts.metric.label} per split", levels))
    if len(confirmed):
        frame = confirmed[[name for name in SHORT_CONFIRMED if name in confirmed]]
        units = list(dict.fromkeys(confirmed.get("unit", pd.Series(dtype=str)).dropna()))
        over = f" over {joined(units)}" if units else ""
        caption = f"Finalists on the test stories, the winner first; low, high: 95% interval of gain_test{over}"
        differences = ("selection_bias", "gain_test", "low", "high", "gain_of_stories")
        formats = {"lr": BRIEF} | dict.fromkeys(differences, SIGNED)
        sheets.append(sheet(caption, frame.dropna(axis=1, how="all"), formats=formats))
    return sheets


def _slopes(slopes: pd.DataFrame) -> Sheet | None:
    """Return the effects of rank on every outcome, None if there are none."""
    if not len(slopes):
        return None
    frame = slopes[[name for name in SHORT_SLOPES if name in slopes]]
    frame = frame.assign(outcome=frame["outcome"].replace(OUTCOMES))
    caption = "Slope per doubling of rank, and effect over the range of ranks tried with its 95% interval"
    return sheet(caption, frame, formats=dict.fromkeys(("slope", "effect", "low", "high"), SIGNED) | {"p": p_value})


def _levels(evidence: Evidence) -> pd.DataFrame:
    """Return the scores of baselines, best trial and winner, and the noise ceiling, one row each."""
    levels, facts, best_id = evidence.levels, evidence.facts, evidence.best_id
    best = evidence.trials.set_index("trial_id")[facts.metric.column].get(best_id) if best_id else None
    rows = [
        ("frozen encoder", levels.frozen, levels.frozen_test),
        ("word rate", levels.word_rate, levels.word_rate_test),
        (f"best of the search ({best_id})", best, None),
    ]
    if len(evidence.confirmed):
        winner = evidence.confirmed.iloc[0]
        rows.append((f"winner with fresh seeds ({winner['trial_id']})", winner["cc_confirmed"], winner["cc_test"]))
    rows.append(("noise ceiling", levels.ceiling, levels.ceiling_test))
    names = ["", "validation" if facts.task == ENCODING else "held-out texts", "test"]
    frame = pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[1:], "Float64"))
    return frame.dropna(axis=0, how="all", subset=names[1:]).dropna(axis=1, how="all")


def _examples(evidence: Evidence, records: list[TrialRecord]) -> Sheet | None:
    """Return held-out texts of the best trial of a classification, before and after training."""
    examples = [r.examples for r in records if r.trial_id == evidence.best_id and r.examples]
    if evidence.facts.task != CLASSIFICATION or not examples:
        return None
    caption = f"Held-out texts, with the predictions of trial {evidence.best_id} before and after training"
    return sheet(caption, pd.DataFrame(examples[0]), wide=("text",))


def settings_sheet(study: dict[str, Any], records: Sequence[TrialRecord]) -> Sheet:
    """Return every setting of the searched trials and of the baselines, failed ones excluded."""
    ended = [r for r in records if r.status != FAILED]
    columns = {
        "searched trials": [r.config for r in ended if r.phase == SEARCH],
        "baselines": [r.config for r in ended if r.phase not in (SEARCH, CONFIRM) and r.config["method"] not in TUNED],
    }
    shown = {name: configs for name, configs in columns.items() if configs} or {"requested": [study["config"]]}
    rows = [
        {"setting": name} | {column: one_or_several(c.get(name) for c in configs) for column, configs in shown.items()}
        for name in study["config"]
    ]
    return sheet("Settings; several values were searched", pd.DataFrame(rows), wide=tuple(shown))


def provenance_rows(study: dict[str, Any]) -> list[tuple[str, str]]:
    """Return where the results come from: command, code, versions, data, split."""
    git, data, options = study.get("git") or {}, study["data"], study.get("options", {})
    uncommitted = " (with uncommitted changes)" if git.get("dirty") else ""
    rows = [
        ("started", study["created"]),
        ("command", shlex.join(study["command_line"])),
        ("commit", f"{git['commit']}{uncommitted}" if git else "not in a git checkout"),
        ("code of bert_encoding", study["code"]),
        ("Python", f"{study['python']}, {study['platform']}"),
        ("packages", joined([f"{name} {version}" for name, version in study["versions"].items()])),
        ("precision of training", study["precision"] or "not known yet"),
        ("precision of word vectors", vectors_precision(study)),
        ("model", f"{study['model']['name']} (weights {study['model']['weights'] or 'not known yet'})"),
        ("data", f"{data['source']} (fingerprint {data['fingerprint']})"),
        ("voxels", f"{study['voxels']['asked']} (key {study['voxels']['key']})"),
        ("search space", f"{study['space']['name']} (hash {study['space']['hash']})"),
    ]
    if study.get("general_text"):
        rows.append(("general text", joined([f"{name} {key}" for name, key in study["general_text"].items()])))
    given = [f"{name} {setting(v)}" for name, v in options.items() if v is not False and v not in (None, "", [])]
    rows.append(("options", "; ".join(given) or "none"))
    for i, split in enumerate(study["splits"], 1):
        fold = f", fold {i}" if len(study["splits"]) > 1 else ""
        rows += [(f"{role}{fold}", ", ".join(map(str, names))) for role, names in split.items()]
    return rows


def _warnings(evidence: Evidence, records: list[TrialRecord]) -> list[str]:
    """Return what a reader must know before relying on the results."""
    study, verdicts = evidence.facts.study, evidence.verdicts
    lines = list(evidence.warnings)
    if verdicts and (changed := delta_note(study.get("options", {}), verdicts[0].delta)):
        lines.append(changed)
    for look in evidence.facts.looks:
        for other in look.get("looks", []):
            lines.append(f"These test stories had been used before by study {other['study']} ({other['at']}).")
    for record in records:
        if record.status == FAILED:
            reason = (record.error or "").strip().splitlines() or ["no reason was recorded"]
            lines.append(f"Trial {record.trial_id} failed: {reason[-1]}")
    if (study.get("git") or {}).get("dirty"):
        lines.append("The code had uncommitted changes: its fingerprint identifies it, the commit does not.")
    if takeovers := len(study.get("takeovers", [])):
        lines.append(f"The study was taken over {counted(takeovers, 'time')} from a run that seemed to be active.")
    return [*lines, *study["data"].get("notes", [])]


def shared_notes(records: Sequence[TrialRecord]) -> list[str]:
    """Return each note once, with the trials that have it."""
    trials_of: dict[str, list[str]] = {}
    for record in records:
        for note in record.notes:
            trials_of.setdefault(note, []).append(record.trial_id)
    lines = []
    for note, names in trials_of.items():
        more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
        lines.append(f"{note} (trial{'s' * (len(names) > 1)} {joined([*names[:MOST_NAMED], *more])})")
    return lines
