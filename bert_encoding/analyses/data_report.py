"""The doctor: can a data set be trusted with hours of computing? Every defect is told, not the first alone.

One pass over the responses, a block at a time, finds shapes, voxels and scales, and how word rate lags.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_encoding.analyses.alignment import SHIFTS, USABLE, LagProfile, LagSums, check_alignment, in_trs
from bert_encoding.core.command_line import absolute
from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets.inspect import Survey, survey
from bert_encoding.datasets.inspect_responses import ResponseCheck
from bert_encoding.datasets.splits import choose_subjects
from bert_encoding.datasets.story import Dataset

USABLE_AS_IT_IS, USABLE_WITH_MASKS, NOT_USABLE = "usable", "usable with these masks", "not usable"
USABLE_WITH_DOUBTS = "usable, with doubts"
EXIT_CODES = {USABLE_AS_IT_IS: 0, USABLE_WITH_MASKS: 1, USABLE_WITH_DOUBTS: 1, NOT_USABLE: 2}
BAR_COLUMNS = 50
COLUMNS_MEAN = (
    "silent: rows of the transcript without a spoken word; outside: words before the first or after the last TR; "
    "max|mean| and SDs: over the voxels of a story, of which the medians decide whether it counts as z-scored"
)
SHOWN_NAMES = 8


@dataclass(frozen=True)
class Report:
    """What was found of a data set.

    Attributes
    ----------
    profiles : a lag profile a subject
    reasons : why the data are not usable, a line each
    doubts : what speaks against them without ruling them out, a line each
    notes : what else a user should know, a line each
    """

    survey: Survey
    profiles: tuple[LagProfile, ...]
    reasons: tuple[str, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One of ``EXIT_CODES``."""
        if self.reasons:
            return NOT_USABLE
        if self.doubts:
            return USABLE_WITH_DOUBTS
        return USABLE_WITH_MASKS if self.survey.left_out else USABLE_AS_IT_IS

    @property
    def exit_code(self) -> int:
        """Return 0, 1 or 2."""
        return EXIT_CODES[self.verdict]


def check_dataset(dataset: Dataset) -> Report:
    """Look at everything once. Stories that only some subjects heard are checked for these."""
    sums = LagSums(dataset)
    found = survey(dataset, sums)
    masks = found.dataset.voxel_masks
    assert masks is not None
    profiles = tuple(sums.profile(subject, masks[subject]) for subject in dataset.subjects)
    reasons, doubts = list(found.problems), list(found.doubts)
    for profile in profiles:
        try:
            doubts += check_alignment(profile)
        except InputError as error:
            reasons.append(str(error))
    told = (*found.left_out, *found.doubts)
    notes = (*(note for note in found.dataset.notes if note not in told), *_region_notes(dataset))
    return Report(found, profiles, tuple(reasons), tuple(doubts), notes)


def choose_heard(dataset: Dataset, subjects: list[str] | None) -> Dataset:
    """Return the data set restricted to some subjects, all by default, and the stories that one of them heard.

    Raises
    ------
    InputError
        if a subject is unknown, or heard no story that has text.
    """
    chosen = choose_subjects(dataset, subjects)
    heard = {name: [s for s in chosen if s in story.responses] for name, story in dataset.stories.items()}
    for subject in chosen:
        if not any(subject in listeners for listeners in heard.values()):
            raise InputError(f"{dataset.source}: subject {subject} has no responses to any story that has text")
    unheard = [name for name, listeners in heard.items() if not listeners]
    partly = [name for name, listeners in heard.items() if listeners and len(listeners) < len(chosen)]
    notes = list(dataset.notes)
    if unheard:
        notes.append(f"{len(unheard)} stories have text alone and stay out: {_some(unheard)}")
    if partly:
        notes.append(
            f"{len(partly)} stories lack responses of a subject, and of a study of all of them: {_some(partly)}"
        )
    used = dataset.only([name for name in heard if name not in unheard], chosen)
    return replace(used, notes=tuple(notes))


