"""Result folders: on this machine, or in object storage (``s3://bucket/prefix``, ``gs://bucket/prefix``).

A `Place` is either a ``pathlib.Path`` or an `ObjectPath`, which has the same operators and methods. `atomic_path`
writes a file completely or not at all: under a temporary name that is then renamed, or as one uploaded object.
"""

import errno
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow

from bert_encoding.core.errors import InputError, first_line

THREADS = 25  # parallel requests: pyarrow keeps as many connections
PAUSES_S = (1, 2, 4, 8, 15, 30)  # before each retry of an upload: hours of work may depend on one record
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ObjectPath:
    """A file or folder in object storage; ``str`` gives the URL that `open_place` reads."""

    bucket: str  # with its scheme, as in ``s3://bucket``
    key: str  # names joined by slashes, not percent-encoded; the key of a folder is the common prefix of its files
    query: str = ""  # settings of pyarrow, as in ``endpoint_override=localhost:9000&scheme=http``

    def __str__(self) -> str:
        key = self.key.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return f"{self.bucket}/{key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else name, self.query)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.rpartition("/")[0], self.query)

    def exists(self) -> bool:
        return self._type() != "NotFound"

    def is_file(self) -> bool:
        return self._type() == "File"

    def is_dir(self) -> bool:
        return self._type() == "Directory"

    def read_bytes(self) -> bytes:
        with _one_line_errors(self), _file_system(self).open_input_file(arrow_path(self)) as file:
            return bytes(file.read())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def unlink(self) -> None:
        with _one_line_errors(self):
            _file_system(self).delete_file(arrow_path(self))

    def _type(self) -> str:
        return str(_file_info(self).type.name)


Place = Path | ObjectPath
AnyPlace = TypeVar("AnyPlace", bound=Place)  # functions return the kind of place they got


def is_url(location: str) -> bool:
    """Whether a location has a scheme; one without is a folder on this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def open_place(location: str | Place) -> Place:
    """Return the place that a path or URL names, without any request to the network.

    In a URL, ``%``, ``?`` and ``#`` that belong to a name must be percent-encoded; a URL of another scheme, without
    bucket or with a secret raises InputError.
    """
    if not isinstance(location, str):
        return location
    if not is_url(location):
        return Path(location)
    scheme, _, rest = location.partition("://")
    if scheme.lower() not in ("s3", "gs"):
        raise InputError(f"{location}: results can be kept in a folder, s3://bucket/prefix or gs://bucket/prefix")
    path, _, query = rest.partition("?")
    bucket, _, key = path.partition("/")
    user = bucket.rpartition("@")[0]
    if re.search(r"secret|password|token", query) or (user and user != "anonymous"):
        raise InputError(
            f"{scheme}://...: contains a secret, which results would record; give keys in the environment or a profile"
        )
    names = [unquote(name) for name in key.rstrip("/").split("/")] if key.strip("/") else []
    if not bucket.rpartition("@")[2] or "#" in path or any(name in ("", ".", "..") for name in names):
        raise InputError(f"{location}: must look like {scheme.lower()}://bucket/prefix")
    return ObjectPath(f"{scheme.lower()}://{bucket}", "/".join(names), query)


def arrow_path(place: ObjectPath) -> str:
    """Return bucket and key in the notation of pyarrow."""
    bucket = place.bucket.partition("://")[2].rpartition("@")[2]
    return f"{bucket}/{place.key}" if place.key else bucket


@functools.lru_cache(maxsize=64)
def _connect(bucket: str, query: str) -> Any:
    """Return pyarrow's file system of a bucket; raise InputError for unknown settings or a missing bucket."""
    from pyarrow.fs import FileSystem

    settings = [query] if query else []
    if bucket.startswith("s3:"):
        settings.append("allow_delayed_open=true")  # a small file is one PUT, not three requests
    try:
        with _one_line_errors(ObjectPath(bucket, "", query)):
            return FileSystem.from_uri(f"{bucket}/?{'&'.join(settings)}")[0]
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{bucket}/?{query}: {first_line(error)}") from None


def make_folder(place: Place) -> None:
    """Create a folder and its parents; object storage needs none."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)


def children(place: Place) -> Sequence[Place]:
    """Return the files and folders in a folder, sorted; none if the folder does not exist."""
    if isinstance(place, Path):
        return sorted(place.iterdir()) if place.is_dir() else []
    if place.bucket.startswith("gs:"):  # pyarrow does not see folders there
        return sorted({place / _parts(place, file)[0] for file in _files_below(place)}, key=str)
    return [place / info.base_name for info in _list(place, recursive=False)]


def entries(place: Place, name: str) -> Sequence[Place]:
    """Return every ``place/*/name``, file or folder, sorted.

    In object storage all files below are listed, 1,000 names per request, which is cheaper than one request per name.
    """
    if isinstance(place, Path):
        return sorted(place.glob(f"*/{name}"))
    pairs = {tuple(_parts(place, file)[:2]) for file in _files_below(place)}
    return [place / parts[0] / name for parts in sorted(pairs) if parts[1:] == (name,)]


