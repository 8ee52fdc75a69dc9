"""Where trials run: which cluster is chosen, what it offers, and every reason to refuse it."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ROOT
from ray_cluster import Cluster
from study_process import environment_of, running_from

from bert_encoding.core.errors import InputError
from study.cluster import machines as machines_module
from study.cluster.machines import Machines, Node, check_fits, describe_machines, find_machines

pytestmark = pytest.mark.slow

SMALL, GPU = Node(2, 0), Node(8, 1)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """An environment without Ray's variables, with an empty home, in place of the real one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", clean | {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)})
    return os.environ  # type: ignore[return-value]


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


@pytest.mark.ray
def test_cluster_on_this_node_is_used_unless_another_place_is_named(
    cluster: Cluster, environment: dict[str, str]
) -> None:
    environment |= {"RAY_TMPDIR": str(cluster.folder), "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    node, sizes = (Node(3, 0),), "1 node, 3 CPUs, 0 GPUs"
    here = find_machines()
    assert here == Machines(cluster.address, "it runs on this node", node)
    assert describe_machines(here) == f"runs on: the cluster at {cluster.address} (it runs on this node): {sizes}"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert find_machines(cluster.address) == Machines(cluster.address, "--address", node)
    environment["RAY_ADDRESS"] = cluster.address
    assert find_machines() == Machines(cluster.address, "RAY_ADDRESS", node)
    assert re.fullmatch(
        r"runs on: this machine \(\d+ CPUs, \d+ GPUs\); --address", describe_machines(find_machines("local"))
    )

    before = {process.pid for process in _daemons(cluster)}
    assert len(before) >= 2
    command = [sys.executable, "-c", JOIN]
    variables = environment | {"PYTHONPATH": str(ROOT)}
    joined = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert joined.stdout.splitlines()[-2:] == ["[2, 3, 4] 448", "False False"], joined.stdout + joined.stderr
    assert before == {process.pid for process in _daemons(cluster)}, "a study leaves a cluster running"


def _daemons(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in running_from(cluster.folder) if process.name() in ("gcs_server", "raylet")]


@pytest.mark.ray
def test_without_the_right_token_a_cluster_is_refused(cluster: Cluster, environment: dict[str, str]) -> None:
    environment["RAY_TMPDIR"] = str(cluster.folder)
    with pytest.raises(InputError, match=rf"^the cluster at {cluster.address} needs a token: (?!.*--address local)"):
        find_machines(cluster.address)
    with pytest.raises(InputError, match=rf"^the cluster at {cluster.address} needs a token: .*--address local$"):
        find_machines()  # not named by the user
    assert find_machines("local").is_local
    for variables in ({"RAY_AUTH_TOKEN": "ab" * 32}, {"RAY_AUTH_MODE": "disabled"}):
        environment |= variables
        began = time.monotonic()
        with pytest.raises(InputError, match=rf"^the cluster at {cluster.address} refuses our token: .* must hold"):
            find_machines(cluster.address)
        assert time.monotonic() - began < 15


@pytest.mark.ray
def test_address_file_of_another_user_is_ignored(
    cluster: Cluster, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps the address in a folder open to all: another user could replace it with a cluster of their own."""
    environment |= {"RAY_TMPDIR": str(cluster.folder), "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    file = cluster.folder / "ray" / "ray_current_cluster"
    try:
        file.write_text("192.0.2.77:6379")  # no raylet of ours belongs to it
        assert find_machines().is_local
        file.unlink()
        elsewhere = cluster.folder / "elsewhere"
        elsewhere.write_text(cluster.address)
        file.symlink_to(elsewhere)
        assert find_machines().is_local
    finally:
        file.unlink()
        file.write_text(cluster.address)
    myself = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: myself + 1)
    assert find_machines().is_local


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
def test_study_starts_its_own_ray_while_another_one_runs_here(private_tmp: Path) -> None:
    """Ray decides once, when imported, whether it shows a token: the search for clusters must not import it."""
    idle = [sys.executable, "-c", "import time; time.sleep(600)", "--gcs-address=127.0.0.1:1"]
    other = subprocess.Popen(idle)  # stands for a raylet of ours
    clean = {name: value for name, value in environment_of(private_tmp).items() if not name.startswith("RAY_")}
    try:
        command, variables = [sys.executable, "-c", BESIDE_ANOTHER], clean | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    finally:
        other.kill()
        other.wait()
    assert done.stdout == "joined 1\n", done.stderr


def test_address_without_a_ray_head_is_refused_in_bounded_time(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment["RAY_AUTH_TOKEN"] = "ab" * 32
    monkeypatch.setattr(machines_module, "ANSWER_TIMEOUT_S", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InputError, match=rf"^no Ray cluster answers at {address}: Connection refused"):
            find_machines(address)
        server.listen()
        with pytest.raises(InputError, match=rf"^no Ray cluster answers at {address} within 1 s"):
            find_machines(address)
        assert time.monotonic() - began < 10
    with pytest.raises(InputError, match=r"^--address auto: no Ray cluster of yours"):
        find_machines("auto")
    environment["RAY_ADDRESS"] = ""
    assert find_machines().is_local


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://10.0.0.5:10001", "a Ray Client cannot run a study"),
        *((address, "must be HOST:PORT") for address in ("10.0.0.5", "10.0.0.5:", ":6379", "10.0.0.5:99999")),
    ],
)
def test_malformed_address_is_refused(address: str, says: str, environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"--address {re.escape(address)}: {says}"):
        find_machines(address)
    environment["RAY_ADDRESS"] = address
    with pytest.raises(InputError, match=f"RAY_ADDRESS {re.escape(address)}: {says}"):
        find_machines()


def test_missing_or_empty_token_is_refused_and_an_open_one_noted(tmp_path: Path, environment: dict[str, str]) -> None:
    file = tmp_path / "token"
    environment["RAY_AUTH_TOKEN_PATH"] = str(file)
    for content in (None, "", " \n"):
        if content is not None:
            file.write_text(content)
        with pytest.raises(InputError, match=r"needs a token: .*token cannot be read or is empty"):
            find_machines("h:1")
    file.write_text("ab" * 32)
    file.chmod(0o600)
    assert machines_module._authenticate("h:1") == ()
    file.chmod(0o640)
    assert machines_module._authenticate("h:1") == (f"others may read the token {file}: chmod 600 {file}",)
    environment["RAY_AUTH_MODE"] = "disabled"
    (note,) = machines_module._authenticate("h:1")
    assert note.startswith("RAY_AUTH_MODE is disabled: anyone who reaches h:1")


@pytest.mark.parametrize(
    ("cpus", "gpus", "n"),
    [(1, 0, 26), (2, 0, 13), (8, 0, 3), (2, 1, 3), (2, 0.5, 6), (3, 0.5, 6), (8, 0.25, 3), (0.5, 0, 52), (1, 2, 0)],
)
def test_trials_at_once_fit_on_the_nodes_of_now_and_on_demand(cpus: float, gpus: float, n: int) -> None:
    assert Machines("h:1", "x", (SMALL, GPU), (GPU, GPU)).at_once(cpus, gpus) == n


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
        (-1, 0, (GPU,), "--cpus-per-trial -1: the largest machine of the cluster has 8"),
        (0, 0, (GPU,), "--cpus-per-trial 0: the largest machine of the cluster has 8"),
        (float("nan"), 0, (GPU,), "--cpus-per-trial nan: the largest machine of the cluster has 8"),
        (1, float("nan"), (GPU,), "--gpus-per-trial nan: the largest machine of the cluster has 1"),
        (1, float("inf"), (GPU,), "--gpus-per-trial inf: above 1 it must be a whole number"),
        (float("inf"), 0, (GPU,), "--cpus-per-trial inf: the largest machine of the cluster has 8"),
        (1, -1, None, "--gpus-per-trial -1: the largest machine of the cluster has 0"),
    ],
)
def test_trial_that_no_machine_can_hold_is_refused(
    cpus: float, gpus: float, can_add: tuple[Node, ...] | None, says: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(says)}$"):
        check_fits(cpus, gpus, Machines("h:1", "x", (SMALL,), can_add))


def test_trial_that_a_cluster_can_grow_to_hold_is_allowed() -> None:
    growing = Machines("h:1", "x", (Node(0, 0),), (GPU, GPU))
    assert check_fits(8, 1, growing) == []
    assert growing.largest == GPU
    assert describe_machines(growing) == "runs on: the cluster at h:1 (x): 1 node, 0 CPUs, 0 GPUs, 2 more on demand"
    unknown = Machines("h:1", "x", (SMALL, SMALL), None)
    (note,) = check_fits(8, 1, unknown)
    assert note.startswith("no machine of the cluster has 8 CPUs and 1 GPUs now; trials wait")
    assert ": 2 nodes, 4 CPUs, 0 GPUs, perhaps more on demand" in describe_machines(unknown)


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
def test_cluster_file_tells_what_an_autoscaler_can_add(
    tmp_path: Path, most: int, gpu: str, n_nodes: int, expected: tuple[Node, ...] | None
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CLUSTER_FILE.format(most=most, gpu=gpu))
    assert machines_module._read_cluster_file(str(file), n_nodes) == expected


def test_damaged_or_missing_cluster_file_leaves_it_unknown_and_the_bundled_one_scales_from_nothing(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    for content in (None, "", "[1]", "max_workers: {", "available_node_types: {a: 3}\nhead_node_type: b"):
        if content is not None:
            file.write_text(content)
        assert machines_module._read_cluster_file(str(file), 1) is None
    can_add = machines_module._read_cluster_file(str(ROOT / "cluster.yaml"), 1)
    assert can_add == (GPU,) * 4
    assert Machines("h:1", "x", (Node(0, 0),), can_add).at_once(4, 0.5) == 8
