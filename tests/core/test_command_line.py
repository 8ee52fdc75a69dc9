"""Every mistake a user can make ends in one line on standard error and exit code 2, through the real command line.

Nothing here starts Ray: each run stops before it, or is a dry run.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from make_data import edit_responses, edit_text, make_lab, make_tiny_bert, put
from nobody import open_to_all, run_as_nobody
from project import ROOT

from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from bert_encoding.core.files import read_json
from bert_encoding.trial.config import TrialConfig
from bert_encoding.trial.record import TrialRecord, read_record, write_record
from study import run
from study.session import identity as identity_module
from study.session import plan
from study.session import session as session_module
from study.session.identity import _look_around, differences, identify, resumed
from study.setup.encoding_study import prepare
from study.setup.options import resolve_options
from study.setup.spaces import load_space

pytestmark = pytest.mark.usefixtures("no_ray")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    error: str


Command = Callable[..., Ended]


@pytest.fixture
def command(lab: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``study/run.py`` in this process, on the small lab folder and the tiny BERT unless told otherwise."""
    defaults = {"--space": "smoke", "--data": str(lab), "--model": str(tiny_bert), "--out": str(tmp_path / "out")}

    def run_command(*arguments: str) -> Ended:
        filled = [text for name, value in defaults.items() if name not in arguments for text in (name, value)]
        return ended_in_process([*filled, *arguments], capsys)

    return run_command


