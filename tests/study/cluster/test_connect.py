"""Joining a cluster that somebody started: found, refused or joined in one line, and left as it was."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cyclopts
import psutil
import pytest
from project import ROOT
from ray_cluster import Cluster, cluster
from study_process import environment_of, private_tmp, running_from, short_folder

from bert_encoding.core.command_line import run_app
from bert_encoding.core.errors import InputError
from study.cluster import connect as cluster_module
from study.cluster import machines as machines_module
from study.cluster.connect import local_ray
from study.cluster.machines import Machines, Node, check_fits, describe_machines, find_machines

pytestmark = pytest.mark.slow

__all__ = ["cluster", "private_tmp"]  # fixtures
SMALL, GPU = Node(2, 0), Node(8, 1)


FIND = """
import json, os, sys
from bert_encoding.core.command_line import run_app
import cyclopts
from study.cluster.machines import find_machines, describe_machines

app = cyclopts.App()

@app.default
def main(address: str = ""):
    machines = find_machines(address or None)
    print(describe_machines(machines))
    print(*machines.notes, sep="\\n")

sys.exit(run_app(app))
"""
JOIN = """
import os, sys
from study.cluster.connect import connect
from study.cluster.machines import find_machines

machines = find_machines()
with connect(machines) as folder:
    import ray
    from ray import tune

    def objective(config):
        for epoch in range(2):
            tune.report({"value": config["x"] + epoch})

    results = tune.Tuner(
        tune.with_resources(objective, {"CPU": 1}),
        param_space={"x": tune.grid_search([1, 2, 3])},
        tune_config=tune.TuneConfig(max_concurrent_trials=3, reuse_actors=True),
        run_config=tune.RunConfig(name="t", storage_path=str(folder), verbose=0),
    ).fit()
    print(sorted(result.metrics["value"] for result in results), folder.stat().st_mode & 0o777)
print(folder.exists(), ray.is_initialized())
"""


def _run(cluster: Cluster, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    everything = clean | {"RAY_TMPDIR": str(cluster.folder), "PYTHONPATH": str(ROOT), "HOME": str(cluster.folder)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=everything | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.ray
def test_a_cluster_is_found_named_and_left_running(cluster: Cluster) -> None:
    token = {"RAY_AUTH_TOKEN_PATH": str(cluster.token)}  # and no RAY_AUTH_MODE: we set it
    sizes = "1 node, 3 CPUs, 0 GPUs"
    found = _run(cluster, FIND, **token)
    assert found.stdout == f"runs on: the cluster at {cluster.address} (it runs on this node): {sizes}\n\n", (
        found.stderr
    )
    assert found.stderr == ""
    named = _run(cluster, FIND, cluster.address, **token)
    assert named.stdout == f"runs on: the cluster at {cluster.address} (--address): {sizes}\n\n"
    by_variable = _run(cluster, FIND, **token, RAY_ADDRESS=cluster.address)
    assert by_variable.stdout == f"runs on: the cluster at {cluster.address} (RAY_ADDRESS): {sizes}\n\n"
    local = _run(cluster, FIND, "local", **token, RAY_ADDRESS=cluster.address)
    assert re.fullmatch(r"runs on: this machine \(\d+ CPUs, \d+ GPUs\); --address\n\n", local.stdout)

    before = {process.pid for process in _daemons(cluster)}
    joined = _run(cluster, JOIN, **token)
    assert joined.stdout.splitlines()[-2:] == ["[2, 3, 4] 448", "False False"], joined.stdout + joined.stderr
    assert before == {process.pid for process in _daemons(cluster)}, "who did not start it does not end it"
    assert len(before) >= 2


def _daemons(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in running_from(cluster.folder) if process.name() in ("gcs_server", "raylet")]


@pytest.mark.ray
def test_without_the_right_token_there_is_one_line(cluster: Cluster) -> None:
    missing = _run(cluster, FIND, cluster.address)
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert f"the cluster at {cluster.address} needs a token: {cluster.folder}/.ray/auth_token" in missing.stderr
    assert "--address local" not in missing.stderr, "it was named"
    found = _run(cluster, FIND)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert f"the cluster at {cluster.address} needs a token: " in found.stderr
    assert found.stderr.endswith("; or run on this machine alone with --address local\n")
    wrong = _run(cluster, FIND, cluster.address, RAY_AUTH_TOKEN="ab" * 32)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1, wrong.stderr
    assert f"the cluster at {cluster.address} refuses our token: RAY_AUTH_TOKEN must hold" in wrong.stderr
    off = _run(cluster, FIND, cluster.address, RAY_AUTH_MODE="disabled")
    assert off.returncode == 2
    assert off.stderr.count("\n") == 1


@pytest.mark.ray
def test_an_open_token_is_noted(cluster: Cluster, tmp_path: Path) -> None:
    copied = tmp_path / "auth_token"
    shutil.copy(cluster.token, copied)
    copied.chmod(0o644)
    found = _run(cluster, FIND, RAY_AUTH_TOKEN_PATH=str(copied))
    assert f"others may read the token {copied}: chmod 600 {copied}\n" in found.stdout


@pytest.mark.ray
def test_a_cluster_file_of_somebody_else_leads_nowhere(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps the address in a folder open to all: another user could point it to a cluster of his own."""
    monkeypatch.setenv("RAY_TMPDIR", str(cluster.folder))
    file = cluster.folder / "ray" / "ray_current_cluster"
    assert machines_module._cluster_on_this_node() == cluster.address
    try:
        file.write_text("192.0.2.77:6379")  # where no raylet of ours is a member
        assert machines_module._cluster_on_this_node() is None
        file.unlink()
        elsewhere = cluster.folder / "elsewhere"
        elsewhere.write_text(cluster.address)
        file.symlink_to(elsewhere)
        assert machines_module._cluster_on_this_node() is None
    finally:
        file.unlink()
        file.write_text(cluster.address)
    myself = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: myself + 1)
    assert machines_module._cluster_on_this_node() is None


