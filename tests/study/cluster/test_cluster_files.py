"""cluster.yaml and its sisters: Ray's own check, ours, AWS as moto plays it, and the Slurm script run for real."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pretend import wait_for
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


def check_cluster(config: dict[str, Any]) -> None:
    """Assert what a cluster file must do beyond what Ray checks itself."""
    mounts, setup = config["file_mounts"], " ; ".join(config["setup_commands"])
    head, worker = (" ; ".join(config[name]) for name in START)
    # every connection needs the token, which only its owner can read
    assert mounts[TOKEN] == TOKEN
    assert "chmod 600 ~/.ray/auth_token" in setup
    for start in (head, worker):
        assert "export RAY_AUTH_MODE=token; ray start" in start
        assert start.count(". ~/bert-encoding/deploy/env.sh; ") == 2
        assert "--disable-usage-stats" in start
    assert "bert-encoding/deploy/env.sh' >> ~/.bashrc" in setup
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in json.dumps(config)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--port=6379" in head and "--address=$RAY_HEAD_IP:6379" in worker
    # the same packages everywhere
    assert "make .venv/installed" in setup and "--no-deps -r deploy/cluster.lock" in setup
    assert not re.search(r"pip install(?! --quiet --no-deps -r )|nightly|releases/latest", setup)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert mounts["~/bert-encoding/requirements.lock"] == "requirements.lock"
    assert all((ROOT / local).exists() for name, local in mounts.items() if name != TOKEN)
    assert not {".", "results", ".venv"} & set(mounts.values())
    assert 0 < config["idle_timeout_minutes"] <= 30
    if config["provider"]["type"] == "aws":
        _check_aws(config)


def _check_aws(config: dict[str, Any]) -> None:
    types, provider = config["available_node_types"], config["provider"]
    head, workers = types[config["head_node_type"]], [t for n, t in types.items() if n != config["head_node_type"]]
    assert provider["cache_stopped_nodes"] is False
    assert "security_group" not in provider, "Ray would open SSH to everyone"
    for name, node in ((name, known["node_config"]) for name, known in types.items()):
        assert node["SecurityGroupIds"]
        assert node["ImageId"].startswith("ami-") and node["ImageId"] == head["node_config"]["ImageId"]
        role = "bert-encoding-head" if name == "head" else "bert-encoding-worker"
        assert node["IamInstanceProfile"] == {"Name": role}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        disk = node["BlockDeviceMappings"][0]["Ebs"]
        assert (disk["Encrypted"], disk["DeleteOnTermination"]) == (True, True)
    assert "InstanceMarketOptions" not in head["node_config"], "the head is no spot instance"
    assert head["node_config"]["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0), "no trial runs on the head"
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    for worker in workers:
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1
    installing = [line for line in config["setup_commands"] if re.search(r"apt-get .*install", line)]
    assert all("DEBIAN_FRONTEND=noninteractive" in line for line in installing)


def _ray_accepts(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.name)
def test_ray_and_we_accept_the_cluster_files(file: Path) -> None:
    config = _read(file)
    prepared = _ray_accepts(config)
    check_cluster(config)
    for name in (*START, "setup_commands"):
        assert prepared[name] == config[name], "Ray's defaults would add to it"
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        _ray_accepts(config | {"max_wrokers": 3})


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
    nodes = [known["node_config"] for known in config["available_node_types"].values()]
    assert [(node["ImageId"], node["SecurityGroupIds"]) for node in nodes] == [("ami-1", ["sg-1"])] * len(nodes)


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
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {canonicalize_name(one.name) for one in needed}


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
        wait_for(seen_file.exists, job)
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


def test_slurm_asks_for_what_a_trial_needs() -> None:
    header = dict(re.findall(r"^#SBATCH --(\S+?)=(\S+)$", (DEPLOY / "slurm.sbatch").read_text(), re.MULTILINE))
    assert {"gres": "gpu:1", "mem": "32G", "nodes": "1", "signal": "B:TERM@120"}.items() <= header.items()


def test_slurm_job_refuses_another_folder(tmp_path: Path) -> None:
    done = subprocess.run(["bash", DEPLOY / "slurm.sbatch"], env=_job(tmp_path, "1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: submit from the project's folder, after 'make .venv/installed'\n"


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
    check_cluster(config)
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
