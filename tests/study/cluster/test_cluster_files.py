"""cluster.yaml and its sisters: Ray's own check, ours, AWS as moto plays it, and the Slurm script run for real."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import ROOT

DEPLOY = ROOT / "deploy"
AWS, LOCAL = ROOT / "cluster.yaml", DEPLOY / "cluster.local.yaml"
SCRIPTS = sorted([*DEPLOY.glob("*.sh"), DEPLOY / "slurm.sbatch"])
START = ("head_start_ray_commands", "worker_start_ray_commands")
TOKEN = "~/.ray/auth_token"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of boto3, moto and Ray's launcher

sys.path.insert(0, str(DEPLOY))
import aws_setup  # noqa: E402


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def problems(config: dict[str, Any]) -> set[str]:
    """Return what of the requirements on a cluster file does not hold, by name."""
    mounts = config.get("file_mounts", {})
    setup = " ; ".join(config.get("setup_commands", []))
    starts = [" ; ".join(config.get(name, [])) for name in START]
    everything = json.dumps(config)
    checks = {
        "token shipped": mounts.get(TOKEN) == TOKEN,
        "token private": "chmod 600 ~/.ray/auth_token" in setup,
        "token mode": all("export RAY_AUTH_MODE=token; ray start" in line for line in starts),
        "environment": all(line.count(". ~/bert-encoding/deploy/env.sh; ") == 2 for line in starts)
        and "bert-encoding/deploy/env.sh' >> ~/.bashrc" in setup,
        "dashboard": "--dashboard-host=127.0.0.1" in starts[0] and "0.0.0.0" not in everything,
        "no usage statistics": all("--disable-usage-stats" in line for line in starts),
        "autoscaling file": "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0],
        "same port": "--port=6379" in starts[0] and "--address=$RAY_HEAD_IP:6379" in starts[1],
        "pinned": "make .venv/installed" in setup
        and "--no-deps -r deploy/cluster.lock" in setup
        and not re.search(r"pip install(?! --quiet --no-deps -r )|nightly|releases/latest", setup)
        and config.get("head_setup_commands") == config.get("worker_setup_commands") == [],
        "lock shipped": mounts.get("~/bert-encoding/requirements.lock") == "requirements.lock",
        "sources exist": all((ROOT / local).exists() for name, local in mounts.items() if name != TOKEN),
        "no results or environments shipped": not {".", "results", ".venv"} & set(mounts.values()),
        "idle": 0 < config.get("idle_timeout_minutes", 0) <= 30,
    }
    return {name for name, holds in checks.items() if not holds} | (
        _aws_problems(config) if config["provider"]["type"] == "aws" else set()
    )


def _aws_problems(config: dict[str, Any]) -> set[str]:
    types, provider = config["available_node_types"], config["provider"]
    head, workers = types[config["head_node_type"]], [t for n, t in types.items() if n != config["head_node_type"]]
    nodes = {name: known["node_config"] for name, known in types.items()}
    disks = [node.get("BlockDeviceMappings", [{}])[0].get("Ebs", {}) for node in nodes.values()]
    checks = {
        "no stopped nodes": provider.get("cache_stopped_nodes") is False,
        "SSH from anywhere": "security_group" not in provider
        and all(node.get("SecurityGroupIds") for node in nodes.values()),
        "image": all(node.get("ImageId", "").startswith("ami-") for node in nodes.values())
        and len({node.get("ImageId") for node in nodes.values()}) == 1,
        "head on demand": "InstanceMarketOptions" not in head["node_config"],
        "head runs no trial": head["resources"] == {"CPU": 0}
        and head.get("max_workers") == 0
        and "--num-cpus=0" in config["head_start_ray_commands"][-1],
        "head ends": head["node_config"].get("InstanceInitiatedShutdownBehavior") == "terminate",
        "spot workers": all(
            worker["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"} for worker in workers
        ),
        "workers from none": all(
            worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"] for worker in workers
        ),
        "workers have GPUs": all(worker["resources"].get("GPU", 0) >= 1 for worker in workers),
        "roles": {name: node.get("IamInstanceProfile") for name, node in nodes.items()}
        == {name: {"Name": f"bert-encoding-{'head' if name == 'head' else 'worker'}"} for name in nodes},
        "metadata": all(node.get("MetadataOptions", {}).get("HttpTokens") == "required" for node in nodes.values()),
        "no questions": all("DEBIAN_FRONTEND=noninteractive" in line for line in _installing(config)),
        "disks": all(disk.get("Encrypted") is True and disk.get("DeleteOnTermination") is True for disk in disks),
    }
    return {name for name, holds in checks.items() if not holds}


def _installing(config: dict[str, Any]) -> list[str]:
    return [line for line in config.get("setup_commands", []) if re.search(r"apt-get .*install", line)]


def _ray_accepts(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.name)
def test_ray_and_we_accept_the_cluster_files(file: Path) -> None:
    config = _read(file)
    prepared = _ray_accepts(config)
    assert problems(config) == set()
    for name in (*START, "setup_commands"):
        assert prepared[name] == config[name], "Ray's defaults would add to it"


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.name)
def test_ray_refuses_what_it_does_not_know(file: Path) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        _ray_accepts(_read(file) | {"max_wrokers": 3})


def _node(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config["available_node_types"][name]["node_config"]


def _swap(config: dict[str, Any], key: str, old: str, new: str) -> None:
    assert any(old in line for line in config[key])
    config[key] = [line.replace(old, new) for line in config[key]]


Break = Callable[[dict[str, Any]], object]
BROKEN: list[tuple[str, Break]] = [
    ("token shipped", lambda c: c["file_mounts"].pop(TOKEN)),
    ("token private", lambda c: _swap(c, "setup_commands", "chmod 600", "chmod 644")),
    ("token mode", lambda c: _swap(c, START[0], "export RAY_AUTH_MODE=token; ", "")),
    ("token mode", lambda c: _swap(c, START[1], "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")),
    ("environment", lambda c: _swap(c, START[1], ". ~/bert-encoding/deploy/env.sh; ", "")),
    ("dashboard", lambda c: _swap(c, START[0], "host=127.0.0.1", "host=0.0.0.0")),
    ("dashboard", lambda c: _swap(c, START[0], " --dashboard-host=127.0.0.1", "")),
    ("no usage statistics", lambda c: _swap(c, START[1], " --disable-usage-stats", "")),
    ("autoscaling file", lambda c: _swap(c, START[0], " --autoscaling-config=~/ray_bootstrap_config.yaml", "")),
    ("same port", lambda c: _swap(c, START[1], ":6379", ":6380")),
    ("pinned", lambda c: c["setup_commands"].append("pip install -U 'ray[default]'")),
    ("pinned", lambda c: c.pop("head_setup_commands")),
    ("lock shipped", lambda c: c["file_mounts"].pop("~/bert-encoding/requirements.lock")),
    ("sources exist", lambda c: c["file_mounts"].update({"~/x": "no-such-folder"})),
    ("no results or environments shipped", lambda c: c["file_mounts"].update({"~/all": "."})),
    ("idle", lambda c: c.pop("idle_timeout_minutes")),
    ("no stopped nodes", lambda c: c["provider"].pop("cache_stopped_nodes")),
    ("SSH from anywhere", lambda c: _node(c, "gpu").pop("SecurityGroupIds")),
    ("SSH from anywhere", lambda c: c["provider"].update(security_group={"GroupName": "x"})),
    ("image", lambda c: _node(c, "head").pop("ImageId")),
    ("image", lambda c: _node(c, "gpu").update(ImageId="ami-another")),
    ("head on demand", lambda c: _node(c, "head").update(InstanceMarketOptions={"MarketType": "spot"})),
    ("head runs no trial", lambda c: _swap(c, START[0], " --num-cpus=0", "")),
    ("head ends", lambda c: _node(c, "head").pop("InstanceInitiatedShutdownBehavior")),
    ("spot workers", lambda c: _node(c, "gpu").pop("InstanceMarketOptions")),
    ("workers from none", lambda c: c["available_node_types"]["gpu"].update(min_workers=1)),
    ("workers from none", lambda c: c["available_node_types"]["gpu"].update(max_workers=0)),
    ("workers have GPUs", lambda c: c["available_node_types"]["gpu"].update(resources={"CPU": 8})),
    ("roles", lambda c: _node(c, "gpu").pop("IamInstanceProfile")),
    ("metadata", lambda c: _node(c, "gpu").update(MetadataOptions={"HttpTokens": "optional"})),
    ("no questions", lambda c: _swap(c, "setup_commands", "DEBIAN_FRONTEND=noninteractive ", "")),
    ("disks", lambda c: _node(c, "gpu").pop("BlockDeviceMappings")),
]


@pytest.mark.parametrize(("problem", "harm"), BROKEN, ids=[f"{at}-{name}" for at, (name, _) in enumerate(BROKEN)])
def test_every_requirement_is_seen_when_it_is_broken(problem: str, harm: Break) -> None:
    config = copy.deepcopy(_read(AWS))
    harm(config)
    assert problems(config) == {problem}


def test_every_requirement_has_a_broken_variant() -> None:
    nothing = {"provider": {"type": "local"}}
    of_all = problems(nothing) - {"sources exist"}  # which nothing at all fulfils
    assert of_all <= {name for name, _ in BROKEN}
    assert len(of_all) >= 9


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.name)
def test_lines_to_edit_are_marked_and_unusable_until_edited(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    with_placeholder = [line for line in lines if re.search(r"[\w]-EDIT", line)]
    assert with_placeholder
    assert all("# EDIT" in line for line in with_placeholder)
    filled = aws_setup.fill(AWS.read_text(), "eu-central-1", "ami-1", "sg-1")
    assert not re.search(r"[\w]-EDIT", re.sub("#.*", "", filled))
    config = yaml.safe_load(filled)
    assert config["provider"]["region"] == "eu-central-1"
    assert {node["node_config"]["ImageId"] for node in config["available_node_types"].values()} == {"ami-1"}
    assert {*map(str, (n["node_config"]["SecurityGroupIds"] for n in config["available_node_types"].values()))} == {
        "['sg-1']"
    }


def test_locks_are_exact_and_agree() -> None:
    def pins(file: Path) -> dict[str, str]:
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in lines)
        return dict(line.split("==") for line in lines)  # type: ignore[misc]

    base, more = pins(ROOT / "requirements.lock"), pins(DEPLOY / "cluster.lock")
    assert {"boto3", "aiohttp", "prometheus-client"} <= set(base) | set(more)
    assert not set(base) & set(more), "what both pinned would be installed twice, perhaps in two versions"
    for name, extra in (("ray", "default"), ("boto3", ""), ("google-auth", "")):
        pinned = {canonicalize_name(one) for one in (*base, *more)}
        assert _needed(name, extra) <= pinned | {"torch"}


def _needed(name: str, extra: str) -> set[str]:
    """Return what a package says it needs here; nothing of one that is not installed."""
    try:
        requirements = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return set()
    return {
        canonicalize_name(one.name)
        for one in requirements
        if one.marker is None or one.marker.evaluate({"extra": extra})
    }


# --- shell ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra 'dev'); bash -n passed")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def _environment_after(home: Path, path: str) -> dict[str, str]:
    text = (DEPLOY / "env.sh").read_text().replace("/tmp/bert-encoding-", path)
    script = f"{text}\nenv -0"
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)


def test_environment_of_a_node(tmp_path: Path) -> None:
    for _ in range(2):  # it is read many times
        variables = _environment_after(tmp_path, f"{tmp_path}/ours-")
        assert variables["RAY_AUTH_MODE"] == "token"
        assert "OMP_NUM_THREADS" not in variables, "ray up sets 1 for all"
        assert variables["PATH"].startswith(f"{tmp_path}/bert-encoding/.venv/bin:")
        assert variables["RAY_TMPDIR"].startswith(f"{tmp_path}/ours-")
        assert stat.S_IMODE(Path(variables["RAY_TMPDIR"]).stat().st_mode) == 0o700
    user = variables["RAY_TMPDIR"].removeprefix(f"{tmp_path}/ours-")
    (tmp_path / f"theirs-{user}").symlink_to(tmp_path)
    assert _environment_after(tmp_path, f"{tmp_path}/theirs-")["RAY_TMPDIR"] == "/nonexistent"


STUB = """
import json, os, signal, sys, time
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]  # this one is named study/run.py
from study.cluster.connect import connect
from study.cluster.machines import find_machines

