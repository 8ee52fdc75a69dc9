"""The confirm phase: who is confirmed, in which order, who has looked, and what is said of it."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_data import make_lab
from make_trials import PEFT_WARNS, make_task
from project import RUN
from ray.tune.search import Searcher
from rich.console import Console
from study_process import private_tmp, run_command

from bert_encoding.core.command_line import BAD_INPUT, run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import content_key, write_json
from bert_encoding.core.names import METRICS
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.responses import Responses
from bert_encoding.datasets.splits import Split, choose_stories
from bert_encoding.language_model.encoder import load_encoder
from bert_encoding.language_model.lora import load_adapter, load_whole
from bert_encoding.trial.config import OLDER_SETTINGS, TrialConfig
from bert_encoding.trial.pipeline import Chain, Task
from bert_encoding.trial.record import TrialRecord, read_cc, read_record, read_records, write_record
from bert_encoding.trial.run import run_test, run_trial
from bert_encoding.trial.scoring import examine_predictions
from bert_encoding.trial.tables import trials_frame
from study.results import locked_stories as looks_module
from study.results.confirmed import confirm_lines, confirm_summary, confirmed_trials
from study.results.load import load_trials
from study.results.locked_stories import check_looks, heard_by, look_file, next_look, permit_look, read_looks
from study.results.standing import cc_by_rank, standing
from study.run import app
from study.search.job_list import JobList
from study.search.progress import ProgressLine
from study.search.worker import Job, run_job
from study.session.confirm import choose_finalists, confirm, fresh_seeds, is_complete, is_lacking
from study.session.session import _confirm, check_look
from study.setup.encoding_study import Study
from study.setup.resolve import options_record, resolve_options
from study.setup.spaces import load_space
from study.setup.text_study import TextStudy

__all__ = ["private_tmp"]  # a fixture
pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]

BASE = TrialConfig(model="tiny", epochs=1)
HEARD = {"eta": ["subject2 e7a"], "zeta": ["subject2 2e7a"]}
IDENTITY = {**{"data": {"fingerprint": "abc"}, "code": "c0de", "splits": [{"test": ["zeta", "eta"]}]}, "heard": HEARD}
Of = Callable[[Job], float | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with four different searched configurations and two baselines."""
    study = tmp_path / "out" / "s"
    write_json(study_file(study), {})
    for method in ("frozen", "word_rate"):
        write(study, f"baseline-{method}", 0.1, phase="baseline", config=replace(BASE, method=method))
    for at, cc in enumerate((0.20, 0.25, 0.15, 0.24), start=1):
        write(study, f"{at:04d}", cc, config=replace(BASE, rank=at))
    return study


def study_file(study: Path) -> Path:
    (study / "trials").mkdir(parents=True, exist_ok=True)
    return study / "study.json"


def a_record(
    name: str, cc: float | None, config: TrialConfig = BASE, phase: str = "search", **more: Any
) -> TrialRecord:
    given: dict[str, Any] = {
        **{"status": "FAILED" if cc is None else "COMPLETE", "method": config.method, "config": asdict(config)},
        **{"trial_id": name, "phase": phase, "key": key_of(config), "scores": {} if cc is None else {"cc_mean": cc}},
    }
    return TrialRecord(**given | more)


def write(study: Path, name: str, cc: float | None, **given: Any) -> None:
    write_record(study, a_record(name, cc, **given))


def key_of(config: TrialConfig) -> str:
    return content_key(asdict(config))


def some_options(study: Path, **changes: Any) -> Any:
    given = {"confirm": 2, "confirm_seeds": 2, "seed": 0, "name": study.name, "out": str(study.parent), "trials": 4}
    return SimpleNamespace(**{**given, "folder": study, "data": "lab"} | changes)


class Play:
    """Runs jobs by pretending; ``of`` gives the validation CC of a job, None where it fails."""

    def __init__(self, study: Path, of: Of = lambda job: 0.2, n_until_killed: int = 1000) -> None:
        self.study, self.of, self.left = study, of, n_until_killed
        self.ran: list[str] = []
        self.out = io.StringIO()

    def __call__(self, name: str, jobs: list[Job]) -> str | None:
        for job in jobs:
            if self.left == 0:
                return None  # as after Ctrl-C
            self.left -= 1
            self.ran.append(job.trial_id)
            fixed = self.study / look_file(int(name.split("-")[1]))
            assert job.is_final == fixed.exists(), "the winner is fixed in between"
            value = self.of(job)
            failed = {"status": "FAILED", "error": "no"} if value is None else {}
            scores = {"cc_test" if job.is_final else "cc_mean": value} | {"epoch_kept": 3.0}
            record = TrialRecord("COMPLETE", job.config["method"], job.config, scores=scores)
            write_record(self.study, replace(record, trial_id=job.trial_id, phase=job.phase, key=job.key, **failed))
        return None

    def confirm(self, look: int = 1, **changes: Any) -> None:
        console = Console(file=self.out, width=400)
        options = some_options(self.study, **changes)
        assert confirm(options, self.study, look, IDENTITY, key_of, self, console) is None


# --- who is confirmed -------------------------------------------------------------------------------------------------


