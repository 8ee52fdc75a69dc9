"""Download files whose size and checksum are known: several at once, resumed after any cut, verified.

A file arrives as ``.<name>.part`` beside its final name, and is renamed once its size and checksum are right. So a
final name never holds half a file, and whatever ends the program, the next run goes on from the bytes on disk.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import urllib3
from rich.console import Console
from rich.filesize import decimal
from urllib3.exceptions import HTTPError, ProtocolError

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching.progress import Meter
from bert_encoding.datasets.fetching.threads import each, raise_first
from bert_encoding.datasets.fetching.web import Client, Hopeless, Patience, Stopped, open_url

BLOCK_BYTES = 256 * 1024  # written at a time; at most this much is lost with the process
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class RemoteFile(NamedTuple):
    """What a file must hold (``digest`` in hexadecimal, of ``algorithm``), whence it comes and where it goes."""

    url: str
    path: Path
    n_bytes: int
    algorithm: str
    digest: str

    @property
    def part(self) -> Path:
        """Where the bytes lie until they are verified."""
        return self.path.with_name(f".{self.path.name}.part")


class Fetched(NamedTuple):
    """What a fetch did; ``n_bytes`` counts what came over the line in this run."""

    n_files: int
    n_already_there: int
    n_bytes: int
    folder: Path

    def plus(self, other: "Fetched") -> "Fetched":
        """Return both as one."""
        return Fetched(
            self.n_files + other.n_files,
            self.n_already_there + other.n_already_there,
            self.n_bytes + other.n_bytes,
            self.folder,
        )


class WrongContent(Exception):
    """The server's bytes are not those of the file."""


def download(client: Client, files: Sequence[RemoteFile], folder: Path, n_at_once: int, console: Console) -> Fetched:
    """Make every file exist with the right content, and return what was done.

    Files already there are verified and kept. A file of other content is set aside as ``<name>.wrong`` and fetched.

    Raises
    ------
    InputError
        if the disk has too little space, or a file could not be fetched; the others are kept.
    """
    with Meter(console, "checking what is there", sum(_size(file.path) for file in files)) as meter:
        done = each(lambda file: _is_there(file, meter), files, n_at_once, client.stop)
        raise_first(done)
    missing = [file for file, is_there in zip(files, done, strict=True) if not is_there]
    n_bytes, n_here = sum(file.n_bytes for file in missing), sum(_here(file) for file in missing)
    _check_space(folder, n_bytes - n_here)
    with Meter(console, "downloading", n_bytes) as meter:
        meter.move(n_here)
        raise_first(each(lambda file: _fetch(client, file, meter), missing, n_at_once, client.stop))
    return Fetched(len(files), len(files) - len(missing), meter.n_received, folder)


def _here(file: RemoteFile) -> int:
    """Return how many bytes of a file lie in its part."""
    return min(_size(file.part), file.n_bytes)


def _is_there(file: RemoteFile, meter: Meter) -> bool:
    """Whether a file is there with the right content; one of other content is set aside."""
    try:
        if file.path.is_dir():
            raise InputError(f"{file.path}: a folder where a file should be; move it away")
        if not file.path.is_file():
            return False
        n_bytes = _size(file.path)
        is_right = n_bytes == file.n_bytes and _digest(file.path, file.algorithm) == file.digest
        meter.move(n_bytes)
        if not is_right:
            set_aside(file.path, meter.say)
        return is_right
    except OSError as error:
        raise disk_error(file.path, error) from None


def set_aside(path: Path, say: Callable[[str], None]) -> None:
    """Keep a file that is not what the data set holds under another name, and say so: it may hold somebody's work."""
    n_before = sum(1 for _ in path.parent.glob(f"{glob.escape(path.name)}.wrong*"))
    aside = path.with_name(f"{path.name}.wrong{n_before or ''}")
    path.replace(aside)
    say(f"{path}: not what the data set holds; kept as {aside.name}, fetched anew")


def _check_space(folder: Path, n_bytes: int) -> None:
    n_free = shutil.disk_usage(folder).free
    if n_bytes > n_free:
        raise InputError(
            f"{folder}: {decimal(n_bytes)} to download, but only {decimal(n_free)} free; "
            "make room, choose another folder, or name fewer stories"
        )