def ended_in_process(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run the command line here."""
    capsys.readouterr()
    return Ended(run_app(run.app, arguments), *capsys.readouterr())


def assert_refused(ended: Ended, *said: str) -> str:
    """Assert exit code 2 and one line that says what it should, and return it."""
    assert ended.code == 2, ended
    assert ended.error.startswith("error: ")
    assert ended.error.endswith("\n")
    assert ended.error.count("\n") == 1, ended.error
    assert "Traceback" not in ended.error
    for part in said:
        assert part in ended.error
    return ended.error


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_process(*arguments: str, code: str | None = None, **environment: str) -> Ended:
    """Run the command as a user does, or ``code`` instead of it."""
    start = [sys.executable, str(ROOT / "study" / "run.py")] if code is None else [sys.executable, "-c", code]
    removed = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    ran = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, env=kept | {"PYTHONPATH": str(ROOT)} | environment
    )
    return Ended(ran.returncode, ran.stdout, ran.stderr)


# --- a plan that is fine ----------------------------------------------------------------------------------------------


def test_the_lab_folder_of_these_tests_is_fine(command: Command, tmp_path: Path) -> None:
    """Else every test below could pass for a reason of its own."""
    ended = command("--dry-run")
    assert (ended.code, ended.error) == (0, "")
    assert "wheretheressmoke" in ended.out
    assert "subject2 12 voxels" in ended.out
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"


def test_the_command_returns_its_exit_code(lab: Path, tiny_bert: Path) -> None:
    """So that a notebook may call it; ``sys.exit`` is for the script."""
    assert run_app(run.app, ["--dry-run", "--data", str(lab), "--model", str(tiny_bert)]) == 0


NO_NETWORK = """
import runpy, socket, sys
def refuse(*arguments, **more):
    print("NETWORK USED", arguments[1:], file=sys.stderr, flush=True)
    sys.exit(99)
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
script, *sys.argv[1:] = sys.argv[1:]
if script == "control":
    import urllib.request
    urllib.request.urlopen("http://127.0.0.1:9/")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_a_dry_run_needs_no_network_and_no_model(lab: Path, tmp_path: Path) -> None:
    control = in_a_process("control", code=NO_NETWORK)
    assert control.code == 99, "the guard must notice a connection"
    assert "NETWORK USED" in control.error
    ended = in_a_process(
        *(str(ROOT / "study" / "run.py"), "--dry-run", "--space", "lora_full", "--data", str(lab)),
        *("--model", "bert-base-uncased", "--out", str(tmp_path / "out")),
        code=NO_NETWORK,
        HF_HOME=str(tmp_path / "empty cache"),
        HOME=str(tmp_path),
    )
    assert (ended.code, ended.error) == (0, "")
    assert "bert-base-uncased, last layer" in ended.out
    assert "2 baselines, 40 searched; 3 epochs each" in ended.out
    assert "estimate" in ended.out
    assert not (tmp_path / "out").exists()
    assert not [file for file in (tmp_path / "empty cache").rglob("*") if file.is_file()]


def test_text_without_responses_quietly_stays_out(lab: Path, command: Command) -> None:
    (lab / "subject2" / "gamma.npy").unlink()
    ended = command("--dry-run")
    assert (ended.code, ended.error) == (0, "")
    roles = {line.split()[0]: line for line in ended.out.splitlines()}
    used = " ".join(roles[role] for role in ("fit", "validation", "test"))
    assert "gamma" not in used
    for name in ("alpha", "beta", "delta", "epsilon", "zeta", "wheretheressmoke"):
        assert name in used


def test_masked_voxels_are_told_in_the_plan(lab: Path, command: Command) -> None:
    edit_responses(lab, "beta", put((3, 4), np.nan))
    ended = command("--dry-run")
    assert ended.code == 0
    assert "subject2 11 voxels" in ended.out
    assert "note: subject2: 1 of 12 voxels left out" in ended.out


@pytest.mark.parametrize("name", ["lab [v2]", "lab [/v2]"])
def test_brackets_in_a_folder_s_name_are_kept(name: str, lab: Path, command: Command) -> None:
    """The table printer takes [words] for its own mark-up unless it is told not to."""
    folder = lab.parent / name
    folder.parent.mkdir(exist_ok=True)
    lab.rename(folder)
    ended = command("--dry-run", "--data", str(folder))
    assert (ended.code, ended.error) == (0, "")
    assert str(folder) in ended.out


# --- what was asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "lora_fool"], ["--space lora_fool: unknown", "lora_full", "smoke"]),
        (["--space", "nowhere.py"], ["--space nowhere.py: no such file"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all: no such data"]),
        (["--model", "./nowhere"], ["--model ./nowhere: no such folder"]),
        (["--model", "/nowhere"], ["--model /nowhere: no such folder"]),
        (["--model", "a/b/c"], ["--model a/b/c: no such folder"]),
        (["--subjects", "nobody"], ["no subject nobody; it has subject2"]),
        (["--subjects", "subject2", "nobody"], ["no subject nobody"]),
        (["--test-stories", "unheard"], ["no story unheard"]),
        (["--trials", "x"], ["--trials", "x"]),
        (["--trials", "-1"], ["--trials -1: must be at least 0"]),
        (["--trials", "1.5"], ["--trials", "1.5"]),
        (["--trials"], ["--trials"]),
        (["--epochs", "0"], ["--epochs 0: must be at least 1"]),
        (["--epochs", "1001"], ["epochs 1001: must be a number from 1 to 1000"]),
        (["--layer", "99"], ["--layer 99", "layers 0 (embeddings) to 2"]),
        (["--layer", "3"], ["--layer 3", "to 2"]),
        (["--layer", "-1"], ["--layer -1", "to 2"]),
        (["--layer", "foo"], ["--layer foo: give 'last', a number"]),
        (["--train-stories", "0"], ["--train-stories 0", "has 6 that are not test stories"]),
        (["--train-stories", "7"], ["--train-stories 7", "has 6 that are not test stories"]),
        (["--train-stories", "2"], ["too few stories to split: 2 training stories"]),
        (["--outer-folds", "0"], ["--outer-folds 0: must be at least 1"]),
        (["--outer-folds", "7"], ["--outer-folds 7: must be 1 to 6"]),
        (["--mlm-text", "some"], ["--mlm-text", "some", "fit", "all"]),
        (["--mlm-text", "none"], ["--mlm-text", "none", "fit", "all"]),
        (["--trials", "none"], ["--trials", "none"]),
        (["--seed", "-1"], ["--seed -1: must be at least 0"]),
        (["--seed", str(2**63)], ["seed 9223372036854775808: must be"]),
        (["--name", "a/b"], ["--name 'a/b': must be a plain folder name"]),
        (["--cpus-per-trial", "10000"], ["--cpus-per-trial 10000: this machine has"]),
        (["--gpus-per-trial", "10000"], ["--gpus-per-trial 10000: this machine has"]),
        (["--max-concurrent", "0"], ["--max-concurrent 0: must be at least 1"]),
        (["--keep-adapters", "-1"], ["--keep-adapters -1: must be at least 0"]),
        (["--address", "ray://head:10001"], ["--address ray://head:10001: a Ray Client cannot run a study"]),
        (["--address", "head"], ["--address head: must be HOST:PORT"]),
        (["--rank", "8"], ["--rank"]),
        (["smoke"], ["smoke"]),
    ],
    ids=lambda value: "".join(value)[:32],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    arguments: list[str], said: list[str], command: Command, tmp_path: Path
) -> None:
    assert_refused(command("--dry-run", *arguments), *said)
    assert not (tmp_path / "out").exists()


def test_the_script_itself_ends_in_one_line(tmp_path: Path) -> None:
    ended = in_a_process(
        "--dry-run", "--out", str(tmp_path), "--data", "/nowhere/at/all", "--model", "bert-base-uncased"
    )
    assert_refused(ended, "/nowhere/at/all: no such data")
    assert ended.out == ""


def test_an_empty_folder_is_no_data(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(command("--data", str(tmp_path / "empty")), f"{tmp_path / 'empty'}: no known format", "raw_text.pkl")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "holds no config.json"),
        ('{"model_type": "gpt2"}', "a gpt2 model; only BERT is supported"),
        ('{"model_type": "never heard of"}', "never heard of"),
        ('{"model_type": "be', "not a valid JSON file"),
        ("{}", "model_type"),
    ],
)
def test_a_folder_that_is_no_bert_is_named(config: str | None, said: str, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert_refused(command("--model", str(folder)), f"--model {folder}: ", said)


@pytest.mark.demo
def test_a_model_without_a_head_cannot_be_tuned(command: Command) -> None:
    assert_refused(command("--model", "minilm-plain"), "--model minilm-plain: has no masked-LM head", "--trials 0")
    assert command("--model", "minilm-plain", "--trials", "0", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("{'rank': 0}", "rank 0: must be a number from 1"),
        ("{'lr': -1e-4}", "lr -0.0001: must be a number from 0"),
        ("{'target_modules': 'q,w'}", "no module 'w'"),
        ("{'ranks': 8}", "'ranks' is no setting of a trial"),
        ("{'layer': 99}", "layer 99"),
        ("7", "space(trial) returned int, expected a dict"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_user_s_own_space_is_checked_before_anything_runs(
    values: str, said: str, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def space(trial):\n    return {values}\n")
    assert_refused(command("--space", str(file), "--dry-run"), f"{file}: ", said)
    file.write_text(f"START = [{{}}]\n\n\ndef space(trial):\n    return {values}\n")
    assert_refused(command("--space", str(file), "--dry-run"), f"{file}: ", said)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_a_test_story_without_responses_is_an_error(lab: Path, command: Command) -> None:
    (lab / "subject2" / "wheretheressmoke.npy").unlink()
    assert_refused(command(), "holds none of the published test stories that subject2 heard", "--test-stories")
    named = command("--test-stories", "wheretheressmoke")
    assert_refused(named, "test story wheretheressmoke has no responses of subject subject2")


def test_a_published_test_story_that_a_subject_lacks_stays_out_and_is_named(tmp_path: Path, command: Command) -> None:
    names = ("a", "b", "c", "d", "e", "wheretheressmoke", "onapproachtopluto")
    folder = make_lab(tmp_path / "other", stories=names)
    (folder / "subject2" / "onapproachtopluto.npy").unlink()
    done = command("--data", str(folder), "--dry-run")
    assert done.code == 0
    assert "note: published test stories that a subject did not hear stay out: onapproachtopluto" in done.out


def test_without_a_published_test_story_one_must_be_named(tmp_path: Path, command: Command) -> None:
    folder = make_lab(tmp_path / "other", stories=("a", "b", "c", "d", "e"))
    assert_refused(command("--data", str(folder)), str(folder), "--test-stories")
    assert command("--data", str(folder), "--test-stories", "a", "--dry-run").code == 0


def test_too_few_stories_to_split(tmp_path: Path, command: Command) -> None:
    folder = make_lab(tmp_path / "other", stories=("a", "b", "wheretheressmoke"))
    assert_refused(command("--data", str(folder)), "too few stories to split: 2 training stories")


# --- the study's folder -----------------------------------------------------------------------------------------------


def test_an_existing_name_is_refused_and_left_alone(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "taken"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("two years of work")
    assert_refused(command("--name", "taken"), f"{folder}: exists already; add --resume", "--name")
    assert files(folder) == {"thesis.txt": b"two years of work"}


@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "--name", "gone"]])
def test_resume_without_a_study(arguments: list[str], command: Command, tmp_path: Path) -> None:
    assert_refused(command(*arguments), "--resume: no study", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    assert_refused(command("--out", str(tmp_path / "thesis.txt")), str(tmp_path / "thesis.txt"))
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


def test_no_space_on_disk(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert_refused(command(), f"{tmp_path}: no space: the study may write", "0.0 GB are free")
    assert not (tmp_path / "out").exists()
    assert command("--dry-run").code == 0, "a plan needs no space"


@pytest.mark.slow
def test_what_may_not_be_written_is_named(open_folder: Path) -> None:
    """What may not be read is in ``test_malformed.py``."""
    closed, private = open_folder / "closed", open_folder / "private"
    (private / "inner").mkdir(parents=True)
    closed.mkdir()
    usual = {
        "--space": open_folder / "smoke.py",
        "--data": make_lab(open_folder / "lab"),
        "--model": make_tiny_bert(open_folder / "model"),
        "--out": closed,
    }
    cases: dict[str, dict[str, Path]] = {  # what must be named -> what is other than usual
        f"error: {closed}: may not be written": {},
        f"error: {private}/inner": {"--out": private / "inner"},
        f"{private}": {"--data": make_lab(private / "lab")},
    }
    open_to_all(open_folder)
    closed.chmod(0o555)
    private.chmod(0o000)
    lines = [["study.run", *(str(t) for pair in (usual | other).items() for t in pair)] for other in cases.values()]
    ends = run_as_nobody([[*lines[0], "--dry-run"]], lines, open_folder)
    for (said, code), expected in zip(ends, cases, strict=True):
        error = said.splitlines()[-1]
        assert code == 2 and error.startswith("error: ") and expected in error, said
        assert "Traceback" not in said


# --- resuming ---------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A finished study of two baselines and two trials, made without Ray."""

    folder: Path
    arguments: list[str]
    space: Path
    lab: Path


@pytest.fixture
def made(lab: Path, tiny_bert: Path, tmp_path: Path) -> Made:
    space = tmp_path / "mine.py"
    space.write_text(load_space("smoke").path.read_text())
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    given = {"space": str(space), "data": str(lab), "model": str(model), "out": str(tmp_path / "out"), "name": "s"}
    given |= {"confirm": 0}
    loaded = load_space(str(space))
    study = prepare(resolve_options(given, {}, loaded), loaded)
    identity = identify(study, study.task())
    with session_module._open_folder(study.options.folder, identity, False) as folder:
        for at, method in enumerate(("frozen", "word_rate", "lora", "lora")):
            params = {"log2_rank": 1 + 3 * (at - 2)} if method == "lora" else {}
            config = replace(study.base, method=method, rank=2 ** params.get("log2_rank", 3))
            trial_id, phase = (f"{at - 1:04d}", "search") if method == "lora" else (f"baseline-{method}", "baseline")
            scores = {"cc_mean": 0.1 * at, "cc_seen": 0.1}
            write_record(
                folder, TrialRecord("COMPLETE", method, asdict(config), trial_id, phase, params=params, scores=scores)
            )
    return Made(folder, ["--resume", "--name", "s", "--out", str(tmp_path / "out")], space, lab)


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
def test_the_precision_is_that_of_the_device_that_a_trial_has(
    gpus: float, device: str, lab: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may see a GPU that its trials are not given."""
    loaded = load_space("smoke")
    options = resolve_options({"space": "smoke", "data": str(lab), "model": str(tiny_bert)}, {}, loaded)
    study = prepare(replace(options, gpus_per_trial=gpus), loaded)
    monkeypatch.setattr(identity_module, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(identity_module, "resolve_precision", lambda precision, where: f"{precision} on {where}")
    assert identify(study, study.task())["precision"] == f"auto on {device}"


def resume(made: Made, capsys: pytest.CaptureFixture[str], *more: str) -> Ended:
    return ended_in_process([*made.arguments, *more], capsys)


def test_a_finished_study_can_be_resumed_and_has_nothing_to_do(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but the name is given again: the rest comes from the study."""
    before = files(made.folder / "trials")
    ended = resume(made, capsys)
    assert (ended.code, ended.error) == (0, "")
    assert "nothing to do: 2 searched trials are on record; raise --trials" in ended.out
    assert "Best trial 0002: CC 0.3000; frozen baseline: CC 0.0000" in ended.out
    assert files(made.folder / "trials") == before
    assert (made.folder / "trials.parquet").is_file()


def _change_a_response(made: Made) -> list[str]:
    edit_responses(made.lab, "beta", lambda rows: rows + 1e-9 * (np.arange(12) == 0))
    return []


def _change_a_word(made: Made) -> list[str]:
    edit_text(made.lab, "beta", lambda text: text.data.__setitem__(5, "otherwise"))
    return []


def _other_data(made: Made) -> list[str]:
    return ["--data", str(make_lab(made.lab.parent / "other", seed=5))]


def _change_the_space(made: Made) -> list[str]:
    made.space.write_text(made.space.read_text().replace("1, 4)", "1, 5)"))
    return []


def _other_space(made: Made) -> list[str]:
    return ["--space", "lora_full"]


def _other_model(made: Made) -> list[str]:
    return ["--model", str(make_tiny_bert(made.lab.parent / "other", seed=1))]


CHANGES: dict[str, tuple[Callable[[Made], list[str]], str]] = {
    "a response": (_change_a_response, "the data changed from "),
    "a word": (_change_a_word, "the data changed from "),
    "other data": (_other_data, "the data changed from "),
    "the space's file": (_change_the_space, "the search space changed from "),
    "other space": (_other_space, "the search space changed from "),
    "test stories": (lambda made: ["--test-stories", "alpha"], "stories changed from "),
    "train stories": (lambda made: ["--train-stories", "5"], "changed from "),
    "outer folds": (lambda made: ["--outer-folds", "2"], "the number of outer folds changed from 1 to 2;"),
    "seed": (lambda made: ["--seed", "3"], "changed from "),
    "model": (_other_model, "the model changed from "),
    "layer": (lambda made: ["--layer", "1"], "the setting layer changed from "),
    "epochs": (lambda made: ["--epochs", "2"], "the setting epochs changed from 1 to 2;"),
    "mlm text": (lambda made: ["--mlm-text", "all"], "the setting mlm_text changed from fit to all;"),
}


@pytest.mark.table
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_study_is_refused_by_name(change: str, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    edit, said = CHANGES[change]
    arguments = edit(made)
    before = files(made.folder)
    error = assert_refused(resume(made, capsys, *arguments), f"{made.folder}: cannot resume: ", said, "--name")
    rehearsed = assert_refused(resume(made, capsys, "--dry-run", *arguments), said)
    assert rehearsed == error
    was, now = re.fullmatch(r".* changed from (.*) to (.*); give .*\n", error).groups()  # type: ignore[union-attr]
    assert was != now, "the difference must be visible"
    assert files(made.folder) == before


def test_the_weights_of_the_model_are_part_of_the_study(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The same folder with other weights is another model."""
    other = make_tiny_bert(made.lab.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", made.lab.parent / "model" / "model.safetensors")
    assert_refused(resume(made, capsys), "cannot resume: ", "model")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("code",), "the code of bert_encoding changed from other to "),
        (("precision",), "the precision of this machine changed from other to "),
        (("versions", "torch"), "the version of torch changed from other to "),
    ],
)
def test_what_results_depend_on_is_part_of_the_study(
    path: tuple[str, ...], said: str, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made.folder / "study.json"
    recorded = read_json(file)
    inner = recorded
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "other"
    file.write_text(json.dumps(recorded))
    assert_refused(resume(made, capsys), f"{made.folder}: cannot resume: ", said)


def test_a_difference_late_in_a_long_split_is_visible(made: Made) -> None:
    file = made.folder / "study.json"
    recorded = read_json(file)
    names = [f"story{i:03d}" for i in range(80)]
    before = recorded | {"splits": [{"fit": names[:60], "validation": names[60:79], "test": names[79:]}]}
    after = recorded | {"splits": [{"fit": names[:60], "validation": names[60:78], "test": names[78:79]}]}
    with pytest.raises(InputError, match="cannot resume: the validation stories changed from ") as refused:
        resumed(made.folder, before, after, False, "0003")
    was, now = re.fullmatch(r".* changed from (.*) to (.*); give .*", str(refused.value)).groups()  # type: ignore[union-attr]
    assert was != now


def test_a_study_that_another_run_holds_is_refused(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(made.folder)
    with (made.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_refused(resume(made, capsys), f"{made.folder}: another run is at work on this study")
    assert files(made.folder) == before


@pytest.mark.parametrize("content", [b"", b'{"status": "COMP', b"[]"])
def test_a_damaged_record_stops_a_resume_by_name(
    content: bytes, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made.folder / "trials" / "0001" / "record.json"
    file.write_bytes(content)
    before = files(made.folder)
    assert_refused(resume(made, capsys), f"{file}: damaged", "move it away")
    assert files(made.folder) == before


@pytest.mark.parametrize("content", [b"", b'{"options": {"spa', b"{}", b"[]"])
def test_a_damaged_study_file_stops_a_resume_by_name(
    content: bytes, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.folder / "study.json").write_bytes(content)
    assert_refused(resume(made, capsys), f"{made.folder / 'study.json'}: damaged")


def test_the_splits_of_a_study_never_share_a_story(made: Made) -> None:
    recorded: dict[str, Any] = read_json(made.folder / "study.json")
    for split in recorded["splits"]:
        names = [name for role in ("fit", "validation", "test") for name in split[role]]
        assert sorted(names) == sorted(set(names))
        assert split["test"] == ["wheretheressmoke"]
    assert TrialConfig.from_dict(recorded["config"]).model == recorded["options"]["model"]


def test_a_study_is_extended_by_what_it_lacks(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(made.folder)
    ended = resume(made, capsys, "--trials", "5", "--dry-run")
    assert (ended.code, ended.error) == (0, "")
    assert "2 baselines, 5 searched, 2 of them done" in ended.out
    assert "runs on: this machine" in ended.out
    assert "note: " not in ended.out
    assert files(made.folder) == before


def test_a_study_in_which_a_trial_failed_ends_with_its_own_exit_code(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = replace(read_record(made.folder, "0002"), status="FAILED", error="no end after 5 s", scores={})
    write_record(made.folder, failed)
    ended = resume(made, capsys)
    assert (ended.code, ended.error) == (3, "")
    assert "trial 0002 FAILED: no end after 5 s" in ended.out


@pytest.mark.table
@pytest.mark.parametrize(
    ("given", "kept"), [([], ["0001", "0002"]), (["--keep-adapters", "1"], ["0002"]), (["--keep-adapters", "0"], [])]
)
def test_the_best_adapters_are_kept(
    given: list[str], kept: list[str], made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0001", "0002"):
        (made.folder / "trials" / name / "adapter").mkdir()
    for again in (given, []):  # the second session remembers the number
        assert resume(made, capsys, *again).code == 0
        assert [path.parent.name for path in sorted(made.folder.glob("trials/*/adapter"))] == kept


# --- resuming by force ------------------------------------------------------------------------------------------------


def change_record(made: Made, **values: Any) -> dict[str, Any]:
    """Let the study have been begun with other values."""
    recorded = read_json(made.folder / "study.json") | values
    (made.folder / "study.json").write_text(json.dumps(recorded))
    return recorded


@pytest.mark.slow
def test_a_forced_study_goes_on_and_says_how_it_changed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    now = read_json(made.folder / "study.json")
    old = change_record(made, code="older", versions=now["versions"] | {"torch": "1.0"}, created="long ago")
    refused = assert_refused(resume(made, capsys), "the code of bert_encoding changed from older to ")
    assert "or go on with --force-resume; also changed: the version of torch\n" in refused

    before = files(made.folder)
    rehearsed = resume(made, capsys, "--force-resume", "--dry-run")
    assert (rehearsed.code, rehearsed.error) == (0, "")
    assert "note: the code of bert_encoding changed from older to " in rehearsed.out
    assert "note: the version of torch changed from 1.0 to " in rehearsed.out
    assert files(made.folder) == before

    without_resume = made.arguments[1:]
    ended = ended_in_process([*without_resume, "--force-resume", "--trials", "1"], capsys)
    assert (ended.code, ended.error) == (0, "")
    said = "note: trials from 0003 on may not compare with those before: the study was forced to go on ("
    assert said in ended.out
    found = read_json(made.folder / "study.json")
    (forced,) = found["forced"]
    changed = {one["what"]: (one["before"], one["now"]) for one in forced["differences"]}
    assert changed == {
        "the code of bert_encoding": ("older", now["code"]),
        "the version of torch": ("1.0", now["versions"]["torch"]),
    }
    assert forced["first_trial"] == "0003"
    assert {name: forced["was"][name] for name in ("code", "versions")} == {
        "code": "older",
        "versions": old["versions"],
    }
    assert found["created"] == "long ago"
    assert {name: found[name] for name in now if name not in ("created", "options")} == {
        name: now[name] for name in now if name not in ("created", "options")
    }
    for name, content in files(made.folder / "trials").items():
        assert before[f"trials/{name}"] == content

    again = resume(made, capsys)
    assert (again.code, again.error) == (0, "")
    assert said in again.out, "the study stays mixed"
    assert read_json(made.folder / "study.json")["forced"] == [forced]


@pytest.mark.table
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changed_can_be_forced(change: str, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = CHANGES[change][0](made)
    before, records = read_json(made.folder / "study.json"), files(made.folder / "trials")
    ended = resume(made, capsys, *arguments, "--force-resume", "--trials", "2")
    assert (ended.code, ended.error) == (0, ""), ended
    (forced,) = read_json(made.folder / "study.json")["forced"]
    assert CHANGES[change][1].partition("changed")[0].strip() in " ".join(one["what"] for one in forced["differences"])
    for name, value in forced["was"].items():
        assert before[name] == value
    assert files(made.folder / "trials") == records
    assert resume(made, capsys).code == 0, "what was forced once is what the study is now"


def test_nothing_is_recorded_where_nothing_changed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(made, capsys, "--force-resume").code == 0
    assert "forced" not in read_json(made.folder / "study.json")


def test_voxels_that_a_study_chose_are_never_mixed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    said = "cannot resume, even by force: the voxels changed from all ("
    assert_refused(resume(made, capsys, "--force-resume", "--voxels", "5"), said)


def test_two_tasks_are_never_mixed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    change_record(made, task="adapt")
    said = "cannot resume, even by force: the task changed from adapt to encoding"
    assert_refused(resume(made, capsys, "--force-resume"), said)


def test_what_is_not_known_yet_is_no_difference(made: Made) -> None:
    """The precision before a cluster's worker was asked; the weights of a model that a rehearsal may not fetch."""
    recorded = read_json(made.folder / "study.json")
    assert differences(recorded, recorded) == []
    assert differences(recorded | {"precision": None}, recorded) == []
    assert differences(recorded, recorded | {"precision": None}) == []
    unknown = recorded | {"model": recorded["model"] | {"weights": None}}
    assert differences(recorded, unknown) == []
    other = recorded | {"model": {"name": "another", "weights": None}}
    assert [one.what for one in differences(recorded, other)] == ["the model"]
    assert resumed(made.folder, recorded, recorded | {"precision": None}, False, "0003") == recorded
    assert resumed(made.folder, recorded | {"precision": None}, recorded, False, "0003") == recorded


def test_a_forced_study_keeps_the_choice_of_voxels_that_its_trials_used(made: Made) -> None:
    recorded = read_json(made.folder / "study.json") | {"voxels": {"asked": "5", "key": "chosen"}}
    now = recorded | {"voxels": {"asked": "5", "key": None}, "code": "newer", "precision": None}
    found = resumed(made.folder, recorded, now, True, "0003")
    assert {name: found[name] for name in recorded} == recorded | {"code": "newer"}
    assert found["forced"][0]["was"] == {"code": recorded["code"]}


def test_a_machine_that_does_not_see_the_study_is_named(made: Made, tmp_path: Path) -> None:
    assert _look_around("float32", str(made.folder)) == "float32"
    gone = tmp_path / "gone"
    with pytest.raises(InputError, match=rf"{gone}: {os.uname().nodename}, a machine of the cluster, does not see it"):
        _look_around("float32", str(gone))
