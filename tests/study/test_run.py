"""Mistakes in the options of ``study/run.py`` end in one line on standard error and exit code 2.

Nothing here starts Ray: each run stops before it, or is a dry run.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_data import edit_responses, make_lab, make_tiny_bert, put
from nobody import open_to_all, run_as_nobody
from project import ROOT
from run_commands import Ended, assert_refused, read_files, run_study_command

from study.session import plan

pytestmark = pytest.mark.usefixtures("no_ray")


Command = Callable[..., Ended]


@pytest.fixture
def command(lab: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``study/run.py`` in this process, by default on the small lab folder and the tiny BERT."""
    defaults = {"--space": "smoke", "--data": str(lab), "--model": str(tiny_bert), "--out": str(tmp_path / "out")}

    def run_command(*arguments: str) -> Ended:
        filled = [text for name, value in defaults.items() if name not in arguments for text in (name, value)]
        return run_study_command([*filled, *arguments], capsys)

    return run_command


def run_in_new_process(*arguments: str, code: str | None = None, **environment: str) -> Ended:
    """Run the command as a user does, or ``code`` instead of it."""
    start = [sys.executable, str(ROOT / "study" / "run.py")] if code is None else [sys.executable, "-c", code]
    removed = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environ = {name: value for name, value in os.environ.items() if name not in removed}
    ran = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, env=environ | {"PYTHONPATH": str(ROOT)} | environment
    )
    return Ended(ran.returncode, ran.stdout, ran.stderr)


def test_the_lab_folder_of_these_tests_is_accepted(command: Command, tmp_path: Path) -> None:
    """Otherwise the tests below could pass for another reason."""
    ended = command("--dry-run")
    assert (ended.code, ended.error) == (0, "")
    assert "wheretheressmoke" in ended.out
    assert "subject2 12 voxels" in ended.out
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"


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
    control = run_in_new_process("control", code=NO_NETWORK)
    assert control.code == 99, "the guard must notice a connection"
    assert "NETWORK USED" in control.error
    ended = run_in_new_process(
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


def test_a_story_without_responses_is_omitted_without_a_message(lab: Path, command: Command) -> None:
    (lab / "subject2" / "gamma.npy").unlink()
    ended = command("--dry-run")
    assert (ended.code, ended.error) == (0, "")
    roles = {line.split()[0]: line for line in ended.out.splitlines()}
    used = " ".join(roles[role] for role in ("fit", "validation", "test"))
    assert "gamma" not in used
    for name in ("alpha", "beta", "delta", "epsilon", "zeta", "wheretheressmoke"):
        assert name in used


def test_the_plan_counts_masked_voxels(lab: Path, command: Command) -> None:
    edit_responses(lab, "beta", put((3, 4), np.nan))
    ended = command("--dry-run")
    assert ended.code == 0
    assert "subject2 11 voxels" in ended.out
    assert "note: subject2: 1 of 12 voxels left out" in ended.out


@pytest.mark.parametrize("name", ["lab [v2]", "lab [/v2]"])
def test_brackets_in_the_name_of_a_folder_are_printed(name: str, lab: Path, command: Command) -> None:
    """Rich interprets [words] as markup by default."""
    folder = lab.parent / name
    folder.parent.mkdir(exist_ok=True)
    lab.rename(folder)
    ended = command("--dry-run", "--data", str(folder))
    assert (ended.code, ended.error) == (0, "")
    assert str(folder) in ended.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--space", "lora_fool"], ["--space lora_fool: unknown; use ", "lora_full", "smoke", "FILE.py"]),
        (["--space", "/etc/passwd"], ["/etc/passwd: cannot be loaded: SyntaxError"]),
        (["--space", "nowhere.py"], ["--space nowhere.py: no such file"]),
        (["--space", "./nowhere"], ["--space ./nowhere: no such file"]),
        (["--sampler", "best"], ["--sampler best: must be one of tpe, gp, cmaes, random, grid, qmc"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all: no such data"]),
        (["--space", "sentiment_lora", "--data", "demo"], ["--data: a space of this task needs text"]),
        (["--model", "./nowhere"], ["--model ./nowhere: no such folder"]),
        (["--model", "a/b/c"], ["--model a/b/c: no such folder"]),
        (["--subjects", "nobody"], ["no subject nobody; it has subject2"]),
        (["--test-stories", "unheard"], ["test story 'unheard' not found"]),
        (["--trials", "x"], ["--trials", "x"]),
        (["--trials", "1.5"], ["--trials", "1.5"]),
        (["--trials"], ["--trials"]),
        (["--epochs", "1001"], ["epochs 1001: must be a number from 1 to 1000"]),
        (["--layer", "3"], ["--layer 3", "layers 0 (embeddings) to 2"]),
        (["--layer", "-1"], ["--layer -1", "to 2"]),
        (["--train-stories", "7"], ["--train-stories 7", "has 6 that are not test stories"]),
        (["--train-stories", "2"], ["too few stories to split: 2 training stories"]),
        (["--outer-folds", "7"], ["--outer-folds 7: must be 1 to 6"]),
        (["--mlm-text", "some"], ["--mlm-text", "some", "fit", "all"]),
        (["--seed", str(2**63)], ["seed 9223372036854775808: must be"]),
        (["--address", "head"], ["--address head: must be HOST:PORT"]),
        (["--rank", "8"], ["--rank"]),
        (["smoke"], ["smoke"]),
    ],
    ids=lambda value: "".join(value)[:32],
)
def test_an_invalid_option_is_one_line_that_names_it(
    arguments: list[str], parts: list[str], command: Command, tmp_path: Path
) -> None:
    """``test_options.py`` tests the ranges of values."""
    assert_refused(command("--dry-run", *arguments), *parts)
    assert not (tmp_path / "out").exists()


def test_the_script_itself_ends_in_one_line(tmp_path: Path) -> None:
    ended = run_in_new_process(
        "--dry-run", "--out", str(tmp_path), "--data", "/nowhere/at/all", "--model", "bert-base-uncased"
    )
    assert_refused(ended, "/nowhere/at/all: no such data")
    assert ended.out == ""


def test_a_folder_with_another_model_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "never heard of"}')
    assert_refused(command("--model", str(tmp_path)), f"--model {tmp_path}: ", "never heard of")


