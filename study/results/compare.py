"""Two studies side by side: whether they may be compared, and what each found."""

from typing import Any

import pandas as pd

from bert_encoding.core.errors import InputError
from study.results.evidence import Evidence

ROWS = (
    "space",
    "sampler",
    "complete trials",
    "best",
    "best trial",
    "frozen",
    "rank",
    "effect of rank",
    "tuning",
    "effect of tuning",
)


def compare(one: Evidence, other: Evidence) -> pd.DataFrame:
    """Return what two studies found, a row a finding and a column a study.

    Raises
    ------
    InputError
        if they were judged on other data, stories or voxels, so that their scores do not compare; it names the first
        difference.
    """
    check_comparable(one.facts.study, other.facts.study)
    names = [one.facts.name, other.facts.name]
    names[1] += " (2)" if names[0] == names[1] else ""
    found = pd.DataFrame({name: _findings(which) for name, which in zip(names, (one, other), strict=True)})
    return found.reindex(ROWS).rename_axis("finding").reset_index()


def check_comparable(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse to compare scores on unlike data; parameters as of ``study.json``, error as of ``compare``."""
    for what, read in _MUST_AGREE.items():
        values = [read(study) for study in (one, other)]
        if values[0] != values[1]:
            first, second = (str(study.get("name", "")) for study in (one, other))
            raise InputError(
                f"{first} and {second}: cannot be compared, since {what} differ: {_short(values[0])} and "
                f"{_short(values[1])}; run both on the same"
            )


def _stories(role: str) -> Any:
    return lambda study: [sorted(split.get(role, ())) for split in study.get("splits", [])]


_MUST_AGREE: dict[str, Any] = {
    "their tasks": lambda study: study.get("task", "encoding"),
    "their data": lambda study: study.get("data", {}).get("fingerprint"),
    "their trims": lambda study: study.get("data", {}).get("trim_trs"),
    "their voxels": lambda study: study.get("voxels", {}).get("key"),
    "their fit stories": _stories("fit"),
    "their validation stories": _stories("validation"),
    "their test stories": _stories("test"),
    "the texts held out": lambda study: [split.get("held-out") for split in study.get("splits", [])],
}


def _short(value: Any) -> str:
    """Return a value on one line, cut where it is long."""
    of_folds = isinstance(value, list) and any(isinstance(one, list) for one in value)
    text = "; ".join(", ".join(names) for names in value if names) if of_folds else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _findings(found: Evidence) -> dict[str, str]:
    facts, rows = found.facts, found.history
    best = "" if rows.empty else f"{rows['best_so_far'].iloc[-1]:.4f}"
    told = {
        "space": facts.space,
        "sampler": facts.sampler,
        "complete trials": str(facts.n_complete),
        "best": best,
        "best trial": found.best_id or "",
        "frozen": "" if found.levels.frozen is None else f"{found.levels.frozen:.4f}",
    }
    for name, verdict in zip(("tuning", "rank"), found.verdicts, strict=False):
        told[name] = verdict.answer + (" (exploratory)" if verdict.is_exploratory else "")
        told[f"effect of {name}"] = "" if verdict.effect is None else str(verdict.effect)
    return told
