"""HTTPS GET over an unreliable connection: checked redirects, bounded retries, and one event that stops all threads."""

import ipaddress
import ssl
import threading
from contextlib import closing
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError
from urllib3.util import Retry, Timeout

from bert_encoding.core.errors import InputError, first_line

CONNECT_S, READ_S = 10.0, 30.0  # longest wait for a connection, and for the next bytes
N_RETRIES = 6  # in a row, without a new byte between them
BACKOFF_S = 0.5  # doubled after every failure
LONGEST_WAIT_S = 60.0  # even if the server asks for more
N_REDIRECTS = 5
TEMPORARY = (429, 500, 502, 503, 504)
SMALL_BYTES = 2**20  # more than any file read by ``read_small``


class Stopped(Exception):
    """The client was closed while a thread worked with it."""


class PermanentError(InputError):
    """A failure that the next file would meet too."""


class BadStatus(HTTPError):
    """A response whose status says that it does not hold the file."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        super().__init__(f"the server answered {response.status} {response.reason or ''}".rstrip())
        self.response = response


class Client:
    """Connections that several threads share; leaving its context sets ``stop``, which ends their work."""

    def __init__(self, n_connections: int) -> None:
        self.n_connections = n_connections
        self.stop = threading.Event()
        self._pools: dict[str | None, urllib3.PoolManager] = {}  # proxy -> pool

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for pool in self._pools.values():
            pool.clear()

    def open(self, url: str, start: int = 0) -> urllib3.BaseHTTPResponse:
        """Request a URL from byte ``start`` on, follow redirects, and return the response, its body unread.

        Raises HTTPError if there is no response, InputError if a redirect leads to anything but https (or from http on
        this machine to http on this machine).
        """
        headers = {"Accept-Encoding": "identity", "User-Agent": "bert-encoding-study"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = Timeout(connect=CONNECT_S, read=READ_S)
        target = url
        for _ in range(N_REDIRECTS + 1):
            response = self._pool(target).request(
                "GET", target, headers=headers, preload_content=False, redirect=False, retries=False, timeout=timeout
            )
            location = response.get_redirect_location()
            if not location:
                return response
            response.close()
            target = _redirect_target(url, target, location)
        raise InputError(f"{url}: redirected more than {N_REDIRECTS} times")

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_for(url)
        if proxy not in self._pools:
            n = self.n_connections
            pool = urllib3.ProxyManager(proxy, maxsize=n) if proxy else urllib3.PoolManager(maxsize=n)
            self._pools.setdefault(proxy, pool)
        return self._pools[proxy]


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a URL, None for hosts on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return None if _is_loopback(host) or proxy_bypass(host) else getproxies().get(parts.scheme)


def check_url(url: str) -> str:
    """Return a base URL that ends in ``/``; raise InputError unless it is https, or http to this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{url}: not a URL; give https://host/path/") from None
    if parts.scheme not in ("https", "http") or not host:
        raise InputError(f"{url}: not a supported URL; give https://host/path/")
    if parts.scheme == "http" and not _is_loopback(host):
        raise InputError(f"{url}: use https, since http can be changed on its way")
    if parts.query or parts.fragment or parts.username is not None:
        raise InputError(f"{url}: give a plain https://host/path/, without user, '?' or '#'")
    return url.rstrip("/") + "/"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _redirect_target(url: str, source: str, location: str) -> str:
    try:
        target = urljoin(source, location)
        parts = urlsplit(target)
        host = parts.hostname or ""
    except ValueError:
        raise InputError(f"{url}: redirected to {location!r}, which is not a URL") from None
    stays_here = parts.scheme == urlsplit(source).scheme == "http" and _is_loopback(host)
    if not host or (parts.scheme != "https" and not stays_here):
        raise InputError(f"{url}: redirected to {parts.scheme}://{host}, which is not https; refused")
    return target


class RetryPolicy:
    """Wait longer after each failure of one URL, and give up after ``N_RETRIES`` retries without progress."""

    def __init__(self, client: Client, url: str) -> None:
        self.client, self.url = client, url
        self._n_bytes, self._retry = -1, Retry()

    def wait_after(self, error: HTTPError, n_bytes: int = 0) -> None:
        """Wait as long as the server asks, or twice as long as before, but bounded; more ``n_bytes`` are progress.

        Raises InputError if another attempt would fail too, PermanentError after too many failures in a row or if the
        server's certificate is not valid, Stopped if the client was closed meanwhile.
        """
        if n_bytes > self._n_bytes:
            self._n_bytes = n_bytes
            self._retry = Retry(N_RETRIES, backoff_factor=BACKOFF_S, backoff_max=LONGEST_WAIT_S)
        if isinstance(error, BadStatus) and error.response.status not in TEMPORARY:
            raise InputError(f"{self.url}: {error}")
        if isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
            raise PermanentError(f"{self.url}: the server's certificate is not valid ({error.args[0].verify_message})")
        try:
            self._retry = self._retry.increment("GET", self.url, error=error)
        except MaxRetryError:
            raise PermanentError(f"{self.url}: failed {N_RETRIES + 1} times in a row: {first_line(error)}") from None
        requested_s = self._retry_after_s(error.response) if isinstance(error, BadStatus) else None
        wait_s = self._retry.get_backoff_time() if requested_s is None else requested_s
        if self.client.stop.wait(min(wait_s, LONGEST_WAIT_S)):
            raise Stopped

    def _retry_after_s(self, response: urllib3.BaseHTTPResponse) -> float | None:
        try:
            return self._retry.get_retry_after(response)
        except (HTTPError, ValueError):  # not a time
            return None


def read_small(client: Client, url: str) -> bytes | None:
    """Return the content of a small file, None if there is none (404); raise InputError if it fails or is larger."""
    retries = RetryPolicy(client, url)
    while True:
        try:
            with closing(client.open(url)) as response:
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise BadStatus(response)
                return _small_body(url, response)
        except HTTPError as error:
            retries.wait_after(error)


def _small_body(url: str, response: urllib3.BaseHTTPResponse) -> bytes:
    body = b""
    for block in response.stream(2**16, decode_content=False):
        body += block
        if len(body) > SMALL_BYTES:
            raise InputError(f"{url}: larger than {SMALL_BYTES} bytes, so neither a key nor a table of stories")
    return body
