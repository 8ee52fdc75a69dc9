"""The data check: is a data set fit for hours of computing? It reports every defect, not only the first.

One pass over the responses, a block at a time, checks shapes, voxels and scales, and computes the lag of word rate.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.analyses.alignment import PLAUSIBLE, SHIFTS, LagProfile, LagSums, check_alignment, in_trs
from bert_encoding.core.command_line import plain_table, print_lines
from bert_encoding.core.errors import InputError, first_names
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets.inspect import Survey, survey
from bert_encoding.datasets.inspect_responses import ResponseCheck
from bert_encoding.datasets.splits import choose_subjects
from bert_encoding.datasets.story import Dataset

USABLE, USABLE_WITH_MASKS, NOT_USABLE = "usable", "usable with these masks", "not usable"
USABLE_WITH_DOUBTS = "usable, with doubts"
EXIT_CODES = {USABLE: 0, USABLE_WITH_MASKS: 1, USABLE_WITH_DOUBTS: 1, NOT_USABLE: 2}
BAR_COLUMNS = 50
LAG_FIELDS = ("subject", "shifts", "cc", "floor", "peak", "is_clear")
NUMBER_COLUMNS = "words silent outside rows voxels non-finite constant max|mean| SDs repeats".split()
COLUMNS_MEAN = (
    "silent: rows of the transcript without a spoken word; outside: words before the first or after the last TR; "
    "max|mean| and SDs: extremes over the voxels of a story (their medians decide whether it counts as z-scored)"
)


@dataclass(frozen=True)
class Report:
    """The result of a data check."""

    survey: Survey
    profiles: tuple[LagProfile, ...]  # one per subject
    reasons: tuple[str, ...]  # why the data are not usable, one line each
    doubts: tuple[str, ...]  # what speaks against the data without ruling them out
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One of ``EXIT_CODES``."""
        if self.reasons:
            return NOT_USABLE
        if self.doubts:
            return USABLE_WITH_DOUBTS
        return USABLE_WITH_MASKS if self.survey.left_out else USABLE

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def check_dataset(dataset: Dataset) -> Report:
    """Check everything in one pass; a story that only some subjects heard is checked for these."""
    sums = LagSums(dataset)
    checked = survey(dataset, sums)
    masks = checked.dataset.voxel_masks
    assert masks is not None
    profiles = tuple(sums.profile(subject, masks[subject]) for subject in dataset.subjects)
    reasons, doubts = list(checked.problems), list(checked.doubts)
    for profile in profiles:
        try:
            doubts += check_alignment(profile)
        except InputError as error:
            reasons.append(str(error))
    shown_elsewhere = (*checked.left_out, *checked.doubts)
    notes = [note for note in checked.dataset.notes if note not in shown_elsewhere]
    for subject, regions in dataset.rois.items():
        sizes = ", ".join(f"{name} ({voxels.size} voxels)" for name, voxels in regions.items())
        notes.append(f"regions of {subject}: {sizes}")
    return Report(checked, profiles, tuple(reasons), tuple(doubts), tuple(notes))


def with_responses(dataset: Dataset, subjects: list[str] | None) -> Dataset:
    """Restrict a data set to some subjects, all by default, and to the stories that at least one of them heard.

    Raises InputError if a subject is unknown, or heard no story that has text.
    """
    chosen = choose_subjects(dataset, subjects)
    listeners = {name: [s for s in chosen if s in story.responses] for name, story in dataset.stories.items()}
    for subject in chosen:
        if not any(subject in names for names in listeners.values()):
            raise InputError(f"{dataset.source}: subject {subject} has no responses to any story that has text")
    unheard = [name for name, subjects in listeners.items() if not subjects]
    partly = [name for name, subjects in listeners.items() if subjects and len(subjects) < len(chosen)]
    notes = list(dataset.notes)
    if unheard:
        notes.append(f"{len(unheard)} stories have text but no responses and are ignored: {first_names(unheard)}")
    if partly:
        lack = "stories lack responses of a subject; a study of all subjects ignores them"
        notes.append(f"{len(partly)} {lack}: {first_names(partly)}")
    used = dataset.only([name for name in listeners if name not in unheard], chosen)
    return replace(used, notes=tuple(notes))


def print_report(console: Console, report: Report, remark: str) -> None:
    """Print one line per story and subject, the lag profiles, a remark, notes, and the verdict."""
    console.print(_table(report))
    print_lines(console, "", COLUMNS_MEAN)
    for profile in report.profiles:
        print_lines(console, "", *lag_lines(profile))
    print_lines(console, "", remark, *(f"note: {note}" for note in (*report.notes, *report.survey.left_out)))
    causes = report.reasons or report.doubts
    print_lines(console, f"verdict: {report.verdict}", *(f"  because {cause}" for cause in causes))


