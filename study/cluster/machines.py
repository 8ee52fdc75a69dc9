"""Where trials could run: the cluster that is named, one that runs on this node, or this machine; and what it has."""

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bert_encoding.core.errors import InputError

LOCAL, AUTO = "local", "auto"
ADDRESS_VARIABLE, MODE_VARIABLE = "RAY_ADDRESS", "RAY_AUTH_MODE"
TOKEN_VARIABLE, TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # names, no secrets
TIMEOUT_S = 10.0
ALIVE = 0  # of ray's GcsNodeInfo.state


class Node(NamedTuple):
    """What one machine offers."""

    n_cpus: int
    n_gpus: int


class Machines(NamedTuple):
    """Where trials will run.

    Attributes
    ----------
    address : ``host:port`` of a cluster's head; None for a Ray of our own on this machine
    found : how it was chosen
    nodes : the machines there are now
    can_add : the machines that an autoscaler could add; None where that is not known
    notes : what the user should know
    """

    address: str | None
    found: str
    nodes: tuple[Node, ...]
    can_add: tuple[Node, ...] | None = ()
    notes: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.address is None

    @property
    def largest(self) -> Node:
        """The machine with the most GPUs, then CPUs, of those there are or could be."""
        return max((*self.nodes, *(self.can_add or ())), key=_size)

    def at_once(self, cpus_per_trial: float, gpus_per_trial: float) -> int:
        """Return how many trials fit at once, machines that could be added included."""
        everything = (*self.nodes, *(self.can_add or ()))
        return sum(_n_fitting(node, cpus_per_trial, gpus_per_trial) for node in everything)


def this_machine(found: str = f"no cluster named (--address, {ADDRESS_VARIABLE}) or found here") -> Machines:
    """Return this machine alone."""
    return Machines(None, found, (Node(machine_cpus(), machine_gpus()),))


def machine_cpus() -> int:
    """Return the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_gpus() -> int:
    """Return the GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def find_machines(address: str | None = None) -> Machines:
    """Return where trials run: at ``address``, else at RAY_ADDRESS, else in a cluster on this node, else here.

    Parameters
    ----------
    address : ``host:port``, ``auto`` (a cluster on this node) or ``local`` (this machine)

    Raises
    ------
    InputError
        if the cluster does not answer, or refuses us.
    """
    named, by = (address, "--address") if address else (os.environ.get(ADDRESS_VARIABLE) or None, ADDRESS_VARIABLE)
    if named == LOCAL:
        return this_machine(by)
    if named not in (None, AUTO):
        assert named is not None
        return _survey(_checked(named, by), by)
    here = _cluster_on_this_node()
    if here is not None:
        try:
            return _survey(here, "it runs on this node")
        except InputError as error:  # nobody named it
            raise InputError(f"{error}; or run on this machine alone with --address {LOCAL}") from None
    if named == AUTO:
        raise InputError(f"{by} {AUTO}: no Ray cluster of yours runs on this node; start one, or give its HOST:PORT")
    return this_machine()


def describe_machines(machines: Machines) -> str:
    """Return a line that says where trials run, and why there."""
    if machines.is_local:
        return f"runs on: this machine ({_sizes(machines.nodes)}); {machines.found}"
    more = ", perhaps more on demand" if machines.can_add is None else ""
    if machines.can_add:
        more = f", {len(machines.can_add)} more on demand"
    nodes = f"{len(machines.nodes)} node" + "s" * (len(machines.nodes) != 1)
    return f"runs on: the cluster at {machines.address} ({machines.found}): {nodes}, {_sizes(machines.nodes)}{more}"


def check_fits(cpus_per_trial: float, gpus_per_trial: float, machines: Machines) -> list[str]:
    """Refuse a trial that could never start there; return a note where that is not known.

    Raises
    ------
    InputError
        if a trial asks for nothing, or for more than any machine has or could have.
    """
    largest = machines.largest
    what = "this machine has" if machines.is_local else "the largest machine of the cluster has"
    if not cpus_per_trial > 0:
        raise InputError(f"--cpus-per-trial {cpus_per_trial:g}: {what} {largest.n_cpus}")
    if not gpus_per_trial >= 0:
        raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: {what} {largest.n_gpus}")
    if gpus_per_trial > 1 and gpus_per_trial % 1:
        raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: above 1 it must be a whole number")
    if machines.at_once(cpus_per_trial, gpus_per_trial):
        return []
    for name, value, most in (
        ("cpus", cpus_per_trial, max(node.n_cpus for node in (*machines.nodes, *(machines.can_add or ())))),
        ("gpus", gpus_per_trial, largest.n_gpus),
    ):
        if value > most and machines.can_add is not None:
            raise InputError(f"--{name}-per-trial {value:g}: {what} {most}")
    asked = f"{cpus_per_trial:g} CPUs and {gpus_per_trial:g} GPUs"
    if machines.can_add is not None:
        raise InputError(f"--cpus-per-trial, --gpus-per-trial: no machine has {asked} together")
    return [f"no machine of the cluster has {asked} now; trials wait until an autoscaler adds one, if it can"]


