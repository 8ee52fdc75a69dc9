"""Download files of known size and checksum: several at the same time, resumed after interruptions, verified.

A file arrives as ``.<name>.part`` next to its final name, and is renamed once its size and checksum are right. So a
final name never holds half a file, and however a program ends, the next run resumes from the bytes on disk.
"""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import urllib3
from rich.console import Console
from rich.filesize import decimal
from urllib3.exceptions import HTTPError, ProtocolError

from bert_encoding.core.command_line import print_lines
from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import DISK_FULL
from bert_encoding.datasets.fetching.http_client import BadStatus, Client, PermanentError, RetryPolicy, Stopped
from bert_encoding.datasets.fetching.progress import ByteProgress
from bert_encoding.datasets.fetching.threads import map_in_threads

BLOCK_BYTES = 256 * 1024  # written at a time; at most this much is lost when the process is killed


class RemoteFile(NamedTuple):
    """A file to download: its URL, its place on disk, its size and its hexadecimal ``digest`` by ``algorithm``."""

    url: str
    path: Path
    n_bytes: int
    algorithm: str
    digest: str

    @property
    def part(self) -> Path:
        """Where the bytes are until they are verified."""
        return self.path.with_name(f".{self.path.name}.part")


class WrongContent(Exception):
    """The bytes of the server are not those of the file."""


def download(client: Client, files: Sequence[RemoteFile], folder: Path, console: Console) -> int:
    """Make every file exist with the right content, and return how many did before.

    Existing files are verified and kept. A file of other content is renamed to ``<name>.wrong`` and downloaded. Raises
    InputError if the disk has too little space, or a file could not be downloaded; the others are kept.
    """
    with ByteProgress(console, "checking existing files", sum(_size(file.path) for file in files)) as progress:
        exists = map_in_threads(lambda file: _exists(file, progress), files, client)
    missing = [file for file, is_there in zip(files, exists, strict=True) if not is_there]
    n_total, n_done = sum(file.n_bytes for file in missing), sum(_n_done(file) for file in missing)
    n_free = shutil.disk_usage(folder).free
    if n_total - n_done > n_free:
        raise InputError(
            f"{folder}: {decimal(n_total - n_done)} to download, but only {decimal(n_free)} free; "
            "make room, choose another folder, or name fewer stories"
        )
    with ByteProgress(console, "downloading", n_total, n_done) as progress:
        map_in_threads(lambda file: _download(client, file, progress), missing, client)
    return len(files) - len(missing)


def _exists(file: RemoteFile, progress: ByteProgress) -> bool:
    """Whether a file exists with the right content; one of other content is set aside."""
    try:
        if file.path.is_dir():
            raise InputError(f"{file.path}: a folder where a file should be; move it away")
        if not file.path.is_file():
            return False
        n_bytes = _size(file.path)
        is_right = n_bytes == file.n_bytes and _digest(file.path, file.algorithm) == file.digest
        progress.advance(n_bytes)
        if not is_right:
            set_aside(file.path, progress.console)
        return is_right
    except OSError as error:
        raise disk_error(file.path, error) from None


def set_aside(path: Path, console: Console) -> None:
    """Rename a file whose content is not that of the data set: it may hold somebody's work."""
    n_before = sum(1 for _ in path.parent.glob(f"{glob.escape(path.name)}.wrong*"))
    aside = path.with_name(f"{path.name}.wrong{n_before or ''}")
    path.replace(aside)
    print_lines(console, f"{path}: differs from the data set; kept as {aside.name}, downloading it again")


def _download(client: Client, file: RemoteFile, progress: ByteProgress) -> None:
    """Download a file, once more from the start if its content is wrong, and rename it into place."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                _complete_part(client, file, progress)
                file.part.replace(file.path)
                return
            except WrongContent as error:
                wrong = str(error)
                progress.advance(-_n_done(file))
                file.part.unlink()
    except OSError as error:
        raise disk_error(file.path, error) from None
    raise InputError(
        f"{file.url}: expected {file.n_bytes} bytes with {file.algorithm} {file.digest}, got {wrong}, twice"
    )


def _complete_part(client: Client, file: RemoteFile, progress: ByteProgress) -> None:
    """Download what the part lacks, in as many requests as it takes, and verify the whole."""
    file.part.touch()
    retries = RetryPolicy(client, file.url)
    while _size(file.part) < file.n_bytes:
        try:
            _append(client, file, progress)
        except HTTPError as error:
            retries.wait_after(error, _size(file.part))
    if _size(file.part) > file.n_bytes:
        raise WrongContent(f"{_size(file.part)} bytes")
    with file.part.open("r+b") as written:
        os.fsync(written.fileno())  # on the disk before it gets its final name
    digest = _digest(file.part, file.algorithm)
    if digest != file.digest:
        raise WrongContent(digest)


def _append(client: Client, file: RemoteFile, progress: ByteProgress) -> None:
    """Request what the part lacks once, and write it as it arrives; raise HTTPError if the part is incomplete then."""
    n_done = _size(file.part)
    with closing(client.open(file.url, n_done)) as response:
        start = _checked_start(response, file.n_bytes, n_done)
        progress.advance(start - n_done)
        with file.part.open("ab" if start else "wb") as out:
            for block in response.stream(BLOCK_BYTES, decode_content=False):
                if client.stop.is_set():
                    raise Stopped
                if out.tell() + len(block) > file.n_bytes:
                    raise WrongContent(f"more than {file.n_bytes} bytes")
                out.write(block)
                out.flush()
                progress.advance(len(block))
    if _size(file.part) < file.n_bytes:
        raise ProtocolError(f"the response ended after {_size(file.part)} bytes")


def _checked_start(response: urllib3.BaseHTTPResponse, n_bytes: int, n_done: int) -> int:
    """Return the byte at which a response begins; raise WrongContent if it belongs to a file of another size."""
    content_range = response.headers.get("Content-Range", "")
    if response.status == 416:
        raise WrongContent(f"nothing after byte {n_done} ({content_range or 'no size given'})")
    if response.status == 200:  # the server sends the whole file, whatever was requested
        length = response.headers.get("Content-Length", "")
        if n_done and length != str(n_bytes):  # perhaps a page of a proxy: not worth the bytes we have
            raise ProtocolError(f"the server sent {length or 'an unknown number of'} bytes from the start")
        if length.isdecimal() and int(length) > n_bytes:
            raise WrongContent(f"{length} bytes")
        return 0
    if response.status != 206:
        raise BadStatus(response)
    parsed = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", content_range.strip())
    if not parsed or int(parsed[1]) != n_done or parsed[2] not in ("*", str(n_bytes)):
        raise WrongContent(f"range {content_range!r} instead of one from byte {n_done}")
    return n_done


def _n_done(file: RemoteFile) -> int:
    """Return how many bytes of a file are in its part."""
    return min(_size(file.part), file.n_bytes)


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def disk_error(path: Path, error: OSError) -> InputError:
    """Return the message for a file that cannot be written."""
    if error.errno in DISK_FULL:
        return PermanentError(f"{path}: disk full ({error.strerror}); make room; what has arrived is kept")
    return InputError(f"{error.filename or path}: cannot be read or written ({error.strerror or error})")