@pytest.mark.parametrize("given", [{}, {"TMPDIR": "/some/where"}, {"TMPDIR": "/some/where", "RAY_TMPDIR": "/else"}])
def test_ray_keeps_the_address_where_we_look(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_ray_address_file

    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert str(machines_module._address_file()) == get_ray_address_file(None)


BESIDE_ANOTHER = """
import sys
from study.cluster.machines import find_machines

assert find_machines().is_local
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
from study.cluster.connect import local_ray

with local_ray(1) as folder:
    import ray

    print("joined", len(ray.nodes()))
"""


@pytest.mark.ray
def test_a_study_starts_its_own_ray_while_another_one_runs_here(tmp_path: Path) -> None:
    """Ray decides once, when imported, whether it shows a token: to look for clusters must not import it."""
    folder = short_folder()
    idle = [sys.executable, "-c", "import time; time.sleep(600)", "--gcs-address=127.0.0.1:1"]
    other = subprocess.Popen(idle)  # stands for a raylet of ours
    clean = {name: value for name, value in environment_of(folder).items() if not name.startswith("RAY_")}
    try:
        command = [sys.executable, "-c", BESIDE_ANOTHER]
        done = subprocess.run(
            command, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
        )
    finally:
        other.kill()
        other.wait()
        for process in running_from(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    assert done.stdout == "joined 1\n", done.stderr


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"no Ray cluster answers at 127.0.0.1:{port}: Connection refused"):
        find_machines(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 5
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # with no cluster in it
    with pytest.raises(InputError, match="--address auto: no Ray cluster of yours"):
        find_machines("auto")
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert find_machines().is_local


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://10.0.0.5:10001", "a Ray Client cannot run a study"),
        ("10.0.0.5", "must be HOST:PORT"),
        ("10.0.0.5:", "must be HOST:PORT"),
        (":6379", "must be HOST:PORT"),
        ("10.0.0.5:99999", "must be HOST:PORT"),
    ],
)
def test_addresses_that_are_none(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"--address {re.escape(address)}: {says}"):
        find_machines(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS {re.escape(address)}: {says}"):
        find_machines()


def test_a_token_is_needed_and_empty_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    for content in (None, "", " \n"):
        if content is not None:
            file.write_text(content)
        with pytest.raises(InputError, match=r"needs a token: .*token cannot be read or is empty"):
            machines_module._authenticate("h:1")
    file.write_text("ab" * 32)
    file.chmod(0o600)
    assert machines_module._authenticate("h:1") == ()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    file.chmod(0o640)
    assert len(machines_module._authenticate("h:1")) == 1
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (note,) = machines_module._authenticate("h:1")
    assert note.startswith("RAY_AUTH_MODE is disabled: whoever reaches h:1")


@pytest.mark.parametrize(
    ("cpus", "gpus", "n"),
    [(1, 0, 26), (2, 0, 13), (8, 0, 3), (2, 1, 3), (2, 0.5, 6), (3, 0.5, 6), (8, 0.25, 3), (0.5, 0, 52), (1, 2, 0)],
)
def test_trials_at_once_against_a_plain_loop(cpus: float, gpus: float, n: int) -> None:
    machines = Machines("h:1", "x", (SMALL, GPU), (GPU, GPU))
    assert machines.at_once(cpus, gpus) == n
    packed = 0
    for node in (SMALL, GPU, GPU, GPU):
        free_cpus, cards = float(node.n_cpus), [1.0] * node.n_gpus
        while free_cpus >= cpus and (gpus == 0 or sum(card >= min(gpus, 1) for card in cards) >= max(1, gpus)):
            free_cpus -= cpus
            for _ in range(max(1, int(gpus)) if gpus else 0):
                cards[max(range(len(cards)), key=cards.__getitem__)] -= min(gpus, 1)
            packed += 1
    assert packed == n


@pytest.mark.parametrize(
    ("cpus", "gpus", "can_add", "says"),
    [
        (9, 0, (GPU,), "--cpus-per-trial 9: the largest machine of the cluster has 8"),
        (1, 2, (GPU,), "--gpus-per-trial 2: the largest machine of the cluster has 1"),
        (1, 1, (), "--gpus-per-trial 1: the largest machine of the cluster has 0"),
        (
            3,
            1,
            (Node(2, 1), Node(64, 0)),
            "--cpus-per-trial, --gpus-per-trial: no machine has 3 CPUs and 1 GPUs together",
        ),
        (1, 1.5, (GPU,), "--gpus-per-trial 1.5: above 1 it must be a whole number"),
        (0, 0, (GPU,), "--cpus-per-trial 0: the largest machine of the cluster has 8"),
        (float("nan"), 0, (GPU,), "--cpus-per-trial nan: the largest machine of the cluster has 8"),
        (1, float("inf"), (GPU,), "--gpus-per-trial inf: above 1 it must be a whole number"),
        (float("inf"), 0, (GPU,), "--cpus-per-trial inf: the largest machine of the cluster has 8"),
        (1, -1, None, "--gpus-per-trial -1: the largest machine of the cluster has 0"),
    ],
)
def test_what_no_machine_could_hold_is_refused(cpus: float, gpus: float, can_add: tuple | None, says: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(says)}$"):
        check_fits(cpus, gpus, Machines("h:1", "x", (SMALL,), can_add))


def test_what_a_cluster_could_grow_to_hold_is_allowed() -> None:
    growing = Machines("h:1", "x", (Node(0, 0),), (GPU, GPU))
    assert check_fits(8, 1, growing) == []
    assert growing.largest == GPU
    assert describe_machines(growing) == "runs on: the cluster at h:1 (x): 1 node, 0 CPUs, 0 GPUs, 2 more on demand"
    unknown = Machines("h:1", "x", (SMALL, SMALL), None)
    (note,) = check_fits(8, 1, unknown)
    assert (
        note
        == "no machine of the cluster has 8 CPUs and 1 GPUs now; trials wait until an autoscaler adds one, if it can"
    )
    assert describe_machines(unknown).endswith("2 nodes, 4 CPUs, 0 GPUs, perhaps more on demand")
    with pytest.raises(InputError, match=r"^--cpus-per-trial 3: this machine has 2$"):
        check_fits(3, 0, Machines(None, "x", (SMALL,)))


CLUSTER_FILE = """
max_workers: {most}
head_node_type: head
available_node_types:
  head: {{resources: {{CPU: 0}}, max_workers: 0}}
  gpu: {{resources: {gpu}, max_workers: 4}}
  cpu: {{resources: {{CPU: 64}}, max_workers: 2}}
"""


@pytest.mark.parametrize(
    ("most", "gpu", "n_nodes", "expected"),
    [
        (4, "{CPU: 8, GPU: 1}", 1, (GPU,) * 4),
        (9, "{CPU: 8, GPU: 1}", 1, (*(GPU,) * 4, Node(64, 0), Node(64, 0))),
        (4, "{CPU: 8, GPU: 1}", 4, (GPU,)),
        (4, "{CPU: 8, GPU: 1}", 5, ()),
        (4, "{}", 1, None),  # only the cloud knows its size
    ],
)
def test_what_an_autoscaler_could_add(
    tmp_path: Path, most: int, gpu: str, n_nodes: int, expected: tuple[Node, ...] | None
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CLUSTER_FILE.format(most=most, gpu=gpu))
    assert machines_module._can_add_by_file(str(file), n_nodes) == expected


def test_a_strange_autoscaler_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for content in ("", "[1]", "max_workers: {", "available_node_types: {a: 3}\nhead_node_type: b"):
        file.write_text(content)
        assert machines_module._can_add_by_file(str(file), 1) is None
    assert machines_module._can_add_by_file(str(tmp_path / "none"), 1) is None


def test_the_own_cluster_file_scales_from_nothing() -> None:
    added = machines_module._can_add_by_file(str(ROOT / "cluster.yaml"), 1)
    assert added == (GPU,) * 4
    machines = Machines("h:1", "x", (Node(0, 0),), added)
    assert machines.at_once(4, 0.5) == 8


def test_autoscaler_v2_reports_its_types_to_the_cluster() -> None:
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    config = ClusterConfig()
    for name, resources, most in (("head", {"CPU": 0}, 1), ("gpu", {"CPU": 8, "GPU": 1}, 3)):
        group = config.node_group_configs.add(name=name, max_count=most)
        group.resources.update(resources)

    class Client:
        def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes:
            return config.SerializeToString()

    assert machines_module._can_add(Client(), "h:1", 1) == (*(GPU,) * 3, Node(0, 0))


def test_a_cluster_here_that_refuses_us_can_be_left_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(machines_module, "_cluster_on_this_node", lambda: "127.0.0.1:1")
    with pytest.raises(InputError, match=r"^the cluster at 127.0.0.1:1 needs a token: .*--address local$"):
        find_machines()
    with pytest.raises(InputError, match=r"needs a token: (?!.*--address local)"):
        find_machines("127.0.0.1:1")
    assert find_machines("local").is_local


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stand in for Ray, with its folder below ``tmp_path`` and the environment as it was afterwards."""
    ray = SimpleNamespace(init=lambda **given: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cluster_module, "SHORT_PLACES", (str(tmp_path),))
    monkeypatch.setattr(cluster_module, "MOMENT_S", 0.0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return ray


def test_a_ray_that_does_not_start_is_told_in_one_line(fake_ray: SimpleNamespace, tmp_path: Path) -> None:
    def fail(_temp_dir: str, **given: Any) -> None:
        logs = Path(_temp_dir, "session_1", "logs")
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text("why")
        raise Exception("The node timed out.\nThis could happen because ...\n")  # as Ray does

    fake_ray.init = fail
    with pytest.raises(InputError) as caught, local_ray(1):
        pass
    (kept,) = tmp_path.iterdir()
    assert str(caught.value) == f"Ray does not start on this machine: The node timed out.; its logs are in {kept}"
    assert [file.read_text() for file in kept.rglob("*") if file.is_file()] == ["why"]
    assert kept.stat().st_mode & 0o777 == 0o700


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
def test_ray_starts_though_tmpdir_is_long(private_tmp: Path) -> None:
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
def test_a_short_path_is_chosen_only_where_it_is_needed(
    n_characters: int, fake_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, private_tmp: Path
) -> None:
    """A process id of 7 digits leaves room for 18."""
    temporary = private_tmp / ("x" * (n_characters - len(str(private_tmp)) - 1))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(cluster_module, "MAX_SOCKET_BYTES", 107)
    monkeypatch.setattr(os, "getpid", lambda: 2**22)
    given: dict[str, Any] = {}
    fake_ray.init = lambda **options: given.update(options)
    with local_ray(1) as folder:
        short = Path(given["_temp_dir"])
        assert (short.parent == folder) == (n_characters == 18)
        assert short.resolve() == (folder / "r").resolve()
        assert short.parent.stat().st_mode & 0o777 == 0o700 and short.parent.stat().st_uid == os.getuid()
    assert not short.parent.exists() and list(temporary.iterdir()) == []


def test_where_no_short_path_can_be_made_one_line_says_so(
    fake_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "none")
    monkeypatch.setattr(cluster_module, "SHORT_PLACES", (nowhere,))
    app = cyclopts.App()

    @app.default
    def start() -> None:
        with local_ray(1):
            pytest.fail("Ray was started")

    assert run_app(app, []) == 2
    said = rf"error: TMPDIR {tmp_path}: too long for Ray's sockets, and {nowhere} cannot be written; set TMPDIR to a "
    assert re.fullmatch(said + r"folder whose path has at most \d\d characters\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_ray_that_fails_before_its_first_log_leaves_nothing(fake_ray: SimpleNamespace, tmp_path: Path) -> None:
    def fail(**given: Any) -> None:
        raise ValueError

    fake_ray.init = fail
    with pytest.raises(InputError, match=r"^Ray does not start on this machine: ValueError$"), local_ray(1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_is_not_taken_for_one_of_the_start(fake_ray: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), local_ray(1):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_ray_ends_leaves_no_folder(
    fake_ray: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fake_ray.shutdown = interrupt
    with pytest.raises(KeyboardInterrupt), local_ray(1):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_a_folder_that_an_agent_makes_again_is_removed_again(
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