def _n_fitting(node: Node, cpus: float, gpus: float) -> int:
    by_cpus = int(node.n_cpus / cpus) if cpus > 0 else 0
    if gpus <= 0:
        return by_cpus
    return min(by_cpus, node.n_gpus * int(1 / gpus) if gpus < 1 else int(node.n_gpus // gpus))


def _sizes(nodes: tuple[Node, ...]) -> str:
    n_cpus, n_gpus = sum(node.n_cpus for node in nodes), sum(node.n_gpus for node in nodes)
    return f"{n_cpus} CPUs, {n_gpus} GPUs"


def _checked(address: str, by: str) -> str:
    """Return an address that can be a cluster's head."""
    if "://" in address:
        raise InputError(
            f"{by} {address}: a Ray Client cannot run a study; run it on a node of the cluster (ray exec, ray submit) "
            "and give HOST:PORT, or nothing"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"{by} {address}: must be HOST:PORT, as in 10.0.0.5:6379, or 'auto' or 'local'")
    return address


def _cluster_on_this_node() -> str | None:
    """Return the address of the cluster that ``ray start`` last made or joined here as this very user.

    Ray keeps it in a folder that is open to everybody, so the file must be ours, and a raylet of ours must belong to
    that cluster: whoever else could bring us to his own would run code as us.
    """
    mine = {flags["gcs-address"] for flags in _own_ray_processes() if "gcs-address" in flags}
    if not mine:
        return None
    file = _address_file()
    try:
        about = file.lstat()
        address = file.read_text().strip()
    except OSError:
        return None
    is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()
    return address if is_ours and address in mine else None


def _address_file() -> Path:
    """Return where Ray keeps that address. Ray could tell, but decides once, when it is imported, whether it shows a
    token; a Ray of our own would then be started without."""
    temporary = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return Path(os.environ.get("RAY_TMPDIR") or temporary or "/tmp", "ray", "ray_current_cluster")


def _own_ray_processes() -> Iterator[dict[str, str]]:
    """Yield the flags (``--name=value``) of the processes of this user that have any which name a Ray cluster."""
    for process in psutil.process_iter(["cmdline", "uids"]):
        words = process.info["cmdline"] or []
        if process.info["uids"] is None or process.info["uids"].real != os.getuid():
            continue
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "gcs-address" in flags:
            yield flags


def _survey(address: str, found: str) -> Machines:
    """Ask a cluster what it has, without joining it.

    Raises
    ------
    InputError
        if nothing answers there, or it refuses our token.
    """
    notes = _authenticate(address)
    _check_reachable(address)
    from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import AuthenticationError, RayError

    Config.initialize("")  # reads the environment again, should Ray be imported already
    try:
        with _without_raw_lines():
            client = GcsClient(address=address)
        alive = [info for info in client.get_all_node_info(timeout=TIMEOUT_S).values() if info.state == ALIVE]
        can_add = _can_add(client, address, len(alive))
    except AuthenticationError:
        raise InputError(
            f"the cluster at {address} refuses our token: {_token_source()} must hold the cluster's own, as on its "
            "head node"
        ) from None
    except RayError as error:
        raise InputError(f"the cluster at {address}: {str(error).splitlines()[0]}") from None
    return Machines(address, found, tuple(_node(info.resources_total) for info in alive), can_add, notes)


@contextmanager
def _without_raw_lines() -> Iterator[None]:
    """Keep what Ray's C++ writes to standard error from standing beside our own line."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _authenticate(address: str) -> tuple[str, ...]:
    """Have Ray show a token, unless the user said that there is none; return what is unsafe.

    Raises
    ------
    InputError
        if no token can be found: Ray itself would abort the process.
    """
    if os.environ.setdefault(MODE_VARIABLE, "token").lower() != "token":
        return (f"{MODE_VARIABLE} is {os.environ[MODE_VARIABLE]}: whoever reaches {address} can run code there",)
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


def _token_source() -> str:
    return TOKEN_VARIABLE if os.environ.get(TOKEN_VARIABLE) else str(_token_file())


def _check_reachable(address: str) -> None:
    """Refuse at once where nothing listens: Ray would try for most of a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; is its head running?"
        ) from None


def _node(resources: Any) -> Node:
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _can_add(client: Any, address: str, n_nodes: int) -> tuple[Node, ...] | None:
    """Return the machines that an autoscaler could still add, None if that cannot be told from this node.

    Autoscaler v2 reports its node types to the cluster; v1 keeps them in the file that the monitor beside the head
    reads, so only a driver on the head node, which is where ``ray exec`` runs it, can know.
    """
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    key, namespace = GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    kept = client.internal_kv_get(key, namespace, timeout=TIMEOUT_S)
    if kept:
        groups = [(group.resources, group.max_count) for group in ClusterConfig.FromString(kept).node_group_configs]
        return _expand(groups, sum(count for _, count in groups) + 1 - n_nodes)
    for flags in _own_ray_processes():
        if "monitor-ip" in flags and flags["gcs-address"] == address:
            return _can_add_by_file(flags["autoscaling-config"], n_nodes) if "autoscaling-config" in flags else ()
    return None


def _can_add_by_file(file: str, n_nodes: int) -> tuple[Node, ...] | None:
    import yaml  # type: ignore[import-untyped]

    try:
        config = yaml.safe_load(Path(file).expanduser().read_text())
        types, head = config["available_node_types"], config["head_node_type"]
        most = int(config.get("max_workers", 0))
        groups = [
            (known["resources"], int(known.get("max_workers", most)))
            for name, known in types.items()
            if name != head or known.get("max_workers")
        ]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    if any(not resources for resources, _ in groups):
        return None  # sizes that only the cloud knows
    return _expand(groups, most + 1 - n_nodes)


def _expand(groups: list[tuple[Any, int]], n_more: int) -> tuple[Node, ...]:
    """Return the largest ``n_more`` machines of the groups, each (resources of one, how many)."""
    nodes = [_node(resources) for resources, count in groups for _ in range(count)]
    return tuple(sorted(nodes, key=_size, reverse=True)[: max(0, n_more)])


def _size(node: Node) -> tuple[int, int]:
    return node.n_gpus, node.n_cpus
