"""Compare two studies: whether their scores are comparable, and the results of each."""

from typing import Any

import pandas as pd

from bert_encoding.core.errors import InputError
from study.results.evidence import Evidence


def compare(first: Evidence, second: Evidence) -> pd.DataFrame:
    """Return the results of two studies, one row per finding and one column per study.

    InputError names the first difference in data, stories or voxels, which makes their scores not comparable.
    """
    check_comparable(first.facts.study, second.facts.study)
    names = [first.facts.name, second.facts.name]
    names[1] += " (2)" if names[0] == names[1] else ""
    results = {name: _results(study) for name, study in zip(names, (first, second), strict=True)}
    return pd.DataFrame(results).rename_axis("finding").reset_index()


def check_comparable(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Refuse to compare scores on different data; parameters as of ``study.json``, error as of ``compare``."""
    for name, read in _MUST_AGREE.items():
        values = [read(study) for study in (first, second)]
        if values[0] != values[1]:
            studies = " and ".join(str(study.get("name", "")) for study in (first, second))
            raise InputError(
                f"{studies}: cannot be compared, since {name} differ: {_short(values[0])} and {_short(values[1])}; "
                "run both on the same"
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
    "their held-out texts": lambda study: [split.get("held-out") for split in study.get("splits", [])],
}


def _short(value: Any) -> str:
    """Return a value on one line, cut if it is long."""
    of_folds = isinstance(value, list) and any(isinstance(item, list) for item in value)
    text = "; ".join(", ".join(names) for names in value if names) if of_folds else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _results(study: Evidence) -> dict[str, str]:
    facts, frozen = study.facts, study.levels.frozen
    results = {
        "space": facts.space,
        "sampler": facts.sampler,
        "complete trials": str(facts.n_complete),
        "best": "" if study.history.empty else f"{study.history['best_so_far'].iloc[-1]:.4f}",
        "best trial": study.best_id or "",
        "frozen": "" if frozen is None else f"{frozen:.4f}",
    }
    for name, verdict in reversed(list(zip(("tuning", "rank"), study.verdicts, strict=False))):
        results[name] = verdict.answer + (" (exploratory)" if verdict.is_exploratory else "")
        results[f"effect of {name}"] = "" if verdict.effect is None else str(verdict.effect)
    return results