def _region_notes(dataset: Dataset) -> list[str]:
    return [
        f"regions of {subject}: " + ", ".join(f"{name} ({voxels.size} voxels)" for name, voxels in regions.items())
        for subject, regions in dataset.rois.items()
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


# --- for people -------------------------------------------------------------------------------------------------------


def print_report(console: Console, report: Report, *remarks: str) -> None:
    """Print a line a story and subject, the lag profiles, remarks and notes, and the verdict."""
    console.print(_table(report))
    _say(console, "", COLUMNS_MEAN)
    for profile in report.profiles:
        _say(console, "", *lag_lines(profile))
    _say(console, "", *remarks, *(f"note: {note}" for note in (*report.notes, *report.survey.left_out)))
    _say(console, f"verdict: {report.verdict}", *(f"  because {reason}" for reason in report.reasons or report.doubts))


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("story", "subject"):
        table.add_column(name, no_wrap=True)
    for name in (
        "words",
        "silent",
        "outside",
        "rows",
        "voxels",
        "non-finite",
        "constant",
        "max|mean|",
        "SDs",
        "repeats",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    texts = {text.story: text for text in report.survey.texts}
    for check in report.survey.responses:
        text = texts[check.story]
        words = (text.n_words, text.n_silent, f"{text.share_outside:.1%}")
        cells = (check.story, check.subject, *map(_cell, words), *_response_cells(check), _state(report, check))
        table.add_row(*map(Text, cells))  # no markup: a name may have [brackets]
    return table


def _response_cells(check: ResponseCheck) -> list[str]:
    rows = _cell(check.n_rows)
    if check.n_rows != check.n_rows_expected:
        rows += f" of {check.n_rows_expected}"
    mean = None if check.max_abs_mean is None else f"{check.max_abs_mean:.2f}"
    sd = None if check.sd_range is None else "{:.2f}-{:.2f}".format(*check.sd_range)
    return [rows, *map(_cell, (check.n_voxels, check.n_nonfinite, check.n_constant, mean, sd, check.n_repeats))]


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _state(report: Report, check: ResponseCheck) -> str:
    has_bad_text = any(text.problem for text in report.survey.texts if text.story == check.story)
    if check.problems or has_bad_text:
        return "NOT USABLE"
    return "not z-scored" if check.is_z_scored is False else "ok"


def lag_lines(profile: LagProfile) -> list[str]:
    """Return a lag profile as lines of text: a bar a shift, ``>`` where aligned data peak, ``:`` at the noise floor."""
    if not np.isfinite(profile.cc).all():
        return [f"lag of {profile.subject}: too little data"]
    clear = "clear" if profile.is_clear else "not clear of the noise"
    top = max(float(profile.cc.max()), profile.floor, 1e-9)
    floor = round(BAR_COLUMNS * profile.floor / top)
    lines = [
        f"lag of {profile.subject}: held-out CC of word rate, shifted so that the response comes later by so many TRs; "
        f"best at {in_trs(profile.peak, profile.tr_s)}, {clear}"
    ]
    for shift, cc in zip(profile.shifts, profile.cc, strict=True):
        bar = ("#" * round(BAR_COLUMNS * max(float(cc), 0) / top)).ljust(floor)
        bar = bar if len(bar) > floor else f"{bar}:"
        lines.append(f"{'>' if shift in USABLE else ' '} {shift:+3d} {cc:+.4f} {bar}")
    return lines


def draw_lags(report: Report, file: Path) -> None:
    """Draw all lag profiles into one figure; the ending of ``file`` says in which format.

    Raises
    ------
    OSError
        if the file cannot be written.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(USABLE.start - 0.5, USABLE.stop - 0.5, color="0.9", label="peak of aligned data")
    axes.axhline(0, color="0.5", linewidth=0.8)
    for profile in report.profiles:
        (line,) = axes.plot(profile.shifts, profile.cc, marker="o", markersize=3, label=profile.subject)
        axes.axhline(profile.floor, color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set(
        title=f"Lag of responses behind words ({report.verdict})",
        xlabel="shift (TRs; above 0 the response comes later)",
        ylabel="held-out CC of word rate (dotted: noise floor)",
    )
    axes.set_xticks(SHIFTS[::2])
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower(), dpi=150)


def default_figure(source: str) -> Path:
    """Return where the figure of a data set goes, under the current folder."""
    return Path("results") / "check" / f"{absolute('', source).name or 'data'}-lag.png"


# --- for programs -----------------------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
    """Return a report as plain values.

    ``kind``: "responses". ``source``, ``verdict``, ``reasons``, ``doubts``, ``notes`` as in ``Report``.
    ``left_out``: masks, a line a subject.
    ``fingerprint``: of the content, null if the data are not usable. ``trim``: TRs at start and end.
    ``stories``: one object a story, the fields of ``TextCheck``. ``responses``: one a story and subject, the fields of
    ``ResponseCheck``. ``voxels``: subject -> ``{"all": n, "valid": n}``. ``lags``: one object a subject with
    ``subject``, ``shifts`` (TRs), ``cc``, ``floor``, ``peak`` (TRs), ``peak_s``, ``is_clear``. What could not be
    measured is null.
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
        "lags": [_plain_lag(profile) for profile in report.profiles],
    }


def _plain_lag(profile: LagProfile) -> dict[str, Any]:
    names = ("subject", "shifts", "cc", "floor", "peak", "is_clear")
    return _plain({name: getattr(profile, name) for name in names} | {"peak_s": profile.peak * profile.tr_s})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return lists for arrays and null for NaN."""
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | tuple | list):
        return [_plain_value(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
