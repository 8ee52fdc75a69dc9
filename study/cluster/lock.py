"""One driver per study: its lock names the owner, and becomes free when the owner has ended.

In a folder it is a file lock of the operating system, which ends with its process. In object storage it is an object
that is created only if none exists, and that its owner renews every `BEAT_S` seconds if it is still its own. Another
driver may take it over

- if the owner ran on this machine and has ended (by process id and start, in the same boot and process namespace),
- if it has not been renewed for `STALE_S` seconds, by the clock of the storage,
- if the user forces it, whatever its age.

A driver that loses its lock ends without writing to the study again. Each takeover is recorded by the new owner.

The time in which a driver holds the lock is a session, and has an id. Trials carry it to the workers, which may outlive
their driver.
"""

import json
import logging
import os
import platform
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import psutil

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.storage import ObjectPath, Place
from study.cluster.conditional_write import ConditionalObject, conditional_object

LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"
BEAT_S, STALE_S = 30.0, 300.0

logger = logging.getLogger(__name__)
_held: ContextVar[str] = ContextVar("session", default="")


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str = "?"
    pid: int = 0
    since: str = "?"  # when it acquired the lock, by its own clock
    machine: str | None = None  # boot and process namespace, within which a process id is unique
    process_start_s: float = 0.0  # distinguishes the process from a later one with the same id
    token: str = ""  # id of the session

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


@dataclass
class Hold:
    """A lock that is requested, and then held."""

    may_force: bool = False  # take it from another run even if that is running
    takeover: dict[str, Any] | None = None  # what to record, if it was taken from another run
    lost_to: Owner | None = None  # the process that took it over; then nothing may be written any more
    ended: threading.Event = field(default_factory=threading.Event)  # set when the lock is no longer needed


@contextmanager
def holding(folder: Place, hold: Hold) -> Iterator[None]:
    """Hold a study's lock; raise InputError if another run holds it, or has taken it over by the end."""
    mine = this_process()
    with _holding_file(folder, mine) if isinstance(folder, Path) else _holding_object(folder, mine, hold):
        previous = _held.set(mine.token)
        try:
            yield
        finally:
            _held.reset(previous)


def this_process() -> Owner:
    """Return this process as the owner of a new lock."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = psutil.Process().create_time()
    return Owner(platform.node(), os.getpid(), now, _machine(), start, uuid.uuid4().hex)


def session_id() -> str:
    """Return the id of the session of this process, ``""`` if it holds no study."""
    return _held.get()


def is_held_by(folder: Place, session: str) -> bool:
    """Whether a session still holds a study, on every machine; raise InputError if object storage cannot be read."""
    try:
        return _parse((folder / (OWNER_FILE if isinstance(folder, Path) else LOCK_FILE)).read_bytes()).token == session
    except FileNotFoundError:
        return False


@contextmanager
def _holding_file(folder: Path, mine: Owner) -> Iterator[None]:
    lock, owner = filelock.FileLock(folder / LOCK_FILE, blocking=False), folder / OWNER_FILE
    try:
        lock.acquire()
    except filelock.Timeout:
        content = b""
        with suppress(FileNotFoundError):  # it may end at this moment
            content = owner.read_bytes()
        raise _refusal(folder, _parse(content), "wait for it or end it") from None
    try:
        write_json(owner, asdict(mine))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _holding_object(folder: ObjectPath, mine: Owner, hold: Hold) -> Iterator[None]:
    lock = conditional_object(folder / LOCK_FILE)
    tag, hold.takeover = _acquire(lock, folder, mine, hold.may_force)
    renewal = threading.Thread(target=_renew, args=(lock, mine, tag, hold), daemon=True)
    renewal.start()
    try:
        yield
    except KeyboardInterrupt:
        if hold.lost_to is None:
            raise
    finally:
        hold.ended.set()
        renewal.join()
    if hold.lost_to is not None:
        raise InputError(f"{folder}: another run took this study over ({hold.lost_to}); this one has ended")


def _refusal(folder: Place, owner: Owner, advice: str) -> InputError:
    who = f" ({owner})" if owner != Owner() else ""
    return InputError(f"{folder}: another run is at work on this study{who}; {advice}")


def _acquire(
    lock: ConditionalObject, folder: ObjectPath, mine: Owner, may_force: bool
) -> tuple[str, dict[str, Any] | None]:
    """Return the tag of the acquired lock, and the takeover to record if it was another run's."""
    tag = lock.write(_content(mine, 0), None)
    if tag is not None:
        _check_conditions(lock, folder, mine, tag)
        return tag, None
    stored = lock.read()
    if stored is None:  # released at this moment
        return _acquire(lock, folder, mine, may_force)
    owner = _parse(stored.content)
    is_free = has_ended(owner) or stored.age_s > STALE_S
    if not (is_free or may_force):
        age = f"last sign of life {stored.age_s:.0f} s ago"
        raise _refusal(folder, owner, f"wait for it, end it, or take the study from it with --take-over ({age})")
    tag = lock.write(_content(mine, 0), stored.tag)
    if tag is None:
        raise InputError(f"{folder}: another run takes this study over at this moment; wait for it")
    return tag, {
        "at": mine.since,
        "from": {"host": owner.host, "pid": owner.pid, "since": owner.since},
        "by": {"host": mine.host, "pid": mine.pid},
        "silent_s": round(stored.age_s, 1),
        "forced": not is_free,
    }


