"""Run every command and Python block of README and docs, or list it here with the reason why not."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

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
from ray.scripts.scripts import cli
from study_process import private_tmp, run_command

from bert_encoding.core.command_line import run_app
from bert_encoding.core.names import CLASSIFICATION
from bert_encoding.core.storage import ObjectPath, atomic_path, open_place
from bert_encoding.datasets.corpus import open_corpus
from bert_encoding.text_tasks.run import run_text_trial
from bert_encoding.text_tasks.task import make_text_task
from bert_encoding.trial.config import TrialConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = (  # first words of commands that are parsed but not run, because they
    *(". .venv/bin/activate", ".venv/bin/pip install", "pip install"),  # change the shell, or install packages
    *("make", "python -m bert_encoding fetch"),  # take minutes to hours, or download gigabytes
    *("optuna-dashboard", "tensorboard"),  # serve until they are stopped
    *("python deploy/aws_setup.py", "aws s3 sync"),  # need an AWS account
    *("ray up", "ray exec", "ray attach", "ray dashboard", "ray down", "sbatch"),  # need a cluster, or Slurm
)
RUN_BY_BASH = "mkdir "  # with a home folder of its own
CHANGED = {  # replacements in a command before it is run, so that it takes seconds and needs no network
    r"--voxels 2000": "--voxels 50",
    r'predict results/NAME/trials/0001/adapter "': 'predict classifier "',  # of a study of texts
    r"--size 2000 500 500": "--size 2000 60 60",
    r"^(python study/run\.py (?!.*--dry-run).*)": r"\1 --dry-run",
    r"^(python -m bert_encoding partition .*)": r"\1 --model minilm",
}

sys.path.insert(0, str(ROOT / "deploy"))  # where aws_setup is
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
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        before = text[: fence.start()]  # "Save this as `my_space.py`:"
        saved = re.search(r"\bas `([\w.]+\.(?:py|csv))`[^\n]*\n\n?\Z", before)
        blocks.append(Block(page, before.count("\n") + 1, fence[1], fence[2], saved[1] if saved else ""))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = {command for block in BLOCKS for command in block.commands}


def is_not_run(command: str) -> bool:
    return f"{command} ".startswith(tuple(f"{start} " for start in NOT_RUN))


def program(command: str) -> tuple[Any, list[str]]:
    """Return the application of a command line, and its arguments."""
    words = re.fullmatch(r"(?:python|sbatch(?: --nodes=\d+)?) (-m \w+|\S+)(.*)", command)
    assert words, "neither run nor listed"
    name = re.sub(r"^(deploy|tests/benchmarks)/|\.py$", "", words[1]).replace("/", ".")
    others = {"-m bert_encoding": "bert_encoding.__main__", "slurm.sbatch": "study.run"}  # which hands its arguments on
    return importlib.import_module(others.get(name, name)).app, shlex.split(words[2])


def test_every_fence_has_a_language_and_ends() -> None:
    for page in PAGES:
        languages = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert set(languages[::2]) <= {"bash", "python", "text"}, page
        assert set(languages[1::2]) <= {""}, page
        assert len(languages) == 2 * len(blocks_of(page)), page


def test_every_command_listed_as_not_run_is_on_a_page() -> None:
    assert [start for start in NOT_RUN if not any(f"{command} ".startswith(f"{start} ") for command in COMMANDS)] == []


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
        cli.commands[words[1]].make_context(words[1], words[2:])
        for inner in words[-1].split(" && ") if words[1] == "exec" else ():
            if not inner.startswith("cd "):
                check_options(inner)
    elif words[0] in ("python", "sbatch"):
        app, arguments = program(command)
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    else:
        assert is_not_run(command) or command.startswith(RUN_BY_BASH), "neither run nor listed"


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[0].read_text())
    assert links
    for path, anchor in links:
        target = ROOT / path if path else PAGES[0]
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


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
    """One study and one process serve all pages; the blocks of a page run in order, in the page's own folder."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    mpl.use("agg")
    shared = write_material(tmp_path / "shared", private_tmp)
    done, failures = set(), []
    for block in BLOCKS:
        folder = tmp_path / block.page.stem
        if not folder.exists():
            shutil.copytree(shared, folder)
        monkeypatch.chdir(folder)
        for step in [block.file or block.language, *block.commands]:
            if is_not_run(step) or (
                step.startswith("python study/") and step in done
            ):  # it leaves nothing that is used
                continue
            capsys.readouterr()
            try:
                take(step, block, bucket)
                assert "failed:" not in capsys.readouterr().out
            except Exception as error:
                message = capsys.readouterr().err.strip().splitlines()[-1:]
                failures.append(f"{block.page.name}:{block.line}: {step}: {error!r} {message}")
            done.add(step)
    assert not failures, "\n".join(failures)


def take(step: str, block: Block, bucket: ObjectPath) -> None:
    """Save a block, run it as Python, or run one of its commands."""
    if step == block.file:
        Path(block.file).write_text(block.text)
    elif step == "python":
        exec(compile(block.text, block.page.name, "exec"), {"__name__": "__main__"})
    elif step.startswith(RUN_BY_BASH):
        subprocess.run(["bash", "-c", step], env=os.environ | {"HOME": str(Path.cwd())}, check=True)
    elif step != block.language:
        run_here(step, bucket)


def run_here(command: str, bucket: ObjectPath) -> None:
    for pattern, new in CHANGED.items():
        command = re.sub(pattern, new, command)
    command = re.sub(r"s3://[\w-]+/(\S+)", lambda url: f"'{bucket / url[1]}'", command)
    app, arguments = program(command)
    if "analysis.py" in command and arguments[0].startswith("s3:"):  # where the page has the study
        study = Path("results/NAME")
        for file in filter(Path.is_file, study.rglob("*")):
            with atomic_path(open_place(arguments[0]) / str(file.relative_to(study))) as temporary:
                shutil.copyfile(file, temporary)
    assert run_app(app, arguments) == 0


def write_material(folder: Path, private_tmp: Path) -> Path:
    """Write the files that the pages assume, under the names that they use, and run one study."""
    folder.mkdir()
    stories = ("STORY", "beta", "gamma", "delta", "epsilon", "zeta", "wheretheressmoke")
    make_lab(folder / "PATH", stories, n_voxels=60)
    make_lebel(folder / "ds003020", subjects=("UTS03",))
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), "u1"), np.eye(4)), folder / "mask_thick.nii.gz")  # type: ignore[no-untyped-call]
    (folder / "texts.csv").write_text("text\nthe bank of the river\na bat flew to the bank\n")
    for label in ("neg", "pos"):
        (folder / "reviews" / label).mkdir(parents=True)
        for film in range(600):
            (folder / "reviews" / label / f"{film}.txt").write_text(f"film {film} was {label}")
    task = make_text_task(CLASSIFICATION, open_corpus(folder / "reviews"), seed=0, n_train=20, max_length=16)
    bert = str(make_text_bert(folder / "bert"))
    config = TrialConfig(model=bert, epochs=1, precision="float32", target_modules="all")
    run_text_trial(config, task, adapter_folder=folder / "classifier")
    study = ["--space", "smoke", "--trials", "1", "--confirm", "0", "--model", "minilm"]
    place = ["--data", str(folder / "PATH"), "--out", str(folder / "results"), "--name", "NAME"]
    run_command([sys.executable, str(RUN), *study, *place], private_tmp)
    return folder
