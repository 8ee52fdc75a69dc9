"""Where trials run: a named cluster, a cluster on this node, or this machine; and the CPUs and GPUs there."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bert_encoding.core.errors import InputError
from study.wording import counted

LOCAL, AUTO = "local", "auto"
ADDRESS_VARIABLE, MODE_VARIABLE = "RAY_ADDRESS", "RAY_AUTH_MODE"
TOKEN_VARIABLE, TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # names, no secrets
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 60.0
FEW_RETRIES = {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # of a refused token; Ray's 20 take 20 s
LIST_NODES = """
import json, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    answer = [node["Resources"] for node in ray.nodes() if node["Alive"]]
except Exception as error:
    answer = str(error).strip() or type(error).__name__
print(json.dumps(answer))
"""


class Node(NamedTuple):
    """CPUs and GPUs of one machine."""

    n_cpus: int
    n_gpus: int


class Machines(NamedTuple):
    """Where trials will run."""

    address: str | None  # ``host:port`` of the cluster's head; None for a Ray of our own on this machine
    chosen_by: str  # why these machines were chosen
    nodes: tuple[Node, ...]  # the machines that run now
    can_add: tuple[Node, ...] | None = ()  # the machines that an autoscaler could add; None if unknown
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def is_local(self) -> bool:
        return self.address is None

    @property
    def possible(self) -> tuple[Node, ...]:
        """The machines that run now or could be added."""
        return (*self.nodes, *(self.can_add or ()))

    @property
    def largest(self) -> Node:
        """The possible machine with the most GPUs, then CPUs."""
        return max(self.possible, key=_size)

    def at_once(self, cpus_per_trial: float, gpus_per_trial: float) -> int:
        """Return how many trials fit at once on the possible machines."""
        return sum(_n_fitting(node, cpus_per_trial, gpus_per_trial) for node in self.possible)


def this_machine(chosen_by: str = f"no cluster named (--address, {ADDRESS_VARIABLE}) or found here") -> Machines:
    """Return this machine alone."""
    return Machines(None, chosen_by, (Node(machine_cpus(), machine_gpus()),))


def machine_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def find_machines(address: str | None = None) -> Machines:
    """Return where trials run: at ``address``, else at RAY_ADDRESS, else in a cluster on this node, else here.

    An address is ``host:port``, ``auto`` (a cluster on this node) or ``local`` (this machine). Raises InputError if the
    cluster does not answer, cannot be joined from this machine, or refuses our token.
    """
    requested = address or os.environ.get(ADDRESS_VARIABLE)
    source = "--address" if address else ADDRESS_VARIABLE
    if requested == LOCAL:
        return this_machine(source)
    if requested and requested != AUTO:
        _check_address(requested, source)
        return _survey(requested, source)
    on_this_node = _cluster_on_this_node()
    if on_this_node is not None:
        try:
            return _survey(on_this_node, "it runs on this node")
        except InputError as error:  # the user did not name it
            raise InputError(f"{error}; or run on this machine alone with --address {LOCAL}") from None
    if requested == AUTO:
        raise InputError(f"{source} {AUTO}: no Ray cluster of yours runs on this node; start one, or give HOST:PORT")
    return this_machine()


def describe_machines(machines: Machines) -> str:
    """Return one line: where trials run, and why there."""
    n_cpus = sum(node.n_cpus for node in machines.nodes)
    n_gpus = sum(node.n_gpus for node in machines.nodes)
    if machines.is_local:
        return f"runs on: this machine ({n_cpus} CPUs, {n_gpus} GPUs); {machines.chosen_by}"
    more = ", perhaps more on demand (known on the head node only)" if machines.can_add is None else ""
    if machines.can_add:
        more = f", {len(machines.can_add)} more on demand"
    nodes = f"{counted(len(machines.nodes), 'node')}, {n_cpus} CPUs, {n_gpus} GPUs"
    return f"runs on: the cluster at {machines.address} ({machines.chosen_by}): {nodes}{more}"


def check_fits(cpus_per_trial: float, gpus_per_trial: float, machines: Machines) -> list[str]:
    """Refuse a trial that could never start on these machines; return a note if that is unknown."""
    owner = "this machine has" if machines.is_local else "the largest machine of the cluster has"
    most_cpus, most_gpus = max(node.n_cpus for node in machines.possible), machines.largest.n_gpus
    too_many_cpus, too_many_gpus = (
        f"--{name}-per-trial {value:g}: {owner} {most}"
        for name, value, most in (("cpus", cpus_per_trial, most_cpus), ("gpus", gpus_per_trial, most_gpus))
    )
    if not cpus_per_trial > 0:
        raise InputError(too_many_cpus)
    if not gpus_per_trial >= 0:
        raise InputError(too_many_gpus)
    if gpus_per_trial > 1 and gpus_per_trial % 1:
        raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: above 1 it must be a whole number")
    if machines.at_once(cpus_per_trial, gpus_per_trial):
        return []
    requested = f"{cpus_per_trial:g} CPUs and {gpus_per_trial:g} GPUs"
    if machines.can_add is None:
        return [f"no machine of the cluster has {requested} now; trials wait until an autoscaler adds one, if it can"]
    if cpus_per_trial > most_cpus:
        raise InputError(too_many_cpus)
    if gpus_per_trial > most_gpus:
        raise InputError(too_many_gpus)
    raise InputError(f"--cpus-per-trial, --gpus-per-trial: no machine has {requested} together")


def cannot_join(address: str, reason: str) -> InputError:
    """Return the error for a cluster that Ray cannot join from this machine."""
    return InputError(
        f"the cluster at {address} cannot be joined from this machine: {reason}; a study runs on a node of the "
        "cluster, with the same versions of Python and Ray"
    )


def _n_fitting(node: Node, cpus: float, gpus: float) -> int:
    by_cpus = int(node.n_cpus / cpus) if cpus > 0 else 0
    if gpus <= 0:
        return by_cpus
    return min(by_cpus, node.n_gpus * int(1 / gpus) if gpus < 1 else int(node.n_gpus // gpus))


def _check_address(address: str, source: str) -> None:
    if "://" in address:
        raise InputError(
            f"{source} {address}: a Ray Client cannot run a study; run it on a node of the cluster (ray exec, ray "
            "submit) and give HOST:PORT or leave the option out"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"{source} {address}: must be HOST:PORT, as in 10.0.0.5:6379, or 'auto' or 'local'")


def _cluster_on_this_node() -> str | None:
    """Return the address of the cluster that ``ray start`` last made or joined here as this user.

    Ray writes it into a folder that every user may write to, so the file must be ours, and a Ray process of ours must
    belong to that cluster: joining another user's cluster would run that user's code as us.
    """
    own_addresses = {flags["gcs-address"] for flags in _own_ray_processes()}
    temporary = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    file = Path(os.environ.get("RAY_TMPDIR") or temporary or "/tmp", "ray", "ray_current_cluster")
    try:
        status = file.lstat()
        address = file.read_text().strip()
    except OSError:
        return None
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
    return address if is_ours and address in own_addresses else None


def _own_ray_processes() -> Iterator[dict[str, str]]:
    """Yield the flags (``--name=value``) of this user's processes that belong to a Ray cluster."""
    for process in psutil.process_iter(["cmdline", "uids"]):
        if process.info["uids"] is None or process.info["uids"].real != os.getuid():
            continue
        words = process.info["cmdline"] or []
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "gcs-address" in flags:
            yield flags