def _table(report: Report) -> Table:
    table = plain_table(("story", "subject"), NUMBER_COLUMNS)
    table.add_column("", no_wrap=True)
    texts = {text.story: text for text in report.survey.texts}
    for check in report.survey.responses:
        text = texts[check.story]
        counts = (str(text.n_words), str(text.n_silent), f"{text.share_outside:.1%}", *_response_cells(check))
        state = "not z-scored" if check.is_z_scored is False else "ok"
        if check.problems or text.problem:
            state = "NOT USABLE"
        table.add_row(*map(Text, (check.story, check.subject, *counts, state)))  # no markup: names may have [brackets]
    return table


def _response_cells(check: ResponseCheck) -> list[str]:
    rows = "-" if check.n_rows is None else str(check.n_rows)
    if check.n_rows != check.n_rows_expected:
        rows += f" of {check.n_rows_expected}"
    mean = None if check.max_abs_mean is None else f"{check.max_abs_mean:.2f}"
    sd = None if check.sd_range is None else "{:.2f}-{:.2f}".format(*check.sd_range)
    values = (rows, check.n_voxels, check.n_nonfinite, check.n_constant, mean, sd, check.n_repeats)
    return ["-" if value is None else str(value) for value in values]


def lag_lines(profile: LagProfile) -> list[str]:
    """Return a lag profile as a bar chart in text: ``>`` marks plausible lags, ``:`` the noise floor."""
    if not np.isfinite(profile.cc).all():
        return [f"lag of {profile.subject}: too little data"]
    clear = "above the noise" if profile.is_clear else "within the noise"
    top = max(float(profile.cc.max()), profile.floor, 1e-9)
    floor = round(BAR_COLUMNS * profile.floor / top)
    lines = [
        f"lag of {profile.subject}: held-out CC of word rate if the response follows it by this many TRs; "
        f"best at {in_trs(profile.peak, profile.tr_s)}, {clear}"
    ]
    for shift, cc in zip(profile.shifts, profile.cc, strict=True):
        bar = ("#" * round(BAR_COLUMNS * max(float(cc), 0) / top)).ljust(floor)
        bar = bar if len(bar) > floor else f"{bar}:"
        lines.append(f"{'>' if shift in PLAUSIBLE else ' '} {shift:+3d} {cc:+.4f} {bar}")
    return lines


def draw_lags(report: Report, file: Path) -> None:
    """Draw all lag profiles into one figure, in the format that the ending of ``file`` names."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(PLAUSIBLE.start - 0.5, PLAUSIBLE.stop - 0.5, color="0.9", label="peak of aligned data")
    axes.axhline(0, color="0.5", linewidth=0.8)
    for profile in report.profiles:
        (line,) = axes.plot(profile.shifts, profile.cc, marker="o", markersize=3, label=profile.subject)
        axes.axhline(profile.floor, color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set(
        title=f"Lag of responses behind words ({report.verdict})",
        xlabel="shift (TRs; above 0: the response follows the word)",
        ylabel="held-out CC of word rate (dotted: noise floor)",
    )
    axes.set_xticks(SHIFTS[::2])
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower(), dpi=150)


def to_json(report: Report) -> dict[str, Any]:
    """Return a report as plain values; what could not be measured is None.

    ``left_out``: masks, one line per subject. ``fingerprint``: None if the data are not usable. ``trim``: TRs at start
    and end. ``stories``: fields of ``TextCheck``. ``responses``: fields of ``ResponseCheck``. ``voxels``: subject ->
    ``{"all": n, "valid": n}``. ``lags``: ``shifts`` and ``peak`` in TRs, ``peak_s`` in seconds.
    """
    dataset = report.survey.dataset
    masks = dataset.voxel_masks or {}
    return {
        "kind": "responses",
        "source": dataset.source,
        "verdict": report.verdict,
        "reasons": list(report.reasons),
        "doubts": list(report.doubts),
        "left_out": list(report.survey.left_out),
        "notes": list(report.notes),
        "fingerprint": dataset.fingerprint or None,
        "trim": list(dataset.trim),
        "stories": [_plain(text._asdict()) for text in report.survey.texts],
        "responses": [_plain(check._asdict()) for check in report.survey.responses],
        "voxels": {subject: {"all": int(m.size), "valid": int(m.sum())} for subject, m in masks.items()},
        "lags": [
            _plain({name: getattr(profile, name) for name in LAG_FIELDS} | {"peak_s": profile.peak * profile.tr_s})
            for profile in report.profiles
        ],
    }


def _plain(value: Any) -> Any:
    """Return lists instead of arrays and tuples, and None instead of NaN."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [_plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not np.isfinite(value) else value
