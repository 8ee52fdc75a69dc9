"""A private Ray on this machine: what it leaves behind, where its sockets are, and why it may not start."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from project import ROOT
from study_process import environment_of

from bert_encoding.core.errors import InputError
from study.cluster import connect as connect_module
from study.cluster.connect import local_ray

pytestmark = pytest.mark.slow


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stand in for Ray, with its folder below ``tmp_path`` and the environment as it was afterwards."""
    ray = SimpleNamespace(init=lambda **given: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(connect_module, "SHORT_PLACES", (str(tmp_path),))
    monkeypatch.setattr(connect_module, "AGENTS_END_S", 0.0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return ray


def test_ray_that_does_not_start_gives_one_line_and_keeps_its_logs(fake_ray: SimpleNamespace, tmp_path: Path) -> None:
    def fail(_temp_dir: str, **given: Any) -> None:
        logs = Path(_temp_dir, "session_1", "logs")
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text("why")
        raise Exception("The node timed out.\nThis could happen because ...\n")  # as Ray does

    fake_ray.init = fail
    with pytest.raises(InputError) as caught, local_ray(1):
        pass
    (saved,) = tmp_path.iterdir()
    assert str(caught.value) == f"Ray does not start on this machine: The node timed out.; its logs are in {saved}"
    assert [file.read_text() for file in saved.rglob("*") if file.is_file()] == ["why"]
    assert saved.stat().st_mode & 0o777 == 0o700


LISTS_SOCKETS = """
import os, stat
from study.cluster.connect import local_ray

with local_ray(1) as folder:
    import ray

    ray.get(ray.remote(lambda: os.getpid()).remote())
    temporary = ray._private.worker.global_worker.node.get_temp_dir_path()
    files = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    print(sum(stat.S_ISSOCK(os.stat(file).st_mode) for file in files))
    print(folder, oct(folder.stat().st_mode), os.path.dirname(temporary), oct(os.stat(temporary + "/..").st_mode))
print(os.path.exists(folder), os.path.lexists(temporary))
"""


@pytest.mark.ray
def test_ray_starts_when_tmpdir_is_long(private_tmp: Path) -> None:
    """What Ray writes stays in TMPDIR; only the paths by which it reaches its sockets are elsewhere."""
    long = private_tmp / ("x" * (59 - len(str(private_tmp))))
    long.mkdir()
    assert len(str(long)) == 60
    command, where = [sys.executable, "-c", LISTS_SOCKETS], {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment_of(private_tmp) | where, capture_output=True, text=True, timeout=120)
    n_sockets, folders, after = done.stdout.splitlines() or [done.stderr]
    assert int(n_sockets) >= 2
    folder, mode, short, short_mode = folders.split()
    assert Path(folder).parent == long and Path(short).parent == Path("/tmp")
    assert mode == short_mode == "0o40700"
    assert after == "False False" and not list(long.iterdir())


@pytest.mark.parametrize("n_characters", [18, 19, 200])
def test_short_path_is_used_only_when_needed(
    n_characters: int, fake_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, private_tmp: Path
) -> None:
    """A process id of 7 digits leaves room for 18."""
    temporary = private_tmp / ("x" * (n_characters - len(str(private_tmp)) - 1))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(connect_module, "MAX_SOCKET_BYTES", 107)
    monkeypatch.setattr(os, "getpid", lambda: 2**22)
    given: dict[str, Any] = {}
    fake_ray.init = lambda **options: given.update(options)
    with local_ray(1) as folder:
        short = Path(given["_temp_dir"])
        assert (short.parent == folder) == (n_characters == 18)
        assert short.resolve() == (folder / "r").resolve()
        assert short.parent.stat().st_mode & 0o777 == 0o700 and short.parent.stat().st_uid == os.getuid()
    assert not short.parent.exists() and list(temporary.iterdir()) == []


def test_no_short_path_is_refused_with_the_longest_that_works(
    fake_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "none")
    monkeypatch.setattr(connect_module, "SHORT_PLACES", (nowhere,))
    message = rf"^TMPDIR {tmp_path}: too long for Ray's sockets, and {nowhere} cannot be written; .* at most \d\d char"
    with pytest.raises(InputError, match=message), local_ray(1):
        pytest.fail("Ray was started")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "error", "expected", "message"),
    [
        ("init", ValueError, InputError, r"^Ray does not start on this machine: ValueError$"),  # before its first log
        ("block", ZeroDivisionError, ZeroDivisionError, None),
        ("shutdown", KeyboardInterrupt, KeyboardInterrupt, None),  # Ctrl-C
    ],
)
def test_no_folder_is_left(
    moment: str, error: type, expected: type, message: str | None, fake_ray: SimpleNamespace, tmp_path: Path
) -> None:
    def fail(**options: Any) -> None:
        raise error

    fake_ray.block = lambda: None
    setattr(fake_ray, moment, fail)
    with pytest.raises(expected, match=message), local_ray(1):
        fake_ray.block()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_folder_that_an_agent_recreates_is_removed_again(
    is_interrupted: bool, fake_ray: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, slept = shutil.rmtree, []
    monkeypatch.setattr(time, "sleep", slept.append)

    def remove(folder: Path, ignore_errors: bool) -> None:
        really(folder, ignore_errors=ignore_errors)
        if not slept:
            (folder / "r" / "session").mkdir(parents=True)  # Ray's agent writes its last line
            if is_interrupted:
                raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(KeyboardInterrupt) if is_interrupted else nullcontext(), local_ray(1):
        pass
    assert list(tmp_path.iterdir()) == []
