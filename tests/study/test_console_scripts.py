"""Commands outside a checkout: console scripts of an installed wheel; what a script's folder does not bring in."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from project import ANALYSIS, ROOT, RUN
from study_process import environment_of

from study.results.verdicts.next_runs import resume_command
from study.session import identity
from study.wording import run_command

PROJECT = "bert-encoding-study"
NAMES = sorted(path.stem for path in (ROOT / "study").iterdir() if path.stem[0] != "_")
FROM_STUDY = f"""
import importlib.util, os, sys
def print_names(event, arguments):  # as soon as the script begins with its imports
    if event == "import" and arguments[0] == "cyclopts":
        specs = {{name: importlib.util.find_spec(name) for name in {NAMES}}}
        places = {{name: [s.origin, *(s.submodule_search_locations or [])] for name, s in specs.items() if s}}
        print("found", [name for name in places if "{ROOT / "study"}" in str(places[name])], flush=True)
        os._exit(0)
sys.addaudithook(print_names)
"""
IN_A_WORKER = """
import importlib.util, sys
from bert_encoding.core.interrupt import remove_from_import_path
remove_from_import_path(__file__)
from study.cluster.connect import local_ray

with local_ray(1):
    import ray

    find = ray.remote(lambda: [name for name in ("session", "report", "text") if importlib.util.find_spec(name)])
    print("found", ray.get(find.remote()))
"""


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command that sees this checkout only where ``PYTHONPATH`` is among the variables."""
    environment = os.environ | {"PYTHONPATH": ""} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("script", [RUN, ANALYSIS])
def test_a_script_imports_nothing_from_its_own_folder(script: Path, tmp_path: Path) -> None:
    assert {"session", "report", "results"} <= set(NAMES)
    (tmp_path / "sitecustomize.py").write_text(FROM_STUDY)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run([sys.executable, str(script), "--help"], tmp_path, PYTHONPATH=path)
    assert done.stdout == "found []\n", done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_nor_do_the_workers_that_it_starts(tmp_path: Path, private_tmp: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("session", "report", "text"):
        (folder / f"{name}.py").touch()
    (folder / "script.py").write_text(IN_A_WORKER)
    done = run([sys.executable, "study/script.py"], tmp_path, **environment_of(private_tmp) | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "found []\n", done.stderr


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("study/run.py", "python study/run.py"),
        ("/env/bin/bert-encoding-study", "bert-encoding-study"),
        ("/env/bin/bert-encoding-analysis", "bert-encoding-study"),
    ],
)
def test_the_next_command_is_one_that_works_here(called: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert run_command() == expected
    assert resume_command("results/s") == f"{expected} --resume --name s"


def test_a_commit_is_that_of_the_source_tree_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed below another project's repository, the code has no commit; without a repository neither."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file = tmp_path / "env" / "identity.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(identity, "__file__", str(file))
    assert identity.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    assert identity.git_commit() is None
    for words in (["add", "env"], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert identity.git_commit() == {"commit": commit, "dirty": False}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the console scripts of a fresh environment with our wheel, and with what is installed here."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    for name in ("bert_encoding", "study", "search_spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    python, pip = environment / "bin" / "python", [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    here = sysconfig.get_path("purelib")
    for command in (
        [*pip, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source)],
        [sys.executable, "-m", "venv", "--without-pip", str(environment)],
        [*pip, "--python", str(python), "install", "-q", "--no-deps", "--no-index", f"--find-links={folder}", PROJECT],
        [str(python), "-c", f"import site; open(site.getsitepackages()[0] + '/here.pth', 'w').write({here!r})"],
    ):  # fmt: skip
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return python.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_works_from_any_folder(scripts: Path, tmp_path: Path) -> None:
    (where,) = run([str(scripts / "python"), "-c", "import study; print(study.__file__)"], tmp_path).stdout.splitlines()
    assert Path(where).is_relative_to(scripts.parent)
    for name, text in (("", "check"), ("-study", "--space"), ("-analysis", "Print the results of a study")):
        script = scripts / f"bert-encoding{name}"
        done = run([str(script), "--help"], tmp_path)
        assert done.returncode == 0 and f"Usage: {script.name}" in done.stdout and text in done.stdout, done.stderr
    checked = run([str(scripts / "bert-encoding"), "check", "demo"], tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    planned = run([str(scripts / "bert-encoding-study"), "--space", "lora_full", "--dry-run"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    refused = run([str(scripts / "bert-encoding-analysis"), "nowhere"], tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_an_installed_study_runs_and_reports(
    scripts: Path, tmp_path: Path, private_tmp: Path, lab: Path, tiny_bert: Path
) -> None:
    options = ["--data", str(lab), "--model", str(tiny_bert), "--trials", "0", "--name", "s"]
    private = environment_of(private_tmp) | {"PYTHONPATH": ""}
    done = run([str(scripts / "bert-encoding-study"), *options], tmp_path, **private)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "s" / "report.html").is_file()
    again = run([str(scripts / "bert-encoding-analysis"), "results/s"], tmp_path)
    assert again.returncode == 0 and "word_rate" in again.stdout, again.stderr
