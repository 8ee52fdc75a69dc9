"""Downloads from a server that misbehaves: right content or none, nothing downloaded twice, one clear line."""

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import (
    Act,
    FaultyServer,
    Handler,
    another_file,
    answer,
    corrupt,
    cut,
    drop,
    hang,
    ignore_range,
    misplaced,
    serve,
    unbounded,
)
from project import ROOT
from rich.console import Console
from study_process import with_ctrl_c
from urllib3.exceptions import ProtocolError

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching import download as download_module
from bert_encoding.datasets.fetching import http_client, progress
from bert_encoding.datasets.fetching.download import RemoteFile, download
from bert_encoding.datasets.fetching.threads import map_in_threads

pytestmark = pytest.mark.slow

N = 10_000  # bytes of the first file


def content(n_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(n_bytes)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as faulty:
        faulty.files = {"a.bin": content(N, 0), "b.bin": content(3000, 1), "empty.bin": b""}
        yield faulty


def remote_files(server: FaultyServer, folder: Path, algorithm: str = "md5") -> list[RemoteFile]:
    return [
        RemoteFile(
            server.url + name, folder / "in" / name, len(body), algorithm, hashlib.new(algorithm, body).hexdigest()
        )
        for name, body in server.files.items()
    ]


def run(server: FaultyServer, folder: Path, n_at_once: int = 2, algorithm: str = "md5") -> int:
    with http_client.Client(n_at_once) as client:
        return download(client, remote_files(server, folder, algorithm), folder, Console(file=io.StringIO()))


def assert_complete(server: FaultyServer, folder: Path) -> None:
    on_disk = {path.name: path.read_bytes() for path in (folder / "in").iterdir()}
    assert on_disk == server.files


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_files_arrive_once(server: FaultyServer, tmp_path: Path, algorithm: str) -> None:
    assert run(server, tmp_path, algorithm=algorithm) == 0
    assert server.sent == {"a.bin": N, "b.bin": 3000}
    assert_complete(server, tmp_path)
    server.behave()
    assert run(server, tmp_path, algorithm=algorithm) == 3
    assert server.requests == []


TEMPORARY_FAULTS: dict[str, tuple[list[Act], int]] = {  # responses for the first file, and bytes of it that are sent
    "cut": ([cut(4000)], N),
    "reset before a byte": ([drop, drop], N),
    "cut often": ([cut(1000)] * 8, N),
    "500 twice": ([answer(500), answer(500)], N),
    "503 with Retry-After": ([answer(503, Retry_After=0)], N),
    "503 with Retry-After of a day": ([answer(503, Retry_After=86400)], N),
    "503 with Retry-After of nonsense": ([answer(503, Retry_After="soon")], N),
    "503 with Retry-After of too many digits": ([answer(503, Retry_After="9" * 5000)], N),
    "429 with a date": ([answer(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")], N),
    "range ignored": ([cut(4000), ignore_range()], 4000 + N),
    "short length": ([ignore_range(4000, announced=4000)], N),
    "corrupt once": ([corrupt(5000)], 2 * N),
    "corrupt first part": ([lambda handler, body, start: cut(4000)(handler, b"?" + body[1:], start)], 2 * N),
    "wrong range": ([cut(4000), misplaced("bytes 0-9999/10000")], 2 * N),
    "no range": ([cut(4000), misplaced("")], 2 * N),
    "wrong total": ([cut(4000), misplaced("bytes 4000-9999/12345")], 2 * N),
    "416 once": ([cut(4000), answer(416)], 4000 + N),
    "page of a proxy instead of the rest": ([cut(4000), ignore_range(31, announced=31)], N + 31),
    "another file once": ([another_file(b"sign in to this network, please")], 2 * N),
    "a longer file once": ([another_file(content(2 * N, 9))], 3 * N),
    "redirected on this machine": ([answer(302, Location="/a.bin")], N),
    "silent": ([cut(4000, hangs=True)], N),
    "silent from the start": ([hang], N),
}


@pytest.mark.parametrize("fault", TEMPORARY_FAULTS)
def test_download_survives_a_temporary_fault(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    acts, n_sent = TEMPORARY_FAULTS[fault]
    server.acts["a.bin"] = list(acts)
    start_s = time.monotonic()
    assert run(server, tmp_path) == 0
    assert_complete(server, tmp_path)
    assert not server.acts["a.bin"]  # all of it happened
    assert (server.sent["a.bin"], server.sent["b.bin"]) == (n_sent, 3000)
    assert time.monotonic() - start_s < 2


LASTING_FAULTS: dict[str, tuple[Act, str]] = {
    "404": (answer(404), "the server answered 404"),
    "403": (answer(403), "the server answered 403"),
    "500": (answer(500), "failed 4 times in a row: the server answered 500 Internal Server Error"),
    "drop": (drop, "failed 4 times in a row"),
    "corrupt": (corrupt(5000), "expected 10000 bytes with md5"),
    "cut from the start": (ignore_range(4000), "failed 4 times in a row"),
    "416": (answer(416), "nothing after byte 0"),
    "longer": (another_file(content(N + 1, 3)), "got 10001 bytes, twice"),
    "longer, unannounced": (unbounded(content(N + 1, 3)), "got more than 10000 bytes, twice"),
    "shorter": (another_file(content(N - 1, 3)), "nothing after byte 9999 (bytes */9999)"),
    "another": (another_file(content(N, 3)), f"got {hashlib.md5(content(N, 3)).hexdigest()}, twice"),
    "to a file": (answer(302, Location="file:///etc/passwd"), "redirected to file://, which is not https"),
    "to http": (answer(302, Location="http://example.com/a"), "redirected to http://example.com, which is not https"),
    "to ftp": (answer(307, Location="ftp://127.0.0.1/a"), "which is not https"),
    "to nonsense": (answer(301, Location="http://[::1/a"), "which is not a URL"),
    "in circles": (answer(301, Location="a.bin"), "redirected more than 5 times"),
    "hang": (hang, "Read timed out"),
}


@pytest.mark.parametrize("fault", LASTING_FAULTS)
def test_a_lasting_fault_is_one_line_and_spares_the_others(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    act, reason = LASTING_FAULTS[fault]
    server.always["a.bin"] = act
    with pytest.raises(InputError) as caught:
        run(server, tmp_path)
    message = str(caught.value)
    assert reason in message and server.url + "a.bin" in message and "\n" not in message
    assert message.endswith("run the same command again to resume")
    assert not (tmp_path / "in" / "a.bin").exists()
    assert (tmp_path / "in" / "b.bin").read_bytes() == server.files["b.bin"]
    server.behave()
    assert run(server, tmp_path) == 2
    assert_complete(server, tmp_path)
    assert server.sent["b.bin"] == 0


def test_a_later_run_resumes(server: FaultyServer, tmp_path: Path) -> None:
    server.acts["a.bin"] = [cut(6000)] + [drop] * 4
    with pytest.raises(InputError, match="4 times in a row"):
        run(server, tmp_path)
    assert (tmp_path / "in" / ".a.bin.part").read_bytes() == server.files["a.bin"][:6000]
    server.behave()
    assert run(server, tmp_path) == 2
    assert (server.requests, server.sent["a.bin"]) == ([("a.bin", 6000)], 4000)
    assert_complete(server, tmp_path)


def test_a_reset_connection_keeps_what_arrived_before(server: FaultyServer, tmp_path: Path) -> None:
    server.acts["a.bin"] = [cut(4321, hard=True)]
    server.always["a.bin"] = answer(403)
    with pytest.raises(InputError, match="403"):
        run(server, tmp_path)
    part = (tmp_path / "in" / ".a.bin.part").read_bytes()
    assert part == server.files["a.bin"][: len(part)]


@pytest.mark.parametrize("n_bytes", [N, N + 7])
@pytest.mark.parametrize("right", [False, True])
def test_parts_as_long_as_the_file_are_verified(
    server: FaultyServer, tmp_path: Path, n_bytes: int, right: bool
) -> None:
    body = server.files["a.bin"] if right else content(N, 8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".a.bin.part").write_bytes((body + b"?" * 9)[:n_bytes])
    run(server, tmp_path)
    assert_complete(server, tmp_path)
    assert server.sent["a.bin"] == (0 if right and n_bytes == N else N)


def test_a_wrong_file_is_set_aside(server: FaultyServer, tmp_path: Path) -> None:
    run(server, tmp_path)
    wrong = bytearray(server.files["b.bin"])
    wrong[17] ^= 1
    (tmp_path / "in" / "b.bin").write_bytes(wrong)
    (tmp_path / "in" / "a.bin").write_bytes(server.files["a.bin"][:-1])
    assert run(server, tmp_path) == 1
    assert (tmp_path / "in" / "b.bin.wrong").read_bytes() == wrong
    assert (tmp_path / "in" / "a.bin.wrong").read_bytes() == server.files["a.bin"][:-1]
    for name, body in server.files.items():
        assert (tmp_path / "in" / name).read_bytes() == body


def test_a_dangling_link_of_a_clone_is_replaced_and_a_folder_in_the_way_named(
    server: FaultyServer, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").symlink_to(tmp_path / "annex" / "objects" / "MD5E-s1--0")
    run(server, tmp_path)
    assert_complete(server, tmp_path)
    (tmp_path / "in" / "a.bin").unlink()
    (tmp_path / "in" / "a.bin").mkdir()
    with pytest.raises(InputError, match=r"a\.bin: a folder where a file should be"):
        run(server, tmp_path)


def test_too_little_space_is_refused_before_the_first_byte(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": N + 2999})
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(InputError, match=r"13\.0 kB to download, but only 13\.0 kB free; make room"):
        run(server, tmp_path)
    assert server.requests == []
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".a.bin.part").write_bytes(server.files["a.bin"][:1])
    run(server, tmp_path)  # existing bytes need no space
    assert_complete(server, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_keeps_the_part(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(download_module.os, "fsync", full)
        with pytest.raises(InputError, match=rf"a\.bin: disk full \({os.strerror(code)}\).*2 not tried; run the same"):
            run(server, tmp_path, n_at_once=1)
    assert (tmp_path / "in" / ".a.bin.part").read_bytes() == server.files["a.bin"]
    server.behave()
    run(server, tmp_path)
    assert server.sent["a.bin"] == 0
    assert_complete(server, tmp_path)


def test_a_lost_server_is_not_asked_for_every_file(server: FaultyServer, tmp_path: Path) -> None:
    server.files = {f"{index}.bin": content(10, index) for index in range(9)}
    server.always = {name: answer(503) for name in server.files}
    with pytest.raises(InputError, match=r"0\.bin: failed 4 times.*503 Service Unavailable; 8 not tried; run the same"):
        run(server, tmp_path, n_at_once=1)
    assert server.requests == [("0.bin", 0)] * 4
    with pytest.raises(InputError, match=r"0\.bin: failed 4 times.*; [12] more failed; [67] not tried; run the same"):
        run(server, tmp_path, n_at_once=2)


def test_a_server_that_does_not_listen(server: FaultyServer, tmp_path: Path) -> None:
    with FaultyServer() as gone:
        gone.files = {"a.bin": b"abc"}
    with pytest.raises(InputError, match=r"a\.bin: failed 4 times in a row: .*Connection refused"):
        run(gone, tmp_path)


def test_threads_keep_the_order_count_failures_and_do_not_hide_bugs() -> None:
    def work(item: int) -> int:
        if item in (1, 3):
            raise InputError(f"item {item}")
        if item == 2:
            raise http_client.Stopped
        return item * item

    assert map_in_threads(work, [5, 0, 4], http_client.Client(3)) == [25, 0, 16]
    with pytest.raises(InputError, match=r"^item 1; 1 more failed; 1 not tried; run the same"):
        map_in_threads(work, range(5), http_client.Client(3))
    client = http_client.Client(1)
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda item: 1 / item, [0, 1, 2], client)
    assert client.stop.is_set()


def test_files_are_downloaded_at_the_same_time(server: FaultyServer, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=5)

    def together(handler: Handler, body: bytes, start: int) -> None:
        both.wait()
        serve(handler, body, start)

    server.acts = {"a.bin": [together], "b.bin": [together]}
    run(server, tmp_path)
    assert_complete(server, tmp_path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/x/", "use https"),
        ("http://127.0.0.1.example.com/", "use https"),
        ("file:///etc/", "not a supported URL"),
        ("ftp://127.0.0.1/", "not a supported URL"),
        ("example.com/x", "not a supported URL"),
        ("https:///x", "not a supported URL"),
        ("https://[::1/x", "not a URL;"),
        ("https://host:port/x", "not a URL;"),
        ("https://me:secret@example.com/", "without user"),
        ("https://example.com/?list=1", "without user"),
    ],
)
def test_check_url_accepts_https_and_this_machine_alone(url: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        http_client.check_url(url)
    for url in ("https://example.com/x", "http://127.0.0.1:80/", "http://[::1]:8080/x", "http://localhost/x/"):
        assert http_client.check_url(url) == url.rstrip("/") + "/"


def test_the_proxy_of_the_environment_is_used_for_other_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = "http://proxy.example.com:3128"
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    assert http_client.proxy_for("https://example.com/") == proxy
    assert http_client.proxy_for("http://127.0.0.1:1/") is None
    monkeypatch.setenv("no_proxy", "example.com")
    assert http_client.proxy_for("https://example.com/") is None


def test_waits_double_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "N_RETRIES", 6)
    monkeypatch.setattr(http_client, "BACKOFF_S", 0.5)
    monkeypatch.setattr(http_client, "LONGEST_WAIT_S", 5.0)
    client = http_client.Client(1)
    waits: list[float] = []
    monkeypatch.setattr(client.stop, "wait", lambda wait_s: waits.append(wait_s))
    retries = http_client.RetryPolicy(client, "http://127.0.0.1:1/")
    error = ProtocolError("gone")
    for _ in range(6):
        retries.wait_after(error, 10)
    assert waits == [0, 1, 2, 4, 5, 5]
    with pytest.raises(http_client.PermanentError, match="failed 7 times in a row: gone"):
        retries.wait_after(error, 10)
    retries.wait_after(error, 11)  # progress
    assert waits[-1] == 0


def test_log_files_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    text = io.StringIO()
    with progress.ByteProgress(Console(file=text, width=40), "downloading", 5000, 1000) as counter:
        for n_bytes in (1000, 3000, -5000):
            counter.advance(n_bytes)
    lines = text.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "downloading: 2.0 kB of 5.0 kB",
        "downloading: 5.0 kB of 5.0 kB",
        "downloading: 0 bytes of 5.0 kB",
    ]
    assert lines[1].endswith("/s")


def test_a_terminal_gets_a_bar() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with progress.ByteProgress(console, "downloading", 4000) as counter:
        counter.advance(1000)
        counter._bar.refresh()
    assert "1.0/4.0 kB" in text.getvalue()


SCRIPT = """
import io, resource, signal, sys
from pathlib import Path
from rich.console import Console
from bert_encoding.datasets.fetching import download, http_client
from bert_encoding.core.errors import InputError
url, folder, n_bytes, digest, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
download.BLOCK_BYTES, http_client.BACKOFF_S = 1000, 0.0
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
file = download.RemoteFile(url, folder / "a.bin", n_bytes, "md5", digest)
try:
    with http_client.Client(2) as client:
        print("done", download.download(client, [file], folder, Console(file=io.StringIO())))
except InputError as error:
    print("error:", error)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(server: FaultyServer, folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    body = server.files["a.bin"]
    arguments = [server.url + "a.bin", str(folder), str(len(body)), hashlib.md5(body).hexdigest(), str(limit)]
    return subprocess.Popen(
        with_ctrl_c([sys.executable, "-c", SCRIPT, *arguments]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits of file sizes")
def test_a_limit_on_file_size_keeps_the_part(server: FaultyServer, tmp_path: Path) -> None:
    with start(server, tmp_path, limit=5500) as process:
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 2
    assert output.startswith(f"error: {tmp_path / 'a.bin'}: disk full (File too large)")
    assert (tmp_path / ".a.bin.part").read_bytes() == server.files["a.bin"][:5500]
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(
    ("act", "n_written", "sign"),
    [
        (cut(6000, hangs=True), 5000, signal.SIGKILL),
        (cut(6000, hangs=True), 5000, signal.SIGINT),
        (hang, 0, signal.SIGINT),  # before the response
    ],
)
def test_a_killed_run_loses_at_most_a_block(
    server: FaultyServer, tmp_path: Path, act: Act, n_written: int, sign: int
) -> None:
    server.acts["a.bin"] = [act]
    part = tmp_path / ".a.bin.part"
    with start(server, tmp_path) as process:
        wait_until(lambda: server.n_requests("a.bin") == 1 and part.stat().st_size >= n_written)
        start_s = time.monotonic()
        process.send_signal(sign)
        process.communicate(timeout=30)
    assert process.returncode == (130 if sign == signal.SIGINT else -sign)
    assert time.monotonic() - start_s < 3  # far from the read timeout
    assert part.read_bytes() == server.files["a.bin"][: part.stat().st_size]
    assert not (tmp_path / "a.bin").exists()
    server.behave()
    with start(server, tmp_path) as process:
        assert process.communicate(timeout=30)[0] == "done 0\n"
    assert server.sent["a.bin"] <= N - n_written
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]