def test_finalists_are_the_best_different_complete_searched_trials() -> None:
    def ranked(name: str, cc: float | None, rank: int, seed: int = 0, **more: Any) -> TrialRecord:
        return a_record(name, cc, config=replace(BASE, rank=rank, seed=seed), **more)

    records = [
        ranked("0001", 0.30, 1),
        ranked("0002", 0.32, 1, seed=5),  # the same but for the seed: its best counts
        ranked("0003", 0.40, 2, status="STOPPED"),
        ranked("0004", 0.50, 3, repeat_of="0009"),
        ranked("0005", None, 4),
        ranked("0006", 0.31, 5),
        ranked("0007", 0.31, 6),
        ranked("confirm-0001-seed7", 0.60, 7, phase="confirm"),
        ranked("baseline-frozen", 0.70, 8, phase="baseline"),
    ]
    assert [one.trial_id for one in choose_finalists(records, 9)] == ["0002", "0006", "0007"]
    assert [one.trial_id for one in choose_finalists(records[::-1], 2)] == ["0002", "0006"]
    older = replace(BASE, rank=5, embed_precision="float32", seed=9)
    again = a_record("0008", 0.29, config=older)
    for setting in OLDER_SETTINGS:
        del again.config[setting]  # recorded before it could be set
    other = ranked("0009", 0.28, 5)  # auto: another configuration
    same = a_record("0010", 0.27, config=replace(older, seed=3))
    assert [one.trial_id for one in choose_finalists([again, other, same], 9)] == ["0008", "0009"]


def test_fresh_seeds_are_new_and_always_the_same() -> None:
    first = fresh_seeds(3, 1, 4, set())
    assert len(set(first)) == 4
    assert fresh_seeds(3, 1, 2, set()) == first[:2]
    assert fresh_seeds(3, 1, 3, {first[1]}) == [first[0], *first[2:]]
    assert not set(first) & (set(fresh_seeds(3, 2, 4, set())) | set(fresh_seeds(4, 1, 4, set())))


def test_the_winner_has_the_best_mean_over_fresh_seeds_and_all_are_scored(folder: Path) -> None:
    """Trial 2 was the best of the search, and has the best single seed; trial 4 has the best mean."""
    seeds = fresh_seeds(0, 1, 2, {0})
    cc = {2: (0.26, 0.10), 4: (0.21, 0.20), 1: (0.18, 0.18)}

    def of(job: Job) -> float:
        return 0.5 if job.is_final else cc[job.config["rank"]][seeds.index(job.config["seed"])]

    play = Play(folder, of)
    play.confirm(confirm=3)
    (fixed,) = read_looks(folder)
    assert fixed["winner"] == "0004"
    assert [one["trial_id"] for one in fixed["finalists"]] == ["0002", "0004", "0001"]
    np.testing.assert_allclose([one["cc_confirmed"] for one in fixed["finalists"]], [0.18, 0.205, 0.18], rtol=1e-12)
    assert fixed["finalists"][1]["cc_of_seed"] == {str(seeds[0]): 0.21, str(seeds[1]): 0.20}
    assert (fixed["seeds"], fixed["n_searched"], fixed["looks"], fixed["code"]) == (seeds, 4, [], "c0de")
    assert set(play.ran[:6]) == {f"confirm-{name}-seed{seed}" for name in ("0001", "0002", "0004") for seed in seeds}
    tested = ["test-baseline-frozen", "test-baseline-word_rate", "test-0001", "test-0002", "test-0004"]
    assert sorted(play.ran[6:]) == sorted(tested)
    assert {read_record(folder, f"test-000{at}").config["seed"] for at in (1, 2, 4)} == {seeds[0]}
    assert "the winner is trial 0004, by its mean validation CC 0.2050 over 2 fresh seeds" in play.out.getvalue()


def test_a_finalist_that_fails_with_every_seed_drops_out(folder: Path) -> None:
    first = fresh_seeds(0, 1, 2, {0})[0]

    def of(job: Job) -> float | None:
        rank, seed = job.config["rank"], job.config["seed"]
        return None if rank == 2 or (rank == 4 and seed == first) else 0.3

    play = Play(folder, of)
    play.confirm()
    (fixed,) = read_looks(folder)
    assert fixed["winner"] == "0004"
    assert [one["cc_confirmed"] for one in fixed["finalists"]] == [None, 0.3]
    assert "test-0002" not in play.ran and "test-0004" in play.ran
    assert any("Finalist 0002 dropped out" in line for line in confirm_lines(folder, load_trials(folder)))


def test_nothing_is_read_where_every_finalist_fails(folder: Path) -> None:
    play = Play(folder, lambda job: None)
    play.confirm()
    assert len(play.ran) == 4 and read_looks(folder) == []
    assert "nothing is confirmed" in play.out.getvalue()
    assert not is_lacking(some_options(folder), read_records(folder), 1), "a session that goes on has nothing to do"


def test_patience_becomes_the_epochs_that_the_fresh_seeds_kept(folder: Path) -> None:
    write(folder, "0005", 0.9, config=replace(BASE, epochs=8, patience=2))
    Play(folder).confirm(confirm=1)
    config = read_record(folder, "test-0005").config
    assert (config["patience"], config["epochs"]) == (None, 3)


# --- in which order, and what a killed study does ---------------------------------------------------------------------


