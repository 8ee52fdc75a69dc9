"""Ray's own autoscaler with the node types of cluster.yaml: machines come for trials, are shared, and go again.

Only the cloud is missing: what would be a machine on AWS is one more raylet here, with as many CPUs and GPUs on paper.
"""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pretend import SPACE, by_lr
from project import HELPERS, ROOT
from study_process import environment_of, running_from, short_folder

from bert_encoding.trial.record import TrialRecord

CLUSTER_FILE = ROOT / "cluster.yaml"
IDLE_S, AT_ONCE = 8.0, 4
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # what the stand-in for a cloud calls every head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


class Cluster(NamedTuple):
    """A head with an autoscaler, and no worker yet."""

    address: str
    environment: dict[str, str]
    config: dict[str, Any]


def autoscaling_config(port: int) -> dict[str, Any]:
    """Return cluster.yaml as `ray up` completes it, node types and limits included, without cloud and patience."""
    from ray.autoscaler._private.util import prepare_config

    real = prepare_config(yaml.safe_load(CLUSTER_FILE.read_text()))
    types = {name: known | {"node_config": {}} for name, known in real["available_node_types"].items()}
    types[HEAD_TYPE] = types.pop(real["head_node_type"])
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD_ID,
        **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
        "launch_multiple": True,
    }
    replaced = {"available_node_types": types, "head_node_type": HEAD_TYPE, "provider": provider, "file_mounts": {}}
    return real | replaced | {"idle_timeout_minutes": IDLE_S / 60}


def head_command(port: int, config: Path) -> list[str]:
    """Return what cluster.yaml starts a head with, on another port, without a dashboard and with free ports."""
    shell = yaml.safe_load(CLUSTER_FILE.read_text())["head_start_ray_commands"][-1]
    words = shlex.split(shell[shell.index("ray start") :])[1:]
    for old in ("--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml", "--dashboard-host=127.0.0.1"):
        words.remove(old)
    free = [f"--{kind}-port=0" for kind in ("min-worker", "max-worker", "dashboard-agent-listen")]
    ours = [f"--port={port}", f"--autoscaling-config={config}", "--include-dashboard=false", *free]
    return [str(Path(sys.executable).with_name("ray")), *words, *ours, "--object-store-memory=80000000"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head as `ray up` starts it, ended with all its nodes by their process ids."""
    folder = short_folder()
    token, port, config = folder / "auth_token", free_port(), folder / "autoscaling.yaml"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    made = autoscaling_config(port)
    config.write_text(json.dumps(made))
    clean = {name: value for name, value in environment_of(folder).items() if not name.startswith("RAY_")}
    users = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)}
    users |= {"PYTHONPATH": f"{ROOT}:{HELPERS}"}
    heads = {"RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_NODE_TYPE_NAME": made["head_node_type"]}
    heads |= {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "AUTOSCALER_METRIC_PORT": "0"}
    command = head_command(port, config)
    try:
        subprocess.run(command, env=users | heads, check=True, capture_output=True, timeout=120)
        address = (folder / "ray" / "ray_current_cluster").read_text().strip()
        yield Cluster(address, users, made)
    finally:
        for process in running_from(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


STUDY = """
import json, sys, time
from pathlib import Path
import stub_study
from study.cluster.connect import connect
from study.cluster.machines import describe_machines, find_machines

folder, options = sys.argv[1:]
at_once = json.loads(options)["max_concurrent"]
machines = find_machines()
print(describe_machines(machines), machines.at_once(2, 0.5), sep="\\n")


def objective(job, **more):
    import functools, ray, stub_study
    plain = getattr(stub_study.pretend, "__wrapped__", stub_study.pretend)  # a worker runs several trials

    @functools.wraps(plain)
    def on_a_node(*given):
        began = time.time()
        record = plain(*given)
        while len((given[1] / stub_study.LOG).read_text().splitlines()) < at_once:  # or the first worker may do all
            assert time.time() < began + 90, "too few trials at once"
            time.sleep(0.1)
        record.node = ray.get_runtime_context().get_node_id()
        record.scores |= {"began": began, "ended": time.time(), "gpus": ray.get_gpu_ids()}
        return record

    stub_study.pretend = on_a_node
    stub_study.stub_objective(job, **more)


stub_study.three_nodes = lambda folder, n_cpus: connect(machines)
stub_study.stub_objective = objective
stub_study.main(Path(folder), json.loads(options))
"""


NODES = """
import json, sys
from ray._raylet import GcsClient

nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10).values()
resources = [(n, n.resources_total) for n in nodes if not n.is_head_node]
print(json.dumps([[n.node_id.hex(), n.state == 0, n.node_type_name, r["CPU"], r["GPU"]] for n, r in resources]))
"""


def workers(cluster: Cluster) -> dict[str, tuple[bool, list[Any]]]:
    """Return every worker that the cluster has ever had: id -> whether it is there, its type, CPUs and GPUs."""
    command = [sys.executable, "-c", NODES, cluster.address]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=True, timeout=60)
    return {node: (is_there, known) for node, is_there, *known in json.loads(done.stdout)}


def run_study(cluster: Cluster, folder: Path, lrs: list[float], **options: object) -> str:
    """Run a study on the head, as `ray exec` would: it has to find the cluster by itself."""
    folder.mkdir()
    (folder / "space.py").write_text(SPACE.format(lrs=lrs))
    given = {"trials": len(lrs), "nodes": 1} | options
    command = [sys.executable, "-c", STUDY, str(folder), json.dumps(given)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_half_gpu_trials_share_workers_that_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    (kind,) = set(cluster.config["available_node_types"]) - {cluster.config["head_node_type"]}
    worker = cluster.config["available_node_types"][kind]
    size, most = [kind, float(worker["resources"]["CPU"]), float(worker["resources"]["GPU"])], worker["max_workers"]
    assert size[2] == 1 and most > 2, "the study below needs two of them, and could take more"
    lrs = [at / 100 for at in range(1, 9)]
    output = run_study(cluster, tmp_path / "s", lrs, cpus_per_trial=2, gpus_per_trial=0.5, max_concurrent=AT_ONCE)
    ended = time.time()
    assert output.splitlines()[:2] == [
        f"runs on: the cluster at {cluster.address} (it runs on this node): 1 node, 0 CPUs, 0 GPUs, {most} more on "
        "demand",
        str(2 * most),
    ]
    assert "ended: None" in output
    records = by_lr(tmp_path / "s")
    assert [record.error for record in records.values()] == [None] * len(lrs)
    assert {lr: record.scores["cc_mean"] for lr, record in records.items()} == {lr: lr * 4 for lr in lrs}

    while any(is_there for is_there, _ in workers(cluster).values()):
        assert time.time() < ended + 90, "the workers stay"
    last_end = max(record.scores["ended"] for record in records.values())
    assert last_end + IDLE_S - 1 < time.time(), "nobody goes before it is idle"
    seen = workers(cluster)
    assert [known for _, known in seen.values()] == [size, size], "four halves need two workers, not four"
    assert set(seen) == {record.node for record in records.values()}
    assert at_once(list(records.values())) == dict.fromkeys({record.node for record in records.values()}, 2)
    assert {tuple(record.scores["gpus"]) for record in records.values()} == {(0,)}, "the one GPU, shared"


def at_once(records: list[TrialRecord]) -> dict[str, int]:
    """Return node -> the most trials that ran on it at the same time."""
    most: Counter[str] = Counter()
    for moment in (record.scores["began"] for record in records):
        now = Counter(one.node for one in records if one.scores["began"] <= moment < one.scores["ended"])
        most |= now
    return dict(most)