def map_places(function: Callable[[Item], Result], items: Iterable[Item], place: Place) -> list[Result]:
    """Return ``[function(item) for item in items]``, in threads if ``place`` and its items are in object storage."""
    if isinstance(place, Path):
        return [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def modified_s(place: Place) -> float:
    """Return when a file was written, in seconds since 1970."""
    if isinstance(place, Path):
        return place.stat().st_mtime
    return float(_file_info(place).mtime.timestamp())


def remove_tree(place: Place) -> None:
    """Delete a folder and its content; on S3 pyarrow leaves an empty object for the parent folder."""
    if isinstance(place, Path):
        shutil.rmtree(place)
    elif place.bucket.startswith("gs:"):
        map_places(ObjectPath.unlink, _files_below(place), place)
    else:
        with _one_line_errors(place):
            _file_system(place).delete_dir(arrow_path(place))


@contextmanager
def atomic_path(path: Place) -> Iterator[Path]:
    """Yield a temporary file; on success rename it to ``path`` (flushed to disk) or upload it, else remove it."""
    if isinstance(path, ObjectPath):
        with _temporary_folder() as folder:
            yield folder / "content"
            _upload(folder / "content", path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def local_folder(place: Place) -> Iterator[Path]:
    """Yield a local folder to write into; if ``place`` is in object storage, the files are uploaded at the end."""
    if isinstance(place, Path):
        yield place
        return
    with _temporary_folder() as folder:
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        map_places(lambda file: _upload(file, place / file.relative_to(folder).as_posix()), files, place)


@contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """Yield a local file or folder to read: ``place`` itself, or a copy of the same name."""
    if isinstance(place, Path):
        yield place
        return
    with _temporary_folder() as folder:
        copy = folder / place.name
        parent_key = place.key[: -len(place.name)]
        files = _files_below(place) or [place]
        map_places(lambda file: _download(file, folder / file.key.removeprefix(parent_key)), files, place)
        try:
            yield copy
        except InputError as error:  # users know the place, not the copy
            raise InputError(str(error).replace(str(copy), str(place))) from None


@contextmanager
def naming_full_disk(place: Place) -> Iterator[None]:
    """Turn "disk full" and "not permitted" into one line that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            limit = _largest_file() if error.errno == errno.EFBIG else ""
            raise InputError(f"{place}: no space left to write results{limit}; free some, then --resume") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{place}: may not be written; choose another --out") from error
        raise


def _largest_file() -> str:
    """Describe the limit on the size of files on this machine, if there is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return ""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if limit == resource.RLIM_INFINITY else f" (a file may have {limit} bytes here: ulimit -f)"


def explain(place: Place, message: str) -> InputError:
    """Return an error of object storage as one line that says what to do."""
    for pattern, advice in _CAUSES.items():
        if re.search(pattern, message, re.IGNORECASE):
            return InputError(f"{place}: {advice}")
    return InputError(f"{place}: {' '.join(message.split())}")


_CAUSES = {
    r"NO_?SUCH_?BUCKET|bucket does not exist": "no such bucket; create it, or choose another --out",
    r"NO_SUCH_UPLOAD|NoSuchKey": "disappeared while it was written; is another program deleting files there?",
    r"ACCESS_?DENIED|ACCESS_?KEY|SIGNATURE|TOKEN|UNAUTH|PERMISSION_DENIED|FORBIDDEN|HTTP.{0,20} 40[13]|credentials": (
        "access denied; check your credentials, and that they may list, read, write and delete there"
    ),
    r"NETWORK_CONNECTION|UNAVAILABLE|TIMEOUT|Could not connect|could not resolve|curl": (
        "cannot be reached; check the network and the endpoint. Finished trials are kept: then --resume"
    ),
}
_TEMPORARY = r"NETWORK_CONNECTION|UNAVAILABLE|SLOW_DOWN|THROTTL|TIMEOUT|INTERNAL|Could not connect"


@contextmanager
def _one_line_errors(place: ObjectPath) -> Iterator[None]:
    """Turn an error of pyarrow into one line; FileNotFoundError stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise explain(place, str(error)) from error


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bert-encoding-") as name, naming_full_disk(Path(name)):
        yield Path(name)


def _file_system(place: ObjectPath) -> Any:
    return _connect(place.bucket, place.query)


def _file_info(place: ObjectPath) -> Any:
    with _one_line_errors(place):
        return _file_system(place).get_file_info(arrow_path(place))


def _list(place: ObjectPath, recursive: bool) -> list[Any]:
    """Return pyarrow's ``FileInfo`` of each file and folder in a folder, or below it, sorted by path."""
    from pyarrow.fs import FileSelector

    with _one_line_errors(place):
        try:
            infos = _file_system(place).get_file_info(FileSelector(arrow_path(place), recursive=recursive))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if re.search("No such file or directory|Cannot use file", str(error)):  # on gs://
                return []
            raise
    return sorted(infos, key=lambda info: str(info.path))


def _files_below(place: ObjectPath) -> list[ObjectPath]:
    paths = [str(info.path) for info in _list(place, recursive=True) if info.is_file]
    return [ObjectPath(place.bucket, path.partition("/")[2], place.query) for path in paths]


def _parts(place: ObjectPath, below: ObjectPath) -> list[str]:
    """Return the names that lead from a folder to a file below it."""
    return below.key[len(place.key) :].lstrip("/").split("/")


def _upload(file: Path, place: ObjectPath) -> None:
    """Upload a file as one object, completely or not at all; retry after temporary errors.

    A stream of pyarrow completes its object even if it is discarded half-written, so it must not be interrupted. Only
    the main thread receives signals, hence another one writes.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(_put, file, place).result()
            return
        except OSError as error:
            if pause_s is None or not re.search(_TEMPORARY, str(error)):
                raise explain(place, str(error)) from error
            time.sleep(pause_s)


def _put(file: Path, place: ObjectPath) -> None:
    """Write an object in one call; pyarrow's ``copy_files`` ignores errors on closing."""
    content = pyarrow.memory_map(str(file)).read_buffer() if file.stat().st_size else b""
    stream = _file_system(place).open_output_stream(arrow_path(place), compression=None)
    stream.write(content)
    stream.close()


def _download(place: ObjectPath, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(place.read_bytes())
