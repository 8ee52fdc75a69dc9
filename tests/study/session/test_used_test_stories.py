"""Test stories that a study has used are refused to later evaluations, of this study and of its neighbours."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confirm_phase import BASE, HEARD, PretendRunner, folder, make_options, make_study_file, write_trial
from make_data import make_lab
from make_trials import PEFT_WARNS

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.inspect import inspect
from bert_encoding.datasets.splits import choose_stories
from study.results import locked_stories as looks_module
from study.results.confirmed import confirm_lines
from study.results.load import load_trials
from study.results.locked_stories import check_looks, heard_by, next_look, permit_look, read_looks
from study.search.worker import Job

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


class Overtaken(PretendRunner):
    """Meanwhile a study in the same place fixes its winner and scores the test stories."""

    def __call__(self, name: str, jobs: list[Job]) -> str | None:
        rival = self.study.parent / "rival"
        if not rival.exists():
            shutil.copytree(self.study, rival)
            PretendRunner(rival).confirm()
        return super().__call__(name, jobs)


def test_of_two_simultaneous_studies_only_one_scores_the_test_stories(folder: Path) -> None:
    second = Overtaken(folder)
    with pytest.raises(InputError, match=r"zeta have been read by study rival .*--look-again"):
        second.confirm()
    assert not (folder / "confirm.json").exists()
    assert len(second.ran) == 4, "and what it confirmed is kept"
    permit_look(folder, 1)
    PretendRunner(folder).confirm()
    (fixed,) = read_looks(folder)
    assert [look["study"] for look in fixed["looks"]] == ["rival"]


@pytest.mark.parametrize("how", ["damaged", "private", "of another kind"])
def test_an_unreadable_neighbour_blocks_no_study(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = folder.parent / "a-neighbour"
    shutil.copytree(folder, bad)
    content = {"damaged": "{", "private": "{}", "of another kind": json.dumps(dict.fromkeys(looks_module._REQUIRED, 1))}
    (bad / "confirm.json").write_text(content[how])
    if how == "private":
        refuse_to_open(bad, monkeypatch)
    PretendRunner(folder).confirm()
    (message,) = caplog.messages
    assert message.startswith(f"study {bad} cannot be read, so its use of these test stories is unknown: ")
    with pytest.raises(InputError, match="have been read by study s "):
        check_looks(make_options(folder.parent / "t"), 1, HEARD, False)
    (folder / "confirm.json").write_text("{")
    with pytest.raises(InputError, match=r"s/confirm\.json: damaged"):
        check_looks(make_options(folder), 2, HEARD, False)


def refuse_to_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate mode 0700 of another user, which does not bind root."""
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
    ("changes", "is_noted"),
    [
        ({}, True),
        ({"data": {"n_voxels": {"subject9": 3}}}, False),
        ({"splits": [{"test": ["theta"]}]}, False),
        ({"task": "classification", "splits": None, "data": {}}, False),
    ],
)
def test_baselines_scored_by_a_neighbour_are_noted_and_forbid_nothing(
    changes: dict[str, Any], is_noted: bool, folder: Path
) -> None:
    other = folder.parent / "t"
    write_json(make_study_file(other), ABOUT | changes)
    write_trial(other, "baseline-word_rate", 0.1, phase="baseline", scores={"cc_mean": 0.1, "cc_test": 0.2})
    write_json(make_study_file(folder.parent / "u"), ABOUT)
    write_trial(folder.parent / "u", "baseline-word_rate", 0.1, phase="baseline")  # never scored on test stories
    PretendRunner(folder).confirm()
    (fixed,) = read_looks(folder)
    assert not fixed["test_was_read"]
    look = {"study": "t", "at": ABOUT["created"], "stories": ["zeta"], "baselines_only": True}
    assert fixed["looks"] == ([look] if is_noted else [])
    first, *_, last = confirm_lines(folder, load_trials(folder))
    assert ("before a test story was read" in first) != is_noted
    note = f"note: zeta had been used before by study t ({ABOUT['created']}, its baselines alone)"
    assert (last == note) == is_noted


@pytest.mark.parametrize("how", ["baselines", "text"])
def test_earlier_use_of_the_test_stories_by_the_same_study_is_noted(how: str, folder: Path) -> None:
    if how == "baselines":  # as --trials 0 does, to which a search was added
        write_trial(folder, "baseline-frozen", 0.1, phase="baseline", scores={"cc_mean": 0.1, "cc_test": 0.2})
    else:
        write_trial(folder, "0005", 0.9, config=replace(BASE, mlm_text="all", rank=64))
    PretendRunner(folder).confirm()
    assert read_looks(folder)[0]["test_was_read"] is True
    first, *_, last = confirm_lines(folder, load_trials(folder))
    assert "fixed by validation: CC" in first
    why = {"baselines": "its baselines were scored on them (--trials 0)", "text": "fine-tuning read their text"}[how]
    assert last == f"note: this study had used its test stories before the winner was fixed: {why}"


def test_when_a_session_evaluates_the_test_stories(folder: Path) -> None:
    def look(n_searched: int = 4, again: bool = False, done: bool = True, **changes: Any) -> int | None:
        return next_look(make_options(folder, **changes), n_searched, again, done)

    assert look(confirm=0) is None
    assert look() == 1
    PretendRunner(folder).confirm()
    assert look() is None
    assert look(trials=5) == look(n_searched=5) == look(confirm=3) == 2
    assert look(again=True) == 2
    assert look(again=True, done=False) is None, "the last look comes first"
    assert look(trials=5, confirm=0) is None
    permit_look(folder, 2)
    assert look() == 2, "it was forced in a session that was killed"


def test_a_second_evaluation_is_refused_unless_forced(folder: Path) -> None:
    PretendRunner(folder).confirm()
    own, other = make_options(folder), make_options(folder.parent / "t")
    (fixed,) = read_looks(folder)
    message = rf"test stories eta, zeta have been read by study s \({fixed['at'][:10]}.*--confirm 0.*--look-again"
    for options, look in ((own, 2), (other, 1)):
        with pytest.raises(InputError, match=message):
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
def test_stories_are_refused_by_subject_and_content(
    heard: dict[str, list[str]], read: str | None, folder: Path
) -> None:
    PretendRunner(folder).confirm()
    other = make_options(folder.parent / "t")
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
    assert [listener.split()[0] for listener in heard[first]] == list(dataset.subjects)
    spoken = {first: replace(dataset.stories[first], words=(*dataset.stories[first].words[:-1], "other"))}
    assert heard_by(replace(dataset, stories={**dataset.stories, **spoken}), test)[first] != heard[first]


def test_a_damaged_confirm_file_is_named(folder: Path) -> None:
    (folder / "confirm.json").write_text('{"look": 1}')
    with pytest.raises(InputError, match=r"confirm\.json: damaged \(no at, data"):
        read_looks(folder)