@pytest.mark.demo
def test_a_model_without_a_head_cannot_be_tuned(command: Command) -> None:
    assert_refused(command("--model", "minilm-plain"), "--model minilm-plain: has no masked-LM head", "--trials 0")
    assert command("--model", "minilm-plain", "--trials", "0", "--dry-run").code == 0


@pytest.mark.parametrize("start", ["", "START = [{}]\n"])
def test_a_user_defined_space_is_checked_before_anything_runs(start: str, command: Command, tmp_path: Path) -> None:
    """``test_spaces.py`` tests all that can be wrong."""
    file = tmp_path / "mine.py"
    file.write_text(start + "def space(trial):\n    return {'rank': 0}\n")
    assert_refused(command("--space", str(file), "--dry-run"), f"{file}: rank 0: must be a number from 1")


def test_a_test_story_without_responses_is_an_error(lab: Path, command: Command) -> None:
    (lab / "subject2" / "wheretheressmoke.npy").unlink()
    assert_refused(command(), "none of the published test stories heard by subject2", "--test-stories")
    named = command("--test-stories", "wheretheressmoke")
    assert_refused(named, "test story wheretheressmoke has no responses of subject subject2")


def test_a_published_test_story_that_a_subject_lacks_is_omitted_and_named(tmp_path: Path, command: Command) -> None:
    names = ("a", "b", "c", "d", "e", "wheretheressmoke", "onapproachtopluto")
    folder = make_lab(tmp_path / "other", stories=names)
    (folder / "subject2" / "onapproachtopluto.npy").unlink()
    ended = command("--data", str(folder), "--dry-run")
    assert ended.code == 0
    assert "note: published test stories without responses of a subject are excluded: onapproachtopluto" in ended.out


def test_without_a_published_test_story_one_must_be_named(tmp_path: Path, command: Command) -> None:
    folder = make_lab(tmp_path / "other", stories=("a", "b", "c", "d", "e"))
    assert_refused(command("--data", str(folder)), str(folder), "--test-stories")
    assert command("--data", str(folder), "--test-stories", "a", "--dry-run").code == 0


def test_an_existing_name_is_refused_and_not_changed(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "taken"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("two years of work")
    assert_refused(command("--name", "taken"), f"{folder}: exists already; add --resume", "--name")
    assert read_files(folder) == {"thesis.txt": b"two years of work"}


def test_out_that_is_a_file_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    assert_refused(command("--out", str(tmp_path / "thesis.txt")), str(tmp_path / "thesis.txt"))
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


def test_a_full_disk_is_refused_before_the_start(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert_refused(command(), f"{tmp_path}: no space: the study may write", "0.0 GB are free")
    assert not (tmp_path / "out").exists()
    assert command("--dry-run").code == 0, "a plan needs no space"


@pytest.mark.slow
def test_a_folder_without_permission_is_named(open_folder: Path) -> None:
    """Files that may not be read are tested in ``test_malformed_lab.py``."""
    closed, private = open_folder / "closed", open_folder / "private"
    (private / "inner").mkdir(parents=True)
    closed.mkdir()
    usual = {
        "--space": open_folder / "smoke.py",
        "--data": make_lab(open_folder / "lab"),
        "--model": make_tiny_bert(open_folder / "model"),
        "--out": closed,
    }
    cases: dict[str, dict[str, Path]] = {  # part of the message -> options that differ from the usual ones
        f"error: {closed}: may not be written": {},
        f"error: {private}/inner": {"--out": private / "inner"},
        f"{private}": {"--data": make_lab(private / "lab")},
    }
    open_to_all(open_folder)
    closed.chmod(0o555)
    private.chmod(0o000)
    lines = [["study.run", *(str(t) for pair in (usual | other).items() for t in pair)] for other in cases.values()]
    ends = run_as_nobody([[*lines[0], "--dry-run"]], lines, open_folder)
    for (output, code), expected in zip(ends, cases, strict=True):
        error = output.splitlines()[-1]
        assert code == 2 and error.startswith("error: ") and expected in error, output
        assert "Traceback" not in output
