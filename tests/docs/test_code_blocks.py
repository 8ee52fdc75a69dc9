"""README and pages: every command and every Python block is run, or listed here with the reason why not."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cyclopts
import matplotlib as mpl
import nibabel
import numpy as np
import pytest
from cloud_servers import bucket, s3_endpoint
from make_data import make_lab
from make_lebel import make_lebel
from make_texts import make_text_bert
from make_trials import PEFT_WARNS
from project import ROOT, RUN
from study_process import private_tmp, run_command

from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import first_line
from bert_encoding.core.names import CLASSIFICATION
from bert_encoding.core.storage import ObjectPath, atomic_path, open_place
from bert_encoding.datasets.corpus import open_corpus
from bert_encoding.text_tasks.run import run_text_trial
from bert_encoding.text_tasks.task import make_text_task
from bert_encoding.trial.config import TrialConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {  # first words of a command -> why it is not run; what can be checked of it without running it, is
    ". .venv/bin/activate": "changes the shell it is typed in",
    ".venv/bin/pip install": "installs packages",
    "pip install": "installs packages",
    "make": "minutes to hours; the targets are checked",
    "python -m bert_encoding fetch": "downloads gigabytes",
    "optuna-dashboard": "serves until it is stopped",
    "tensorboard": "serves until it is stopped",
    "python deploy/aws_setup.py": "needs an AWS account",
    "aws s3 sync": "needs an AWS account",
    "ray up": "starts machines",
    "ray exec": "needs a cluster",
    "ray attach": "needs a cluster",
    "ray dashboard": "needs a cluster",
    "ray down": "ends machines",
    "sbatch": "needs Slurm",
}
RUN_BY_BASH = "mkdir "  # with a home folder of its own
PROGRAMS = {
    "study/run.py": "study.run",
    "study/analysis.py": "study.analysis",
    "deploy/slurm.sbatch": "study.run",  # hands its arguments on
    "deploy/aws_setup.py": "aws_setup",
    "tests/benchmarks/compare_ridge.py": "compare_ridge",
    "tests/benchmarks/compare_himalaya.py": "compare_himalaya",
    "-m bert_encoding": "bert_encoding.__main__",
}
ADDED = {  # to a command, so that it takes seconds and needs no network
    "python study/run.py": "--dry-run",
    "python -m bert_encoding partition": "--model minilm",
}
REPLACED = {
    "--voxels 2000": "--voxels 50",
    'predict results/NAME/trials/0001/adapter "': 'predict classifier "',  # of a study of texts
    "--size 2000 500 500": "--size 2000 60 60",
}

__all__ = ["bucket", "private_tmp", "s3_endpoint"]  # fixtures


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    file: str  # under which the page asks the reader to save it, or nothing

    @property
    def commands(self) -> list[str]:
        """Command lines without comments, continued lines joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines() if self.language == "bash" else []
        return [command for line in lines if (command := re.sub(r"(^|\s+)# .*", "", line).strip())]


def blocks_of(page: Path) -> list[Block]:
    text, blocks = page.read_text(), []
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        before = text[: found.start()]  # "Save this as `my_space.py`:"
        saved = re.search(r"\bas `([\w.]+\.(?:py|csv))`[^\n]*\n\n?\Z", before)
        blocks.append(Block(page, before.count("\n") + 1, found[1], found[2], saved[1] if saved else ""))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = {command for block in BLOCKS for command in block.commands}


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if f"{command} ".startswith(f"{start} ")), None)


def program(command: str) -> tuple[cyclopts.App, list[str]]:
    """Return the application of a command line, and its arguments."""
    words = re.fullmatch(r"(?:python|sbatch(?: --nodes=\d+)?) (-m \w+|\S+)(.*)", command)
    assert words and words[1] in PROGRAMS, "neither run nor listed"
    sys.path.insert(0, str(ROOT / "deploy"))
    try:
        return importlib.import_module(PROGRAMS[words[1]]).app, shlex.split(words[2])
    finally:
        sys.path.pop(0)


# --- without running ------------------------------------------------------------------------------------------------


def test_every_fence_has_a_language_and_ends() -> None:
    for page in PAGES:
        languages = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert set(languages[::2]) <= {"bash", "python", "text"}, page
        assert set(languages[1::2]) <= {""}, page
        assert len(languages) == 2 * len(blocks_of(page)), page


def test_the_list_of_what_is_not_run_is_honest() -> None:
    unused = [start for start in NOT_RUN if not any(f"{command} ".startswith(f"{start} ") for command in COMMANDS)]
    assert unused == [], "listed, but on no page"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_is_run_or_listed_and_its_options_and_files_exist(command: str) -> None:
    check_options(command)
    for file in re.findall(r"(?<![\w/.-])(?:deploy|study|tests|docs)/[\w./-]+", command):
        assert (ROOT / file).is_file(), file
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras)


