"""What the report shows, as plain values: the template arranges them and adds nothing."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pandas as pd

import bert_encoding
from bert_encoding.core.names import CLASSIFICATION, COMPLETE, CONFIRM, ENCODING, FAILED, SEARCH, TUNED
from bert_encoding.core.storage import Place
from bert_encoding.trial.record import TrialRecord
from bert_encoding.trial.tables import stories_frame
from study.report.methods.data import vectors_precision
from study.report.methods.inference import inference_paragraphs
from study.report.methods.methods import methods_paragraphs
from study.report.tables import OUTCOMES, Sheet, brief, chance, meanings, sheet, signed, trial_columns, trial_sheet
from study.results.confirmed import confirm_lines
from study.results.evidence import Evidence, Verdict
from study.results.load import forced_lines
from study.results.standing import gain_over_stories, standing, verdict_lines
from study.session.confirm import is_complete
from study.setup.delta import delta_note
from study.wording import counted, joined, one_or_several, said

ANSWERS = {  # answer -> (how it is shown, its colour)
    "helps": ("It helps.", "good"),
    "overfits": ("It overfits.", "bad"),
    "no effect": ("No detectable effect.", "even"),
    "cannot tell": ("These trials cannot tell.", "open"),
}
OFF: tuple[Any, ...] = (None, "", [])  # an option that was not given; 0 is a value
MOST_NAMED = 5  # trials that share a note
SHORT_SLOPES = "outcome adjustment subset n_trials n_ranks n_stories slope effect low high p".split()
SHORT_CONFIRMED = (
    "trial_id rank lr cc_searched cc_confirmed selection_bias cc_test frozen_test gain_test low high gain_of_stories"
).split()


class ShownVerdict(NamedTuple):
    """A verdict as the page shows it; ``kind`` is its colour."""

    question: str
    answer: str
    kind: str
    headline: str
    sentences: tuple[str, ...]
    command: str | None


class Page(NamedTuple):
    """Everything that the page shows.

    Attributes
    ----------
    incomplete : what is still missing; empty of a finished study
    lines : said below the verdicts
    numbers : small tables below these
    slopes : effects of rank; None where there are none
    pictures : of ``html.Picture``
    not_drawn : the figures that there is nothing to draw of, and why
    settings : every setting of the trials
    source : of the search space
    notes : what trials noted, and which
    """

    title: str
    question: str
    incomplete: tuple[str, ...]
    verdicts: tuple[ShownVerdict, ...]
    lines: tuple[str, ...]
    numbers: tuple[Sheet, ...]
    slopes: Sheet | None
    pictures: tuple[Any, ...]
    not_drawn: tuple[str, ...]
    trials: Sheet
    meanings: tuple[tuple[str, str], ...]
    examples: Sheet | None
    methods: tuple[str, ...]
    settings: Sheet
    provenance: tuple[tuple[str, str], ...]
    space: str
    source: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    written: str
    version: str


def make_page(
    study: Place,
    evidence: Evidence,
    records: list[TrialRecord],
    pictures: Sequence[Any] = (),
    absent: Sequence[str] = (),
    troubles: Sequence[str] = (),
) -> Page:
    """Return what the page of a study shows.

    Parameters
    ----------
    records : of ``read_records``
    pictures, absent, troubles : of ``html.draw``
    """
    facts, trials = evidence.facts, evidence.trials
    return Page(
        title=f"Study {facts.name}",
        question=facts.question,
        incomplete=tuple(incomplete_lines(evidence, records)),
        verdicts=tuple(shown_verdict(verdict) for verdict in evidence.verdicts) if _has_result(trials) else (),
        lines=tuple(_lines(study, evidence, records)),
        numbers=tuple(_numbers(evidence)),
        slopes=_slopes(evidence),
        pictures=tuple(pictures),
        not_drawn=tuple(absent),
        trials=trial_sheet(trials, facts.task),
        meanings=tuple(meanings(trial_columns(trials, facts.task))),
        examples=_examples(evidence, records),
        methods=tuple(methods_paragraphs(facts.study, records, facts.looks, _inference(evidence))),
        settings=settings_sheet(facts.study, records),
        provenance=tuple(provenance_rows(facts.study)),
        space=facts.space,
        source=facts.study["space"]["source"],
        warnings=tuple(dict.fromkeys((*_warnings(study, evidence, records), *troubles))),
        notes=tuple(shared_notes(records)),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=bert_encoding.__version__,
    )


def shown_verdict(verdict: Verdict) -> ShownVerdict:
    """Return a verdict as the page shows it; what an adaptive search says is labelled."""
    answer, kind = ANSWERS.get(verdict.answer, (verdict.answer, "open"))
    label = " Exploratory: the search was adaptive." * verdict.is_exploratory
    headline, *sentences = (typeset(text) for text in (verdict.headline, *verdict.sentences))
    return ShownVerdict(verdict.question, answer + label, kind, headline, tuple(sentences), verdict.command)


def typeset(text: str) -> str:
    """Return a text of ours with the signs that a terminal may lack."""
    return text.replace("+-", "\u00b1")


def incomplete_lines(evidence: Evidence, records: list[TrialRecord]) -> list[str]:
    """Say what a study that still runs, or was interrupted, lacks."""
    facts, lines = evidence.facts, []
    if not facts.is_finished:
        lines.append(f"{facts.n_searched:,} of {counted(facts.n_asked, 'searched trial')} have ended.")
    if not any(record.phase not in (SEARCH, CONFIRM) and record.status == COMPLETE for record in records):
        lines.append("There is no baseline yet to compare with.")
    asked = facts.study.get("options", {}).get("confirm") or 0
    if asked and facts.task == ENCODING and facts.n_asked and _confirm_is_pending(evidence, records):
        best = "configuration is" if asked == 1 else f"{asked} configurations are"
        lines.append(f"The best {best} still to be confirmed with fresh seeds and on the test stories.")
    return lines


def _confirm_is_pending(evidence: Evidence, records: list[TrialRecord]) -> bool:
    looks = evidence.facts.looks
    if looks:
        return not is_complete(looks[-1], records)
    fresh = [record.status for record in records if record.phase == CONFIRM]
    return not fresh or COMPLETE in fresh or not evidence.facts.is_finished


def _inference(evidence: Evidence) -> list[str]:
    return inference_paragraphs(evidence) if _has_result(evidence.trials) else []


def _has_result(trials: pd.DataFrame) -> bool:
    return bool((trials["status"] == COMPLETE).any())


def _lines(study: Place, evidence: Evidence, records: list[TrialRecord]) -> list[str]:
    """Return what is said of the comparison with the baseline, and of the confirm phase."""
    trials, task = evidence.trials, evidence.facts.task
    if not _has_result(trials):
        return ["No trial has ended completely: there is nothing to compare."]
    found = standing(trials, task)
    gain = gain_over_stories(stories_frame(records), found.best_id) if task == ENCODING and found.best_id else None
    confirmed = confirm_lines(study, trials)
    if len(evidence.confirmed):  # a table tells of each finalist
        confirmed = [line for line in confirmed if not line.startswith("  ") and not line.endswith(":")]
    return [*verdict_lines(found, gain), *(line.strip() for line in confirmed)]


def _numbers(evidence: Evidence) -> list[Sheet]:
    """Return the small tables: levels and finalists; of a study on text the first alone."""
    sheets = []
    levels = _levels(evidence)
    if len(levels):
        sheets.append(sheet(f"{evidence.facts.metric_label} by role of the stories", levels))
    if len(evidence.confirmed):
        frame = evidence.confirmed[[name for name in SHORT_CONFIRMED if name in evidence.confirmed]]
        units = list(dict.fromkeys(evidence.confirmed.get("unit", pd.Series(dtype=str)).dropna()))
        over = f" over {joined(units)}" if units else ""
        caption = f"Finalists on the test stories, the winner first; low, high: 95% interval of gain_test{over}"
        differences = ("selection_bias", "gain_test", "low", "high", "gain_of_stories")
        formats = {"lr": brief} | dict.fromkeys(differences, signed)
        sheets.append(sheet(caption, frame.dropna(axis=1, how="all"), formats=formats))
    return sheets


def _slopes(evidence: Evidence) -> Sheet | None:
    """Return the effects of rank on every outcome."""
    if not len(evidence.slopes):
        return None
    frame = evidence.slopes[[name for name in SHORT_SLOPES if name in evidence.slopes]]
    frame = frame.assign(outcome=frame["outcome"].replace(OUTCOMES))
    caption = "Slope a doubling of rank, and effect over the range of ranks tried with its 95% interval"
    formats = dict.fromkeys(("slope", "effect", "low", "high"), signed) | {"p": chance}
    return sheet(caption, frame, formats=formats)


def _levels(evidence: Evidence) -> pd.DataFrame:
    """Return the scores of baselines, best trial and winner, and the ceiling; a row each."""
    levels, facts = evidence.levels, evidence.facts
    best = evidence.trials.set_index("trial_id")[facts.metric].get(evidence.best_id) if evidence.best_id else None
    rows = [
        ("frozen encoder", levels.frozen, levels.frozen_test),
        ("word rate", levels.word_rate, levels.word_rate_test),
        (f"best of the search ({evidence.best_id})", best, None),
    ]
    if len(evidence.confirmed):
        winner = evidence.confirmed.iloc[0]
        rows.append((f"winner with fresh seeds ({winner['trial_id']})", winner["cc_confirmed"], winner["cc_test"]))
    rows.append(("noise ceiling", levels.ceiling, levels.ceiling_test))
    names = ("", "validation", "test") if facts.task == ENCODING else ("", "held-out texts", "test")
    frame = pd.DataFrame(rows, columns=list(names)).astype({names[1]: "Float64", names[2]: "Float64"})
    return frame.dropna(axis=0, how="all", subset=list(names[1:])).dropna(axis=1, how="all")


def _examples(evidence: Evidence, records: list[TrialRecord]) -> Sheet | None:
    """Return held-out texts of the best trial of a classification, before and after training."""
    found = [r.examples for r in records if r.trial_id == evidence.best_id and r.examples]
    if evidence.facts.task != CLASSIFICATION or not found:
        return None
    caption = f"Held-out texts of trial {evidence.best_id}, with what was said of them before and after training"
    return sheet(caption, pd.DataFrame(found[0]), wide=("text",))


def settings_sheet(study: dict[str, Any], records: Sequence[TrialRecord]) -> Sheet:
    """Return every setting: of the searched trials that did not fail, and of the baselines."""
    trained = [r.config for r in records if r.phase == SEARCH and r.status != FAILED]
    others = [r.config for r in records if r.phase not in (SEARCH, CONFIRM) and r.status != FAILED]
    columns = {"searched trials": trained, "baselines": [c for c in others if c["method"] not in TUNED]}
    shown = {name: configs for name, configs in columns.items() if configs} or {"asked for": [study["config"]]}
    rows = [
        {"setting": name} | {told: one_or_several(c.get(name) for c in configs) for told, configs in shown.items()}
        for name in study["config"]
    ]
    return sheet("Settings; several values were searched", pd.DataFrame(rows), wide=tuple(shown))


def provenance_rows(study: dict[str, Any]) -> list[tuple[str, str]]:
    """Return where the results come from: command, code, versions, data, split."""
    git, data, options = study.get("git") or {}, study["data"], study.get("options", {})
    dirty = " (with changes that are not committed)" if git.get("dirty") else ""
    rows = [
        ("begun", study["created"]),
        ("command", shlex.join(study["command_line"])),
        ("commit", f"{git['commit']}{dirty}" if git else "not in a git checkout"),
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
        rows.append(("general text", joined([f"{what} {key}" for what, key in study["general_text"].items()])))
    given = [f"{name} {said(value)}" for name, value in options.items() if value is not False and value not in OFF]
    rows.append(("options", "; ".join(given) or "none"))
    return [*rows, *_split_rows(study["splits"])]


def _split_rows(splits: Sequence[dict[str, Sequence[str]]]) -> list[tuple[str, str]]:
    several = len(splits) > 1
    return [
        (f"{role}{f', fold {at + 1}' if several else ''}", ", ".join(map(str, names)))
        for at, split in enumerate(splits)
        for role, names in split.items()
    ]


def _warnings(study: Place, evidence: Evidence, records: list[TrialRecord]) -> list[str]:
    """Return what a reader must know before believing anything."""
    about = evidence.facts.study
    lines = [*evidence.warnings, *(line.removeprefix("note: ") for line in forced_lines(study))]
    changed = delta_note(about.get("options", {}), evidence.verdicts[0].delta) if evidence.verdicts else None
    lines += [changed] if changed else []
    lines += [
        f"These test stories had been read before, by study {one['study']} ({one['at']})."
        for look in evidence.facts.looks
        for one in look.get("looks", [])
    ]
    for record in records:
        if record.status == FAILED:
            reason = (record.error or "").strip().splitlines() or ["no reason was recorded"]
            lines.append(f"Trial {record.trial_id} failed: {reason[-1]}")
    if (about.get("git") or {}).get("dirty"):
        lines.append("The code had changes that are not committed: its fingerprint identifies it, the commit does not.")
    takeovers = len(about.get("takeovers", []))
    if takeovers:
        lines.append(f"The study was taken over {counted(takeovers, 'time')} from a run that seemed to be at work.")
    return [*lines, *about["data"].get("notes", [])]


def shared_notes(records: Sequence[TrialRecord]) -> list[str]:
    """Return each note once, with the trials that have it."""
    of_note: dict[str, list[str]] = {}
    for record in records:
        for note in record.notes:
            of_note.setdefault(note, []).append(record.trial_id)
    return [f"{note} ({_trials(names)})" for note, names in of_note.items()]


def _trials(names: Sequence[str]) -> str:
    shown = (
        joined(names)
        if len(names) <= MOST_NAMED
        else f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"
    )
    return f"trial{'s' * (len(names) > 1)} {shown}"