@pytest.mark.parametrize("n", range(9))
def test_a_study_that_was_interrupted_goes_on_where_it_was(folder: Path, n: int) -> None:
    whole = 2 * 2 + 2 + 2
    first = Play(folder, n_until_killed=n)
    first.confirm()
    options, records = some_options(folder), read_records(folder)
    assert is_lacking(options, records, None if read_looks(folder) else 1) == (n < whole)
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    second = Play(folder)
    second.confirm()
    assert len(first.ran + second.ran) == len(set(first.ran + second.ran)) == whole
    assert {file: file.read_bytes() for file in before} == before, "nothing that was written is written again"
    (fixed,) = read_looks(folder)
    assert is_complete(fixed, read_records(folder))


def test_an_interrupted_search_or_look_is_not_followed_by_another_look(folder: Path) -> None:
    console = Console(file=io.StringIO())

    def session(play: Play, look: int | None, **changes: Any) -> None:
        assert _confirm(some_options(folder, **changes), folder, look, IDENTITY, key_of, play, console) is None

    interrupted = Play(folder, n_until_killed=5)
    session(interrupted, 1, trials=5)
    assert interrupted.ran == [], "the search lacks a trial"
    session(interrupted, 1)
    assert len(interrupted.ran) == 5 and len(read_looks(folder)) == 1
    interrupted.left = 1
    permit_look(folder, 2)
    session(interrupted, 2)
    assert len(interrupted.ran) == 6 and len(read_looks(folder)) == 1
    rest = Play(folder)
    session(rest, 2)
    assert len(read_looks(folder)) == 2
    assert [name.endswith("-look2") for name in rest.ran] == [False] * 2 + [False] * 4 + [True] * 4


def test_a_second_look_has_seeds_of_its_own_and_repeats_no_baseline(folder: Path) -> None:
    Play(folder).confirm()
    jobs: list[Job] = []

    def keep(name: str, given: list[Job]) -> None:
        jobs.extend(given)
        Play(folder)(name, [replace(job, is_final=True) for job in given if job.is_final])
        for job in given:
            write_record(folder, a_record(job.trial_id, 0.3, TrialConfig.from_dict(job.config), "confirm", key=job.key))

    permit_look(folder, 2)
    confirm(some_options(folder), folder, 2, IDENTITY, key_of, keep, Console(file=io.StringIO()))
    one, two = read_looks(folder)
    assert not set(one["seeds"]) & set(two["seeds"])
    assert [(look["study"], look["at"]) for look in two["looks"]] == [("s", one["at"])]
    final = {job.trial_id: job.repeat_of for job in jobs if job.is_final}
    assert final["test-baseline-frozen-look2"] == "test-baseline-frozen"
    assert final["test-0002-look2"] is None


def other_key_of(config: TrialConfig) -> str:
    """The key of a configuration after ``--force-resume`` with other code."""
    return content_key("other code", asdict(config))


def go_on_forced(folder: Path, n_until_killed: int = 1000) -> Play:
    play = Play(folder, n_until_killed=n_until_killed)
    assert confirm(some_options(folder), folder, 1, IDENTITY, other_key_of, play, Console(file=play.out)) is None
    return play


@pytest.mark.parametrize("n", [0, 3, 4])
def test_fresh_seeds_run_again_after_a_forced_change(folder: Path, n: int) -> None:
    Play(folder, n_until_killed=n).confirm()
    looked_before = bool(read_looks(folder))
    forced = go_on_forced(folder)
    assert len(forced.ran) == (4 if looked_before else 8)
    confirmed = [r for r in read_records(folder) if r.trial_id.startswith("confirm-")]
    expected = key_of if looked_before else other_key_of  # a winner that is fixed stays
    assert [r.key for r in confirmed] == [expected(TrialConfig.from_dict(r.config)) for r in confirmed]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_an_interrupted_look_is_scored_anew_after_a_forced_change(folder: Path, n: int) -> None:
    """Also if that is interrupted when every id has a record, of which some are old."""
    Play(folder, n_until_killed=7).confirm()
    (before,) = read_looks(folder)
    first = go_on_forced(folder, n_until_killed=n)
    records = read_records(folder)
    assert not is_complete(read_looks(folder)[0], records)
    assert is_lacking(some_options(folder), records, None)
    rest = go_on_forced(folder)
    assert len(first.ran) == n and len(set(first.ran + rest.ran)) == len(first.ran + rest.ran) == 4
    (after,) = read_looks(folder)
    assert is_complete(after, read_records(folder))
    assert {k: v for k, v in after.items() if k != "keys"} == {k: v for k, v in before.items() if k != "keys"}


def test_a_complete_look_is_left_alone_after_a_forced_change(folder: Path) -> None:
    Play(folder).confirm()
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    assert go_on_forced(folder).ran == []
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before


# --- who has looked ---------------------------------------------------------------------------------------------------


class Overtaken(Play):
    """Meanwhile a study beside this one fixes its winner, and reads the test stories."""

    def __call__(self, name: str, jobs: list[Job]) -> str | None:
        rival = self.study.parent / "rival"
        if not rival.exists():
            shutil.copytree(self.study, rival)
            Play(rival).confirm()
        return super().__call__(name, jobs)