def _check_conditions(lock: ConditionalObject, folder: ObjectPath, mine: Owner, tag: str) -> None:
    """Refuse a service that ignores conditions: two runs would both believe that they hold the lock."""
    if lock.write(_content(mine, 1), None) is not None:
        lock.delete(tag)
        raise InputError(f"{folder}: this storage ignores If-None-Match, which the lock needs; choose another --out")


def has_ended(owner: Owner) -> bool:
    """Whether a process of this machine has ended; False for other machines, where this cannot be known."""
    if owner.machine is None or owner.machine != _machine():
        return False
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.process_start_s) > 2
    except psutil.NoSuchProcess:
        return True


def _renew(lock: ConditionalObject, mine: Owner, tag: str, hold: Hold) -> None:
    """Renew the lock until the study ends, then delete it; if another run took it, end the study."""
    n_beats = 0
    while not hold.ended.wait(BEAT_S):
        n_beats += 1
        try:
            new_tag = lock.write(_content(mine, n_beats), tag)
            stored = lock.read() if new_tag is None else None
        except InputError as error:  # perhaps temporary; nobody takes the lock for some time
            logger.warning("the lock could not be renewed: %s", error)
            continue
        owner = _parse(stored.content) if stored is not None else Owner()
        if stored is not None and owner == mine:
            new_tag = stored.tag  # an earlier renewal succeeded although its response was lost
        if new_tag is None:
            hold.lost_to = owner
            _interrupt()
            return
        tag = new_tag
    try:
        lock.delete(tag)
    except InputError as error:
        logger.warning("the lock remains for some minutes: %s", error)


def _interrupt() -> None:
    """End the main thread as Ctrl-C does, or by SIGTERM if Ctrl-C is ignored, as with nohup."""
    is_heard = callable(signal.getsignal(signal.SIGINT))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT if is_heard else signal.SIGTERM)


def _content(owner: Owner, n_beats: int) -> bytes:
    """Return a content that no earlier renewal had: the tag on S3 is a hash of it."""
    return json.dumps(asdict(owner) | {"n_beats": n_beats}).encode()


def _parse(content: bytes) -> Owner:
    """Return the owner; an unknown one if the content is damaged."""
    try:
        values = json.loads(content)
        return Owner(**{name: values[name] for name in Owner.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return Owner()


def _machine() -> str | None:
    """Return an id of this boot and process namespace, None if the operating system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