def _fetch(client: Client, file: RemoteFile, meter: Meter) -> bool:
    """Fetch a file, if its content is wrong once more from scratch, and rename it into place."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fill_and_verify(client, file, meter)
        except WrongContent:
            _start_over(file, meter)
            _fill_and_verify(client, file, meter)
        file.part.replace(file.path)
    except WrongContent as wrong:
        _start_over(file, meter)
        raise InputError(
            f"{file.url}: expected {file.n_bytes} bytes with {file.algorithm} {file.digest}, found {wrong}, twice"
        ) from None
    except OSError as error:
        raise disk_error(file.path, error) from None
    return True


def _start_over(file: RemoteFile, meter: Meter) -> None:
    meter.move(-_here(file))
    file.part.unlink(missing_ok=True)


def _fill_and_verify(client: Client, file: RemoteFile, meter: Meter) -> None:
    """Make the part whole, in as many requests as it takes.

    Raises
    ------
    WrongContent
        if the server has another file, or the whole part another checksum.
    """
    file.part.touch()
    patience = Patience(client, file.url)
    longest = _size(file.part)
    while _size(file.part) < file.n_bytes:
        failure = _append(client, file, meter)
        if _size(file.part) > longest:  # a server that starts over each time makes no progress
            longest = _size(file.part)
            patience.progress()
        if _size(file.part) < file.n_bytes:
            patience.after(failure or ProtocolError(f"the answer ended after {_size(file.part)} bytes"))
    if _size(file.part) > file.n_bytes:
        raise WrongContent(f"{_size(file.part)} bytes")
    with file.part.open("r+b") as written:
        os.fsync(written.fileno())  # on the disk before it gets its name
    found = _digest(file.part, file.algorithm)
    if found != file.digest:
        raise WrongContent(found)


def _append(client: Client, file: RemoteFile, meter: Meter) -> HTTPError | urllib3.BaseHTTPResponse | None:
    """Make one request for what the part lacks, and return what was wrong with the answer, if anything."""
    try:
        with closing(open_url(client, file.url, _size(file.part))) as response:
            if response.status not in (200, 206, 416):
                return response
            start = _checked_start(response, file)
            with file.part.open("r+b", buffering=0) as out:
                meter.move(start - out.seek(0, os.SEEK_END))
                out.truncate(start)
                out.seek(start)
                for block in response.stream(BLOCK_BYTES, decode_content=False):
                    if client.stop.is_set():
                        raise Stopped
                    if out.tell() + len(block) > file.n_bytes:
                        raise WrongContent(f"more than {file.n_bytes} bytes")
                    _write(out.write, block)
                    meter.receive(len(block))
    except HTTPError as error:
        return error
    return None


def _write(write: Callable[[memoryview], int | None], block: bytes) -> None:
    """Write a whole block: an unbuffered file may take less at once."""
    rest = memoryview(block)
    while rest:
        rest = rest[write(rest) or 0 :]


def _checked_start(response: urllib3.BaseHTTPResponse, file: RemoteFile) -> int:
    """Return the byte at which the answer's body begins.

    Raises
    ------
    WrongContent
        if it is not where the part ends, or belongs to a file of another size.
    """
    have = _size(file.part)
    said = response.headers.get("Content-Range", "")
    if response.status == 416:
        raise WrongContent(f"nothing after byte {have} ({said or 'no size given'})")
    if response.status == 200:  # the server sends the whole file, whatever was asked
        length = response.headers.get("Content-Length", "")
        if have and length != str(file.n_bytes):  # a page of some proxy, perhaps: not worth the bytes we have
            raise ProtocolError(f"the server sent {length or 'an unknown number of'} bytes from the start")
        if length.isdecimal() and int(length) > file.n_bytes:
            raise WrongContent(f"{length} bytes")
        return 0
    found = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", said.strip())
    if not found or int(found[1]) != have or found[2] not in ("*", str(file.n_bytes)):
        raise WrongContent(f"range {said!r} where byte {have} was to follow")
    return have


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def disk_error(path: Path, error: OSError) -> InputError:
    """Return what to say when a file cannot be written."""
    if error.errno in FULL:
        return Hopeless(f"{path}: no room for it ({error.strerror}); what arrived is kept: make room")
    return InputError(f"{error.filename or path}: cannot be read or written ({error.strerror or error})")
