"""HTTPS GET over a line that may fail: checked redirects, bounded patience, quick to stop."""

import ipaddress
import ssl
import threading
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, SSLError
from urllib3.util import Retry, Timeout

from bert_encoding.core.errors import InputError, first_line

CONNECT_S, READ_S = 10.0, 30.0  # without a connection, and without a byte
N_RETRIES = 6  # in a row, without a new byte between them
BACKOFF_S = 0.5  # doubled with every failure
LONGEST_WAIT_S = 60.0  # whatever the server asks for
N_REDIRECTS = 5
PASSING = (429, 500, 502, 503, 504)
SMALL_BYTES = 2**20  # more than any answer of ``read_small``


class Stopped(Exception):
    """Somebody asked to stop."""


class Hopeless(InputError):
    """What went wrong with one file will go wrong with the next one too."""


class Client(NamedTuple):
    """Open connections to hosts, and the event that ends all work on them."""

    pool: urllib3.PoolManager
    stop: threading.Event


def make_client(url: str, n_at_once: int) -> Client:
    """Return a client that verifies certificates and uses the proxy of the environment for hosts elsewhere."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = None if _is_loopback(host) or proxy_bypass(host) else getproxies().get(parts.scheme)
    pool = urllib3.ProxyManager(proxy, maxsize=n_at_once) if proxy else urllib3.PoolManager(maxsize=n_at_once)
    return Client(pool, threading.Event())


def check_url(url: str) -> str:
    """Return a base URL that ends in ``/``.

    Raises
    ------
    InputError
        unless it is ``https://host/...``, or ``http://`` with a host on this machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{url}: not a URL; give https://host/path/") from None
    if parts.scheme not in ("https", "http") or not host:
        raise InputError(f"{url}: not a URL we read from; give https://host/path/")
    if parts.scheme == "http" and not _is_loopback(host):
        raise InputError(f"{url}: use https, since anybody on the way can change what http carries")
    if parts.query or parts.fragment or parts.username is not None:
        raise InputError(f"{url}: give a plain https://host/path/, without user, '?' or '#'")
    return url.rstrip("/") + "/"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_url(client: Client, url: str, start: int = 0) -> urllib3.BaseHTTPResponse:
    """Ask once for a URL from byte ``start`` on, follow redirects, and return the answer, its body unread.

    Raises
    ------
    InputError
        if a redirect leads to anything but https (or from http on this machine to http on this machine).
    Stopped
        if somebody asked to stop while the server thought.
    urllib3.exceptions.HTTPError
        if there is no answer.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "bert-encoding-study"}
    if start:
        headers["Range"] = f"bytes={start}-"
    at = url
    for _ in range(N_REDIRECTS + 1):
        response = client.pool.request(
            "GET",
            at,
            headers=headers,
            preload_content=False,
            redirect=False,
            retries=False,
            timeout=Timeout(connect=CONNECT_S, read=READ_S),
        )
        location = response.get_redirect_location()
        if not location and not client.stop.is_set():
            return response
        response.close()
        if not location:
            raise Stopped
        at = _redirected(url, at, location)
    raise InputError(f"{url}: redirected more than {N_REDIRECTS} times")


def _redirected(url: str, at: str, location: str) -> str:
    try:
        target = urljoin(at, location)
        parts = urlsplit(target)
        host = parts.hostname or ""
    except ValueError:
        raise InputError(f"{url}: redirected to {location!r}, which is not a URL") from None
    stays_here = parts.scheme == urlsplit(at).scheme == "http" and _is_loopback(host)
    if not host or (parts.scheme != "https" and not stays_here):
        raise InputError(f"{url}: redirected to {parts.scheme}://{host}, which is not https; refused")
    return target


class Patience:
    """How often a URL has failed in a row: waits longer after each failure, and ends after ``N_RETRIES``."""

    def __init__(self, client: Client, url: str) -> None:
        self.stop, self.url = client.stop, url
        self.progress()

    def progress(self) -> None:
        """Forget the failures so far."""
        self.retry = Retry(N_RETRIES, backoff_factor=BACKOFF_S, backoff_max=LONGEST_WAIT_S, status_forcelist=PASSING)

    def after(self, failure: HTTPError | urllib3.BaseHTTPResponse) -> None:
        """Wait before the next attempt: as long as the server asks, or a doubled time, but bounded.

        Raises
        ------
        InputError
            if the failure will not pass.
        Hopeless
            if there were too many in a row.
        Stopped
            if somebody asked to stop meanwhile.
        """
        error = failure if isinstance(failure, HTTPError) else None
        response = failure if isinstance(failure, urllib3.BaseHTTPResponse) else None
        if response is not None and response.status not in PASSING:
            raise InputError(f"{self.url}: the server answered {response.status} {response.reason or ''}".rstrip())
        if isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
            raise Hopeless(f"{self.url}: the server's certificate is not valid ({error.args[0].verify_message})")
        try:
            self.retry = self.retry.increment("GET", self.url, response=response, error=error)
        except MaxRetryError as given_up:
            why = first_line(error) if error else f"the server answered {given_up.reason}"
            raise Hopeless(f"{self.url}: failed {N_RETRIES + 1} times in a row: {why}") from None
        if self.stop.wait(self._wait_s(response)):
            raise Stopped

    def _wait_s(self, response: urllib3.BaseHTTPResponse | None) -> float:
        asked_s = None
        if response is not None:
            try:
                asked_s = self.retry.get_retry_after(response)
            except (HTTPError, ValueError):  # not a time
                asked_s = None
        return min(self.retry.get_backoff_time() if asked_s is None else asked_s, LONGEST_WAIT_S)


def read_small(client: Client, url: str) -> bytes | None:
    """Return a small file, or None if the server has no such file (404).

    Raises
    ------
    InputError
        if the server does not answer well, however often asked, or the file is not small.
    """
    patience = Patience(client, url)
    while True:
        try:
            with closing(open_url(client, url)) as response:
                if response.status == 404:
                    return None
                if response.status == 200:
                    return _small_body(url, response)
                failure: HTTPError | urllib3.BaseHTTPResponse = response
        except HTTPError as error:
            failure = error
        patience.after(failure)


def _small_body(url: str, response: urllib3.BaseHTTPResponse) -> bytes:
    body = b"".join(_up_to(response, SMALL_BYTES + 1))
    if len(body) > SMALL_BYTES:
        raise InputError(f"{url}: holds more than {SMALL_BYTES} bytes, which is neither a key nor a table of stories")
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) != len(body):
        raise ProtocolError(f"{len(body)} of {announced} bytes arrived")
    return body


def _up_to(response: urllib3.BaseHTTPResponse, n_bytes: int) -> list[bytes]:
    blocks, n_read = [], 0
    for block in response.stream(2**16, decode_content=False):
        blocks.append(block)
        n_read += len(block)
        if n_read >= n_bytes:
            break
    return blocks
