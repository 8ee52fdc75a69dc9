"""Who may talk to the Ray of a study on one machine: every port that is open beyond loopback asks for the token."""

import http.client
import ipaddress
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from pretend import begin, wait_for
from stub_study import WAITING, WAITS_ONCE

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


METHODS = {
    "gcs_server": "NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "NodeManagerService/GetNodeStats",
    "raylet's objects": "ObjectManagerService/Pull",
    "worker or driver": "CoreWorkerService/GetCoreWorkerStats",
}
OK, UNIMPLEMENTED, UNAUTHENTICATED = "0", "12", "16"  # https://grpc.io/docs/guides/status-codes
SILENT = "no answer yet"  # of a worker that is busy: it lets the call in
WRONG = "ab" * 32


@pytest.fixture
def study(tmp_path: Path, private_tmp: Path) -> Iterator[subprocess.Popen]:
    """A study on this machine at work: one of its trials waits."""
    driver = begin(tmp_path / "s", private_tmp, [WAITS_ONCE])
    try:
        wait_for((tmp_path / "s" / WAITING).exists, driver)
        yield driver
    finally:
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=300)


def test_every_open_port_refuses_who_has_no_token(study: subprocess.Popen, private_tmp: Path) -> None:
    (file,) = private_tmp.glob("bert-encoding-*/auth_token")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.stat().st_uid == os.getuid()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    token, names, answered = file.read_text(), set(), set()
    assert len(token) == 64
    for process, host, port in open_ports(study.pid):
        names.add(process.name().split(":")[0])
        where = f"{process.name()} at {host}:{port}"
        without = {name: call(host, port, method, None) for name, method in METHODS.items()}
        if without == dict.fromkeys(METHODS):  # no gRPC
            assert [get(host, port, given) for given in (None, WRONG)] == [401, 403], where
            assert get(host, port, token) not in (401, 403), where
            continue
        (service,) = (name for name, status in without.items() if status != UNIMPLEMENTED)
        assert without[service] == UNAUTHENTICATED, where
        assert call(host, port, METHODS[service], WRONG) == UNAUTHENTICATED, where
        status = call(host, port, METHODS[service], token, patience_s=4)
        assert status in (OK, SILENT), f"{where}: the token opens"
        answered |= {service} if status == OK else set()
    assert answered == set(METHODS), "every kind of Ray's services was found and asked"
    assert {"gcs_server", "raylet", "ray"} <= names
    assert not [name for name in names if "dashboard" in name.lower()]


def open_ports(driver: int) -> list[tuple[psutil.Process, str, int]]:
    """Return what the processes of a study listen at beyond loopback: process, where to reach it, port."""
    ports = []
    first = psutil.Process(driver)
    for process in [first, *first.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                host = "127.0.0.1" if address.is_unspecified else str(address)
                if not address.is_loopback:
                    ports.append((process, host, connection.laddr.port))
    return ports


def call(host: str, port: int, method: str, token: str | None, patience_s: float = 20) -> str | None:
    """Call a gRPC method with an empty message and return the status of the answer, None if it is no gRPC.

    Ray ships its own client, which always has a token when the server wants one; this is plain HTTP/2.
    """
    headers = {":method": "POST", ":scheme": "http", ":path": f"/ray.rpc.{method}", ":authority": f"{host}:{port}"}
    headers |= {"content-type": "application/grpc", "te": "trailers"}
    headers |= {"authorization": f"Bearer {token}"} if token else {}
    http = H2Connection()
    http.initiate_connection()
    http.send_headers(1, list(headers.items()))
    http.send_data(1, b"\0\0\0\0\0", end_stream=True)
    with socket.create_connection((host, port), timeout=patience_s) as connection, suppress(ProtocolError):
        connection.sendall(http.data_to_send())
        try:
            while got := connection.recv(65536):
                for event in http.receive_data(got):
                    if status := dict(getattr(event, "headers", None) or ()).get(b"grpc-status"):
                        return status.decode()
        except TimeoutError:
            return SILENT
    return None


def get(host: str, port: int, token: str | None) -> int:
    """Return the status of an HTTP request."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with closing(http.client.HTTPConnection(host, port, timeout=20)) as connection:
        connection.request("POST", "/get_or_create_runtime_env", b"", headers)
        with connection.getresponse() as answer:
            return answer.status