at = sys.argv.index("--address")
machines = find_machines(sys.argv[at + 1])
with connect(machines):
    import ray

    @ray.remote
    def where():
        return os.environ["RAY_AUTH_MODE"], os.environ.get("OMP_NUM_THREADS")

    seen = {"arguments": sys.argv[at + 2 :], "nodes": machines.nodes, "worker": ray.get(where.remote())}
    token, folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]), Path(os.environ["RAY_TMPDIR"])
    seen |= {"modes": [path.stat().st_mode & 0o777 for path in (token, token.parent, folder)]}
    seen |= {"folders": [str(token.parent), str(folder)]}
    Path("seen.new").write_text(json.dumps(seen))
    os.rename("seen.new", "seen.json")
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        sys.exit(130)
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
OWN_PROCESSES = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def slurm_project(tmp_path: Path) -> Path:
    """A project's folder with Slurm's srun and a study that are stubs; Ray is real."""
    project = tmp_path / "project"
    (project / "study").mkdir(parents=True)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / "study" / "run.py").write_text(STUB)
    (project / "deploy").symlink_to(DEPLOY)
    bin_folder = Path(sys.executable).parent
    for name, text in {
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "ray": f'#!/bin/sh\nexec {bin_folder / "ray"} "$@"\n',
        "srun": SRUN,
    }.items():
        file = project / ".venv" / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    return project