def test_of_two_studies_at_once_the_second_does_not_look(folder: Path) -> None:
    second = Overtaken(folder)
    with pytest.raises(InputError, match=r"zeta have been read by study rival .*--look-again"):
        second.confirm()
    assert not (folder / "confirm.json").exists()
    assert len(second.ran) == 4, "and what it confirmed is kept"
    permit_look(folder, 1)
    Play(folder).confirm()
    (fixed,) = read_looks(folder)
    assert [look["study"] for look in fixed["looks"]] == ["rival"]


@pytest.mark.parametrize("how", ["damaged", "private", "of another kind"])
def test_a_neighbour_that_cannot_be_read_blocks_nobody(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = folder.parent / "a-neighbour"
    shutil.copytree(folder, bad)
    content = {"damaged": "{", "private": "{}", "of another kind": json.dumps(dict.fromkeys(looks_module._REQUIRED, 1))}
    (bad / "confirm.json").write_text(content[how])
    if how == "private":
        refuse_to_open(bad, monkeypatch)
    Play(folder).confirm()
    (said,) = caplog.messages
    assert said.startswith(f"study {bad} cannot be read, so its use of these test stories is unknown: ")
    with pytest.raises(InputError, match="have been read by study s "):
        check_looks(some_options(folder.parent / "t"), 1, HEARD, False)
    (folder / "confirm.json").write_text("{")
    with pytest.raises(InputError, match=r"s/confirm\.json: damaged"):
        check_looks(some_options(folder), 2, HEARD, False)


def refuse_to_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mode 0700 does to others; to root nothing is private."""
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)


ABOUT = {
    **{"task": "encoding", "created": "2026-01-02T03:04:05+00:00"},
    **{"data": {"n_voxels": {"subject2": 3}}, "splits": [{"test": ["zeta", "theta"]}]},
}


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({}, True),
        ({"data": {"n_voxels": {"subject9": 3}}}, False),
        ({"splits": [{"test": ["theta"]}]}, False),
        ({"task": "classification", "splits": None, "data": {}}, False),
    ],
)
def test_baselines_that_were_scored_beside_a_study_are_told_and_forbid_nothing(
    changes: dict[str, Any], is_told: bool, folder: Path
) -> None:
    other = folder.parent / "t"
    write_json(study_file(other), ABOUT | changes)
    write(other, "baseline-word_rate", 0.1, phase="baseline", scores={"cc_mean": 0.1, "cc_test": 0.2})
    write_json(study_file(folder.parent / "u"), ABOUT)
    write(folder.parent / "u", "baseline-word_rate", 0.1, phase="baseline")  # never scored on test stories
    Play(folder).confirm()
    (fixed,) = read_looks(folder)
    assert not fixed["test_was_read"]
    told = {"study": "t", "at": ABOUT["created"], "stories": ["zeta"], "baselines_only": True}
    assert fixed["looks"] == ([told] if is_told else [])
    first, *_, last = confirm_lines(folder, load_trials(folder))
    assert ("before a test story was read" in first) != is_told
    said = f"note: zeta had been used before by study t ({ABOUT['created']}, its baselines alone)"
    assert (last == said) == is_told


@pytest.mark.parametrize("how", ["baselines", "text"])
def test_a_winner_is_not_called_unseen_where_the_study_had_read_its_test_stories(how: str, folder: Path) -> None:
    if how == "baselines":  # as --trials 0 does, to which a search was added
        write(folder, "baseline-frozen", 0.1, phase="baseline", scores={"cc_mean": 0.1, "cc_test": 0.2})
    else:
        write(folder, "0005", 0.9, config=replace(BASE, mlm_text="all", rank=64))
    Play(folder).confirm()
    assert read_looks(folder)[0]["test_was_read"] is True
    first, *_, last = confirm_lines(folder, load_trials(folder))
    assert "fixed by validation: CC" in first
    why = {"baselines": "its baselines were scored on them (--trials 0)", "text": "fine-tuning read their text"}[how]
    assert last == f"note: this study had used its test stories before the winner was fixed: {why}"


def test_when_a_session_wants_a_look(folder: Path) -> None:
    def wanted(n_searched: int = 4, again: bool = False, done: bool = True, **changes: Any) -> int | None:
        return next_look(some_options(folder, **changes), n_searched, again, done)

    assert wanted(confirm=0) is None
    assert wanted() == 1
    Play(folder).confirm()
    assert wanted() is None
    assert wanted(trials=5) == wanted(n_searched=5) == wanted(confirm=3) == 2
    assert wanted(again=True) == 2
    assert wanted(again=True, done=False) is None, "the last look comes first"
    assert wanted(trials=5, confirm=0) is None
    permit_look(folder, 2)
    assert wanted() == 2, "it was forced in a session that was killed"


def test_a_second_look_is_refused_unless_forced(folder: Path) -> None:
    Play(folder).confirm()
    own, other = some_options(folder), some_options(folder.parent / "t")
    (fixed,) = read_looks(folder)
    told = rf"test stories eta, zeta have been read by study s \({fixed['at'][:10]}.*--confirm 0.*--look-again"
    for options, look in ((own, 2), (other, 1)):
        with pytest.raises(InputError, match=told):
            check_looks(options, look, HEARD, False)
        check_looks(options, look, HEARD, True)
        check_looks(options, None, HEARD, False)
        options.data = "demo"
        check_looks(options, look, HEARD, False)
        options.data = "lab"
    permit_look(folder, 2)
    check_looks(own, 2, HEARD, False)
    with pytest.raises(InputError, match="have been read"):
        check_looks(own, 3, HEARD, False)


@pytest.mark.parametrize(
    ("heard", "read"),
    [
        ({"eta": ["subject2 e7a"]}, "eta"),  # one of two
        ({"eta": ["subject2 e7a", "subject3 e7a"], "theta": ["subject2 7e7a", "subject3 7e7a"]}, "eta"),
        ({"theta": ["subject2 7e7a"]}, None),  # other stories
        ({"eta": ["subject3 e7a"], "zeta": ["subject3 2e7a"]}, None),  # other subjects
        ({"eta": ["subject2 another text"]}, None),  # other data, whose story has this name
    ],
)
def test_a_look_counts_where_a_subject_s_story_is_read_again(
    heard: dict[str, list[str]], read: str | None, folder: Path
) -> None:
    Play(folder).confirm()
    other = some_options(folder.parent / "t")
    if read is None:
        check_looks(other, 1, heard, False)
        return
    with pytest.raises(InputError, match=f"the test stories {read} have been read by study s"):
        check_looks(other, 1, heard, False)
    file = folder / "confirm.json"  # as a study that did not yet say who heard
    write_json(file, {k: v for k, v in json.loads(file.read_text()).items() if k != "heard"})
    with pytest.raises(InputError, match=f"the test stories {read} have been read by study s"):
        check_looks(other, 1, heard, False)


def test_fewer_training_stories_or_voxels_do_not_unlock_a_test_story(tmp_path: Path) -> None:
    dataset = open_dataset(make_lab(tmp_path / "lab"))
    train, test = choose_stories(dataset, dataset.subjects, None, None, 0)
    heard = heard_by(dataset.only(train + test, dataset.subjects), test)
    assert heard == heard_by(inspect(dataset.only(train[:3] + test, dataset.subjects)), test)
    assert list(heard) == sorted(test)
    first = test[0]
    assert [one.split()[0] for one in heard[first]] == list(dataset.subjects)
    spoken = {first: replace(dataset.stories[first], words=(*dataset.stories[first].words[:-1], "other"))}
    assert heard_by(replace(dataset, stories={**dataset.stories, **spoken}), test)[first] != heard[first]


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "confirm.json").write_text('{"look": 1}')
    with pytest.raises(InputError, match=r"confirm\.json: damaged \(no at, data"):
        read_looks(folder)


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_of_the_confirm_phase() -> None:
    smoke, text = load_space("smoke"), load_space("sentiment_lora")

    def resolve(space: Any = smoke, recorded: Any = None, **given: Any) -> Any:
        return resolve_options({"space": space.name, "address": "local"} | given, recorded or {}, space)

    assert (resolve().confirm, resolve().confirm_seeds, resolve(trials=0).confirm, resolve(text).confirm) == (
        3,
        2,
        0,
        0,
    )
    assert options_record(resolve(confirm=1, confirm_seeds=4)).items() >= {"confirm": 1, "confirm_seeds": 4}.items()
    assert resolve(recorded={"confirm": 1}).confirm == 1
    assert options_record(resolve(trials=0))["confirm"] is None, "a search that is added later has its own default"
    for named, space, given in (
        ("--confirm 2: not available for text-only studies", text, {"confirm": 2}),
        ("--confirm 2: with --trials 0 nothing is searched", smoke, {"confirm": 2, "trials": 0}),
        ("--confirm -1: must be at least 0", smoke, {"confirm": -1}),
        ("--confirm-seeds 0: must be at least 1", smoke, {"confirm_seeds": 0}),
    ):
        with pytest.raises(InputError, match=named):
            resolve(space, **given)


def test_what_is_said_where_nothing_can_be_looked_at_again() -> None:
    encoding, text = Study.__new__(Study), TextStudy.__new__(TextStudy)
    for study, trials, said in (
        (encoding, 4, "--look-again: --confirm is 0 in this study; give --confirm K too"),
        (encoding, 0, "--look-again: nothing is confirmed in this study; leave it out"),
        (text, 4, "--look-again: nothing is confirmed in this study; leave it out"),
    ):
        object.__setattr__(study, "options", SimpleNamespace(confirm=0, trials=trials))
        with pytest.raises(InputError) as refused:
            check_look(study, look_again=True)
        assert str(refused.value) == said


# --- jobs in Ray Tune's order, and their progress ---------------------------------------------------------------------


def test_jobs_are_handed_out_in_order_and_a_failure_stops_nothing() -> None:
    jobs = [Job(f"test-{at}", "confirm", "k", asdict(BASE), is_final=True) for at in range(3)]
    found, out = JobList(jobs, METRICS["encoding"]), io.StringIO()
    before = [a_record("0001", 0.3), a_record("test-0009", None, phase="confirm", status="COMPLETE")]
    line = ProgressLine(Console(file=out, width=400), found, before, found.n_jobs, 3, clock=lambda: 0.0)
    for name, status in (("a", "COMPLETE"), ("b", "FAILED")):
        job = found.suggest(name)
        result = {"job": job["trial_id"], "phase": "confirm", "status": status, "value": 0.4, "error": "no"}
        found.on_trial_complete(name, result)
        line.on_trial_result(0, [], SimpleNamespace(trial_id=name), result | {"ended": True, "is_final": True})
    assert [said.split(" | ")[:2] for said in out.getvalue().splitlines()] == [
        ["[test 1/3] test-0: CC 0.4000 on the test stories", "best CC 0.3000 (0001), frozen -"],
        ["[test 2/3] test-1: FAILED: no", "best CC 0.3000 (0001), frozen -"],
    ]
    assert found.suggest("c")["trial_id"] == "test-2"
    assert found.suggest("d") == Searcher.FINISHED
    found = JobList(jobs, METRICS["encoding"])
    found.error = "no space"
    assert found.suggest("a") == Searcher.FINISHED


# --- the trials themselves, on a tiny BERT ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Locked(Responses):
    """Responses to a test story: they may be read once ``confirm.json`` exists."""

    until: Path | None = None

    @contextmanager
    def open(self) -> Iterator[Any]:
        assert self.until is None or self.until.exists(), "a test story was read before the winner was fixed"
        with super().open() as source:
            yield source


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(open_dataset(make_lab(tmp_path_factory.mktemp("data") / "lab", n_words=110)))


@pytest.fixture(scope="module")
def small(tiny_bert: Path) -> TrialConfig:
    return TrialConfig(model=str(tiny_bert), epochs=1, rank=2, lr=5e-3, stride=100, window_tokens=102, probe_tokens=50)


def locked(task: Task, until: Path) -> Task:
    def lock(responses: Responses) -> Responses:
        return Locked(responses.path, responses.array, responses.key, until=until)

    stories = dict(task.dataset.stories)
    for name in task.splits[0].test:
        heard = {subject: lock(responses) for subject, responses in stories[name].responses.items()}
        stories[name] = replace(stories[name], responses=heard)
    return task._replace(dataset=replace(task.dataset, stories=stories, fingerprint=f"locked until {until}"))


def test_no_test_story_is_read_before_the_winner_is_fixed(tmp_path: Path, task: Task, small: TrialConfig) -> None:
    study = tmp_path / "s"
    guarded = locked(task, study / "confirm.json")
    write_json(study_file(study), {})
    with pytest.raises(AssertionError, match="a test story was read"):
        run_trial(replace(small, method="word_rate"), guarded, score_test=True)
    searched = replace(small, lr=1e-3)
    names = {"baseline-frozen": replace(small, method="frozen"), "0001": small, "0002": searched}
    for name, config in names.items():
        phase = "search" if name.isdigit() else "baseline"
        run_job(Job(name, phase, key_of(config), asdict(config)), guarded, study)

    def run(name: str, jobs: list[Job]) -> None:
        for job in jobs:
            run_job(job, guarded, study)

    options = some_options(study, trials=2, confirm_seeds=1)
    split = {"splits": [asdict(task.splits[0])]}
    assert confirm(options, study, 1, IDENTITY | split, key_of, run, Console(file=io.StringIO())) is None
    trials = load_trials(study).set_index("trial_id")
    assert list(trials["error"].dropna()) == []
    assert set(trials.index[trials["cc_test"].notna()]) == {"test-baseline-frozen", "test-0001", "test-0002"}
    final = trials[trials["cc_test"].notna()]
    assert final["cc_mean"].isna().all() and final["mlm_loss_heldout"].isna().all()
    assert (final["cc_test_low"] <= final["cc_test"]).all() and (final["cc_test"] <= final["cc_test_high"]).all()
    found = confirmed_trials(study, read_looks(study)[0], trials.reset_index())
    for one in found:
        assert one.gain is not None
        expected = float(trials.loc[f"test-{one.trial_id}", "cc_test"] - trials.loc["test-baseline-frozen", "cc_test"])
        assert one.gain.estimate == pytest.approx(expected, abs=1e-6)
        assert one.gain.low <= one.gain.estimate <= one.gain.high
    assert (study / "trials" / "test-0001" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.table
@pytest.mark.parametrize("method", ["full", "partial", "lora", "frozen"])
def test_a_confirmed_trial_keeps_its_weights_and_a_searched_one_only_an_adapter(
    method: str, tmp_path: Path, task: Task, small: TrialConfig
) -> None:
    config = replace(small, method=method, **({"frozen_blocks": 1} if method == "partial" else {}))
    study = tmp_path / "s"
    for name, phase in (("0001", "search"), ("test-0001", "confirm")):
        job = Job(name, phase, key_of(config), asdict(config), is_final=phase == "confirm", session="")
        assert run_job(job, task, study).error is None
    kept = {str(file.relative_to(study / "trials").parent) for file in study.glob("trials/*/adapter/*.safetensors")}
    expected = {"lora": {"0001/adapter", "test-0001/adapter"}, "frozen": set()}
    assert kept == expected.get(method, {"test-0001/adapter"})
    if not kept:
        return
    encoder, folder = load_encoder(small.model), study / "trials" / "test-0001" / "adapter"
    bert = load_adapter(encoder, folder) if method == "lora" else load_whole(encoder, folder)
    chain, split = Chain(config, task), task.splits[0]
    found = chain.score_test(bert, Split(tuple(sorted(split.fit + split.validation)), (), split.test))
    cc = read_cc(study, "test-0001")["test/subject2"]
    np.testing.assert_allclose(found["subject2"].cc, cc, rtol=0, atol=1e-5, err_msg="other weights were saved")


@pytest.mark.parametrize("method", ["word_rate", "frozen", "lora"])
def test_a_final_score_is_that_of_a_trial_that_validates_on_the_test_stories(
    task: Task, small: TrialConfig, method: str
) -> None:
    config, split = replace(small, method=method, epochs=2), task.splits[0]
    reports: list[dict[str, float]] = []
    found = run_test(config, task, lambda scores: bool(reports.append(scores)))
    swapped = Split(tuple(sorted(split.fit + split.validation)), split.test, ())
    expected = run_trial(config, task._replace(splits=(swapped,)))
    assert found.scores["cc_test"] == pytest.approx(expected.scores["cc_mean"], abs=1e-7)
    np.testing.assert_allclose(found.cc_test["subject2"], expected.cc["subject2"], atol=1e-6)
    assert [row["role"] for row in found.stories + found.subjects] == ["test", "test"]
    assert [scores["epoch"] for scores in reports] == ([1, 2] if method == "lora" else [])
    for name in ("cc_mean", "cc_seen", "mlm_loss_heldout"):
        assert name not in found.scores
    if method != "lora":  # what a study without a search scores
        assert found.scores["cc_test"] == run_trial(config, task, score_test=True).scores["cc_test"]


def test_a_final_trial_cannot_stop_by_a_held_out_loss(task: Task, small: TrialConfig) -> None:
    with pytest.raises(ValueError, match="patience needs held-out stories"):
        run_test(replace(small, patience=1), task)


# --- what is said -----------------------------------------------------------------------------------------------------


def score_on_test(folder: Path, name: str, means: np.ndarray, of_story: dict[str, np.ndarray]) -> None:
    """Give a record of the confirm phase what a real one keeps, the way ``outcome`` does."""
    low, high = (float(bound) for bound in np.quantile(means[1:], [0.025, 0.975]))
    scores = {"cc_test": float(means[0]), "cc_test_low": low, "cc_test_high": high}
    details = {f"test/story/{story}/subject2": cc for story, cc in of_story.items()}
    record = replace(read_record(folder, name), scores=scores, details=details | {"test/replicates/subject2": means})
    write_record(folder, record)


@pytest.fixture
def looked(folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """A study that has looked: its folder, and of three trials resampled CCs and CCs by story."""
    rng = np.random.default_rng(0)
    Y, story = rng.standard_normal((120, 5)), np.zeros(120, int)
    noises = {"test-0002": 1.0, "test-0004": 1.5, "test-baseline-frozen": 1.2}
    means = {
        name: examine_predictions(Y, Y + noise * rng.standard_normal(Y.shape), story).replicates.mean
        for name, noise in noises.items()
    }
    masked = np.where(np.arange(6) == 2, np.nan, 1)  # a voxel that is not scored
    of_story = {name: {at: masked * rng.uniform(size=6) for at in ("eta", "zeta")} for name in noises}
    Play(folder, lambda job: 0.22 + job.config["rank"] / 100).confirm()
    for name in noises:
        score_on_test(folder, name, means[name], of_story[name])
    return folder, means, of_story


def test_what_is_told_of_a_look_against_plain_formulas(looked: Any) -> None:
    folder, means, of_story = looked
    trials = load_trials(folder)
    winner, other = confirmed_trials(folder, read_looks(folder)[0], trials)
    assert (winner.trial_id, other.trial_id) == ("0004", "0002")
    for one in (winner, other):
        name = f"test-{one.trial_id}"
        draws = means[name] - means["test-baseline-frozen"]
        expected = (draws[0], *np.quantile(draws[1:], [0.025, 0.975]))
        assert one.gain is not None and one.gain_of_stories is not None and one.test is not None
        np.testing.assert_allclose(one.gain[:3], expected, rtol=1e-12)
        np.testing.assert_allclose(
            one.test, (means[name][0], *np.quantile(means[name][1:], [0.025, 0.975])), rtol=1e-12
        )
        gains = [np.nanmean(of_story[name][at] - of_story["test-baseline-frozen"][at]) for at in ("eta", "zeta")]
        reach = 12.706204736 * abs(gains[0] - gains[1]) / 2  # t of one degree of freedom; s / sqrt(2)
        mean = np.mean(gains)
        np.testing.assert_allclose(one.gain_of_stories[:3], (mean, mean - reach, mean + reach), rtol=1e-9)
    time, stories = winner.gain, winner.gain_of_stories
    assert time is not None and stories is not None and winner.test is not None
    frozen = load_trials(folder).set_index("trial_id").loc["test-baseline-frozen"]
    lines = confirm_lines(folder, trials)
    assert lines[:5] == [
        "Confirmed: trial 0004 wins, fixed by validation before a test story was read: CC 0.2600, mean over 2 fresh "
        "seeds (0.2400 when searched, +0.0200).",
        "On 2 test stories (zeta, eta), refitted on fit and validation:",
        f"  trial 0004, the winner: CC {winner.test.cc:.4f} (95% interval over time inside these stories "
        f"{winner.test.low:.4f} to {winner.test.high:.4f}).",
        f"    minus frozen {time.estimate:+.4f} (95% interval over time inside these stories {time.low:+.4f} to "
        f"{time.high:+.4f}).",
        f"    story by story {stories.estimate:+.4f} (95% interval over 2 stories {stories.low:+.4f} to "
        f"{stories.high:+.4f}).",
    ]
    assert lines[5].startswith("  trial 0002: CC ")
    assert lines[8:] == [
        f"  frozen baseline: CC {frozen['cc_test']:.4f} (95% interval over time inside these stories "
        f"{frozen['cc_test_low']:.4f} to {frozen['cc_test_high']:.4f}).",
        "  word_rate baseline: CC 0.3000.",
        "note: 2 test stories say little about other stories; intervals over time cover more recordings of these "
        "stories only",
    ]


def test_the_summary_of_a_look_is_plain_json(looked: Any) -> None:
    folder, means, _ = looked
    (look,) = json.loads(json.dumps(confirm_summary(folder, load_trials(folder)), allow_nan=False))
    assert (look["look"], look["winner"], look["test_stories"]) == (1, "0004", ["zeta", "eta"])
    assert [one["trial_id"] for one in look["finalists"]] == ["0004", "0002"]
    assert look["finalists"][0]["gain"]["estimate"] == pytest.approx(
        means["test-0004"][0] - means["test-baseline-frozen"][0], rel=1e-12
    )
    assert look["baselines"]["frozen"]["cc"] == means["test-baseline-frozen"][0]
    assert look["baselines"]["word_rate"]["low"] is None
    assert confirm_summary(folder.parent / "none", load_trials(folder)) == []


def test_a_finalist_without_details_or_baseline_is_told_plainly(folder: Path) -> None:
    Play(folder, lambda job: 0.31 if "0002" in job.trial_id else 0.3).confirm(confirm=1)
    trials = load_trials(folder)
    first = "  trial 0002, the winner: CC 0.3100."
    assert confirm_lines(folder, trials)[2:4] == [first, "    minus frozen +0.0100."]
    without = trials[trials["trial_id"] != "test-baseline-frozen"]
    assert confirm_lines(folder, without)[2:4] == [first, "    no frozen baseline to compare with."]
    failed = trials[trials["trial_id"] != "test-0002"]
    assert confirm_lines(folder, failed)[1] == "  trial 0002: not scored."


def test_confirmed_trials_are_no_searched_ones(folder: Path) -> None:
    before = load_trials(folder)
    Play(folder, lambda job: 0.9).confirm()
    after = load_trials(folder)
    assert standing(before) == standing(after)._replace(is_confirmed=False)
    assert standing(after).is_confirmed and not standing(after).test_was_read
    assert list(cc_by_rank(after)["n_trials"]) == [1, 1, 1, 1]
    scores = {"cc_mean": 0.3, "cc_seen": 0.4}
    frozen = replace(BASE, method="frozen")
    records = [
        a_record("baseline-frozen", 0.1, config=frozen, phase="baseline", scores={"cc_mean": 0.1, "cc_seen": 0.1}),
        a_record("0001", 0.3, scores=scores),
        a_record("confirm-0001-seed1", 0.3, phase="confirm", scores=scores),
    ]
    gap = trials_frame(records).set_index("trial_id")["adaptation_gap"]
    assert gap["0001"] == pytest.approx(0.1)
    assert gap.isna().tolist() == [True, False, True]


# --- a whole study ----------------------------------------------------------------------------------------------------

SPACE = '''"""Does a winner hold?"""
EPOCHS = 1
START = [{"rank": 2}, {"rank": 4}]


def space(trial):
    return {"rank": trial.suggest_categorical("rank", [2, 4, 8, 16]), "window_tokens": 128, "stride": 100, "lr": 5e-3}
'''


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_study_confirms_and_looks_once(
    tmp_path: Path,
    private_tmp: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    make_lab(tmp_path / "lab")
    (tmp_path / "hold.py").write_text(SPACE)
    options = {"--space": "hold.py", "--data": "lab", "--out": "out"}
    places = [str(part) for name, place in options.items() for part in (name, tmp_path / place)]
    command = [sys.executable, str(RUN), *places, "--model", str(tiny_bert), "--trials", "2", "--confirm-seeds", "1"]
    done = run_command([*command, "--name", "s", "--confirm", "1"], private_tmp)
    assert done.returncode == 0, done.stderr + done.stdout
    study = tmp_path / "out" / "s"
    fixed = json.loads((study / "confirm.json").read_text())
    names = {f"confirm-{fixed['winner']}-seed{fixed['seeds'][0]}", f"test-{fixed['winner']}"}
    names |= {"test-baseline-frozen", "test-baseline-word_rate"}
    trials = load_trials(study).set_index("trial_id")
    assert set(trials.index[trials["phase"] == "confirm"]) == names
    assert trials.loc[f"test-{fixed['winner']}", "cc_test"] > 0
    for said in ("the winner is trial", "on the test stories |", "Confirmed: trial", "(95% interval over time inside"):
        assert said in done.stdout

    refused = {
        "s": ["--resume", "--trials", "3"],  # more to confirm, on the same stories
        "t": [],  # another study on the same stories
    }
    for name, more in refused.items():
        assert run_app(app, [*command[2:-4], "--name", name, *more]) == BAD_INPUT
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"have been read by study s ({fixed['at']})" in error
    assert not (tmp_path / "out" / "t").exists()
    assert run_app(app, [*command[2:], "--name", "s", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "Confirmed: trial" in out
