"""Studies made by hand for tests of the report."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_study import study_json

from bert_encoding.core.files import write_json
from bert_encoding.core.storage import make_folder
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, write_record
from study.report import html as report
from study.report.figures.figures import Drawn
from study.results.evidence import Evidence
from study.results.gather import gather
from study.results.verdicts.rules import Verdict

HOSTILE = "<script>alert(1)</script>"


def record(
    trial_id: str = "0001", cc: float | None = 0.1, phase: str = "search", method: str = "lora", **more: Any
) -> TrialRecord:
    """A trial by hand; failed without ``cc``; ``more`` are settings."""
    return TrialRecord(
        status="FAILED" if cc is None else "COMPLETE",
        method=method,
        config=asdict(TrialConfig(**({"model": "tiny", "method": method} | more))),
        trial_id=trial_id,
        phase=phase,
        error="Traceback (most recent call last):\n  ...\nValueError: loss [nan] at step 3" if cc is None else None,
        scores={} if cc is None else {"cc_mean": cc, "cc_seen": cc + 0.1},
        seconds={"total": 90.0},
        node="here",
    )


BASELINES = [
    record("baseline-frozen", 0.1, "baseline", "frozen"),
    record("baseline-word_rate", 0.04, "baseline", "word_rate"),
]


SEARCHED = [record("0001", 0.12, rank=2), record("0002", 0.1234567, rank=16), record("0003", None, rank=64)]


RANK = Verdict(
    "Does a higher rank help?", "cannot tell", "The effect of rank is +0.001 CC (-0.004 to +0.006).",
    ("It rests on 2 trials.",), None, 0.002, True, "python study/run.py --space lora_rank",
)  # fmt: skip


def evidence_of(folder: Any, **changes: Any) -> Evidence:
    """The tables of a study on disk, with a verdict by hand."""
    evidence = gather(folder)
    return evidence._replace(**({"verdicts": (RANK,) * bool(evidence.verdicts)} | changes))


def write_study(folder: Any, study: dict[str, Any], records: list[TrialRecord]) -> Any:
    """Write a study into a folder, or into object storage, and return its place."""
    make_folder(folder)
    write_json(folder / "study.json", study)
    for trial in records:
        write_record(folder, trial)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study in which every name that a user chooses is a script."""
    folder = tmp_path_factory.mktemp("hostile") / "study"
    data = {"source": f'/data/{HOSTILE}" onload="alert(1)', "fingerprint": HOSTILE, "n_voxels": {HOSTILE: 3}}
    study = study_json(
        name=f"mine {HOSTILE}",
        space={"name": HOSTILE, "hash": HOSTILE, "source": f'"""{HOSTILE}"""\n# </code></pre>{HOSTILE}'},
        model={"name": HOSTILE, "weights": None},
        command_line=["run.py", HOSTILE, "\"'><img src=x onerror=alert(1)>"],
        data=study_json()["data"] | data | {"notes": [HOSTILE]},
        splits=[{"fit": ["a", HOSTILE], "validation": [f"{HOSTILE}v"], "test": [f"{HOSTILE}t"]}],
        versions={HOSTILE: HOSTILE},
        general_text={"probe": HOSTILE},
    )
    records = [replace(trial) for trial in (*BASELINES, *SEARCHED)]
    for trial in records:
        trial.notes = [f"note {HOSTILE}"]
        trial.params = {HOSTILE: HOSTILE}
    records[-1].error = f"Traceback\nValueError: {HOSTILE}"
    write_study(folder, study, records)
    verdict = RANK._replace(
        question=HOSTILE, headline=HOSTILE, sentences=(HOSTILE,), command=f"</code></pre>{HOSTILE}", answer=HOSTILE
    )
    table = pd.DataFrame({"trial_id": [HOSTILE], "cc_confirmed": [0.1], "cc_test": [0.1]})
    evidence = evidence_of(folder, verdicts=(verdict,), warnings=(HOSTILE,), confirmed=table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_all", lambda *arguments: [drawing(folder, HOSTILE)])
        return Path(str(report.write_report(folder, evidence)))


def drawing(folder: Path, words: str = "rank") -> Drawn:
    """A figure with its own styles, as matplotlib writes them, and with a script."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 90 60" width="90" height="60">'
        '<style>rect {stroke: black}</style><rect width="90" height="60" style="fill: #ff0000"/>'
        "<script>alert(2)</script></svg>"
    )
    (folder / "one.svg").write_text(svg)
    (folder / "one.png").write_bytes(b"\x89PNG pixels")
    return Drawn(
        "one", folder / "one.png", folder / "one.svg", f"Title {words}", f"Caption {words}, n = 3", f"Alt {words}\"'"
    )