def _survey(address: str, chosen_by: str) -> Machines:
    """Join a cluster for a moment and ask for its nodes.

    A process of its own does it: where Ray cannot join, it tries for minutes and writes to standard error.
    """
    notes = _authenticate(address)
    _check_reachable(address)
    command = [sys.executable, "-P", "-c", LIST_NODES, address]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | FEW_RETRIES}
    try:
        ended = subprocess.run(command, timeout=ANSWER_TIMEOUT_S, **options)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"no Ray cluster answers at {address} within {ANSWER_TIMEOUT_S:g} s; is its head running?"
        ) from None
    answer = json.loads(ended.stdout) if ended.stdout else f"Ray ended with code {ended.returncode}"
    if isinstance(answer, str):
        if "InvalidAuthToken" in ended.stderr:
            source = TOKEN_VARIABLE if os.environ.get(TOKEN_VARIABLE) else _token_file()
            raise InputError(
                f"the cluster at {address} refuses our token: {source} must hold the cluster's own, as on its head node"
            )
        raise cannot_join(address, answer.splitlines()[0])
    nodes = tuple(_node(resources) for resources in answer)
    return Machines(address, chosen_by, nodes, _can_add(address, len(nodes)), notes)


def _authenticate(address: str) -> tuple[str, ...]:
    """Have Ray show a token, without which it would abort, unless the user turned that off; return what is unsafe."""
    if os.environ.setdefault(MODE_VARIABLE, "token").lower() != "token":
        return (f"{MODE_VARIABLE} is {os.environ[MODE_VARIABLE]}: anyone who reaches {address} can run code there",)
    if os.environ.get(TOKEN_VARIABLE):
        return ()
    file = _token_file()
    if not file.is_file() or not os.access(file, os.R_OK) or not file.read_bytes().strip():
        raise InputError(
            f"the cluster at {address} needs a token: {file} cannot be read or is empty; copy the head node's "
            f"~/.ray/auth_token there (chmod 600), or name another file in {TOKEN_PATH_VARIABLE}"
        )
    is_open = file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return (f"others may read the token {file}: chmod 600 {file}",) if is_open else ()


def _token_file() -> Path:
    return Path(os.environ.get(TOKEN_PATH_VARIABLE) or "~/.ray/auth_token").expanduser()


def _check_reachable(address: str) -> None:
    """Refuse at once where nothing listens: Ray would try for most of a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; is its head running?"
        ) from None


def _node(resources: dict[str, float]) -> Node:
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _can_add(address: str, n_nodes: int) -> tuple[Node, ...] | None:
    """Return the machines that an autoscaler could still add; None if this is not the head node, which alone knows.

    The autoscaler reads its cluster file on the head node, which is where ``ray exec`` runs a study.
    """
    for flags in _own_ray_processes():
        if "monitor-ip" in flags and flags["gcs-address"] == address:
            return _read_cluster_file(flags["autoscaling-config"], n_nodes) if "autoscaling-config" in flags else ()
    return None


def _read_cluster_file(file: str, n_nodes: int) -> tuple[Node, ...] | None:
    """Return the largest machines that a cluster file allows beyond ``n_nodes``; None if their sizes are not in it."""
    import yaml  # type: ignore[import-untyped]

    try:
        config = yaml.safe_load(Path(file).expanduser().read_text())
        types, head = config["available_node_types"], config["head_node_type"]
        n_workers = int(config.get("max_workers", 0))
        groups = [
            (node_type["resources"], int(node_type.get("max_workers", n_workers)))
            for name, node_type in types.items()
            if name != head or node_type.get("max_workers")
        ]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    if any(not resources for resources, _ in groups):
        return None  # the cloud alone knows the sizes
    nodes = [_node(resources) for resources, count in groups for _ in range(count)]
    return tuple(sorted(nodes, key=_size, reverse=True)[: max(0, n_workers + 1 - n_nodes)])


def _size(node: Node) -> tuple[int, int]:
    return node.n_gpus, node.n_cpus
