"""A local HTTP server with faults that a test chooses, for single requests or for all."""

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[["Handler", bytes, int], None]  # handler, whole body, first requested byte


class FaultyServer:
    """Serves ``files`` (path -> bytes) with ranges; the acts of a path come first, one per request, then ``always``.

    Attributes
    ----------
    sent : path -> bytes of body sent so far
    requests : (path, first requested byte) of every request
    go : ends the waiting of a server that hangs
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.acts: dict[str, list[Act]] = {}
        self.always: dict[str, Act] = {}
        self.sent: Counter[str] = Counter()
        self.requests: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "FaultyServer":
        self.server = _Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"faulty": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def behave(self) -> None:
        """Forget all misbehaviour and all counts."""
        self.acts.clear()
        self.always.clear()
        self.sent.clear()
        self.requests.clear()

    def n_requests(self, path: str) -> int:
        return sum(requested == path for requested, _ in self.requests)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faulty: FaultyServer

    def do_GET(self) -> None:
        faulty, path = self.faulty, self.path.lstrip("/")
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested else 0
        with faulty.lock:
            faulty.requests.append((path, start))
            acts = faulty.acts.get(path)
            act = acts.pop(0) if acts else faulty.always.get(path, serve)
        body = faulty.files.get(path)
        if body is None and act is serve:
            act = answer(404)
        act(self, body or b"", start)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, content: bytes) -> None:
        with self.faulty.lock:
            self.faulty.sent[self.path.lstrip("/")] += len(content)
        self.wfile.write(content)

    def drop(self, hard: bool = False) -> None:
        """End the connection; hard: with a reset."""
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


def _begin(handler: Handler, body: bytes, start: int) -> bytes | None:
    """Send the head of a correct response and return its body."""
    if start >= len(body) > 0:
        handler.head(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
        return None
    if "Range" in handler.headers:
        content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.head(206, Content_Range=content_range, Content_Length=len(body) - start)
    else:
        handler.head(200, Content_Length=len(body))
    return body[start:]


def serve(handler: Handler, body: bytes, start: int) -> None:
    """Respond correctly."""
    handler.body(_begin(handler, body, start) or b"")


def answer(status: int, **headers: object) -> Act:
    """Respond with a status and a short text."""

    def act(handler: Handler, body: bytes, start: int) -> None:
        handler.head(status, Content_Length=5, **headers)
        handler.wfile.write(b"sorry")

    return act


def cut(n_bytes: int, *, hard: bool = False, hangs: bool = False) -> Act:
    """Announce all, send some bytes, and drop the connection; if it ``hangs``, only after ``go``."""

    def act(handler: Handler, body: bytes, start: int) -> None:
        handler.body((_begin(handler, body, start) or b"")[:n_bytes])
        if hangs:
            handler.faulty.go.wait(60)
        handler.drop(hard)

    return act


def drop(handler: Handler, body: bytes, start: int) -> None:
    """Drop the connection without a response."""
    handler.drop()


def ignore_range(n_bytes: int | None = None, *, announced: int | None = None) -> Act:
    """Ignore the requested range; send some bytes of all, and drop the connection if more were announced."""

    def act(handler: Handler, body: bytes, start: int) -> None:
        length = len(body) if announced is None else announced
        handler.head(200, Content_Length=length)
        handler.body(body[:n_bytes])
        if len(body[:n_bytes]) < length:
            handler.drop()

    return act


def corrupt(index: int) -> Act:
    """Serve with one byte changed."""
    return lambda handler, body, start: serve(
        handler, body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :], start
    )


def another_file(content: bytes) -> Act:
    """Serve another file."""
    return lambda handler, body, start: serve(handler, content, start)


def unbounded(content: bytes) -> Act:
    """Send some content without announcing its length."""

    def act(handler: Handler, body: bytes, start: int) -> None:
        handler.head(200, Connection="close")
        handler.body(content)
        handler.drop()

    return act


def misplaced(content_range: str) -> Act:
    """Respond with the rest of the file under a wrong Content-Range."""

    def act(handler: Handler, body: bytes, start: int) -> None:
        handler.head(206, Content_Range=content_range, Content_Length=len(body) - start)
        handler.body(body[start:])

    return act


def hang(handler: Handler, body: bytes, start: int) -> None:
    """Send nothing until ``go``; then drop the connection."""
    handler.faulty.go.wait(60)
    handler.drop()