@pytest.fixture
def job_id() -> Iterator[str]:
    number = str(10_000_000 + os.getpid())
    yield number
    shutil.rmtree(f"/tmp/bert-encoding-{number}", ignore_errors=True)


def _job(project: Path, number: str) -> dict[str, str]:
    return {
        "PATH": f"{project / '.venv' / 'bin'}:{os.environ['PATH']}",
        "HOME": str(project),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }


@pytest.mark.slow
@pytest.mark.ray
def test_slurm_job_runs_and_ends_before_its_time_is_up(slurm_project: Path, job_id: str) -> None:
    probe = subprocess.run([*OWN_PROCESSES, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no process namespace of our own here ({probe.stderr.strip()}); symmetric-run ends Ray by name")
    command = [*OWN_PROCESSES, "bash", str(DEPLOY / "slurm.sbatch"), "--trials", "4", "--name", "a b"]
    with (slurm_project / "log").open("w") as log:
        job = subprocess.Popen(command, env=_job(slurm_project, job_id), stdout=log, stderr=log)
    try:
        seen_file = slurm_project / "seen.json"
        _wait_for(lambda: seen_file.exists() or job.poll() is not None)
        assert seen_file.exists(), (slurm_project / "log").read_text()
        seen = json.loads(seen_file.read_text())
        (script,) = psutil.Process(job.pid).children()
        script.terminate()  # as Slurm warns it, two minutes before the limit
        assert job.wait(timeout=120) == 130, (slurm_project / "log").read_text()
    finally:
        job.kill()
    assert seen["arguments"] == ["--trials", "4", "--name", "a b"]
    assert seen["nodes"] == [[2, 0]]
    assert seen["worker"] == ["token", "1"]  # Ray's own count, a CPU a task; not what the job inherited
    assert seen["modes"] == [0o600, 0o700, 0o700]
    assert not any(Path(folder).exists() for folder in seen["folders"]), "token and sockets are removed"


def test_slurm_job_refuses_another_folder(tmp_path: Path) -> None:
    done = subprocess.run(["bash", DEPLOY / "slurm.sbatch"], env=_job(tmp_path, "1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: submit from the project's folder, after 'make .venv/installed'\n"


def test_slurm_asks_for_what_a_trial_needs() -> None:
    asked = dict(re.findall(r"^#SBATCH --(\S+?)=(\S+)$", (DEPLOY / "slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["gres"] == "gpu:1"
    assert asked["mem"] == "32G"
    assert asked["nodes"] == asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:TERM@120"


def _wait_for(condition: Callable[[], bool], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# --- AWS ---


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0", "10.0.0.0/8", "203.0.113.7/24", "home"])
def test_ssh_is_not_opened_to_many(network: str) -> None:
    with pytest.raises(aws_setup.InputError, match="--ssh-from"):
        aws_setup.check_network(network)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A pretended AWS account, its image of the day included."""
    moto = pytest.importorskip("moto", reason="moto plays AWS (extra 'test')")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the SSH key there
    with moto.mock_aws():
        session = boto3.Session(region_name="eu-central-1")
        image = session.client("ec2").describe_images()["Images"][0]["ImageId"]
        session.client("iam").create_role(RoleName=aws_setup.SPOT_ROLE, AssumeRolePolicyDocument="{}")
        monkeypatch.setattr(aws_setup, "find_image", lambda ssm: image)  # moto has no such parameter
        yield session


def _setup(tmp_path: Path, ssh_from: str = "203.0.113.7/32") -> dict[str, Any]:
    file = tmp_path / "my-cluster.yaml"
    aws_setup.main(region="eu-central-1", bucket="some-results", ssh_from=ssh_from, write=file)
    return yaml.safe_load(file.read_text())


def _rules(session: Any, group: str) -> list[Any]:
    (described,) = session.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    return sorted(
        (
            rule["IpProtocol"],
            rule.get("FromPort"),
            [r["CidrIp"] for r in rule["IpRanges"]],
            len(rule["UserIdGroupPairs"]),
        )
        for rule in described["IpPermissions"]
    )


@pytest.mark.slow
def test_aws_setup_makes_what_the_cluster_needs(aws: Any, tmp_path: Path) -> None:
    _setup(tmp_path, "198.51.100.0/24")
    config = _setup(tmp_path)  # again, from another place
    assert problems(config) == set()
    (group,) = config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    assert _rules(aws, group) == [("-1", None, [], 1), ("tcp", 22, ["203.0.113.7/32"], 0)]
    closed = aws.client("s3").get_public_access_block(Bucket="some-results")["PublicAccessBlockConfiguration"]
    assert all(closed.values())
    iam = aws.client("iam")
    allowed = {
        role: iam.get_role_policy(RoleName=role, PolicyName=role)["PolicyDocument"]["Statement"]
        for role in ("bert-encoding-head", "bert-encoding-worker")
    }
    resources = {role: {statement["Resource"] for statement in policy} for role, policy in allowed.items()}
    bucket = {"arn:aws:s3:::some-results", "arn:aws:s3:::some-results/*"}
    worker = iam.get_role(RoleName="bert-encoding-worker")["Role"]["Arn"]
    machines = "arn:aws:ec2:*:*:instance/*"
    assert resources == {"bert-encoding-worker": bucket, "bert-encoding-head": bucket | {"*", worker, machines}}
    by_action = {
        (action, json.dumps(statement.get("Condition")))
        for statement in allowed["bert-encoding-head"]
        for action in statement["Action"]
        if not action.startswith(("s3:", "ec2:Describe", "iam:"))
    }
    of_ray, as_started = json.dumps(aws_setup.OF_RAY), json.dumps(aws_setup.AS_STARTED)
    assert by_action == {
        ("ec2:RunInstances", "null"),
        ("ec2:TerminateInstances", of_ray),
        ("ec2:CreateTags", of_ray),
        ("ec2:CreateTags", as_started),
    }, "it may neither end nor claim machines that are not Ray's"
    (hands_on,) = [s["Action"] for s in allowed["bert-encoding-head"] if s["Resource"] == worker]
    assert hands_on == ["iam:PassRole"]


@pytest.mark.slow
def test_ray_starts_head_and_spot_workers_on_aws(aws: Any, tmp_path: Path) -> None:
    """What Ray makes of the file: no rule of its own, our roles, spot where we said."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    prepared = bootstrap_aws(_ray_accepts(_setup(tmp_path)))
    (group,) = prepared["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    assert _rules(aws, group) == [("-1", None, [], 1), ("tcp", 22, ["203.0.113.7/32"], 0)]
    provider = AWSNodeProvider(prepared["provider"], prepared["cluster_name"])
    tags = {"ray-node-type": "x", "ray-launch-config": "y", "ray-node-name": "z", "ray-user-node-type": "x"}
    lifecycles, profiles = {}, {}
    for name, known in prepared["available_node_types"].items():
        provider.create_node(known["node_config"], dict(tags), 1)
        (made,) = [
            instance
            for page in aws.client("ec2").describe_instances()["Reservations"]
            for instance in page["Instances"]
            if instance["InstanceType"] == known["node_config"]["InstanceType"]
        ]
        lifecycles[name] = made.get("InstanceLifecycle")
        profiles[name] = made["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert [kept["GroupId"] for kept in made["SecurityGroups"]] == [group]
    assert lifecycles == {"head": None, "gpu": "spot"}
    assert profiles == {"head": "bert-encoding-head", "gpu": "bert-encoding-worker"}
