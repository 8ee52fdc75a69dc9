"""Who may talk to the Ray of a study on one machine: every port that is open beyond loopback asks for the token."""

import http.client
import ipaddress
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from pretend import begin, wait_for
from stub_study import WAITING, WAITS_ONCE
from study_process import environment_of, private_tmp

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

__all__ = ["private_tmp"]  # a fixture

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

    Ray ships its own client, which always has a token when the server wants one; this is HTTP/2 by hand (RFC 9113,
    RFC 7541): each header a literal that enters no table, and the answer searched for the status.
    """
    headers = {":method": "POST", ":scheme": "http", ":path": f"/ray.rpc.{method}", ":authority": f"{host}:{port}"}
    headers |= {"content-type": "application/grpc", "te": "trailers"}
    headers |= {"authorization": f"Bearer {token}"} if token else {}
    coded = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers.items())
    request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    request += _frame(1, 4, 1, coded) + _frame(0, 1, 1, b"\0\0\0\0\0")
    got, name = b"", b"grpc-status"
    with socket.create_connection((host, port), timeout=patience_s) as connection:
        connection.sendall(request)
        try:
            while not _is_whole(got.partition(name)[2]) and (more := connection.recv(65536)):
                got += more
        except TimeoutError:
            return SILENT
    value = got.partition(name)[2]
    return value[1 : 1 + value[0]].decode() if value else None


def _is_whole(value: bytes) -> bool:
    """Whether a text, which begins with its length, has come whole."""
    return len(value) > 1 and len(value) > value[0]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(text: str) -> bytes:
    """Code a text of less than 127 characters as HPACK does without Huffman's code."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def get(host: str, port: int, token: str | None) -> int:
    """Return the status of an HTTP request."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with closing(http.client.HTTPConnection(host, port, timeout=20)) as connection:
        connection.request("POST", "/get_or_create_runtime_env", b"", headers)
        with connection.getresponse() as answer:
            return answer.status


CLIENT = """
import json, os, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    print("joined")
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
"""


def test_rays_own_client_needs_the_token_too(study: subprocess.Popen, private_tmp: Path) -> None:
    (port,) = (port for process, _, port in open_ports(study.pid) if process.name() == "gcs_server")
    clean = {name: value for name, value in environment_of(private_tmp).items() if not name.startswith("RAY_")}
    (file,) = private_tmp.glob("bert-encoding-*/auth_token")
    answers = {}
    for token in ("", WRONG, file.read_text()):
        more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}"]
        done = subprocess.run(command, env=clean | more, capture_output=True, text=True, timeout=300)
        answers[token] = done.stdout.strip() or done.stderr
    assert answers.pop(file.read_text()) == "joined", json.dumps(answers)
    assert not [one for one in answers.values() if "joined" in one]