def check_options(command: str) -> None:
    """Parse a command line as its program would."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
        targets, variables = re.findall(r"^([\w./-]+):", makefile, re.M), re.findall(r"^(\w+) \?=", makefile, re.M)
        assert all(word.partition("=")[0] in (variables if "=" in word else targets) for word in words[1:])
    elif words[0] == "ray":
        from ray.scripts.scripts import cli

        cli.commands[words[1]].make_context(words[1], words[2:])
        for inner in words[-1].split(" && ") if words[1] == "exec" else ():
            if not inner.startswith("cd "):
                check_options(inner)
    elif words[0] in ("python", "sbatch"):
        app, arguments = program(command)
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    else:
        assert reason_not_to_run(command) or command.startswith(RUN_BY_BASH), "neither run nor listed"


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[0].read_text())
    assert links
    for path, anchor in links:
        target = ROOT / path if path else PAGES[0]
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.demo
@pytest.mark.timeout(900)
@PEFT_WARNS
@pytest.mark.filterwarnings("ignore:Solving ridge is slower:UserWarning")  # of himalaya, on few rows
def test_every_block_runs(
    tmp_path: Path, private_tmp: Path, bucket: ObjectPath, one_thread: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One study and one process serve all pages; a page's blocks run in their order, in a folder of its own."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    mpl.use("agg")
    shared = write_material(tmp_path / "shared", private_tmp)
    done, failures = set(), []
    for block in BLOCKS:
        folder = tmp_path / block.page.stem
        if not folder.exists():
            shutil.copytree(shared, folder)
        monkeypatch.chdir(folder)
        for name, step in steps(block, bucket):
            if name.startswith("python study/") and name in done:  # later blocks need nothing of what it leaves
                continue
            capsys.readouterr()
            try:
                step()
                assert "failed:" not in capsys.readouterr().out
            except Exception as error:
                said = capsys.readouterr().err.strip().splitlines()[-1:]
                failures.append(
                    f"{block.page.name}:{block.line}: {name}: {type(error).__name__}, {first_line(error)} {said}"
                )
            done.add(name)
    assert not failures, "\n".join(failures)


def steps(block: Block, bucket: ObjectPath) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is to be done for a block: its name, and a function that raises where it fails."""
    if block.file:
        yield block.file, lambda: Path(block.file).write_text(block.text)
    elif block.language == "python":
        yield "python", lambda: exec(compile(block.text, block.page.name, "exec"), {"__name__": "__main__"})
    for command in block.commands:
        if reason_not_to_run(command) is None:
            yield command, lambda command=command: run_here(command, bucket)  # type: ignore[misc]


def run_here(command: str, bucket: ObjectPath) -> None:
    if command.startswith(RUN_BY_BASH):
        subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(Path.cwd())}, check=True)
        return
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    command = re.sub(r"s3://[\w-]+/(\S+)", lambda found: f"'{bucket / found[1]}'", command)
    for start, option in ADDED.items():
        if command.startswith(start) and option.split()[0] not in command and "--help" not in command:
            command += f" {option}"
    app, arguments = program(command)
    if "analysis.py" in command:
        put_study(arguments[0])
    code = run_app(app, arguments)
    if code != 0:
        raise RuntimeError(f"exit code {code}")


def put_study(place: str) -> None:
    """Put the study where a page has it, if that is a bucket."""
    study = Path("results/NAME")
    for file in study.rglob("*") if place.startswith("s3:") else ():
        if file.is_file():
            with atomic_path(open_place(place) / str(file.relative_to(study))) as temporary:
                shutil.copyfile(file, temporary)


def write_material(folder: Path, private_tmp: Path) -> Path:
    """Write everything that pages take for granted, under the names that they use, and run one study."""
    folder.mkdir()
    stories = ("STORY", "beta", "gamma", "delta", "epsilon", "zeta", "wheretheressmoke")
    make_lab(folder / "PATH", stories, n_voxels=60)
    make_lebel(folder / "ds003020", subjects=("UTS03",))
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), "u1"), np.eye(4)), folder / "mask_thick.nii.gz")  # type: ignore[no-untyped-call]
    (folder / "texts.csv").write_text("text\nthe bank of the river\na bat flew to the bank\n")
    for label in ("neg", "pos"):
        (folder / "reviews" / label).mkdir(parents=True)
        for at in range(600):
            (folder / "reviews" / label / f"{at}.txt").write_text(f"film {at} was {label}")
    write_classifier(folder)
    study = ["--space", "smoke", "--trials", "1", "--confirm", "0", "--model", "minilm"]
    place = ["--data", str(folder / "PATH"), "--out", str(folder / "results"), "--name", "NAME"]
    ended = run_command([sys.executable, str(RUN), *study, *place], private_tmp)
    assert ended.returncode == 0, ended.stderr
    return folder


def write_classifier(folder: Path) -> None:
    task = make_text_task(CLASSIFICATION, open_corpus(folder / "reviews"), seed=0, n_train=20, max_length=16)
    bert = str(make_text_bert(folder / "bert"))
    config = TrialConfig(model=bert, epochs=1, precision="float32", target_modules="all")
    run_text_trial(config, task, adapter_folder=folder / "classifier")
