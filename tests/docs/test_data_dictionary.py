"""Compare the data dictionary of docs/results.md with the files that the program writes, both ways."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from make_data import make_lab
from make_texts import make_text_bert, negated_texts, write_texts
from make_trials import PEFT_WARNS
from project import ROOT

from bert_encoding.analyses.partition_tables import ARRAYS
from bert_encoding.commands.fit import fit
from bert_encoding.commands.partition import partition
from bert_encoding.core.files import read_json, write_json
from bert_encoding.core.names import ADAPT, CLASSIFICATION
from bert_encoding.datasets.corpus import open_corpus
from bert_encoding.datasets.responses import Responses
from bert_encoding.features.word_tables import export_stories, export_words
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.text_tasks.run import run_text_trial
from bert_encoding.text_tasks.task import make_text_task
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.pipeline import Task
from bert_encoding.trial.record import TrialRecord, adapter_folder, read_records, write_record
from bert_encoding.trial.run import run_test, run_trial
from bert_encoding.trial.tables import write_tables
from study.results.locked_stories import heard_by
from study.results.standing import Standing
from study.session.confirm import fix_winner, validation_jobs
from study.session.identity import identify
from study.setup.encoding_study import prepare
from study.setup.resolve import resolve_options
from study.setup.spaces import load_space

PAGE = ROOT / "docs" / "results.md"
TEST, SUBJECTS, N_VOXELS, SUGGESTED = "wheretheressmoke", ("a", "b"), 12, {"log2_rank": 2}
TABLES = ("trials", "epochs", "subjects", "stories")
LATER = ("session", "forced", "takeovers", "look_permitted")  # keys of study.json that a session may add
HEADS = ("column", "array")

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


class Entry(NamedTuple):
    """One row of the dictionary."""

    kind: str
    null_when: str


def dictionary(file: str) -> dict[str, Entry]:
    """Return the table below the heading that names a file, by column or array."""
    section = re.search(rf"^### `{re.escape(file)}`$(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S)
    assert section, f"{PAGE.name} has no section ### `{file}`"
    rows = [row.strip().strip("|").split(" | ") for row in section[1].splitlines() if row.startswith("|")]
    assert rows[0][0].strip() in HEADS, rows[0]
    assert [cell.strip() for cell in rows[0]][2:] == ["meaning", "null when"]
    entries = {row[0].strip().strip("`"): Entry(row[1].strip(), row[-1].strip()) for row in rows[2:]}
    assert len(entries) == len(rows) - 2, f"{file}: a row is there twice"
    return entries


def assert_same_names(file: str, written: Iterable[str], lacking: Iterable[str] = ()) -> None:
    """Compare names both ways; ``<word>`` in the dictionary stands for any part of a name."""
    patterns = {name: re.sub(r"<[^>]+>", "[^/]+", name) for name in dictionary(file)}
    names = set(written)
    unknown = sorted(name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns.values()))
    unused = sorted(n for n, pattern in patterns.items() if not any(re.fullmatch(pattern, name) for name in names))
    assert unknown == [], f"{file}: not in the dictionary"
    assert unused == sorted(lacking), f"{file}: in the dictionary, and not written"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """Three studies, of encoding, classification and adaptation, written without Ray."""
    folder = tmp_path_factory.mktemp("dictionary")
    write_encoding_study(folder, tiny_bert)
    write_text_studies(folder)
    return folder


def write_encoding_study(root: Path, tiny_bert: Path) -> None:
    make_lab(root / "lab", subjects=SUBJECTS, n_words=260, n_voxels=N_VOXELS)
    for subject in SUBJECTS:
        write_json(root / "lab" / subject / "rois.json", {"language": [0, 1, 2]})
    options = {"space": "smoke", "data": str(root / "lab"), "model": str(tiny_bert), "out": str(root), "name": "s"}
    space = load_space("smoke")
    study = prepare(resolve_options(options | {"epochs": 1, "confirm": 1, "confirm_seeds": 1}, {}, space), space)
    folder, task = root / "s", study.task()
    folder.mkdir()
    about = identify(study, task)
    write_json(folder / "study.json", about)
    config = replace(study.base, lr=1e-2, precision="float32", window_tokens=64, stride=40)
    heard = with_repeats(task)
    for method in ("frozen", "word_rate"):
        keep(folder, run_trial(replace(config, method=method), heard, score_test=True), f"baseline-{method}")
    run = {"adapter_folder": adapter_folder(folder, "0001")}
    searched = keep(folder, run_trial(replace(config, rank=4), heard, **run), "0001", "search", SUGGESTED)
    keep(folder, run_trial(replace(config, method="full"), heard), "0002", "search")
    keep(folder, TrialRecord("FAILED", "lora", searched.config, error="no"), "0003", "search", SUGGESTED)
    keep(folder, replace(searched, repeat_of="0001"), "0004", "search", SUGGESTED)
    with_folder = SimpleNamespace(**vars(study.options) | {"folder": folder})
    job = validation_jobs(with_folder, read_records(folder), 1, lambda config: "key")[0]  # type: ignore[arg-type]
    fresh = TrialConfig.from_dict(job.config)
    keep(folder, run_trial(fresh, heard), job.trial_id, job.phase)
    identity = about | {"heard": heard_by(task.dataset, task.splits[0].test)}
    fixed = fix_winner(with_folder, read_records(folder), 1, identity)  # type: ignore[arg-type]
    assert fixed is not None
    write_json(folder / "confirm.json", fixed | {"keys": {}})
    keep(folder, run_test(fresh, heard), f"test-{fixed['winner']}", "confirm")
    write_tables(folder, read_records(folder))


def with_repeats(task: Task) -> Task:
    """The test story heard three times, by both subjects."""
    story, rng = task.dataset.stories[TEST], np.random.default_rng(0)
    mean = {subject: responses.read(np.arange(N_VOXELS)) for subject, responses in story.responses.items()}
    repeats = {s: Responses(array=Y + rng.standard_normal((3, *Y.shape)).astype("f4")) for s, Y in mean.items()}
    heard = replace(story, repeats=repeats)
    return task._replace(dataset=replace(task.dataset, stories={**task.dataset.stories, TEST: heard}))


def write_text_studies(root: Path) -> None:
    bert = str(make_text_bert(root / "bert"))
    corpus = open_corpus(write_texts(root / "texts.csv", negated_texts(60)))
    for kind in (CLASSIFICATION, ADAPT):
        task = make_text_task(kind, corpus, seed=0, max_length=32)
        config = TrialConfig(model=bert, epochs=1, precision="float32", target_modules="all")
        keep(root / kind, run_text_trial(replace(config, method="frozen"), task), "baseline-frozen")
        keep(root / kind, run_text_trial(config, task), "0001", "search")
        write_tables(root / kind, read_records(root / kind))


def keep(
    folder: Path, record: TrialRecord, trial_id: str, phase: str = "baseline", params: dict[str, Any] | None = None
) -> TrialRecord:
    """Write a record as the driver does: with the fields that only the driver knows."""
    complete = replace(record, trial_id=trial_id, phase=phase, params=params or {}, key=trial_id)
    write_record(folder, complete)
    return complete


def table(root: Path, name: str) -> pd.DataFrame:
    """All rows that the three studies have of one table."""
    parts = [pd.read_parquet(root / study / f"{name}.parquet") for study in ("s", CLASSIFICATION, ADAPT)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


@pytest.mark.parametrize("name", TABLES)
def test_columns_and_dictionary_agree(root: Path, name: str) -> None:
    assert_same_names(f"{name}.parquet", set(table(root, name)) - set(SUGGESTED))


@pytest.mark.parametrize("name", TABLES)
def test_columns_that_are_never_null_and_types_are_as_documented(root: Path, name: str) -> None:
    frame, entries = table(root, name), dictionary(f"{name}.parquet")
    assert "never" in {entry.null_when for entry in entries.values()}
    for column, entry in entries.items():
        for values in (frame[real] for real in frame if re.fullmatch(re.sub(r"<[^>]+>", "[^/]+", column), real)):
            assert entry.null_when != "never" or values.notna().all(), column
            assert entry.kind.startswith("text") != pd.api.types.is_numeric_dtype(values), column
            known = values.dropna().to_numpy()
            assert not entry.kind.startswith("integer") or np.array_equal(known, known.astype(float).round()), column


def test_keys_of_json_files(root: Path) -> None:
    assert_same_names("study.json", read_json(root / "s" / "study.json"), LATER)
    assert_same_names("confirm.json", read_json(root / "s" / "confirm.json"))
    assert_same_names("record.json", read_json(root / "s" / "trials" / "0001" / "record.json"))
    assert_same_names("summary.json", (*Standing._fields, "gain", "confirmed", "verdict"))


def test_scores_of_a_record_are_columns_or_named_below_its_table(root: Path) -> None:
    page = PAGE.read_text()
    for file in root.glob("*/trials/*/record.json"):
        for name in read_json(file)["scores"]:
            assert f"`{name}`" in page or name.startswith("cc_roi_"), (file, name)


def test_arrays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    names: dict[str, set[str]] = {"cc.npz": set(), "details.npz": set()}
    for file, arrays in names.items():
        for path in root.glob(f"s/trials/*/{file}"):
            arrays |= set(np.load(path).files)
        assert_same_names(file, arrays)
    assert fit("s", trial="0001") == 0
    assert_same_names("model.npz", np.load("s/model.npz").files)


def test_partition(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"spaces": ["word_rate", "bag_of_words"], "trust_alignment": True}
    assert partition(str(root / "lab"), **options, to=str(root / "partition")) == 0
    assert_same_names("partition.json", read_json(root / "partition" / "partition.json"))
    ceilings = [name for name in ARRAYS if name.startswith("<subject>/cc_")]  # the folder holds no repeats
    assert_same_names("partition.npz", np.load(root / "partition" / "partition.npz").files, ceilings)
    assert dictionary("partition.npz").keys() == ARRAYS.keys()


def test_exported_columns(tiny_encoder: Encoder) -> None:
    texts = ["the river", "a letter to the river"]
    occurrences, means = export_words(texts, ["river"], tiny_encoder)
    assert_same_names("words.parquet", export_stories(texts, tiny_encoder))
    assert_same_names("occurrences.parquet", occurrences)
    assert_same_names("occurrences-means.parquet", means)
